"""What this reproduction adds: checks, other starts, networks and readings, later questions.

Judged by the same rule, never counted with the authors' claims. Something new is added here and
nowhere else.  Imports no torch.
"""

from __future__ import annotations

from typing import Any

from lib.claims import values
from lib.claims.ablations import Growing, MoreSensitive, settings
from lib.claims.claim import (
    AFTER,
    BEFORE,
    BETWEEN_MNIST_FILES,
    EFFECT_MARGIN,
    SETTING_MARGIN,
    TABLE_MARGIN,
    TEN_IMAGES,
    Claim,
    Published,
    Rule,
)
from lib.claims.compare import Level, NotTrained, Pairs, against
from lib.claims.computing import MARGINS, SameError
from lib.claims.effects import FULL, NARROW, WHOLE, WITHOUT, rules
from lib.claims.learning import VARIANTS, MoreLearn
from lib.claims.measured import (
    NETWORKS,
    Estimate,
    OnTheClock,
    PublishedSpecialisation,
    SparseKernels,
    Specialisation,
)
from lib.claims.networks import Closer
from lib.claims.statements import OTHERS, RAW, cifar10, headline, mnist, part_pairs
from lib.experiments import READINGS
from lib.results.measured import EQUAL
from lib.results.reading import METHOD_NAMES, Where, model_name

_OURS = "a check of this reproduction"
_NEW = "before rows of this experiment (2026-11-24)"
_AT_5 = "before their rows, after five seeds of the paper's start at 5 % (2026-11-25)"
_AFTER_OTHERS = {
    "masks that stay": _AT_5,
    "random growth": _AT_5,
    "half the learning rate": _AT_5,
    "initial scale and half the learning rate": "before its rows, after twelve seeds of the others "
    "(2026-11-25)",
}
_BASELINES = (*OTHERS, "static")


def _named(**more: Any) -> dict[str, Where]:
    return {METHOD_NAMES[method]: {"method": method, **more} for method in _BASELINES}


# ------------------------------------------------------------------------------------- baselines

_PLAIN: Where = {"model": values.NORMED, **values.PLAIN}
_HALF: Where = {"init": "half_output"}

_MAIN = (
    *(
        Claim(
            id=f"baseline_network_{method}",
            statement=f"{METHOD_NAMES[method]}: the published MNIST curve is that of the network "
            "with batch norm (mean distance to it, minus that of LeNet-300-100)",
            source="code of DSR's authors, mnist_mlp; its flags are not recorded",
            rule=Rule("lower", TEN_IMAGES, when=_NEW),
            ours=Closer(method),
        )
        for method in _BASELINES
    ),
    *(
        Claim(
            id=f"equal_network_{ident}",
            statement=f"Batch norm for all{words}: lower error than each of {names}, mean over the "
            "weights",
            source=_OURS,
            rule=Rule("lower", TEN_IMAGES, when=_NEW),
            ours=Pairs(
                "baseline_network",
                against(
                    {"method": "sparse_momentum", **_PLAIN, **ours},
                    {METHOD_NAMES[m]: {"method": m, **_PLAIN, **theirs} for m in methods},
                ),
                "density",
            ),
        )
        for ident, words, names, methods, ours, theirs in (
            ("lower_than_others", "", "DSR, SET, DeepR, a static mask", _BASELINES, {}, {}),
            (
                "lower_than_their_way",
                ", DSR and SET as their authors' code trains them",
                "these two",
                ("dsr", "set"),
                {},
                {"schedule": "constant"},
            ),
            (
                "half_output",
                " and a half dense output layer",
                "DSR, SET, a static mask",
                ("dsr", "set", "static"),
                _HALF,
                _HALF,
            ),
        )
    ),
    Claim(
        id="mnist_lower_than_static",
        statement="LeNet-300-100: lower error than a static mask, mean over the weights",
        source="raw runs of DSR's authors, not plotted",
        rule=Rule("lower", TEN_IMAGES),
        ours=Pairs(
            "main_results",
            [("", mnist("sparse_momentum"), mnist("static"))],
            "density",
        ),
        paper=Published(
            "mnist_sparse_summary",
            mnist("sparse_momentum"),
            mnist("static"),
            over="density",
            b_table=RAW,
            raw=RAW,
        ),
    ),
    Claim(
        id="mnist_dsr_lower_at_0.01",
        statement="LeNet-300-100 at 1 %: DSR has lower error than sparse momentum (raw runs; the "
        "figure's file has a slip)",
        source="official code, results/dynamic_sparse/results.zip",
        rule=Rule("lower", TEN_IMAGES),
        ours=Pairs(
            "main_results",
            [("", mnist("dsr", density=0.01), mnist("sparse_momentum", density=0.01))],
        ),
        paper=Published(
            "mnist_sparse_summary",
            mnist("dsr", density=0.01),
            mnist("sparse_momentum", density=0.01),
            raw=RAW,
        ),
    ),
    Claim(
        id="mnist_erk_lower_than_others",
        statement="LeNet-300-100, all from ERK densities of the layers: lower error than each of "
        "DSR, SET, DeepR and a static mask, mean over the weights",
        source=_OURS,
        rule=Rule(
            "lower",
            TEN_IMAGES,
            when="before the rows from ERK densities, after those from uniform ones (2026-11-22)",
        ),
        ours=Pairs(
            "initial_densities",
            against(
                {"model": "lenet300-100", "init": "erk", "method": "sparse_momentum"},
                _named(model="lenet300-100", init="erk"),
            ),
            "density",
        ),
    ),
    *(
        Claim(
            id=f"trainability_{variant.replace(' ', '_')}",
            statement=f"LeNet-5: more seeds have learned after ten epochs with {variant} than as "
            "the paper starts it (share at the paper's start minus with it)",
            source=f"{_OURS}; issues 6 and 15 of the official code: 90 % accuracy falls to 10 %",
            # points: four of twenty seeds
            rule=Rule("lower", 20.0, "points of the share", _AFTER_OTHERS.get(variant, _NEW)),
            ours=MoreLearn(variant),
        )
        for variant in list(VARIANTS)[1:]
    ),
)

# --------------------------------------------------------------------------------------- readings

_SHARES = {"1 %": 0.01, "2 %": 0.02, "5 %": 0.05}
_READING_NAMES = {
    "ours": "as read here",
    "official": "all readings of the code of August 2019",
    "reset": "with the reset of momentum (code of 9 July 2019)",
    "half": "prune rate 0.5 (the official command line's default)",
}
_PUBLISHED_BY = {
    "mnist_sparse_summary": ("MNIST_sparse_summary.csv", "19dcdff of 9 July 2019", {}),
    "mnist_lenet300-100": (
        "the compression figure",
        "fb2eb00 of 29 July 2019, without the reset of momentum",
        {"setting": ""},
    ),
}

_READINGS = (
    *(
        Claim(
            id=f"readings_{reading}_{table}",
            statement=f"LeNet-300-100 at 1, 2, 5 %, {words}: error of {name}",
            source=f"official code, {version}",
            rule=Rule(
                "value",
                BETWEEN_MNIST_FILES,
                "%",
                BEFORE if (reading, table) == ("official", "mnist_sparse_summary") else AFTER,
            ),
            ours=Level(
                "official_readings",
                {share: {**READINGS[reading], "density": at} for share, at in _SHARES.items()},
            ),
            paper={
                share: Published(table, mnist("sparse_momentum", density=at, **more))
                for share, at in _SHARES.items()
            },
        )
        for reading, words in _READING_NAMES.items()
        for table, (name, version, more) in _PUBLISHED_BY.items()
    ),
    Claim(
        id="readings_reset_changes_nothing",
        statement="Resetting the momentum of inactive weights after an update changes no error: "
        "when it is next read, after 540 steps, 0.9^540 = 2e-25 of what it set is left",
        source="official code of 9 July 2019, reset_momentum",
        rule=Rule("same", BETWEEN_MNIST_FILES, when=_NEW),
        ours=Pairs(
            "official_readings",
            [
                (
                    share,
                    {**READINGS["reset"], "density": at},
                    {**READINGS["ours"], "density": at},
                )
                for share, at in _SHARES.items()
            ],
        ),
    ),
)

# ----------------------------------------------------------------------------------- ablations

_LENET = {"LeNet-300-100": mnist("sparse_momentum")}
_ALEXNET = {"AlexNet-s": cifar10("sparse_momentum", model="alexnet-s")}
_MLPS = {
    "MLPs": ("MLPs on MNIST", "depth"),
    "BN-MLPs": ("MLPs with batch norm on MNIST", "depth_batch_norm"),
}

_ABLATIONS = (
    *(
        Claim(
            id=f"ablation_{ident}",
            statement=words,
            source=_OURS,
            rule=Rule("lower", EFFECT_MARGIN["mnist" if networks is _LENET else "cifar10"]),
            ours=Pairs("ablations", part_pairs(networks, FULL, without), "density"),
        )
        for ident, words, networks, without in (
            (
                "redistribution_lenet300-100",
                "LeNet-300-100: momentum redistribution has lower error than none",
                _LENET,
                WITHOUT["redistribution"],
            ),
            (
                "layer_size_lenet300-100",
                "LeNet-300-100: momentum redistribution has lower error than sharing by layer size "
                "(called none in the code since August 2019)",
                _LENET,
                rules("layer_size", "momentum"),
            ),
            (
                "redistribution_alexnet-s",
                "AlexNet-s: momentum redistribution has lower error than none",
                _ALEXNET,
                WITHOUT["redistribution"],
            ),
            (
                "growth_alexnet-s",
                "AlexNet-s: momentum growth has lower error than random growth",
                _ALEXNET,
                WITHOUT["growth"],
            ),
        )
    ),
    *(
        Claim(
            id=f"scaling_{part}_{ident}{'_erk' if start == 'erk' else ''}",
            statement=f"{words}{' from ERK densities' if start == 'erk' else ''}: the benefit of "
            f"momentum {part} grows with depth (change of full minus without, per doubling)",
            source=_OURS + "; at depth 1 without redistribution the output layer has 200 (batch "
            "norm: 50) of its 1,000 weights",
            # three doublings are covered
            rule=Rule("lower", round(EFFECT_MARGIN["mnist"] / 3, 3)),
            ours=Growing("depth_scaling", part, "mnist", (axis,), start),
        )
        for part in WITHOUT
        for axis, (words, ident) in _MLPS.items()
        for start in ("uniform", "erk")
    ),
    Claim(
        id="redistribution_resnet50",
        statement="ResNet-50: redistribution moves weights from late to early layers (stem 97 % "
        "dense, last 3x3 convolutions 2 to 10 %) and helps from uniform densities",
        source="official logs of the tuned runs; RigL reproducibility report, table 5: 71.8 to "
        "72.6 % accuracy on CIFAR-100 at 10 %",
        rule=Rule("lower", TABLE_MARGIN, when=AFTER),
        ours=NotTrained("imagenet", "no run without redistribution is planned on ResNet-50"),
    ),
)

# ---------------------------------------------------------------------------------- sensitivity

_SENSITIVITY = (
    *(
        Claim(
            id=f"insensitive_{over}_{model}_{width}",
            statement=f"{model_name(model)}: {over.replace('_', ' ')} {low:g} to {high:g} moves "
            f"the error by less than {SETTING_MARGIN[dataset]:g} points",
            source=_OURS,
            rule=Rule("same", SETTING_MARGIN[dataset], when=AFTER if width == "narrow" else BEFORE),
            ours=settings(over, (model,), low, high),
        )
        for model, dataset, widths in (
            ("lenet300-100", "mnist", ("narrow", "whole")),
            ("alexnet-s", "cifar10", ("whole",)),
            ("vgg16-d", "cifar10", ("whole",)),
        )
        for width in widths
        for over, (low, high) in (NARROW if width == "narrow" else WHOLE).items()
    ),
    Claim(
        id="momentum_no_more_than_dense_lenet300-100",
        statement="LeNet-300-100: no more sensitive to momentum than dense training",
        source=_OURS,
        rule=Rule("match", SETTING_MARGIN["mnist"]),
        ours=MoreSensitive("mnist", ("lenet300-100",)),
    ),
)

# ------------------------------------------------------------------------- speed and features

_FASTER = "the paper's speed-ups are estimates; taken by the clock here"
_LAST = (
    Claim(
        id="speedup_estimate_dense_convolution",
        statement="CIFAR-10: with dense convolutions the largest estimate is above 1 ×",
        source="the paper's table; its numbers are not public",
        rule=Rule("at_least", 0.0, "×", AFTER),
        ours=Estimate("max", "channel", above=1.0),
    ),
    Claim(
        id="speedup_measured",
        statement="CIFAR-10: a forward pass without the empty channels takes less time than dense",
        source=_FASTER,
        # per cent of the time; two clocks of one network differ by as much
        rule=Rule("lower", 5.0, "%"),
        ours=OnTheClock(),
        paper=headline(
            "speedup_max_x",
            "up to {value:g} × faster (estimate)",
            setting="version 2",
        ),
    ),
    Claim(
        id="speedup_clock",
        statement="CIFAR-10: whole training steps with sparse kernels on the CPU take less time "
        "than dense, 5 % of the weights, the network that gains least",
        source=_FASTER,
        rule=Rule("lower", 5.0, "%", "after first timings existed (2026-11-22)"),
        ours=SparseKernels("least"),
        paper=headline(
            "speedup_min_x", "{value:g} × faster (estimate)", setting="version 2 (table)"
        ),
    ),
    Claim(
        id="speedup_clock_up_to",
        statement="CIFAR-10: training is up to 5.61 × faster by the clock too (sparse kernels on "
        "the CPU, 5 % of the weights, the network that gains most)",
        source=_FASTER,
        rule=Rule("match", 0.5, "×", "after first timings existed (2026-11-22)"),
        ours=SparseKernels("largest"),
        paper=headline("speedup_max_x", "{value:g} × (estimate)", setting="version 2"),
    ),
    *(
        Claim(
            id=f"computing_{way}_{dataset}",
            statement=f"{name}: {words}, seed by seed",
            source=_OURS,
            rule=Rule("same", MARGINS[dataset], when="before rows of this experiment (2026-11-22)"),
            ours=SameError(dataset, way),
        )
        for dataset, name in (("mnist", "MNIST"), ("cifar10", "CIFAR-10"))
        for way, words in (
            ("sparse", "sparse layers over their non-zero weights have the error of masked ones"),
            ("bf16", "bfloat16 has the error of float32"),
        )
    ),
    Claim(
        id="features_more_general_equal",
        statement="AlexNet-s, VGG16-D, WRN-28-2: sparse features are more general when every layer "
        "weighs the same",
        source="official code, feature_data.tar.gz, weighted here",
        rule=Rule("lower", 0.5),
        ours=Specialisation(EQUAL),
        paper={name: PublishedSpecialisation(m[0], EQUAL) for name, m in NETWORKS.items()},
    ),
)

EXTENSIONS: tuple[Claim, ...] = (*_MAIN, *_READINGS, *_ABLATIONS, *_SENSITIVITY, *_LAST)
