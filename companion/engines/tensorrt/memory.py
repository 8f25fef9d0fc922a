"""Memory of the GPU by whichever package is there: torch, NVIDIA's cuda-python, or pycuda, which the book uses.

All three share the GPU's primary context, the one that every other library of the process uses, too: what one
allocates the other can read. (`pycuda.autoinit`, as in the book, makes a context of its own, in which neither torch
nor a second thread finds its memory.)
"""

import ctypes
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from companion.engines.base import reason
from companion.errors import CompanionError


@dataclass(frozen=True)
class Buffer:
    """As many bytes on the GPU as in the host's memory, from and to which they are copied."""

    address: int
    """On the GPU."""
    host: np.ndarray
    """uint8 [bytes]; page-locked, or copies would make the program wait."""
    held: Any
    """What the package knows them by."""


class Memory(Protocol):
    """Memory of one GPU and a stream, on which copies and computation run one after the other.

    Used by one thread at a time, always within `active`.
    """

    stream: int
    """Handle of the stream, not the default one."""

    def active(self) -> AbstractContextManager[Any]:
        """Makes the GPU's context this thread's while the block runs."""

    def allocate(self, size: int) -> Buffer:
        """A buffer of ``size`` bytes, from 1."""

    def upload(self, buffer: Buffer, size: int) -> None:
        """Have the first ``size`` bytes copied to the GPU."""

    def download(self, buffer: Buffer, size: int) -> None:
        """Have the first ``size`` bytes copied from the GPU."""

    def synchronize(self) -> None:
        """Wait until everything on the stream is done."""

    def free(self, buffer: Buffer) -> None:
        """Give a buffer back; nothing on the stream may still use it."""

    def close(self) -> None:
        """Give the stream back, after all buffers."""


class TorchMemory:
    """By torch, from the blocks that it keeps for its tensors."""

    def __init__(self) -> None:
        import torch

        if not torch.cuda.is_available():
            raise CompanionError("this torch has no GPU.")
        self._torch = torch
        self._stream: Any = torch.cuda.Stream()
        self.stream: int = self._stream.cuda_stream

    def active(self) -> AbstractContextManager[Any]:
        # Blocks are reused in the order of the stream on which they were allocated, so it must be this one.
        return self._torch.cuda.stream(self._stream)

    def allocate(self, size: int) -> Buffer:
        device = self._torch.empty(size, dtype=self._torch.uint8, device="cuda")
        host = self._torch.empty(size, dtype=self._torch.uint8, pin_memory=True)
        return Buffer(device.data_ptr(), host.numpy(), [device, host])

    def upload(self, buffer: Buffer, size: int) -> None:
        device, host = buffer.held
        device[:size].copy_(host[:size], non_blocking=True)

    def download(self, buffer: Buffer, size: int) -> None:
        device, host = buffer.held
        host[:size].copy_(device[:size], non_blocking=True)

    def synchronize(self) -> None:
        self._stream.synchronize()

    def free(self, buffer: Buffer) -> None:
        buffer.held.clear()

    def close(self) -> None:
        self._stream = None


class CudaPythonMemory:
    """By CUDA's runtime library, through NVIDIA's package cuda-python."""

    def __init__(self) -> None:
        from cuda.bindings import runtime

        self._cuda = runtime
        self._stream = self._done(runtime.cudaStreamCreateWithFlags(runtime.cudaStreamNonBlocking))
        self.stream = int(self._stream)

    def _done(self, answer: tuple[Any, ...]) -> Any:
        """The value that a call returned behind its error code."""
        error, *values = answer
        if int(error) != 0:
            _, text = self._cuda.cudaGetErrorString(error)
            raise CompanionError(f"CUDA fails: {text.decode() if isinstance(text, bytes) else text}.")
        return values[0] if values else None

    def active(self) -> AbstractContextManager[Any]:
        return nullcontext()  # the runtime library makes the primary context current in each thread by itself

    def allocate(self, size: int) -> Buffer:
        device = self._done(self._cuda.cudaMalloc(size))
        try:
            host = self._done(self._cuda.cudaMallocHost(size))
        except BaseException:
            self._cuda.cudaFree(device)
            raise
        array = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(int(host)))
        return Buffer(int(device), array, (device, host))

    def upload(self, buffer: Buffer, size: int) -> None:
        device, host = buffer.held
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._done(self._cuda.cudaMemcpyAsync(device, host, size, kind, self._stream))

    def download(self, buffer: Buffer, size: int) -> None:
        device, host = buffer.held
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._done(self._cuda.cudaMemcpyAsync(host, device, size, kind, self._stream))

    def synchronize(self) -> None:
        self._done(self._cuda.cudaStreamSynchronize(self._stream))

    def free(self, buffer: Buffer) -> None:
        device, host = buffer.held
        self._done(self._cuda.cudaFree(device))
        self._done(self._cuda.cudaFreeHost(host))

    def close(self) -> None:
        self._done(self._cuda.cudaStreamDestroy(self._stream))


class PycudaMemory:
    """By CUDA's driver, through pycuda.

    As `pycuda.autoprimaryctx` does it, but in each thread that computes: that module makes the context current in the
    thread that imports it, and for good.
    """

    def __init__(self) -> None:
        from pycuda import driver

        driver.init()
        self._driver = driver
        # One object for each memory: pycuda has them belong to a thread, unless they are pushed where they are used.
        self._context = driver.Device(0).retain_primary_context()
        with self.active():
            self._stream = driver.Stream()
        self.stream: int = self._stream.handle

    @contextmanager
    def active(self) -> Iterator[None]:
        self._context.push()
        try:
            yield
        finally:
            self._context.pop()

    def allocate(self, size: int) -> Buffer:
        device = self._driver.mem_alloc(size)
        host = self._driver.pagelocked_empty(size, np.uint8)
        return Buffer(int(device), host, (device, host))

    def upload(self, buffer: Buffer, size: int) -> None:
        self._driver.memcpy_htod_async(buffer.address, buffer.host[:size], self._stream)

    def download(self, buffer: Buffer, size: int) -> None:
        self._driver.memcpy_dtoh_async(buffer.host[:size], buffer.address, self._stream)

    def synchronize(self) -> None:
        self._stream.synchronize()

    def free(self, buffer: Buffer) -> None:
        device, host = buffer.held
        device.free()
        host.base.free()

    def close(self) -> None:
        del self._stream


MEMORIES: dict[str, Any] = {"torch": TorchMemory, "cuda-python": CudaPythonMemory, "pycuda": PycudaMemory}


def open_memory(name: str | None = None) -> Memory:
    """Memory by this package, or by the first of `MEMORIES` that works here.

    Raises:
        CompanionError: there is none, or it does not work here.
    """
    if name is not None and name not in MEMORIES:
        raise CompanionError(f"there is no memory {name!r}: choose one of {', '.join(MEMORIES)}.")
    failed = []
    for each in [name] if name else MEMORIES:
        try:
            made: Memory = MEMORIES[each]()
            return made
        except Exception as error:  # of packages that are missing, or that find no driver
            failed.append(f"{each}: {reason(error)}")
    raise CompanionError(f"no memory of the GPU can be had ({'; '.join(failed)}).")
