"""TensorRT, and TensorRT for RTX: networks built for one kind of GPU, ahead of time."""

from companion.engines.tensorrt.builder import build
from companion.engines.tensorrt.cache import engine_folder
from companion.engines.tensorrt.enginefile import EngineFile, read_engine
from companion.engines.tensorrt.library import usable_gpu
from companion.engines.tensorrt.network import Layer, layers
from companion.engines.tensorrt.runtime import TensorRTEngine

__all__ = ["EngineFile", "Layer", "TensorRTEngine", "build", "engine_folder", "layers", "read_engine", "usable_gpu"]
