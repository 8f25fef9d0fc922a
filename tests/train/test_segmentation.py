"""The task `segment`: its loss, its scores, its batches, and that the loop learns it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from sklearn.metrics import accuracy_score, confusion_matrix, jaccard_score
from torch import nn
from torch.nn.functional import one_hot
from torch.utils.data import Dataset, Subset

from companion import CompanionError, datasets, models, train
from companion.train.tasks import TASKS, Overlap

SEGMENT = TASKS["segment"]
VOID = 255
# Prediction and mask of one picture of 2×4 pixels, classes 0 to 3 (3 occurs nowhere), and void.
PREDICTION = torch.tensor([[[0, 0, 1, 1], [2, 0, 0, 1]]])
MASK = torch.tensor([[[0, 0, 0, 1], [2, 2, VOID, VOID]]])


def scores_for(prediction: torch.Tensor, classes: int) -> torch.Tensor:
    """Outputs [N, classes, H, W] whose highest is at the prediction [N, H, W]."""
    return one_hot(prediction, classes).permute(0, 3, 1, 2).float()


def judge(*batches: tuple[torch.Tensor, torch.Tensor], classes: int = 4) -> dict[str, float]:
    meter = Overlap()
    for prediction, mask in batches:
        meter.update(scores_for(prediction, classes), mask)
    return meter.compute()


def test_scores_by_hand():
    """Of 6 pixels that count, 4 are right. Classes 0, 1, 2 have 2 of 4, 1 of 2, 1 of 2 in both; 3 occurs nowhere."""
    found = judge((PREDICTION, MASK))
    assert list(found) == ["mean_iou", "pixel_accuracy"]
    assert found["mean_iou"] == pytest.approx((2 / 4 + 1 / 2 + 1 / 2) / 3)
    assert found["pixel_accuracy"] == pytest.approx(4 / 6)


def test_a_class_that_is_only_predicted_counts_as_missed():
    found = judge((torch.tensor([[[0, 3]]]), torch.tensor([[[0, 0]]])))
    assert found == {"mean_iou": pytest.approx((1 / 2 + 0) / 2), "pixel_accuracy": pytest.approx(1 / 2)}


def masks(shape: tuple[int, ...], classes: int, void: bool) -> st.SearchStrategy[np.ndarray]:
    values = st.integers(0, classes - 1)
    return arrays.arrays(np.int64, shape, elements=values | st.just(VOID) if void else values)


@st.composite
def judged(draw):
    """Some batches of predictions and masks, and the number of classes."""
    classes = draw(st.integers(2, 6))
    batches = []
    for _ in range(draw(st.integers(1, 3))):
        shape = (draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 5)))
        batches.append((draw(masks(shape, classes, void=False)), draw(masks(shape, classes, void=True))))
    return batches, classes


@given(judged())
@settings(max_examples=60, deadline=None)
def test_scores_equal_scikit_learns(case):
    """Over all pixels of all batches together, in whatever batches they come."""
    batches, classes = case
    prediction, mask = (np.concatenate([pair[i].ravel() for pair in batches]) for i in (0, 1))
    counted = mask != VOID
    meter = Overlap()
    for guess, truth in batches:
        meter.update(scores_for(torch.from_numpy(guess), classes), torch.from_numpy(truth))
    if not counted.any():
        with pytest.raises(CompanionError, match="all their pixels are void"):
            meter.compute()
        return
    prediction, mask = prediction[counted], mask[counted]
    assert np.array_equal(meter.confusion, confusion_matrix(mask, prediction, labels=range(classes)))
    found = meter.compute()
    assert found["mean_iou"] == pytest.approx(jaccard_score(mask, prediction, average="macro"))
    assert found["pixel_accuracy"] == pytest.approx(accuracy_score(mask, prediction))
    assert 0 <= found["mean_iou"] <= 1


@given(judged(), st.randoms())
@settings(max_examples=30, deadline=None)
def test_what_is_predicted_at_void_pixels_changes_nothing(case, random):
    batches, classes = case
    if all((mask == VOID).all() for _, mask in batches):
        return
    other = []
    for guess, mask in batches:
        noise = np.array([random.randrange(classes) for _ in range(guess.size)]).reshape(guess.shape)
        other.append((np.where(mask == VOID, noise, guess), mask))
    before, after = ([tuple(map(torch.from_numpy, pair)) for pair in pairs] for pairs in (batches, other))
    assert judge(*before, classes=classes) == judge(*after, classes=classes)


def test_a_perfect_answer_scores_one():
    mask = torch.tensor([[[0, 1, 2], [2, VOID, 0]]])
    assert judge((mask.where(mask != VOID, 1), mask)) == {"mean_iou": 1.0, "pixel_accuracy": 1.0}


def test_the_loss_is_the_mean_over_the_pixels_that_count():
    outputs = torch.randn(1, 4, 2, 4, requires_grad=True)
    probability = outputs.softmax(1)
    chosen = [probability[0, MASK[0, y, x], y, x] for y in range(2) for x in range(4) if MASK[0, y, x] != VOID]
    loss = SEGMENT.loss(nn.Identity(), outputs, MASK)
    torch.testing.assert_close(loss, -torch.stack(chosen).log().mean())
    assert SEGMENT.weight(MASK) == len(chosen) == 6
    loss.backward()
    assert not outputs.grad[..., MASK[0] == VOID].any()


def test_nothing_but_void_gives_no_loss_and_no_gradient():
    outputs = torch.randn(2, 4, 3, 3, requires_grad=True)
    void = torch.full((2, 3, 3), VOID)
    loss = SEGMENT.loss(nn.Identity(), outputs, void)
    loss.backward()
    assert loss.item() == 0
    assert not outputs.grad.any()
    assert SEGMENT.weight(void) == 0


class Masked(Dataset):
    """Pictures whose brightness shows the class, with more void in some than in others."""

    task, labels = "segment", ("dark", "bright")

    def __init__(self, n=24, void=True):
        generator = torch.Generator().manual_seed(0)
        self.masks = torch.randint(0, 2, (n, 8, 8), generator=generator)
        noise = 0.2 * torch.rand(n, 3, 8, 8, generator=generator)
        self.images = 0.2 + 0.4 * self.masks[:, None].float() + noise
        if void:
            for i in range(n):
                self.masks[i, : i % 8] = VOID

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i], self.masks[i]


def pixelwise(seed=0):
    torch.manual_seed(seed)
    return nn.Conv2d(3, 2, 1)


@pytest.mark.parametrize("batch_size", [1, 7, 24, None])
def test_evaluate_is_exact_over_the_pixels_of_uneven_batches(batch_size):
    model, data = pixelwise(), Masked()
    outputs = model(data.images)
    counted = data.masks != VOID
    expected = nn.functional.cross_entropy(outputs, data.masks, ignore_index=VOID).item()
    scores = train.evaluate(model, data, batch_size=batch_size, progress=False)
    assert scores.samples == 24
    assert scores.loss == pytest.approx(expected, rel=1e-5)
    guesses, truths = outputs.argmax(1)[counted], data.masks[counted]
    assert scores.metrics == {
        "mean_iou": pytest.approx(jaccard_score(truths, guesses, average="macro")),
        "pixel_accuracy": pytest.approx((guesses == truths).double().mean().item()),
    }
    assert scores.main == scores.metrics["mean_iou"]


def test_the_training_loss_is_exact_over_pixels_too():
    """With weights that do not move, an epoch's loss is the data's."""
    model, data = pixelwise(), Masked()
    before = train.evaluate(model, data, progress=False).loss
    history = train.fit(model, data, epochs=1, batch_size=5, lr=1e-12, validation=0, progress=False)
    assert history.epochs[0].train_loss == pytest.approx(before, rel=1e-5)


def test_a_batch_of_void_alone_does_no_harm():
    data = Masked()
    data.masks[:8] = VOID
    history = train.fit(pixelwise(), data, epochs=2, batch_size=1, lr=0.05, validation=Masked(), progress=False)
    assert history.score == "mean_iou"
    assert all(np.isfinite(epoch.train_loss) for epoch in history.epochs)


def test_data_without_a_pixel_to_judge_by_are_refused():
    data = Masked()
    data.masks[:] = VOID
    with pytest.raises(CompanionError, match="all their pixels are void"):
        train.evaluate(pixelwise(), data, progress=False)


def test_pictures_of_two_sizes_in_a_batch_are_refused():
    data = [(torch.rand(3, 8, 8), torch.zeros(8, 8).long()), (torch.rand(3, 6, 9), torch.zeros(6, 9).long())]
    with pytest.raises(CompanionError, match=r"must have one size, not 9×6 and 8×8 pixels\.$"):
        SEGMENT.collate(data)
    with pytest.raises(CompanionError, match="must have one size, not 8×6 and 8×8"):
        SEGMENT.collate([(torch.rand(3, 8, 8), torch.zeros(6, 8).long())])


def test_stopped_and_resumed_it_ends_alike(tmp_path):
    """The sum of the pixels that counted is kept, too."""

    class Stop(Exception):
        pass

    class Stops(nn.Module):
        def __init__(self, at):
            super().__init__()
            self.inner, self.left = pixelwise(), at

        def forward(self, x):
            if self.training:
                self.left -= 1
                if self.left < 0:
                    raise Stop
            return self.inner(x)

    def run(model, path, **more):
        return train.fit(
            model, Masked(), epochs=2, batch_size=5, checkpoint=path, checkpoint_seconds=0, progress=False, **more
        )

    expected = run(Stops(99), tmp_path / "whole")
    for at in (2, 5, 7):
        with pytest.raises(Stop):
            run(Stops(at), tmp_path / f"run{at}")
        found = run(Stops(99), tmp_path / f"run{at}", resume=True)
        assert [epoch.train_loss for epoch in found.epochs] == [epoch.train_loss for epoch in expected.epochs]


def test_pictures_and_masks_are_augmented_together():
    """A network that copies a picture's brightness is always right, if mask and picture moved alike."""

    class Copies(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x):
            bright = (x[:, :1] - 0.5) * 1000 * self.scale
            return torch.cat([-bright, bright], dim=1)

    history = train.fit(
        Copies(), Masked(), epochs=2, batch_size=8, lr=1e-9, augment="shift_flip", validation=0, progress=False
    )
    assert history.epochs[-1].train_loss < 1e-6


class Ink(Dataset):
    """Scenes with two classes, paper and ink, which a network learns in seconds."""

    task, labels, name = "segment", ("paper", "ink"), "ink"

    def __init__(self, split, n):
        self.scenes = datasets.load("digit_scenes", split=split, scenes=n, size=48)
        self.groups = self.scenes.groups

    def __len__(self):
        return len(self.scenes)

    def __getitem__(self, i):
        image, mask = self.scenes[i]
        return image, torch.where((mask > 0) & (mask < VOID), 1, mask)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_tiny_unet_learns_what_is_ink(seed):
    """All paper scores less than a half: it has no intersection with the ink."""
    test = Ink("test", 60)
    masks = torch.stack([test[i][1] for i in range(len(test))])
    nothing = judge((torch.zeros_like(masks), masks), classes=2)["mean_iou"]
    model = models.create("unet", width=4, depth=2, classes=2, labels=test.labels, seed=seed)
    train.fit(model, Ink("train", 240), epochs=3, batch_size=8, lr=1e-2, seed=seed, progress=False)
    scores = train.evaluate(model, test, progress=False)
    assert nothing < 0.5
    assert scores.metrics["mean_iou"] > 0.75  # 0.9 and more when this was written


def test_torchvisions_networks_train():
    data = Subset(datasets.load("digit_scenes", split="train", scenes=8, size=64), range(8))
    model = models.create("lraspp_mobilenet_v3_large", labels=datasets.digit_scenes.TASKS["segment"], seed=0)
    history = train.fit(model, data, epochs=1, batch_size=4, validation=0, progress=False)
    assert np.isfinite(history.epochs[0].train_loss)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_trains_on_a_gpu_in_every_precision(precision):
    data = Ink("train", 240)
    model = models.create("unet", classes=2, labels=data.labels, seed=0)
    train.fit(model, data, epochs=3, batch_size=8, lr=1e-2, precision=precision, device="cuda", progress=False)
    assert train.evaluate(model, Ink("test", 60), device="cuda").metrics["mean_iou"] > 0.75
