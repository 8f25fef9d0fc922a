"""Weights out of a checkpoint that somebody pickled, without running what is in it.

``torch.save`` of a whole network writes a pickle: a program that builds objects, and can build any. This one may build
plain values, tensors over the bytes in the same file, and empty shells in place of modules, nothing else.
"""

import io
import os
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from math import prod
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from companion.errors import CompanionError

LARGEST_PROGRAM = 8 * 2**20  # bytes of the pickle itself; that of YOLOv5n has 83 thousand
DEEPEST, MOST = 32, 100_000  # modules within modules; modules and tensors in all
LONGEST = 100  # letters of a name
DIMENSIONS = 8

# What pickling a network (protocol 2) takes. Left out is all that asks for memory by a number in the file.
_OPERATIONS = frozenset(
    name
    for names in (
        ("PROTO", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
        ("BINUNICODE", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "APPEND", "APPENDS"),
        ("EMPTY_DICT", "SETITEM", "SETITEMS", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "GLOBAL", "BINPERSID"),
        ("REDUCE", "NEWOBJ", "BUILD"),
    )
    for name in names
)
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class _Shell:
    """In place of a module: keeps what was in it, does nothing."""

    def __new__(cls, *_: Any) -> "_Shell":
        return super().__new__(cls)

    def __init__(self, *_: Any) -> None:
        self.inside: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        self.inside = state if isinstance(state, dict) else {}


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Parameters and buffers of the network in a checkpoint of ``torch.save``, by name, in their own number formats.

    The network is what was saved, or its entry ``ema`` or ``model``, as the trainings of YOLOv5 write it. Nothing of
    the file is executed.

    Raises:
        CompanionError: no such file, none of torch's, or one that asks for more than tensors.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            return _weights(_load(archive, path.stat().st_size))
    except OSError as error:
        raise CompanionError(f"cannot read {path}: {error.strerror or error}.") from error
    except CompanionError as error:
        raise CompanionError(f"{path} is not read: {error}") from error
    except Exception as error:  # a forged file can make any of these modules stumble anywhere
        raise CompanionError(f"{path} is damaged, or no checkpoint of torch.save.") from error


def _load(archive: zipfile.ZipFile, size: int) -> Any:
    members = {info.filename: info for info in archive.infolist()}
    (program,) = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
    if any(info.compress_type != zipfile.ZIP_STORED for info in members.values()):
        raise CompanionError("it is compressed, which torch.save does not do.")
    if sum(info.file_size for info in archive.infolist()) > size:
        raise CompanionError("its parts lie on top of each other.")
    if members[program].file_size > LARGEST_PROGRAM:
        raise CompanionError("its pickle is larger than that of any network.")
    content = archive.read(program)
    for operation, _, _ in pickletools.genops(content):
        if operation.name not in _OPERATIONS:
            raise CompanionError(f"its pickle has the operation {operation.name}, which no network needs.")
    folder = program.removesuffix("data.pkl")
    return _Reader(archive, folder, content).load()


_Python: Any = pickle._Unpickler


class _Reader(_Python):  # the one in Python, whose memory is a dict: C's grows to any number in the file
    """Builds tensors, plain values and shells."""

    dispatch: ClassVar = dict(_Python.dispatch)

    def __init__(self, archive: zipfile.ZipFile, folder: str, content: bytes) -> None:
        super().__init__(io.BytesIO(content), encoding="ascii")
        self.archive, self.folder = archive, folder
        self.storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        known = {
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
            ("collections", "OrderedDict"): lambda *_: OrderedDict(),
            ("__builtin__", "set"): lambda *_: None,
            ("builtins", "set"): lambda *_: None,
            ("torch", "Size"): lambda *_: None,
        }
        if (module, name) in known:
            return known[module, name]
        if module.startswith("torch.nn.modules.") or module.split(".")[0] in ("models", "ultralytics"):
            return _Shell
        asked = f"{module}.{name}"[:LONGEST]
        raise CompanionError(f"it asks for {asked}, which is neither a tensor nor a layer.")

    def persistent_load(self, saved: Any) -> Tensor:
        if not isinstance(saved, tuple):
            raise ValueError("no storage")
        kind, dtype, key, _, numbers = saved
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str):
            raise ValueError("no storage")
        if key not in self.storages:
            data = bytearray(self.archive.read(f"{self.folder}data/{key}"))
            self.storages[key] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        found = self.storages[key]
        if found.dtype != dtype or len(found) != numbers:
            raise ValueError("another storage")
        return found

    # What follows looks at what Python's own would take on trust. A tensor, for one, is a sequence, and has a state.

    def load_reduce(self) -> None:
        _check_arguments(self.stack[-1])
        _Python.load_reduce(self)

    def load_newobj(self) -> None:
        _check_arguments(self.stack[-1])
        if self.stack[-2] is not _Shell:
            raise ValueError("no module")
        _Python.load_newobj(self)

    def load_build(self) -> None:
        if isinstance(self.stack[-2], OrderedDict):  # a state_dict's versions, which nobody asks for
            self.stack.pop()
            return
        if not isinstance(self.stack[-2], _Shell):
            raise ValueError("no module")
        _Python.load_build(self)

    def load_setitem(self) -> None:
        _check_key(self.stack[-2])
        _Python.load_setitem(self)

    def load_setitems(self) -> None:
        for key in self.stack[::2]:
            _check_key(key)
        _Python.load_setitems(self)

    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.NEWOBJ[0]] = load_newobj
    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems


def _check_arguments(arguments: Any) -> None:
    if not isinstance(arguments, tuple) or len(arguments) > DIMENSIONS:
        raise ValueError("no arguments")


def _check_key(key: Any) -> None:
    """Tuples within tuples within … would overflow the stack where they are hashed, and large numbers collide."""
    if not (isinstance(key, str) or (type(key) is int and 0 <= key < 2**31)):
        raise ValueError("no name")


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    if not (isinstance(storage, Tensor) and isinstance(size, tuple) and isinstance(stride, tuple)):
        raise ValueError("no tensor")
    numbers = (offset, *size[:DIMENSIONS], *stride[:DIMENSIONS])
    if len(size) != len(stride) or len(size) > DIMENSIONS:
        raise ValueError("no tensor")
    if not all(type(number) is int and 0 <= number <= len(storage) for number in numbers):
        raise ValueError("no tensor")
    if prod(size) > len(storage):  # a stride of 0 would make any size of a single number
        raise ValueError("a tensor larger than its storage")
    return torch.as_strided(storage, size, stride, offset)


def _weights(found: Any) -> dict[str, Tensor]:
    if isinstance(found, dict):
        found = next((found[name] for name in ("ema", "model") if isinstance(found.get(name), _Shell)), None)
    if not isinstance(found, _Shell):
        raise CompanionError("it holds no network; a dict of tensors is read by torch.load(weights_only=True).")
    weights: dict[str, Tensor] = {}
    waiting = [(found, "")]
    counted = 0
    while waiting:  # a module may appear in many places, and each of them counts
        shell, prefix = waiting.pop()
        parts = {kind: _named(shell, kind) for kind in ("_parameters", "_buffers", "_modules")}
        counted += sum(map(len, parts.values()))
        if counted > MOST or prefix.count(".") > DEEPEST:
            raise CompanionError("it has more modules than any network.")
        for name, value in (parts["_parameters"] | parts["_buffers"]).items():
            if isinstance(value, Tensor):
                weights[f"{prefix}{name}"] = value
        for name, module in reversed(parts["_modules"].items()):
            if isinstance(module, _Shell):
                waiting.append((module, f"{prefix}{name}."))
    if not weights:
        raise CompanionError("its network has no weights.")
    return weights


def _named(shell: _Shell, kind: str) -> dict[str, Any]:
    found = shell.inside.get(kind) or {}
    if not isinstance(found, dict) or any(not isinstance(name, str) or len(name) > LONGEST for name in found):
        raise ValueError("no names")
    return found
