"""What every engine has in common: named inputs and outputs, NumPy in and out, and the checks of what comes in."""

import json
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np

from companion.errors import CompanionError
from companion.models.registry import tuples

# Beside what the file says stands how to read it, under this key.
FORMAT_KEY, FORMAT = "companion", "1"
TASKS = ("classify", "text", "segment", "detect")


@dataclass(frozen=True)
class TensorInfo:
    """An input or an output of an engine."""

    name: str
    dtype: str
    """As NumPy calls it: ``float32``, ``int64``, …"""
    shape: tuple[int | None, ...]
    """None where any size will do; the first dimension is the batch. Empty for a scalar, and where a file of others
    does not even say how many dimensions there are."""

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} {_shape_text(self.shape)}"


@dataclass(frozen=True)
class Metadata:
    """What a network's file says besides the network; None where it says nothing."""

    model: str | None = None
    """The name that `companion.models.create` knows, or the class of a network that is not ours."""
    configuration: dict[str, Any] | None = None
    """The arguments that built it; of our networks only."""
    task: str | None = None
    """``classify``, ``text``, ``segment`` or ``detect``."""
    labels: tuple[str, ...] | None = None
    """Class names in the order of the outputs."""
    vocabulary: tuple[str, ...] | None = None
    """For text: the words, in the order of their ids."""
    input_size: tuple[int, ...] | None = None
    """Shape of one sample of the first input: (3, 32, 32) for images [N, 3, 32, 32]."""
    stride: int | None = None
    """What height and width of images must be multiples of, where the file leaves them open."""
    mean: tuple[float, ...] | None = None
    """For each channel what the network itself takes from its images, which come in 0..1, …"""
    std: tuple[float, ...] | None = None
    """… and divides them by. None where it takes them as they are, or says nothing."""

    def to_text(self) -> dict[str, str]:
        """Keys and texts, as file formats store them; what is not text itself is JSON."""
        said = {key: value for key, value in asdict(self).items() if value is not None}
        as_text = {k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in said.items()}
        return {FORMAT_KEY: FORMAT, **as_text}

    @classmethod
    def from_text(cls, texts: Mapping[str, str]) -> Self:
        """What `to_text` wrote; nothing if somebody else wrote it.

        Raises:
            CompanionError: damaged, or written by a later companion.
        """
        if FORMAT_KEY not in texts:
            return cls()
        if texts[FORMAT_KEY] != FORMAT:
            raise CompanionError(
                f"its description has the format {texts[FORMAT_KEY]!r}, not {FORMAT!r}: export it again."
            )
        found: dict[str, Any] = {}
        try:
            for field in fields(cls):
                if (text := texts.get(field.name)) is not None:
                    found[field.name] = text if field.name in ("model", "task") else json.loads(text)
            for name in ("labels", "vocabulary"):
                if name in found:
                    found[name] = _tuple(found[name], "texts", lambda text: isinstance(text, str))
            if "input_size" in found:
                found["input_size"] = _tuple(found["input_size"], "sizes", lambda n: type(n) is int and n > 0)
            for name in ("mean", "std"):
                if name in found:
                    found[name] = _tuple(found[name], "numbers", lambda x: type(x) in (int, float))
            if "stride" in found and not (type(found["stride"]) is int and found["stride"] > 0):
                raise ValueError(f"{found['stride']!r} is no stride")
            if found.get("task", TASKS[0]) not in TASKS:
                raise ValueError(f"{found['task']!r} is no task")
            if not found.get("model", "").isprintable():
                raise ValueError(f"{found['model']!r} is no name")
            if "configuration" in found:
                found["configuration"] = {k: tuples(v) for k, v in found["configuration"].items()}
        except (AttributeError, TypeError, ValueError, RecursionError) as error:
            raise CompanionError(f"its description is damaged: {error}.") from error
        return cls(**found)


def _tuple(values: Any, of: str, test: Callable[[Any], bool]) -> tuple[Any, ...]:
    if not isinstance(values, list) or not all(map(test, values)):
        raise TypeError(f"{values!r} is no list of {of}")
    return tuple(values)


class Engine(ABC):
    """Runs one network. NumPy arrays by name in, NumPy arrays by name out.

    An engine frees what it holds at `close` or at the end of a ``with`` block. A subclass says in its ``__init__``
    what goes in and out, and writes `_run` and `_release`; the checks stand here.
    """

    order: Literal["C", "K"] = "C"
    """How arrays had best lie in memory: C-contiguous, into which `run` copies all others, or as they are (K), so that
    images that were decoded pixel by pixel, [N, H, W, 3], need only be transposed."""

    def __init__(
        self,
        name: str,
        inputs: Sequence[TensorInfo],
        outputs: Sequence[TensorInfo],
        metadata: Metadata,
        batches: Sequence[Sequence[str]] | None = None,
        *,
        precision: str = "fp32",
    ) -> None:
        """
        Args:
            name, inputs, outputs, metadata, precision: as the attributes.
            batches: groups of inputs, by name, that must have the same number of samples; all whose first dimension
                is free are one, unless this says otherwise.

        Raises:
            CompanionError: the metadata have not as many labels as the network has classes.
        """
        _check_labels(metadata, outputs)
        free = [info.name for info in inputs if info.shape[:1] == (None,)]
        self._batches = [free] if batches is None else batches
        self.name = name
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        self.metadata = metadata
        self.precision = precision
        """In what convolutions and matrix products are computed: ``fp32``, ``fp16``, ``bf16``, ``int8``, ``mixed``."""
        self._closed = False

    @abstractmethod
    def _run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The outputs for inputs that were checked: all there, in ``self.order``, of the right dtypes and shapes."""

    @abstractmethod
    def _release(self) -> None:
        """Let go of everything that takes memory."""

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Compute the outputs.

        Args:
            inputs: an array for each of ``self.inputs``, of its dtype and shape, in any memory layout.

        Returns:
            An array for each of ``self.outputs``.

        Raises:
            CompanionError: the engine is closed, maybe meanwhile; an input is missing, unknown, empty, no array, of
                another dtype or shape, or has not as many samples as another; or the network cannot compute these
                values (a word id outside the vocabulary, say).
        """
        closed = CompanionError(f"this {self.name} engine is closed: load it again.")
        if self._closed:
            raise closed
        checked = self._check(inputs)
        with one_sentence(f"{self.name} cannot run on these inputs"):
            try:
                return self._run(checked)
            except Exception as error:
                if self._closed:  # by another thread, which took away what runs
                    raise closed from error
                raise

    def _check(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        if not isinstance(inputs, Mapping):
            raise CompanionError(f"run takes a dict of arrays by input name, not {type(inputs).__name__}.")
        names = [info.name for info in self.inputs]
        if unknown := [name for name in inputs if name not in names]:
            raise CompanionError(f"there is no input {unknown[0]!r}: this network takes {', '.join(names)}.")
        if missing := [name for name in names if name not in inputs]:
            raise CompanionError(f"the input {missing[0]!r} is missing: this network takes {', '.join(names)}.")
        arrays = {info.name: _check_array(info, inputs[info.name], self.order) for info in self.inputs}
        if stride := self.metadata.stride:
            for name, array in arrays.items():
                if array.ndim == 4 and any(side % stride for side in array.shape[2:]):
                    raise CompanionError(
                        f"height and width of the input {name!r} must be multiples of {stride}, "
                        f"not {array.shape[2]} and {array.shape[3]}."
                    )
        for group in self._batches:
            if len({len(arrays[name]) for name in group}) > 1:
                shapes = ", ".join(f"{name} {_shape_text(arrays[name].shape)}" for name in group)
                raise CompanionError(f"these inputs need the same number of samples, not {shapes}.")
        return arrays

    def close(self) -> None:
        """Free what the engine holds; it cannot run afterwards. Closing twice does no harm."""
        if not self._closed:
            self._closed = True
            self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        sides = (", ".join(map(str, side)) for side in (self.inputs, self.outputs))
        return f"<{self.name} engine: {' → '.join(sides)}>"


def _check_array(info: TensorInfo, array: Any, order: Literal["C", "K"]) -> np.ndarray:
    if not isinstance(array, np.ndarray):
        raise CompanionError(f"the input {info.name!r} must be a NumPy array, not {type(array).__name__}.")
    if array.dtype != np.dtype(info.dtype):
        raise CompanionError(
            f"the input {info.name!r} must be {info.dtype}, not {array.dtype}: "
            f"convert it with .astype({info.dtype!r}), and mind the range of its values."
        )
    fits = len(array.shape) == len(info.shape) and all(
        wanted is None or wanted == found for wanted, found in zip(info.shape, array.shape, strict=True)
    )
    if info.shape and not fits:
        raise CompanionError(
            f"the input {info.name!r} must have the shape {_shape_text(info.shape)}, not {_shape_text(array.shape)}."
        )
    if array.size == 0:
        raise CompanionError(
            f"the input {info.name!r} is empty, shape {_shape_text(array.shape)}: give one sample or more."
        )
    return np.asarray(array, order=order)


def _shape_text(shape: Sequence[int | None]) -> str:
    """[N, 3, any, 224]: N for a batch of any size."""
    free = ["N"] + ["any"] * len(shape)
    return f"[{', '.join(free[i] if size is None else str(size) for i, size in enumerate(shape))}]"


def _check_labels(metadata: Metadata, outputs: Sequence[TensorInfo]) -> None:
    """Scores are [N, classes], of pixels [N, classes, H, W]; detectors have forms of their own."""
    dimensions = {None: (2,), "classify": (2,), "text": (2,), "segment": (4,), "detect": ()}[metadata.task]
    shape = outputs[0].shape if outputs else ()
    if metadata.labels is None or len(shape) not in dimensions or shape[1] in (None, len(metadata.labels)):
        return
    raise CompanionError(f"the network has {shape[1]} classes, but {len(metadata.labels)} labels were given.")


def without_telemetry() -> None:
    """Have OpenVINO (and nncf) imported as if the package were missing with which their import reports itself over the
    network and leaves a file in the home folder."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # as Python documents it


@contextmanager
def one_sentence(what: str) -> Iterator[None]:
    """Have whatever goes wrong within said in one sentence that begins with ``what``.

    Raises:
        CompanionError: in place of any other exception: runtimes and networks of others raise what they like.
    """
    try:
        yield
    except CompanionError:
        raise
    except Exception as error:
        raise CompanionError(f"{what}: {reason(error)}.") from error


def reason(error: BaseException) -> str:
    """The first sentence of what an exception says, without its full stop, to be part of a sentence.

    Of ONNX Runtime's neither error numbers nor node names, source files and C++ signatures are left.
    """
    said = str(error).rpartition("Status Message: ")[2].strip().partition("\n")[0]
    said = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", said)
    said = re.sub(
        r"\S*onnxruntime_src/\S+ .*?\) |This is an invalid model\. |ONNX Runtime only \*guarantees\* [^.]*\. ", "", said
    )
    return re.split(r"[.!?]\s+(?=[A-Z])", said)[0].rstrip(" .:") or type(error).__name__
