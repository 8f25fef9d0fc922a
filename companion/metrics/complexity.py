"""What a network costs before any clock runs: parameters, MACs, FLOPs, bytes (2.4.1).

`companion.units` defines the terms.
"""

import os
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count, sdpa_backward_flop_count, sdpa_flop_count

from companion.errors import CompanionError
from companion.metrics import probe
from companion.units import FLOPS_PER_MAC


class UncountedWarning(UserWarning):
    """A count left something out."""


@dataclass(frozen=True)
class Cost:
    """Work of a network, of one of its modules or of one kind of operator."""

    macs: int = 0
    """Multiply–adds of matrix products, convolutions and attention."""
    bytes_moved: int = 0
    """Bytes that the operators read and write if each takes its operands from memory and puts its result there."""

    @property
    def flops(self) -> int:
        """Floating-point operations: twice the MACs."""
        return FLOPS_PER_MAC * self.macs

    @property
    def intensity(self) -> float:
        """Arithmetic intensity: FLOPs for each byte moved (Williams, Waterman and Patterson, 2009)."""
        return self.flops / self.bytes_moved if self.bytes_moved else 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.macs + other.macs, self.bytes_moved + other.bytes_moved)


@dataclass(frozen=True)
class Complexity:
    """What `count_complexity` counted."""

    total: Cost
    parameters: int
    by_module: dict[str, Cost]
    """Cost of the forward pass by dotted name, in the order in which modules first ran: a parent's includes its
    children's, and a module called twice counts twice. Modules without an operator (Identity) are left out; one that
    stands in several places goes by one of its names."""
    by_operator: dict[str, Cost]
    """Cost by operator as PyTorch names it, the most MACs first."""
    uncounted: tuple[str, ...] = ()
    """Operators whose work is unknown, and where: ``fc: quantized::linear``. Not empty: the counts are too low."""
    training: bool = False
    """Total and operators are those of one forward and backward pass, not of a forward pass."""

    @property
    def macs(self) -> int:
        return self.total.macs

    @property
    def flops(self) -> int:
        return self.total.flops

    @property
    def bytes_moved(self) -> int:
        return self.total.bytes_moved

    @property
    def intensity(self) -> float:
        return self.total.intensity


def count_parameters(model: nn.Module, *, trainable_only: bool = False) -> int:
    """Number of parameters, a shared (tied) one counted once; buffers, such as BatchNorm's averages, are none."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable_only)


def model_bytes(path_or_model: str | os.PathLike[str] | nn.Module) -> int:
    """Bytes of a file on disk, or of a network's state: its parameters and buffers, shared memory counted once.

    The two differ by the file's header and by buffers that are not saved. For a compressed network the
    file is the figure to quote: a state may keep float copies beside the packed weights.

    Raises:
        CompanionError: there is no such file.
    """
    if isinstance(path_or_model, nn.Module):
        probe.check_shapes(path_or_model)
        # The state has what quantised layers pack away, the buffers what is not saved.
        state = probe.tensors_in([*path_or_model.parameters(), *path_or_model.buffers(), path_or_model.state_dict()])
        parts = [part for tensor in state for part in _dense(tensor)]
        storages = [part.untyped_storage() for part in parts]
        # By identity, not by address: on the meta device every address is zero.
        return sum({storage._cdata: storage.nbytes() for storage in storages}.values())
    path = Path(path_or_model)
    if not path.is_file():
        raise CompanionError(f"there is no file {path}.")
    return path.stat().st_size


def _dense(tensor: Tensor) -> tuple[Tensor, ...]:
    """The dense tensors that a sparse one consists of."""
    if tensor.layout is torch.sparse_coo:
        return tensor._indices(), tensor._values()
    if tensor.layout is torch.sparse_csr:
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    return (tensor,)


def count_macs(model: nn.Module, example: Any, *, training: bool = False) -> int:
    """Multiply–adds of one forward pass on ``example``; arguments and errors are those of `count_complexity`.

    Warns:
        UncountedWarning: an operator was left out, because nobody knows its work.
    """
    return _total(model, example, training).macs


def count_flops(model: nn.Module, example: Any, *, training: bool = False) -> int:
    """Floating-point operations of one forward pass on ``example``: twice what `count_macs` returns.

    Warns:
        UncountedWarning: an operator was left out, because nobody knows its work.
    """
    return _total(model, example, training).flops


def _total(model: nn.Module, example: Any, training: bool) -> Cost:
    found = count_complexity(model, example, training=training)
    if found.uncounted:
        warnings.warn(f"the count leaves out {'; '.join(found.uncounted)}", UncountedWarning, stacklevel=3)
    return found.total


def count_complexity(model: nn.Module, example: Any, *, training: bool = False) -> Complexity:
    """Count the work of one pass of ``model`` over ``example``, for the whole batch.

    The pass runs on a copy on torch's ``meta`` device: no weights are copied, nothing is computed, and fused kernels
    (attention, LSTM) come apart into the matrix products that they are made of; on a CPU they hide them. Attention is
    counted in full, also where a causal mask makes half of it superfluous. Operators come from
    `torch.utils.flop_counter`, with the few that it lacks added here. A network with a custom operator that has no rule
    for shapes runs once on its own device instead.

    Args:
        model: in any mode, on any device (``meta`` too: a network larger than the memory); it is not changed.
        example: a tensor, a tuple of the network's positional arguments, or a dict of its arguments by name. Only
            shapes and dtypes matter.
        training: count the backward pass too, from the sum of the outputs: in all about 3 × the forward MACs, less
            where an input needs no gradient.

    Raises:
        CompanionError: the network does not run on such an example, or what it computes depends on values, which
            ``meta`` does not have.
    """
    probe.check_example(model, example)
    ledger = _Ledger()
    tensors = [*model.parameters(), *probe.tensors_in(example)]
    scripted = isinstance(model, torch.jit.ScriptModule)  # knows the device of its weights
    try:
        with (
            probe.one_sentence(model, example, "on the meta device (shapes, no values)"),
            probe.undrawn(model),
            torch.inference_mode(False),
        ):
            if scripted:
                raise CompanionError("a compiled network cannot be moved.")
            twin = probe.on_meta(model).train(training)
            with torch.device("meta"):  # for tensors that the forward pass makes itself
                _pass(twin, probe.copied(example, "meta"), ledger, training)
    except CompanionError:
        if not (ledger.failed_outside_torch or scripted) or any(tensor.is_meta for tensor in tensors):
            raise
        with (
            probe.one_sentence(model, example, "as it is"),
            _plain_kernels(),
            probe.borrowed(model, training=training),
        ):
            _pass(model, probe.copied(example), ledger, training)
    return ledger.result(model, training)


def _pass(model: nn.Module, example: Any, ledger: "_Ledger", training: bool) -> None:
    with torch.set_grad_enabled(training), probe.separate_layers(), ledger.open():
        outputs = probe.tensors_in(probe.call(model, example))
        ledger.end_of_forward()
        if not training:
            return
        outputs = [output for output in outputs if output.grad_fn is not None]
        wanted = [tensor for tensor in (*model.parameters(), *probe.tensors_in(example)) if tensor.requires_grad]
        if not outputs:
            raise CompanionError("no output of the network needs a gradient, so there is no backward pass to count.")
        # Returned, not stored: the weights may be the user's own.
        torch.autograd.grad(outputs, wanted, [torch.ones_like(output) for output in outputs], allow_unused=True)


class _Ledger(TorchDispatchMode):
    """Sees every operator: `FlopCounterMode` knows its FLOPs, this the bytes it moves and whether its FLOPs are known.

    Lies below the counter, which takes composite operators apart first.
    """

    def __init__(self) -> None:
        super().__init__()
        self.failed_outside_torch = False

    @contextmanager
    def open(self) -> Iterator[None]:
        self.counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
        self.moved: dict[str, int] = defaultdict(int)  # bytes by module, in the counter's words
        self.moved_by_operator: dict[Any, int] = defaultdict(int)
        self.unknown: dict[str, None] = {}  # an ordered set
        with self, self.counter:
            yield

    def end_of_forward(self) -> None:
        # In the backward pass the counter takes work of one module for that of others, so modules end here.
        flops = self.counter.get_flop_counts()
        self.by_module = {  # the counter's names begin with the class of the whole network
            key.partition(".")[2]: Cost(sum(flops.get(key, {}).values()) // FLOPS_PER_MAC, moved)
            for key, moved in self.moved.items()
            if "." in key
        }

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            out = function(*args, **(kwargs or {}))
        except Exception:
            self.failed_outside_torch = function.namespace not in _TORCH
            raise
        operator, read = function.overloadpacket, tree_leaves((args, kwargs))
        modules = sorted(self.counter.mod_tracker.parents - {"Global"}, key=len)
        moved = _moved(function, read, tree_leaves(out))
        self.moved_by_operator[operator] += moved
        for module in ("Global", *modules):
            self.moved[module] += moved
        tensors = any(isinstance(leaf, Tensor) for leaf in (*read, *tree_leaves(out)))
        if tensors and operator not in self.counter.flop_registry and _may_multiply(function):
            where = modules[-1].partition(".")[2] if modules else ""
            self.unknown[f"{where}: {_name(operator)}".removeprefix(": ")] = None
        return out

    def result(self, model: nn.Module, training: bool) -> Complexity:
        flops = self.counter.get_flop_counts().get("Global", {})
        operators = {
            _name(operator): Cost(flops.get(operator, 0) // FLOPS_PER_MAC, moved)
            for operator, moved in self.moved_by_operator.items()
        }
        return Complexity(
            total=sum(operators.values(), Cost()),
            parameters=count_parameters(model),
            by_module=self.by_module,
            by_operator=dict(sorted(operators.items(), key=lambda item: -item[1].macs)),
            uncounted=tuple(self.unknown),
            training=training,
        )


_TORCH = ("aten", "prims", "prim", "profiler", "c10d", "_c10d_functional")
# Make or relabel tensors without touching their memory, though their schema does not call them views.
_FREE = {"_unsafe_view", "_reshape_alias", "lift_fresh", "detach", "empty", "empty_like", "empty_strided", "new_empty"}
_FREE |= {"empty_permuted", "new_empty_strided"}
# Read as many elements as they give, not the whole of their first argument.
_GATHERS = {"embedding", "index_select", "gather", "index", "take"}
# Write their first argument without reading it.
_WRITES = {"copy_", "fill_", "zero_", "uniform_", "normal_"}


def _moved(function: Any, read: list[Any], written: list[Any]) -> int:
    """Bytes that an operator reads and writes."""
    name = function.__name__.split(".")[0]
    if function.is_view or name in _FREE:
        return 0
    out = sum(map(_bytes, written))
    if name in _GATHERS:
        return 2 * out + sum(_bytes(leaf) for leaf in read[1:])
    if name in _WRITES:
        read = read[1:]
    return out + sum(map(_bytes, {id(leaf): leaf for leaf in read}.values()))


def _bytes(leaf: Any) -> int:
    """Memory behind a tensor: an expanded one has more elements than memory."""
    if not isinstance(leaf, Tensor):
        return 0
    size = leaf.numel() * leaf.element_size()
    return min(size, leaf.untyped_storage().nbytes()) if leaf.layout is torch.strided else size


def _name(operator: Any) -> str:
    return operator._qualified_op_name


# Parts of the names of operators that multiply matrices inside. One of torch's own without a formula and with such a
# name is reported, as is every operator from elsewhere; sums, norms and the like count as nothing by definition.
_PRODUCTS = re.compile(
    r"(^|_)(b?mm|addb?mm|baddbmm|mv|matmul|linear|trilinear|conv|convolution|conv[123]d|rnn|lstm|gru|attention|"
    r"encoder|decoder|fft|linalg|c?dist|pdist|cholesky|ormqr|geqrf|triangular|sspaddmm|hspmm)(_|$)"
)
_NOT_PRODUCTS = (
    "_thnn_fused_lstm_cell",
    "_thnn_fused_gru_cell",
    "linalg_vector_norm",
    "linalg_cross",
    "_linalg_check_errors",
)


def _may_multiply(function: Any) -> bool:
    name = function.__name__.split(".")[0]
    if function.namespace not in _TORCH:
        return True
    return bool(_PRODUCTS.search(name)) and not name.startswith(_NOT_PRODUCTS)


def _matrix_vector(matrix: Any, vector: Any, *_: Any, **__: Any) -> int:
    return FLOPS_PER_MAC * matrix[0] * matrix[1]


def _vectors(a: Any, b: Any, *_: Any, **__: Any) -> int:
    return FLOPS_PER_MAC * a[0]


def _packed(x: Any, weight: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    return FLOPS_PER_MAC * x[0] * x[1] * out_shape[-1]


def _convolution_backward(
    gradient: Any,
    x: Any,
    weight: Any,
    _bias: Any,
    _stride: Any,
    _pad: Any,
    _dilation: Any,
    transposed: bool,
    *rest: Any,
    **__: Any,
) -> int:
    """Each gradient asked for costs what the forward pass did; torch's own formula forgets that groups share."""
    _output_padding, _groups, wanted = rest
    return conv_flop_count(x, weight, gradient, transposed=transposed) * sum(wanted[:2])


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


# What torch's registry lacks or has wrong. Each takes the shapes of the operator's arguments.
_FORMULAS: dict[Any, Callable[..., int]] = {
    torch.ops.aten.mv: _matrix_vector,
    torch.ops.aten.addmv: lambda _bias, matrix, vector, *_, **__: _matrix_vector(matrix, vector),
    torch.ops.aten.dot: _vectors,
    torch.ops.aten.vdot: _vectors,
    torch.ops.aten._int_mm: _packed,
    torch.ops.aten._weight_int8pack_mm: _packed,
    torch.ops.aten.convolution_backward: _convolution_backward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


@contextmanager
def _plain_kernels() -> Iterator[None]:
    """Have a real device take attention and LSTMs apart as the meta device does."""
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
        warnings.simplefilter("ignore")  # the switch sets one for Intel's GPUs, too, and warns if there are none
        with torch.backends.mkldnn.flags(enabled=False), torch.backends.cudnn.flags(enabled=False):
            yield
