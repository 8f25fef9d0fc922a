"""The chapter's networks, by name, and the file that carries one from room to room."""

from companion.models.registry import ModelInfo, create, describe, image_size, names
from companion.models.weights import load, pretrained, save

__all__ = ["ModelInfo", "create", "describe", "image_size", "load", "names", "pretrained", "save"]
