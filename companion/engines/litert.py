"""LiteRT, once TensorFlow Lite: the engine of phones; on a CPU it computes by XNNPACK."""

import json
import os
import struct
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter

from companion.engines.base import FORMAT_KEY, Engine, Metadata, TensorInfo, reason
from companion.errors import CompanionError

# Interpreters kept for batches of different sizes: each has weights packed for its own.
KEPT = 4
_WEIGHTED = {
    schema.BuiltinOperator.CONV_2D,
    schema.BuiltinOperator.DEPTHWISE_CONV_2D,
    schema.BuiltinOperator.TRANSPOSE_CONV,
    schema.BuiltinOperator.FULLY_CONNECTED,
}
_INTEGERS = {schema.TensorType.INT8, schema.TensorType.UINT8, schema.TensorType.INT4}


class LiteRtEngine(Engine):
    """A ``.tflite`` file, or its bytes, run by LiteRT on the CPU.

    Those that `companion.engines.export_tflite` writes carry our names and description, and take images [N, C, H, W];
    those of others have names and layouts of their own. Runs in several threads take turns.
    """

    def __init__(self, source: Path | bytes, *, threads: int) -> None:
        """
        Args:
            source: a ``.tflite`` file, or what is in one.
            threads: CPU threads of a run.

        Raises:
            CompanionError: not a ``.tflite`` file, a damaged one, or one with operations that LiteRT does not know.
        """
        what = "the network" if isinstance(source, bytes) else str(source)
        try:
            self._content: bytes | None = source if isinstance(source, bytes) else source.read_bytes()
        except OSError as error:
            raise CompanionError(f"{what} cannot be read: {error.strerror}.") from error
        self._threads = threads
        self._lock = threading.Lock()
        self._at = lru_cache(maxsize=KEPT)(self._allocated)
        try:
            first = self._at(None)  # which checks the whole file before anything else reads in it
        except Exception as error:
            if "Flatbuffer" in str(error) or "specifies out of range" in str(error):
                raise CompanionError(f"{what} is not a .tflite file or is damaged.") from error
            raise CompanionError(f"LiteRT cannot load {what}: {reason(error)}.") from error
        try:
            self._inputs, self._outputs = first.get_input_details(), first.get_output_details()
            inputs, outputs = (list(map(_info, side)) for side in (self._inputs, self._outputs))
            metadata, precision = _described(self._content)
            super().__init__("litert", inputs, outputs, metadata, precision=precision)
        except CompanionError as error:
            raise CompanionError(f"{what} cannot be used: {error}") from error
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            raise CompanionError(f"{what} is not a .tflite file or is damaged.") from error

    def _allocated(self, shapes: tuple[tuple[int, ...], ...] | None) -> Interpreter:
        """An interpreter for inputs of these shapes; None for those of the file."""
        if self._content is None:
            raise CompanionError("this litert engine is closed: load it again.")
        with _hushed():
            interpreter = Interpreter(model_content=self._content, num_threads=self._threads)
        for detail, shape in zip(interpreter.get_input_details(), shapes or (), strict=shapes is not None):
            interpreter.resize_tensor_input(detail["index"], shape)
        with _hushed():
            interpreter.allocate_tensors()
        return interpreter

    def _run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        with self._lock:
            interpreter = self._at(tuple(array.shape for array in inputs.values()))
            for detail, array in zip(self._inputs, inputs.values(), strict=True):
                interpreter.set_tensor(detail["index"], array)
            interpreter.invoke()
            return {
                info.name: interpreter.get_tensor(detail["index"])
                for info, detail in zip(self.outputs, self._outputs, strict=True)
            }

    def _release(self) -> None:
        self._content = None
        self._at.cache_clear()


@contextmanager
def _hushed() -> Iterator[None]:
    """Without what the library announces about itself on stderr; its errors come as exceptions."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _info(detail: dict[str, Any]) -> TensorInfo:
    dtype = np.dtype(detail["dtype"])
    if dtype.kind not in "fiub":
        raise CompanionError(f"its {detail['name']} is no tensor of numbers.")
    sizes = detail["shape_signature"] if len(detail["shape_signature"]) else detail["shape"]
    return TensorInfo(detail["name"], dtype.name, tuple(None if n < 0 else int(n) for n in sizes))


def _described(content: bytes) -> tuple[Metadata, str]:
    """What the file says of itself, and in what its layers with weights are computed."""
    model = schema.Model.GetRootAs(content, 0)
    entries = (model.Metadata(i) for i in range(model.MetadataLength()))
    buffers = [entry.Buffer() for entry in entries if entry.Name() == FORMAT_KEY.encode()]
    texts = {}
    if buffers:
        try:
            texts = json.loads(model.Buffers(buffers[0]).DataAsNumpy().tobytes())
            if not all(isinstance(text, str) for text in texts.values()):
                raise ValueError("not all of it are texts")
        except (AttributeError, ValueError, RecursionError, struct.error) as error:
            raise CompanionError(f"its description is damaged: {error}.") from error
    graph = model.Subgraphs(0)
    operators = (graph.Operators(i) for i in range(graph.OperatorsLength()))
    weighted = (op for op in operators if model.OperatorCodes(op.OpcodeIndex()).BuiltinCode() in _WEIGHTED)
    integers = any(graph.Tensors(op.Inputs(1)).Type() in _INTEGERS for op in weighted)
    return Metadata.from_text(texts), "int8" if integers else "fp32"


def describe(content: bytes, inputs: list[str], outputs: list[str], metadata: Metadata, *, any_batch: bool) -> bytes:
    """The same ``.tflite`` file with our names of its inputs and outputs and with our description inside.

    Args:
        content: what is in the file, as the converter writes it.
        inputs, outputs: names, in the order of the network's arguments and results.
        metadata: the description; it is stored in the file's own list of metadata, under the name ``companion``.
        any_batch: mark the first dimension of inputs and outputs as free.
    """
    from ai_edge_litert.tools import flatbuffer_utils

    model = flatbuffer_utils.read_model_from_bytearray(bytearray(content))
    graph = model.subgraphs[0]
    signature = model.signatureDefs[0]
    for names, sides in ((inputs, signature.inputs), (outputs, signature.outputs)):
        for name, side in zip(names, sorted(sides, key=_position), strict=True):
            tensor = graph.tensors[side.tensorIndex]
            side.name = tensor.name = name
            if any_batch:
                tensor.shapeSignature = [-1, *tensor.shape[1:]]
    # In the order of the arguments, which is not always that of the converter.
    for order, sides in (("inputs", signature.inputs), ("outputs", signature.outputs)):
        wanted = inputs if order == "inputs" else outputs
        setattr(graph, order, [side.tensorIndex for side in sorted(sides, key=lambda side: wanted.index(side.name))])
    text = json.dumps(metadata.to_text(), ensure_ascii=False).encode()
    entry, buffer = schema.MetadataT(), schema.BufferT()
    entry.name, entry.buffer, buffer.data = FORMAT_KEY, len(model.buffers), np.frombuffer(text, np.uint8)
    model.buffers.append(buffer)
    model.metadata = [*(model.metadata or []), entry]
    return bytes(flatbuffer_utils.convert_object_to_bytearray(model))


def _position(side: Any) -> tuple[int, str]:
    """args_10 comes after args_9."""
    name = side.name.decode()
    number = name.rpartition("_")[2]
    return int(number) if number.isdigit() else 0, name
