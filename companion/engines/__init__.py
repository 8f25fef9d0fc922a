"""Run networks outside the program that trained them: export to ONNX, and one interface to every engine."""

from companion.engines.base import Engine, Metadata, TensorInfo
from companion.engines.export import Export, export_onnx
from companion.engines.network import example_for
from companion.engines.pytorch import as_module
from companion.engines.registry import available, load, suited
from companion.engines.tflite import export_tflite

__all__ = [
    "Engine",
    "Export",
    "Metadata",
    "TensorInfo",
    "as_module",
    "available",
    "example_for",
    "export_onnx",
    "export_tflite",
    "load",
    "suited",
]
