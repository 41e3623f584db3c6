"""The networks of the paper, built by name: `build_model("lenet300-100")`.

All forwards return logits. The networks are those of the official code (e19ff16,
`sparselearning/models.py`), which takes the CIFAR-10 ones from the SNIP paper (Lee et al. 2019).
Every weight a method may mask is a parameter with more than one dimension; biases and batch-norm
are not (paper, section 3).

Three families are parametric: `mlp-<width>x<hidden layers>` on MNIST (`mlp-100x3`), the same
with batch norm (`mlpbn-100x3`), and `wrn-<depth>-<width>` on CIFAR-10, depth 6n + 4
(`wrn-22-4`).

Shapes are written [samples, channels, height, width] or [samples, features].
"""

from __future__ import annotations

import bisect
import copy
import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

IMAGENET_SHAPE = (3, 224, 224)
SCALE_STEPS = 10_000  # width multipliers are searched in steps of 1 / SCALE_STEPS


def scaled(width: int, scale: float) -> int:
    """A hidden width times the multiplier, rounded half up, at least 1."""
    return max(1, int(width * scale + 0.5))


# ------------------------------------------------------------------------------------- MNIST


class MLP(nn.Sequential):
    """Linear layers fc1, fc2, ... with ReLU between: [N, 1, 28, 28] or [N, 784] -> [N, classes].

    With `norm`, batch norm comes before each ReLU, with `norm_logits` after the last layer too.
    """

    def __init__(
        self,
        hidden: Sequence[int],
        norm: bool = False,
        norm_logits: bool = False,
        bias: bool = True,
        *,
        scale: float,
        num_classes: int,
        dropout: float,
    ) -> None:
        super().__init__()
        widths = [28 * 28, *(scaled(width, scale) for width in hidden), num_classes]
        last = len(widths) - 1
        for i in range(1, len(widths)):
            self.add_module(f"fc{i}", nn.Linear(widths[i - 1], widths[i], bias))
            if norm_logits if i == last else norm:
                self.add_module(f"bn{i}", nn.BatchNorm1d(widths[i]))
            if i < last:
                self.add_module(f"relu{i}", nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, classes] of images or rows of pixels."""
        return super().forward(x.flatten(1))  # [N, 784] -> [N, classes]


class LeNet5(nn.Module):
    """Caffe's LeNet-5, convolutions unpadded: [N, 1, 28, 28] -> [N, classes]."""

    def __init__(self, *, scale: float, num_classes: int, dropout: float) -> None:
        super().__init__()
        first, second, hidden = (scaled(width, scale) for width in (20, 50, 500))
        self.conv1 = nn.Conv2d(1, first, 5)
        self.pool1 = nn.MaxPool2d(2)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(first, second, 5)
        self.pool2 = nn.MaxPool2d(2)
        self.relu2 = nn.ReLU(inplace=True)
        self.fc3 = nn.Linear(second * 4 * 4, hidden)
        self.relu3 = nn.ReLU(inplace=True)
        self.fc4 = nn.Linear(hidden, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, classes]."""
        # Max-pooling and ReLU commute; pooling first leaves a quarter of the ReLU's work.
        x = self.relu1(self.pool1(self.conv1(x)))  # [N, 20, 24, 24] -> [N, 20, 12, 12]
        x = self.relu2(self.pool2(self.conv2(x)))  # [N, 50, 8, 8] -> [N, 50, 4, 4]
        x = self.relu3(self.fc3(x.flatten(1)))  # [N, 800] -> [N, 500]
        return self.fc4(x)  # [N, classes]


# ----------------------------------------------------------------------- AlexNet and VGG, CIFAR-10


class ConvClassifier(nn.Module):
    """`features` then `classifier`: [N, 3, 32, 32] -> [N, classes]."""

    def __init__(self, features: nn.Sequential, classifier: nn.Sequential) -> None:
        super().__init__()
        self.features = features
        self.classifier = classifier

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, classes]."""
        x = self.features(x)  # AlexNet [N, 256, 1, 1], VGG [N, 512, 1, 1], VGG16-C [N, 512, 2, 2]
        return self.classifier(x.flatten(1))  # [N, 256], [N, 512], [N, 2048] -> [N, classes]


def _conv_bn_relu(inputs: int, outputs: int, kernel: int, stride: int, pad: int) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=pad)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]


def build_alexnet(hidden: int, *, scale: float, num_classes: int, dropout: float) -> ConvClassifier:
    """AlexNet of the SNIP paper: no pooling, every convolution has stride 2; classifier
    Linear-BN-ReLU with `hidden` units twice (1024 in variant s, 2048 in b).
    """
    # (channels, kernel, padding): sides 32 -> 13 -> 7 -> 4 -> 2 -> 1
    plan = [(96, 11, 2), (256, 5, 2), (384, 3, 1), (384, 3, 1), (256, 3, 1)]
    features: list[nn.Module] = []
    classifier: list[nn.Module] = []
    inputs = 3
    for channels, kernel, padding in plan:
        outputs = scaled(channels, scale)
        features += _conv_bn_relu(inputs, outputs, kernel, 2, padding)
        inputs = outputs
    width = scaled(hidden, scale)
    for _ in range(2):
        classifier += [nn.Linear(inputs, width), nn.BatchNorm1d(width), nn.ReLU(inplace=True)]
        inputs = width
    classifier.append(nn.Linear(inputs, num_classes))
    return ConvClassifier(nn.Sequential(*features), nn.Sequential(*classifier))


VGG_CHANNELS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


def build_vgg16(variant: str, *, scale: float, num_classes: int, dropout: float) -> ConvClassifier:
    """VGG16 of the SNIP paper with batch norm; `variant` is "c", "d" or "like".

    C has a 1x1 kernel in the last convolution of stages 3 to 5, with the padding of 1 kept: sides
    32 -> 16 -> 8 -> (10) 5 -> (7) 3 -> (5) 2, so its classifier takes 512 x 2 x 2 features.  The
    classifier is Linear-ReLU-BN, in that order, twice (once in "like"), and a last Linear.
    """
    layers: list[nn.Module] = []
    inputs = 3
    for stage in VGG_CHANNELS:
        for position, channels in enumerate(stage):
            outputs = scaled(channels, scale)
            kernel = 1 if variant == "c" and position == 2 else 3
            layers += _conv_bn_relu(inputs, outputs, kernel, 1, 1)
            inputs = outputs
        layers.append(nn.MaxPool2d(2))
    if variant == "c":
        inputs *= 2 * 2
    width = scaled(512, scale)
    classifier: list[nn.Module] = []
    for _ in range(1 if variant == "like" else 2):
        classifier += [nn.Linear(inputs, width), nn.ReLU(inplace=True), nn.BatchNorm1d(width)]
        inputs = width
    classifier.append(nn.Linear(inputs, num_classes))
    return ConvClassifier(nn.Sequential(*layers), nn.Sequential(*classifier))


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
        self.dropout = nn.Dropout(dropout) if dropout > 0 else None
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
        if self.dropout is not None:
            out = self.dropout(out)
        return x + self.conv2(out)  # [N, C', H/stride, W/stride]


class WideResNet(nn.Module):
    """Pre-activation wide residual network WRN-depth-k: [N, 3, 32, 32] -> [N, classes].

    Dropout stands before the second convolution of each block: 0.3 in the official code, for all
    its WRNs; the DSR baselines on WRN-28-2 used none.
    """

    block1: nn.Sequential
    block2: nn.Sequential
    block3: nn.Sequential

    def __init__(
        self, depth: int, width: int, *, scale: float, num_classes: int, dropout: float
    ) -> None:
        super().__init__()
        stem, *stages = (scaled(c, scale) for c in (16, 16 * width, 32 * width, 64 * width))
        self.conv1 = nn.Conv2d(3, stem, 3, padding=1, bias=False)
        inputs = stem
        for i, outputs in enumerate(stages, 1):
            first = PreActBlock(inputs, outputs, 1 if i == 1 else 2, dropout)
            rest = (PreActBlock(outputs, outputs, 1, dropout) for _ in range((depth - 4) // 6 - 1))
            setattr(self, f"block{i}", nn.Sequential(first, *rest))
            inputs = outputs
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, classes]."""
        x = self.conv1(x)  # [N, 16, 32, 32]
        x = self.block1(x)  # [N, 16k, 32, 32]
        x = self.block2(x)  # [N, 32k, 16, 16]
        x = self.block3(x)  # [N, 64k, 8, 8]
        x = self.relu(self.bn1(x)).mean(dim=(2, 3))  # [N, 64k]
        return self.fc(x)  # [N, classes]


# ------------------------------------------------------------------------------ ResNet-50, ImageNet


def build_resnet50(*, scale: float, num_classes: int, dropout: float) -> nn.Module:
    """The ResNet-50 of torchvision (the stride in the 3x3): [N, 3, 224, 224] -> [N, classes].

    Raises ValueError for a scale other than 1: it has no width multiplier.
    """
    if scale != 1:
        raise ValueError(f"model 'resnet50' has no width multiplier, got width_scale={scale}")
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
    ValueError for an unknown scheme and TypeError for a module with parameters it has no rule for.
    """
    if scheme not in ("default", "wrn", "resnet", "he"):
        raise ValueError(f"unknown initialisation {scheme!r}; use default, wrn, resnet or he")
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

    `build(scale=, num_classes=, dropout=)` returns the module.
    """

    name: str
    dataset: str  # "mnist", "cifar10" or "imagenet"
    input_shape: tuple[int, int, int]  # channels, height, width
    num_classes: int
    build: Callable[..., nn.Module]
    init: str = "default"  # a scheme of `init_weights`
    dropout: float | None = None  # the default rate; None: the network has no place for it


def _mnist(name: str, build: Callable[..., nn.Module], *more: Any) -> ModelSpec:
    return ModelSpec(name, "mnist", (1, 28, 28), 10, build, *more)


def _cifar(name: str, build: Callable[..., nn.Module], *more: Any) -> ModelSpec:
    return ModelSpec(name, "cifar10", (3, 32, 32), 10, build, *more)


def _wrn(depth: int, width: int) -> ModelSpec:
    # The official code constructs every WRN with this rate of dropout, not only WRN-22-8.
    return _cifar(f"wrn-{depth}-{width}", partial(WideResNet, depth, width), "wrn", 0.3)


MODELS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        _mnist("lenet300-100", partial(MLP, (300, 100))),
        _mnist("lenet5", LeNet5),
        # The MNIST network of DSR's authors (`mnist_mlp` of IntelAI/dynamic-reparameterization), on
        # which the published curves of DSR, SET, DeepR and the static mask were probably measured:
        # no biases, and the logits are normalised too.
        _mnist("lenet300-100-bn", partial(MLP, (300, 100), True, True, False)),
        _cifar("alexnet-s", partial(build_alexnet, 1024)),
        _cifar("alexnet-b", partial(build_alexnet, 2048)),
        _cifar("vgg16-c", partial(build_vgg16, "c")),
        _cifar("vgg16-d", partial(build_vgg16, "d")),
        _cifar("vgg16-like", partial(build_vgg16, "like")),
        *(_wrn(depth, width) for depth, width in ((28, 2), (16, 8), (16, 10), (22, 8))),
        ModelSpec("resnet50", "imagenet", IMAGENET_SHAPE, 1000, build_resnet50, "resnet"),
    )
}


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
        build = partial(MLP, (width,) * layers, found[1] is not None)
        return _mnist(name, build, "default" if found[1] else "he")
    if found := re.fullmatch(r"wrn-(\d+)-(\d+)", name):
        depth, width = int(found[1]), int(found[2])
        if depth < 10 or (depth - 4) % 6 or width < 1:
            raise ValueError(f"model {name!r}: depth must be 6n + 4, at least 10, width at least 1")
        return _wrn(depth, width)
    close = difflib.get_close_matches(name.lower(), MODELS, n=3, cutoff=0.6)
    hint = f"; did you mean {' or '.join(close)}?" if close else "."
    families = "mlp-<width>x<hidden layers>, mlpbn-<width>x<hidden layers>, wrn-<depth>-<width>"
    raise ValueError(f"unknown model {name!r}{hint} Known: {', '.join(MODELS)}, {families}")


def _skeleton(
    spec: ModelSpec, width_scale: float, num_classes: int | None, dropout: float | None
) -> nn.Module:
    """The network on the meta device: shapes only, no memory, no random numbers drawn."""
    classes = spec.num_classes if num_classes is None else num_classes
    rate = (spec.dropout or 0.0) if dropout is None else dropout
    for good, rule in (
        (0 < width_scale <= 1, f"width_scale must be in (0, 1], got {width_scale}"),
        (classes >= 1, f"num_classes must be at least 1, got {classes}"),
        (0 <= rate < 1, f"dropout must be in [0, 1), got {rate}"),
        (not rate or spec.dropout is not None, f"it has no dropout, got dropout={rate}"),
    ):
        if not good:
            raise ValueError(f"model {spec.name!r}: {rule}")
    with torch.device("meta"):
        return spec.build(scale=width_scale, num_classes=classes, dropout=rate)


def build_model(
    name: str,
    *,
    num_classes: int | None = None,
    dropout: float | None = None,
    width_scale: float = 1.0,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Build and initialise a network on the CPU, in training mode.

    `name` is a key of MODELS or a member of the families above.  `num_classes` and `dropout`
    default to the paper's; only WRNs have dropout.  `width_scale` multiplies every hidden width
    (`small_dense_scale`).  A CPU `generator` makes the weights independent of the global random
    stream, which is then left untouched.  Raises ValueError for an unknown name, with the close
    matches, and for values out of range.
    """
    if generator is not None and generator.device.type != "cpu":
        raise ValueError(f"build_model draws on the CPU, got a generator on {generator.device}")
    spec = model_spec(name)
    model = _skeleton(spec, width_scale, num_classes, dropout).to_empty(device="cpu")
    init_weights(model, spec.init, generator)
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
    by several per cent.  Raises ValueError for a density outside (0, 1], and for one below the
    count that a network with one unit in every layer already has.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density}")
    spec = model_spec(name)

    def count(step: int) -> int:
        skeleton = _skeleton(spec, step / SCALE_STEPS, None, None)
        return sum(maskable_weights(skeleton).values())

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
    not.  Raises RuntimeError when the counter met FLOPs outside convolution and linear layers.
    """
    shadow = copy.deepcopy(model).to("meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        shadow(torch.empty(1, *input_shape, device="meta"))
    by_module = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    root = type(shadow).__name__
    flops = {
        f"{name}.weight": by_module.get(f"{root}.{name}", 0)
        for name, module in shadow.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }
    counted, total = sum(flops.values()), counter.get_total_flops()
    if counted != total or flops.keys() != maskable_weights(shadow).keys():
        raise RuntimeError(
            f"{root}: convolution and linear layers have {counted} of the {total} FLOPs counted"
        )
    return flops


def forward_flops(name: str) -> dict[str, int]:
    """`layer_flops` of a network by name, at its data set's input shape."""
    spec = model_spec(name)
    return layer_flops(_skeleton(spec, 1.0, None, None), spec.input_shape)
