"""The modules ``cuda.bindings.runtime`` and ``pycuda.driver`` on the GPU of `fake_gpu`: what of them is used."""

import ctypes
import threading
from enum import IntEnum
from types import SimpleNamespace

import numpy as np


class Kind(IntEnum):
    cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost = 1, 2


def runtime(gpu, fails=""):
    """``cuda.bindings.runtime``: each call returns an error code first; the one named in ``fails`` fails."""
    pinned = {}

    def answers(function):
        def call(*arguments):
            return (2,) if function.__name__ == fails else (0, *function(*arguments))

        return call

    def host(address, size):
        start, array = next((s, a) for s, a in pinned.items() if s <= address < s + len(a))
        assert address - start + size <= len(array)
        return array[address - start :][:size]

    @answers
    def cudaStreamCreateWithFlags(flags):
        assert flags == 1
        return (gpu.stream(),)

    @answers
    def cudaMalloc(size):
        return (gpu.allocate(size),)

    @answers
    def cudaMallocHost(size):
        array = np.full(size, 0xA5, np.uint8)
        pinned[array.ctypes.data] = array
        return (array.ctypes.data,)

    @answers
    def cudaMemcpyAsync(target, source, size, kind, stream):
        def copy():
            if kind == Kind.cudaMemcpyHostToDevice:
                gpu.block(target, size)[:] = host(source, size)
            else:
                host(target, size)[:] = gpu.block(source, size)

        gpu.enqueue(stream, copy)
        return ()

    @answers
    def cudaStreamSynchronize(stream):
        gpu.synchronize(stream)
        return ()

    @answers
    def cudaFree(address):
        gpu.free(address)
        return ()

    @answers
    def cudaFreeHost(address):
        del pinned[address]
        return ()

    @answers
    def cudaStreamDestroy(stream):
        gpu.close_stream(stream)
        return ()

    calls = {name: value for name, value in locals().items() if name.startswith("cuda")}
    return SimpleNamespace(
        **calls,
        cudaStreamNonBlocking=1,
        cudaMemcpyKind=Kind,
        cudaGetErrorString=lambda error: (0, b"out of memory"),
        pinned=pinned,
    )


def driver(gpu):
    """``pycuda.driver``: everything must happen while the context is current in the thread."""
    current = threading.local()
    pinned = []

    def needs_context():
        if not getattr(current, "stack", None):
            gpu.faults.append("no context is current")

    class Context:
        def push(self):
            current.stack = [*getattr(current, "stack", []), self]

        @staticmethod
        def pop():
            current.stack = current.stack[:-1]

    class Stream:
        def __init__(self):
            needs_context()
            self.handle = gpu.stream()

        def synchronize(self):
            needs_context()
            gpu.synchronize(self.handle)

        def __del__(self):
            needs_context()
            gpu.close_stream(self.handle)

    class DeviceAllocation:
        def __init__(self, size):
            needs_context()
            self.address = gpu.allocate(size)

        def __int__(self):
            return self.address

        def free(self):
            needs_context()
            gpu.free(self.address)

    class PagelockedHostAllocation:
        def __init__(self, size):
            needs_context()
            self.memory = (ctypes.c_uint8 * size)(*[0xA5] * size)
            pinned.append(self)

        @property
        def __array_interface__(self):
            address = ctypes.addressof(self.memory)
            return {"version": 3, "data": (address, False), "shape": (len(self.memory),), "typestr": "|u1"}

        def free(self):
            needs_context()
            pinned.remove(self)

    def memcpy_htod_async(target, source, stream):
        needs_context()

        def copy():
            gpu.block(target, len(source))[:] = source

        gpu.enqueue(stream.handle, copy)

    def memcpy_dtoh_async(target, source, stream):
        needs_context()

        def copy():
            target[:] = gpu.block(source, len(target))

        gpu.enqueue(stream.handle, copy)

    return SimpleNamespace(
        init=lambda: None,
        Device=lambda number: SimpleNamespace(retain_primary_context=Context),
        Stream=Stream,
        mem_alloc=DeviceAllocation,
        pagelocked_empty=lambda size, dtype: np.asarray(PagelockedHostAllocation(size)),
        memcpy_htod_async=memcpy_htod_async,
        memcpy_dtoh_async=memcpy_dtoh_async,
        pinned=pinned,
        current=current,
    )
