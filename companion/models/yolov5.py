"""YOLOv5 (version 6 of 2021): a backbone, features of three scales joined down and up, and a box for each anchor.

Written from its published shape. Modules are named as in the official one, so that its weights load into ours; the
numbers in the names are its layers. ``x²`` is written as a product, because LiteRT's converter refuses powers.
"""

import os
from collections.abc import Sequence
from math import ceil, log

import torch
from torch import Tensor, nn

from companion.errors import CompanionError
from companion.models.checkpoint import read_weights

STRIDES = (8, 16, 32)
"""Pixels of the picture for a cell, on each scale."""
Anchors = Sequence[Sequence[Sequence[float]]]
ANCHORS: Anchors = (
    ((10, 13), (16, 30), (33, 23)),
    ((30, 61), (62, 45), (59, 119)),
    ((116, 90), (156, 198), (373, 326)),
)
"""Width and height of the boxes that each scale begins from, in pixels, found on COCO."""
DIGIT_ANCHORS: Anchors = (
    ((13, 22), (17, 28), (21, 34)),
    ((24, 40), (28, 46), (28, 51)),
    ((33, 52), (33, 59), (40, 60)),
)
"""The same of digit_scenes at 160×160: nine clusters (k-means) of the training boxes' sides, by area.

Twelve epochs on 1,000 scenes end at a mAP@0.5 of 0.87 with them, and 0.80 with COCO's (`yolov5_tiny`, seed 0)."""
VARIANTS = {"n": (0.33, 0.25), "s": (0.33, 0.5), "m": (0.67, 0.75), "l": (1.0, 1.0), "x": (1.33, 1.25)}
"""Depth and width of the published networks, as shares of the large one's."""

MOST_CLASSES = 10_000  # that a file may ask memory for


class Conv(nn.Module):
    """Convolution, normalisation, SiLU: [N, inputs, H, W] → [N, outputs, H/stride, W/stride]."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, padding: int | None = None) -> None:
        super().__init__()
        padding = kernel // 2 if padding is None else padding
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.03)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class Bottleneck(nn.Module):
    """1×1, then 3×3, of one width, with a shortcut around them or without."""

    def __init__(self, width: int, shortcut: bool) -> None:
        super().__init__()
        self.cv1 = Conv(width, width)
        self.cv2 = Conv(width, width, 3)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        out = self.cv2(self.cv1(x))
        return x + out if self.shortcut else out


class C3(nn.Module):
    """Half the channels through bottlenecks, half around them (Wang et al., CSPNet, 2020)."""

    def __init__(self, inputs: int, outputs: int, depth: int, shortcut: bool = True) -> None:
        super().__init__()
        half = outputs // 2
        self.cv1 = Conv(inputs, half)
        self.cv2 = Conv(inputs, half)
        self.cv3 = Conv(2 * half, outputs)
        self.m = nn.Sequential(*(Bottleneck(half, shortcut) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))


class SPPF(nn.Module):
    """What lies 5, 9 and 13 cells around, by the same pooling three times in a row."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        half = inputs // 2
        self.cv1 = Conv(inputs, half)
        self.cv2 = Conv(4 * half, outputs)
        self.m = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        found = [self.cv1(x)]
        for _ in range(3):
            found.append(self.m(found[-1]))
        return self.cv2(torch.cat(found, 1))


class Concat(nn.Module):
    """Channels of two features beside each other."""

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return torch.cat((x, other), 1)


class Detect(nn.Module):
    """For each cell and anchor of three scales: where, how sure, and of which class."""

    anchors: Tensor

    def __init__(self, classes: int, channels: Sequence[int], anchors: Anchors) -> None:
        super().__init__()
        self.outputs = 5 + classes
        in_pixels = torch.tensor(anchors, dtype=torch.float32)  # [scales, anchors, 2]
        self.register_buffer("anchors", in_pixels / torch.tensor(STRIDES)[:, None, None])  # in cells
        self.m = nn.ModuleList(nn.Conv2d(each, in_pixels.shape[1] * self.outputs, 1) for each in channels)
        # Before it has learned anything it expects few objects, 8 in 640×640 pixels, so that the many boxes with none
        # do not drown the others at the first steps (Lin et al., Focal Loss, 2017, section 3.3).
        with torch.no_grad():
            for conv, stride in zip(self.m, STRIDES, strict=True):
                bias = conv.get_parameter("bias").view(-1, self.outputs)  # [anchors, 5 + classes]
                bias[:, 4] += log(8 / (640 / stride) ** 2)
                bias[:, 5:] += log(0.6 / (classes - 0.99999))

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Of each scale [N, anchors, H, W, 5 + classes], before any sigmoid."""
        found = []
        for conv, x in zip(self.m, features, strict=True):
            n, _, height, width = x.shape
            found.append(conv(x).view(n, -1, self.outputs, height, width).permute(0, 1, 3, 4, 2))
        return found

    def decode(self, found: Sequence[Tensor]) -> Tensor:
        """What `forward` gave as [N, A, 5 + classes]: centre, width and height in pixels, then shares in 0..1."""
        rows = []
        for raw, anchors, stride in zip(found, self.anchors, STRIDES, strict=True):
            n, _, height, width, _ = raw.shape
            y = torch.arange(height, device=raw.device, dtype=raw.dtype).view(1, 1, height, 1)
            x = torch.arange(width, device=raw.device, dtype=raw.dtype).view(1, 1, 1, width)
            cells = torch.stack((x.expand(1, 1, height, width), y.expand(1, 1, height, width)), -1)
            shares = raw.sigmoid()
            centre = (shares[..., :2] * 2 - 0.5 + cells) * stride
            doubled = shares[..., 2:4] * 2
            size = doubled * doubled * (anchors * stride).view(1, -1, 1, 1, 2)
            rows.append(torch.cat((centre, size, shares[..., 4:]), -1).view(n, -1, self.outputs))
        return torch.cat(rows, 1)


class YOLOv5(nn.Module):
    """Takes float images [N, 3, H, W] in 0..1, of sides that 32 divides.

    In training mode it returns what its loss takes: of each scale [N, 3, H/stride, W/stride, 5 + classes]. In
    evaluation mode it returns boxes [N, A, 5 + classes]: centre, width and height in pixels, how sure it is of an
    object, and the share of each class, all in 0..1.

    Args:
        classes: how many kinds of objects.
        depth_multiple, width_multiple: of the large one's bottlenecks and channels, as shares; those of `VARIANTS`.
        anchors: as `ANCHORS`.
    """

    def __init__(
        self,
        classes: int = 80,
        depth_multiple: float = 0.33,
        width_multiple: float = 0.25,
        anchors: Anchors = ANCHORS,
    ) -> None:
        super().__init__()
        a, b, c, d, e = (ceil(each * width_multiple / 8) * 8 for each in (64, 128, 256, 512, 1024))
        n3, n6, n9 = (max(1, round(each * depth_multiple)) for each in (3, 6, 9))
        self.model = nn.ModuleList(
            (
                Conv(3, a, 6, 2, 2), Conv(a, b, 3, 2), C3(b, b, n3), Conv(b, c, 3, 2), C3(c, c, n6),  # 0 to 4
                Conv(c, d, 3, 2), C3(d, d, n9), Conv(d, e, 3, 2), C3(e, e, n3), SPPF(e, e),  # 5 to 9
                Conv(e, d), nn.Upsample(scale_factor=2), Concat(), C3(2 * d, d, n3, False),  # 10 to 13
                Conv(d, c), nn.Upsample(scale_factor=2), Concat(), C3(2 * c, c, n3, False),  # 14 to 17: small objects
                Conv(c, c, 3, 2), Concat(), C3(2 * c, d, n3, False),  # 18 to 20
                Conv(d, d, 3, 2), Concat(), C3(2 * d, e, n3, False),  # 21 to 23
                Detect(classes, (c, d, e), anchors),
            )
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        layers = list(self.model)
        for layer in layers[:5]:
            x = layer(x)
        fine = x  # of 8 pixels a cell
        x = middle = layers[6](layers[5](x))  # 16
        for layer in layers[7:10]:
            x = layer(x)  # 32
        coarse = layers[10](x)
        x = layers[13](layers[12](layers[11](coarse), middle))
        middle = layers[14](x)
        small = layers[17](layers[16](layers[15](middle), fine))
        medium = layers[20](layers[19](layers[18](small), middle))
        large = layers[23](layers[22](layers[21](medium), coarse))
        detect = layers[24]
        assert isinstance(detect, Detect)
        found = detect((small, medium, large))
        return found if self.training else detect.decode(found)


def load_official(path: str | os.PathLike[str]) -> YOLOv5:
    """The network in an official YOLOv5 checkpoint (``yolov5n.pt``), in evaluation mode and float32.

    Nothing of the file is executed. The official weights are under the AGPL-3.0, or a licence of Ultralytics: read it
    before you serve them.

    Raises:
        CompanionError: as `read_weights`, or the weights are not those of a YOLOv5 that we know.
    """
    weights = read_weights(path)
    try:
        channels, head = len(weights["model.0.conv.weight"]), weights["model.24.m.0.bias"]
        variant = next(v for v, (_, width) in VARIANTS.items() if ceil(64 * width / 8) * 8 == channels)
        depth, width = VARIANTS[variant]
        if head.ndim != 1 or not 1 <= len(head) // 3 - 5 <= MOST_CLASSES:
            raise ValueError("no head")
        network = YOLOv5(len(head) // 3 - 5, depth, width)
        network.load_state_dict(weights)
    except (KeyError, StopIteration, RuntimeError, TypeError, ValueError) as error:
        raise CompanionError(f"{path} does not fit any YOLOv5 of version 6: n, s, m, l or x.") from error
    return network.eval()
