"""OpenVINO: Intel's engine, for CPUs; it chooses the precision itself unless it is told."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from companion.engines import onnxfile
from companion.engines.base import Engine, without_telemetry
from companion.errors import CompanionError

without_telemetry()
import openvino  # noqa: E402

_HINTS = {"fp32": "f32", "bf16": "bf16", "default": None}
_NAMES = {"f32": "fp32", "bf16": "bf16", "f16": "fp16", "i8": "int8", "u8": "int8"}
_WEIGHTED = {"Convolution", "Deconvolution", "FullyConnected", "MatMul"}


class OpenVinoEngine(Engine):
    """An ONNX file, or its bytes, run by OpenVINO on the CPU.

    What OpenVINO computes in is in `precision`, read from the graph that it runs. An index outside its table, a word
    id beyond the vocabulary say, is no error to OpenVINO: the answer is wrong.
    """

    def __init__(self, source: Path | bytes, *, threads: int, precision: str = "fp32") -> None:
        """
        Args:
            source: an ``.onnx`` file, or what is in one.
            threads: CPU threads of a run.
            precision: ``fp32``, as the other engines compute; ``bf16``; or ``default``, what OpenVINO picks for speed,
                which is bfloat16, three decimal digits, where the processor has instructions for it. Layers that are
                quantized in the file are computed in int8 whatever this says.

        Raises:
            CompanionError: not an ONNX file, one that lacks its weights or has operations that OpenVINO does not know,
                or no such precision.
        """
        if precision not in list(_HINTS):
            raise CompanionError(f"there is no precision {precision!r}: choose one of {', '.join(_HINTS)}.")
        what = "the network" if isinstance(source, bytes) else str(source)
        # Read here first: OpenVINO tries whatever it is given as a file of half a dozen frameworks.
        model = onnxfile.read(source)
        try:
            inputs, outputs, batches, metadata = onnxfile.describe(model)
            settings: dict[str, Any] = {
                "INFERENCE_NUM_THREADS": threads,
                "NUM_STREAMS": 1,
                "ENABLE_CPU_PINNING": False,  # or the engines of two processes share one core
            }
            if hint := _HINTS[precision]:
                settings["INFERENCE_PRECISION_HINT"] = hint
            core = openvino.Core()
            self._compiled: Any = core.compile_model(core.read_model(model.SerializeToString()), "CPU", settings)
            self._idle: list[Any] = []  # requests, each for one run at a time
            super().__init__("openvino", inputs, outputs, metadata, batches, precision=_precision(self._compiled))
        except CompanionError as error:
            raise CompanionError(f"{what} cannot be used: {error}") from error
        except Exception as error:  # OpenVINO's have no base class of their own
            raise CompanionError(f"OpenVINO cannot load {what}: {_reason(error)}.") from error

    def _run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        try:
            request = self._idle.pop()
        except IndexError:
            request = self._compiled.create_infer_request()
        try:
            found = request.infer(inputs)
        except RuntimeError as error:
            raise CompanionError(f"openvino cannot run on these inputs: {_reason(error)}.") from error
        answers = {info.name: found[i] for i, info in enumerate(self.outputs)}
        self._idle.append(request)
        return answers

    def layers(self) -> list[tuple[str, str]]:
        """Kind and precision of every layer that runs, in OpenVINO's words but for ``fp32``, ``bf16``, ``int8``, …"""
        return _layers(self._compiled)

    def _release(self) -> None:
        self._compiled = None
        self._idle.clear()


def _precision(compiled: Any) -> str:
    """What most layers with weights are computed in; without any, what OpenVINO was told."""
    used = Counter(precision for kind, precision in _layers(compiled) if kind in _WEIGHTED)
    if used:
        return used.most_common(1)[0][0]
    hint = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    return _NAMES.get(hint, hint)


def _layers(compiled: Any) -> list[tuple[str, str]]:
    found = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
    kinds = [(info["layerType"].value, info["runtimePrecision"].value) for info in found]
    return [(kind, _NAMES.get(used, used)) for kind, used in kinds if kind not in ("Const", "Input", "Output")]


def _reason(error: Exception) -> str:
    """What OpenVINO says, without source files and the names of its checks."""
    if found := re.search(r"(No conversion rule found for operations|Conversion is failed for): .+", str(error)):
        return found[0].rstrip(" .")
    noise = r"Exception from |Check '.*' failed at |\S+ failed with \w+:$|FrontEnd API failed|While validating"
    lines = [line.strip() for line in str(error).splitlines()]
    said = [line for line in lines if line and not re.match(noise, line)]
    return said[0].rstrip(" .:;") if said else type(error).__name__
