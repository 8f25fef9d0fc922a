"""Images and texts to learn from: always there, to download or to bring, or folders of your own."""

from companion.datasets.arrays import in_memory
from companion.datasets.download import get
from companion.datasets.inventory import Check, Entry, catalogue, verify
from companion.datasets.moving_digits import DigitClip, digit_clip
from companion.datasets.registry import load, names, splits
from companion.datasets.store import data_folder, shipped
from companion.datasets.texts import Texts
from companion.datasets.words import build_vocabulary, encode, word_ids

__all__ = [
    "Check",
    "DigitClip",
    "Entry",
    "Texts",
    "build_vocabulary",
    "catalogue",
    "data_folder",
    "digit_clip",
    "encode",
    "get",
    "in_memory",
    "load",
    "names",
    "shipped",
    "splits",
    "verify",
    "word_ids",
]
