"""Number formats for the arithmetic of a training or inference step."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from companion.errors import CompanionError

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """Weights stay float32; matrix products and convolutions run in ``dtype``, chosen per operator by autocast."""

    name: str
    device: torch.device

    @classmethod
    def named(cls, name: str, device: torch.device) -> "Precision":
        """The precision called ``fp32``, ``bf16`` or ``fp16`` on a device.

        Raises:
            CompanionError: no such precision, or float16 without a GPU.
        """
        if name not in PRECISIONS:
            raise CompanionError(f"there is no precision {name!r}: choose one of {', '.join(PRECISIONS)}.")
        if name == "fp16" and device.type == "cpu":
            raise CompanionError("fp16 trains on a GPU only: on this CPU choose bf16, which keeps float32's range.")
        return cls(name, device)

    @property
    def pin_memory(self) -> bool:
        """Page-locked batches, which a CUDA GPU copies while it computes."""
        return self.device.type == "cuda"

    def autocast(self) -> AbstractContextManager:
        """The context for a forward pass and its loss."""
        dtype = PRECISIONS[self.name]
        return nullcontext() if dtype is torch.float32 else torch.autocast(self.device.type, dtype)

    def scaler(self) -> torch.amp.GradScaler:
        """Dynamic loss scaling, which only float16 needs: its smallest gradients would round to zero."""
        return torch.amp.GradScaler(self.device.type, enabled=self.name == "fp16")
