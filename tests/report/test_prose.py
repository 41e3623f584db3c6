"""The prose against made-up rows: what is said, what is left out, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lib.config import Run
from lib.report import compose
from lib.report.prose import TEXTS, Author, Outdated
from lib.results.reading import Source
from tests.support.made_up_grid import write_grid

Say = Callable[[str], list[str]]


def mnist(run: Run) -> float:
    """Sparse momentum 2 %, DSR 3, SET 4 but 1.5 at a tenth, each a little more with the seed."""
    base = {"sparse_momentum": 2.0, "dsr": 3.0, "set": 4.0 if run.density < 0.1 else 1.5}
    return base.get(run.method, 5.0) + run.seed**2 / 1000 * (1 + len(run.method))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    write_grid(folder, "main_results", "quick", error=lambda run: 30.0)
    write_grid(folder, "main_results", "paper", error=mnist)
    write_grid(folder, "sensitivity", "quick")
    return folder


@pytest.fixture
def say(root: Path, tmp_path: Path) -> Say:
    """The paragraphs of a text written for the test."""

    def paragraphs(text: str) -> list[str]:
        (tmp_path / "some.md").write_text(text)
        return list(Author(compose.names(Source("quick", root)), tmp_path).paragraphs("some.md"))

    return paragraphs


def test_numbers_are_those_of_the_largest_scale(say: Say) -> None:
    text = 'It errs {{ main_results.error("sparse_momentum", 0.05) }} %, {{ main_results.scale }}.'
    assert say(text) == ["It errs 2.46 %, the paper's scale, 100 epochs, n = 10."]


def test_a_difference_in_words(say: Say) -> None:
    [text] = say('Against SET: {{ main_results.versus("sparse_momentum", "set") }}.')
    assert text == (
        "Against SET: less than SET at 1 to 5 % (by 1.66 points), more than SET at 10 % "
        "(by 0.84 points)."
    )


def test_a_sentence_whose_rows_are_missing_is_left_out_and_no_other(say: Say) -> None:
    text = (
        'First.{% claim %} At 1 % {{ trainability.learned("sparse_momentum", 0.01) }} learn.'
        "{% endclaim %} Last.\n\n"
        'Alone {{ trainability.learned("sparse_momentum", 0.01) }}.\n\n'
        "{% claim trainability.learned('sparse_momentum', 0.01).k > 3 %}Also not.{% endclaim %}"
    )
    assert say(text) == ["First. Last."]


def test_a_sentence_that_the_rows_contradict_is_refused_with_place_and_values(say: Say) -> None:
    condition = 'main_results.minus("sparse_momentum", "set", 0.1).high < 0'
    text = f"Fine.\n\nOne line,\n{{% claim {condition} %}}less than SET at 10 %.{{% endclaim %}}\n"
    with pytest.raises(Outdated) as refused:
        say(text)
    said = str(refused.value)
    assert said.startswith("lib/report/text/some.md, line 4: the rows no longer say this")
    assert condition in said and "less than SET at 10 %." in said
    assert "1.085 and 0;" in said  # the two sides of the condition as they are now


def test_a_sentence_that_the_rows_support_stands(say: Say) -> None:
    condition = 'main_results.minus("sparse_momentum", "set", 0.02).high < 0'
    assert say(f"{{% claim {condition} %}}Less.{{% endclaim %}}") == ["Less."]


def test_at_a_readers_own_scale_a_contradicted_sentence_is_left_out(say: Say) -> None:
    condition = 'sensitivity.error("dense", momentum=0.9).mean > 50'
    assert say(f"Kept. {{% claim {condition} %}}Not so.{{% endclaim %}}") == ["Kept."]


def test_mistakes_in_a_text_have_a_place(say: Say) -> None:
    for text, message in (
        ("Good.\n\n{{ nosuch.error('set') }}", r"some\.md, .*line 3: 'nosuch' is undefined"),
        ("{% claim %}never ended", r"some\.md, line 1: "),
        ("{{ main_results.error('set', 0.05, colour=1) }}", r"some\.md, .*line 1: .*colour"),
    ):
        with pytest.raises(ValueError, match=message):
            say(text)


def test_the_texts_themselves_hold_for_the_committed_rows() -> None:
    author = Author(compose.names(Source("quick")))
    author = Author(author.names | {"findings": lambda: ""})
    for file in TEXTS.glob("*.md"):
        for text in author.paragraphs(file.name):
            assert "nan" not in text.lower().split(), text
            assert "{" not in text, text
