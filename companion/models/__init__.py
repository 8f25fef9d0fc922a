"""The chapter's networks, by name, and the file that carries one from room to room."""

from companion.models.registry import ModelInfo, create, describe, image_size, names, task
from companion.models.weights import load, pretrained, save

__all__ = ["ModelInfo", "create", "describe", "image_size", "load", "names", "pretrained", "save", "task"]
