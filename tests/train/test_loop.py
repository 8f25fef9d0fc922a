import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from companion import CompanionError, datasets, models, train
from companion.train.batches import Batches
from companion.train.loop import WARM_UP, hold_out, schedule
from companion.train.tasks import TASKS


def blobs(n=64, classes=3, seed=0):
    """Points around class centres: learnable in a few steps."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    points = torch.eye(classes)[labels] * 3 + torch.randn(n, classes, generator=generator)
    return TensorDataset(points, labels)


def mlp(seed=0, dropout=0.0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 3))


def weights(model):
    return torch.cat([value.flatten().double() for value in model.state_dict().values()])


def fit(model, data=None, **settings):
    return train.fit(
        model, blobs() if data is None else data, **({"epochs": 3, "batch_size": 8, "progress": False} | settings)
    )


def test_learns_and_reports_every_epoch():
    model = mlp()
    history = fit(model, epochs=6, lr=1e-2)
    assert [epoch.epoch for epoch in history.epochs] == [1, 2, 3, 4, 5, 6]
    assert history.epochs[-1].train_loss < history.epochs[0].train_loss / 2
    assert history.score == "accuracy"
    assert train.evaluate(model, blobs(seed=1), progress=False).metrics["accuracy"] > 0.9
    assert not model.training


def test_equals_a_loop_written_out_by_hand():
    """One epoch without hold-out or augmentation: AdamW, warm-up and cosine, mean loss a batch."""
    model, reference, data = mlp(), mlp(), blobs(n=16)
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-2, weight_decay=1e-2)
    history = fit(model, data, epochs=1, batch_size=16, lr=1e-2, validation=0)
    points, labels = data.tensors  # one batch: its order changes only the rounding of the mean
    loss = nn.functional.cross_entropy(reference(points), labels)
    loss.backward()
    optimizer.step()
    torch.testing.assert_close(weights(model), weights(reference), rtol=1e-5, atol=1e-6)
    assert history.epochs[0].train_loss == pytest.approx(loss.item(), rel=1e-5)


def test_another_task_brings_its_own_loss_and_score_for_the_same_data():
    """Cross-entropy with smoothed labels instead of the plain one, judged by the share of the first class."""

    class First:
        def __init__(self):
            self.first = self.total = 0

        def update(self, outputs, targets):
            self.first += int((outputs.argmax(1) == 0).sum())
            self.total += len(targets)

        def compute(self):
            return {"first": self.first / self.total}

    def smooth(network, outputs, targets):
        return nn.functional.cross_entropy(outputs, targets, label_smoothing=0.5)

    model, reference, data = mlp(), mlp(), blobs(n=16)
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-2, weight_decay=1e-2)
    task = replace(train.task_of(data), loss=smooth, meter=First)
    history = fit(model, data, task=task, epochs=1, batch_size=16, lr=1e-2, validation=data)
    points, labels = data.tensors
    loss = nn.functional.cross_entropy(reference(points), labels, label_smoothing=0.5)
    loss.backward()
    optimizer.step()
    torch.testing.assert_close(weights(model), weights(reference), rtol=1e-5, atol=1e-6)
    assert history.epochs[0].train_loss == pytest.approx(loss.item(), rel=1e-5)
    assert history.score == "first"
    assert history.epochs[0].validation_score == (model(points).argmax(1) == 0).double().mean().item()


def test_a_run_is_not_resumed_with_a_task_of_other_settings(tmp_path):
    data, path = blobs(), tmp_path / "run.checkpoint"
    soft, hard = (replace(train.task_of(data), settings={"softness": softness}) for softness in (0.5, 0.1))
    first, second = mlp(), mlp()
    fit(first, data, task=soft, checkpoint=path)
    fit(second, data, task=soft, checkpoint=path, resume=True)
    assert torch.equal(weights(first), weights(second))
    with pytest.raises(CompanionError, match=r"its softness is 0\.5, this run's 0\.1"):
        fit(mlp(), data, task=hard, checkpoint=path, resume=True)


def test_learning_rate_warms_up_and_falls_to_zero():
    rates = [schedule(step, 1000) for step in range(1000)]
    assert rates[0] == pytest.approx(1 / (WARM_UP * 1000))
    assert max(rates) == 1.0
    assert rates[: rates.index(1.0)] == sorted(rates[: rates.index(1.0)])
    assert rates[525] == pytest.approx(0.5, abs=1e-3)  # half way down the cosine
    assert 0 < rates[-1] < 1e-4
    assert all(0 < schedule(step, total) <= 1 for total in range(1, 30) for step in range(total))


class Recording(Dataset):
    """Blobs that remember which sample was asked for, in this process."""

    def __init__(self, n=40):
        self.inner, self.asked = blobs(n), []

    def __len__(self):
        return len(self.inner)

    def __getitem__(self, i):
        self.asked.append(i)
        return self.inner[i]


def test_every_epoch_sees_each_training_sample_once_in_a_new_order_and_never_the_held_out_ones():
    data = Recording(40)
    fit(mlp(), data, epochs=2, batch_size=8, validation=0.25)
    asked = data.asked[1:]  # before them, one look at what a sample is
    first, held_out, second, again = asked[:30], asked[30:40], asked[40:70], asked[70:]
    assert sorted(first) == sorted(second)
    assert first != second
    assert held_out == again
    assert sorted(first + held_out) == list(range(40))


def test_keeps_the_weights_of_the_epoch_that_validated_best():
    """Constant inputs whose labels change: the scores of the epochs are forced through a validation set."""
    model, seen = mlp(), []

    class Watching(Dataset):
        def __len__(self):
            return 30

        def __getitem__(self, i):
            if i == 0:
                seen.append(weights(model).clone())
            return blobs(30, seed=3)[i]

    history = fit(model, epochs=5, lr=0.3, validation=Watching())
    ranks = [(epoch.validation_score, -epoch.validation_loss) for epoch in history.epochs]
    assert history.best_epoch == 1 + ranks.index(max(ranks))
    assert torch.equal(weights(model), seen[history.best_epoch - 1])


def test_without_validation_the_last_epoch_counts():
    history = fit(mlp(), validation=0)
    assert history.best_epoch == 3
    assert history.epochs[0].validation_score is None


def test_same_seed_same_weights_other_seed_other_weights():
    results = []
    for seed in (1, 1, 2):
        model = mlp(dropout=0.5)
        fit(model, seed=seed)
        results.append(weights(model))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_global_generators_are_given_back():
    def draws():
        return random.random(), np.random.rand(), torch.rand(1).item()

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = draws()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    model = mlp(dropout=0.5)
    fit(model)
    train.evaluate(model, blobs(), progress=False)
    assert draws() == expected


class Noisy(Dataset):
    """Samples whose transforms draw from all three global generators, as users' own do."""

    def __len__(self):
        return 32

    def __getitem__(self, i):
        noise = torch.tensor([random.random(), np.random.rand(), torch.rand(1).item()])
        return noise + torch.eye(3)[i % 3], i % 3


def test_random_transforms_are_seeded_and_differ_between_samples_and_epochs():
    batches = Batches(Noisy(), 4, torch.utils.data.default_collate, seed=0, shuffle=True)
    (a, _), (b, _) = batches[0] + batches[8]  # the first batch of two epochs, in one part each
    assert torch.equal(batches[0][0][0], a)
    assert len({round(value, 6) for value in torch.cat([a, b])[:, 2].tolist()}) > 4


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers):
    results = []
    for num_workers in (0, workers):
        model = mlp(dropout=0.5)
        fit(model, Noisy(), num_workers=num_workers)
        results.append(weights(model))
    assert torch.equal(*results)


def test_evaluate_is_exact_over_uneven_batches():
    model, data = mlp(), blobs(n=50)
    points, labels = data.tensors
    expected = model(points)
    scores = train.evaluate(model, data, batch_size=16, progress=False)
    assert scores.samples == 50
    assert scores.metrics["accuracy"] == (expected.argmax(1) == labels).float().mean().item() or math.isclose(
        scores.metrics["accuracy"], (expected.argmax(1) == labels).double().mean().item()
    )
    assert scores.loss == pytest.approx(nn.functional.cross_entropy(expected, labels).item(), rel=1e-5)


def test_evaluate_and_predict_leave_the_network_as_it_was():
    model = models.create("cifar_resnet14", width=4, seed=0).train()
    before, layout = weights(model), model.conv1.weight.stride()
    data = datasets.load("digits", split="test")
    train.evaluate(model, torch.utils.data.Subset(data, range(32)), progress=False)
    assert torch.equal(weights(model), before)  # the normalisations' averages too
    assert model.conv1.weight.stride() == layout
    assert model.training


def test_predict_returns_outputs_in_the_order_of_the_data():
    model, data = mlp().eval(), blobs(n=20)
    outputs, targets = train.predict(model, data, batch_size=6, progress=False)
    torch.testing.assert_close(outputs, model(data.tensors[0]).detach())
    assert torch.equal(targets, data.tensors[1])
    assert outputs.dtype == torch.float32


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_precision_reaches_the_arithmetic_and_leaves_the_weights_in_float32(precision):
    dtypes = set()
    model = mlp()
    model[0].register_forward_hook(lambda _m, _i, output: dtypes.add(output.dtype))
    fit(model, precision=precision)
    assert dtypes == {torch.float32 if precision == "fp32" else torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_images_are_computed_channels_last_and_the_network_comes_back_as_it_was():
    model = models.create("simple_cnn", seed=0)
    seen = []
    model.conv1.register_forward_hook(
        lambda m, inputs, _o: seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
    )
    data = torch.utils.data.Subset(datasets.load("digits", split="train"), range(32))
    fit(model, data, epochs=1)
    assert seen
    assert all(seen)
    assert model.conv1.weight.is_contiguous()


def test_each_epoch_is_reported_as_it_ends():
    reported = []
    history = fit(mlp(), on_epoch=reported.append)
    assert tuple(reported) == history.epochs


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"lr": 0.0}, "lr is 0.0: give a number above 0"),
        ({"lr": 1e30}, r"lr is 1e\+30"),
        ({"lr": math.nan}, "lr is nan"),
        ({"lr": math.inf}, "lr is inf"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"seed": -1}, "seed is -1"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0"),
        ({"epochs": 1.5}, "must be whole numbers"),
        ({"lr": "fast"}, "must be whole numbers"),
        ({"precision": "int3"}, "no precision 'int3'"),
        ({"precision": "fp16", "device": "cpu"}, "fp16 trains on a GPU only"),
        ({"device": "abacus"}, "no device 'abacus'"),
        ({"augment": "explode"}, "no augmentation 'explode'"),
        ({"validation": 1.0}, "validation is 1.0"),
        ({"validation": -0.1}, "validation is -0.1"),
    ],
)
def test_unusable_arguments_are_refused_before_any_work(settings, says):
    model = mlp()
    before = weights(model)
    with pytest.raises(CompanionError, match=says) as caught:
        fit(model, **settings)
    assert "\n" not in str(caught.value)
    assert torch.equal(weights(model), before)


def test_a_loss_that_explodes_stops_the_run():
    with pytest.raises(CompanionError, match="no longer finite in epoch 1"):
        fit(mlp(), TensorDataset(torch.full((16, 3), math.inf), torch.zeros(16, dtype=torch.long)))


def test_weights_that_explode_in_the_last_step_are_noticed_though_its_loss_was_finite():
    with pytest.raises(CompanionError, match="weight is no longer finite in epoch 1"):
        fit(mlp(), blobs(16), epochs=1, batch_size=16, lr=1.0, weight_decay=1e39)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"labels": tuple("abc")}, "has 10 classes, digits has 3"),
        ({"labels": tuple("abcdefghij")}, "'0' is not 'a'"),
    ],
)
def test_data_that_do_not_fit_the_network_are_refused(change, says):
    data = datasets.load("digits", split="test")
    model = models.create("simple_cnn", labels=data.labels)
    for key, value in change.items():
        setattr(data, key, value)
    for job in (lambda: train.evaluate(model, data), lambda: fit(model, data)):
        with pytest.raises(CompanionError, match=says):
            job()


def test_data_for_another_task_are_refused(monkeypatch):
    data = datasets.load("digits", split="test")
    model = models.create("simple_cnn")
    monkeypatch.setattr(data, "task", "juggle", raising=False)
    with pytest.raises(CompanionError, match="there is no task 'juggle'"):
        train.evaluate(model, data)
    monkeypatch.setitem(TASKS, "juggle", TASKS["classify"])
    with pytest.raises(CompanionError, match="simple_cnn is for the task 'classify', digits is for 'juggle'"):
        train.evaluate(model, data)


def test_pictures_of_another_size_are_refused():
    data = TensorDataset(torch.rand(4, 3, 48, 48), torch.zeros(4, dtype=torch.long))
    with pytest.raises(CompanionError, match=r"takes tensors of shape \(3, 32, 32\), the data set has \(3, 48, 48\)"):
        train.evaluate(models.create("simple_cnn"), data)


def test_samples_that_are_no_pairs_and_batches_of_nothing_are_refused():
    with pytest.raises(CompanionError, match="must be a pair"):
        fit(mlp(), [1, 2, 3])
    with pytest.raises(CompanionError, match="batch_size is 0"):
        train.evaluate(mlp(), blobs(), batch_size=0)


def test_empty_and_tiny_data_are_refused():
    with pytest.raises(CompanionError, match="empty"):
        fit(mlp(), TensorDataset(torch.empty(0, 3), torch.empty(0, dtype=torch.long)))
    with pytest.raises(CompanionError, match="too few"):
        fit(mlp(), blobs(1))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_that_cannot_be_read_is_named_in_one_sentence(workers):
    class Broken(Dataset):
        def __len__(self):
            return 32

        def __getitem__(self, i):
            raise CompanionError(f"picture {i} is damaged.")

    with pytest.raises(CompanionError, match=r"^picture \d+ is damaged\.$"):
        fit(mlp(), Broken(), num_workers=workers)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_trains_on_a_gpu_in_every_precision(precision):
    data = datasets.load("digits", split="train")
    model = models.create("simple_cnn", labels=data.labels, seed=0)
    train.fit(model, data, epochs=5, precision=precision, device="cuda", progress=False)
    assert next(model.parameters()).device.type == "cpu"
    scores = train.evaluate(model, datasets.load("digits", split="test"), precision=precision, device="cuda")
    assert scores.metrics["accuracy"] > 0.9


def test_a_subset_is_known_by_its_whole():
    whole = datasets.load("digits", split="train")
    part = torch.utils.data.Subset(torch.utils.data.Subset(whole, range(100)), range(20))
    with pytest.raises(CompanionError, match="'a' is not '0'"):
        train.evaluate(models.create("simple_cnn", labels="abcdefghij"), part)
    results = []
    for augment in ("default", "shift", None):
        model = models.create("simple_cnn", seed=0)
        train.fit(model, part, epochs=1, augment=augment)
        results.append(weights(model))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_training_images_are_augmented_and_validation_images_are_not():
    """A white dot in the middle of each picture: moved in training, in its place when judged."""
    images = torch.zeros(20, 3, 32, 32)
    images[:, :, 16, 16] = 1
    seen = {True: set(), False: set()}
    model = models.create("simple_cnn", seed=0)

    def look(layer, inputs):
        first_channel = inputs[0][:, 0]
        dots = (first_channel == first_channel.max()).nonzero()  # [image, row, column]
        seen[layer.training].update(dots[:, 1:].sum(1).tolist())

    model.conv1.register_forward_pre_hook(look)
    fit(model, TensorDataset(images, torch.arange(20) % 2), epochs=2, augment="shift")
    assert seen[False] == {32}
    assert len(seen[True]) > 5


def test_judged_data_keep_their_random_transforms_from_epoch_to_epoch():
    batches = Batches(Noisy(), 8, torch.utils.data.default_collate, seed=0, shuffle=False)
    for k in range(batches.steps):
        assert torch.equal(batches[k][0][0], batches[batches.steps + k][0][0])


def test_images_made_from_one_scan_are_held_out_together():
    class Watching(Dataset):
        def __init__(self):
            self.whole, self.asked = datasets.load("hard_digits", split="train"), {"train": set(), "validation": set()}
            self.groups = self.whole.groups

        def __len__(self):
            return len(self.whole)

        def __getitem__(self, i):
            self.asked["train" if model.training else "validation"].add(int(self.whole.scans[i, 0]))
            return self.whole[i]

    model = models.create("simple_cnn", seed=0)
    data = Watching()
    part = torch.utils.data.Subset(data, range(0, 4000, 4))
    model.train()
    data[0]
    data.asked["train"].clear()
    train.fit(model, part, epochs=1)
    assert len(data.asked["validation"]) >= 20
    assert not data.asked["train"] & data.asked["validation"]


def test_the_loss_of_16_bit_outputs_is_computed_in_32():
    model, data = mlp(), blobs(60)
    outputs, targets = train.predict(model, data, precision="bf16")
    expected = nn.functional.cross_entropy(outputs, targets).item()
    assert train.evaluate(model, data, precision="bf16").loss == pytest.approx(expected, rel=1e-5)


def test_flat_pictures_and_pictures_that_are_no_tensors_are_refused():
    for sample in (torch.rand(3072), "a picture"):
        with pytest.raises(CompanionError, match=r"simple_cnn takes tensors of shape \(3, 32, 32\)"):
            train.evaluate(models.create("simple_cnn"), [(sample, 0)])


def test_judging_leaves_frozen_parts_frozen():
    model = models.create("cifar_resnet14", width=4).train()
    model.bn1.eval()
    train.evaluate(model, torch.utils.data.Subset(datasets.load("digits", split="test"), range(8)))
    assert model.training
    assert not model.bn1.training


def test_groups_are_held_out_together_across_parts_and_never_too_many():
    class Grouped(Dataset):
        def __init__(self, groups):
            self.groups = groups

        def __len__(self):
            return len(self.groups)

        def __getitem__(self, i):
            return torch.zeros(3), 0

    parts = [Grouped(list("aabbcc")), Grouped(list("aabbccdd"))]
    training, held_out = hold_out(torch.utils.data.ConcatDataset(parts), 0.3, seed=0)
    letters = "aabbccaabbccdd"
    kept, away = ({letters[i] for i in part.indices} for part in (training, held_out))
    assert kept | away == set("abcd")
    assert not kept & away
    assert 2 <= len(held_out) <= 4
    for seed in range(10):
        assert len(hold_out(Grouped(["big"] * 36 + ["small"] * 4), 0.1, seed)[1]) == 4
    with pytest.raises(CompanionError, match="40 samples of 1 groups are too few"):
        hold_out(Grouped(["one"] * 40), 0.1, seed=0)


def test_a_network_of_volumes_trains():
    model = nn.Sequential(nn.Conv3d(1, 2, 2), nn.Flatten(), nn.Linear(16, 3))
    fit(model, TensorDataset(torch.rand(12, 1, 3, 3, 3), torch.arange(12) % 3), epochs=1)
