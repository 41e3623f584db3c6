"""What a new user may do wrong: an error, or a warning, that says what to do."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lib import Masking, build_model
from lib.masking import DivergenceError
from tests.support.masked import SPARSE, Trained, same, sgd, small_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("kw", "message"),
    [
        ({"density": 0}, r"density must be in \(0, 1\], got 0"),
        ({"density": 1.5}, r"density must be in \(0, 1\], got 1.5"),
        ({"density": -0.1}, r"density must be in \(0, 1\], got -0.1"),
        ({"density": math.nan}, r"density must be in \(0, 1\], got nan"),
        ({"prune_rate": 1.1}, r"prune_rate must be in \[0, 1\], got 1.1"),
        ({"prune_rate": -1}, r"prune_rate must be in \[0, 1\], got -1"),
        ({"density": "0.1"}, r"density must be a number in \(0, 1\], got '0.1'"),
        ({"density": None}, "density must be a number.*got None"),
        ({"density": True}, "density must be a number.*got True"),
        ({"prune_rate": None}, "prune_rate must be a number.*got None"),
        ({"total_steps": math.nan}, "total_steps must be positive and whole, got nan"),
        ({"total_steps": 2.5}, "total_steps must be positive and whole, got 2.5"),
        ({"total_steps": True}, "total_steps must be positive and whole, got True"),
        ({"options": {"l1": math.nan}}, "option l1 must be a finite number, got nan"),
        ({"total_steps": 0}, "total_steps must be positive and whole, got 0"),
        ({"method": "sparse_momentun"}, "unknown method 'sparse_momentun'.*'sparse_momentum'"),
        ({"prune": "magnitud"}, "unknown prune rule 'magnitud': did you mean 'magnitude'"),
        ({"redistribution": "moment"}, "unknown redistribution rule 'moment'.*'momentum'"),
        ({"growth": "randon"}, "unknown growth rule 'randon': did you mean 'random'"),
        ({"schedule": "cosin"}, "unknown schedule 'cosin': did you mean 'cosine'"),
        ({"init": "erdos"}, "unknown init 'erdos'.*erk, erk_drawn, half_output, uniform"),
        ({"keep_dense": "layer9.*"}, "unknown keep_dense name 'layer9"),
        ({"keep_dense": "*"}, "no weight is left to mask"),
        ({"options": {"keep_regrow": 1.0}}, "unknown option 'keep_regrow'.*'keep_regrown'"),
        ({"density": 1e-9}, "density 1e-09 leaves 0.weight .108 weights. without"),
    ],
)
def test_bad_settings(kw, message):
    with pytest.raises(ValueError, match=message):
        Trained(**kw)


def test_optimizer_without_momentum():
    with pytest.raises(ValueError, match=r"0\.weight.*SGD runs with momentum=0.*or Adam"):
        Trained(optimizer=lambda m: sgd(m, momentum=0))
    Trained(optimizer=lambda m: sgd(m, momentum=0), method="set")  # needs none
    model = small_model()
    with pytest.raises(ValueError, match=r"4.weight is masked but the optimizer doesn't hold it"):
        Masking(model, sgd(model[0]), density=0.5)


def test_update_before_the_first_step():
    with pytest.raises(ValueError, match=r"0.weight has no momentum in SGD yet.*optimizer.step"):
        Trained().masking.update()
    with pytest.raises(ValueError, match=r"0.weight has no gradient.*zero_grad"):
        Trained(method="rigl").masking.update()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_not_finite(bad):
    run = Trained()
    run.steps(2)
    run.optimizer.state[run.model[4].weight]["momentum_buffer"][0, 0] = bad
    with pytest.raises(DivergenceError, match=rf"4.weight.*momentum. is {bad} after 2 steps"):
        run.masking.update()
    run = Trained(method="rigl")
    run.steps(2)
    run.model[4].weight.grad[0, 0] = bad
    with pytest.raises(DivergenceError, match=rf"4.weight.*gradient. is {bad}"):
        run.masking.update()
    run = Trained(method="set")
    run.model[4].weight.data[run.masking.masks["4.weight"]] = bad
    with pytest.raises(ValueError, match=rf"4.weight.*weight. is {bad} after 0 steps"):
        run.masking.update()


def test_empty_layer():
    run = Trained()
    run.steps(1)
    run.masking.masks["6.weight"] = torch.zeros(4, 12, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"6.weight has no active weight among 48"):
        run.masking.update()


def test_bad_masks():
    kept = Trained().masking
    with pytest.raises(ValueError, match=r"0.weight has shape \(2, 2\), its weight has \(6, 2, 3"):
        kept.masks["0.weight"] = torch.ones(2, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"6.weight must be of type torch.bool, got torch.float32"):
        kept.masks["6.weight"] = torch.ones(4, 12)
    with pytest.raises(ValueError, match=r"unknown masked parameter '6.weigth'.*'6.weight'"):
        kept.masks["6.weigth"] = torch.ones(4, 12, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"masks are missing for 0.weight, 4.weight"):
        kept.masks = {"6.weight": torch.ones(4, 12, dtype=torch.bool)}
    for rate in (-0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match=rf"prune_rate must be in \[0, 1\], got {rate}"):
            kept.update(rate)


def stepped(model: nn.Module, steps: int = 3, **kw) -> torch.optim.SGD:
    """Trained densely for some steps; the optimizer."""
    optimizer = sgd(model, **kw)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 2, 4, 4)).square().sum().backward()
        optimizer.step()
    return optimizer


# ------------------------------------------------------------------------ weights that were trained


def test_weights_that_look_trained() -> None:
    model = small_model()
    optimizer = stepped(model)
    with pytest.warns(
        UserWarning, match=r"look trained \(the optimizer has already moved 0.weight"
    ):
        Masking(model, optimizer, density=0.1)
    model = small_model()
    stepped(model, steps=11)
    with pytest.warns(UserWarning, match=r"1.num_batches_tracked is 11.*from_weights"):
        Masking(model, sgd(model), density=0.1)
    model = small_model()
    model[4].weight.data[:, :20] = 0
    with pytest.warns(UserWarning, match=r"4.weight has 240 zeros among 1152 weights"):
        Masking(model, sgd(model), density=0.1)


def test_no_warning_for_new_networks_and_for_what_stays(recwarn: pytest.WarningsRecorder) -> None:
    for name in ("lenet300-100", "lenet5", "alexnet-s", "wrn-10-1"):
        model = build_model(name)
        Masking(model, sgd(model), density=0.1)
    model = small_model()
    nn.init.zeros_(model[6].weight)  # as residual branches and heads often start
    model(torch.randn(8, 2, 4, 4))  # a pass that finds out shapes
    Masking(model, sgd(model), density=0.1)
    Masking(model, stepped(model), density=1.0)
    assert not [w for w in recwarn if "trained" in str(w.message)]


def test_from_weights_keeps_a_sparse_network() -> None:
    run = Trained()
    run.steps(3)
    before = run.bits()
    other = Masking.from_weights(run.model, sgd(run.model), prune_rate=0.4)
    other.step()
    assert same(run.bits(), before)  # nothing was set to zero
    for name, mask in other.masks.items():
        assert torch.equal(mask, run.masking.parameters[name] != 0)
    assert other.density == other.target_density == run.masking.density
    dense = small_model()
    with pytest.raises(ValueError, match="no weight is zero: use Masking"):
        Masking.from_weights(dense, sgd(dense))
    masks = dict(run.masking.masks)
    given = Masking(run.model, sgd(run.model), run.masking.density, masks=masks)
    assert given.active() == run.masking.active()
    with pytest.raises(ValueError, match=r"have density 0.2.*density=0.5 was asked for: leave it"):
        Masking(run.model, sgd(run.model), 0.5, masks=masks)
    with pytest.raises(ValueError, match=r"masks are missing for 0.weight"):
        Masking(run.model, sgd(run.model), masks={"6.weight": masks["6.weight"]})


def test_dense_weights_loaded_later_are_cleared_by_apply() -> None:
    run = Trained()
    run.model.load_state_dict(small_model().state_dict())
    weight, mask = run.masking.parameters["4.weight"].detach(), run.masking.masks["4.weight"]
    assert weight[~mask].any()
    run.masking.apply()
    assert not weight[~mask].any() and weight[mask].all()


# --------------------------------------------------------------------------- calls that are missing


def test_a_schedule_that_ran_out_is_said_once() -> None:
    run = Trained(total_steps=4)
    run.steps(4)
    assert not any(line.pruned for line in run.masking.update())  # the end, as planned
    run.steps(1)
    with pytest.warns(UserWarning, match=r"ended at total_steps=4.*gradients are accumulated"):
        run.masking.update()
    run.steps(1)
    run.masking.update()  # warnings are errors here: said once
    constant = Trained(total_steps=4, schedule="constant")
    constant.steps(6)
    assert any(line.pruned for line in constant.masking.update())


def test_updates_without_steps() -> None:
    run = Trained()
    run.steps(1)
    run.masking.update()
    with pytest.warns(
        UserWarning, match=r"update\(\) without a step\(\).*masking.step\(\) after every"
    ):
        run.masking.update()


def test_a_layer_that_is_not_used() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = small_model(), nn.Linear(5, 7)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    run = Trained(model=Unused())
    run.steps(2)
    with pytest.raises(ValueError, match=r"spare.weight has no momentum.*keep_dense"):
        run.masking.update()
    run = Trained(model=Unused(), method="set")
    run.steps(2)
    with pytest.warns(UserWarning, match=r"never moved spare.weight: name it in keep_dense"):
        run.masking.update()
    run = Trained(model=Unused(), keep_dense="spare")
    run.steps(2)
    assert any(line.pruned for line in run.masking.update())


def test_snip_without_its_masks() -> None:
    model = small_model()
    with pytest.raises(ValueError, match=r"'snip' draws no masks: .*snip_masks as masks="):
        Masking(model, sgd(model), 0.1, method="snip")
    weights = {name: w.clone() for name, w in model.named_parameters() if w.dim() > 1}
    with pytest.raises(ValueError, match="unknown init 'even'"):  # also where none is drawn
        Masking(model, sgd(model), init="even", masks={n: w > 0 for n, w in weights.items()})
    Masking(model, sgd(model), method="snip", masks={n: w > 0 for n, w in weights.items()}).step()
    for name, weight in weights.items():
        assert torch.equal(model.get_parameter(name), weight.relu())


# ---------------------------------------------------------------------------- models that don't fit


def test_no_model_no_optimizer_no_masks() -> None:
    model = small_model()
    for make in (Masking, Masking.from_weights):
        with pytest.raises(ValueError, match=r"model must be a torch.nn.Module, got None"):
            make(None, sgd(model))
        with pytest.raises(
            ValueError, match=r"optimizer must be a torch.optim.Optimizer.*got None"
        ):
            make(model, None)
    masking = Masking(model, sgd(model))
    with pytest.raises(ValueError, match=r"masks must be a mapping from parameter name.*got None"):
        masking.masks = None
    with pytest.raises(ValueError, match=r"mask of 4.weight must be a bool tensor, got \[\[True"):
        masking.masks["4.weight"] = [[True]]


def test_parameters_that_can_not_be_masked() -> None:
    with torch.device("meta"):
        model = small_model()
    with pytest.raises(ValueError, match=r"0.weight is on the meta device.*to_empty"):
        Masking(model, sgd(model), 0.5)
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)))
    with pytest.raises(ValueError, match=r"original0 is the magnitude vector.*keep_dense"):
        Masking(normed, sgd(normed), 0.5)
    masking = Masking(normed, sgd(normed), 0.5, keep_dense="*original0")
    assert list(masking.masks) == ["0.parametrizations.weight.original1"]
    with pytest.warns(FutureWarning):
        old = nn.Sequential(nn.utils.weight_norm(nn.Linear(8, 8)))
    with pytest.raises(ValueError, match=r"0.weight_g is the magnitude vector.*keep_dense"):
        Masking(old, sgd(old), 0.5)
    embedding = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 3))
    with pytest.warns(UserWarning, match=r"0.weight belongs to an embedding.*keep_dense"):
        Masking(embedding, sgd(embedding), 1.0)
    Masking(embedding, sgd(embedding), 0.5, keep_dense="0")


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_rmsprop(momentum: float) -> None:
    def rmsprop(model: nn.Module) -> torch.optim.RMSprop:
        return torch.optim.RMSprop(model.parameters(), lr=1e-3, momentum=momentum)

    if not momentum:
        with pytest.raises(ValueError, match=r"RMSprop runs with momentum=0.*momentum above 0"):
            Trained(optimizer=rmsprop)
        return
    run = Trained(optimizer=rmsprop)
    run.steps(2)
    assert any(line.grown for line in run.masking.update())


def test_one_masking_for_a_model() -> None:
    run = Trained()
    other = Masking(run.model, run.optimizer)
    other.step()
    with pytest.raises(ValueError, match=r"a newer Masking has 0.weight: use one Masking"):
        run.masking.step()
    del other
    run.masking.step()


def test_layers_that_were_replaced() -> None:
    run = Trained()
    run.model[6].weight.data = torch.ones(4, 12)  # in place: goes on masked
    run.steps(1)
    run.model[6].weight = nn.Parameter(torch.ones(4, 12))
    for call in (run.masking.step, run.masking.update):
        with pytest.raises(ValueError, match=r"6.weight was replaced in the model.*new Masking"):
            call()
    run = Trained()
    run.model[4] = nn.Linear(96, 12)
    with pytest.raises(ValueError, match=r"4.weight was replaced"):
        run.masking.step()
    run = Trained()
    nn.utils.parametrizations.weight_norm(run.model[4])
    with pytest.raises(ValueError, match=r"4.weight was replaced"):
        run.masking.step()


@pytest.mark.parametrize("method", SPARSE)
@pytest.mark.parametrize("active", [True, False])
def test_one_nan_in_a_gradient_is_noticed(method: str, active: bool) -> None:
    run = Trained(method=method)
    run.steps(2)
    weight = run.model[4].weight
    place = tuple((run.masking.masks["4.weight"] == active).nonzero()[0].tolist())
    weight.grad[place] = math.nan
    run.optimizer.step()
    run.masking.step()
    with pytest.raises(DivergenceError, match=r"4.weight: the largest .weight. is nan"):
        run.masking.update()


# --------------------------------------------------------------------------------- masks and states


def test_no_way_around_the_checks_of_masks() -> None:
    masks = Trained().masking.masks
    wrong = {"6.weight": torch.ones(2, 2, dtype=torch.bool)}
    for change in (lambda: masks.__ior__(wrong), lambda: masks.update(wrong)):
        with pytest.raises(ValueError, match=r"6.weight has shape \(2, 2\)"):
            change()
    with pytest.raises(ValueError, match="unknown masked parameter 'other'"):
        masks.setdefault("other", wrong["6.weight"])
    for change in (masks.clear, masks.popitem, lambda: masks.pop("6.weight")):
        with pytest.raises(ValueError, match=r"mask of \d.weight can't be deleted.*keep_dense"):
            change()
    with pytest.raises(ValueError, match="can't be deleted"):
        del masks["6.weight"]
    assert len(masks) == 3 and masks.get("other") is None


def test_all_masks_or_none_are_assigned() -> None:
    run = Trained()
    before = run.bits()
    masks = {name: torch.ones_like(mask) for name, mask in run.masking.masks.items()}
    with pytest.raises(ValueError, match=r"6.weight must be of type torch.bool"):
        run.masking.masks = {**masks, "6.weight": torch.ones(4, 12)}
    assert same(run.bits(), before)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"density": 0.5}, "target_density=0.2, this Masking 0.5: make the Masking with"),
        ({"schedule": "linear"}, "schedule='cosine', this Masking 'linear'"),
        ({"prune_rate": 0.1}, "prune_rate=0.3, this Masking 0.1"),
        ({"total_steps": 9}, "total_steps=None, this Masking 9"),
        ({"method": "set"}, "is of the rules"),
        ({"keep_dense": "6"}, "unknown masked parameter '6.weight'"),
    ],
)
def test_states_of_another_masking(other: dict, message: str) -> None:
    state = Trained().masking.state_dict()
    masking = Trained(**other).masking
    before = {name: mask.clone() for name, mask in masking.masks.items()}
    with pytest.raises(ValueError, match=message):
        masking.load_state_dict(state)
    assert all(torch.equal(masking.masks[name], before[name]) for name in before)


def test_a_state_saved_without_settings_is_taken() -> None:
    """Checkpoints of runs that were begun before settings were part of a state."""
    state = Trained(seed=1).masking.state_dict()
    del state["settings"]
    masking = Trained(seed=2).masking
    masking.load_state_dict(state)
    assert all(torch.equal(masking.masks[name], mask) for name, mask in state["masks"].items())


@pytest.mark.parametrize("state", [{}, None, {"masks": {}, "steps": 3}])
def test_what_is_no_state(state: object) -> None:
    with pytest.raises(ValueError, match=r"this is no state of a Masking: .*rules.* are missing"):
        Trained().masking.load_state_dict(state)
