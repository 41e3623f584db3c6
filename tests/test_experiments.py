"""The grids: what they say is what the paper compares, and their numbers fit the networks."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from fnmatch import fnmatchcase

import pandas as pd
import pytest
import torch

from lib import experiments, paths
from lib.config import Run
from lib.experiments import EXPERIMENTS, KEPT_DENSE, PROFILES, runs
from lib.masking import GROWTH, PRUNE, REDISTRIBUTION, maskable_parameters
from lib.measures import MEASURES
from lib.models import build_model, maskable_weights, model_spec
from lib.results import store as results
from lib.results.merge import merge
from lib.results.published import published
from lib.runs import plan as planning
from lib.runs import runner
from lib.train import TrainingLoop, train
from tests.support.made_up_data import cifar
from tests.support.made_up_runs import make_curves, make_id, make_layers, make_row, named_by

CELLS = [
    (name, profile)
    for name in EXPERIMENTS
    for profile in PROFILES
    if EXPERIMENTS[name].blocks.get(profile)
]


def test_what_is_not_planned_at_every_profile() -> None:
    every = {(name, profile) for name in EXPERIMENTS for profile in PROFILES}
    at_hours = {
        "cifar10_table",
        "training_length",
        "ablations",
        "depth_scaling",
        "sensitivity",
        "computing",
        "features",
    }
    missing = {(name, "hours") for name in EXPERIMENTS if name not in at_hours}
    missing |= {("training_length", name) for name in PROFILES if name != "hours"}
    missing |= {("imagenet", "smoke"), ("imagenet", "quick"), ("computing", "quick")}
    assert every - set(CELLS) == missing


# --------------------------------------------------------------------------------------- any grid


@pytest.mark.parametrize(("name", "profile"), CELLS)
def test_every_run_can_be_built(name: str, profile: str) -> None:
    found = runs(name, profile)
    assert found, f"{name} has no runs at {profile}"
    for run in found:
        assert model_spec(run.model).dataset == run.dataset
        assert run.prune in PRUNE and run.growth in GROWTH
        assert run.redistribution in REDISTRIBUTION
        assert run.method != "deepr" or run.weight_decay == 0.0
    assert set(EXPERIMENTS[name].measures) <= set(MEASURES)


@pytest.mark.parametrize(("name", "profile"), CELLS)
def test_all_cells_share_their_seeds_and_the_first_comes_first(name: str, profile: str) -> None:
    """Paired tests need the same seeds; whoever stops early wants every cell once."""
    found = runs(name, profile)
    cells = defaultdict(set)
    for run in found:
        fields = {k: v for k, v in run.non_default().items() if k != "seed"}
        cells[json.dumps(fields, sort_keys=True)].add(run.seed)
    on_cifar = name in ("cifar10_table", "wrn28_2_curve", "speedups", "features", "dense_layers")
    usual = 1 if on_cifar and profile in ("smoke", "quick") else experiments.SEEDS[profile]
    seeds = {
        ("imagenet", "paper"): 3,
        ("computing", "hours"): 10,
        ("trainability", "paper"): 20,
    }.get((name, profile), usual)
    longer = {("ablations", "paper"): {20}}.get((name, profile), set())  # the 2 x 2 of one network
    assert set(map(frozenset, cells.values())) == {frozenset(range(n)) for n in (seeds, *longer)}
    assert [run.seed for run in found] == sorted(run.seed for run in found)


@pytest.mark.parametrize(("name", "profile"), CELLS)
def test_sparse_layers_never_start_empty(name: str, profile: str) -> None:
    """A uniform start at the density leaves every layer at least one weight."""
    for run in {(r.model, r.density, r.keep_dense): r for r in runs(name, profile)}.values():
        if run.method not in ("dense", "snip"):
            with torch.device("meta"):
                weights = WEIGHTS.setdefault(run.model, maskable_weights(build(run.model)))
            kept = [
                n
                for n in weights
                if any(n.startswith(k + ".") or fnmatchcase(n, k) for k in run.keep_dense)
            ]
            assert min(v for n, v in weights.items() if n not in kept) * run.density >= 0.5, run


WEIGHTS: dict[str, dict[str, int]] = {}


def build(name: str) -> torch.nn.Module:
    spec = model_spec(name)
    return spec.build(scale=1.0, num_classes=spec.num_classes, dropout=spec.dropout or 0.0)


# ----------------------------------------------------------------------------- against the tables


def at_paper(name: str) -> Counter[tuple[str, str, float]]:
    return Counter((r.model, r.method, r.density) for r in runs(name, "paper"))


def test_mnist_is_compared_where_the_literature_is() -> None:
    found = at_paper("mnist_compression")
    for model in ("lenet300-100", "lenet5"):
        table = published(f"mnist_{model}").dropna(subset=["density"])
        for row in table[table["method"].isin(["sparse_momentum", "snip", "dense"])].itertuples():
            assert found[model, row.method, row.density] == 10
    assert found["lenet300-100", "sparse_momentum", 0.2] == 10  # "20 % match or exceed dense"
    assert sum(found.values()) == 10 * (1 + 8 + 2 + 1 + 8 + 2 + 1)


def test_the_cifar_table_is_the_papers() -> None:
    table = published("cifar10_table")
    found = at_paper("cifar10_table")
    assert found == Counter(
        {(row.model, row.method, row.density): 10 for row in table.itertuples()}
    )
    for run in runs("cifar10_table", "paper"):
        assert (run.batch_size, run.epochs, run.lr_decay_every_steps) == (128, 250, 30_000)
    for run in runs("cifar10_table", "hours"):  # decays at the same parts of fewer epochs
        assert (run.batch_size, run.epochs, run.lr_decay_every_steps) == (128, 30, 3_600)
        assert run.train_samples == 0


def test_the_wrn_curve_is_the_papers() -> None:
    table = published("wrn28-2_cifar10_summary")
    found = at_paper("wrn28_2_curve")
    assert {(row.model, row.method, row.density) for row in table.itertuples()} <= set(found)
    assert {m for _, m, _ in found} - set(table["method"]) == {"static"}


def test_the_sensitivity_grid_is_the_papers() -> None:
    found = runs("sensitivity", "paper")
    for name, axis in (
        ("sensitivity_prune_rate", "prune_rate"),
        ("sensitivity_momentum", "momentum"),
    ):
        table = published(name)
        for row in table.itertuples():
            value = getattr(row, axis)
            assert any(
                r.model == row.model and r.method == row.method and getattr(r, axis) == value
                for r in found
            ), (row.model, row.method, axis, value)


def test_the_ablation_is_complete_and_contains_the_method_itself() -> None:
    found = Counter(
        (r.model, r.density, r.redistribution, r.growth) for r in runs("ablations", "paper")
    )
    assert len(found) == 5 * 5 * 3 and set(found.values()) == {10, 20}
    assert {cell for cell, seeds in found.items() if seeds == 20} == {
        ("lenet300-100", density, redistribution, growth)
        for density in (0.01, 0.05)
        for redistribution in ("momentum", "none")
        for growth in ("momentum", "random")
    }
    assert {d for model, d, *_ in found if model == "lenet300-100"} == {0.01, 0.05}
    mine = [
        r
        for r in runs("ablations", "paper")
        if (r.redistribution, r.growth) == ("momentum",) * 2 and r.seed < 10
    ]
    elsewhere = {
        r.run_id
        for name in ("main_results", "mnist_compression", "cifar10_table", "wrn28_2_curve")
        for r in runs(name, "paper")
    }
    assert {r.run_id for r in mine} <= elsewhere  # trained once


def test_readings_depart_from_ours_in_one_thing_except_all_together() -> None:
    ours = experiments.READINGS["ours"]
    changed = {
        name: {field for field, value in reading.items() if value != ours[field]}
        for name, reading in experiments.READINGS.items()
    }
    several = {
        "anywhere": {"options", "dense_window_steps"},
        "feedback": {"prune", "options"},  # rounding up, and what mends it
        "official": {"prune", "options", "dense_window_steps", "schedule"},
        "reset": {"options", "kernels"},
        "after": {"prune", "redistribution"},
    }
    assert {name: fields for name, fields in changed.items() if len(fields) > 1} == several
    assert [name for name, fields in changed.items() if not fields] == ["ours"]
    main = {run.run_id for run in runs("main_results", "paper")}
    mine = [r for r in runs("official_readings", "paper") if r == r.overridden(**ours)]
    assert len(mine) == 30 and {r.run_id for r in mine} <= main  # trained once
    for density in (0.01, 0.02, 0.05):
        at = [r for r in runs("official_readings", "paper") if r.density == density]
        assert len(at) == 10 * len(experiments.READINGS)


def test_families_differ_in_one_thing() -> None:
    names = {r.model for r in runs("depth_scaling", "paper")}
    assert {f"mlp-100x{n}" for n in (1, 2, 4, 8)} <= names
    assert {f"mlpbn-100x{n}" for n in range(1, 9)} <= names
    assert {f"wrn-{depth}-2" for depth in (10, 16, 22, 28)} <= names
    assert {f"wrn-16-{width}" for width in (1, 2, 4, 8)} <= names
    rules = defaultdict(set)
    for r in runs("depth_scaling", "paper"):
        if r.method != "dense":
            rules[r.model, r.init].add((r.redistribution, r.growth))
    both = {(a, b) for a in ("momentum", "none") for b in ("momentum", "random")}
    assert all(found == both for found in rules.values())


def test_the_baselines_are_trained_on_both_networks_and_in_their_authors_way() -> None:
    found = at_paper("baseline_network")
    table = published("mnist_sparse_summary")
    for row in table[table["density"] < 1].itertuples():
        for model in ("lenet300-100", "lenet300-100-bn"):
            assert found[model, row.method, row.density] >= 10, (model, row.method, row.density)
    theirs = [r for r in runs("baseline_network", "paper") if r.growth == "random_elsewhere"]
    assert {(r.model, r.method) for r in theirs} == {
        ("lenet300-100-bn", "set"),
        ("lenet300-100-bn", "dsr"),
    }
    for run in theirs:
        assert (run.schedule, run.weight_decay) == ("constant", 1e-4)
        if run.method == "dsr":
            assert run.prune_rate * round(run.density * 266_200) == pytest.approx(600)
    main = {run.run_id for run in runs("main_results", "paper")}
    assert main <= {run.run_id for run in runs("baseline_network", "paper")}  # trained once


def test_trainability_changes_one_thing_at_a_time() -> None:
    start = Run(model="lenet5", schedule="constant", epochs=10)
    changed = [
        {k for k, v in run.non_default().items() if v != start.non_default().get(k)}
        for run in runs("trainability", "paper")
    ]
    assert {frozenset(names - {"density", "seed"}) for names in changed} == {
        frozenset(),
        frozenset({"init"}),
        frozenset({"prune_rate"}),
        frozenset({"init_scale"}),
        frozenset({"method"}),
        frozenset({"growth"}),
        frozenset({"lr"}),
        frozenset({"init_scale", "lr"}),  # what helps at either end
    }


def test_the_partially_dense_resnet_is_dsrs() -> None:
    """DSR's code base leaves 9,408 weights of conv1 and 2,768,896 of the shortcuts dense."""
    with torch.device("meta"):
        net = build("resnet50")
    partial = {r.keep_dense for r in runs("imagenet", "paper") if r.keep_dense}
    assert len(partial) == 1
    left = maskable_parameters(net, next(iter(partial)))
    assert sum(p.numel() for p in left.values()) == 25_502_912 - 9_408 - 2_768_896
    assert {r.density for r in runs("imagenet", "paper")} == {0.1, 0.2, 1.0}


def test_imagenet_is_left_out_with_a_sentence(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("IMAGENET_ROOT", raising=False)
    said: list[str] = []
    table = runner.run_experiment("imagenet", "paper", results_root=tmp_path, say=said.append)
    assert table.empty
    assert "IMAGENET_ROOT to a folder with train/<class>/ and val/<class>/" in said[0]


# ---------------------------------------------------------------------------------- dense layers


@pytest.mark.parametrize("model", KEPT_DENSE)
def test_the_accidentally_dense_layers_are_as_large_as_we_say(model: str) -> None:
    net, known = build_model(model), KEPT_DENSE[model]
    weights = maskable_weights(net)
    left = maskable_parameters(net, known.layers)
    assert sum(weights.values()) == known.weights
    assert sum(p.numel() for p in left.values()) == known.weights - known.kept
    assert len(weights) - len(left) == len(known.layers)


def test_the_real_densities_are_the_published_ones() -> None:
    table = published("accidental_dense_layers_before_aug2019")
    assert len(table) == 10
    for row in table.itertuples():
        real = 100 * KEPT_DENSE[str(row.model)].real_density(float(row.density))
        assert real == pytest.approx(float(row.value), abs=0.051)
        assert int(row.maskable_weights) == KEPT_DENSE[str(row.model)].weights


def test_a_run_with_dense_layers_has_the_real_density() -> None:
    """`density` counts the layers that are masked; weights_active counts all."""
    run = next(r for r in runs("dense_layers", "smoke") if r.keep_dense)
    loop = TrainingLoop(run, cifar(20))
    known = KEPT_DENSE[run.model]
    active = sum(loop.masking.active().values()) + known.kept
    assert loop.masking.density == pytest.approx(run.density, abs=1e-6)
    assert active / known.weights == pytest.approx(known.real_density(run.density), abs=1e-6)
    assert "features.12.weight" not in loop.masking.masks


# ------------------------------------------------------------------------------------- measures


def test_a_run_is_measured_for_whoever_needs_it() -> None:
    """The table's runs are the features' and the speed-ups' runs: trained once, measured there."""
    run = runs("cifar10_table", "quick")[0]
    assert experiments.measures(run, "cifar10_table", "quick") == ("features", "speedups")
    alone = runs("main_results", "quick")[0]
    assert experiments.measures(alone, "main_results", "quick") == ()
    changed = run.overridden(epochs=1)
    assert experiments.measures(changed, "cifar10_table", "quick") == ()
    assert experiments.measures(changed, "features", "quick") == ("features",)
    for name in ("features", "speedups"):
        assert {r.run_id for r in runs(name, "smoke")} <= {
            r.run_id for r in runs("cifar10_table", "smoke")
        }


def measure_rows(i: int) -> list[dict[str, object]]:
    return [
        {
            "run_id": make_id(i),
            "measure": "features",
            "layer": f"relu{k}",
            "quantity": "histogram",
            "position": k,
            "value": k / 7,
        }
        for k in range(4)
    ]


def add(path, i: int) -> bool:
    return results.append_run(path, make_row(i), make_curves(i), make_layers(i), measure_rows(i))


def test_measures_are_stored_with_their_run(tmp_path) -> None:
    path = tmp_path / "features.csv"
    assert add(path, 1) and not add(path, 1)
    assert results.append_run(path, make_row(2), make_curves(2), make_layers(2))  # none of run 2
    found = results.read_measures(path, runs=results.read_runs(path))
    assert found.to_dict("records") == measure_rows(1)
    assert list(found.columns) == list(results.MEASURE_COLUMNS)
    assert results.runs_path(results.measures_path(path)) == path
    assert results.run_paths(tmp_path) == [path]
    assert results.read_measures(tmp_path / "absent.csv").empty


def test_what_a_killed_writer_left_in_the_measures_is_replaced(tmp_path) -> None:
    path = tmp_path / "features.csv"
    add(path, 1)
    text = results.measures_path(path).read_text()
    path.unlink()  # as if killed before the last of the files
    assert results.read_measures(path, runs=results.read_runs(path)).empty
    add(path, 1)
    assert results.measures_path(path).read_text() == text


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("position", 0.5, "position is 0.5"),
        ("value", float("nan"), "expected a finite float"),
        ("layer", "", "layer is '', expected a value"),
        ("quantity", "", "quantity is '', expected a value"),
        ("run_id", make_id(9), "belongs to run"),
        ("position", 1, "is on line 2 already"),
    ],
)
def test_bad_measures_are_refused(tmp_path, field: str, value: object, message: str) -> None:
    path, rows = tmp_path / "features.csv", measure_rows(1)
    rows[0] |= {"layer": "relu1", field: value}
    with pytest.raises(results.ResultsError, match=message):
        results.append_run(path, make_row(1), (), (), rows)
    assert not path.exists()


def test_shards_with_measures_are_merged(tmp_path) -> None:
    first, second, target = (tmp_path / n / "features.csv" for n in ("a", "b", "all"))
    add(first, 1)
    add(second, 2)
    assert merge([first, second], target) == 2
    assert results.read_measures(target)["run_id"].nunique() == 2
    plain = tmp_path / "plain.csv"
    results.append_run(plain, make_row(3), make_curves(3), make_layers(3))
    assert merge([plain], tmp_path / "c" / "x.csv") == 1
    assert not (tmp_path / "c" / "x.measures.csv").exists()


def test_rows_are_copied_only_with_the_measures_needed(tmp_path) -> None:
    """A run that another experiment has is not trained again, unless it was not measured there."""
    run, other = runs("features", "smoke")[:2]

    def store(run: Run, measures: list[dict[str, object]]) -> None:
        row = make_row(1) | {"experiment": "cifar10_table"} | named_by(run)
        results.append_run(table, row, (), (), [m | {"run_id": run.run_id} for m in measures])

    table = paths.results_csv("smoke", "cifar10_table", tmp_path)
    store(run, measure_rows(1))
    store(other, [])
    todo = runner.plan("features", "smoke", results_root=tmp_path)
    planning.copy_rows_of_other_experiments(todo)
    mine = results.read_runs(paths.results_csv("smoke", "features", tmp_path))
    assert mine["run_id"].tolist() == [run.run_id] and mine["experiment"].tolist() == ["features"]
    assert len(results.read_measures(paths.results_csv("smoke", "features", tmp_path))) == 4


# -------------------------------------------------------------------------- the way of computing


@pytest.mark.parametrize("profile", ["smoke", "hours", "paper"])
def test_each_network_is_computed_in_three_ways_from_the_same_settings(profile: str) -> None:
    found = defaultdict(set)
    for run in runs("computing", profile):
        others = {
            k: v for k, v in run.non_default().items() if k not in ("kernels", "precision", "seed")
        }
        found[json.dumps(others, sort_keys=True)].add((run.kernels, run.precision))
        assert run.method == "sparse_momentum"
        if run.kernels == "sparse":  # the measure times torch's layers, so that torch computes it
            assert "speedups" not in experiments.measures(run, "computing", profile)
    ways = {("torch", "fp32"), ("sparse", "fp32"), ("auto", "bf16")}
    assert len(found) >= 2 and all(ways == one for one in found.values())


# --------------------------------------------------------------------- several experiments at once


def test_a_run_of_two_experiments_is_trained_once(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("CHECKPOINT_ROOT", str(tmp_path / "checkpoints"))
    trained = []

    def train_all(title, tasks, board, threads, device, say) -> None:
        for run, plan in tasks:
            trained.append(run)
            row = make_row(1) | named_by(run)
            results.append_run(plan.csv, row, (), ())

    monkeypatch.setattr(runner, "train_all", train_all)
    names = ["mnist_compression", "sensitivity", "ablations"]
    tables = runner.run_experiments(
        names, "smoke", only=["model=lenet300-100"], results_root=tmp_path, say=lambda text: None
    )
    wanted = {
        name: {r.run_id for r in runs(name, "smoke") if r.model == "lenet300-100"} for name in names
    }
    assert {name: set(table["run_id"]) for name, table in tables.items()} == wanted
    assert len(trained) == len({r.run_id for r in trained}) == len(set.union(*wanted.values()))
    assert len(trained) < sum(map(len, wanted.values()))  # they do overlap
    assert [r.seed for r in trained] == sorted(r.seed for r in trained)


def test_experiments_without_such_a_run_are_left_out(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(runner, "train_all", lambda *args: None)
    found = runner.run_experiments(
        ["main_results", "ablations"],
        "smoke",
        only=["model=lenet5"],
        results_root=tmp_path,
        say=lambda text: None,
    )
    assert isinstance(found["ablations"], pd.DataFrame) and list(found) == ["ablations"]
    with pytest.raises(ValueError, match=r"no run has model=lenet9"):
        runner.run_experiments(["main_results", "ablations"], "smoke", only=["model=lenet9"])
    with pytest.raises(ValueError, match="unknown field"):
        runner.run_experiments(["main_results", "ablations"], "smoke", only=["modell=lenet5"])


# -------------------------------------------------------------------------- methods and networks


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("init", ["uniform", "erk"])
@pytest.mark.parametrize("method", ["snip", "rigl", "set", "small_dense", "static"])
@pytest.mark.parametrize("model", ["alexnet-s", "wrn-10-2"])
def test_methods_train_networks_with_batch_norm_and_dropout(
    model: str, method: str, init: str, one_thread: None
) -> None:
    if init == "erk" and method in ("snip", "small_dense"):
        pytest.skip("they choose their own densities")
    run = Run(
        dataset="cifar10",
        model=model,
        method=method,
        init=init,
        density=0.1,
        epochs=2,
        batch_size=10,
    )
    outcome = train(run, cifar(20, other=10))
    assert outcome.status == "ok" and outcome.steps == 4
    full = sum(maskable_weights(build_model(model)).values())
    assert outcome.weights_active == pytest.approx(0.1 * full, rel=0.03)
    if method == "snip":
        assert outcome.weights_active == round(0.1 * full)
        assert train(run, cifar(20, other=10)).test_error_pct == outcome.test_error_pct
    if method == "rigl":
        grown = {row["layer"]: row["active"] for row in outcome.layers if row["epoch"] == 2}
        start = TrainingLoop(run, cifar(20, other=10)).masking.active()
        assert grown == start  # RigL keeps the layers' densities


@pytest.mark.filterwarnings("ignore:.* were before masks were assigned")
def test_snip_may_cut_a_network_and_training_goes_on(one_thread: None) -> None:
    run = Run(
        dataset="cifar10", model="alexnet-s", method="snip", density=0.05, epochs=2, batch_size=5
    )
    loop = TrainingLoop(run, cifar(10, other=10))
    cut = loop.masking.masks["classifier.6.weight"].clone().fill_(False)
    loop.masking.masks["classifier.6.weight"] = cut
    loop.masking.apply()
    loop.run_to_end()
    assert loop.outcome().test_error_pct is not None
    assert loop.masking.active()["classifier.6.weight"] == 0
