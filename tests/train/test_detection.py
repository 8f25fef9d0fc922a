"""The task `detect`: its batches, its score, and that the loop learns it, alone, in parts and with others."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from companion import CompanionError, datasets, models, train
from companion.train import tasks
from companion.train.parallel import launch
from companion.train.tasks import TASKS

DETECT = TASKS["detect"]

needs_evaluator = pytest.mark.skipif(
    any(tasks.find_spec(name) is None for name in ("torchmetrics", "pycocotools")),
    reason="mAP needs the extra detect: torchmetrics and pycocotools",
)


def scenes(split="train", n=24, size=64):
    return datasets.load("digit_scenes", split=split, task="detect", scenes=n, size=size)


def rows(*boxes, classes=3, more=0):
    """What a network returns that is sure of these (class, score, x1, y1, x2, y2), and of nothing else."""
    output = torch.zeros(len(boxes) + more, 5 + classes)
    for i, (number, score, x1, y1, x2, y2) in enumerate(boxes):
        output[i, :4] = torch.tensor([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1])
        output[i, 4], output[i, 5 + number] = score, 1
    return output


def test_a_batch_of_pictures_with_and_without_objects():
    image = torch.rand(3, 32, 32)
    two = {"boxes": torch.tensor([[0, 1, 2, 3], [4, 5, 6, 8.0]]), "labels": torch.tensor([7, 0])}
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    images, targets = DETECT.collate([(image, two), (image, none)])
    assert images.shape == (2, 3, 32, 32)
    assert targets[0].tolist() == [[7, 0, 1, 2, 3], [0, 4, 5, 6, 8]]
    assert targets[1, :, 0].tolist() == [-1, -1]
    assert DETECT.collate([(image, none)])[1].shape == (1, 0, 5)


def test_pictures_of_two_sizes_are_refused():
    found = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    with pytest.raises(CompanionError, match=r"^images of a batch must have one size, not 9×6 and 8×8 pixels\.$"):
        DETECT.collate([(torch.rand(3, 8, 8), found), (torch.rand(3, 6, 9), found)])


@pytest.mark.parametrize(
    ("size", "box", "says"),
    [
        ((100, 64), [1, 2, 3, 4.0], r"^a detector needs images of sides that 32 divides, not 64×100\.$"),
        ((32, 32), [20, 20, 5, 5.0], r"^image 0 of a batch has a box that is none: give corners"),
        ((32, 32), [1, 2, float("nan"), 4.0], r"^image 0 of a batch has a box that is none"),
    ],
)
def test_what_no_detector_can_learn_from_is_refused(size, box, says):
    found = {"boxes": torch.tensor([box]), "labels": torch.zeros(1, dtype=torch.int64)}
    with pytest.raises(CompanionError, match=says):
        DETECT.collate([(torch.rand(3, *size), found)])


def judge(*batches):
    meter = DETECT.meter()
    for outputs, targets in batches:
        meter.update(torch.stack(outputs), targets)
    return meter.compute()


@needs_evaluator
def test_precision_by_hand():
    """Class 0: two objects; found surest first a right box, a wrong one, a right one. Class 1: one, missed.

    Precision 1 up to a recall of a half, then 2 of 3: of the 101 levels of recall 51 and 50. Class 2 occurs nowhere.
    """
    target = torch.tensor([[0, 0, 0, 20, 20], [0, 40, 40, 60, 60], [1, 0, 40, 20, 60.0]])
    output = rows((0, 0.9, 0, 0, 20, 20), (0, 0.8, 30, 0, 50, 20), (0, 0.7, 40, 40, 60, 60), more=2)
    found = judge(([output], target[None]))
    assert list(found) == ["map50_95", "map50"]
    assert found["map50"] == pytest.approx((51 * 1 + 50 * 2 / 3) / 101 / 2)
    assert found["map50_95"] == pytest.approx(found["map50"])  # what is right is exact


@needs_evaluator
def test_how_far_a_box_may_be_off():
    """16 of 20 pixels wide: an overlap of 0.8, which is enough for 7 of the 10 limits from 0.5 to 0.95."""
    target = torch.tensor([[[1, 0, 0, 20, 20.0]]])
    found = judge(([rows((1, 0.9, 0, 0, 16.1, 20))], target))
    assert found == {"map50": pytest.approx(1), "map50_95": pytest.approx(0.7)}
    assert judge(([rows((0, 0.9, 0, 0, 20, 20))], target)) == {"map50": 0, "map50_95": 0}  # of another class


@needs_evaluator
def test_a_second_box_for_an_object_is_suppressed_or_wrong():
    target = torch.tensor([[[1, 0, 0, 20, 20], [1, 40, 40, 60, 60.0]]])
    right = ((1, 0.9, 0, 0, 20, 20), (1, 0.7, 40, 40, 60, 60))
    assert judge(([rows(*right, (1, 0.8, 1, 0, 20, 20))], target))["map50"] == pytest.approx(1)
    found = judge(([rows(*right, (1, 0.8, 10, 0, 30, 20))], target))  # overlaps by a third
    assert found["map50"] == pytest.approx((51 + 50 * 2 / 3) / 101)


@needs_evaluator
def test_in_whatever_batches_and_by_whatever_workers():
    random = np.random.default_rng(0)
    outputs, targets = [], []
    for _ in range(6):
        corner = random.uniform(0, 40, (3, 2))
        boxes = np.concatenate([corner, corner + random.uniform(8, 20, (3, 2))], 1)
        labels = random.integers(0, 3, 3)
        targets.append(torch.from_numpy(np.concatenate([labels[:, None], boxes], 1)).float())
        moved = boxes + random.uniform(-3, 3, boxes.shape)
        outputs.append(rows(*((int(k), random.uniform(0.3, 1), *box) for k, box in zip(labels, moved, strict=True))))
    whole = judge((outputs, torch.stack(targets)))
    assert 0 < whole["map50_95"] < whole["map50"] < 1
    assert judge((outputs[:4], torch.stack(targets[:4])), (outputs[4:], torch.stack(targets[4:]))) == whole
    first, second = DETECT.meter(), DETECT.meter()
    first.update(torch.stack(outputs[:2]), torch.stack(targets[:2]))
    second.update(torch.stack(outputs[2:]), torch.stack(targets[2:]))
    first.merge(second)
    assert first.compute() == whole


@needs_evaluator
def test_pictures_without_objects():
    """They count where others have some: what is found in them is wrong."""
    target = torch.tensor([[[1, 0, 0, 20, 20.0]], [[-1, -1, -1, -1, -1]]])
    right = rows((1, 0.8, 0, 0, 20, 20))
    assert judge(([right, rows(more=1)], target))["map50"] == pytest.approx(1)
    assert judge(([right, rows((1, 0.9, 0, 0, 20, 20))], target))["map50"] == pytest.approx(0.5)
    with pytest.raises(CompanionError, match=r"nothing to judge by: there is no object in any of them\.$"):
        judge(([right], target[1:]))


def test_without_the_evaluator_training_does_not_begin(monkeypatch):
    monkeypatch.setattr(tasks, "find_spec", lambda name: None)
    model = models.create("yolov5_tiny", seed=0)
    with pytest.raises(CompanionError, match=r"not installed: pip install -c constraints\.txt -e "):
        train.fit(model, scenes(), epochs=1, progress=False)
    assert model.training


def learn(**settings):
    model = models.create("yolov5_tiny", seed=0)
    defaults = {"epochs": 3, "batch_size": 8, "lr": 3e-3, "validation": 0, "progress": False}
    history = train.fit(model, settings.pop("data", None) or scenes(), **(defaults | settings))
    return model, [epoch.train_loss for epoch in history.epochs]


def weights(model):
    return torch.cat([value.flatten().double() for value in model.state_dict().values()])


@needs_evaluator
def test_it_learns():
    model, losses = learn(validation=scenes("test", n=8), epochs=16, lr=1e-2)
    assert losses[-1] < losses[0] * 0.85
    scores = train.evaluate(model, scenes("test", n=8), progress=False)
    assert np.isnan(scores.loss)
    assert list(scores.metrics) == ["map50_95", "map50"]
    assert scores.samples == 8


class Empty(Dataset):
    """Pictures of which some batches have no object at all."""

    task, labels = "detect", tuple("0123456789")

    def __len__(self):
        return 4

    def __getitem__(self, i):
        image = torch.full((3, 64, 64), i / 4)
        return image, {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}


def test_empty_pictures_teach_that_there_is_nothing():
    _, losses = learn(data=Empty(), batch_size=2)
    assert losses[2] < losses[0]


def test_stopped_and_resumed_it_ends_alike(tmp_path):
    class Stop(Exception):
        pass

    def stop(epoch):
        raise Stop

    expected, losses = learn()
    options = {"checkpoint": tmp_path / "run", "checkpoint_seconds": 0}
    with pytest.raises(Stop):
        learn(on_epoch=stop, **options)
    model, resumed = learn(resume=True, **options)
    assert torch.equal(weights(model), weights(expected))
    assert resumed == losses


def one_step(workers, **settings):
    """The weights after two steps, with normalisations that cannot tell whether a batch is a part of one."""
    model = models.create("yolov5_tiny", seed=0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train = lambda mode=True, self=module: nn.Module.train(self, False)
    options = {"epochs": 1, "lr": 1e-3 / workers.size, "validation": 0, "progress": False, "workers": workers}
    train.fit(model, scenes(n=8), **(options | settings))
    return weights(model)


def share(_):
    with train.joined("ddp") as workers:
        found = one_step(workers, batch_size=2)
        scores = train.evaluate(models.create("yolov5_tiny", seed=0), scenes(n=7), progress=False, workers=workers)
        return found, scores.metrics


@needs_evaluator
def test_in_parts_and_by_two_workers_it_is_the_same_step():
    alone = train.ALONE
    whole = one_step(alone, batch_size=4)
    scores = train.evaluate(models.create("yolov5_tiny", seed=0), scenes(n=7), progress=False)
    torch.testing.assert_close(one_step(alone, batch_size=4, accumulate=2), whole, rtol=1e-4, atol=1e-5)
    for found, metrics in launch(share, 2, None):
        torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-5)
        assert metrics == scores.metrics


def test_another_loss_for_another_detector():
    """A network that is not ours brings its own, in a task of its own."""

    class Points(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 15, 16, 16)

        def forward(self, x):
            return self.conv(x).flatten(2).transpose(1, 2)

    with pytest.raises(CompanionError, match="a Points has no known loss for detection"):
        train.fit(Points(), scenes(n=8), epochs=1, validation=0, progress=False)
    task = replace(DETECT, loss=lambda network, outputs, targets: outputs.square().mean())
    history = train.fit(Points(), scenes(n=8), epochs=1, validation=0, task=task, progress=False)
    assert np.isfinite(history.epochs[0].train_loss)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_trains_on_a_gpu_in_every_precision(precision):
    _, losses = learn(epochs=16, lr=1e-2, precision=precision, device="cuda")
    assert losses[-1] < losses[0] * 0.85
