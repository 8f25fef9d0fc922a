"""Labelled images that fit into memory."""

import pytest
import torch
from torch.utils.data import Dataset, Subset

from companion import CompanionError, datasets


def test_what_is_in_memory_stays_as_it_is():
    digits = datasets.load("digits", split="test")
    assert datasets.in_memory(digits) is digits


def test_in_memory_reads_files_once(tmp_path):
    from PIL import Image

    for split in ("train", "test"):
        for label, grey in (("dark", 10), ("light", 240)):
            (tmp_path / split / label).mkdir(parents=True)
            Image.new("RGB", (8, 8), (grey,) * 3).save(tmp_path / split / label / "0.png")
    files = datasets.load(f"folder:{tmp_path}", split="train", size=8)
    copy = datasets.in_memory(files)
    assert (copy.name, copy.labels) == (files.name, files.labels)
    assert all(torch.equal(copy[i][0], files[i][0]) and copy[i][1] == files[i][1] for i in range(2))
    assert [int(image.unique() * 255 + 0.5) for image, _ in copy] == [10, 240]
    assert copy.augmentation == "shift_flip"


class Sizes(Dataset):
    labels = ("one",)

    def __init__(self, *sizes):
        self.sizes = sizes

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, i):
        return torch.zeros(3, self.sizes[i], 4), 0


def test_images_of_one_size_only():
    with pytest.raises(CompanionError, match="image 1 is"):
        datasets.in_memory(Sizes(4, 5))
    with pytest.raises(CompanionError, match="empty"):
        datasets.in_memory(Sizes())


class Pairs(Dataset):
    """Two samples (image, label)."""

    def __init__(self, image, label=0, **said):
        self.sample = image, label
        self.__dict__.update(said)

    def __len__(self):
        return 2

    def __getitem__(self, _):
        return self.sample


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (Pairs(torch.full((3, 4, 4), -0.1), labels=("a",)), "image 0 has values outside 0..1"),
        (Pairs(torch.full((3, 4, 4), 1.1), labels=("a",)), "image 0 has values outside 0..1"),
        (Pairs(torch.full((3, 4, 4), torch.nan), labels=("a",)), "image 0 has values outside 0..1"),
        (Pairs(torch.full((3, 4, 4), 200, dtype=torch.uint8), labels=("a",)), "no float image"),
        (Pairs([[0.5]], labels=("a",)), "no float image"),
        (Pairs(torch.zeros(3, 4, 4), torch.zeros(4, 4), labels=("a",)), "sample 0 has no class"),
        (Pairs(torch.zeros(3, 4, 4), None, labels=("a",)), "sample 0 has no class"),
        (Pairs(torch.zeros(3, 4, 4)), "the data set has no labels"),
    ],
)
def test_what_bytes_cannot_hold_is_refused(data, says):
    with pytest.raises(CompanionError, match=says):
        datasets.in_memory(data)


def test_a_part_of_a_data_set_has_the_labels_of_the_whole():
    whole = Pairs(torch.ones(3, 4, 4), 1, labels=("a", "b"), name="ones", augmentation="shift")
    part = datasets.in_memory(Subset(Subset(whole, [0, 1]), [1]))
    assert (len(part), part.labels, part.name, part.augmentation) == (1, ("a", "b"), "ones", "shift")
    assert part[0][1] == 1
