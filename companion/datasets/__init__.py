"""Images to learn from: made from digits, so always there; larger ones to download or to bring; folders of your own."""

from companion.datasets.arrays import in_memory
from companion.datasets.download import get
from companion.datasets.inventory import Check, Entry, catalogue, verify
from companion.datasets.moving_digits import DigitClip, digit_clip
from companion.datasets.registry import load, names, splits
from companion.datasets.store import data_folder, shipped

__all__ = [
    "Check",
    "DigitClip",
    "Entry",
    "catalogue",
    "data_folder",
    "digit_clip",
    "get",
    "in_memory",
    "load",
    "names",
    "shipped",
    "splits",
    "verify",
]
