import pickle

import numpy as np
import pytest
import torch
from torch import nn

from companion import CompanionError, datasets, models, train


@pytest.fixture(scope="module")
def data():
    return torch.utils.data.Subset(datasets.load("digits", split="train"), range(96))


class Stop(Exception):
    """Somebody pulled the plug."""


class PullsThePlug(nn.Module):
    """Runs the network and stops the run when it enters forward pass number ``at``, in training."""

    def __init__(self, inner, at):
        super().__init__()
        self.inner, self.left = inner, at

    def forward(self, x):
        if self.training:
            self.left -= 1
            if self.left < 0:
                raise Stop
        return self.inner(x)


def network(at=10**9):
    return PullsThePlug(models.create("cifar_resnet14", width=4, seed=0), at)


def run(model, data, path, **settings):
    arguments = {"epochs": 2, "batch_size": 16, "augment": "shift_flip", "checkpoint_seconds": 0, "progress": False}
    return train.fit(model, data, checkpoint=path, **(arguments | settings))


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_a_run_stopped_at_any_step_ends_as_if_it_had_not(data, tmp_path):
    torch.set_num_threads(1)
    whole = network()
    history = run(whole, data, tmp_path / "whole")
    for at in range(0, 12):  # 2 epochs of 6 steps
        path = tmp_path / f"run{at}"
        with pytest.raises(Stop):
            run(network(at), data, path)
        again = network()
        resumed = run(again, data, path, resume=True)
        assert same(whole, again), f"stopped at step {at}"
        assert resumed.best_epoch == history.best_epoch
        assert [e.train_loss for e in resumed.epochs] == pytest.approx([e.train_loss for e in history.epochs])
        assert [e.validation_loss for e in resumed.epochs] == [e.validation_loss for e in history.epochs]


def test_a_run_in_bf16_resumes_to_the_same_weights_too(data, tmp_path):
    torch.set_num_threads(1)
    whole, again = network(), network()
    run(whole, data, tmp_path / "whole", precision="bf16")
    with pytest.raises(Stop):
        run(network(7), data, tmp_path / "run", precision="bf16")
    run(again, data, tmp_path / "run", precision="bf16", resume=True)
    assert same(whole, again)


def test_a_finished_run_resumes_to_itself_without_training(data, tmp_path):
    first, second = network(), network(at=0)
    run(first, data, tmp_path / "run")
    run(second, data, tmp_path / "run", resume=True)
    assert same(first, second)


def test_resume_without_a_checkpoint_starts_from_nothing(data, tmp_path):
    a, b = network(), network()
    run(a, data, tmp_path / "a")
    run(b, data, tmp_path / "b", resume=True)
    assert same(a, b)


def test_an_unfinished_run_is_not_thrown_away(data, tmp_path):
    with pytest.raises(Stop):
        run(network(3), data, tmp_path / "run")
    kept = (tmp_path / "run").read_bytes()
    with pytest.raises(CompanionError, match="holds an unfinished run"):
        run(network(), data, tmp_path / "run")
    assert (tmp_path / "run").read_bytes() == kept


@pytest.mark.parametrize(
    "change",
    [{"epochs": 3}, {"batch_size": 8}, {"lr": 1e-3}, {"seed": 1}, {"augment": None}, {"validation": 0.2}],
)
def test_a_run_with_other_settings_is_not_mixed_in(data, tmp_path, change):
    with pytest.raises(Stop):
        run(network(3), data, tmp_path / "run")
    (setting,) = change
    with pytest.raises(CompanionError, match=f"is of another run: its (samples|{setting}) is"):
        run(network(), data, tmp_path / "run", resume=True, **change)


def test_numbers_of_numpy_make_a_usable_checkpoint(data, tmp_path):
    settings = {"lr": np.float64(1e-3), "epochs": np.int64(1), "batch_size": np.int32(32)}
    a, b = network(), network()
    run(a, data, tmp_path / "run", **settings)
    run(b, data, tmp_path / "run", resume=True, **settings)
    assert same(a, b)


class OwnGenerator(torch.utils.data.Dataset):
    """Samples that no seed of ours reaches, of a number format that NumPy does not know."""

    def __init__(self):
        self.random = np.random.default_rng()

    def __len__(self):
        return 16

    def __getitem__(self, i):
        return torch.full((3,), self.random.random(), dtype=torch.bfloat16), i % 3


def test_a_run_on_samples_beyond_our_seeds_can_be_resumed(tmp_path):
    model = nn.Linear(3, 3)
    run(model, OwnGenerator(), tmp_path / "run", augment=None, precision="bf16")
    run(nn.Linear(3, 3), OwnGenerator(), tmp_path / "run", augment=None, precision="bf16", resume=True)


def test_another_network_is_not_mixed_in(data, tmp_path):
    run(models.create("cifar_resnet14", width=4), data, tmp_path / "run")
    with pytest.raises(CompanionError, match="its configuration is"):
        run(models.create("cifar_resnet14", width=8), data, tmp_path / "run", resume=True)


def test_other_data_of_the_same_size_are_not_mixed_in(tmp_path):
    def points(seed):
        generator = torch.Generator().manual_seed(seed)
        return torch.utils.data.TensorDataset(torch.randn(32, 3, generator=generator), torch.arange(32) % 3)

    run(nn.Linear(3, 3), points(0), tmp_path / "run", augment=None)
    with pytest.raises(CompanionError, match="its data is"):
        run(nn.Linear(3, 3), points(1), tmp_path / "run", augment=None, resume=True)
    with pytest.raises(CompanionError, match="its shapes is"):
        run(nn.Linear(3, 4), points(0), tmp_path / "run", augment=None, resume=True)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: torch.zeros(3),
        lambda content: content | {"settings": None},
        lambda content: content | {"settings": [1]},
        lambda content: content | {"state": None},
        lambda content: content | {"state": {}},
        lambda content: content | {"state": content["state"] | {"run": {"steps": 1}}},
        lambda content: content | {"state": content["state"] | {"run": content["state"]["run"] | {"step": 10**6}}},
        lambda content: content | {"state": content["state"] | {"run": content["state"]["run"] | {"step": "x"}}},
        lambda content: content | {"state": content["state"] | {"run": content["state"]["run"] | {"best": {}}}},
        lambda content: content | {"state": content["state"] | {"run": content["state"]["run"] | {"epochs": [{}]}}},
        lambda content: content | {"settings": content["settings"] | {"lr": torch.zeros(3)}},
        lambda content: content | {"state": content["state"] | {"optimizer": {}}},
        lambda content: content | {"state": content["state"] | {"model": {}}},
    ],
)
def test_a_forged_checkpoint_is_one_sentence(data, tmp_path, change):
    path = tmp_path / "run"
    run(network(), data, path)
    torch.save(change(torch.load(path, weights_only=True)), path)
    with pytest.raises(CompanionError, match=r"not a checkpoint or is damaged|is of another run") as caught:
        run(network(), data, path, resume=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["empty", "truncated", "text", "foreign"])
def test_a_damaged_checkpoint_is_one_sentence(data, tmp_path, damage):
    path = tmp_path / "run"
    run(network(), data, path)
    content = path.read_bytes()
    if damage == "foreign":
        torch.save({"model": 1}, path)
    else:
        path.write_bytes({"empty": b"", "truncated": content[: len(content) // 2], "text": b"hello\n" * 99}[damage])
    with pytest.raises(CompanionError, match="not a checkpoint or is damaged") as caught:
        run(network(), data, path, resume=True)
    assert "\n" not in str(caught.value)


def test_a_hostile_checkpoint_runs_nothing(data, tmp_path):
    class Payload:
        def __reduce__(self):
            return open, (str(tmp_path / "owned"), "w")

    torch.save({"format": Payload()}, tmp_path / "zip")
    (tmp_path / "plain").write_bytes(pickle.dumps(Payload()))
    for name in ("zip", "plain"):
        with pytest.raises(CompanionError, match="not a checkpoint"):
            run(network(), data, tmp_path / name, resume=True)
    assert not (tmp_path / "owned").exists()


def test_nothing_but_the_checkpoint_is_left(data, tmp_path):
    run(network(), data, tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
