"""Detections drawn into their picture."""

from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from companion.detect.detector import Detections
from companion.plots import COLOURS

LONGEST = 40  # letters of a name; those in a network's file may have any number

if TYPE_CHECKING:
    import PIL.Image


def draw(image: Tensor | np.ndarray, found: Detections) -> "PIL.Image.Image":
    """A copy of ``image`` with a frame around each object, its name and its score.

    Args:
        image: float32 [3, H, W] in 0..1, or uint8 [H, W, 3]. Red comes first.
        found: what is in it.
    """
    from PIL import Image, ImageDraw, ImageFont

    if isinstance(image, Tensor):
        image = image.mul(255).round().clamp(0, 255).byte().permute(1, 2, 0).contiguous().numpy()
    picture = Image.fromarray(image)
    pen, thick = ImageDraw.Draw(picture), max(1, round(max(picture.size) / 320))
    font = ImageFont.load_default(max(10, 6 * thick))
    for box, score, number in zip(found.boxes.tolist(), found.scores, found.class_ids, strict=True):
        colour = COLOURS[number % len(COLOURS)]
        pen.rectangle(box, outline=colour, width=thick)
        text = f"{found.labels[number][:LONGEST]} {score:.2f}"
        _, _, right, bottom = pen.textbbox((0, 0), text, font=font)
        x = min(box[0], max(0, picture.width - right))
        y = box[1] - bottom if box[1] >= bottom else box[1]  # inside, where there is no room above
        pen.rectangle((x, y, x + right, y + bottom), fill="white", outline=colour)
        pen.text((x, y), text, fill="black", font=font)
    return picture
