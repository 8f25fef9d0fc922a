"""From a torch network to a ``.tflite`` file, by LiteRT's own converter, which is optional."""

import io
import os
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from companion.engines.base import Metadata, reason
from companion.engines.export import BATCHES, Export, compare, outputs_of, quiet, root_of
from companion.engines.network import check_batch, flatten, metadata_of, own_copy
from companion.errors import CompanionError
from companion.files import check_writable, replacing


def export_tflite(
    model: nn.Module,
    example: Any,
    path: str | os.PathLike[str],
    *,
    labels: Sequence[str] | None = None,
    task: str | None = None,
    tolerance: float = 1e-4,
) -> Export:
    """Write ``model`` to a ``.tflite`` file for the engine ``litert``: with a description, checked against torch.

    Inputs, outputs and names are as in `export_onnx`: plain images [N, C, H, W] in 0..1 for networks of ours. The
    converter fixes the batch at 1. Where the network gives torch's answers for other batches too, the file says that
    it takes any; where it does not (a Reshape with fixed numbers), the file says 1.

    The converter, litert-torch, is an extra of its own, ``litert-convert``, for it brings several gigabytes; the files
    run without it.

    Args:
        model, example, labels, task: as for `export_onnx`.
        path: the file; an existing one is replaced.
        tolerance: how far LiteRT may be from torch, relative to the largest output where that is above 1.

    Raises:
        CompanionError: the converter is not installed, it cannot convert the network, LiteRT's answers differ by more
            than the tolerance, labels that are not as many as the classes, or a file that cannot be written.
    """
    path = Path(path)
    if path.suffix != ".tflite":
        raise CompanionError(f"{path} is no name for a LiteRT file: it must end in .tflite.")
    check_writable(path)
    try:
        with quiet():
            import_module("litert_torch")
    except Exception as error:  # not there, or there and broken
        raise CompanionError(
            "writing .tflite files needs the converter litert-torch, several gigabytes, best in an environment of its "
            'own: pip install -e ".[litert-convert]".'
        ) from error
    inputs = check_batch(model, example)
    model = own_copy(model).to(memory_format=torch.contiguous_format)
    said = metadata_of(model, inputs, labels=labels, task=task)
    one = tree_map(lambda tensor: tensor[:1].detach().cpu().contiguous(), example)
    content, largest, batches = _any_batch(model, one, _convert(model, one), said, tolerance)
    with replacing(path) as file:
        file.write(content)
    return Export(path, len(content), largest, batches)


def _convert(model: nn.Module, example: Any) -> bytes:
    import litert_torch

    by_name = example if isinstance(example, dict) else {}
    arguments = () if by_name else example if isinstance(example, tuple) else (example,)
    try:
        with quiet(), redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as folder:
            converted = litert_torch.convert(model, arguments, by_name or None)
            converted.export(f"{folder}/net.tflite")
            return Path(f"{folder}/net.tflite").read_bytes()
    except Exception as error:  # of torch.export, jax and the converter, which have no base class
        raise CompanionError(
            f"{type(model).__name__} cannot be converted to LiteRT: {reason(root_of(error))}."
        ) from error


def _any_batch(
    model: nn.Module, example: Any, content: bytes, said: Metadata, tolerance: float
) -> tuple[bytes, float, tuple[int, ...]]:
    """The file that takes any batch if that gives torch's answers, else the one that takes one sample."""
    from companion.engines.litert import LiteRtEngine, describe

    names = list(flatten(example, "input")), list(outputs_of(model, example))
    for batches in (BATCHES, (1,)):
        described = describe(content, *names, said, any_batch=len(batches) > 1)
        try:
            with LiteRtEngine(described, threads=1) as engine:
                return described, compare(model, example, engine, tolerance, batches, "LiteRT"), batches
        except CompanionError:
            if batches == (1,):
                raise
    raise AssertionError("one sample either works or does not")
