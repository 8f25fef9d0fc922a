"""Checkpoints that were pickled: weights come out, and nothing runs."""

import io
import os
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

from companion import CompanionError
from companion.models.checkpoint import MOST, read_weights


def network():
    return nn.Sequential(
        OrderedDict(first=nn.Conv2d(3, 4, 3, bias=False), inner=nn.Sequential(nn.BatchNorm2d(4), nn.SiLU()))
    )


@pytest.mark.parametrize("wrap", [lambda n: n, lambda n: {"model": n, "epoch": 3}, lambda n: {"ema": n, "model": None}])
def test_a_network_of_torch(tmp_path, wrap):
    model = network().half()
    torch.save(wrap(model), tmp_path / "x.pt")
    found = read_weights(tmp_path / "x.pt")
    expected = model.state_dict()
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)


def test_views_of_one_storage(tmp_path):
    model = nn.Linear(3, 2)
    whole = torch.arange(12.0).reshape(3, 4)
    model.weight = nn.Parameter(whole.t()[1:3])
    torch.save(model, tmp_path / "x.pt")
    assert torch.equal(read_weights(tmp_path / "x.pt")["weight"], model.weight)


# What a stranger may put in a file


def forged(path, program, storages=(), compress=zipfile.ZIP_STORED):
    """A checkpoint with this pickle and these storages."""
    with zipfile.ZipFile(path, "w", compress) as archive:
        archive.writestr("archive/data.pkl", program)
        for i, content in enumerate(storages):
            archive.writestr(f"archive/data/{i}", content)
    return path


class Reduced:
    """Pickles as a call of ``function``."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def module(**inside):
    """The pickle of an object that says it is a module of YOLOv5, with this in it."""
    names = [pickle.BINUNICODE + len(key).to_bytes(4, "little") + key.encode() + value for key, value in inside.items()]
    state = pickle.EMPTY_DICT + b"".join(name + pickle.SETITEM for name in names)
    return b"cmodels.yolo\nModel\n" + pickle.EMPTY_TUPLE + pickle.NEWOBJ + state + pickle.BUILD


def program(body):
    return pickle.PROTO + b"\x02" + body + pickle.STOP


@pytest.mark.parametrize(
    "call",
    [
        Reduced(os.system, "touch ran"),
        Reduced(eval, "open('ran', 'w')"),
        {"model": Reduced(exec, "open('ran', 'w')")},
        [Reduced(getattr, Reduced(__import__, "os"), "system")],
        Reduced(Reduced(getattr, Reduced(__import__, "os"), "system"), "touch ran"),
        Reduced(subprocess.check_call, ["touch", "ran"]),
        Reduced(torch.load, "other.pt"),
    ],
    ids=["system", "eval", "exec", "getattr", "nested", "subprocess", "torch.load"],
)
def test_calls_are_refused_and_not_made(tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    try:
        content = pickle.dumps(call, protocol=2)
    except (pickle.PicklingError, AttributeError, TypeError):  # a call of what another call gives cannot be pickled
        content = program(b"cos\nsystem\n(X\x09\x00\x00\x00touch rantR")
    forged("x.pt", content)
    with pytest.raises(CompanionError, match=r"^x\.pt is not read: it asks for \S+, which is neither a tensor nor a l"):
        read_weights("x.pt")
    assert not Path("ran").exists()


HUGE = (2**40).to_bytes(8, "little")
STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + b"K\x00%s%s\x89NtR"
TOO_LARGE = TENSOR % (b"J\xff\xff\xff\x7f\x85", b"K\x00\x85")  # [2³¹ - 1] of a stride of 0
OUTSIDE = TENSOR % (b"K\x04\x85", b"K\x64\x85")
SMALL = TENSOR % (b"K\x04\x85", b"K\x01\x85")
RESET = b"(" + SMALL + b"K\x00" + b"J\xff\xff\xff\x7f\x85" + b"K\x00\x85" + b"tb"  # by the tensor's own __setstate__
DEEP = b")" + b"\x85" * 1_000_000


TOO_MUCH = {
    "bytearray": (pickle.BYTEARRAY8 + HUGE, "is damaged, or no checkpoint of torch.save."),
    "bytes": (pickle.BINBYTES8 + HUGE, "is damaged, or no checkpoint of torch.save."),
    "digits": (b"I" + b"9" * 10_000 + b"\n", "is damaged, or no checkpoint of torch.save."),
    "long": (b"\x8b\x04\x00\x00\x001234", "its pickle has the operation LONG4, which no network needs."),
    "memo": (pickle.NONE + pickle.LONG_BINPUT + b"\xff\xff\xff\xff", "it holds no network;"),  # a place in memory
    "stride 0": (module(_buffers=b"}X\x01\x00\x00\x00a" + TOO_LARGE + b"s"), "is damaged, or no checkpoint"),
    "outside": (module(_buffers=b"}X\x01\x00\x00\x00a" + OUTSIDE + b"s"), "is damaged, or no checkpoint"),
    "deep": (DEEP, "it holds no network;"),
    "deep key": (b"}" + DEEP + b"Ns", "is damaged, or no checkpoint"),  # whose hash would go down all of them
    "deep set": (b"c__builtin__\nset\n(]" + DEEP + b"atR", "it holds no network;"),
    "state of a tensor": (
        module(_buffers=b"}X\x01\x00\x00\x00a" + SMALL + RESET + b"s"),
        "is damaged, or no checkpoint",
    ),
    "state of a function": (b"ctorch._utils\n_rebuild_tensor_v2\n}X\x08\x00\x00\x00__name__Nsb", "is damaged, or no"),
    "state of a dict": (b"ccollections\nOrderedDict\n)R}X\x03\x00\x00\x00getNsb", "it holds no network;"),
    "tensor of arguments": (
        b"ccollections\nOrderedDict\n" + TENSOR % (b"K\x04\x85", b"K\x01\x85") + b"R",
        "is damaged, or no checkpoint",
    ),
    "empty but long": (TENSOR % (b"J\xff\xff\xff\x7fK\x00\x86", b"K\x00K\x00\x86"), "is damaged, or no checkpoint"),
    "digits of sizes": (
        TENSOR % (b"(" + (b"\x8a\xff" + b"\x7f" * 255) * 5000 + b"t", b"(" + b"K\x01" * 5000 + b"t"),
        "is damaged, or no checkpoint",
    ),
    "keys that collide": (
        b"}(" + b"".join(b"\x8a\x0b" + (i * (2**61 - 1)).to_bytes(11, "little") + b"N" for i in range(9)) + b"u",
        "is damaged, or no checkpoint",
    ),
    "long name": (b"c" + b"x" * 10_000 + b"\ny\n", "it asks for " + "x" * 100 + ", which is neither"),
    "no weights": (module(_buffers=b"}"), "its network has no weights."),
    "empty": (b"", "is damaged, or no checkpoint"),
    "none": (b"N", "it holds no network;"),
    "no model": (b"}X\x05\x00\x00\x00modelNs", "it holds no network;"),
}
READ_ALL = """
import resource, sys
from companion.models.checkpoint import read_weights
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, used + 2**29))
for path in sys.argv[1:]:
    try:
        read_weights(path)
        print("read", flush=True)
    except ValueError as error:
        print(error, flush=True)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="looks up its memory in /proc")
def test_what_asks_for_too_much_is_refused(tmp_path):
    """In a process of its own with little memory: what goes wrong there may take the process with it."""
    paths = [forged(tmp_path / f"{name}.pt", program(body), [bytes(16)]) for name, (body, _) in TOO_MUCH.items()]
    done = subprocess.run(
        [sys.executable, "-c", READ_ALL, *paths], capture_output=True, text=True, timeout=200, check=False
    )
    said = done.stdout.splitlines()
    for (name, (_, expected)), line in zip(TOO_MUCH.items(), said, strict=False):
        assert expected in line, name
    assert len(said) == len(TOO_MUCH), done.stderr
    assert done.returncode == 0, done.stderr


def test_a_forged_module_is_read_as_one(tmp_path):
    """Or the tests above would refuse their files for another reason."""
    body = module(_buffers=b"}X\x01\x00\x00\x00a" + TENSOR % (b"K\x04\x85", b"K\x01\x85") + b"s")
    found = read_weights(forged(tmp_path / "x.pt", program(body), [bytes(16)]))
    assert torch.equal(found["a"], torch.zeros(4))


def test_modules_within_modules_without_end(tmp_path):
    """Each holds the next one twice: 2³⁰ of them, if one walks them all."""
    model = nn.Module()
    model.add_module("leaf", nn.Linear(1, 1))
    for _ in range(30):
        outer = nn.Module()
        outer.add_module("a", model)
        outer.add_module("b", model)
        model = outer
    torch.save(nn.Sequential(model), tmp_path / "x.pt")
    with pytest.raises(CompanionError, match="more modules than any network"):
        read_weights(tmp_path / "x.pt")
    assert MOST < 2**30


def test_many_weights_in_many_places(tmp_path):
    leaf = nn.Module()
    for i in range(400):
        leaf.register_buffer(f"b{i}", torch.zeros(1))
    model = nn.Module()
    for i in range(400):
        model.add_module(f"m{i}", leaf)
    torch.save(model, tmp_path / "x.pt")
    with pytest.raises(CompanionError, match="more modules than any network"):
        read_weights(tmp_path / "x.pt")


def test_parts_that_lie_on_top_of_each_other_are_refused(tmp_path):
    """Two names for the same bytes of the file."""
    path = forged(tmp_path / "x.pt", program(b"N"), [bytes(10_000)] * 2)
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        first, second = (info.header_offset for info in archive.infolist()[1:])
    place = content.rindex(second.to_bytes(4, "little"))
    directory = content.index(b"PK\x01\x02")
    end = content.index(b"PK\x05\x06")
    cut = second  # without the second part's own bytes
    head = content[:cut] + content[directory:place] + first.to_bytes(4, "little") + content[place + 4 : end]
    tail = bytearray(content[end:])
    tail[16:20] = cut.to_bytes(4, "little")
    path.write_bytes(head + tail)
    with pytest.raises(CompanionError, match=r"its parts lie on top of each other\.$"):
        read_weights(path)


def test_other_files_are_refused(tmp_path):
    buffer = io.BytesIO()
    torch.save(network().state_dict(), buffer)
    (tmp_path / "state.pt").write_bytes(buffer.getvalue())
    (tmp_path / "text.pt").write_text("no zip")
    forged(tmp_path / "small.pt", program(b"N"), compress=zipfile.ZIP_DEFLATED)
    whole = buffer.getvalue()
    (tmp_path / "half.pt").write_bytes(whole[: len(whole) // 2])
    for name, says in (
        ("state.pt", r"it holds no network; a dict of tensors is read by torch\.load\(weights_only=True\)\.$"),
        ("text.pt", r"text\.pt is damaged, or no checkpoint of torch\.save\.$"),
        ("half.pt", r"half\.pt is damaged, or no checkpoint of torch\.save\.$"),
        ("small.pt", r"small\.pt is not read: it is compressed, which torch\.save does not do\.$"),
        ("none.pt", r"cannot read .*none\.pt: No such file or directory\.$"),
    ):
        with pytest.raises(CompanionError, match=says):
            read_weights(tmp_path / name)
