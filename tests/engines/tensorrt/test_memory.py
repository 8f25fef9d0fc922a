"""Every way to the GPU's memory, one contract: on a fake GPU everywhere, on a real one where there is one."""

import sys
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import fake_cuda
import fake_gpu
import numpy as np
import pytest
from engine_cases import one_sentence

from companion import CompanionError
from companion.engines.tensorrt import library, memory


def put_in_place(monkeypatch, parent, name, module):
    made = ModuleType(parent)
    setattr(made, name, module)
    monkeypatch.setitem(sys.modules, parent, made)
    monkeypatch.setitem(sys.modules, f"{parent}.{name}", module)


@pytest.fixture
def cuda_runtime(monkeypatch, gpu):
    module = fake_cuda.runtime(gpu)
    put_in_place(monkeypatch, "cuda.bindings", "runtime", module)
    yield module
    assert module.pinned == {}


@pytest.fixture
def pycuda_driver(monkeypatch, gpu):
    module = fake_cuda.driver(gpu)
    put_in_place(monkeypatch, "pycuda", "driver", module)
    yield module
    assert module.pinned == []
    assert not module.current.stack


FAKES = ["numpy", "cuda-python on a fake", "pycuda on a fake"]


@pytest.fixture(params=[*FAKES, *(pytest.param(name, marks=pytest.mark.gpu) for name in memory.MEMORIES)])
def make(request):
    """Makes a memory."""
    if request.param == "numpy":
        gpu = request.getfixturevalue("gpu")
        return lambda: fake_gpu.NumpyMemory(gpu)
    if request.param in FAKES:
        cuda_python = request.param.startswith("cuda")
        request.getfixturevalue("cuda_runtime" if cuda_python else "pycuda_driver")
        return memory.CudaPythonMemory if cuda_python else memory.PycudaMemory
    if library.gpu() is None:
        pytest.skip("no NVIDIA GPU here")
    pytest.importorskip({"cuda-python": "cuda.bindings"}.get(request.param, request.param), reason="not installed")
    return memory.MEMORIES[request.param]


def test_bytes_come_back(make):
    made, size = make(), 1000
    with made.active():
        buffer = made.allocate(size)
        assert made.stream > 0
        assert buffer.address > 0
        assert buffer.host.dtype == np.uint8
        assert buffer.host.shape == (size,)
        sent = np.random.default_rng(0).integers(0, 256, size, np.uint8)
        buffer.host[:] = sent
        made.upload(buffer, size)
        made.synchronize()
        buffer.host[:] = 0
        made.download(buffer, size)
        made.synchronize()
        np.testing.assert_array_equal(buffer.host, sent)
        made.free(buffer)
        made.close()


def test_only_as_much_is_copied_as_is_asked_for(make):
    made = make()
    with made.active():
        buffer = made.allocate(10)
        buffer.host[:] = 1
        made.upload(buffer, 10)
        made.synchronize()
        buffer.host[:] = 2
        made.upload(buffer, 4)
        made.synchronize()
        buffer.host[:] = 3
        made.download(buffer, 6)
        made.synchronize()
        assert buffer.host.tolist() == [2, 2, 2, 2, 1, 1, 3, 3, 3, 3]
        made.free(buffer)
        made.close()


def test_buffers_are_apart(make):
    made = make()
    with made.active():
        buffers = [made.allocate(size) for size in (1, 7, 4096)]
        for number, buffer in enumerate(buffers):
            buffer.host[:] = number
            made.upload(buffer, len(buffer.host))
        made.synchronize()
        for buffer in buffers:
            buffer.host[:] = 9
            made.download(buffer, len(buffer.host))
        made.synchronize()
        assert [set(buffer.host.tolist()) for buffer in buffers] == [{0}, {1}, {2}]
        for buffer in buffers:
            made.free(buffer)
        made.close()


def test_threads_may_take_turns(make):
    made = make()

    def step(work):
        with ThreadPoolExecutor(1) as pool:  # a new thread each time
            return pool.submit(work).result()

    def allocate():
        with made.active():
            buffer = made.allocate(5)
            buffer.host[:] = 7
            made.upload(buffer, 5)
            made.synchronize()
            return buffer

    def read():
        with made.active():
            buffer.host[:] = 0
            made.download(buffer, 5)
            made.synchronize()
            return buffer.host.tolist()

    buffer = step(allocate)
    assert step(read) == [7] * 5
    with made.active():
        made.free(buffer)
        made.close()


def test_streams_are_different(make):
    first, second = make(), make()
    assert first.stream != second.stream
    for made in (first, second):
        with made.active():
            made.close()


def test_cuda_that_fails_is_one_sentence_and_leaves_nothing(monkeypatch, gpu):
    put_in_place(monkeypatch, "cuda.bindings", "runtime", fake_cuda.runtime(gpu, fails="cudaMallocHost"))
    made = memory.CudaPythonMemory()
    with pytest.raises(CompanionError, match="CUDA fails: out of memory") as error:
        made.allocate(10)
    one_sentence(error)
    made.close()


def test_the_fakes_have_only_what_cuda_python_has():
    real = pytest.importorskip("cuda.bindings.runtime", reason="cuda-python is not installed")
    names = set(vars(fake_cuda.runtime(fake_gpu.Gpu()))) - {"pinned"}
    assert all(hasattr(real, name) for name in names)
    assert set(fake_cuda.Kind.__members__) <= set(real.cudaMemcpyKind.__members__)
    assert int(real.cudaStreamNonBlocking) == 1


def test_the_first_that_works_is_taken(monkeypatch, gpu):
    def broken():
        raise ImportError("No module named 'first'. Look elsewhere")

    monkeypatch.setattr(memory, "MEMORIES", {"first": broken, "second": lambda: fake_gpu.NumpyMemory(gpu)})
    made = memory.open_memory()
    assert isinstance(made, fake_gpu.NumpyMemory)
    made.close()
    with pytest.raises(CompanionError, match="first: No module named 'first'") as error:
        memory.open_memory("first")
    one_sentence(error)
    with pytest.raises(CompanionError, match="no memory 'third': choose one of first, second") as error:
        memory.open_memory("third")
    one_sentence(error)


@pytest.mark.skipif(library.gpu() is not None, reason="a GPU is here")
def test_without_a_gpu_each_says_so():
    with pytest.raises(
        CompanionError, match=r"no memory of the GPU can be had \(torch: .*cuda-python: .*pycuda: "
    ) as e:
        memory.open_memory()
    one_sentence(e)
