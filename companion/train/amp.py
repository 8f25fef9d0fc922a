"""Number formats for the arithmetic of a training or inference step: mixed precision (2.2.2).

After P. Micikevicius et al., Mixed Precision Training, ICLR 2018 (arXiv:1710.03740), and D. Kalamkar et al., A Study of
BFLOAT16 for Deep Learning Training, 2019 (arXiv:1905.12322).
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from companion.errors import CompanionError
from companion.train.device import pick_device

PRECISIONS = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Name → what autocast casts to. tf32 casts nothing: the GPU drops 13 of the 23 bits of a factor's fraction itself."""

FAST_SINCE = {"fp16": (7, 0), "tf32": (8, 0), "bf16": (8, 0)}
"""Compute capability of the first NVIDIA GPUs (V100, A100) whose tensor cores multiply such numbers."""

BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
"""As `torch.cpu.get_capabilities` calls those that multiply bfloat16 on x86 and on ARM."""


@dataclass(frozen=True)
class Precision:
    """Weights stay float32; matrix products and convolutions run in ``dtype``, chosen per operator by autocast.

    A run is inside `arithmetic`, backward pass included; each forward pass with its loss is inside `autocast`.
    """

    name: str
    device: torch.device

    @classmethod
    def named(cls, name: str, device: torch.device | str | None = None) -> "Precision":
        """The precision ``fp32``, ``tf32``, ``bf16`` or ``fp16`` on a device; None is a CUDA GPU or else the CPU.

        Raises:
            CompanionError: no such precision or device, float16 on a CPU, or TF32 on anything but a CUDA GPU.
        """
        device = device if isinstance(device, torch.device) else pick_device(device)
        if name not in PRECISIONS:
            raise CompanionError(f"there is no precision {name!r}: choose one of {', '.join(PRECISIONS)}.")
        if name == "fp16" and device.type == "cpu":
            raise CompanionError("fp16 trains on a GPU only: on this CPU choose bf16, which keeps float32's range.")
        if name == "tf32" and device.type != "cuda":
            raise CompanionError(
                f"tf32 is how NVIDIA GPUs multiply float32: on the device {device.type} choose fp32 or bf16."
            )
        return cls(name, device)

    @property
    def advice(self) -> str:
        """A sentence where this precision works but cannot pay, because nothing here computes in it; else empty."""
        if self.name == "fp32" or self.device.type not in ("cpu", "cuda"):
            return ""
        if self.device.type == "cpu":
            if bf16_instructions():
                return ""
            return "bf16 costs time on this CPU, which has no instructions for it: fp32 is faster."
        if torch.version.hip or torch.cuda.get_device_capability(self.device) >= FAST_SINCE[self.name]:
            return ""
        wanted = ".".join(map(str, FAST_SINCE[self.name]))
        return f"{self.name} saves no time on this GPU: its compute capability is below {wanted}, the first to have it."

    @property
    def pin_memory(self) -> bool:
        """Page-locked batches, which a CUDA GPU copies while it computes."""
        return self.device.type == "cuda"

    @contextmanager
    def arithmetic(self) -> Iterator[None]:
        """The context for a whole run: how a CUDA GPU multiplies float32, forward and backward; afterwards as before.

        Left alone, torch computes convolutions and LSTMs in TF32: here ``fp32`` is IEEE's.
        """
        if self.device.type != "cuda":
            yield
            return
        cudnn: Any = torch.backends.cudnn  # whose type hints leave these switches out
        switches: tuple[Any, ...] = (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn)
        before = [switch.fp32_precision for switch in switches]
        try:
            for switch in switches:
                switch.fp32_precision = "tf32" if self.name == "tf32" else "ieee"
            yield
        finally:
            for switch, value in zip(switches, before, strict=True):
                switch.fp32_precision = value

    def autocast(self) -> AbstractContextManager:
        """The context for a forward pass and its loss."""
        dtype = PRECISIONS[self.name]
        return nullcontext() if dtype is torch.float32 else torch.autocast(self.device.type, dtype)

    def scaler(self) -> torch.amp.GradScaler:
        """Dynamic loss scaling, which only float16 needs: its smallest gradients would round to zero.

        It is torch's, which looks at all gradients in one kernel; `LossScaler` does the same where one can read it.
        """
        return torch.amp.GradScaler(self.device.type, enabled=self.name == "fp16")


def bf16_instructions() -> bool:
    """Whether this CPU multiplies bfloat16 numbers; without, each is widened to float32 first."""
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in BF16_INSTRUCTIONS)


class LossScaler:
    """Dynamic loss scaling by hand: step for step what `torch.amp.GradScaler` does, for one optimizer, to be read.

    The loss times ``factor`` gives gradients times ``factor``, large enough for float16; they are divided again before
    the optimizer sees them. A gradient that overflowed costs that step and lowers the factor; after so many good steps
    in a row it is raised. Python looks at each gradient in turn, and a GPU has to wait each time: `fit` uses torch's.
    A training step is ``scaler.scale(loss).backward()``, ``scaler.step(optimizer)``, ``scaler.update()``.

    Source: Micikevicius et al., 2018, section 3.2; the defaults are torch's.
    """

    def __init__(
        self,
        init_scale: float = 2.0**16,
        *,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
    ) -> None:
        self.factor = _float32(init_scale)
        self.growth_factor, self.backoff_factor = growth_factor, backoff_factor
        self.growth_interval = growth_interval
        self.good_steps = 0
        """Since the factor last changed."""
        self._finite: bool | None = None  # not known before the gradients of a step are unscaled

    def scale(self, loss: Tensor) -> Tensor:
        """The loss to call ``backward`` on."""
        return loss * self.factor

    def unscale_(self, optimizer: Optimizer) -> None:
        """Divide the gradients; only needed to look at them, or clip them, between ``backward`` and `step`.

        Raises:
            CompanionError: they are divided already.
        """
        if self._finite is not None:
            raise CompanionError("these gradients are unscaled already: call update() after each step.")
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self._finite = all(bool(gradient.isfinite().all()) for gradient in gradients)
        for gradient in gradients:
            gradient.mul_(1 / self.factor)

    def step(self, optimizer: Optimizer) -> None:
        """The optimizer's step, unless a gradient is infinite or not a number."""
        if self._finite is None:
            self.unscale_(optimizer)
        if self._finite:
            optimizer.step()

    def update(self) -> None:
        """Choose the factor of the next step.

        Raises:
            CompanionError: no gradients were unscaled since the last time, or they overflow whatever the factor.
        """
        if self._finite is None:
            raise CompanionError("there is no step to learn from: call step() before update().")
        self.good_steps = self.good_steps + 1 if self._finite else 0
        if not self._finite:
            self.factor = _float32(self.factor * self.backoff_factor)
        elif self.good_steps == self.growth_interval:
            self.good_steps = 0
            grown = _float32(self.factor * self.growth_factor)
            self.factor = grown if grown < float("inf") else self.factor
        self._finite = None
        if not self.factor:
            raise CompanionError("the gradients overflow however small the loss is made: the network has diverged.")


def _float32(value: float) -> float:
    """The nearest float32, which is what torch keeps the factor in."""
    return torch.tensor(value, dtype=torch.float32).item()
