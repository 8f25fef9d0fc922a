"""The chapter's networks, by name, and the file that carries one from room to room."""

from companion.models.registry import ModelInfo, create, describe, names
from companion.models.weights import load, save

__all__ = ["ModelInfo", "create", "describe", "load", "names", "save"]
