"""Networks by name: `create` builds one and notes on it everything needed to build it again."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from companion.errors import CompanionError
from companion.models import cnn, layers, resnet, segmentation, text, yolov5


@dataclass(frozen=True)
class ModelInfo:
    """What a weights file says besides the weights: enough to rebuild the network and to use it."""

    name: str
    """The name that `create` knows."""
    configuration: dict[str, Any] = field(default_factory=dict)
    """Every argument of the network, defaults included, so that a file outlives a change of a default."""
    task: str = "classify"
    """``classify``, ``text``, ``segment`` or ``detect``: which samples, loss and score belong to it."""
    labels: tuple[str, ...] | None = None
    """Class names in the order of the outputs."""
    vocabulary: tuple[str, ...] | None = None
    """For text: the words, in the order of their ids."""


@dataclass(frozen=True)
class _Network:
    """One row of the table below."""

    build: Callable[..., nn.Module]
    settings: dict[str, Any]
    """What `create` may change, with defaults."""
    task: str = "classify"
    image_size: int | None = 32
    """Side of the square images it is made for, in pixels; None for texts."""


_CIFAR = {"classes": 10, "mean": layers.CIFAR10_MEAN, "std": layers.CIFAR10_STD}
_IMAGENET = {"classes": 1000, "mean": layers.IMAGENET_MEAN, "std": layers.IMAGENET_STD}
_BASIC, _BOTTLENECK = (partial(resnet.ResNet, block) for block in (resnet.BasicBlock, resnet.Bottleneck))
_CIFAR_STEM, _IMAGENET_STEM = resnet.cifar_stem, resnet.imagenet_stem


def _yolov5(
    depth: float, width: float, anchors: yolov5.Anchors = yolov5.ANCHORS, classes: int = 80, image_size: int = 640
) -> _Network:
    settings = {"classes": classes, "depth_multiple": depth, "width_multiple": width, "anchors": anchors}
    return _Network(yolov5.YOLOv5, settings, task="detect", image_size=image_size)


_NETWORKS = {
    # As printed: the network that 2.3.2 and 2.3.3 serve, and the one that 2.2.3 trains with Horovod.
    "simple_cnn": _Network(cnn.SimpleCNN, {"channels": (16, 32), "hidden": 128, "image_size": 32, **_CIFAR}),
    "simple_cnn_3conv": _Network(cnn.SimpleCNN, {"channels": (32, 64, 128), "hidden": 256, "image_size": 32, **_CIFAR}),
    # He et al. (2016), section 4.2: three stages of n basic blocks, 6n + 2 layers.
    "cifar_resnet14": _Network(partial(_BASIC, (2, 2, 2), _CIFAR_STEM), {"width": 16, **_CIFAR}),
    "cifar_resnet20": _Network(partial(_BASIC, (3, 3, 3), _CIFAR_STEM), {"width": 16, **_CIFAR}),
    "cifar_resnet56": _Network(partial(_BASIC, (9, 9, 9), _CIFAR_STEM), {"width": 16, **_CIFAR}),
    # The same paper's networks for ImageNet, with a stem for 32×32 images (2.2.2 trains the second) and as they are.
    "cifar_resnet18": _Network(partial(_BASIC, (2, 2, 2, 2), _CIFAR_STEM), {"width": 64, **_CIFAR}),
    "cifar_resnet50": _Network(partial(_BOTTLENECK, (3, 4, 6, 3), _CIFAR_STEM), {"width": 64, **_CIFAR}),
    "resnet18": _Network(partial(_BASIC, (2, 2, 2, 2), _IMAGENET_STEM), {"width": 64, **_IMAGENET}, image_size=224),
    "resnet50": _Network(
        partial(_BOTTLENECK, (3, 4, 6, 3), _IMAGENET_STEM), {"width": 64, **_IMAGENET}, image_size=224
    ),
    # One class for each digit and one for what is around them, as in digit_scenes.
    "unet": _Network(
        segmentation.UNet, {"width": 8, "depth": 3, **_CIFAR, "classes": 11}, task="segment", image_size=64
    ),
    # Howard et al. (2019) and Long et al. (2015), as torchvision builds them; it publishes their cost for 520×520.
    "lraspp_mobilenet_v3_large": _Network(
        partial(segmentation.TorchvisionNetwork, "lraspp_mobilenet_v3_large"),
        {**_IMAGENET, "classes": 11},
        task="segment",
        image_size=520,
    ),
    "fcn_resnet50": _Network(
        partial(segmentation.TorchvisionNetwork, "fcn_resnet50"),
        {**_IMAGENET, "classes": 11},
        task="segment",
        image_size=520,
    ),
    # 2.4.2 prints a table of 10,000 words and four classes.
    "text_classifier": _Network(
        text.TextClassifier,
        {"vocabulary_size": 10_000, "embedding": 64, "hidden": 64, "classes": 4, "word_dropout": 0.5},
        task="text",
        image_size=None,
    ),
    # As published, for COCO; and one for digit_scenes at 160×160, of half yolov5n's width.
    **{f"yolov5{variant}": _yolov5(depth, width) for variant, (depth, width) in yolov5.VARIANTS.items()},
    "yolov5_tiny": _yolov5(0.33, 0.125, yolov5.DIGIT_ANCHORS, classes=10, image_size=160),
}


@dataclass(frozen=True)
class _Allowed:
    wanted: str
    test: Callable[[Any], bool]


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _sequence(value: Any, of: Callable[[Any], bool]) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0 and all(map(of, value))


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < 1e30


def _anchors(value: Any) -> bool:
    """As many for each of three scales."""
    return (
        _sequence(value, lambda scale: _sequence(scale, lambda pair: _sequence(pair, _side) and len(pair) == 2))
        and len(value) == len(yolov5.STRIDES)
        and len({len(scale) for scale in value}) == 1
    )


def _side(value: Any) -> bool:
    return _finite(value) and 1 <= value <= 10_000


_ALLOWED = {
    **dict.fromkeys(
        ("classes", "embedding", "hidden", "image_size", "width"), _Allowed("a whole number from 1", _count)
    ),
    # Padding and unknown words take two rows.
    "vocabulary_size": _Allowed("a whole number from 2", lambda value: _count(value) and value >= 2),
    "word_dropout": _Allowed("a share from 0 to below 1", lambda value: _finite(value) and 0 <= value < 1),
    # Each level has twice the channels of the one above.
    "depth": _Allowed("a whole number from 1 to 6", lambda value: _count(value) and value <= 6),
    **dict.fromkeys(
        ("depth_multiple", "width_multiple"),
        _Allowed("a number above 0, at most 4", lambda value: _finite(value) and 0 < value <= 4),
    ),
    "anchors": _Allowed("for each of three scales as many pairs of sides from 1 pixel", _anchors),
    "channels": _Allowed("whole numbers from 1", lambda value: _sequence(value, _count)),
    "mean": _Allowed("three numbers", lambda value: _sequence(value, _finite) and len(value) == 3),
    "std": _Allowed(
        "three numbers above 0",
        lambda value: _sequence(value, lambda x: _finite(x) and x > 0) and len(value) == 3,
    ),
}


def names() -> list[str]:
    """The names that `create` knows."""
    return list(_NETWORKS)


def image_size(name: str) -> int | None:
    """Side of the square images that the network called ``name`` is made for, in pixels; None if it takes texts.

    Raises:
        CompanionError: no such network.
    """
    return _network(name).image_size


def blank(info: ModelInfo) -> Tensor:
    """Input of the form that such a network takes, all zeros, on torch's default device: an image float32
    [1, 3, S, S], S the size it is made for, or the word ids of one text, int64 [1, 16]."""
    if (side := info.configuration.get("image_size", image_size(info.name))) is not None:
        return torch.zeros(1, 3, side, side)
    return torch.zeros(1, 16, dtype=torch.int64)


def task(name: str) -> str:
    """What the network called ``name`` is for: ``classify``, ``text``, ``segment`` or ``detect``.

    Raises:
        CompanionError: no such network.
    """
    return _network(name).task


def _network(name: str) -> _Network:
    if name not in _NETWORKS:
        raise CompanionError(f"there is no network {name!r}: choose one of {', '.join(_NETWORKS)}.")
    return _NETWORKS[name]


def create(
    name: str,
    *,
    labels: Sequence[str] | None = None,
    vocabulary: Sequence[str] | None = None,
    seed: int | None = None,
    **configuration: Any,
) -> nn.Module:
    """Build a network with fresh weights.

    Args:
        name: one of `names`.
        labels: class names in the order of the outputs; kept with the network and in its file.
        vocabulary: of ``text_classifier``, the words in the order of their ids (`companion.datasets.build_vocabulary`),
            likewise kept; its length is the ``vocabulary_size``.
        seed: draw the weights from this seed and leave torch's global generator alone; None draws from that.
        configuration: the network's own settings. All take ``classes`` (10; of ``resnet18`` and ``resnet50`` 1000, of
            the networks that segment 11, of YOLOv5 80, of ``yolov5_tiny`` 10), and all but YOLOv5 ``mean`` and ``std``
            (three numbers each, of CIFAR-10 or ImageNet). ``text_classifier`` takes neither of these two, has 4 classes
            and takes ``vocabulary_size`` (10,000), ``embedding`` and ``hidden`` (64 each) and ``word_dropout`` (0.5),
            the share of the words left out in training. YOLOv5 takes ``depth_multiple`` and ``width_multiple``
            (shares of the large one's) and ``anchors`` (pixels, for each of three scales pairs of width and height).
            The residual networks take ``width``, the channels of their first stage (16 for 14, 20 and 56 layers, else
            64), ``unet`` takes ``width`` (8) and ``depth`` (3). The two CNNs take ``channels`` ((16, 32) and
            (32, 64, 128)), ``hidden`` (128 and 256) and ``image_size`` (32).

    Returns:
        The network, in training mode. `describe` tells what it is. Every image network takes float images [N,
        3, H, W] in 0..1 and returns scores (logits): [N, classes], or to segment [N, classes, H, W];
        normalisation is inside. ``text_classifier`` takes word ids int64 [N, L], padded with 0. YOLOv5 detects:
        see `companion.models.yolov5.YOLOv5` for what it returns.

    Raises:
        CompanionError: no such network, an argument that it does not take, or a vocabulary that does not fit.
    """
    network = _network(name)
    if vocabulary is not None:
        vocabulary = texts("the vocabulary", vocabulary)
        if "vocabulary_size" not in network.settings:
            raise CompanionError(f"{name} takes images: leave out the vocabulary.")
        configuration.setdefault("vocabulary_size", len(vocabulary))
    for key in configuration:
        if key not in network.settings:
            raise CompanionError(f"{name} has no setting {key!r}: it takes {', '.join(network.settings)}.")
    # NumPy's and torch's numbers become Python's, which JSON knows.
    configuration = {k: v.tolist() if hasattr(v, "tolist") else v for k, v in configuration.items()}
    for key, value in configuration.items():
        allowed = _ALLOWED[key]
        if not allowed.test(value):
            raise CompanionError(f"{name} takes {allowed.wanted} as {key}, not {value!r}.")
    # JSON, in which the configuration travels, has lists only: make both forms one.
    full = {k: tuples(v) for k, v in (network.settings | configuration).items()}
    try:
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            model = network.build(**full)
    except (TypeError, ValueError, RuntimeError, OverflowError, MemoryError) as error:
        reason = str(error).partition("\n")[0] or "too large"
        raise CompanionError(f"{name} cannot be built from {configuration}: {reason}.") from error
    labels = tuple(labels) if labels is not None else None
    return attach(model, ModelInfo(name, full, network.task, labels, vocabulary))


def texts(what: str, values: Any) -> tuple[str, ...]:
    if isinstance(values, str) or not isinstance(values, Sequence) or not all(isinstance(v, str) for v in values):
        raise CompanionError(f"{what} must be a list of texts.")
    return tuple(values)


def tuples(value: Any) -> Any:
    """A setting that has travelled as JSON, with tuples again for its lists."""
    return tuple(map(tuples, value)) if isinstance(value, list | tuple) else value


def attach(model: nn.Module, info: ModelInfo) -> nn.Module:
    """Note on ``model`` what it is.

    Raises:
        CompanionError: the number of labels is not the number of the network's classes, or the vocabulary is not one of
            different words, as many as the network has rows for.
    """
    classes = info.configuration.get("classes")
    if info.labels is not None and classes is not None and len(info.labels) != classes:
        raise CompanionError(f"{info.name} has {classes} classes, but {len(info.labels)} labels were given.")
    if info.vocabulary is not None and (rows := info.configuration.get("vocabulary_size")) is not None:
        texts("the vocabulary", info.vocabulary)
        if len(info.vocabulary) != rows:
            raise CompanionError(
                f"{info.name} has rows for {rows:,} words, but the vocabulary has {len(info.vocabulary):,}."
            )
        if len(set(info.vocabulary)) != rows:
            raise CompanionError("the vocabulary has a word twice: each must have one id.")
    model.__dict__["companion_info"] = info  # plain data: not a module, a parameter or a buffer
    return model


def describe(model: nn.Module) -> ModelInfo:
    """What ``model`` is: its name, configuration, task, labels and vocabulary.

    Raises:
        CompanionError: the network does not come from `create` or `load`.
    """
    info = model.__dict__.get("companion_info")
    if info is None:
        raise CompanionError(
            f"this {type(model).__name__} was not made by models.create, so it cannot be described or saved by name."
        )
    return info
