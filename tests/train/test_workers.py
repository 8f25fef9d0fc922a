"""Several workers train and judge as one process does."""

import math
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import cloudpickle
import pytest
import torch
from torch import nn
from torch.utils.data import Subset, TensorDataset

from companion import CompanionError, datasets, models, train
from companion.train.batches import Batches
from companion.train.horovod import Horovod
from companion.train.parallel import WorkerError, launch
from companion.train.tasks import TASKS
from companion.train.workers import Distributed


def blobs(n=61, classes=3, seed=0):
    """Points around class centres, in float64 so that only rounding far below any tolerance differs."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    points = torch.eye(classes, dtype=torch.float64)[labels] * 3
    return TensorDataset(points + torch.randn(n, classes, generator=generator, dtype=torch.float64), labels)


def mlp(seed=0, inputs=3, dropout=0.0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Flatten(), nn.Linear(inputs, 16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 3)
        ).double()


def pictures(n=29):
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(
        torch.rand(n, 3, 8, 8, generator=generator, dtype=torch.float64),
        torch.randint(0, 3, (n,), generator=generator),
    )


def convolutions():
    # No bias before the normalisation that takes it out again: its gradient is all rounding, which AdamW would enlarge.
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)
        ).double()


def weights(model):
    return torch.cat([value.flatten().double() for value in model.state_dict().values()])


def fit(model, data, **settings):
    arguments = {"epochs": 2, "batch_size": 8, "lr": 1e-2, "validation": 0, "progress": False}
    return train.fit(model, data, **(arguments | settings))


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# A step in parts


@pytest.mark.parametrize("accumulate", [2, 3, 8])
def test_parts_of_a_step_add_up_to_it(accumulate):
    whole, parts = mlp(), mlp()
    histories = [fit(whole, blobs()), fit(parts, blobs(), accumulate=accumulate)]  # the last batch has 5 samples
    close(weights(parts), weights(whole))
    assert not torch.allclose(weights(whole), weights(mlp()), atol=1e-2)
    assert histories[1].epochs[-1].train_loss == pytest.approx(histories[0].epochs[-1].train_loss, rel=1e-6)


def test_parts_are_weighed_by_what_counts_in_them():
    """Pixels that are not void: the mean over a batch is not the mean of its parts' means."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(6, 3, 4, 4, generator=generator, dtype=torch.float64)
    masks = torch.randint(0, 3, (6, 4, 4), generator=generator)
    masks[:2] = 255
    masks[2, 1:] = 255
    task = replace(TASKS["segment"], evaluation_batch=6)
    results = []
    for accumulate in (1, 2, 6):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = nn.Conv2d(3, 3, 1).double()
        fit(model, TensorDataset(images, masks), task=task, batch_size=6, accumulate=accumulate, augment=None)
        results.append(weights(model))
    close(results[1], results[0])
    close(results[2], results[0])


def test_augmentation_is_of_the_sample_not_of_the_part():
    whole, parts = mlp(inputs=192), mlp(inputs=192)
    for model, accumulate in ((whole, 1), (parts, 3)):
        fit(model, pictures(), augment="shift_flip", accumulate=accumulate)
    close(weights(parts), weights(whole))


def test_parts_drop_other_units():
    dropped = []

    class Watching(nn.Dropout):
        def forward(self, x):
            y = super().forward(x)
            dropped.append(y.detach() == 0)
            return y

    model = nn.Sequential(nn.Linear(3, 16), nn.Sigmoid(), Watching(0.5), nn.Linear(16, 3)).double()
    fit(model, blobs(8), epochs=1, accumulate=2)
    assert not torch.equal(*dropped[:2])


def test_long_gradients_are_shortened():
    """Against a loop written out by hand; the parts' sum is shortened, not each part."""
    model, reference, data = mlp(), mlp(), blobs(16)
    points, labels = data.tensors
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-2, weight_decay=1e-2)
    lengths = []
    for step in range(3):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * train.loop.schedule(step, 3)
        optimizer.zero_grad()
        nn.functional.cross_entropy(reference(points), labels).backward()
        length = math.sqrt(sum(p.grad.square().sum().item() for p in reference.parameters()))
        lengths.append(length)
        for p in reference.parameters():
            p.grad *= min(1.0, 0.5 / (length + 1e-6))
        optimizer.step()
    assert max(lengths) > 0.5
    fit(model, data, epochs=3, batch_size=16, accumulate=4, clip_norm=0.5)
    close(weights(model), weights(reference), 1e-9)
    free = mlp()
    fit(free, data, epochs=3, batch_size=16)
    assert not torch.allclose(weights(free), weights(reference), rtol=0, atol=1e-9)


# Shares


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("parts", [1, 3])
def test_every_sample_of_a_batch_is_one_workers(size, parts):
    data = TensorDataset(torch.arange(23), torch.arange(23))
    whole = Batches(data, 7, torch.utils.data.default_collate, 0, shuffle=True)
    shares = [
        Batches(data, 7, torch.utils.data.default_collate, 0, shuffle=True, parts=parts, rank=rank, size=size)
        for rank in range(size)
    ]
    for step in range(2 * whole.steps):
        [(expected, _)] = whole[step]
        found = [inputs for share in shares for inputs, _ in share[step]]
        assert sorted(torch.cat(found).tolist()) == sorted(expected.tolist())
        for share in shares:
            at = [i for part in share.share(step) for i in part]
            assert torch.cat([*(inputs for inputs, _ in share[step]), torch.tensor([], dtype=int)]).tolist() == [
                expected[i].item() for i in at
            ]
            assert share.idle(step) == (not at)


def test_a_worker_without_a_sample_is_lent_one():
    data = TensorDataset(torch.arange(2), torch.arange(2))
    share = Batches(data, 8, torch.utils.data.default_collate, 0, shuffle=False, rank=3, size=4, lend=True)
    assert share.idle(0)
    assert share[0][0][0].tolist() == [0]


# Workers


class Stop(Exception):
    """Somebody pulled the plug."""


def stop(epoch):
    raise Stop


def test_a_resumed_run_may_need_more_parts(tmp_path):
    """As with fewer workers, whose shares are larger."""
    whole, parts = mlp(), mlp()
    fit(whole, blobs(), epochs=3)
    with suppress(Stop):
        fit(parts, blobs(), epochs=3, on_epoch=stop, checkpoint=tmp_path / "c", checkpoint_seconds=0)
    fit(parts, blobs(), epochs=3, checkpoint=tmp_path / "c", resume=True, accumulate=2)
    close(weights(parts), weights(whole))


def horovodrun(function, size, *arguments):
    """As `launch`, with the workers that horovodrun starts."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "task").write_bytes(cloudpickle.dumps((function, arguments)))
        command = [Path(sys.executable).with_name("horovodrun"), "-np", str(size), "-H", f"localhost:{size}"]
        done = subprocess.run(
            [*command, sys.executable, "-c", WORKER, name],
            capture_output=True,
            text=True,
            timeout=200,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return [cloudpickle.loads((folder / str(rank)).read_bytes()) for rank in range(size)]


WORKER = """
import os, sys
from pathlib import Path
import cloudpickle, torch
torch.set_num_threads(1)
folder = Path(sys.argv[1])
function, arguments = cloudpickle.loads((folder / "task").read_bytes())
(folder / os.environ["HOROVOD_RANK"]).write_bytes(cloudpickle.dumps(function(*arguments)))
"""

needs_horovod = pytest.mark.skipif(find_spec("horovod") is None, reason="Horovod is not built here (make horovod)")
START = {"ddp": launch, "horovod": horovodrun}
WAYS = ["ddp", pytest.param("horovod", marks=needs_horovod)]


def everything(how, folder):
    """What `test_workers_do_as_one_process` looks at, in one launch, which takes seconds."""
    found = {}
    with train.joined(how) as workers:
        rank, size = workers.rank, workers.size
        model = mlp(seed=rank)  # only the first one's counts
        history = fit(
            model, blobs(), workers=workers, batch_size=8 // size, lr=1e-2 / size, validation=blobs(25, seed=1)
        )
        found["plain"] = weights(model)
        found["history"] = [
            (epoch.train_loss, epoch.validation_loss, epoch.validation_score) for epoch in history.epochs
        ]

        model = mlp(inputs=192)
        settings = {"augment": "shift_flip", "accumulate": 8 // size, "clip_norm": 0.5, "batch_size": 8 // size}
        fit(model, pictures(), workers=workers, lr=1e-2 / size, **settings)
        found["parts"] = weights(model)

        model = convolutions()
        fit(model, pictures(28), workers=workers, sync_batch_norm=True, batch_size=8 // size, lr=1e-2 / size)
        found["synchronised"] = weights(model)
        found["kinds"] = {type(module).__name__ for module in model.modules()}

        model = convolutions()
        fit(model, pictures(28), workers=workers, epochs=13, batch_size=8 // size)  # 52 steps
        found["own statistics"] = weights(model)

        model = models.create("simple_cnn", seed=0)
        judged = Subset(datasets.load("digits", split="test"), range(61))
        found["scores"] = train.evaluate(model, judged, batch_size=7, progress=False, workers=workers)

        for at in ("first", "again"):
            path = folder / f"{at}{size}"
            options = {"checkpoint": path, "workers": workers, "batch_size": 8 // size, "lr": 1e-2 / size}
            with suppress(Stop):
                fit(mlp(), blobs(), epochs=3, on_epoch=stop, checkpoint_seconds=0, **options)
        model = mlp(seed=7 + rank)
        fit(model, blobs(), epochs=3, resume=True, **options)
        found["resumed"] = weights(model)
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    found, torch_threads = {}, torch.get_num_threads()
    torch.set_num_threads(1)
    found["plain"] = mlp()
    found["history"] = fit(found["plain"], blobs(), validation=blobs(25, seed=1))
    found["parts"] = mlp(inputs=192)
    fit(found["parts"], pictures(), augment="shift_flip", clip_norm=0.5)
    found["synchronised"] = convolutions()
    fit(found["synchronised"], pictures(28))
    found["resumed"] = mlp()
    fit(found["resumed"], blobs(), epochs=3)
    judged = Subset(datasets.load("digits", split="test"), range(61))
    found["scores"] = train.evaluate(models.create("simple_cnn", seed=0), judged, progress=False)
    torch.set_num_threads(torch_threads)
    return found


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("size", [2, 4])
def test_workers_do_as_one_process(how, size, alone, tmp_path):
    """At 61 samples in batches of 8, the last batch has 5: two workers for 5, or four for 5."""
    answers = START[how](everything, size, how, tmp_path)
    for found in answers:
        for what in ("plain", "parts", "synchronised", "resumed"):
            close(found[what], weights(alone[what]), 1e-9)
            assert torch.equal(found[what], answers[0][what])
        assert torch.equal(found["own statistics"], answers[0]["own statistics"])
        expected = [
            (epoch.train_loss, epoch.validation_loss, epoch.validation_score) for epoch in alone["history"].epochs
        ]
        assert found["history"] == [pytest.approx(row, rel=1e-6) for row in expected]
        assert [row[2] for row in found["history"]] == [row[2] for row in expected]
        assert found["scores"].metrics == alone["scores"].metrics
        assert found["scores"].samples == 61
        assert found["scores"].loss == pytest.approx(alone["scores"].loss, rel=1e-6)
        assert "BatchNorm2d" in found["kinds"]
    # The first of two workers left this; one process goes on with it, in batches as large.
    model = mlp(seed=5)
    path = tmp_path / f"first{size}"
    fit(model, blobs(), epochs=3, resume=True, checkpoint=path, batch_size=8 // size, lr=1e-2 / size)
    close(weights(model), weights(alone["resumed"]), 1e-9)


def few(how, n):
    with train.joined(how) as workers:
        model = mlp()
        fit(model, blobs(n), workers=workers, batch_size=2, lr=1e-2 / workers.size)
        return weights(model)


@pytest.mark.parametrize("how", WAYS)
def test_a_last_batch_with_fewer_samples_than_workers(how):
    answers = START[how](few, 3, how, 7)  # six and one
    model = mlp()
    fit(model, blobs(7), batch_size=6)
    for found in answers:
        close(found, weights(model), 1e-9)


def differ(what):
    with train.joined("ddp") as workers:
        hidden = 16 + workers.rank * (what == "shape")
        model = nn.Sequential(nn.Linear(3, hidden), nn.Linear(hidden, 3)).double()
        settings = {
            "lr": 1e-2 * (1 + workers.rank * (what == "rate")),
            "accumulate": 1 + workers.rank * (what == "parts"),
        }
        fit(model, blobs(), workers=workers, **settings)


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("shape", r"workers \d and \d differ in 0\.weight, \(\(1[67], 3\)"),
        ("rate", r"differ in lr, 0\.0[12] and 0\.0[12]:"),
        ("parts", r"differ in accumulate, [12] and [12]:"),
    ],
)
def test_workers_that_do_not_do_the_same_are_refused(what, sentence):
    with pytest.raises(WorkerError, match=sentence):
        launch(differ, 2, what)


def test_workers_that_torchrun_did_not_start_are_refused(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.delenv("RANK", raising=False)
    with (
        pytest.raises(CompanionError, match=r"for workers that torchrun starts \(RANK is not set\)"),
        train.joined("ddp"),
    ):
        pass


@pytest.mark.parametrize(
    ("raised", "sentence"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer"), "worker 1 of 3 lost the others"),
        (torch.distributed.DistNetworkError("reset"), "worker 1 of 3 lost the others"),
        (RuntimeError("shapes differ"), "^shapes differ$"),
    ],
)
def test_a_lost_worker_is_one_sentence(raised, sentence):
    workers = object.__new__(Distributed)
    workers.rank, workers.size = 1, 3
    with pytest.raises((CompanionError, RuntimeError), match=sentence) as caught, workers.losses():
        raise raised
    assert isinstance(caught.value, CompanionError) == ("lost" in sentence)


def together(how, folder):
    """What needs several trainings of one network, and all workers to refuse what one of them cannot do."""
    with train.joined(how) as workers:
        path = folder / "checkpoint"
        found = {}
        model = convolutions()
        # The last batch has 5 samples: 3 and 2, in as many parts each.
        fit(model, pictures(29), workers=workers, sync_batch_norm=True, batch_size=4, accumulate=4)
        for _ in range(2):
            fit(model, pictures(29), workers=workers, batch_size=4)
        found["weights"] = weights(model)
        with suppress(Stop):
            fit(mlp(), blobs(), on_epoch=stop, checkpoint=path, checkpoint_seconds=0, workers=workers)
        for name, options in {"not resumed": {}, "of another run": {"resume": True, "weight_decay": 0.5}}.items():
            try:
                fit(mlp(), blobs(), checkpoint=path, workers=workers, **options)
            except CompanionError as error:
                found[name] = str(error)
    return found


@pytest.mark.parametrize("how", WAYS)
def test_one_training_after_the_other(how, tmp_path):
    answers = START[how](together, 2, how, tmp_path)
    for found in answers:
        assert torch.equal(found["weights"], answers[0]["weights"])
        assert "holds an unfinished run: resume it" in found["not resumed"]
        assert "is of another run: its weight_decay is 0.01, this run's 0.5" in found["of another run"]


def halves(how):
    """Gradients that float16 can and cannot hold, the mean over two workers."""
    with train.joined(how, compression="fp16") as workers:
        model = nn.Linear(3, 1, bias=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        nn.init.zeros_(model.weight)
        forward, optimizer = workers.join(model, optimizer, 1)
        optimizer.zero_grad()
        own = torch.tensor([[1.0, 2049.0, 1e-9]]) * (1 + 2 * workers.rank)
        forward(own).sum().backward()
        workers.average(optimizer)
        workers.step(torch.amp.GradScaler("cpu", enabled=False), optimizer)
        return model.weight.detach()[0].tolist()


@pytest.mark.parametrize("how", WAYS)
def test_gradients_are_sent_in_sixteen_bits(how):
    for found in START[how](halves, 2, how):
        assert found[0] == -2.0
        assert found[1] == pytest.approx(-2 * 2049, rel=2**-11)
        assert found[1] != -2 * 2049  # which takes 12 bits
        assert found[2] == 0.0


def test_unknown_compressions_are_refused():
    with pytest.raises(CompanionError, match="no compression 'int8': choose one of none, fp16"):
        train.joined("ddp", compression="int8")


def test_unknown_ways_to_join_are_refused():
    with pytest.raises(CompanionError, match="no way 'mpi' to join workers"):
        train.joined("mpi")


# Where workers cannot compute


class OnGpu:
    """A network on a GPU, as far as `join` looks at it."""

    def parameters(self):
        yield SimpleNamespace(device=torch.device("cuda", 0))


def test_more_workers_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(CompanionError, match=r"^4 workers need as many GPUs, and there are 2: start fewer, or train w"):
        Distributed("none").join(OnGpu(), None, 1)


def test_horovod_for_cpus_refuses_a_gpu():
    hvd = SimpleNamespace(cuda_built=lambda: False)
    with pytest.raises(CompanionError, match=r"^this Horovod is built for CPUs, as `make horovod` does it: train with"):
        Horovod(hvd, "none").join(OnGpu(), None, 1)


def test_horovod_is_not_built(monkeypatch):
    monkeypatch.setitem(sys.modules, "horovod.torch", None)  # Python's word for a module that cannot be imported
    with (
        pytest.raises(CompanionError, match=r"^Horovod is not built here: `make horovod` in a clone of companion bui"),
        train.joined("horovod"),
    ):
        pass
