"""Data parallel by hand: each worker has the whole network and its share of the batch; gradients are averaged (2.2.1).

A step, which is written alike for every worker::

    loss = cross_entropy(model(inputs), targets) * loss_weight(len(inputs))
    loss.backward()
    average_gradients(model)
    optimizer.step()

``DistributedDataParallel(model)`` replaces `broadcast_model` and `average_gradients`, and sends while the backward pass
still computes. ``all_reduce`` is everywhere a function that adds up a tensor over the workers in place, such as
torch.distributed's, our `ring_all_reduce`, or Horovod's.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.autograd.function import Function
from torch.nn.modules.batchnorm import _BatchNorm

from companion.errors import CompanionError
from companion.train.parallel.launch import device

AllReduce = Callable[[Tensor], Any]


def broadcast_model(model: nn.Module) -> None:
    """Give every worker the parameters and buffers of worker 0, in place: from equal weights all go equal ways."""
    for tensor in (*model.parameters(), *model.buffers()):
        values = tensor.detach().contiguous()
        distributed.broadcast(values, src=0)
        tensor.detach().copy_(values)


def average_gradients(model: nn.Module, *, all_reduce: AllReduce = distributed.all_reduce) -> None:
    """Replace each parameter's gradient by its mean over all workers, in one message.

    A parameter without a gradient on this worker counts as zeros. With losses that were multiplied by `loss_weight`,
    the mean is the gradient of the whole batch.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    one = torch.ones(1, device=gradients[0].device)  # the sum of these is the number of workers
    bucket = torch.cat([*(gradient.reshape(-1) for gradient in gradients), one])
    all_reduce(bucket)
    means = (bucket[:-1] / bucket[-1]).split([p.numel() for p in parameters])
    for parameter, mean in zip(parameters, means, strict=True):
        parameter.grad = mean.view_as(parameter).to(parameter.dtype)


def loss_weight(samples: int, *, all_reduce: AllReduce = distributed.all_reduce) -> float:
    """What to multiply this worker's mean loss by, so that the mean over workers is the mean over all samples.

    It is 1 for equal shares. It has to be the loss: to weight the gradients afterwards is the same only as long as
    no layer joins the samples of several workers, as `synchronized_batch_norm` does.

    Args:
        samples: how many this worker's loss is the mean of; 0 for one that has none, whose loss must then be a sum.

    Raises:
        CompanionError: no worker has a sample.
    """
    where = device() if distributed.is_initialized() else None
    counts = torch.tensor([samples, 1], dtype=torch.float64, device=where)
    all_reduce(counts)
    total, workers = counts.tolist()
    if not total:
        raise CompanionError("no worker has a sample: give at least one of them a share of the batch.")
    return samples * workers / total


@contextmanager
def synchronized_batch_norm(model: nn.Module, *, all_reduce: AllReduce = distributed.all_reduce) -> Iterator[None]:
    """In here, batch normalisation in training mode uses the statistics of all workers' samples, as if on one.

    The modules of ``model`` become synchronised ones for as long as the context lasts, and stay the same objects with
    the same parameters, buffers and names; afterwards they are what they were. In evaluation mode nothing is sent.
    The workers may have different numbers of samples, but must run the same layers in the same order, also those who
    have none. ``DistributedDataParallel`` may be wrapped around it inside or outside.

    `torch.nn.SyncBatchNorm` does the same on GPUs with kernels of its own, and refuses CPUs.

    Raises:
        CompanionError: a kind of batch normalisation that is not torch's plain one, or that has not seen its input yet.

    Source: Ioffe and Szegedy, Batch Normalization, 2015; over workers, Peng et al., MegDet, 2018, section 3.3.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    for name, module in found.items():
        if type(module) not in _SYNCHRONIZED:
            raise CompanionError(
                f"{name or 'the network'} is a {type(module).__name__}: BatchNorm1d, 2d and 3d can be synchronised."
            )
    plain = {module: type(module) for module in found.values()}
    try:
        for module, kind in plain.items():
            module.__class__ = _SYNCHRONIZED[kind]
            module.all_reduce = all_reduce  # type: ignore[assignment]
        yield
    finally:
        for module, kind in plain.items():
            module.__class__ = kind
            module.__dict__.pop("all_reduce", None)


class _Sum(Function):
    """The sum over all workers, differentiable.

    Each worker's loss depends on the sum, and so on every worker's values: their gradient is the sum of all gradients.
    """

    @staticmethod
    def forward(context: Any, values: Tensor, all_reduce: AllReduce) -> Tensor:
        context.all_reduce = all_reduce
        total = values.clone()
        all_reduce(total)
        return total

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.clone(memory_format=torch.contiguous_format)
        context.all_reduce(total)
        return total, None


class _Synchronized(_BatchNorm):
    all_reduce: AllReduce

    def forward(self, inputs: Tensor) -> Tensor:
        """[N, channels, …] → the same shape, dtype and memory layout."""
        if not self.training:
            return super().forward(inputs)
        self._check_input_dim(inputs)
        x = inputs.float() if inputs.dtype in (torch.float16, torch.bfloat16) else inputs
        others = [axis for axis in range(x.dim()) if axis != 1]
        shape = [1, -1] + [1] * (x.dim() - 2)
        own = x.numel() // x.shape[1]

        # Two messages: the mean, then the squared deviations from it. In one, E[x²] - E[x]² would lose all its digits
        # where the mean is large.
        sums = _Sum.apply(torch.cat([x.sum(others), x.new_full((1,), own)]), self.all_reduce)
        count, mean = sums[-1].detach(), sums[:-1] / sums[-1].detach()
        if own < 2 and count < 2:  # the first alone spares a GPU the wait for the second
            raise CompanionError("batch normalisation needs more than one value per channel over all workers.")
        centred = x - mean.view(shape)
        variance = _Sum.apply((centred * centred).sum(others), self.all_reduce) / count
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            self._track(mean.detach(), variance.detach() * (count / (count - 1)))

        scale = (variance + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight
        out = centred * scale.view(shape)
        if self.bias is not None:
            out = out + self.bias.view(shape)
        return out.to(inputs.dtype)

    def _track(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        momentum = self.momentum or 0.0
        if self.num_batches_tracked is not None:
            self.num_batches_tracked += 1
            if self.momentum is None:
                momentum = 1 / int(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), momentum)


class SynchronizedBatchNorm1d(_Synchronized, nn.BatchNorm1d):
    """See `synchronized_batch_norm`."""


class SynchronizedBatchNorm2d(_Synchronized, nn.BatchNorm2d):
    """See `synchronized_batch_norm`."""


class SynchronizedBatchNorm3d(_Synchronized, nn.BatchNorm3d):
    """See `synchronized_batch_norm`."""


_SYNCHRONIZED: dict[type[nn.Module], type[_Synchronized]] = {
    nn.BatchNorm1d: SynchronizedBatchNorm1d,
    nn.BatchNorm2d: SynchronizedBatchNorm2d,
    nn.BatchNorm3d: SynchronizedBatchNorm3d,
}
