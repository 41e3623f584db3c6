"""The grids: what can be run, shared seeds, and the numbers of the literature they are held to."""

import functools
import json
from collections import Counter, defaultdict
from fnmatch import fnmatchcase

import pytest

from lib import experiments
from lib.config import Run
from lib.experiments import EXPERIMENTS, KEPT_DENSE, PROFILES, runs
from lib.masking import GROWTH, PRUNE, REDISTRIBUTION
from lib.measures import MEASURES
from lib.methods.masks import maskable_parameters
from lib.models import _skeleton, model_spec
from lib.results.rows import published

CELLS = [
    (name, profile)
    for name in EXPERIMENTS
    for profile in PROFILES
    if EXPERIMENTS[name].blocks.get(profile)
]


@functools.cache
def weights_of(model: str) -> dict[str, int]:
    """Numbers of maskable weights by parameter name."""
    return {name: p.numel() for name, p in maskable_parameters(_skeleton(model, 1.0)).items()}


def left_dense(run: Run, weight: str) -> bool:
    return any(weight.startswith(k + ".") or fnmatchcase(weight, k) for k in run.keep_dense)


@pytest.mark.parametrize(("name", "profile"), CELLS)
def test_a_grid_can_be_trained_and_paired(name: str, profile: str) -> None:
    """Rules and measures exist, no layer starts empty, and the cells share their seeds, the first
    seed first: whoever stops early wants every cell once.
    """
    found, seeds = runs(name, profile), defaultdict(set)
    for run in found:
        assert model_spec(run.model).dataset == run.dataset
        assert run.prune in PRUNE and run.growth in GROWTH
        assert run.redistribution in REDISTRIBUTION
        assert run.method != "deepr" or run.weight_decay == 0.0
        if run.method not in ("dense", "snip"):
            masked = [n for w, n in weights_of(run.model).items() if not left_dense(run, w)]
            assert min(masked) * run.density >= 0.5, run
        fields = {k: v for k, v in run.non_default().items() if k != "seed"}
        seeds[json.dumps(fields, sort_keys=True)].add(run.seed)
    assert all(mine == set(range(len(mine))) for mine in seeds.values())
    assert [run.seed for run in found] == sorted(run.seed for run in found)
    assert set(EXPERIMENTS[name].measures) <= set(MEASURES)


@pytest.mark.parametrize(
    ("table", "name", "model"),
    [
        ("mnist_lenet300-100", "mnist_compression", "lenet300-100"),
        ("mnist_lenet5", "mnist_compression", "lenet5"),
        ("mnist_sparse_summary", "baseline_network", "lenet300-100"),
        ("mnist_sparse_summary", "baseline_network", "lenet300-100-bn"),
        ("cifar10_table", "cifar10_table", ""),
        ("wrn28-2_cifar10_summary", "wrn28_2_curve", ""),
    ],
)
def test_every_published_cell_is_planned_at_ten_seeds(table: str, name: str, model: str) -> None:
    rows = published(table).dropna(subset=["density"])
    methods = ["sparse_momentum", "dense", "snip"]
    if not table.startswith("mnist_lenet"):  # what the others measured is theirs to repeat
        methods += ["dsr", "set", "deepr"]
    rows = rows[rows.method.isin(methods)]
    planned = Counter((r.model, r.method, r.density) for r in runs(name, "paper"))
    assert len(rows)
    for row in rows.itertuples():
        assert planned[model or str(row.model), row.method, row.density] >= 10, row


@pytest.mark.parametrize("axis", ["prune_rate", "momentum"])
def test_the_sensitivity_grid_is_the_papers(axis: str) -> None:
    planned = {(r.model, r.method, getattr(r, axis)) for r in runs("sensitivity", "paper")}
    for row in published(f"sensitivity_{axis}").itertuples():
        assert (row.model, row.method, getattr(row, axis)) in planned


@pytest.mark.parametrize("model", KEPT_DENSE)
def test_the_accidentally_dense_layers_are_as_large_as_published(model: str) -> None:
    known, weights = KEPT_DENSE[model], weights_of(model)
    assert sum(weights.values()) == known.weights
    kept = [n for w, n in weights.items() if any(w.startswith(f"{k}.") for k in known.layers)]
    assert sum(kept) == known.kept and len(kept) == len(known.layers)
    rows = published("accidental_dense_layers_before_aug2019")
    for row in rows[rows.model == model].itertuples():
        real = 100 * known.real_density(float(row.density))
        assert real == pytest.approx(float(row.value), abs=0.051)


def test_the_partially_dense_resnet_is_dsrs() -> None:
    """DSR's code base leaves 9,408 weights of conv1 and 2,768,896 of the shortcuts dense."""
    run = next(r for r in runs("imagenet", "paper") if r.keep_dense)
    left = sum(n for w, n in weights_of("resnet50").items() if not left_dense(run, w))
    assert left == 25_502_912 - 9_408 - 2_768_896


def test_a_run_is_measured_for_whoever_needs_it() -> None:
    """The table's runs are the features' and the speed-ups' runs: trained once, measured there."""
    run = runs("cifar10_table", "quick")[0]
    assert experiments.measures(run, "cifar10_table", "quick") == ("features", "speedups")
    assert experiments.measures(run.overridden(epochs=1), "features", "quick") == ("features",)
    assert experiments.measures(runs("main_results", "quick")[0], "main_results", "quick") == ()


@pytest.mark.parametrize(
    ("only", "n"), [([], 22), (["seed=0"], 11), (["seed=0", "method=set", "method=dsr"], 4)]
)
def test_select_keeps_any_value_of_a_field_and_all_fields(only: list[str], n: int) -> None:
    assert len(experiments.select(runs("main_results", "smoke"), only)) == n
