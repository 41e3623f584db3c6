"""The sparse kernels' rows read from made-up ones, and the topics that write them in the smallest
size.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from lib import figures
from lib.results import clock as kernel_rows
from lib.results.clock import ALL_LAYERS, PARTS
from lib.results.reading import NoRuns, Source
from tests.support.made_up_kernels import (
    BATCHES,
    DENSE_S,
    LAYERS,
    SHARES,
    training_ratio,
    write_kernels,
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kernels")
    write_kernels(folder)
    return folder


def test_whole_steps_are_one_row_per_network_and_weights(root: Path) -> None:
    every = kernel_rows.whole_steps(root)
    alone = every[every["threads"] == kernel_rows.ONE].set_index("model")
    for model in BATCHES:
        assert alone.loc[model, "training"] == pytest.approx(1.2 * training_ratio(model, 0.05))
    found = every[every["threads"] == kernel_rows.ALL]
    expected = [(model, share) for model in BATCHES for share in SHARES]
    assert list(zip(found["model"], found["density"], strict=True)) == expected
    for row in found.to_dict("records"):
        ratio = training_ratio(row["model"], row["density"])
        assert row["training"] == pytest.approx(ratio)
        assert row["training_low"] == pytest.approx(0.9 * ratio)
        assert row["dense_s"] / row["sparse_s"] == pytest.approx(row["training"])
        assert row["batch"] == BATCHES[row["model"]] and (row["n"], row["layers"]) == (3, 8)


def test_rows_that_were_not_measured_are_gaps(tmp_path: Path) -> None:
    """Rows of an earlier measurement have no seconds; the table says so instead of inventing."""
    path = write_kernels(tmp_path, ("sparse_steps",))
    lines = path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if "seconds: " not in line and "layers computed" not in line]
    path.write_text("".join(kept))
    found = kernel_rows.whole_steps(tmp_path)
    assert found["dense_s"].isna().all() and found["training"].notna().all()
    frame = figures.TABLES["speedups_kernels"](Source("quick", tmp_path)).frame
    assert set(frame["dense (s)"]) == {"–"} and set(frame["layers run sparse"]) == {"–"}


def test_machines_of_several_measurements_are_one_line(root: Path) -> None:
    rows = kernel_rows.kernel_rows(root)
    assert kernel_rows.machine(rows) == "a machine"
    rows = rows.iloc[:3].assign(
        machine=[
            f"2 x CPU; torch 2, commit {c}, load {x}, 2026-11-22"
            for c, x in (("a1", "1.6"), ("b2", "0.9"), ("a1", "1.6"))
        ]
    )
    expected = "2 x CPU; torch 2, commit a1, b2, load 0.9 to 1.6, 2026-11-22"
    assert kernel_rows.machine(rows) == expected


def test_parts_sum_to_the_step(root: Path) -> None:
    found = kernel_rows.parts(root)
    assert list(dict.fromkeys(found["model"])) == list(BATCHES)
    sums = found.groupby(["model", "side"])["value"].sum()
    assert sums["vgg16-d", "dense"] == pytest.approx(1.5)
    assert sums["vgg16-d", "sparse"] == pytest.approx(0.1 * len(PARTS))
    assert kernel_rows.calibrations(root) == dict.fromkeys(BATCHES, 12.0)


def test_layers_keep_their_order(root: Path) -> None:
    found = kernel_rows.layer_ratios(root)
    assert list(found.index) == [*LAYERS, ALL_LAYERS]
    assert list(found.columns) == pytest.approx(SHARES)


def test_window_rows_give_counts_and_flops(root: Path) -> None:
    found = kernel_rows.window_counts(root).set_index(["window", "update"])
    assert found["differing"].to_dict() == {(44, 1): 2, (44, 2): 0, (153, 1): 0, (153, 2): 0}
    assert set(found["grown"]) == {100}
    assert kernel_rows.window_flops(root)["lenet300-100", 0] == 36.7


@pytest.mark.parametrize("topic", ["sparse_steps", "breakdown", "sparse_layers", "window"])
def test_a_topic_that_was_not_measured_is_named(tmp_path: Path, topic: str) -> None:
    others = tuple({"sparse_steps", "breakdown", "sparse_layers", "window"} - {topic})
    write_kernels(tmp_path, others)
    with pytest.raises(NoRuns, match=f"bench --only {topic}"):
        kernel_rows.kernel_rows(tmp_path, topic)


def test_no_file_and_other_columns_are_told(tmp_path: Path) -> None:
    with pytest.raises(NoRuns, match="have not been timed"):
        kernel_rows.kernel_rows(tmp_path)
    path = write_kernels(tmp_path)
    path.write_text(path.read_text().replace("topic,what", "what,topic", 1))
    with pytest.raises(NoRuns, match="time the kernels again"):
        kernel_rows.kernel_rows(tmp_path)


# ------------------------------------------------------------------------------ the topics


def test_events_belong_to_one_part() -> None:
    from lib.bench.breakdown import part_of

    backward = "autograd::engine::evaluate_function: "
    for event, part in {
        "_Conv2d": kernel_rows.KERNELS,
        f"{backward}_GatherBackward": kernel_rows.KERNELS,
        "aten::conv2d": kernel_rows.DENSE_LAYERS,
        f"{backward}ConvolutionBackward0": kernel_rows.DENSE_LAYERS,
        f"{backward}AddmmBackward0": kernel_rows.DENSE_LAYERS,
        "_ToBlocked": kernel_rows.CONVERSIONS,
        f"{backward}_FromBlockedBackward": kernel_rows.CONVERSIONS,
        "_Norm": kernel_rows.ELEMENTWISE,
        f"{backward}MaxPool2DWithIndicesBackward0": kernel_rows.ELEMENTWISE,
        "step of the weights": kernel_rows.OPTIMIZER,
        "aten::cross_entropy_loss": kernel_rows.REST,
    }.items():
        assert part_of(event) == part, event


def test_profiled_parts_sum_to_the_step() -> None:
    torch = pytest.importorskip("torch")
    from lib.bench.breakdown import profiled
    from lib.bench.sparse import training_step

    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8 * 36, 10)
    )
    images, labels = torch.randn(4, 3, 8, 8), torch.randint(0, 10, (4,))
    step = training_step(network, images, labels, False)
    step()
    found = profiled(step)
    assert set(found) == set(PARTS[:-1])
    assert all(seconds >= 0 for seconds in found.values())
    for part in (kernel_rows.DENSE_LAYERS, kernel_rows.ELEMENTWISE, kernel_rows.OPTIMIZER):
        assert found[part] > 0, part
    assert found[kernel_rows.KERNELS] == found[kernel_rows.CONVERSIONS] == 0


def test_window_differences_vanish_with_a_long_window() -> None:
    """A window of one step chooses otherwise, one of all steps but the first (nearly) alike; the
    run itself takes the masks of the full momentum.
    """
    torch = pytest.importorskip("torch")
    from lib.bench.window import window_differences
    from lib.config import Run
    from lib.data import Dataset

    images = torch.randn(80, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(80) % 10
    part = {"x": images[:8], "y": labels[:8]}
    data = Dataset(
        name="mnist",
        train_x=images,
        train_y=labels,
        val_x=part["x"],
        val_y=part["y"],
        test_x=part["x"],
        test_y=part["y"],
        num_classes=10,
        sha256="0" * 64,
        augment=None,
    )
    run, steps = Run(batch_size=4, density=0.1), 20
    found = list(window_differences(run, 2, (1, steps - 1), data))
    assert [update for update, *_ in found] == [1, 2]
    for _, grown, differing, loop in found:
        assert grown > 0 and loop.engine.name == "torch"
        assert differing[1] > differing[steps - 1]
    with pytest.raises(ValueError, match="more than the window"):
        next(iter(window_differences(run, 1, (steps,), data)))


def test_stored_rows_replace_only_their_setting(tmp_path: Path) -> None:
    from lib.bench import speed as bench

    path = write_kernels(tmp_path)
    before = kernel_rows.whole_steps(tmp_path)
    setting = kernel_rows.setting_of("alexnet-s", 0.05, 128)
    row = {"topic": "sparse_steps", "what": kernel_rows.RATIOS["training"], "setting": setting}
    row |= {"value": 4.0, "unit": "x", "low": 4.0, "high": 4.0, "n": 5, "machine": "another"}
    bench._store(path, "sparse_steps", [row], keep_other_settings=True)
    after = kernel_rows.whole_steps(tmp_path)
    assert len(after) == len(before)
    after = after[after["threads"] == kernel_rows.ALL]
    new = after[(after["model"] == "alexnet-s") & (after["density"] == 0.05)].iloc[0]
    assert new["training"] == 4.0 and new["dense_s"] != DENSE_S and new["machine"] == "another"
    bench._store(path, "sparse_steps", [row], keep_other_settings=False)
    left = kernel_rows.whole_steps(tmp_path)["threads"].tolist()
    assert sorted(left) == [kernel_rows.ALL, *[kernel_rows.ONE] * len(BATCHES)]
    assert len(kernel_rows.parts(tmp_path)) > 0


def test_unknown_network_of_a_topic_is_refused(tmp_path: Path) -> None:
    from lib.bench import speed as bench

    with pytest.raises(ValueError, match="network of sparse_steps"):
        bench.bench(1, tmp_path, ["sparse_steps"], ["vgg16-x"])
