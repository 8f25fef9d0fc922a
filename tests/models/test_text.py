"""The network for texts: padding counts nowhere, and the vocabulary travels with it."""

import json
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from companion import CompanionError, models

VOCABULARY = ("<padding>", "<unknown>", *(f"w{n}" for n in range(48)))
TEXTS = st.lists(st.lists(st.integers(1, 49), max_size=40), min_size=1, max_size=8)


@pytest.fixture(scope="module")
def model():
    return models.create("text_classifier", vocabulary=VOCABULARY, labels=list("abcd"), seed=0).eval()


def padded(texts, extra=0):
    width = max(1, max(map(len, texts)) + extra)
    return torch.tensor([[*text, *[0] * (width - len(text))] for text in texts])


@given(TEXTS, st.integers(0, 100))
@hypothesis_settings(deadline=None)
def test_a_text_is_alone_what_it_is_in_any_batch(model, texts, extra):
    together = model(padded(texts, extra)).softmax(1)
    for text, row in zip(texts, together, strict=True):
        torch.testing.assert_close(model(padded([text])).softmax(1)[0], row, rtol=0, atol=1e-6)


def test_it_is_the_mean_of_embedding_bag_and_two_layers(model):
    texts = [[4, 4, 7], [2], [1, 49, 3, 3, 3]]
    w = model.state_dict()
    bag = nn.EmbeddingBag.from_pretrained(w["embedding.weight"], mode="mean")
    offsets = torch.tensor([0, 3, 4])
    x = bag(torch.tensor([number for text in texts for number in text]), offsets)
    f = nn.functional
    expected = f.linear(f.relu(f.linear(x, w["fc1.weight"], w["fc1.bias"])), w["fc2.weight"], w["fc2.bias"])
    torch.testing.assert_close(model(padded(texts)), expected)


def test_padding_counts_nowhere_whatever_its_row_says(model):
    ids = padded([[5, 6], [7, 8, 9]])
    before = model(ids)
    row = model.embedding.weight[0].detach().clone()
    with torch.no_grad():
        model.embedding.weight[0] = 100.0
        changed = model(ids)
        model.embedding.weight[0] = row
    assert torch.equal(changed, before)
    assert row.eq(0).all()


def test_padding_and_unknown_words_differ(model):
    assert not torch.allclose(model(padded([[5, 1]])), model(padded([[5, 0]])))
    assert torch.allclose(model(padded([[5, 0]])), model(padded([[5]])))


def test_words_are_left_out_in_training_only(model):
    ids = padded([list(range(1, 50))])
    assert torch.equal(model(ids), model(ids))
    try:
        model.train()
        assert len({model(ids)[0, 0].item() for _ in range(10)}) > 1
    finally:
        model.eval()
    never = models.create("text_classifier", vocabulary=VOCABULARY, word_dropout=0, seed=0).train()
    assert torch.equal(never(ids), never(ids))


def test_gradients_reach_every_parameter_but_the_row_of_padding():
    model = models.create("text_classifier", vocabulary=VOCABULARY, word_dropout=0, seed=0).train()
    model(padded([list(range(1, 50)), [3]])).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())
    assert model.embedding.weight.grad[0].eq(0).all()
    assert model.embedding.weight.grad[1:].abs().sum(1).gt(0).all()


def test_parameters_as_counted_by_hand(model):
    # 50 words of 64 numbers, 64·64+64, 64·4+4
    assert sum(p.numel() for p in model.parameters()) == 3_200 + 4_160 + 260


def test_the_vocabulary_travels(model, tmp_path):
    models.save(model, tmp_path / "net.safetensors")
    copy = models.load(tmp_path / "net.safetensors")
    assert models.describe(copy) == models.describe(model)
    assert models.describe(copy).vocabulary == VOCABULARY
    assert models.describe(copy).task == models.task("text_classifier") == "text"
    assert torch.equal(copy(padded([[5, 6]])), model(padded([[5, 6]])))


def test_a_vocabulary_can_be_given_when_it_is_saved(tmp_path):
    model = models.create("text_classifier", vocabulary_size=3, seed=0)
    assert models.describe(model).vocabulary is None
    models.save(model, tmp_path / "net.safetensors", vocabulary=["<padding>", "<unknown>", "模型"])
    assert models.describe(models.load(tmp_path / "net.safetensors")).vocabulary == ("<padding>", "<unknown>", "模型")
    with pytest.raises(CompanionError, match="rows for 3 words, but the vocabulary has 50"):
        models.save(model, tmp_path / "other.safetensors", vocabulary=VOCABULARY)
    assert not (tmp_path / "other.safetensors").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"vocabulary": ["a", "b", "a"]}, "the vocabulary has a word twice"),
        ({"vocabulary": ["a", "b"], "vocabulary_size": 3}, "rows for 3 words, but the vocabulary has 2"),
        ({"vocabulary": ["a", 2]}, "the vocabulary must be a list of texts"),
        ({"vocabulary": "ab"}, "the vocabulary must be a list of texts"),
        ({"vocabulary": ["a"]}, "a whole number from 2 as vocabulary_size, not 1"),
        ({"word_dropout": 1}, "a share from 0 to below 1 as word_dropout"),
        ({"word_dropout": float("nan")}, "a share from 0 to below 1"),
        ({"embedding": 0}, "a whole number from 1 as embedding"),
        ({"width": 3}, "no setting 'width': it takes vocabulary_size, embedding, hidden, classes, word_dropout"),
        ({"labels": ["a"]}, "4 classes, but 1 labels"),
    ],
)
def test_unusable_settings_are_refused(settings, said):
    with pytest.raises(CompanionError, match=said):
        models.create("text_classifier", **settings)


def test_networks_for_images_take_no_vocabulary():
    with pytest.raises(CompanionError, match="simple_cnn takes images: leave out the vocabulary"):
        models.create("simple_cnn", vocabulary=VOCABULARY)


@pytest.mark.parametrize(
    ("vocabulary", "said"),
    [
        (VOCABULARY[:-1], "rows for 50 words, but the vocabulary has 49"),
        ([*VOCABULARY[:-1], "w0"], "the vocabulary has a word twice"),
        ([*VOCABULARY[:-1], 7], "damaged description"),
        (7, "damaged description"),
    ],
)
def test_a_forged_vocabulary_is_refused(model, tmp_path, vocabulary, said):
    path = tmp_path / "net.safetensors"
    models.save(model, path)
    with path.open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    description = json.loads(header["__metadata__"]["companion-1"]) | {"vocabulary": vocabulary}
    save_file(load_file(path), path, {"companion-1": json.dumps(description)})
    with pytest.raises(CompanionError, match=said):
        models.load(path)


def test_the_printed_vocabulary_has_an_id_for_which_there_is_no_row():
    """2.4.2 prints ids 1 to 10,000 for a table of 10,000 rows; each text with the last word killed its server."""
    printed = {f"word{n}": n for n in range(1, 10_001)}
    table = nn.Embedding(10_000, 8)
    with pytest.raises(IndexError):
        table(torch.tensor([printed["word10000"]]))
    from companion.datasets.words import build_vocabulary, word_ids

    vocabulary = build_vocabulary(printed)
    ids = word_ids(vocabulary)
    assert max(ids.values()) < models.describe(models.create("text_classifier")).configuration["vocabulary_size"]


def test_averaging_over_padding_makes_all_short_texts_alike():
    """The other fault of 2.4.2: a mean over fifty places of which one is a word."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(50, 64, generator=generator)
    short, other = torch.tensor([5] + [0] * 49), torch.tensor([6] + [0] * 49)
    a, b = table[short].mean(0), table[other].mean(0)
    assert torch.cosine_similarity(a, b, dim=0) > 0.99
    assert torch.cosine_similarity(table[5], table[6], dim=0).abs() < 0.5
