"""What a task adds to the training loop: how samples become a batch, its loss, and its score."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import ConcatDataset, Subset, default_collate

from companion.errors import CompanionError


class Meter(Protocol):
    """Gathers a score batch by batch, so that it is exact over the whole data set (not a mean of batch means)."""

    def update(self, outputs: Any, targets: Any) -> None: ...

    def compute(self) -> dict[str, float]:
        """Scores by name, higher is better; the first one chooses the best weights."""
        ...


class Accuracy:
    """Share of the samples [N, classes] whose highest output is at the label [N]."""

    def __init__(self) -> None:
        self.right = self.total = 0

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        self.right += int((outputs.argmax(1) == targets).sum())
        self.total += len(targets)

    def compute(self) -> dict[str, float]:
        return {"accuracy": self.right / self.total}


def _classification_loss(model: nn.Module, outputs: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(outputs, targets)


@dataclass(frozen=True)
class Task:
    """One row of the table below."""

    collate: Callable[[list[Any]], tuple[Any, Any]]
    """Samples of the data set → (inputs, targets) of a batch."""
    loss: Callable[[nn.Module, Any, Any], Tensor]
    """(network, outputs, targets) → mean loss of the batch; the network, because a detector brings its own."""
    meter: Callable[[], Meter]


TASKS = {"classify": Task(default_collate, _classification_loss, Accuracy)}


def attribute(data: Any, name: str, default: Any = None) -> Any:
    """What a data set says of itself, such as its ``labels``; torch's Subset and ConcatDataset say what is in them."""
    while not hasattr(data, name) and isinstance(data, Subset | ConcatDataset):
        data = data.dataset if isinstance(data, Subset) else data.datasets[0]
    return getattr(data, name, default)


def task_of(data: Any) -> Task:
    """The task that a data set names in its ``task`` attribute; one without is taken for classification.

    Raises:
        CompanionError: no such task.
    """
    name = attribute(data, "task", "classify")
    if name not in TASKS:
        raise CompanionError(f"there is no task {name!r}: the data set must be for one of {', '.join(TASKS)}.")
    return TASKS[name]
