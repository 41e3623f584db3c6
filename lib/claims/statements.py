"""The authors' own claims, each with its place: abstract, figure, table, official code, blog.

A claim of theirs is added here and nowhere else; what is ours stands in lib/claims/extensions.py,
and single published values in lib/claims/values.py.  Imports no torch.
"""

from __future__ import annotations

from typing import Any

from lib.claims.ablations import Growing, MoreSensitive, PublishedShift, settings
from lib.claims.claim import (
    AFTER,
    BEFORE,
    EFFECT_MARGIN,
    SETTING_MARGIN,
    TABLE_MARGIN,
    TEN_IMAGES,
    Claim,
    Published,
    Rule,
)
from lib.claims.compare import Level, NotTrained, Pairs, Reduction, against
from lib.claims.effects import FULL, NARROW, WITHOUT, rules
from lib.claims.measured import NETWORKS, Estimate, PublishedSpecialisation, Specialisation
from lib.experiments import CIFAR10_TABLE, KEPT_DENSE
from lib.results.measured import POOLED
from lib.results.reading import METHOD_NAMES, Where, model_name

RAW = "dsr_authors_raw_runs_wrn28-2_and_mnist"
HEADLINES = "headline_and_speedup_claims"
OTHERS = ("dsr", "set", "deepr")  # of the paper's MNIST and WRN-28-2 figures
_ABSTRACT = "abstract, versions 1 and 2"
_NOTES = "abstract, version 2; public notes on the paper"
ROUNDING = 0.5  # per cent: what the rounding of a whole printed number allows


def mnist(method: str, model: str = "lenet300-100", **more: Any) -> Where:
    """Runs of a method on MNIST."""
    return {"dataset": "mnist", "model": model, "method": method, **more}


def cifar10(method: str, **more: Any) -> Where:
    """Runs of a method on CIFAR-10."""
    return {"dataset": "cifar10", "method": method, **more}


def cell(model: str, method: str) -> Where:
    """A cell of the paper's CIFAR-10 table."""
    share = 1.0 if method == "dense" else CIFAR10_TABLE[model]
    return cifar10(method, model=model, density=share)


def headline(quantity: str, says: str, **more: Any) -> Published:
    """A number of abstract or blog."""
    where = {"quantity": quantity, **more}
    return Published(HEADLINES, where, column="value", says=says)


def _by_name(side: Any) -> dict[str, Where]:
    return {METHOD_NAMES[method]: side(method) for method in OTHERS}


def _minus(table: str, a: Where, others: dict[str, Where], **more: Any) -> dict[str, Published]:
    return {
        name: Published(table, a, other, over="density", **more) for name, other in others.items()
    }


_WRN: Where = {"model": "wrn-28-2"}
_TABLE_PAIRS = tuple(
    (model_name(m), cell(m, "sparse_momentum"), cell(m, "snip")) for m in CIFAR10_TABLE
)
_DROPOUT = {
    "LeNet-300-100 at 1.5 %": ("lenet300-100", 0.015),
    "LeNet-5 at 0.4 %": ("lenet5", 0.004),
}
_DROPOUT_POINT: Where = {"label": "Variational Dropout (Molchanov 2017)"}

_MAIN = (
    Claim(
        id="mnist_relative_reduction",
        statement="MNIST: error at least 8 % lower than other sparse algorithms (DSR, SET, DeepR)",
        source=f"{_ABSTRACT}; which algorithms is not said: those of the MNIST figure",
        rule=Rule("at_least", ROUNDING, "%", AFTER),
        ours=Reduction(
            "main_results",
            mnist("sparse_momentum"),
            _by_name(mnist),
            "density",
            "mnist_sparse_summary",
            RAW,
            "lenet300-100",
        ),
        paper=headline("relative_error_decrease_pct", "{value:g} %", dataset="mnist"),
    ),
    Claim(
        id="mnist_lower_than_others",
        statement="LeNet-300-100: lower error than each of DSR, SET, DeepR, mean over the weights",
        source="MNIST figure (official code, results/MNIST_sparse_summary.csv)",
        rule=Rule("lower", TEN_IMAGES),
        ours=Pairs("main_results", against(mnist("sparse_momentum"), _by_name(mnist)), "density"),
        paper=_minus("mnist_sparse_summary", mnist("sparse_momentum"), _by_name(mnist), raw=RAW),
    ),
    *(
        Claim(
            id=f"mnist_matches_dense_at_{share:g}",
            statement=f"LeNet-300-100: as good as dense with {100 * share:g} % of the weights",
            source=source,
            rule=Rule("match", TEN_IMAGES),
            ours=Pairs(
                "mnist_compression",
                [("", mnist("sparse_momentum", density=share), mnist("dense"))],
            ),
            paper=headline(
                "weights_for_dense_level_pct",
                "dense level at {value:g} % weights",
                dataset="mnist",
                setting=setting,
            ),
        )
        for share, setting, source in (
            (0.08, "", "a reader's public notes on the paper"),
            (0.2, "match or exceed", "the author's blog, quoted elsewhere; abstract, version 1"),
        )
    ),
    Claim(
        id="mnist_lower_than_snip",
        statement="LeNet-300-100 and LeNet-5: lower error than SNIP, mean over the weights",
        source="figure of the compression results (official code)",
        rule=Rule("lower", TEN_IMAGES),
        ours=Pairs(
            "mnist_compression",
            [
                (model_name(m), mnist("sparse_momentum", m), mnist("snip", m))
                for m in ("lenet300-100", "lenet5")
            ],
            over="density",
        ),
        paper={
            model_name(m): Published(
                f"mnist_{m}",
                mnist("sparse_momentum", m, setting=""),
                mnist("snip", m),
                over="density",
            )
            for m in ("lenet300-100", "lenet5")
        },
    ),
    Claim(
        id="mnist_variational_dropout_lower",
        statement="Variational dropout (published) has lower error than sparse momentum: "
        "LeNet-300-100 at 1.5 %, LeNet-5 at 0.4 %",
        source="figure of the compression results; a reader's notes on the paper say 1 to 2 %",
        rule=Rule("lower", TEN_IMAGES),
        ours=Level(
            "mnist_compression",
            {name: mnist("sparse_momentum", m, density=at) for name, (m, at) in _DROPOUT.items()},
            points=dict(zip(_DROPOUT, (1.9, 0.8), strict=True)),
        ),
        paper={
            name: Published(
                f"mnist_{m}",
                {**_DROPOUT_POINT, "density": at},
                mnist("sparse_momentum", m, density=at),
            )
            for name, (m, at) in _DROPOUT.items()
        },
    ),
    Claim(
        id="cifar10_relative_reduction",
        statement="CIFAR-10: error at least 15 % lower than other sparse algorithms (DSR, SET, "
        "DeepR; WRN-28-2)",
        source=f"{_ABSTRACT}; which algorithms is not said: those of the WRN-28-2 figure",
        rule=Rule("at_least", ROUNDING, "%", AFTER),
        ours=Reduction(
            "wrn28_2_curve",
            cifar10("sparse_momentum"),
            _by_name(cifar10),
            "density",
            "wrn28-2_cifar10_summary",
            RAW,
            "wrn-28-2",
        ),
        paper=headline("relative_error_decrease_pct", "{value:g} %", dataset="cifar10"),
    ),
    Claim(
        id="wrn28_2_lower_than_others",
        statement="WRN-28-2: lower error than each of DSR, SET, DeepR, mean over the weights",
        source="WRN-28-2 figure (official code, results/WRN-28-2_results_summary.csv)",
        rule=Rule("lower", TEN_IMAGES),
        ours=Pairs(
            "wrn28_2_curve",
            against(cifar10("sparse_momentum"), _by_name(cifar10)),
            "density",
            "wrn-28-2",
        ),
        paper=_minus(
            "wrn28-2_cifar10_summary",
            cifar10("sparse_momentum", **_WRN),
            _by_name(lambda m: cifar10(m, **_WRN)),
        ),
    ),
    Claim(
        id="cifar10_lower_than_snip",
        statement="CIFAR-10: lower error than SNIP on each of the eight networks",
        source="paper, table 1; SNIP quoted there",
        rule=Rule("lower", TABLE_MARGIN),
        ours=Pairs("cifar10_table", _TABLE_PAIRS),
        paper={name: Published("cifar10_table", a, b) for name, a, b in _TABLE_PAIRS},
    ),
    Claim(
        id="cifar10_matches_dense",
        statement="VGG16-D and WRN-16-10: dense level with 5 % of the weights",
        source="the author's blog, quoted elsewhere; numbers: paper, table 1",
        rule=Rule("match", TABLE_MARGIN),
        ours=Pairs(
            "cifar10_table",
            [
                (model_name(m), cell(m, "sparse_momentum"), cell(m, "dense"))
                for m in ("vgg16-d", "wrn-16-10")
            ],
        ),
        paper={
            model_name(m): Published("cifar10_table", cell(m, "sparse_momentum"), cell(m, "dense"))
            for m in ("vgg16-d", "wrn-16-10")
        },
    ),
    Claim(
        id="imagenet_relative_reduction",
        statement="ImageNet: error at least 6 % lower than other sparse algorithms (ResNet-50)",
        source=f"{_ABSTRACT}; against DSR the published errors give 2.8 and 3.4 %",
        rule=Rule("at_least", ROUNDING, "%", AFTER),
        ours=NotTrained("imagenet", "no other sparse method is planned on ImageNet"),
        paper=headline("relative_error_decrease_pct", "{value:g} %", dataset="imagenet"),
    ),
)

# ---------------------------------------------------------------------------------- speed-ups


def _speedup(ident: str, words: str, source: str, which: Any, setting: str, quantity: str) -> Claim:
    return Claim(
        id=f"speedup_estimate_{ident}",
        statement=f"CIFAR-10: {words} (estimate, sparse convolution)",
        source=source,
        # times faster: a tenth to a fifth of the published values
        rule=Rule("value", 0.5, "×", BEFORE if ident != "version_1" else AFTER),
        ours=Estimate(which),
        paper=headline(quantity, "{value:g} ×", dataset="cifar10", setting=setting, model=""),
    )


_SPEEDUPS = (
    _speedup(
        "largest", "up to 5.61 × faster", "abstract, version 2", "max", "version 2", "speedup_max_x"
    ),
    _speedup(
        "least",
        "the network that gains least is 2.74 × faster",
        "the paper's table, as a review quotes it",
        "min",
        "version 2 (table)",
        "speedup_min_x",
    ),
    Claim(
        id="speedup_estimate_version_1",
        statement="CIFAR-10: up to 11.85 × faster (estimate, sparse convolution)",
        source="abstract, version 1 only",
        rule=Rule("value", 0.5, "×", AFTER),
        ours=Estimate("max"),
        paper=headline(
            "speedup_max_x",
            "{value:g} ×",
            dataset="cifar10",
            setting="version 1",
            source="abstract, arXiv version 1 (as at deeplearn.org)",
        ),
    ),
)

# ------------------------------------------------------------------------ ablations and scaling

_LARGE = {
    "VGG16-D": cifar10("sparse_momentum", model="vgg16-d"),
    "WRN-28-2": cifar10("sparse_momentum", model="wrn-28-2"),
}
_SMALL = {
    "LeNet-300-100": mnist("sparse_momentum"),
    "LeNet-5": mnist("sparse_momentum", "lenet5"),
}


def part_pairs(networks: dict[str, Where], a: Where, b: Where) -> tuple[Any, ...]:
    """Variant A against variant B on each of the networks, one pair each."""
    return tuple((name, {**net, **a}, {**net, **b}) for name, net in networks.items())


def _ablation(
    ident: str, words: str, kind: Any, networks: dict[str, Where], a: Where, b: Where
) -> Claim:
    dataset = next(iter(networks.values()))["dataset"]
    return Claim(
        id=f"ablation_{ident}",
        statement=words,
        source=_NOTES,
        rule=Rule(kind, EFFECT_MARGIN[dataset]),
        ours=Pairs("ablations", part_pairs(networks, a, b), "density"),
    )


_RANDOM = rules("none", "random")
_ABLATIONS = (
    _ablation(
        "redistribution",
        "VGG16-D, WRN-28-2: momentum redistribution has lower error than none",
        "lower",
        _LARGE,
        FULL,
        WITHOUT["redistribution"],
    ),
    _ablation(
        "growth",
        "VGG16-D, WRN-28-2 (large): momentum growth has lower error than random growth",
        "lower",
        _LARGE,
        FULL,
        WITHOUT["growth"],
    ),
    _ablation(
        "random_growth_suffices",
        "LeNet-300-100, LeNet-5 (small): with redistribution, random growth is as good",
        "match",
        _SMALL,
        WITHOUT["growth"],
        FULL,
    ),
    Claim(
        id="ablation_worst",
        statement="Random growth without redistribution is the worst of the four variants",
        source=_NOTES,
        rule=Rule("lower", EFFECT_MARGIN["mnist"], when=AFTER),
        ours=Pairs(
            "ablations",
            tuple(
                (f"{name}, {variant}", {**net, **where}, {**net, **_RANDOM})
                for name, net in {**_SMALL, **_LARGE}.items()
                for variant, where in {
                    "full": FULL,
                    "no redistribution": WITHOUT["redistribution"],
                    "random growth": WITHOUT["growth"],
                }.items()
            ),
            "density",
        ),
    ),
    *(
        Claim(
            id=f"scaling_{part}",
            statement=f"The benefit of momentum {part} grows with depth and width (WRNs on "
            "CIFAR-10; change of full minus without, per doubling)",
            source="abstract, version 2; no numbers are public",
            # three doublings are covered
            rule=Rule("lower", round(EFFECT_MARGIN["cifar10"] / 3, 3)),
            ours=Growing("depth_scaling", part, "cifar10", ("WRN-",)),
        )
        for part in WITHOUT
    ),
)

# ------------------------------------------------------------------------------- sensitivity

_CODE = "official code, results/sensivity_*.csv of 2019-07-29"
_SENSITIVE = ("alexnet-s", "vgg16-d")

_SENSITIVITY = (
    *(
        Claim(
            id=f"insensitive_{over}",
            statement=f"AlexNet-s, VGG16-D: {over.replace('_', ' ')} {words} moves the error by "
            f"less than {SETTING_MARGIN['cifar10']:g} points",
            source=f"abstract, version 2 (insensitive to hyper-parameters); {_CODE}",
            # the range; the margin before rows
            rule=Rule("same", SETTING_MARGIN["cifar10"], when=AFTER),
            ours=settings(over, _SENSITIVE, *NARROW[over]),
            paper=PublishedShift(
                over, _SENSITIVE, *NARROW[over], says="at most {value:.2f} points"
            ),
        )
        for over, words in (("prune_rate", "0.2 to 0.5"), ("momentum", "0.7 to 0.9"))
    ),
    Claim(
        id="momentum_no_more_than_dense",
        statement="AlexNet-s, VGG16-D: no more sensitive to momentum than dense training",
        source=f"{_CODE}, plot_graphs.py: Levene p = 0.92, Wilcoxon p = 1.0",
        rule=Rule("match", SETTING_MARGIN["cifar10"]),
        ours=MoreSensitive("cifar10", _SENSITIVE),
        paper={
            model_name(m): PublishedShift("momentum", (m,), 0.5, 0.95, minus_dense=True)
            for m in _SENSITIVE
        },
    ),
)

# --------------------------------------------------------------------- features, dense layers

_LAST = (
    Claim(
        id="features_more_general",
        statement="AlexNet-s, VGG16-D, WRN-28-2: sparse features are more general (class "
        "specialisation, channels pooled)",
        source="abstract, version 1 (not in version 2); official code, feature_data.tar.gz",
        # a third of what the official data show where it is clear (AlexNet-s)
        rule=Rule("lower", 0.5),
        ours=Specialisation(POOLED),
        paper={name: PublishedSpecialisation(m[0], POOLED) for name, m in NETWORKS.items()},
    ),
    Claim(
        id="dense_layers_lower_error",
        statement="Layers left dense by mistake (July 2019) lowered the error, at a nominal 10 %",
        source='official code, change log of version 1.0: without them "slightly degraded"',
        rule=Rule("lower", EFFECT_MARGIN["cifar10"]),
        ours=Pairs(
            "dense_layers",
            tuple(
                (model_name(m), {**side, "keep_dense": old.layers}, {**side, "keep_dense": ()})
                for m, old in KEPT_DENSE.items()
                for side in [cifar10("sparse_momentum", model=m, density=0.1)]
            ),
        ),
    ),
)

STATEMENTS: tuple[Claim, ...] = (*_MAIN, *_SPEEDUPS, *_ABLATIONS, *_SENSITIVITY, *_LAST)
