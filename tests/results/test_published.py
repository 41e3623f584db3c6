"""The published tables read, hold what the paper says, and are refused when damaged."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from lib import paths
from lib.results.published import EXTRA, PublishedError, published, published_names


@pytest.mark.parametrize("name", [n for n in published_names() if n != "claims"])
def test_every_published_table_reads(name: str) -> None:
    table = published(name)
    assert len(table)
    assert (table["source"] != "").all()
    for column in table.columns.intersection(list(EXTRA)):  # a column that says nothing is a slip
        assert (table[column].notna() & (table[column].astype(str) != "")).any(), column


def test_the_published_tables_hold_what_the_paper_says() -> None:
    table = published("cifar10_table").set_index(["model", "method"])["test_error_pct"]
    assert table["vgg16-d", "sparse_momentum"] == 6.69
    assert table["wrn-22-8", "dense"] == 4.26
    mnist = published("mnist_sparse_summary")
    row = mnist[(mnist["method"] == "sparse_momentum") & (mnist["density"] == 0.05)].iloc[0]
    assert (row["value"], row["test_error_pct"]) == (98.53, 1.47)
    assert mnist[mnist["suspect"]][["method", "density"]].values.tolist() == [["dsr", 0.01]]


def test_the_raw_runs_give_the_published_means() -> None:
    table = published("dsr_authors_raw_runs_wrn28-2_and_mnist")
    for row in table.itertuples():
        runs = np.array([float(x) for x in str(row.runs).split()])
        assert len(runs) == row.n
        assert runs.mean() == pytest.approx(row.value, abs=2e-3)
        assert runs.std(ddof=1) / np.sqrt(len(runs)) == pytest.approx(row.standard_error, abs=2e-4)


def test_pooled_class_specialisation_follows_from_its_layers() -> None:
    # pooled means over all kept channels, from the same arrays (official feature data)
    pooled = {
        ("alexnet-s", "dense"): 0.1973,
        ("alexnet-s", "sparse_momentum"): 0.1800,
        ("vgg16-d", "dense"): 0.1980,
        ("vgg16-d", "sparse_momentum"): 0.1870,
        ("wrn-28-2", "dense"): 0.1638,
        ("wrn-28-2", "sparse_momentum"): 0.1666,
    }
    table = published("class_specialization_official_feature_data")
    for key, group in table.groupby(["model", "method"]):
        mean = (group["value"] * group["n"]).sum() / group["n"].sum()
        assert mean == pytest.approx(pooled.pop(key), abs=6e-5)
    assert not pooled


@pytest.mark.parametrize(
    ("old", "new", "place", "message"),
    [
        ("method,label", "label,method", ":1:", "header is"),
        ("6.69,0.049", "6.69,0.049,", ":13:", "17 fields, expected 16"),
        ("dense,dense,alexnet-s", "thick,dense,alexnet-s", ":2:", "method is 'thick'"),
        ("12.95,0.056", "about 13,0.056", ":2:", "value is 'about 13'"),
        (",12.95,false", ",12.59,false", ":2:", "but the value gives 12.95"),
        (",1.0,test", ",100,test", ":2:", "expected a fraction"),
        (",12.95,false", ",12.95,true", ":2:", "no note that says why"),
        ('"paper, table 1",exact', ",exact", ":2:", "source or quantity is empty"),
        (",exact,", ",certain,", ":2:", "confidence is 'certain'"),
    ],
)
def test_a_damaged_published_table_is_refused(
    tmp_path: Path, old: str, new: str, place: str, message: str
) -> None:
    text = (paths.published_dir() / "cifar10_table.csv").read_text(encoding="utf-8")
    assert old in text
    (tmp_path / "t.csv").write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(PublishedError, match=re.escape(message)) as caught:
        published("t", tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 't.csv'}{place}")
    with pytest.raises(PublishedError, match=r"no such table; known are t\."):
        published("u", tmp_path)
