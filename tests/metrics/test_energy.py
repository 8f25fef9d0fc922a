"""Energy on a made-up powercap tree, a made-up GPU and a made-up clock: every joule is known."""

import dataclasses
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from companion import CompanionError
from companion.metrics import energy
from companion.metrics.energy import Estimate, NvmlReader, RaplReader, energy_reader, measure_energy

RANGE = 262_143_328_850  # microjoules, of a real Intel processor


class Powercap:
    """A folder like /sys/class/powercap: links to zones, which nest."""

    def __init__(self, folder: Path):
        self.root, self.devices = folder / "class", folder / "devices"
        self.root.mkdir()

    def zone(self, path, name, microjoules, limit=RANGE):
        zone = self.devices / path
        zone.mkdir(parents=True)
        (zone / "name").write_text(f"{name}\n")
        (zone / "max_energy_range_uj").write_text(f"{limit}\n")
        (self.root / zone.name).symlink_to(zone)
        self.set(path, microjoules)

    def set(self, path, microjoules):
        new = self.devices / path / "new"
        new.write_text(f"{microjoules}\n")
        new.replace(self.devices / path / "energy_uj")  # never half written for a thread that reads

    def add(self, path, microjoules):
        old = int((self.devices / path / "energy_uj").read_text())
        self.set(path, (old + microjoules) % RANGE)


PACKAGE, CORE, DRAM, SECOND = (
    "intel-rapl:0",
    "intel-rapl:0/intel-rapl:0:0",
    "intel-rapl:0/intel-rapl:0:1",
    "intel-rapl:1",
)


@pytest.fixture
def powercap(tmp_path):
    tree = Powercap(tmp_path)
    tree.zone(PACKAGE, "package-0", 5_000_000)
    tree.zone(CORE, "core", 3_000_000)
    tree.zone(DRAM, "dram", 1_000_000)
    return tree


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_one_package_and_none_of_its_parts(powercap):
    reader = RaplReader(powercap.root)
    assert reader.read() == 0
    powercap.add(PACKAGE, 7_500_000)
    powercap.add(CORE, 6_000_000)
    powercap.add(DRAM, 2_000_000)
    assert reader.read() == 7.5
    assert reader.read() == 7.5
    assert (reader.source, reader.estimated) == ("RAPL, 1 package", False)


def test_all_sockets_are_added_and_the_board_and_second_ways_are_not(powercap):
    powercap.zone(SECOND, "package-1", 1)
    powercap.zone("intel-rapl:2", "psys", 0)
    powercap.zone("intel-rapl-mmio:0", "package-0", 0)
    reader = RaplReader(powercap.root)
    for path in (PACKAGE, SECOND, "intel-rapl:2", "intel-rapl-mmio:0"):
        powercap.add(path, 2_000_000)
    assert reader.read() == 4
    assert reader.source == "RAPL, 2 packages"


def test_dies_of_one_package_are_added(tmp_path):
    tree = Powercap(tmp_path)
    for i in range(2):
        tree.zone(f"intel-rapl:{i}", f"package-0-die-{i}", 0)
    reader = RaplReader(tree.root)
    tree.add("intel-rapl:0", 1_000_000)
    tree.add("intel-rapl:1", 250_000)
    assert reader.read() == 1.25


def test_a_counter_that_begins_again(powercap):
    powercap.zone(SECOND, "package-1", 65_000_000_000, limit=65_532_610_987)  # AMD's range
    powercap.set(PACKAGE, RANGE - 400_000)
    reader = RaplReader(powercap.root)
    powercap.set(PACKAGE, 600_000)
    powercap.set(SECOND, 65_001_000_000)
    assert reader.read() == 1 + 1
    powercap.set(SECOND, 467_389_013)  # 531.610987 J to the end of the range, and 467.389013 J after
    assert reader.read() == 1 + 1 + 999
    powercap.set(PACKAGE, 500_000)  # almost a whole round
    assert reader.read() == pytest.approx(1001 + RANGE / 1e6 - 0.1, abs=1e-6)


def test_a_call_during_which_the_counter_goes_round_many_times(powercap):
    class Watched(RaplReader):
        poll_seconds, reads = 0.001, 0

        def read(self):
            joules = super().read()
            self.reads += 1
            return joules

    reader, called = Watched(powercap.root), []

    def work():
        called.append(1)
        for _ in range(9):
            powercap.add(PACKAGE, RANGE // 3)
            before = reader.reads
            while len(called) > 1 and reader.reads < before + 2:  # one of them began after the counter was set
                pass

    found = measure_energy(work, reader=reader, seconds=1e-9)
    assert found.calls == 1
    assert found.joules == pytest.approx(9 * (RANGE // 3) / 1e6, abs=1e-3)


def test_a_counter_that_only_root_may_read(powercap, monkeypatch):
    """Without chmod, for tests may run as root, whom it does not stop."""
    read_text = Path.read_text

    def refuse(path, *args, **kwargs):
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(path))
        return read_text(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(CompanionError, match="only root may read it") as caught:
        RaplReader(powercap.root)
    assert str(powercap.root / "intel-rapl:0" / "energy_uj") in str(caught.value)
    assert f"sudo chmod a+r {powercap.root}/*/energy_uj" in str(caught.value)


@pytest.mark.skipif(getattr(os, "geteuid", lambda: 0)() == 0, reason="root may read everything")
def test_a_counter_that_the_system_does_not_let_us_read(powercap):
    (powercap.devices / PACKAGE / "energy_uj").chmod(0)
    with pytest.raises(CompanionError, match="only root may read it"):
        RaplReader(powercap.root)


@pytest.mark.parametrize("names", [(), ("psys",), ("core",)])
def test_no_package_no_reader(tmp_path, names):
    tree = Powercap(tmp_path)
    for i, name in enumerate(names):
        tree.zone(f"intel-rapl:{i}", name, 0)
    with pytest.raises(CompanionError, match=r"no processor package has a counter in .*class"):
        RaplReader(tree.root)
    with pytest.raises(CompanionError, match="no processor package"):
        RaplReader(tree.root / "missing")


def test_a_counter_that_vanishes_or_holds_no_number(powercap):
    reader = RaplReader(powercap.root)
    powercap.set(PACKAGE, "many")
    with pytest.raises(CompanionError, match=r"energy_uj holds 'many', which is no number"):
        reader.read()
    (powercap.devices / PACKAGE / "energy_uj").unlink()
    with pytest.raises(CompanionError, match=r"^RAPL: [^ ]*energy_uj cannot be read: No such file or directory\.$"):
        reader.read()


class NVMLError(Exception):
    pass


def nvml(millijoules=(), *, driver=True, counts=True):
    """Stands in for pynvml: a machine with GPUs whose counters stand at ``millijoules``."""

    def init():
        if not driver:
            raise NVMLError("Driver Not Loaded")

    def by_index(index):
        if index >= len(millijoules):
            raise NVMLError("Invalid Argument")
        return index

    def total(handle):
        if not counts:
            raise NVMLError("Not Supported")
        return millijoules[handle]

    return SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=init,
        nvmlDeviceGetHandleByIndex=by_index,
        nvmlDeviceGetHandleByUUID=lambda uuid: by_index(int(uuid.removeprefix("GPU-"))),
        nvmlDeviceGetName=lambda handle: f"Model {handle}",
        nvmlDeviceGetTotalEnergyConsumption=total,
    )


def test_a_gpu_counts_in_millijoules():
    counters = [1000, 123_456]
    reader = NvmlReader(1, nvml=nvml(counters))
    assert (reader.read(), reader.source, reader.estimated) == (123.456, "NVML, GPU 1: Model 1", False)
    assert NvmlReader("GPU-0", nvml=nvml(counters)).read() == 1


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (nvml([1], driver=False), "there is no GPU 0 to ask (Driver Not Loaded)"),
        (nvml([]), "there is no GPU 0 to ask (Invalid Argument)"),
        (nvml([1], counts=False), "the GPU does not count its energy (Not Supported)"),
    ],
)
def test_why_a_gpu_cannot_be_asked(module, why):
    with pytest.raises(CompanionError) as caught:
        NvmlReader(nvml=module)
    assert str(caught.value) == f"NVML: {why}."


def test_the_real_nvml_has_what_is_asked_of_it():
    import pynvml

    assert all(hasattr(pynvml, name) for name in vars(nvml()))


def test_energy_of_a_call(powercap):
    clock, calls = Clock(), []

    def work():
        calls.append(1)
        clock.now += 0.25
        powercap.add(PACKAGE, 10_000_000)

    found = measure_energy(work, reader=RaplReader(powercap.root), seconds=0.9, clock=clock)
    assert len(calls) == 1 + 4  # the first is not counted
    assert (found.joules, found.calls, found.seconds, found.watts) == (10, 4, 1.0, 40)
    assert (found.idle_watts, found.joules_above_idle, found.unit) == (None, 10, "J")
    assert str(found) == "10 J a call, 40 W over 1 s (RAPL, 1 package)"


def test_energy_above_idle(powercap):
    clock = Clock()

    def work():
        clock.now += 0.25
        powercap.add(PACKAGE, 10_000_000)

    def sleep(seconds):
        clock.now += seconds
        powercap.add(PACKAGE, round(5_000_000 * seconds))

    found = measure_energy(work, reader=RaplReader(powercap.root), idle_seconds=2, clock=clock, sleep=sleep)
    assert (found.idle_watts, found.joules, found.joules_above_idle) == (5, 10, 10 - 5 * 0.25)
    assert str(found) == "10 J a call, 8.75 J above idle, 40 W over 1 s (RAPL, 1 package)"


def test_work_that_was_only_started_is_waited_for():
    clock, log = Clock(), []
    reader = Estimate(2, clock=clock)

    def start():
        log.append("start")
        clock.now += 0.5

    def wait():
        log.append("wait")
        clock.now += 3

    found = measure_energy(start, reader=reader, synchronize=wait, clock=clock)
    assert log == ["start", "wait", "start", "start", "wait"]
    assert (found.seconds, found.joules) == (4, 4)


def test_an_estimate_says_so_everywhere():
    clock = Clock()

    def work():
        clock.now += 0.5

    found = measure_energy(work, reader=Estimate(65, clock=clock), clock=clock)
    assert (found.joules, found.watts, found.estimated) == (32.5, 65, True)
    written = [str(found), repr(found), found.unit, found.source, json.dumps(dataclasses.asdict(found))]
    assert all("estimate" in text for text in written)
    assert str(found) == "32.5 J (estimate) a call, 65 W over 1 s (estimate, seconds × 65 W as stated)"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine without counters, to which a test may add some."""
    found = SimpleNamespace(powercap=Powercap(tmp_path))
    monkeypatch.setattr(energy, "POWERCAP", found.powercap.root)
    found.gpus = lambda *args, **kwargs: monkeypatch.setitem(sys.modules, "pynvml", nvml(*args, **kwargs))
    found.gpus(driver=False)
    return found


def test_counters_come_before_estimates_and_the_processors_first(machine):
    estimate = energy_reader(watts=65)
    assert isinstance(estimate, Estimate)
    assert [reason.partition(":")[0] for reason in estimate.instead_of] == ["RAPL", "NVML"]
    machine.gpus([5])
    assert isinstance(energy_reader(watts=65), NvmlReader)
    machine.powercap.zone(PACKAGE, "package-0", 0)
    assert isinstance(energy_reader(watts=65), RaplReader)


def test_the_counter_of_another_device_will_not_do(machine, monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: SimpleNamespace(uuid=str(device)[-1]))
    machine.gpus([5, 6000])
    assert isinstance(energy_reader(watts=65, device="cpu"), Estimate)
    machine.powercap.zone(PACKAGE, "package-0", 0)
    assert energy_reader(device="cuda:1").read() == energy_reader(device=torch.device("cuda:1")).read() == 6
    machine.gpus(driver=False)
    assert isinstance(energy_reader(watts=65, device="cuda:1"), Estimate)


def test_a_gpu_that_torch_does_not_have(machine, monkeypatch):
    def refuse(device):
        raise AssertionError("Torch not compiled with CUDA enabled")

    monkeypatch.setattr("torch.cuda.get_device_properties", refuse)
    assert energy_reader(watts=65, device="cuda:0").instead_of == ("NVML: there is no device 'cuda:0' here",)


def test_no_counter_and_no_watts_is_one_sentence(machine):
    with pytest.raises(CompanionError) as caught:
        measure_energy(lambda: None)
    assert str(caught.value) == (
        f"no energy counter can be read here (RAPL: no processor package has a counter in {machine.powercap.root}; "
        "NVML: there is no GPU 0 to ask (Driver Not Loaded)): for an estimate, say what the machine draws, "
        "such as watts=65."
    )


def test_a_measurement_remembers_why_it_is_an_estimate(machine):
    found = measure_energy(lambda: None, watts=20, seconds=1e-6)
    assert found.instead_of == energy_reader(watts=20).instead_of
    assert found.estimated
    assert found.joules > 0


def test_a_counter_that_stands_still_is_refused(powercap):
    with pytest.raises(CompanionError, match=r"the counter \(RAPL, 1 package\) did not move"):
        measure_energy(lambda: None, reader=RaplReader(powercap.root), seconds=1e-6)


@pytest.mark.parametrize("after", [-1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("idle_seconds", [0, 1])
def test_a_counter_that_is_broken_is_refused(after, idle_seconds):
    reads = iter([0.0, after])
    reader = SimpleNamespace(source="toy", estimated=False, poll_seconds=None, read=lambda: next(reads))
    with pytest.raises(
        CompanionError, match=r"^the counter \(toy\) is broken: it went from 0\.0 J to (-1\.0|nan|inf) J\.$"
    ):
        measure_energy(lambda: None, reader=reader, seconds=1e-9, idle_seconds=idle_seconds, sleep=lambda _: None)


def test_a_clock_that_stands_still_is_refused(powercap):
    with pytest.raises(CompanionError, match="1 calls in 0 s cannot be measured: look at the clock"):
        measure_energy(
            lambda: None, reader=RaplReader(powercap.root), idle_seconds=1, clock=Clock(), sleep=lambda _: None
        )
    with pytest.raises(CompanionError, match="look at the clock"):
        energy.Energy(1, 3, 0.0, "toy", False)


@pytest.mark.parametrize("device", ["gpu", "cdua:0", "mps", "", 0])
def test_a_device_that_nobody_knows_is_refused(machine, device):
    with pytest.raises(CompanionError, match=rf"^device must be cpu or cuda:0, not '{device}'\.$"):
        energy_reader(watts=65, device=device)


def test_a_function_that_cannot_be_called():
    with pytest.raises(CompanionError, match=r"^function must be something to call, not None\.$"):
        measure_energy(None, watts=1)


@pytest.mark.parametrize(
    "options", [{"seconds": 0}, {"seconds": float("nan")}, {"idle_seconds": -1}, {"seconds": "1"}, {"seconds": True}]
)
def test_times_that_make_no_sense(options):
    with pytest.raises(CompanionError, match="seconds must be positive"):
        measure_energy(lambda: None, watts=1, **options)


@pytest.mark.parametrize("watts", [0, -1, float("inf"), float("nan"), "5", True, None])
def test_watts_that_make_no_sense(watts):
    with pytest.raises(CompanionError, match="watts must be a positive number"):
        Estimate(watts)


def test_an_estimate_knows_no_idling():
    with pytest.raises(CompanionError, match="leave idle_seconds out"):
        measure_energy(lambda: None, reader=Estimate(65), idle_seconds=1)
