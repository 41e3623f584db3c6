"""Networks with masks for the tests, and sparse momentum once more as an oracle."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import torch
from torch import nn

from lib import Masking
from lib.config import METHODS, UNMASKED
from lib.methods.masks import initial_masks, maskable_parameters

SPARSE = [name for name in METHODS if name not in UNMASKED]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Net(nn.Module):
    """Layers w0, w1, ... with weights of given shapes, and a bias; no forward pass."""

    def __init__(self, *shapes: tuple[int, ...]) -> None:
        super().__init__()
        for i, shape in enumerate(shapes):
            layer = nn.Linear(1, 1, bias=False)
            layer.weight = nn.Parameter(torch.zeros(shape))
            self.add_module(f"w{i}", layer)
        self.register_parameter("bias", nn.Parameter(torch.ones(3)))


def sgd(model: nn.Module, **kw) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, "momentum": 0.9, **kw})


def give_momentum(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, value: torch.Tensor):
    optimizer.state[parameter]["momentum_buffer"] = value.clone()


def made(weights, masks, momenta, **kw) -> tuple[Net, Masking]:
    """A masking whose weights, masks and momentum are the given arrays, a step after its start."""
    model = Net(*(w.shape for w in weights))
    optimizer = sgd(model)
    given = {f"w{i}.weight": torch.from_numpy(mask.copy()) for i, mask in enumerate(masks)}
    kept = Masking(model, optimizer, generator=seeded(0), masks=given, **kw)
    for i, (weight, mask, momentum) in enumerate(zip(weights, masks, momenta, strict=True)):
        parameter = model.get_parameter(f"w{i}.weight")
        parameter.data = torch.from_numpy(np.where(mask, weight, 0).astype(np.float32))
        give_momentum(optimizer, parameter, torch.from_numpy(momentum.astype(np.float32)))
    kept.advance()
    return model, kept


def random_case(rng: np.random.Generator, shapes, density: float, coarse: bool):
    """Weights, masks (each with one active weight at least) and momenta; coarse: many ties."""
    weights, masks, momenta = [], [], []
    for shape in shapes:
        size = math.prod(shape)
        raw = rng.integers(-4, 5, shape) if coarse else rng.integers(-999, 1000, shape)
        weights.append(raw / 64)
        momenta.append(rng.choice([-3, -1, 1, 2], shape) / 8 if coarse else rng.normal(size=shape))
        mask = rng.random(shape) < density
        mask.reshape(-1)[rng.integers(size)] = True
        masks.append(mask)
    return weights, masks, momenta


def small_model() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 16, 12),
        nn.ReLU(),
        nn.Linear(12, 4),
    )


class Trained:
    """A small network in training on random data, with its masking."""

    def __init__(self, seed: int = 0, model: nn.Module | None = None, optimizer=None, **kw) -> None:
        self.model = model or small_model()
        self.optimizer = (optimizer or sgd)(self.model)
        kw = {"density": 0.2, "prune_rate": 0.3, **kw}
        if kw.get("method") == "snip":  # as if it had chosen them
            weights = maskable_parameters(self.model)
            kw["masks"] = initial_masks(weights, kw.pop("density"), "uniform", seeded(seed))
        self.masking = Masking(self.model, self.optimizer, generator=seeded(seed), **kw)
        self.data = seeded(7)

    def steps(self, n: int) -> None:
        for _ in range(n):
            x = torch.randn(8, 2, 4, 4, generator=self.data)
            y = torch.randint(0, 4, (8,), generator=self.data)
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.model(x), y).backward()
            self.optimizer.step()
            self.masking.step()

    def bits(self) -> list[torch.Tensor]:
        return [
            *(p.detach().clone() for p in self.model.parameters()),
            *(m.clone() for m in self.masking.masks.values()),
        ]


def params(run: Trained) -> list[tuple[str, nn.Parameter]]:
    return list(run.masking.parameters.items())


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def oracle_update(weights, masks, momenta, rate: float):
    """One cycle of sparse momentum, one weight at a time, in exact fractions where it matters.

    New masks, weights, numbers pruned and grown, and the shares of momentum, of all layers. One
    whose inactive weights have no momentum takes no part.
    """
    momenta = [m.astype(np.float32) for m in momenta]
    weights = [w.astype(np.float32) for w in weights]
    every = range(len(weights))
    layers = [i for i in every if masks[i].all() or momenta[i][~masks[i]].any()]
    means = [
        sum(abs(Fraction(float(x))) for x in m[k]) / int(k.sum())
        for m, k in zip(momenta, masks, strict=True)
    ]
    total = sum(means[i] for i in layers)
    share = {i: means[i] / total if total else Fraction(0) for i in layers}

    survivors, pruned = [k.copy() for k in masks], [0] * len(masks)
    for i in layers:
        size, active = masks[i].size, int(masks[i].sum())
        own = rate
        if size - active < Fraction(1, 5) * size and share[i] > Fraction(1, len(layers)):
            own = min(rate, (size - active) / size)
        pruned[i] = min(active, math.floor(round(float(own) * active, 9) + 0.5))  # halves go up
        by_size = sorted(np.flatnonzero(masks[i]), key=lambda j, i=i: (abs(weights[i].flat[j]), j))
        survivors[i].flat[by_size[: pruned[i]]] = False

    room = [int((~survivors[i]).sum()) for i in layers]
    counts = [0] * len(masks)
    for i, n in zip(layers, oracle_fill(sum(pruned), list(share.values()), room), strict=True):
        counts[i] = n
    for i in layers:  # no layer is left empty
        if survivors[i].sum() + counts[i] == 0:
            donors = [j for j in layers if counts[j] > 0]
            best = max(donors, key=lambda j: (int(survivors[j].sum()) + counts[j], -j))
            counts[best] -= 1
            counts[i] += 1

    after = [k.copy() for k in survivors]
    for i in layers:
        free = np.flatnonzero(~survivors[i])
        by_momentum = sorted(free, key=lambda j, i=i: (-abs(momenta[i].flat[j]), j))
        after[i].flat[by_momentum[: counts[i]]] = True
    values = [np.where(s, w, 0) for s, w in zip(survivors, weights, strict=True)]
    whole = sum(means)
    return after, values, pruned, counts, [m / whole if whole else math.nan for m in means]


def oracle_fill(total: int, share: list[Fraction], room: list[int]) -> list[int]:
    """Water level found by raising it from one full layer to the next; then largest remainders."""
    n = len(share)
    quota = [Fraction(0)] * n
    todo = [i for i in range(n) if room[i]]
    left = Fraction(total)
    while todo and left:
        w = {i: share[i] for i in todo}
        if not any(w.values()):
            w = {i: Fraction(room[i]) for i in todo}
        growing = [i for i in todo if w[i] > 0]
        level = left / sum(w[i] for i in growing)
        first = min(Fraction(room[i]) / w[i] for i in growing)
        if level < first:
            for i in growing:
                quota[i] = w[i] * level
            break
        tightest = [i for i in growing if Fraction(room[i]) / w[i] == first]
        for i in tightest:
            quota[i] = Fraction(room[i])
            left -= room[i]
        todo = [i for i in todo if i not in tightest]
    counts = [math.floor(q) for q in quota]
    rest = sorted(range(n), key=lambda i: (-(quota[i] - counts[i]), i))
    for i in rest[: total - sum(counts)]:
        counts[i] += 1
    return counts
