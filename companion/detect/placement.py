"""A picture of any shape on a canvas of the network's, with its proportions kept, and the way back."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor
from torch.nn.functional import interpolate, pad

GRAY = 114 / 255  # what YOLOv5 was trained with around its pictures
TIE = 1e-3  # a half of 255 grays that float32 has a little below


@dataclass(frozen=True)
class Placement:
    """Where on the canvas a picture lies."""

    width: int
    """Of the picture, in pixels."""
    height: int
    left: int
    """Columns of the canvas before the picture."""
    top: int
    across: float
    """Columns of the canvas for one of the picture."""
    down: float

    def to_image(self, boxes: np.ndarray) -> np.ndarray:
        """Boxes [K, 4] (x1, y1, x2, y2) of the canvas in pixels of the picture, float32, cut at its edges."""
        found = (boxes - (self.left, self.top) * 2) / ((self.across, self.down) * 2)
        return found.clip(0, (self.width, self.height) * 2).astype(np.float32)


def letterbox(image: Tensor, size: tuple[int, int]) -> tuple[Tensor, Placement]:
    """Fit ``image`` into the middle of a gray canvas.

    Interpolated as the pictures were that YOLOv5 learned from: between the nearest pixels, also where the picture
    shrinks, and rounded to 8 bits (halves up, as OpenCV does it).

    Args:
        image: float32 [3, H, W] in 0..1.
        size: height and width of the canvas.

    Returns:
        The canvas, float32 [3, height, width], and where the picture lies on it.
    """
    height, width = image.shape[-2:]
    scale = min(size[0] / height, size[1] / width)
    inner = max(1, round(height * scale)), max(1, round(width * scale))
    if inner != (height, width):
        image = interpolate(image[None], inner, mode="bilinear", align_corners=False)[0]
        image = image.mul(255).add(0.5 + TIE).floor().div(255)
    top, left = (size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2
    around = (left, size[1] - inner[1] - left, top, size[0] - inner[0] - top)
    placement = Placement(width, height, left, top, inner[1] / width, inner[0] / height)
    return pad(image, around, value=GRAY), placement
