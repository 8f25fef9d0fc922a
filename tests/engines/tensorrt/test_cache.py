"""Engine files and the cache of engines: never a wrong engine, never half of one."""

import hashlib
import random
import resource
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import onnx
import pytest
from engine_cases import one_sentence
from onnx import numpy_helper

from companion import CompanionError
from companion.engines.tensorrt import EngineFile, builder, cache, enginefile, read_engine
from companion.engines.tensorrt.builder import Options, key
from companion.engines.tensorrt.network import read_network

PLAN = random.Random(0).randbytes(5000)


def made(plan=PLAN, **changes):
    fields = {
        "plan": plan,
        "library": "tensorrt_rtx",
        "version": "1.7",
        "device": "none",
        "precision": "fp16",
        "profiles": ({"x": ((1, 3), (4, 3), (16, 3))}, {"x": ((1, 3), (1, 3), (1, 3))}),
        "layers": 12,
        "key": "ab" * 32,
        "description": {"labels": '["猫", "dog"]', "task": "classify"},
    }
    return EngineFile(**fields | changes)


def test_a_file_holds_everything(tmp_path):
    path = tmp_path / "F.engine"
    size = made().write(path)
    assert size == path.stat().st_size
    assert read_engine(path) == made()
    assert path.read_bytes().startswith(PLAN)  # tools of the library find it where they look
    again = tmp_path / "G.engine"
    read_engine(path).write(again)
    assert again.read_bytes() == path.read_bytes()


def refused(path):
    with pytest.raises(CompanionError, match="is damaged or was not written by `companion build`: build it again") as e:
        read_engine(path)
    one_sentence(e)


@pytest.mark.parametrize("description", [3, {"companion": "1", "labels": "["}])
def test_a_description_of_another_form_is_damage(tmp_path, description):
    made(description=description).write(tmp_path / "F.engine")  # with a right checksum
    refused(tmp_path / "F.engine")


def test_numbers_of_numpy_make_the_same_key():
    plain = builder.check_options((1, 4, 16), [{"x": [(1, 3), (2, 3), (4, 3)]}], "fp32", None, None)
    shapes = np.array([(1, 3), (2, 3), (4, 3)])
    assert builder.check_options(tuple(np.array([1, 4, 16])), [{"x": shapes}], "fp32", None, None) == plain
    for batch in ("124", (1.9, 2.5, 4.2), (1, 2, 2**31)):
        with pytest.raises(CompanionError, match="batch must"):
            builder.check_options(batch, (), "fp32", None, None)


@pytest.mark.parametrize("percent", range(0, 100, 5))
def test_a_truncated_file_is_refused(tmp_path, percent):
    path = tmp_path / "F.engine"
    size = made().write(path)
    path.write_bytes(path.read_bytes()[: size * percent // 100])
    refused(path)


def test_a_file_with_a_few_bytes_less_or_more_is_refused(tmp_path):
    path = tmp_path / "F.engine"
    made().write(path)
    whole = path.read_bytes()
    for content in (*(whole[:-n] for n in range(1, 150)), whole + b"\0", b"\0" + whole, whole * 2):
        path.write_bytes(content)
        refused(path)


def test_a_file_with_one_bit_wrong_is_refused(tmp_path):
    path = tmp_path / "F.engine"
    size = made().write(path)
    whole = path.read_bytes()
    draw = random.Random(1)
    # In the plan, and everywhere behind it.
    for place in [*draw.sample(range(len(PLAN)), 100), *range(len(PLAN), size)]:
        content = bytearray(whole)
        content[place] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        refused(path)


def test_files_of_others_are_refused(tmp_path):
    path = tmp_path / "F.engine"
    for content in (b"", b"ftrt" + PLAN, b"{}", b"companion engine 1" * 100):
        path.write_bytes(content)
        refused(path)
    for text in (b"[]", b"{}", b'{"profiles": 3}', b"\xff"):  # whole, but of somebody who knows no better
        body = PLAN + text + len(text).to_bytes(8, "little") + enginefile.MAGIC
        path.write_bytes(body + hashlib.sha256(body).digest())
        refused(path)
    with pytest.raises(CompanionError, match=r"cannot read .*none.engine: No such file") as error:
        read_engine(tmp_path / "none.engine")
    one_sentence(error)


@pytest.fixture(scope="module")
def network(exported):
    return read_network(exported("simple_cnn").path)


def test_one_weight_or_option_changes_the_key(network):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    model = onnx.load_from_string(network.content)
    weight = next(tensor for tensor in model.graph.initializer if tensor.name.endswith("weight"))
    values = numpy_helper.to_array(weight).copy()
    values.flat[0] = np.nextafter(values.flat[0], np.float32(1))  # the next number that float32 has
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    other = replace(network, content=model.SerializeToString(deterministic=True))
    profile = {"input": ((1, 3, 32, 32), (2, 3, 32, 32), (3, 3, 32, 32))}
    options = [
        Options(),
        Options(batch=(1, 4, 17)),
        Options(profiles=(profile,)),
        Options(profiles=(profile, profile)),
        Options(precision="tf32"),
        Options(workspace=2**30),
        Options(target="8.6"),
    ]
    keys = [key(network, each) for each in options] + [key(other, Options())]
    assert len(set(keys)) == len(keys)
    assert key(read_network(network.content), Options()) == keys[0]


def test_another_library_or_gpu_changes_the_key(network, monkeypatch):
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    keys = {key(network, Options())}
    monkeypatch.setattr(builder, "gpu", lambda: "another GPU")
    keys.add(key(network, Options()))
    monkeypatch.setattr(trt, "__version__", "99")
    keys.add(key(network, Options()))
    assert len(keys) == 3


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder of engines, in a cache folder of the test's own."""
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "companion" / "engines"


@pytest.fixture
def builds(monkeypatch):
    """Counts builds in place of making them; each gives another plan, as the real one may."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    done = []

    def build(network, options, on_progress):
        done.append(options)
        return made(plan=PLAN + bytes([len(done)]), key=key(network, options))

    monkeypatch.setattr(cache, "build_network", build)
    return done


def test_what_was_built_is_kept(network, folder, builds):
    first = cache.cached(network, Options())
    assert cache.cached(network, Options()) == first
    assert len(builds) == 1
    assert cache.cached(network, Options(workspace=1)) != first
    assert len(builds) == 2
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("percent", range(0, 100, 5))
def test_a_truncated_engine_is_built_again(network, folder, builds, percent):
    cache.cached(network, Options())
    (path,) = folder.iterdir()
    path.write_bytes(path.read_bytes()[: path.stat().st_size * percent // 100])
    assert cache.cached(network, Options()).plan == PLAN + b"\x02"
    assert cache.cached(network, Options()).plan == PLAN + b"\x02"
    assert [path] == list(folder.iterdir())


def test_an_engine_under_the_name_of_another_is_not_taken(network, folder, builds):
    cache.cached(network, Options())
    cache.cached(network, Options(workspace=1))
    first, second = sorted(folder.iterdir(), key=lambda path: read_engine(path).plan)
    second.write_bytes(first.read_bytes())
    assert cache.cached(network, Options(workspace=1)).plan == PLAN + b"\x03"


def test_threads_build_once(network, folder, builds):
    found = []
    threads = [threading.Thread(target=lambda: found.append(cache.cached(network, Options()))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len({each.plan for each in found}) == len(builds) == 1


def test_a_full_disk_is_a_warning_and_leaves_nothing(network, folder, builds):
    folder.mkdir(parents=True)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))  # Python ignores the signal, so writing fails
    try:
        with pytest.warns(UserWarning, match="cannot be kept: cannot write .*File too large"):
            found = cache.cached(network, Options())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert found.plan == PLAN + b"\x01"
    assert list(folder.iterdir()) == []
    assert cache.cached(network, Options()).plan == PLAN + b"\x02"


def test_a_cache_that_cannot_be_made_is_a_warning(network, folder, builds):
    folder.parent.parent.mkdir(exist_ok=True)
    folder.parent.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="cannot be kept"):
        assert cache.cached(network, Options()).plan == PLAN + b"\x01"


BUILDER = """
import sys
from pathlib import Path
from companion.engines.tensorrt import cache
from companion.engines.tensorrt.builder import Options
from companion.engines.tensorrt.network import read_network
network = read_network(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
for _ in range(3):
    found = cache.cached(network, Options())
    print(found.key, len(found.plan), flush=True)
    for path in cache.engine_folder().glob("*.engine"):
        path.unlink(missing_ok=True)
found = cache.cached(network, Options())
"""


def test_two_processes_may_build_one_engine_at_once(exported, folder, network):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    command = [sys.executable, "-c", BUILDER, str(exported("simple_cnn").path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(2)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    answers = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], answers
    expected = key(network, Options())
    for out, _ in answers:
        assert [line.split()[0] for line in out.splitlines()] == [expected] * 3
    (path,) = folder.iterdir()
    assert path.name == f"{expected}.engine"
    assert read_engine(path).key == expected


def test_nothing_of_a_build_that_fails_is_kept(network, folder, monkeypatch):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")

    def fail(*arguments):
        raise CompanionError("no.")

    monkeypatch.setattr(cache, "build_network", fail)
    with pytest.raises(CompanionError, match="no"):
        cache.cached(network, Options())
    assert not folder.exists()
