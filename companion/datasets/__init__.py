"""Images to learn from: two data sets that are always there, one to download, and folders of your own."""

from companion.datasets.download import get
from companion.datasets.inventory import Check, Entry, catalogue, verify
from companion.datasets.registry import load, names
from companion.datasets.store import data_folder, shipped

__all__ = ["Check", "Entry", "catalogue", "data_folder", "get", "load", "names", "shipped", "verify"]
