"""Texts through the training loop."""

import pytest
import torch

from companion import CompanionError, datasets, models, train
from companion.datasets.texts import Texts
from companion.datasets.words import build_vocabulary

ANIMALS, TOOLS = (["cat", "dog", "bird", "fish", "horse", "mouse"], ["hammer", "saw", "drill", "file", "axe", "plane"])


def pets(size, seed, vocabulary=None):
    """Texts of 1 to 9 words: class 0 of animals, class 1 of tools, and words that tell nothing."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n):
        return int(torch.randint(n, (), generator=generator))

    targets = [n % 2 for n in range(size)]
    texts = []
    for target in targets:
        telling = [(ANIMALS, TOOLS)[target][draw(6)]] + [["the", "a", "of", "and"][draw(4)] for _ in range(draw(9))]
        texts.append(" ".join(telling))
    return Texts("pets", texts, targets, ("animals", "tools"), vocabulary or build_vocabulary(texts))


@pytest.fixture(scope="module")
def data():
    return pets(200, 0)


def new(data, **settings):
    return models.create(
        "text_classifier",
        vocabulary=data.vocabulary,
        labels=data.labels,
        classes=2,
        embedding=8,
        hidden=8,
        seed=0,
        **settings,
    )


def test_a_batch_is_padded_to_its_longest(data):
    ids, labels = train.task_of(data).collate([(torch.tensor([3, 4, 5]), 1), (torch.tensor([6]), 0)])
    assert ids.tolist() == [[3, 4, 5], [6, 0, 0]]
    assert (ids.dtype, labels.tolist(), labels.dtype) == (torch.int64, [1, 0], torch.int64)


def test_it_learns_and_is_judged(data):
    model, test = new(data), pets(100, 1, data.vocabulary)
    history = train.fit(model, data, epochs=12, lr=1e-2)
    assert history.score == "accuracy"
    scores = train.evaluate(model, test)
    assert scores.samples == 100
    assert scores.metrics["accuracy"] > 0.97
    by_hand = [int(model(ids[None]).argmax()) == label for ids, label in test]
    assert scores.metrics["accuracy"] == sum(by_hand) / 100
    one = train.evaluate(model, test, batch_size=1)
    assert one.metrics == scores.metrics
    assert one.loss == pytest.approx(scores.loss, rel=1e-5)


def test_a_resumed_run_ends_alike(data, tmp_path):
    whole, parts = new(data), new(data)
    train.fit(whole, data, epochs=3)

    class Stop(Exception):
        pass

    def stop(epoch):
        raise Stop

    options = {"epochs": 3, "checkpoint": tmp_path / "c", "checkpoint_seconds": 0}
    with pytest.raises(Stop):
        train.fit(parts, data, on_epoch=stop, **options)
    parts = new(data)
    train.fit(parts, data, resume=True, **options)
    assert all(map(torch.equal, whole.state_dict().values(), parts.state_dict().values()))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vocabulary": ("<padding>", "<unknown>", "x")}, "knows other words than pets was read with"),
        ({"labels": ("animals", "toys")}, "'tools'|'toys'"),
    ],
)
def test_data_of_other_words_or_classes_are_refused(data, change, said):
    settings = {"vocabulary": data.vocabulary, "labels": data.labels, "classes": 2} | change
    model = models.create("text_classifier", **settings)
    for judge in (lambda: train.evaluate(model, data), lambda: train.fit(model, data, epochs=1)):
        with pytest.raises(CompanionError, match=said):
            judge()


def test_images_are_refused(data):
    with pytest.raises(CompanionError, match="is for the task 'text', digits is for 'classify'"):
        train.evaluate(new(data), datasets.load("digits", split="test"))
