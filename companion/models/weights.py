"""A network in one safetensors file: its weights, and in the header what it takes to rebuild and to use it."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from companion.errors import CompanionError
from companion.files import replacing, shipped
from companion.models.registry import ModelInfo, attach, blank, create, describe, texts, tuples
from companion.models.structure import changed_layers, check_runs, replace_layers

FORMAT = "companion-1"
GROWTH = 16
"""So many times what the largest layer of the network as made gives, no layer of a compressed one can give: a forged
padding could ask for any memory."""


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    labels: Sequence[str] | None = None,
    vocabulary: Sequence[str] | None = None,
) -> None:
    """Write ``model`` to a ``.safetensors`` file, whole or not at all.

    Args:
        model: a network from `create` or `load`, compressed or not: layers that are not as `create` makes them,
            such as narrower ones after pruning, are written down, too.
        path: the file; an existing one is replaced.
        labels: class names in the order of the outputs, if not those the network already carries.
        vocabulary: for text, the words in the order of their ids, likewise.

    Raises:
        CompanionError: not one of our networks, not in float32, a layer that a file cannot hold, labels that do not
            fit, or the file cannot be written.
    """
    info = describe(model)
    if labels is not None:
        info = replace(info, labels=tuple(labels))
    if vocabulary is not None:
        info = replace(info, vocabulary=texts("the vocabulary", vocabulary))
    attach(model, info)
    with torch.device("meta"):
        layers = changed_layers(model, create(info.name, **info.configuration))
    # One entry, because safetensors writes several in random order: equal networks make equal files.
    said = asdict(info) | ({"layers": layers} if layers else {})
    metadata = {FORMAT: json.dumps(said, ensure_ascii=False)}
    if any(value.is_floating_point() and value.dtype != torch.float32 for value in model.state_dict().values()):
        raise CompanionError("weights are saved in float32: call the network's float() first.")
    # A file has no memory format (channels-last) and no device.
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    with replacing(path) as file:
        file.write(safetensors.torch.save(state, metadata))


def load(path: str | os.PathLike[str]) -> nn.Module:
    """Rebuild the network that `save` wrote, in evaluation mode on the CPU. Nothing in the file is executed.

    Raises:
        CompanionError: the file is missing, truncated, of another kind, or does not fit the network it names.
    """
    path = Path(path)
    if path.is_dir():
        raise CompanionError(f"{path} is a folder: name the weights file.")
    if not path.is_file():
        raise CompanionError(f"there is no weights file {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            info, layers = _read_info(path, file.metadata() or {})
            # Cloned, because they lie unaligned in the file: kernels would round in another order than before.
            state = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise CompanionError(f"{path} is not a safetensors file or is damaged: {error}.") from error
    # Built without memory first: a forged configuration is refused by shape before it can ask for any.
    with torch.device("meta"):
        model = create(info.name, **info.configuration)
    if info.task != describe(model).task:
        raise CompanionError(f"{path} says that {info.name} is for the task {info.task!r}, which it is not.")
    if layers:
        try:
            with torch.device("meta"):
                example = blank(info)
            most = GROWTH * check_runs(model, example)
            with torch.device("meta"):
                replace_layers(model, layers)
            if check_runs(model, example) > most:
                raise CompanionError(f"one of its layers would give more than {most:,} numbers for one sample.")
        except CompanionError as error:
            raise CompanionError(f"{path} does not fit {info.name}: {error}") from error
    _check_fit(path, info.name, model.state_dict(), state)
    model.load_state_dict(state, assign=True)
    return attach(model, info).eval()


def pretrained(name: str) -> nn.Module:
    """A trained network that comes with the project, in evaluation mode on the CPU.

    Args:
        name: ``cifar_resnet14_hard_digits``, 98.15 % on the test split of ``hard_digits``, made by
            ``companion train cifar_resnet14 --data hard_digits --epochs 10 --threads 1``; ``yolov5_tiny_digit_scenes``,
            mAP@0.5 98.7 % and mAP@0.5:0.95 63.6 % on that of ``digit_scenes``, made in six CPU-minutes by
            ``companion train yolov5_tiny --data digit_scenes --threads 1`` (beside it as ONNX, by
            ``companion export``); or a base of the bench of compression, made by ``tools/train_weights.py``:
            ``cifar_resnet20_cifar10_seed0``, ``1`` and ``2``, 86.85, 86.54 and 86.46 % on CIFAR-10's test split, and
            ``cifar_resnet18_half_cifar10``, 87.55 %.

    Raises:
        CompanionError: no such network is shipped.
    """
    known = sorted(path.stem for path in shipped("manifest.json").parent.glob("weights/*.safetensors"))
    if name not in known:
        raise CompanionError(f"no network {name!r} is shipped: choose one of {', '.join(known)}.")
    return load(shipped(f"weights/{name}.safetensors"))


def _read_info(path: Path, metadata: dict[str, str]) -> tuple[ModelInfo, dict[str, Any]]:
    if FORMAT not in metadata:
        raise CompanionError(
            f"{path} is a safetensors file, but not one of companion's: it does not say which network it holds."
        )
    try:
        found = json.loads(metadata[FORMAT])
        for key in ("labels", "vocabulary"):
            if found[key] is not None and not all(isinstance(word, str) for word in found[key]):
                raise TypeError(f"the {key} are not text")
        layers = found.get("layers", {})
        if not (isinstance(layers, dict) and all(isinstance(layer, dict) for layer in layers.values())):
            raise TypeError("the layers are no table")
        info = ModelInfo(
            name=str(found["name"]),
            configuration={k: tuples(v) for k, v in found["configuration"].items()},
            task=found["task"],
            labels=None if found["labels"] is None else tuple(found["labels"]),
            vocabulary=None if found["vocabulary"] is None else tuple(found["vocabulary"]),
        )
        return info, layers
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise CompanionError(f"{path} has a damaged description of its network: {error}.") from error


def _check_fit(path: Path, name: str, wanted: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """Every tensor of the network must be in the file, with its shape and number format, and nothing else."""
    for key, tensor in wanted.items():
        if key not in found:
            raise CompanionError(f"{path} does not fit {name}: it lacks the tensor {key}.")
        other = found[key]
        if other.shape != tensor.shape or other.dtype != tensor.dtype:
            raise CompanionError(
                f"{path} does not fit {name}: {key} is {other.dtype} {list(other.shape)}, "
                f"the network needs {tensor.dtype} {list(tensor.shape)}."
            )
    if extra := sorted(found.keys() - wanted.keys()):
        raise CompanionError(f"{path} does not fit {name}: it has the tensor {extra[0]}, which the network lacks.")
