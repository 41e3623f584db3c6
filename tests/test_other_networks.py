"""`Masking` on other people's networks, optimizers and loops: a line for each kind of case that
public bug reports of this field are about, with the right value.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel

from lib import Masking, build_model
from lib.masking import DivergenceError
from tests.support.masked import SPARSE, Trained, same, seeded, sgd, small_model

NAMES = ["0.weight", "4.weight", "6.weight"]


def own(name: str, *shape: int) -> Callable[[], nn.Module]:
    """A layer that torch doesn't know, with one parameter."""

    def make() -> nn.Module:
        layer = nn.Module()
        layer.register_parameter(name, nn.Parameter(torch.rand(shape)))
        return layer

    return make


# ----------------------------------------------------------------------------------- what is masked


@pytest.mark.parametrize(
    ("make", "masked"),
    [
        (lambda: nn.Linear(4, 5), {"weight"}),
        (lambda: nn.Bilinear(4, 3, 5), {"weight"}),
        (lambda: nn.Conv1d(4, 6, 3, groups=2), {"weight"}),
        (lambda: nn.Conv2d(4, 4, 3, groups=4), {"weight"}),
        (lambda: nn.ConvTranspose3d(2, 4, 2), {"weight"}),
        (lambda: nn.LSTM(4, 5, proj_size=2), {"weight_ih_l0", "weight_hh_l0", "weight_hr_l0"}),
        (lambda: nn.GRUCell(4, 5), {"weight_ih", "weight_hh"}),
        (
            lambda: nn.MultiheadAttention(8, 2, add_bias_kv=True),
            {"in_proj_weight", "out_proj.weight"},
        ),
        (
            lambda: nn.MultiheadAttention(8, 2, kdim=6, vdim=4),
            {"q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"},
        ),
        (
            lambda: parametrizations.spectral_norm(nn.Linear(4, 5)),
            {"parametrizations.weight.original"},
        ),
        (own("weight", 4, 5), {"weight"}),
        (own("w_qkv", 3, 4, 5), {"w_qkv"}),
        (own("gate_up_proj", 8, 4, 5), {"gate_up_proj"}),
        (lambda: nn.LayerNorm([8, 8, 8]), set()),
        (lambda: nn.RMSNorm([4, 5]), set()),
        (lambda: type("Ours", (nn.LayerNorm,), {})([8, 8]), set()),
        (own("gate_up_proj_bias", 4, 5), set()),
        (own("weight", 1, 5, 1, 1), set()),  # an affine layer
        (own("layer_scale", 5, 1, 1), set()),  # ConvNeXt
        (own("class_token", 1, 1, 8), set()),  # ViT
        (own("pos_embedding", 1, 7, 8), set()),
        (own("relative_position_bias_table", 9, 4), set()),  # Swin
        (lambda: nn.ModuleDict({"wpe": nn.Embedding(9, 4)}), set()),  # GPT
        (lambda: nn.ModuleDict({"wte": nn.Embedding(9, 4)}), {"wte.weight"}),
        (own("att_src", 1, 4, 5), set()),  # graph attention
    ],
)
def test_weights_are_masked_by_module_and_role(make, masked) -> None:
    model = nn.Sequential(make(), nn.Linear(4, 4))
    kept = Masking(model, sgd(model), density=0.5)
    assert set(kept.masks) == {f"0.{name}" for name in masked} | {"1.weight"}


def tied() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(4, 6), nn.Linear(6, 4))
    model[1].weight = model[0].weight
    return model


@pytest.mark.parametrize(
    ("make", "keep", "masked"),
    [
        (small_model, (), NAMES),
        (small_model, None, NAMES),
        (small_model, "0.weight", NAMES[1:]),
        (small_model, "4", ["0.weight", "6.weight"]),
        (small_model, ["0", "6.weight"], ["4.weight"]),
        (small_model, "[46].weight", ["0.weight"]),
        (tied, (), ["0.weight", "2.weight"]),  # one that is tied counts once
        (tied, "0.weight", ["2.weight"]),  # and has both names
        (tied, "1.weight", ["2.weight"]),
        (lambda: nn.ModuleDict({"module": nn.Linear(3, 4)}), (), ["module.weight"]),
    ],
)
def test_keep_dense(make, keep, masked) -> None:
    model = make()
    kept = Masking(model, sgd(model), density=0.2, keep_dense=keep)
    assert list(kept.masks) == masked
    assert sum(kept.active().values()) == round(0.2 * kept.weights_total)
    dense = [p for n, p in model.named_parameters() if n not in masked and p.dim() > 1]
    assert all((p != 0).all() for p in dense)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: prune.random_unstructured(nn.Linear(4, 5), "weight", 0.5), "prune.remove"),
        (lambda: parametrizations.weight_norm(nn.Linear(4, 5)), "_WeightNorm.*remove"),
        (lambda: nn.utils.weight_norm(nn.Linear(4, 5)), "weight_norm.*remove"),
        (lambda: parametrizations.orthogonal(nn.Linear(4, 5)), "_Orthogonal.*remove"),
        (lambda: nn.Embedding(7, 4, sparse=True), "sparse=False"),
        (lambda: nn.Linear(4, 5, dtype=torch.complex64), "complex"),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_can_not_be_masked_is_named_with_the_way_out(make, said) -> None:
    model = nn.Sequential(make(), nn.Linear(4, 4))
    for build in (Masking, Masking.from_weights):
        with pytest.raises(ValueError, match=rf"^0\..*{said}.*keep_dense"):
            build(model, sgd(model))
    assert list(Masking(model, sgd(model), 0.5, keep_dense="0").masks) == ["1.weight"]
    model = nn.Sequential(nn.Linear(4, 5, device="meta"))
    with pytest.raises(ValueError, match=r"0.weight is on the meta device.*to_empty"):
        Masking(model, sgd(model))


def test_a_network_pruned_by_torch_keeps_its_zeros() -> None:
    model = small_model()
    prune.global_unstructured(
        [(model[4], "weight"), (model[6], "weight")], prune.L1Unstructured, amount=0.7
    )
    for layer in (model[4], model[6]):
        prune.remove(layer, "weight")
    kept = Masking.from_weights(model, sgd(model), keep_dense="0")
    assert sum(kept.active().values()) == round(0.3 * 1200)
    model[6].weight.data.zero_()
    with pytest.raises(ValueError, match=r"6.weight are zero"):
        Masking.from_weights(model, sgd(model), method="static")
    with pytest.raises(ValueError, match="no weight is zero"):
        Masking.from_weights(other := small_model(), sgd(other))


# ------------------------------------------------------------------------------ wrapped, and copies


@pytest.fixture
def group(tmp_path: Path):
    """A process group of one."""
    url = f"file://{tmp_path}/group"
    torch.distributed.init_process_group("gloo", init_method=url, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


DDP = nn.parallel.DistributedDataParallel


@pytest.mark.parametrize(
    "wrap", [torch.compile, nn.DataParallel, DDP, lambda m: torch.compile(DDP(m)), AveragedModel]
)
def test_masks_fit_wrapped_and_plain_models(wrap, group) -> None:
    wrapped, plain = wrap(small_model()), small_model()
    theirs = [n for n, p in wrapped.named_parameters() if p.dim() > 1]
    one = Masking(wrapped, sgd(wrapped), 0.2, generator=seeded(1))
    other = Masking(plain, sgd(plain), 0.2)
    assert theirs != NAMES and list(one.masks) == list(one.parameters) == NAMES
    one.step()
    other.load_state_dict(one.state_dict())
    assert same(list(other.masks.values()), list(one.masks.values()))
    other.masks = {n: one.masks[n] for n in theirs}  # by their names


def test_sharded_weights_are_refused(group) -> None:
    model = fully_shard(small_model(), mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    assert isinstance(model[0].weight, DTensor)
    with pytest.raises(ValueError, match=r"0.weight is sharded.*DistributedDataParallel"):
        Masking(model, sgd(model), 0.5)


class Lookahead:
    """As it is written in several libraries, but for the slow weights."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner, self.param_groups, self.state = inner, inner.param_groups, {}
        self.zero_grad, self.step = inner.zero_grad, inner.step


def test_optimizers_that_wrap_another_are_refused(group) -> None:
    model = small_model()
    zero = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    with pytest.raises(
        ValueError, match=r"ZeroRedundancyOptimizer wraps .*DistributedDataParallel"
    ):
        Masking(model, zero, 0.5)
    outer = Lookahead(sgd(model))
    with pytest.raises(ValueError, match=r"Lookahead wraps .*SGD.: give Masking that one"):
        Masking(model, outer, 0.5)
    run = Trained(model=model, optimizer=lambda model: outer.inner)
    run.optimizer = outer  # Masking has the inner one
    run.steps(3)
    assert run.masking.steps == 3 and any(line.grown for line in run.masking.update())


def _rank(rank: int, folder: str) -> None:
    url = f"file://{folder}/group"
    torch.distributed.init_process_group("gloo", init_method=url, rank=rank, world_size=2)
    torch.set_num_threads(1)
    for method, options in (("sparse_momentum", {}), ("set", {}), ("deepr", {"l1": 0.05})):
        torch.manual_seed(rank)
        model = DDP(small_model())
        torch.manual_seed(rank)
        optimizer = sgd(model)
        masking = Masking(model, optimizer, 0.2, method=method, options=options)
        for _ in range(3):
            for _ in range(3):
                optimizer.zero_grad()
                model(torch.randn(8, 2, 4, 4)).square().sum().mul(0.01).backward()
                optimizer.step()
                masking.step()
            masking.update()
        torch.save([*model.parameters(), *masking.masks.values()], f"{folder}/{method}{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_have_one_network(tmp_path: Path) -> None:
    spawn = torch.multiprocessing.get_context("spawn")
    other = spawn.Process(target=_rank, args=(1, str(tmp_path)))
    other.start()
    _rank(0, str(tmp_path))
    other.join()
    assert other.exitcode == 0
    for method in ("sparse_momentum", "set", "deepr"):
        one, two = (torch.load(tmp_path / f"{method}{rank}.pt") for rank in (0, 1))
        assert same(one, two)
        assert sum(int(m.sum()) for m in one if m.dtype == torch.bool) == round(0.2 * 1308)


def test_an_averaged_model_is_as_sparse() -> None:
    run = Trained(density=0.1, method="set")
    averaged = AveragedModel(run.model)
    for _ in range(5):
        run.steps(2)
        run.masking.update()
        run.steps(1)
        averaged.update_parameters(run.model)
    weights = {n.removeprefix("module."): p for n, p in averaged.named_parameters()}
    assert sum(int((weights[n] != 0).sum()) for n in NAMES) > 1.3 * 131
    run.masking.apply(averaged)
    assert sum(int((weights[n] != 0).sum()) for n in NAMES) <= 131
    assert all((weights[n][m] != 0).any() for n, m in run.masking.masks.items())


# ----------------------------------------------------------------------------------- while training


@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_frozen_layer_takes_no_part(requires_grad: bool) -> None:
    """Also one that gets no gradient, as where the forward pass leaves it out; DeepR's noise moves
    that one.
    """
    for method in [one for one in SPARSE if not requires_grad or one != "deepr"]:
        run = Trained(method=method)
        run.steps(4)
        run.masking.update()
        frozen = run.model[4].weight.requires_grad_(requires_grad)
        frozen.grad = None
        run.optimizer.register_step_pre_hook(lambda *_, p=frozen: setattr(p, "grad", None))
        before, mask = frozen.clone(), run.masking.masks["4.weight"].clone()
        for _ in range(3):
            run.steps(2)
            report = run.masking.update(0.5)
        assert report[1].pruned == report[1].grown == 0
        assert torch.equal(frozen, before) and torch.equal(run.masking.masks["4.weight"], mask)
        assert sum(run.masking.active().values()) == round(0.2 * 1308)


def test_layers_that_an_engine_moves_take_part_without_gradients() -> None:
    run = Trained()
    run.steps(2)
    run.masking.update()
    run.model[4].weight.grad = None  # its values are elsewhere
    run.optimizer.step()
    run.masking.advance()
    assert all(line.pruned for line in run.masking.update())


@pytest.mark.parametrize("added", [False, True])
def test_a_layer_that_can_be_masked_only_later_is_named(added: bool) -> None:
    model = small_model()
    model[6].requires_grad_(False)
    run = Trained(model=model, optimizer=lambda m: sgd(m[:6]))
    run.steps(1)
    model[6].requires_grad_(True)
    if added:
        run.optimizer.add_param_group({"params": model[6].parameters()})
    run.steps(1)
    with pytest.warns(UserWarning, match=r"6.weight can be masked now.*from_weights"):
        run.masking.update()
    assert "6.weight" not in run.masking.masks


def masked_gradients(run: Trained) -> None:
    for name, parameter in run.masking.parameters.items():
        parameter.register_hook(lambda g, name=name: g * run.masking.masks[name])
    run.steps(3)


def another_optimizer(run: Trained) -> None:
    """Masking holds the old one, whose momentum stands still."""
    run.steps(3)
    run.masking.update()
    run.optimizer = sgd(run.model)
    run.steps(3)


def then(change: Callable[[Trained], object]) -> Callable[[Trained], None]:
    def work(run: Trained) -> None:
        run.steps(2)
        change(run)

    return work


@pytest.mark.parametrize(
    ("method", "spoil", "said"),
    [
        ("sparse_momentum", masked_gradients, "momentum of all inactive weights is zero"),
        ("rigl", masked_gradients, "gradient of all inactive weights is zero"),
        ("rigl", then(lambda run: run.optimizer.zero_grad(set_to_none=False)), "gradient of all"),
        ("sparse_momentum", another_optimizer, "old in 0.weight"),
        ("rigl", then(lambda run: run.model[0].weight.grad.fill_(math.inf)), "0.weight is inf"),
    ],
)
def test_no_growth_without_a_signal(method, spoil, said) -> None:
    run = Trained(method=method)
    spoil(run)
    bits = run.bits()
    with pytest.warns(UserWarning, match=said):
        report = run.masking.update()
    assert same(run.bits(), bits) and not any(line.pruned or line.grown for line in report)


def test_growth_beyond_the_signal_is_random() -> None:
    grown = []
    for seed in range(2):
        run = Trained(density=0.9, prune_rate=0.9)
        run.steps(2)
        buffer, free = momentum(run), ~run.masking.masks["4.weight"]
        buffer[free.nonzero()[1:].unbind(1)] = 0  # one inactive weight has a signal
        buffer[~free] *= 1e-30
        run.masking.generator = seeded(seed)
        run.masking.update()
        grown.append(run.masking.masks["4.weight"] & free)
    assert all(mask[tuple(free.nonzero()[0])] for mask in grown)
    assert not torch.equal(*grown)


def momentum(run: Trained) -> torch.Tensor:
    return run.optimizer.state[run.model[4].weight]["momentum_buffer"]


def replace(run: Trained) -> None:
    run.model[4].weight = nn.Parameter(torch.ones(12, 96))


@pytest.mark.parametrize(
    ("method", "spoil", "said"),
    [
        (
            "sparse_momentum",
            lambda run: run.optimizer.param_groups[0].update(momentum=0),
            "rule 'momentum' needs the momentum of 0.weight.*momentum=0",
        ),
        ("sparse_momentum", lambda run: run.optimizer.state.clear(), "0.weight has no momentum"),
        ("rigl", lambda run: run.optimizer.zero_grad(), "0.weight has no gradient"),
        (
            "sparse_momentum",
            lambda run: momentum(run).fill_(math.nan),
            "4.weight.*momentum. is nan after 2 steps",
        ),
        ("set", lambda run: run.model[4].weight.data.fill_(math.inf), "4.weight.*weight. is inf"),
        ("set", replace, "4.weight was replaced"),
        ("set", lambda run: run.model.__setitem__(6, nn.Linear(12, 4)), "6.weight was replaced"),
        ("set", lambda run: setattr(run, "other", Masking(run.model, run.optimizer)), "newer"),
        ("set", lambda run: run.masking.masks["6.weight"].zero_(), "6.weight has no active weight"),
    ],
)
def test_what_an_update_refuses(method, spoil, said) -> None:
    run = Trained(method=method)
    run.steps(2)
    spoil(run)
    error = DivergenceError if " is " in said else ValueError
    with pytest.raises(error, match=said):
        run.masking.update()


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_an_inactive_weight_is_zero_after_a_step_whatever_it_was(bad: float) -> None:
    run = Trained(method="set")
    run.steps(1)
    weight, mask = run.model[4].weight, run.masking.masks["4.weight"]
    weight.data[~mask] = bad
    run.masking.step()
    assert not weight[~mask].any()
    weight.data[~mask] = bad
    assert any(line.pruned for line in run.masking.update())


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_a_step_that_the_scaler_skipped_is_none(fused: bool, first: bool) -> None:
    for method in ("rigl", "deepr"):
        run = Trained(method=method, optimizer=lambda m: sgd(m, fused=fused))
        run.steps(0 if first else 3)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        loss = run.model(torch.randn(8, 2, 4, 4)).sum()
        run.optimizer.zero_grad()
        scaler.scale(loss).backward()
        run.model[4].weight.grad[0, 0] = math.inf
        before, steps = run.bits(), run.masking.steps
        scaler.step(run.optimizer)
        scaler.update()
        run.masking.step()
        assert run.masking.steps == steps and same(run.bits(), before)
        run.steps(2)
        assert run.masking.steps == steps + 2


def test_no_false_warnings(recwarn: pytest.WarningsRecorder) -> None:
    for name in ("lenet300-100", "lenet5", "alexnet-s", "wrn-10-1"):
        model = build_model(name)
        Masking(model, sgd(model), density=0.1)
    model = small_model()
    nn.init.zeros_(model[6].weight)  # as residual branches and heads often start
    model(torch.randn(8, 2, 4, 4))  # a pass that finds out shapes
    Masking(model, sgd(model), density=0.1)
    Trained(method="set", optimizer=lambda m: torch.optim.Adagrad(m.parameters()))
    run = Trained(method="set", optimizer=lambda m: torch.optim.LBFGS(m.parameters(), max_iter=2))
    x = torch.randn(8, 2, 4, 4)

    def closure() -> torch.Tensor:
        run.optimizer.zero_grad()
        loss = run.model(x).square().mean()
        loss.backward()
        return loss

    run.optimizer.step(closure)
    run.masking.step()
    run.masking.update()
    assert run.masking.steps == 1 and not [str(w.message) for w in recwarn]


def look_trained(run: Trained) -> None:
    run.steps(1)
    Masking(run.model, run.optimizer, density=0.1)


def steps_and_update(*counts: int) -> Callable[[Trained], None]:
    def work(run: Trained) -> None:
        for count in counts:
            run.steps(count)
            run.masking.update()

    return work


@pytest.mark.parametrize(
    ("work", "said"),
    [
        (steps_and_update(1, 0), "update.. without a step"),
        (lambda run: run.steps(4), "without one update"),
        (steps_and_update(3, 2), "ended at total_steps=4"),
        (look_trained, "look trained .the optimizer has already moved 0.weight"),
    ],
)
def test_warnings_that_are_meant(work, said) -> None:
    with pytest.warns(UserWarning, match=said):
        work(Trained(total_steps=4, method="set"))


def test_update_under_inference_mode_leaves_weights_that_train() -> None:
    run = Trained()
    run.steps(2)
    with torch.inference_mode():
        assert any(line.grown for line in run.masking.update())
    run.steps(1)
    assert sum(run.masking.active().values()) == round(0.2 * 1308)


# -------------------------------------------------------------------------------- arguments, states


@pytest.mark.parametrize(
    "wrong",
    [
        *({"density": value} for value in (0, -0.1, 1.5, math.nan, 1e-9)),
        *({"prune_rate": value} for value in (-1, 1.1, math.nan)),
        *({"total_steps": value} for value in (0, -1, math.nan)),
        *({n: "magi"} for n in ("method", "prune", "redistribution", "growth", "schedule", "init")),
        {"keep_dense": "magi"},
        {"options": {"magi": 1.0}},
        {"options": {"l1": math.inf}},
        {"masks": {"magi": torch.ones(3) > 0}},
        {"density": 0.5, "method": "dense"},
    ],
)
def test_wrong_arguments_are_named(wrong: dict) -> None:
    model, value = small_model(), next(iter(wrong.values()))
    said = next(iter(value)) if isinstance(value, dict) else value
    with pytest.raises(ValueError, match=str(said)):
        Masking(model, sgd(model), **wrong)
    with pytest.raises(ValueError, match="momentum=0"):
        Masking(model, sgd(model, momentum=0))
    with pytest.raises(ValueError, match=r"4.weight.*doesn't hold"):
        Masking(model, sgd(model[0]), 0.5)
    with pytest.raises(ValueError, match="snip_masks"):
        Masking(model, sgd(model), 0.1, method="snip")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"rules": ("set", "a", "b", "c")}, "set"),
        ({"settings": {"target_density": 0.5}}, "0.5"),
        ({"masks": {"magi": torch.ones(3) > 0}}, "magi"),
        ({"masks": {"0.weight": torch.ones(6, 2, 3, 3) > 0}}, "missing for 4.weight, 6.weight"),
    ],
)
def test_wrong_states_change_nothing(changed: dict, said: str) -> None:
    run = Trained()
    before = run.bits()
    with pytest.raises(ValueError, match=said):
        run.masking.load_state_dict({**Trained(seed=5).masking.state_dict(), **changed})
    assert same(run.bits(), before) and run.masking.steps == 0


@pytest.mark.parametrize("mask", [torch.ones(2, 2) > 0, torch.ones(4, 12), [[True]]])
def test_masks_that_do_not_fit_change_nothing(mask) -> None:
    run = Trained()
    before = run.bits()
    masks = {n: m | True for n, m in run.masking.masks.items()}
    for assign in (
        lambda: run.masking.masks.__setitem__("6.weight", mask),
        lambda: setattr(run.masking, "masks", {**masks, "6.weight": mask}),
    ):
        with pytest.raises(ValueError, match=r"6.weight must be a bool tensor \(4, 12\)"):
            assign()
    assert same(run.bits(), before)


def test_masks_are_assignable_and_edits_count() -> None:
    run = Trained()
    run.steps(1)
    mask = torch.zeros(4, 12, dtype=torch.bool)
    mask[:, :3] = True
    run.masking.masks["6.weight"] = mask
    weight = run.masking.parameters["6.weight"].detach()
    weight.fill_(1.0)
    run.masking.apply()
    assert torch.equal(weight, mask.float())
    run.masking.masks["6.weight"][0, 0] = False  # in place
    run.masking.apply()
    assert weight[0, 0] == 0 and weight[1, 0] != 0


def test_a_masking_and_an_update_print_as_tables() -> None:
    run = Trained(total_steps=40)
    run.steps(10)
    lines = repr(run.masking).splitlines()
    assert "sparse_momentum" in lines[0] and "0.256 at step 10 of 40" in lines[0]
    assert lines[2].split() == ["0.weight", "108", "22", "20.37%"]
    assert lines[5].split() == ["all", "1308", "262", "20.03%"]
    copied = copy.deepcopy(run.masking)
    assert repr(copied) == repr(run.masking)
