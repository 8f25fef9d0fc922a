"""Residual networks (He et al., 2016) for 32×32 images and for ImageNet's.

Parameters are named as torchvision names them, so that its weights load into ours. Unlike torchvision's,
nothing works in place and every activation is a module of its own: shared in-place ReLUs break hooks,
quantisers and pruning. The printed listing of 2.2.2 puts ImageNet's stem (7×7, stride 2, then pooling) on
32×32 images, which leaves the last stage a single pixel; the ``cifar_`` networks start with a 3×3 instead.
"""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from companion.models.layers import Normalize


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
        stem: Callable[[int], dict[str, nn.Module]],
        *,
        width: int,
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


def cifar_stem(width: int) -> dict[str, nn.Module]:
    """What comes first for 32×32 images, by name: the picture keeps its size."""
    return {
        "conv1": nn.Conv2d(3, width, 3, padding=1, bias=False),
        "bn1": nn.BatchNorm2d(width),
        "relu": nn.ReLU(),
    }


def imagenet_stem(width: int) -> dict[str, nn.Module]:
    """What comes first for 224×224 images: the picture shrinks to a quarter of its side."""
    return {
        "conv1": nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False),
        "bn1": nn.BatchNorm2d(width),
        "relu": nn.ReLU(),
        "maxpool": nn.MaxPool2d(3, stride=2, padding=1),
    }
