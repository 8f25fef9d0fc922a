import os
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from companion import CompanionError
from companion.metrics import memory
from companion.metrics.activations import activation_bytes
from companion.metrics.latency import inference, training_step
from companion.metrics.memory import Memory, measure_memory
from companion.units import KIB, MIB

ONE = torch.float32.itemsize


def test_one_tensor():
    assert measure_memory(lambda: torch.empty(1000)).allocated == 1000 * ONE


def test_nothing():
    assert measure_memory(lambda: None).allocated == 0


def test_what_is_freed_makes_room_for_what_comes():
    def inner():
        torch.empty(300)  # freed at once
        return torch.empty(200)

    def function():
        a = torch.empty(1000)
        b = inner()  # 1000 + 300, then 1000 + 200
        del a
        c = torch.empty(50)  # 200 + 50
        return b, c

    assert measure_memory(function).allocated == 1300 * ONE


@given(st.lists(st.tuples(st.integers(1, 1000), st.booleans()), max_size=12))
@settings(max_examples=20, deadline=None)
def test_the_peak_is_that_of_the_running_sum(steps):
    alive = highest = 0
    for size, kept in steps:
        highest = max(highest, alive + size)
        alive += size * kept

    def function():
        tensors = []
        for size, kept in steps:
            tensor = torch.empty(size)
            if kept:
                tensors.append(tensor)
            del tensor

    assert measure_memory(function).allocated == highest * ONE


def test_memory_that_was_there_before_can_be_freed_and_taken_again():
    held = {"x": torch.empty(1000)}

    def swap():  # both are there for a moment
        held["x"] = torch.empty(1000)

    def drop_first():
        del held["x"]
        held["x"] = torch.empty(1000)

    assert measure_memory(swap).allocated == 1000 * ONE
    assert measure_memory(drop_first).allocated == 0


def test_inference_by_hand_and_as_another_count_has_it():
    model, x = nn.Sequential(nn.Linear(10, 1000), nn.Linear(1000, 20)), torch.rand(4, 10)
    found = measure_memory(inference(model, x)).allocated
    assert found == 4 * (1000 + 20) * ONE  # both results are there at the end of the second layer
    assert found == activation_bytes(model, x, training=False)


def test_a_training_step_needs_the_gradients_too():
    model, x = nn.Linear(100, 50, bias=False), torch.rand(1, 100)
    found = measure_memory(training_step(model, x, optimizer=torch.optim.SGD)).allocated
    weights = 100 * 50 * ONE
    assert weights < found < 1.5 * weights
    # AdamW's two moments are there before the call, its temporary values are not.
    assert found <= measure_memory(training_step(model, x)).allocated < 4 * weights


def test_what_torch_does_not_allocate_is_in_the_resident_set_only():
    found = measure_memory(lambda: np.ones(32 * MIB, dtype=np.uint8))
    assert found.allocated == 0
    if found.resident is not None:
        assert 28 * MIB < found.resident < 64 * MIB


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells the resident set")
def test_resident_set():
    found = measure_memory(lambda: torch.ones(16 * MIB))
    assert found.allocated == 64 * MIB
    if found.resident is None:
        pytest.skip("this kernel does not let a process begin its peak again")
    assert 60 * MIB < found.resident < 96 * MIB
    assert measure_memory(lambda: None).resident < 16 * MIB  # an earlier peak is forgotten


def test_where_the_kernel_does_not_tell(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "PROCESS", tmp_path / "nowhere")
    found = measure_memory(lambda: torch.empty(1000))
    assert found == Memory(1000 * ONE, None)
    assert str(found) == "3.906 KiB allocated"
    assert str(Memory(2 * KIB, 3 * MIB)) == "2.000 KiB allocated, 3.000 MiB resident"


def test_the_profiler_prints_nothing_and_the_function_does(capfd):
    calls = []

    def function():
        calls.append(1)
        print(f"call {len(calls)}", file=sys.stderr)
        os.write(2, b"from C\n")

    measure_memory(function)
    # All but the warm-up; Python's own stream, which pytest reads elsewhere, has that too.
    assert set(capfd.readouterr().err.splitlines()) - {"call 1"} == {"call 2", "call 3", "from C"}


def test_warnings_of_the_function_arrive():
    with pytest.warns(UserWarning, match="mine"):
        measure_memory(lambda: warnings.warn("mine", stacklevel=1))


@pytest.mark.parametrize("last", [1, 2, 3])
def test_an_error_passes_through_and_the_next_measurement_works(last):
    calls = []

    def function():
        calls.append(1)
        if len(calls) == last:
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        measure_memory(function)
    assert measure_memory(lambda: torch.empty(10)).allocated == 10 * ONE


def test_bad_devices():
    with pytest.raises(CompanionError, match="no device 'warp' here"):
        measure_memory(lambda: None, device="warp")
    with pytest.raises(CompanionError, match="on cpu and cuda, not on meta"):
        measure_memory(lambda: None, device="meta")


@pytest.mark.gpu
def test_memory_of_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")

    def function():
        a = torch.empty(4 * MIB, dtype=torch.uint8, device="cuda")
        torch.empty(2 * MIB, dtype=torch.uint8, device="cuda")
        del a
        return torch.empty(MIB, dtype=torch.uint8, device="cuda")

    assert measure_memory(function, device="cuda").allocated == 6 * MIB  # the allocator rounds up to 512 bytes
