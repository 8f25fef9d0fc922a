"""Knowledge distillation: a small network learns from the answers of a large one (Hinton, Vinyals and Dean, 2015)."""

import copy
import hashlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, cross_entropy, kl_div, log_softmax, mse_loss
from torch.utils.data import Subset

from companion.errors import CompanionError
from companion.files import check_writable, replacing
from companion.metrics.probe import check_example, one_sentence
from companion.train import fit, predict, task_of
from companion.train.batches import own_randomness, permutation, seed_everything
from companion.train.device import move, pick_device, placed
from companion.train.evaluation import check_match
from companion.train.tasks import Accuracy, Task

UNKNOWN = -1  # the label of a sample that has none
FORMAT = "companion-teacher-1"


def distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float = 4.0, alpha: float = 0.9
) -> Tensor:
    """``alpha · T² · KL(teacher_T ‖ student_T) + (1 − alpha) · cross-entropy(labels)``, mean over the batch.

    A softmax at temperature T is that of the logits divided by T: the higher T, the more the wrong classes show. Its
    gradient is about 1/T² of that at 1, so the factor T² keeps the balance of the two parts when T changes (Hinton,
    Vinyals and Dean, Distilling the Knowledge in a Neural Network, 2015, section 2).

    Args:
        student_logits: float [N, classes].
        teacher_logits: float [N, classes].
        labels: int64 [N]; of a sample with label −1 only the soft part counts.
        temperature: T, above 0.
        alpha: weight of the soft part, 0 to 1.

    Returns:
        A float32 scalar.
    """
    student_logits, teacher_logits = student_logits.float(), teacher_logits.float()
    soft = kl_div(
        log_softmax(student_logits / temperature, 1),
        log_softmax(teacher_logits / temperature, 1),
        reduction="batchmean",
        log_target=True,  # the teacher's, too, come as logarithms
    )
    hard = cross_entropy(student_logits, labels, ignore_index=UNKNOWN, reduction="sum")
    return alpha * temperature**2 * soft + (1 - alpha) * hard / len(labels)


def task_to_teach(data: Any) -> Task:
    """The task of ``data``.

    Raises:
        CompanionError: it is not classification.
    """
    task = task_of(data)
    if task.meter is not Accuracy:
        raise CompanionError("distillation is for classification: the samples need one class each.")
    return task


def distill(
    student: nn.Module,
    teacher: nn.Module,
    data: Any,
    *,
    epochs: int,
    temperature: float = 4.0,
    alpha: float = 0.9,
    cache: bool | str | os.PathLike[str] = True,
    features: tuple[str, str] | None = None,
    beta: float = 1.0,
    validation: Any = 0.1,
    seed: int = 0,
    **settings: Any,
) -> nn.Module:
    """Train a copy of ``student`` on the answers of ``teacher`` and on what labels there are (`distillation_loss`).

    It pays where labels are few: the teacher answers for unlabelled samples, too. With all labels expect nothing.

    Args:
        student: the network to start from: a fresh one, or a pruned one that is to recover.
        teacher: a trained network for the same inputs and classes.
        data: a data set of classification; a sample whose label is −1 or None (see `few_labels`) is unlabelled.
        epochs: passes over ``data``. What counts is the number of steps, so compare runs of equally many.
        temperature: T of the softmax of both, above 0.
        alpha: weight of the teacher's answers, 0 to 1; the labels have the rest.
        cache: True asks the teacher about each sample once, before the training, as it is without augmentation; a path
            keeps these answers in that file for the next run (`teacher_outputs`). False asks it in each step about the
            pictures just as the student sees them: as much work for the teacher as one evaluation an epoch.
        features: names of one layer of the student and one of the teacher, such as ``("layer3", "layer3")``: their
            outputs [N, C, H, W] or [N, C] shall agree, too, after a learned 1×1 convolution of the student's if the
            channels differ, and averaged to the smaller size of the two (Romero et al., FitNets: Hints for Thin Deep
            Nets, 2015; they train first for the features, then for the answers, here both are one loss). The teacher
            then runs in each step, and nothing is cached.
        beta: weight of the mean squared difference of the features, from 0.
        validation: as in `companion.train.fit`. If any of the held-out samples has no label, all of them are judged by
            the teacher's answer instead, and the score is called ``agreement``.
        seed: of the training and of that convolution.
        settings: the others of `fit`, such as ``batch_size``, ``lr``, ``precision``, ``augment`` or ``on_epoch`` (which
            is called with the figures of each epoch).

    Returns:
        The trained copy, in evaluation mode; both arguments are as they were.

    Raises:
        CompanionError: arguments out of range, networks that do not fit each other or the data, no labels at all and
            ``alpha`` below 1, answers that are not finite, a cache of other data or another teacher, or as `fit`.
    """
    for name, value, good, wanted in (
        ("temperature", temperature, lambda x: 0 < x < math.inf, "a number above 0"),
        ("alpha", alpha, lambda x: 0 <= x <= 1, "a number from 0 to 1"),
        ("beta", beta, lambda x: 0 <= x < math.inf, "a number from 0"),
    ):
        if not (isinstance(value, int | float) and good(value)):
            raise CompanionError(f"{name} is {value}: give {wanted}.")
    if features is not None and not (
        isinstance(features, Sequence) and len(features) == 2 and all(isinstance(name, str) for name in features)
    ):
        raise CompanionError(f"features is {features!r}: name one layer of the student and one of the teacher.")
    if features is not None and not isinstance(cache, bool):
        raise CompanionError("with features the teacher runs in each step: give either features or a file as cache.")
    task = task_to_teach(data)
    for network in (student, teacher):
        if not isinstance(network, nn.Module):
            raise CompanionError(f"a network (torch.nn.Module) is needed, not {type(network).__name__}.")
    device = pick_device(settings.get("device"))
    student, teacher = copy.deepcopy(student).eval(), copy.deepcopy(teacher).eval().requires_grad_(False)
    for network in (student, teacher):
        check_match(network, data)
    with own_randomness():
        example = torch.as_tensor(data[0][0])[None]
    lesson = _Lesson(student, teacher, example, features, seed)
    if alpha < 1 and not any(_label(data[i][1]) != UNKNOWN for i in range(len(data))):
        raise CompanionError("no sample has a label, so only the teacher can be learnt from: give alpha=1.")

    judged = [] if isinstance(validation, int | float | None) else [validation]
    if cache is not False and features is None:
        options = {key: settings[key] for key in ("precision", "device", "num_workers", "progress") if key in settings}
        path = None if cache is True else cache
        tables = [teacher_outputs(teacher, data, path=path, **options)]
        tables += [teacher_outputs(teacher, each, **options) for each in judged]
        for table in tables:
            if table.shape[1] != lesson.classes:  # a forged file
                raise CompanionError(f"{cache} holds answers for {table.shape[1]} classes, not {lesson.classes}.")
        lesson.table = torch.cat(tables)

    def loss(_lesson: nn.Module, answers: _Answers, targets: Tensor) -> Tensor:
        labels, rows = targets.unbind(1)
        found = distillation_loss(answers.student, lesson.taught(answers, rows), labels, temperature, alpha)
        return found if answers.distance is None else found + beta * answers.distance

    task = replace(
        task,
        loss=loss,
        meter=lambda: _Judge(lesson),
        settings={
            "temperature": temperature,
            "alpha": alpha,
            "cache": cache is not False,
            "features": features,
            "beta": beta,
            "teacher": _digest(teacher.state_dict().values()),
        },
    )
    classes = lesson.classes
    judged = [_Numbered(each, classes, start=len(data)) for each in judged]
    with placed(teacher, device):
        fit(
            lesson,
            _Numbered(data, classes),
            task=task,
            epochs=epochs,
            validation=judged[0] if judged else validation,
            seed=seed,
            **settings,
        )
    lesson.forget()
    return student


def teacher_outputs(
    teacher: nn.Module, data: Any, *, path: str | os.PathLike[str] | None = None, **options: Any
) -> Tensor:
    """The teacher's logits for all of ``data``, float32 [N, classes], in its order: one pass, without augmentation.

    Args:
        teacher: a network; it is left as it was.
        data: a data set of (input, label) samples; the labels have no part in it. Give it without random transforms,
            since the logits belong to the one view of each sample that this pass sees.
        path: a safetensors file to keep them in. If it exists, they are read from it, after a check that it
            was made of these inputs by this teacher.
        options: ``batch_size``, ``precision``, ``device``, ``num_workers``, ``progress`` of `companion.train.predict`.

    Raises:
        CompanionError: answers that are not finite, or not one number a class; a file that is damaged, of other data or
            of another teacher, or that cannot be written; or as `companion.train.predict`.
    """
    if path is None:
        logits, _ = predict(teacher, _Numbered(data), **options)
        if logits.dim() != 2:
            raise CompanionError(f"the teacher must answer with scores [N, classes], not {list(logits.shape)}.")
        _check_finite(logits)
        return logits
    check_writable(path)
    names = " ".join(f"{name}:{type(module).__name__}" for name, module in teacher.named_modules())
    with own_randomness():
        seed_everything(0)  # for samples with random transforms
        origin = {
            "teacher": _digest(teacher.state_dict().values(), names),
            "data": _digest(torch.as_tensor(data[i][0]) for i in range(len(data))),
            "precision": options.get("precision", "fp32"),
        }
    if Path(path).exists():
        return _read(path, origin, len(data))
    logits = teacher_outputs(teacher, data, **options)
    with replacing(path) as file:
        file.write(safetensors.torch.save({"logits": logits}, {FORMAT: json.dumps(origin)}))
    return logits


class FewLabels(Subset):
    """All samples of a data set, most of them without their label: −1 stands in its place."""

    def __init__(self, data: Any, kept: Sequence[int]) -> None:
        super().__init__(data, range(len(data)))
        self.labelled = Subset(data, sorted(kept))
        """The samples that have kept their label, alone: all that could be learnt from without a teacher."""
        self._kept = frozenset(kept)

    def __getitem__(self, index: Any) -> tuple[Any, int]:
        index = self.indices[index]
        inputs, target = self.dataset[index]
        return inputs, _label(target) if index in self._kept else UNKNOWN

    def __getitems__(self, indices: list[int]) -> list[tuple[Any, int]]:
        return [self[i] for i in indices]  # Subset's own would go past __getitem__


def few_labels(data: Any, share: float, *, seed: int = 0) -> FewLabels:
    """The same samples, of which only a share of each class keeps its label: ``few_labels(data, 0.1)``.

    Args:
        data: a data set of (input, label) samples, label an int.
        share: of the labels to keep, 0 to 1; rounded for each class by itself, above 0 to one sample at least.
        seed: chooses whose labels are kept; with one seed, those of a smaller share are among those of a larger.

    Returns:
        The data set with hidden labels (−1), for `distill`. Its ``labelled`` is the labelled part alone, for `fit`.

    Raises:
        CompanionError: the share is not from 0 to 1.
    """
    if not (isinstance(share, int | float) and 0 <= share <= 1):
        raise CompanionError(f"share is {share}: give the share of the labels to keep, from 0 to 1.")
    members: dict[int, list[int]] = {}
    for i in permutation(len(data), seed):
        if (label := _label(data[i][1])) != UNKNOWN:
            members.setdefault(label, []).append(i)
    least = 1 if share > 0 else 0
    return FewLabels(data, [i for own in members.values() for i in own[: max(least, round(share * len(own)))]])


class _Numbered(Subset):
    """A data set's samples with int64 [label, row] as target, so that the row in the table of answers travels along."""

    def __init__(self, data: Any, classes: int | None = None, *, start: int = 0) -> None:
        super().__init__(data, range(len(data)))
        self.classes, self.start = classes, start

    def __getitem__(self, index: Any) -> tuple[Any, Tensor]:
        index = self.indices[index]
        inputs, target = self.dataset[index]
        label = _label(target)
        if self.classes is not None and label not in range(UNKNOWN, self.classes):
            raise CompanionError(
                f"sample {index} has the label {label}, but the networks have the classes 0 to {self.classes - 1}."
            )
        return inputs, torch.tensor([label, self.start + index])

    def __getitems__(self, indices: list[int]) -> list[tuple[Any, Tensor]]:
        return [self[i] for i in indices]


class _Answers(NamedTuple):
    """What student and teacher say of a batch."""

    student: Tensor  # [N, classes]
    teacher: Tensor | None  # [N, classes]; None if all its answers are in a table
    distance: Tensor | None  # mean squared difference of the features; None without


class _Lesson(nn.Module):
    """A student beside its teacher, as one network to train; its weights are the student's and the adapter's.

    Checks both on an example [1, …] of the data.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, example: Tensor, features: tuple[str, str] | None, seed: int
    ) -> None:
        super().__init__()
        self.student = student
        self.teacher = [teacher]  # in a list, where neither the optimiser nor a checkpoint finds it
        self.register_buffer("table", None, persistent=False)  # float32 [rows, classes]
        self.adapter: nn.Module = nn.Identity()
        self.seen: dict[str, Any] = {}  # the features of the student and of the teacher
        networks = {"student": student, "teacher": teacher}
        layers = dict(zip(networks, features or (), strict=False))
        self.hooks = [
            _layer(who, networks[who], name).register_forward_hook(partial(self._see, who))
            for who, name in layers.items()
        ]
        ours, theirs = (_try(who, network, example).shape[1] for who, network in networks.items())
        if ours != theirs:
            raise CompanionError(f"the student has {ours} classes, the teacher {theirs}: they must have the same.")
        self.classes = ours
        if features is not None:
            before, after = (_as_map(self.seen[who]).shape[1] for who in networks)
            if before != after:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(seed)
                    self.adapter = nn.Conv2d(before, after, kernel_size=1)

    table: Tensor | None

    def _see(self, who: str, _layer: nn.Module, _inputs: Any, output: Any) -> None:
        self.seen[who] = output

    def forward(self, inputs: Tensor) -> _Answers:
        ours = self.student(inputs)
        theirs = None
        if self.table is None:
            with torch.no_grad():
                theirs = self.teacher[0](inputs)
            _check_finite(theirs)
        return _Answers(ours, theirs, self._distance() if self.hooks else None)

    def _distance(self) -> Tensor:
        ours, theirs = self.adapter(_as_map(self.seen["student"])), _as_map(self.seen["teacher"])
        size = (min(ours.shape[2], theirs.shape[2]), min(ours.shape[3], theirs.shape[3]))
        return mse_loss(adaptive_avg_pool2d(ours, size).float(), adaptive_avg_pool2d(theirs, size).float())

    def taught(self, answers: _Answers, rows: Tensor) -> Tensor:
        """The teacher's logits [N, classes] for a batch with these answers and rows [N] of the table."""
        if answers.teacher is not None:
            return answers.teacher
        assert self.table is not None
        return self.table[rows]

    def forget(self) -> None:
        """Leave nothing in the student."""
        for hook in self.hooks:
            hook.remove()


class _Judge:
    """Share of the samples at whose label the highest output is; if one has no label, at the teacher's answer."""

    def __init__(self, lesson: _Lesson) -> None:
        self.lesson = lesson
        self.right = self.agreed = self.labelled = self.total = 0

    def update(self, answers: _Answers, targets: Tensor) -> None:
        labels, rows = targets.unbind(1)
        predictions = answers.student.argmax(1)
        self.right += int((predictions == labels).sum())
        self.agreed += int((predictions == self.lesson.taught(answers, rows).argmax(1)).sum())
        self.labelled += int((labels != UNKNOWN).sum())
        self.total += len(labels)

    def merge(self, other: "_Judge") -> None:
        for count in ("right", "agreed", "labelled", "total"):
            setattr(self, count, getattr(self, count) + getattr(other, count))

    def compute(self) -> dict[str, float]:
        if self.labelled == self.total:
            return {"accuracy": self.right / self.total}
        return {"agreement": self.agreed / self.total}


def _label(target: Any) -> int:
    return UNKNOWN if target is None else int(target)


def _layer(who: str, network: nn.Module, name: str) -> nn.Module:
    layers = dict(network.named_modules())
    if name not in layers:
        known = ", ".join(child for child, _ in network.named_children())
        raise CompanionError(f"the {who} has no layer {name!r}: name one of {known}, or of the layers in them.")
    return layers[name]


def _try(who: str, network: nn.Module, example: Tensor) -> Tensor:
    check_example(network, example)
    home = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    with torch.no_grad(), one_sentence(network, example, f"as the {who}"):
        logits = network(move(example, home))
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise CompanionError(f"the {who} must answer with scores [N, classes], not {found}.")
    _check_finite(logits, who)
    return logits


def _as_map(feature: Any) -> Tensor:
    """A feature as [N, C, H, W]; vectors [N, C] are maps of one pixel."""
    if not isinstance(feature, Tensor) or feature.dim() not in (2, 4):
        found = list(feature.shape) if isinstance(feature, Tensor) else type(feature).__name__
        raise CompanionError(f"features must be maps [N, C, H, W] or vectors [N, C], not {found}: name other layers.")
    return feature if feature.dim() == 4 else feature[:, :, None, None]


def _check_finite(logits: Tensor, who: str = "teacher") -> None:
    if not logits.isfinite().all():
        raise CompanionError(f"the {who} answers with numbers that are not finite: its weights or its inputs are bad.")


def _digest(tensors: Iterable[Tensor], about: str = "") -> str:
    found = hashlib.sha256(about.encode())
    for tensor in tensors:
        found.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _read(path: str | os.PathLike[str], origin: dict[str, str], samples: int) -> Tensor:
    again = "delete it, or name another file"
    try:
        with safe_open(path, framework="pt") as file:
            found = json.loads((file.metadata() or {})[FORMAT])
            logits: Tensor = file.get_tensor("logits").clone()
        different = [key for key, value in origin.items() if found[key] != value]
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise CompanionError(f"{path} is not a file of a teacher's answers or is damaged: {again}.") from error
    if different:
        raise CompanionError(f"{path} holds answers for another {different[0]}: {again}.")
    if logits.dim() != 2 or len(logits) != samples or logits.dtype != torch.float32:
        raise CompanionError(f"{path} is not a file of a teacher's answers or is damaged: {again}.")
    _check_finite(logits)
    return logits
