"""What the official code leaves open or did by accident, as data."""

from __future__ import annotations

from dataclasses import dataclass

from lib.grids.protocol import Block

# Variants of the algorithm between which paper and official code leave a choice
# (lib/methods), "ours" first; each of the others departs from it in one thing. A variant is one
# block.
_OURS: Block = {
    "prune": "magnitude",
    "prune_rate": 0.2,
    "redistribution": "momentum",
    "schedule": "cosine",
    "options": (),
    "dense_window_steps": 0,
    "kernels": "auto",
}
# Whether an inactive weight has any momentum decides: gathered in each of the epoch's 540 steps, as
# the kernels gather it only in the last ones before an update otherwise.
_ANYWHERE: Block = {"dense_window_steps": 540}
READINGS: dict[str, Block] = {
    "ours": _OURS,
    "feedback": {**_OURS, "prune": "magnitude_up", "options": (("feedback", 1.0),)},
    "keep": {**_OURS, "options": (("keep_regrown", 1.0),)},
    "anywhere": {**_OURS, **_ANYWHERE, "options": (("grow_anywhere", 1.0),)},
    "floor": {**_OURS, "schedule": "cosine_floor"},
    "official": {
        **_OURS,
        **_ANYWHERE,
        "prune": "magnitude_up",
        "schedule": "cosine_floor",
        "options": (("feedback", 1.0), ("keep_regrown", 1.0), ("grow_anywhere", 1.0)),
    },
    "per_epoch": {**_OURS, "options": (("anneal_every_steps", 540.0),)},
    "after": {**_OURS, "redistribution": "momentum_after", "prune": "magnitude_before"},
    "plain": {**_OURS, "prune": "magnitude_plain"},
    # Of 9 July 2019. By torch's operators: the kernels gather the momentum of inactive weights from
    # zero, so that nothing would be left to be reset.
    "reset": {**_OURS, "options": (("reset_momentum", 1.0),), "kernels": "torch"},
    "half": {**_OURS, "prune_rate": 0.5},  # the official command line's default
    "layer_size": {**_OURS, "redistribution": "layer_size"},
}


@dataclass(frozen=True)
class KeptDense:
    """The layers that the official code of July 2019 left dense by accident, and their size."""

    layers: tuple[str, ...]
    kept: int
    weights: int

    def real_density(self, nominal: float) -> float:
        """Share of all weights that is active when the other layers have the nominal one."""
        return (self.kept + nominal * (self.weights - self.kept)) / self.weights


# Names of batch-norm layers to be left out of the masks ("features.1", "features.4") were matched
# as substrings, and so took convolutions along.
_VGG_LAYERS = ("features.10", "features.14", "features.17", "features.40")
KEPT_DENSE = {
    "vgg16-c": KeptDense(_VGG_LAYERS, 1_294_336, 11_307_712),
    "vgg16-d": KeptDense(_VGG_LAYERS, 3_391_488, 15_239_872),
    "vgg16-like": KeptDense(_VGG_LAYERS, 3_391_488, 14_977_728),
    "alexnet-s": KeptDense(("features.12",), 884_736, 5_066_784),
    "alexnet-b": KeptDense(("features.12",), 884_736, 8_484_896),
}
