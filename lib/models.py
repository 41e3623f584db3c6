"""The networks of the paper, built by name: `build_model("lenet300-100")`.

All forwards return logits. The networks are those of the official code (e19ff16,
`sparselearning/models.py`), which takes the CIFAR-10 ones from the SNIP paper (Lee et al. 2019).
Every weight a method may mask is a parameter with more than one dimension; biases and batch-norm
are not (paper, section 3).

Shapes are written [samples, channels, height, width] or [samples, features].
"""

from __future__ import annotations

import bisect
import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lib.config import unknown

IMAGENET_SHAPE = (3, 224, 224)
SCALE_STEPS = 10_000  # width multipliers are searched in steps of 1 / SCALE_STEPS


def scaled(width: int, scale: float) -> int:
    """A hidden width times the multiplier, rounded half up, at least 1."""
    return max(1, int(width * scale + 0.5))


class Network(nn.Sequential):
    """Named modules, one after the other, from images [N, C, H, W] to logits [N, classes].

    What reaches the module called `head` becomes rows [N, features]: flattened, or with `mean`
    the mean of each feature map.
    """

    def __init__(self, modules: Mapping[str, nn.Module], head: str, mean: bool = False) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.head, self.mean = head, mean

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, classes]."""
        for name, module in self.named_children():
            if name == self.head:
                x = x.mean(dim=(2, 3)) if self.mean else x.flatten(1)
            x = module(x)
        return x


# ------------------------------------------------------------------------------------- MNIST


def build_mlp(hidden: Sequence[int], norm: str, scale: float, num_classes: int) -> Network:
    """Linear layers fc1, fc2, ... with ReLU between: [N, 1, 28, 28] or [N, 784] -> [N, classes].

    `norm`: "hidden", batch norm before each ReLU; "all", after the last layer too, and no biases.
    """
    widths = [28 * 28, *(scaled(width, scale) for width in hidden), num_classes]
    last = len(widths) - 1
    modules: dict[str, nn.Module] = {}
    for i in range(1, len(widths)):
        modules[f"fc{i}"] = nn.Linear(widths[i - 1], widths[i], bias=norm != "all")
        if norm == "all" or (norm == "hidden" and i < last):
            modules[f"bn{i}"] = nn.BatchNorm1d(widths[i])
        if i < last:
            modules[f"relu{i}"] = nn.ReLU(inplace=True)
    return Network(modules, "fc1")


def build_lenet5(scale: float, num_classes: int) -> Network:
    """Caffe's LeNet-5, convolutions unpadded: [N, 1, 28, 28] -> [N, classes]."""
    first, second, hidden = (scaled(width, scale) for width in (20, 50, 500))
    modules = {
        "conv1": nn.Conv2d(1, first, 5),  # [N, 20, 24, 24]
        # Max-pooling and ReLU commute; pooling first leaves a quarter of the ReLU's work.
        "pool1": nn.MaxPool2d(2),  # [N, 20, 12, 12]
        "relu1": nn.ReLU(inplace=True),
        "conv2": nn.Conv2d(first, second, 5),  # [N, 50, 8, 8]
        "pool2": nn.MaxPool2d(2),  # [N, 50, 4, 4]
        "relu2": nn.ReLU(inplace=True),
        "fc3": nn.Linear(second * 4 * 4, hidden),  # [N, 800] -> [N, 500]
        "relu3": nn.ReLU(inplace=True),
        "fc4": nn.Linear(hidden, num_classes),
    }
    return Network(modules, "fc3")


# ----------------------------------------------------------------------- AlexNet and VGG, CIFAR-10

# Convolutions as (channels, kernel, stride, padding), None for a max-pooling.
Plan = Sequence[tuple[int, int, int, int] | None]
# No pooling: sides 32 -> 13 -> 7 -> 4 -> 2 -> 1.
ALEXNET: Plan = ((96, 11, 2, 2), (256, 5, 2, 2), (384, 3, 2, 1), (384, 3, 2, 1), (256, 3, 2, 1))


def vgg16(third_kernel: int) -> Plan:
    """VGG16's convolutions, with this kernel in the last one of stages 3 to 5.

    With 1x1 (VGG16-C) the padding of 1 is kept: sides 32 -> 16 -> 8 -> (10) 5 -> (7) 3 -> (5) 2.
    """
    plan: list[tuple[int, int, int, int] | None] = []
    for channels, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        kernels = (3, 3, third_kernel)[:count]
        plan += [*((channels, kernel, 1, 1) for kernel in kernels), None]
    return plan


def build_cnn(
    plan: Plan, side: int, hidden: Sequence[int], norm_first: bool, scale: float, num_classes: int
) -> Network:
    """A network of the SNIP paper: convolutions with batch norm and ReLU, then maps of this side
    to linear layers of these hidden widths, batch norm before or after their ReLU.
    """
    features: list[nn.Module] = []
    classifier: list[nn.Module] = []
    inputs = 3
    for layer in plan:
        if layer is None:
            features.append(nn.MaxPool2d(2))
            continue
        channels, kernel, stride, padding = layer
        outputs = scaled(channels, scale)
        features.append(nn.Conv2d(inputs, outputs, kernel, stride, padding))
        features += [nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
        inputs = outputs
    inputs *= side**2
    for outputs in (scaled(width, scale) for width in hidden):
        after = [nn.BatchNorm1d(outputs), nn.ReLU(inplace=True)]
        classifier += [nn.Linear(inputs, outputs), *(after if norm_first else reversed(after))]
        inputs = outputs
    classifier.append(nn.Linear(inputs, num_classes))
    parts = {"features": nn.Sequential(*features), "classifier": nn.Sequential(*classifier)}
    return Network(parts, "classifier")


# -------------------------------------------------------------------------- Wide ResNets, CIFAR-10


class PreActBlock(nn.Module):
    """BN-ReLU-conv3x3-BN-ReLU-(dropout)-conv3x3: [N, C, H, W] -> [N, C', H/stride, W/stride].

    Where the shape changes, a 1x1 convolution of the activated input is the shortcut.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut: nn.Conv2d | None = None
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Residual plus shortcut, not activated."""
        out = self.relu1(self.bn1(x))  # [N, C, H, W]
        if self.shortcut is not None:
            x = self.shortcut(out)  # [N, C', H/stride, W/stride]
        out = self.relu2(self.bn2(self.conv1(out)))  # [N, C', H/stride, W/stride]
        return x + self.conv2(self.dropout(out))  # [N, C', H/stride, W/stride]


def build_wrn(depth: int, width: int, scale: float, num_classes: int, dropout: float) -> Network:
    """Pre-activation wide residual network WRN-depth-k: [N, 3, 32, 32] -> [N, classes].

    Dropout stands before the second convolution of each block: 0.3 in the official code, for all
    its WRNs; the DSR baselines on WRN-28-2 used none.
    """
    inputs, *stages = (scaled(c, scale) for c in (16, 16 * width, 32 * width, 64 * width))
    modules: dict[str, nn.Module] = {"conv1": nn.Conv2d(3, inputs, 3, padding=1, bias=False)}
    for i, outputs in enumerate(stages, 1):  # sides 32, 16, 8
        first = PreActBlock(inputs, outputs, 1 if i == 1 else 2, dropout)
        rest = (PreActBlock(outputs, outputs, 1, dropout) for _ in range((depth - 4) // 6 - 1))
        modules[f"block{i}"] = nn.Sequential(first, *rest)
        inputs = outputs
    modules |= {"bn1": nn.BatchNorm2d(inputs), "relu": nn.ReLU(inplace=True)}
    return Network({**modules, "fc": nn.Linear(inputs, num_classes)}, "fc", mean=True)


# ------------------------------------------------------------------------------ ResNet-50, ImageNet


def build_resnet50(scale: float, num_classes: int) -> nn.Module:
    """Torchvision's (the stride in the 3x3): [N, 3, 224, 224] -> [N, classes]; of one width."""
    from torchvision.models import resnet50

    return resnet50(num_classes=num_classes)


# ---------------------------------------------------------------------------------- initialisation


def init_weights(
    model: nn.Module, scheme: str = "default", generator: torch.Generator | None = None
) -> None:
    """Draw every parameter of the model in place; batch norm starts as the identity.

    `scheme` follows the official code but for "he", our MLPs without batch norm:

    - "default": PyTorch's own, U(-b, b) with b = 1 / sqrt(fan_in) for weights and biases; without
      a generator these are the very bits that the constructors would have drawn;
    - "wrn": convolutions N(0, 2 / (kernel area x output channels)), linear biases 0;
    - "resnet": convolutions as in "wrn", the linear layer as in "default";
    - "he": b = sqrt(6 / fan_in) for linear weights, which keeps the mean square of what passes a
      ReLU (He et al. 2015).

    Random numbers come from `generator`, or the global stream, in the order of the modules.  Raises
    TypeError for a module with parameters it has no rule for.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            if isinstance(module, nn.Conv2d) and scheme in ("wrn", "resnet"):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", generator=generator,
                                        nonlinearity="relu")  # fmt: skip
            else:
                slope = 0.0 if scheme == "he" else 5**0.5  # b = sqrt(6 / (1 + slope^2) / fan_in)
                nn.init.kaiming_uniform_(module.weight, a=slope, generator=generator)
            if module.bias is not None and scheme == "wrn":
                nn.init.zeros_(module.bias)
            elif module.bias is not None:
                bound = module.weight[0].numel() ** -0.5  # 1 / sqrt(fan_in)
                nn.init.uniform_(module.bias, -bound, bound, generator=generator)
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.reset_parameters()  # weight 1, bias 0, mean 0, variance 1: nothing random
        elif next(module.parameters(recurse=False), None) is not None:
            raise TypeError(f"no initialisation rule for {name} ({type(module).__name__})")


# ---------------------------------------------------------------------------------------- registry


@dataclass(frozen=True)
class ModelSpec:
    """What is known of a network before it is built.

    `build(scale, num_classes)`, or with a default rate of dropout `build(scale, num_classes, rate)`
    returns the module; `init` is a scheme of `init_weights`.
    """

    dataset: str
    build: Callable[..., nn.Module]
    init: str = "default"
    dropout: float | None = None


def _cnn(plan: Plan, *more: Any) -> ModelSpec:
    return ModelSpec("cifar10", partial(build_cnn, plan, *more))


def _wrn(depth: int, width: int) -> ModelSpec:
    # The official code constructs every WRN with this rate of dropout, not only WRN-22-8.
    return ModelSpec("cifar10", partial(build_wrn, depth, width), "wrn", 0.3)


MODELS: dict[str, ModelSpec] = {
    "lenet300-100": ModelSpec("mnist", partial(build_mlp, (300, 100), "")),
    "lenet5": ModelSpec("mnist", build_lenet5),
    # The MNIST network of DSR's authors (`mnist_mlp` of IntelAI/dynamic-reparameterization), on
    # which the published curves of DSR, SET, DeepR and the static mask were probably measured.
    "lenet300-100-bn": ModelSpec("mnist", partial(build_mlp, (300, 100), "all")),
    "alexnet-s": _cnn(ALEXNET, 1, (1024, 1024), True),
    "alexnet-b": _cnn(ALEXNET, 1, (2048, 2048), True),
    "vgg16-c": _cnn(vgg16(1), 2, (512, 512), False),
    "vgg16-d": _cnn(vgg16(3), 1, (512, 512), False),
    "vgg16-like": _cnn(vgg16(3), 1, (512,), False),
    **{f"wrn-{d}-{w}": _wrn(d, w) for d, w in ((28, 2), (16, 8), (16, 10), (22, 8))},
    "resnet50": ModelSpec("imagenet", build_resnet50, "resnet"),
}
# On MNIST (mlp-100x3), there with batch norm (mlpbn-100x3), on CIFAR-10 (wrn-22-4).
FAMILIES = ("mlp-<width>x<hidden layers>", "mlpbn-<width>x<hidden layers>", "wrn-<depth>-<width>")


def model_spec(name: str) -> ModelSpec:
    """The specification of a registered network or of a member of the families.

    Raises ValueError for an unknown name (with the close matches and the list), for a WRN depth
    that is not 6n + 4, and for a width or number of layers of 0.
    """
    if name in MODELS:
        return MODELS[name]
    if found := re.fullmatch(r"mlp(bn)?-(\d+)x(\d+)", name):
        width, layers = int(found[2]), int(found[3])
        if width < 1 or layers < 1:
            raise ValueError(f"model {name!r}: width and hidden layers must be at least 1")
        build = partial(build_mlp, (width,) * layers, "hidden" if found[1] else "")
        return ModelSpec("mnist", build, "default" if found[1] else "he")
    if found := re.fullmatch(r"wrn-(\d+)-(\d+)", name):
        depth, width = int(found[1]), int(found[2])
        if depth < 10 or (depth - 4) % 6 or width < 1:
            raise ValueError(f"model {name!r}: depth must be 6n + 4, at least 10, width at least 1")
        return _wrn(depth, width)
    raise ValueError(unknown("model", name, [*MODELS, *FAMILIES]))


def _skeleton(
    name: str, width_scale: float, num_classes: int | None = None, dropout: float | None = None
) -> nn.Module:
    """The network on the meta device: shapes only, no memory, no random numbers drawn."""
    spec = model_spec(name)
    classes = num_classes if num_classes is not None else 1000 if spec.dataset == "imagenet" else 10
    rate = (spec.dropout or 0.0) if dropout is None else dropout
    for good, rule in (
        (width_scale == 1 or name != "resnet50", f"no width multiplier, got {width_scale=}"),
        (0 < width_scale <= 1, f"width_scale must be in (0, 1], got {width_scale}"),
        (classes >= 1, f"num_classes must be at least 1, got {classes}"),
        (0 <= rate < 1, f"dropout must be in [0, 1), got {rate}"),
        (not rate or spec.dropout is not None, f"it has no dropout, got dropout={rate}"),
    ):
        if not good:
            raise ValueError(f"model {name!r}: {rule}")
    with torch.device("meta"):
        return spec.build(width_scale, classes, *([] if spec.dropout is None else [rate]))


def build_model(
    name: str,
    *,
    num_classes: int | None = None,
    dropout: float | None = None,
    width_scale: float = 1.0,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Build and initialise a network on the CPU, in training mode.

    `name` is a key of MODELS or a member of the FAMILIES.  `num_classes` and `dropout`
    default to the paper's; only WRNs have dropout.  `width_scale` multiplies every hidden width
    (`small_dense_scale`).  A CPU `generator` makes the weights independent of the global random
    stream, which is then left untouched.  Raises ValueError for an unknown name, with the close
    matches, and for values out of range.
    """
    model = _skeleton(name, width_scale, num_classes, dropout).to_empty(device="cpu")
    init_weights(model, model_spec(name).init, generator)
    return model


# ---------------------------------------------------------------------------------- size and FLOPs


def maskable_weights(model: nn.Module) -> dict[str, int]:
    """Number of weights of every maskable parameter (those with more than one dimension)."""
    return {name: p.numel() for name, p in model.named_parameters() if p.dim() > 1}


@lru_cache(maxsize=256)
def small_dense_scale(name: str, density: float) -> float:
    """The `width_scale` whose network has the number of maskable weights closest to density x the
    full network's: the small dense network of equal weight count.

    A multiple of 1 / 10,000, finer than the widths can resolve; narrow networks can miss the target
    by several per cent.  Raises ValueError for a density below the count that a network with one
    unit in every layer already has.
    """

    def count(step: int) -> int:
        return sum(maskable_weights(_skeleton(name, step / SCALE_STEPS)).values())

    full, least = count(SCALE_STEPS), count(1)
    target = density * full
    if target < least:
        raise ValueError(
            f"model {name!r} at density {density} has {target:.0f} weights, but with one unit in "
            f"every layer it has {least}; the smallest density is {least / full:.3g}"
        )
    high = bisect.bisect_right(range(1, SCALE_STEPS), target, key=count) + 1
    best = min((high, high - 1), key=lambda step: abs(count(step) - target))  # a tie: the larger
    return best / SCALE_STEPS


def layer_flops(model: nn.Module, input_shape: Sequence[int]) -> dict[str, int]:
    """FLOPs of one sample's forward pass per maskable parameter, {parameter name: FLOPs}.

    `input_shape` is that of one sample.  Counted from shapes alone, on a copy on the meta device in
    evaluation mode: 2 FLOPs per multiply-add, padding counted; biases, batch norm, ReLU and pooling
    not.
    """
    shadow = copy.deepcopy(model).to("meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        shadow(torch.empty(1, *input_shape, device="meta"))
    counts, root = counter.get_flop_counts(), type(shadow).__name__
    modules = [name.removesuffix(".weight") for name in maskable_weights(shadow)]
    return {f"{name}.weight": sum(counts[f"{root}.{name}"].values()) for name in modules}
