"""Residual networks (He et al., 2016) for 32×32 images and for ImageNet's.

Parameters are named as torchvision names them, so that its weights load into ours. Unlike torchvision's,
nothing works in place and every activation is a module of its own: shared in-place ReLUs break hooks,
quantisers and pruning. The printed listing of 2.2.2 puts ImageNet's stem (7×7, stride 2, then pooling) on
32×32 images, which leaves the last stage a single pixel; the ``cifar_`` networks start with a 3×3 instead.
"""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from companion.models.layers import CIFAR10_MEAN, CIFAR10_STD, IMAGENET_MEAN, IMAGENET_STD, Normalize


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module | None:
    """A 1×1 projection where the block changes shape (option B of He et al.), else nothing to do."""
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut: [N, inputs, H, W] → [N, width, H/stride, W/stride]."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(inputs, width, stride)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu2(out + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """1×1 down, 3×3 (with the stride), 1×1 up: [N, inputs, H, W] → [N, 4·width, H/stride, W/stride]."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = _shortcut(inputs, outputs, stride)
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.relu2(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu3(out + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """Stem, stages of residual blocks, average, linear; each stage after the first doubles the width, halves the size.

    Takes float images [N, 3, H, W] in 0..1 of any size, returns logits [N, classes].
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: Sequence[int],
        width: int,
        stem: Callable[[int], dict[str, nn.Module]],
        classes: int,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        self.normalize = Normalize(mean, std)
        for name, layer in stem(width).items():
            self.add_module(name, layer)
        inputs = width
        for stage, depth in enumerate(depths):
            blocks = []
            for i in range(depth):
                blocks.append(block(inputs, width * 2**stage, stride=2 if stage > 0 and i == 0 else 1))
                inputs = width * 2**stage * block.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(inputs, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():  # they were added in the order in which they run
            x = layer(x)
        return x


def _cifar_stem(width: int) -> dict[str, nn.Module]:
    return {
        "conv1": nn.Conv2d(3, width, 3, padding=1, bias=False),
        "bn1": nn.BatchNorm2d(width),
        "relu": nn.ReLU(),
    }


def _imagenet_stem(width: int) -> dict[str, nn.Module]:
    return {
        "conv1": nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False),
        "bn1": nn.BatchNorm2d(width),
        "relu": nn.ReLU(),
        "maxpool": nn.MaxPool2d(3, stride=2, padding=1),
    }


def cifar_resnet14(
    *,
    width: int = 16,
    classes: int = 10,
    mean: Sequence[float] = CIFAR10_MEAN,
    std: Sequence[float] = CIFAR10_STD,
) -> ResNet:
    """Three stages of 2 basic blocks, 175 thousand parameters at width 16 (He et al., section 4.2, with n = 2)."""
    return ResNet(BasicBlock, (2, 2, 2), width, _cifar_stem, classes, mean, std)


def cifar_resnet20(
    *,
    width: int = 16,
    classes: int = 10,
    mean: Sequence[float] = CIFAR10_MEAN,
    std: Sequence[float] = CIFAR10_STD,
) -> ResNet:
    """Three stages of 3 basic blocks, 0.27 million parameters at width 16 (He et al., section 4.2, with n = 3)."""
    return ResNet(BasicBlock, (3, 3, 3), width, _cifar_stem, classes, mean, std)


def cifar_resnet56(
    *,
    width: int = 16,
    classes: int = 10,
    mean: Sequence[float] = CIFAR10_MEAN,
    std: Sequence[float] = CIFAR10_STD,
) -> ResNet:
    """Three stages of 9 basic blocks, 0.86 million parameters at width 16 (He et al., section 4.2, with n = 9)."""
    return ResNet(BasicBlock, (9, 9, 9), width, _cifar_stem, classes, mean, std)


def cifar_resnet18(
    *,
    width: int = 64,
    classes: int = 10,
    mean: Sequence[float] = CIFAR10_MEAN,
    std: Sequence[float] = CIFAR10_STD,
) -> ResNet:
    """ResNet-18 with a stem for 32×32 images: 11.2 million parameters at width 64."""
    return ResNet(BasicBlock, (2, 2, 2, 2), width, _cifar_stem, classes, mean, std)


def cifar_resnet50(
    *,
    width: int = 64,
    classes: int = 10,
    mean: Sequence[float] = CIFAR10_MEAN,
    std: Sequence[float] = CIFAR10_STD,
) -> ResNet:
    """ResNet-50 with a stem for 32×32 images: 23.5 million parameters at width 64. The network of 2.2.2."""
    return ResNet(Bottleneck, (3, 4, 6, 3), width, _cifar_stem, classes, mean, std)


def resnet18(
    *,
    width: int = 64,
    classes: int = 1000,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> ResNet:
    """torchvision's ResNet-18 for 224×224 images, without its weights."""
    return ResNet(BasicBlock, (2, 2, 2, 2), width, _imagenet_stem, classes, mean, std)


def resnet50(
    *,
    width: int = 64,
    classes: int = 1000,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> ResNet:
    """torchvision's ResNet-50 for 224×224 images, without its weights."""
    return ResNet(Bottleneck, (3, 4, 6, 3), width, _imagenet_stem, classes, mean, std)
