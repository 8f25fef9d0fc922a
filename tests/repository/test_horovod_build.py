"""tools/build_horovod.py without compiling, and the Horovod that it installed."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

PYTHON = sys.executable
TOOL = Path(__file__).parents[2] / "tools" / "build_horovod.py"
spec = importlib.util.spec_from_file_location("build_horovod", TOOL)
build_horovod = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build_horovod)

linux = pytest.mark.skipif(sys.platform != "linux", reason="Horovod is compiled on Linux only")
with_horovod = pytest.mark.skipif(
    importlib.util.find_spec("horovod") is None,
    reason=build_horovod.obstacle() or "Horovod is not installed: make horovod",
)


def test_the_key_tells_apart_what_a_wheel_depends_on(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build_horovod.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(build_horovod, "version", {"torch": "2.14.1+cpu"}.get)
    monkeypatch.setattr(build_horovod.sys, "version_info", (3, 12, 1))
    assert build_horovod.folder() == tmp_path / "companion/horovod/0.28.1-torch2.14.1+cpu-cp312-x86_64"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/somewhere")
    assert build_horovod.folder().is_relative_to("/somewhere/.cache/companion/horovod")


@pytest.fixture
def able(monkeypatch, tmp_path):
    """A machine that can compile Horovod."""
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(build_horovod.sys, "platform", "linux")
    monkeypatch.setattr(build_horovod.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(build_horovod.sysconfig, "get_path", lambda _: tmp_path)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CI", raising=False)
    return monkeypatch


def test_no_obstacle_where_everything_is_there(able):
    assert build_horovod.obstacle() == ""


def not_there(name):
    raise build_horovod.PackageNotFoundError(name)


@pytest.mark.parametrize(
    ("owner", "name", "value", "says"),
    [
        (build_horovod.sys, "platform", "darwin", "on Linux only"),
        (build_horovod, "version", not_there, "against PyTorch"),
        (build_horovod.shutil, "which", lambda name: None if name == "c++" else name, "no c++ here"),
        (build_horovod.shutil, "which", lambda name: None if name == "make" else name, "no make here"),
        (build_horovod.sysconfig, "get_path", lambda _: "/nowhere", "python3-dev"),
    ],
)
def test_an_obstacle_is_one_sentence_and_wrong_only_when_asked_for_or_in_ci(able, capsys, owner, name, value, says):
    able.setattr(owner, name, value)
    sentence = build_horovod.obstacle()
    assert says in sentence
    assert (sentence[-1], sentence.count(". ")) == (".", 0)
    able.setattr(sys, "argv", ["build_horovod.py", "--or-skip"])
    build_horovod.main()
    assert sentence in capsys.readouterr().out
    able.setenv("CI", "true")
    with pytest.raises(SystemExit, match=says.replace("+", r"\+")):
        build_horovod.main()
    able.delenv("CI")
    able.setattr(sys, "argv", ["build_horovod.py"])
    with pytest.raises(SystemExit, match=says.replace("+", r"\+")):
        build_horovod.main()


def test_the_compiler_that_the_environment_names_counts(able):
    able.setenv("CXX", "clang++ -m64")
    able.setattr(build_horovod.shutil, "which", lambda name: None if name == "clang++" else name)
    assert "no clang++ here" in build_horovod.obstacle()


FAKE_PIP = """#!/bin/sh
echo run >> "$FAKE_RUNS"
while [ $# -gt 0 ]; do
  case $1 in wheel) wheel=1;; --wheel-dir) into=$2;; esac
  shift
done
[ "$wheel" ] || exit 0
seq 100
echo half > "$into/horovod-0.28.1-x.whl"
{then}
"""


@pytest.fixture
def pip(monkeypatch, tmp_path):
    """Stands for Python with pip: writes a wheel and goes on as told; the runs are lines of the file it returns."""
    fake, runs = tmp_path / "python", tmp_path / "runs"
    monkeypatch.setenv("FAKE_RUNS", str(runs))

    def make(then: str) -> Path:
        fake.write_text(FAKE_PIP.replace("{then}", then))
        fake.chmod(0o755)
        return runs

    monkeypatch.setattr(build_horovod.sys, "executable", str(fake))
    return make


def start(place: Path) -> subprocess.Popen:
    """The build in a process group of its own, with the pip that stands in."""
    code = (
        "import importlib.util, signal, sys; from pathlib import Path\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # which background shells switch off
        f"spec = importlib.util.spec_from_file_location('tool', {str(TOOL)!r})\n"
        "tool = importlib.util.module_from_spec(spec); spec.loader.exec_module(tool)\n"
        f"sys.executable = {build_horovod.sys.executable!r}\n"
        f"print(tool.build(Path({str(place)!r})).name)"
    )
    return subprocess.Popen([PYTHON, "-c", code], start_new_session=True, stdout=subprocess.PIPE, text=True)


@linux
def test_a_wheel_is_built_once(pip, tmp_path):
    runs = pip("exit 0")
    wheel = build_horovod.build(tmp_path / "place")
    assert wheel == build_horovod.build(tmp_path / "place") == tmp_path / "place" / "horovod-0.28.1-x.whl"
    assert runs.read_text().count("run") == 2  # CMake, then the wheel


@linux
def test_a_failure_shows_the_end_of_the_log_and_leaves_no_wheel(pip, tmp_path):
    pip("exit 3")
    with pytest.raises(SystemExit) as ended:
        build_horovod.build(tmp_path / "place")
    *end, last = ended.value.code.splitlines()
    assert end == [str(number) for number in range(81, 101)]
    assert last.endswith(str(tmp_path / "place" / "build.log"))
    assert sorted(path.name for path in (tmp_path / "place").iterdir()) == ["build.log", "lock"]


@linux
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_build_that_was_killed_leaves_nothing_that_looks_like_a_wheel(pip, monkeypatch, tmp_path, how):
    runs, place = pip("sleep 60"), tmp_path / "place"
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    builder = start(place)
    while not list(tmp_path.glob("horovod-*/*.whl")):
        assert builder.poll() is None
        time.sleep(0.05)
    os.killpg(builder.pid, how)
    builder.communicate(timeout=30)
    assert builder.returncode != 0
    assert not list(place.glob("*.whl"))
    assert bool(list(tmp_path.glob("horovod-*"))) == (how == signal.SIGKILL)
    runs = pip("exit 0")
    assert build_horovod.build(place).is_file()
    assert runs.read_text().count("run") == 4


@linux
def test_the_second_of_two_waits_for_the_first(pip, tmp_path):
    runs = pip("sleep 2")
    outputs = [builder.communicate(timeout=60)[0] for builder in [start(tmp_path / "place") for _ in range(2)]]
    assert [output.splitlines()[-1] for output in outputs] == ["horovod-0.28.1-x.whl"] * 2
    assert runs.read_text().count("run") == 2


@linux
def test_a_source_with_another_checksum_is_refused(monkeypatch, tmp_path):
    index = tmp_path / "index"
    index.mkdir()
    (index / "horovod-0.28.1.tar.gz").write_bytes(b"not what we know")
    info = "cmake-3.31.10.dist-info/"
    with zipfile.ZipFile(index / "cmake-3.31.10-py3-none-any.whl", "w") as cmake:
        cmake.writestr(info + "METADATA", "Metadata-Version: 2.1\nName: cmake\nVersion: 3.31.10\n")
        cmake.writestr(info + "WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        cmake.writestr(info + "RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    with pytest.raises(SystemExit, match=f"(?s)DO NOT MATCH THE HASHES.*{build_horovod.SHA256}"):
        build_horovod.build(tmp_path / "place")
    assert not list((tmp_path / "place").glob("*.whl"))


def test_what_is_installed_is_known_by_its_checksum(monkeypatch, tmp_path):
    wheel = tmp_path / "horovod.whl"
    wheel.write_bytes(b"abc")  # whose SHA-256 is the first example of FIPS 180-2
    note = '{"archive_info": {"hash": "sha256=ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"}}'
    monkeypatch.setattr(build_horovod, "distribution", lambda _: SimpleNamespace(read_text=lambda _: note))
    assert build_horovod.installed(wheel)
    wheel.write_bytes(b"abd")
    assert not build_horovod.installed(wheel)
    monkeypatch.setattr(build_horovod, "distribution", not_there)
    assert not build_horovod.installed(wheel)


# What each of two workers runs.
WORKER = """
import horovod.torch as hvd
import torch

hvd.init()
mine = torch.tensor([1.0, 2.0, 4.0]) * (hvd.rank() + 1)
mean = hvd.allreduce(mine, name="mean")
total = hvd.allreduce(mine, op=hvd.Sum, name="total")
torch.manual_seed(hvd.rank())
model = torch.nn.Linear(3, 2)
before = hvd.allgather_object(model.weight.tolist())
hvd.broadcast_parameters(model.state_dict(), root_rank=0)
after = hvd.allgather_object(model.weight.tolist())
assert before[0] != before[1]
assert after == [before[0]] * 2, after
sgd = torch.optim.SGD(model.parameters(), lr=0.1)
sgd = hvd.DistributedOptimizer(sgd, named_parameters=model.named_parameters())
assert [group["lr"] for group in sgd.param_groups] == [0.1]  # not scaled by the number of workers
print("saw", hvd.rank(), hvd.size(), mean.tolist(), total.tolist())
"""


@with_horovod
def test_two_workers_average_and_share(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    horovodrun = Path(sys.executable).with_name("horovodrun")
    done = subprocess.run(
        [horovodrun, "-np", "2", "-H", "localhost:2", sys.executable, tmp_path / "worker.py"],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for rank in range(2):
        assert f"saw {rank} 2 [1.5, 3.0, 6.0] [3.0, 6.0, 12.0]" in done.stdout  # of 1, 2, 4 and 2, 4, 8


@with_horovod
def test_horovod_has_what_the_course_uses():
    horovodrun = Path(sys.executable).with_name("horovodrun")
    done = subprocess.run([horovodrun, "--check-build"], capture_output=True, text=True, check=True)
    assert {line.strip() for line in done.stdout.splitlines() if "[X]" in line} >= {"[X] PyTorch", "[X] Gloo"}
