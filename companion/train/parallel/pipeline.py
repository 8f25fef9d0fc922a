"""Pipeline parallelism (2.2.1): a batch goes through the stages in microbatches, so that several compute at once.

At the beginning the last stages have nothing to do yet, at the end the first ones nothing more: the *bubble*. With p
stages and m microbatches that take equally long, every stage works for m of m + p - 1 turns.

GPipe sends all microbatches forward, then all back: a stage keeps the activations of m of them. 1F1B takes turns as
soon as it can: stage s (from 0) keeps those of p - s. The bubble is the same.

Sources: Y. Huang et al., GPipe: Efficient Training of Giant Neural Networks using Pipeline Parallelism, NeurIPS 2019;
D. Narayanan et al., PipeDream: Generalized Pipeline Parallelism for DNN Training, SOSP 2019 (1F1B), and Efficient
Large-Scale Language Model Training on GPU Clusters Using Megatron-LM, SC 2021, section 2.2 (the form used here).
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.autograd import Function

from companion.errors import CompanionError
from companion.train.parallel.launch import device

SCHEDULES = {"gpipe": "ScheduleGPipe", "1f1b": "Schedule1F1B"}


@dataclass(frozen=True)
class Event:
    """What one stage did with one microbatch, and when, in seconds."""

    stage: int
    kind: str
    """``forward`` or ``backward``."""
    microbatch: int
    start: float
    end: float


class Pipeline:
    """Trains one stage per worker, by torch.distributed.pipelining, and writes down what each did when.

    Every step takes batches of one size.

    Args:
        layers: this worker's; the group's ranks are the stages in their order (see `split`).
        microbatches: how many a batch is cut into.
        loss: ``loss(outputs, target)``, the mean over a microbatch; gradients are those of the mean over the batch.
        schedule: ``gpipe`` or ``1f1b``.
        group: the workers, by default all.

    Raises:
        CompanionError: no such schedule, or too few microbatches for it.
    """

    events: list[Event]
    """What this worker did in the last step; `timeline` joins those of all."""

    def __init__(
        self,
        layers: nn.Module,
        microbatches: int,
        loss: Callable[[Tensor, Tensor], Tensor],
        *,
        schedule: str = "1f1b",
        group: Any = None,
    ) -> None:
        from torch.distributed import pipelining  # takes a second

        stages = distributed.get_world_size(group)
        if schedule not in SCHEDULES:
            raise CompanionError(f"there is no schedule {schedule!r}: choose {' or '.join(SCHEDULES)}.")
        if microbatches < (stages if schedule == "1f1b" else 1):
            raise CompanionError(f"{microbatches} microbatches are too few for {stages} stages of {schedule}.")
        self.microbatches = microbatches
        self.events = []
        self._stage = pipelining.PipelineStage(layers, distributed.get_rank(group), stages, device(), group=group)
        for kind in ("forward", "backward"):
            setattr(self._stage, f"{kind}_one_chunk", self._recorded(kind))
        self._schedule = getattr(pipelining, SCHEDULES[schedule])(self._stage, microbatches, loss_fn=loss)

    def step(self, x: Tensor | None = None, target: Tensor | None = None) -> Tensor | None:
        """Forward and backward; gradients are added to those that are there.

        Args:
            x: the batch [N, …]; the first stage needs it, others ignore it. The microbatches divide N.
            target: [N, …]; the last stage needs it, others ignore it.

        Returns:
            The mean loss on the last stage, None on others.

        Raises:
            CompanionError: a batch is missing, or cannot be cut into the microbatches.
        """
        first, last = self._stage.is_first, self._stage.is_last
        for needed, batch, name in ((first, x, "x"), (last, target, "target")):
            if needed and batch is None:
                raise CompanionError(f"the {'first' if name == 'x' else 'last'} stage needs {name}.")
            if needed and batch is not None and len(batch) % self.microbatches:
                raise CompanionError(
                    f"a batch of {len(batch)} cannot be cut into {self.microbatches} microbatches: choose a divisor."
                )
        self.events.clear()
        losses: list[Tensor] = []
        self._schedule.step(
            *([x] if first else []), target=target if last else None, losses=losses, return_outputs=False
        )
        return torch.stack(losses).mean().detach() if last else None

    def _recorded(self, kind: str) -> Callable[..., Any]:
        compute = getattr(self._stage, f"{kind}_one_chunk")

        @wraps(compute)
        def recorded(microbatch: int, *arguments: Any, **options: Any) -> Any:
            start = self._now()
            result = compute(microbatch, *arguments, **options)
            self.events.append(Event(self._stage.stage_index, kind, microbatch, start, self._now()))
            return result

        return recorded

    def _now(self) -> float:
        if self._stage.device.type == "cuda":
            torch.cuda.synchronize(self._stage.device)
        return time.perf_counter()  # one clock for all processes of a machine


def timeline(workers: Iterable[Iterable[Event]]) -> list[Event]:
    """The events of all workers of one machine in order, in seconds since the first of them began."""
    events = sorted((event for events in workers for event in events), key=lambda event: event.start)
    return [replace(e, start=e.start - events[0].start, end=e.end - events[0].start) for e in events]


def measured_bubble(events: list[Event]) -> float:
    """The share of the stages' time, from the first event's begin to the last one's end, in which they did nothing."""
    stages = {event.stage for event in events}
    span = max(event.end for event in events) - min(event.start for event in events)
    return 1 - sum(event.end - event.start for event in events) / (len(stages) * span)


def ideal_bubble(stages: int, microbatches: int) -> float:
    """(p - 1) / (m + p - 1): that share if all stages take equally long and sending takes no time."""
    return (stages - 1) / (microbatches + stages - 1)


def in_flight(events: list[Event]) -> dict[int, int]:
    """By stage, the most microbatches whose activations it kept at once: gone forward, and not yet back."""
    most: dict[int, int] = {}
    for stage in sorted({event.stage for event in events}):
        own = sorted((event for event in events if event.stage == stage), key=lambda event: event.start)
        kept = most[stage] = 0
        for event in own:
            kept += 1 if event.kind == "forward" else -1
            most[stage] = max(most[stage], kept)
    return most


class Wait(nn.Module):
    """Hands its input on after some seconds: a layer that an accelerator computes, played without one.

    While it waits it needs no CPU, so that a pipeline of these shows its schedule on any machine, busy ones too.
    """

    def __init__(self, forward: float, backward: float) -> None:
        super().__init__()
        self.seconds = forward, backward

    def forward(self, x: Tensor) -> Tensor:
        return _Wait.apply(x, *self.seconds)


class _Wait(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: float, backward: float) -> Tensor:
        ctx.seconds = backward
        time.sleep(forward)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        time.sleep(ctx.seconds)
        return gradients[0], None, None
