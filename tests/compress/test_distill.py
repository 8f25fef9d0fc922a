"""Distillation: its loss against hand and other implementations, what it leaves alone, its cache, and that it pays."""

import math

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import rel_entr, softmax
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from companion import CompanionError, datasets, models, train
from companion.compress import distill, distillation_loss, few_labels, teacher_outputs
from companion.compress.distill import _Lesson


def blobs(n=48, classes=3, seed=0):
    """Points around class centres: learnable in a few steps."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    points = torch.eye(classes)[labels] * 3 + torch.randn(n, classes, generator=generator)
    return TensorDataset(points, labels)


def unlabelled(data):
    return TensorDataset(data.tensors[0], torch.full_like(data.tensors[1], -1))


def mlp(hidden=16, classes=3, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, hidden), nn.ReLU(), nn.Linear(hidden, classes))


def convnet(channels=4, stride=1, seed=0, classes=3):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, channels, 3, stride, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(channels, classes),
        )


def pictures(n=24):
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.rand(n, 3, 8, 8, generator=generator), torch.arange(n) % 3)


def weights(model):
    return torch.cat([value.flatten().double() for value in model.state_dict().values()])


def run(student, teacher, data=None, **given):
    """A short run on the blobs."""
    options = {"epochs": 3, "batch_size": 8, "validation": 0, "progress": False} | given
    return distill(student, teacher, blobs() if data is None else data, **options)


@pytest.fixture(scope="module")
def teacher():
    model = mlp(hidden=32, seed=1)
    train.fit(model, blobs(240, seed=5), epochs=5, lr=1e-2, progress=False)
    model.zero_grad()
    return model


# The loss


def test_loss_by_hand():
    """At T = 2 the teacher says 3/4 and 1/4, the student 1/2 and 1/2; the label is the first class."""
    kl = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    found = distillation_loss(
        torch.zeros(1, 2), torch.tensor([[2 * math.log(3), 0.0]]), torch.tensor([0]), temperature=2, alpha=0.9
    )
    assert found.item() == pytest.approx(0.9 * 4 * kl + 0.1 * math.log(2), rel=1e-5)


@settings(deadline=None)
@given(
    seed=st.integers(0, 1000),
    n=st.integers(1, 6),
    classes=st.integers(2, 5),
    temperature=st.floats(0.5, 20),
    alpha=st.floats(0, 1),
)
def test_loss_equals_scipys_relative_entropy(seed, n, classes, temperature, alpha):
    """Sample by sample, in float64; a sample without a label has the soft part only, and still counts in the mean."""
    random = np.random.RandomState(seed)
    student, teacher = random.randn(2, n, classes) * 3
    labels = random.randint(-1, classes, n)
    expected = 0.0
    for ours, theirs, label in zip(student, teacher, labels, strict=True):
        kl = rel_entr(softmax(theirs / temperature), softmax(ours / temperature)).sum()
        expected += alpha * temperature**2 * kl
        if label >= 0:
            expected += (1 - alpha) * -math.log(softmax(ours)[label])
    found = distillation_loss(
        torch.from_numpy(student), torch.from_numpy(teacher), torch.from_numpy(labels), temperature, alpha
    )
    assert found.item() == pytest.approx(expected / n, rel=1e-3, abs=1e-3)


def test_gradient_hardly_depends_on_a_high_temperature():
    """For T far above the logits it is (student - teacher) / (N · classes), if both have mean 0 (Hinton et al., eq. 4).

    Without the factor T² it would fall to a sixteenth from T = 25 to T = 100.
    """
    generator = torch.Generator().manual_seed(0)
    student, teacher = (x - x.mean(1, keepdim=True) for x in torch.randn(2, 4, 5, generator=generator))
    limit = (student - teacher) / (4 * 5)
    for temperature in (25, 50, 100):
        leaf = student.clone().requires_grad_()
        distillation_loss(leaf, teacher, torch.zeros(4, dtype=torch.long), temperature, alpha=1).backward()
        torch.testing.assert_close(leaf.grad, limit, rtol=0.1, atol=4e-3)


def test_a_student_that_answers_like_its_teacher_has_nothing_to_learn_but_the_labels():
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.tensor([0, 1, 2, 0])
    soft = distillation_loss(logits, logits.detach() + 7, labels, alpha=1)  # a softmax knows differences only
    soft.backward()
    assert soft.item() == pytest.approx(0, abs=1e-5)
    assert logits.grad.abs().max() < 1e-5
    both = distillation_loss(logits, logits.detach(), labels, alpha=0.75)
    assert both.item() == pytest.approx(0.25 * cross_entropy(logits, labels).item(), rel=1e-4, abs=1e-5)


# The training


def test_equals_a_loop_written_out_by_hand(teacher):
    """One step of AdamW; the middle third of the samples has no label."""
    points, labels = blobs(n=18).tensors
    labels = torch.where((torch.arange(18) >= 6) & (torch.arange(18) < 12), -1, labels)
    student, reference = mlp(), mlp()
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-2, weight_decay=1e-2)
    with torch.no_grad():
        target = (teacher(points) / 3).softmax(1)
    output = reference(points)
    kl = (target * (target.log() - (output / 3).log_softmax(1))).sum(1)
    hard = -output.log_softmax(1)[torch.arange(18), labels.clamp(min=0)] * (labels >= 0)
    (0.6 * 9 * kl + 0.4 * hard).mean().backward()
    optimizer.step()

    found = run(
        student, teacher, TensorDataset(points, labels), temperature=3, alpha=0.6, epochs=1, batch_size=18, lr=1e-2
    )
    torch.testing.assert_close(weights(found), weights(reference), rtol=1e-5, atol=1e-5)


def test_with_alpha_0_it_is_plain_training(teacher):
    plain = mlp()
    train.fit(plain, blobs(), epochs=3, batch_size=8, validation=0, progress=False)
    torch.testing.assert_close(weights(run(mlp(), teacher, alpha=0)), weights(plain), rtol=1e-5, atol=1e-5)


def test_a_student_without_any_label_learns_what_its_teacher_knows(teacher):
    exam = blobs(240, seed=7)
    found = run(mlp(), teacher, unlabelled(blobs(120)), alpha=1, epochs=10, lr=1e-2)
    before, after = (train.evaluate(model, exam, progress=False).main for model in (mlp(), found))
    assert before < 0.6
    assert after > 0.9


@pytest.mark.parametrize("training", [True, False])
def test_student_and_teacher_are_left_as_they_were(teacher, training):
    student = mlp().train(training)
    teacher.train(training)
    first, second = weights(student), weights(teacher)
    found = run(student, teacher, features=("1", "1"))
    assert torch.equal(weights(student), first)
    assert torch.equal(weights(teacher), second)
    for model in (student, teacher):
        assert model.training is training
        assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert found is not student
    assert not found.training
    for model in (student, teacher, found):
        assert not any(module._forward_hooks for module in model.modules())
    assert [name for name, _ in found.named_modules()] == [name for name, _ in student.named_modules()]
    assert found.state_dict().keys() == student.state_dict().keys()


def test_the_teacher_judges_in_evaluation_mode_though_it_came_in_training_mode():
    """Dropout of nearly everything would make its answers useless."""
    teacher = nn.Sequential(nn.Dropout(0.99), mlp(32, seed=1)).train()
    expected = nn.Sequential(nn.Dropout(0.0), teacher[1])
    for cache in (True, False):
        a, b = (run(mlp(), each, cache=cache, alpha=1) for each in (teacher, expected))
        assert torch.equal(weights(a), weights(b))


def test_same_seed_same_weights_other_seed_other_weights(teacher):
    found = [run(mlp(), teacher, seed=seed, features=("0", "0"), epochs=2) for seed in (1, 1, 2)]
    assert torch.equal(weights(found[0]), weights(found[1]))
    assert not torch.equal(weights(found[0]), weights(found[2]))


def test_the_global_generator_is_given_back(teacher):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    run(mlp(), teacher, features=("0", "0"), epochs=1)
    assert torch.equal(torch.rand(2), expected)


def test_networks_of_ours_come_back_ready_to_be_saved(tmp_path):
    data = Subset(datasets.load("digits", split="train"), range(32))
    student = models.create("simple_cnn", channels=(2, 4), hidden=8, seed=0)
    teacher = models.create("cifar_resnet14", width=4, seed=1)
    found = distill(student, teacher, few_labels(data, 0.2), epochs=1, features=("pool2", "layer3"), progress=False)
    assert models.describe(found) == models.describe(student)
    models.save(found, tmp_path / "student.safetensors")
    copy = models.load(tmp_path / "student.safetensors")
    assert torch.equal(train.predict(copy, data, progress=False)[0], train.predict(found, data, progress=False)[0])


@pytest.mark.parametrize("settings", [{"num_workers": 1}, {"cache": False}])
def test_workers_and_an_uncached_teacher_change_nothing(teacher, settings):
    torch.testing.assert_close(
        weights(run(mlp(), teacher, **settings)), weights(run(mlp(), teacher)), rtol=1e-5, atol=1e-5
    )


def test_precision_reaches_both_networks(teacher):
    dtypes = {"student": set(), "teacher": set()}
    student, teacher = mlp(), mlp(32, seed=1)
    for name, model in (("student", student), ("teacher", teacher)):
        model[0].register_forward_hook(lambda _m, _i, output, name=name: dtypes[name].add(output.dtype))
    found = run(student, teacher, precision="bf16", cache=False)
    assert all(torch.bfloat16 in each for each in dtypes.values())
    assert all(p.dtype == torch.float32 for p in found.parameters())


class NoLabel(Dataset):
    """Blobs with None for a label."""

    def __len__(self):
        return 24

    def __getitem__(self, i):
        return blobs(24)[i][0], None


def test_none_is_no_label(teacher):
    a, b = (run(mlp(), teacher, data, alpha=1) for data in (NoLabel(), unlabelled(blobs(24))))
    assert torch.equal(weights(a), weights(b))


# What chooses the best epoch


def scores(student, teacher, data, validation, **given):
    """The validation scores of the epochs, of a student whose weights cannot move."""
    epochs = []
    run(student, teacher, data, validation=validation, epochs=1, lr=1e-20, on_epoch=epochs.append, **given)
    return [epoch.validation_score for epoch in epochs]


@pytest.mark.parametrize("cache", [True, False])
def test_held_out_samples_are_judged_by_their_labels_or_all_by_the_teacher(cache):
    student, teacher = mlp(seed=4), mlp(seed=3)
    points, labels = blobs(30, seed=9).tensors
    answers, taught = student(points).argmax(1), teacher(points).argmax(1)
    accuracy, agreement = ((answers == truth).double().mean().item() for truth in (labels, taught))
    assert accuracy != agreement  # or the test could not tell
    labels = labels.clone()
    for unknown, score in (([], accuracy), ([7], agreement)):
        labels[unknown] = -1
        exam = TensorDataset(points, labels.clone())
        assert scores(student, teacher, blobs(), exam, cache=cache) == [pytest.approx(score)]


# The teacher's answers


class Counting(nn.Module):
    """A teacher that notes what it was asked."""

    def __init__(self, model):
        super().__init__()
        self.model, self.asked = model, []

    def __deepcopy__(self, memo):  # so that the notes of a copy are ours
        return self

    def forward(self, x):
        self.asked.append(x.detach().clone())
        return self.model(x)


def test_teacher_outputs_are_the_teachers_logits_in_order(teacher):
    points, _ = blobs().tensors
    found = teacher_outputs(teacher, blobs(), batch_size=7, progress=False)
    torch.testing.assert_close(found, teacher.eval()(points).detach())
    assert found.dtype == torch.float32


@pytest.mark.parametrize(("cache", "passes"), [(True, 1), (False, 3)])
def test_a_cached_teacher_is_asked_about_each_sample_once(teacher, cache, passes):
    counting = Counting(teacher)
    run(mlp(), counting, cache=cache, epochs=3)
    looks = 1  # at one sample, to see that the networks fit
    assert sum(len(asked) for asked in counting.asked) == looks + passes * len(blobs())


@pytest.mark.parametrize("cache", [True, False])
def test_augmentation_reaches_an_uncached_teacher_as_it_reaches_the_student(cache):
    seen = []
    student = convnet()
    student[0].register_forward_pre_hook(lambda _layer, inputs: seen.append(inputs[0].clone()))
    teacher = Counting(convnet(8, seed=1))
    data = pictures()
    run(student, teacher, data, cache=cache, augment="shift", epochs=2)
    plain = {tuple(picture.flatten().tolist()) for picture in data.tensors[0]}
    asked, studied = (
        [tuple(picture.flatten().tolist()) for batch in batches[1:] for picture in batch]
        for batches in (teacher.asked, seen)
    )
    assert not plain.issuperset(studied)
    if cache:
        assert set(asked) == plain
    else:
        assert asked == studied


def test_answers_kept_in_a_file_serve_the_next_run(teacher, tmp_path):
    path = tmp_path / "answers.safetensors"
    first = run(mlp(), teacher, cache=path)
    assert list(tmp_path.iterdir()) == [path]
    before = path.read_bytes()
    torch.testing.assert_close(
        safetensors.torch.load_file(path)["logits"], teacher_outputs(teacher, blobs(), progress=False)
    )
    teacher_outputs(teacher, unlabelled(blobs()), path=path, progress=False)  # labels have no part in it
    again = run(mlp(), teacher, cache=path)
    assert torch.equal(weights(first), weights(again))
    assert torch.equal(weights(first), weights(run(mlp(), teacher)))
    assert path.read_bytes() == before


def test_a_file_that_serves_saves_the_pass(teacher, tmp_path):
    path, counting = tmp_path / "answers.safetensors", Counting(teacher)
    for _ in "ab":
        run(mlp(), counting, cache=path)
    looks = 2
    assert sum(len(asked) for asked in counting.asked) == looks + len(blobs())


def test_answers_for_other_data_or_of_another_teacher_are_refused(teacher, tmp_path):
    path = tmp_path / "answers.safetensors"
    teacher_outputs(teacher, blobs(), path=path, progress=False)
    points, labels = blobs().tensors
    swapped = TensorDataset(points[[1, 0, *range(2, 48)]], labels)
    for other, data, what in (
        (teacher, swapped, "data"),
        (teacher, blobs(24), "data"),
        (mlp(32, seed=2), blobs(), "teacher"),
    ):
        with pytest.raises(CompanionError, match=rf"holds answers for another {what}: delete it"):
            run(mlp(), other, data, cache=path)
    with pytest.raises(CompanionError, match="another precision"):
        run(mlp(), teacher, cache=path, precision="bf16")


def test_a_damaged_file_is_refused_and_a_bad_path_noticed_before_the_pass(teacher, tmp_path):
    path = tmp_path / "answers.safetensors"
    teacher_outputs(teacher, blobs(), path=path, progress=False)
    whole = path.read_bytes()
    other = safetensors.torch.save({"weight": torch.zeros(2)})
    for content in (b"", whole[:50], whole[:-8], other, b"x" * 100):
        path.write_bytes(content)
        with pytest.raises(CompanionError, match="damaged: delete it"):
            teacher_outputs(teacher, blobs(), path=path)
    path.write_bytes(whole)
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    for logits, says in (
        (torch.full((48, 3), math.nan), "not finite"),
        (torch.zeros(47, 3), "damaged"),
        (torch.zeros(48, 3, dtype=torch.int64), "damaged"),
    ):
        path.write_bytes(safetensors.torch.save({"logits": logits}, metadata))
        with pytest.raises(CompanionError, match=says):
            teacher_outputs(teacher, blobs(), path=path)
    counting = Counting(teacher)
    for bad in (tmp_path, tmp_path / "no" / "folder.safetensors"):
        with pytest.raises(CompanionError, match="cannot write"):
            teacher_outputs(counting, blobs(), path=bad)
    assert counting.asked == []


# Features


def mean_squared(a, b):
    return ((a.double() - b.double()) ** 2).mean().item()


def features_of(model, layers, inputs):
    with torch.no_grad():
        return model[:layers](inputs)


@pytest.mark.parametrize(
    ("teacher", "adapted", "pooled"),
    [
        (convnet(4, seed=1), False, 8),
        (convnet(6, seed=1), True, 8),
        (convnet(6, stride=2, seed=1), True, 4),  # maps of 4×4 against the student's 8×8
    ],
)
def test_distance_of_features_by_hand(teacher, adapted, pooled):
    student, inputs = convnet(), pictures().tensors[0]
    lesson = _Lesson(student, teacher, inputs[:1], ("0", "0"), seed=0)
    assert isinstance(lesson.adapter, nn.Conv2d) is adapted
    ours, theirs = (features_of(model, 1, inputs) for model in (student, teacher))
    if adapted:
        weight, bias = lesson.adapter.weight[:, :, 0, 0], lesson.adapter.bias
        ours = torch.einsum("nchw,dc->ndhw", ours, weight) + bias[:, None, None]
    if pooled == 4:
        ours = ours.reshape(len(ours), -1, 4, 2, 4, 2).mean((3, 5))
    assert lesson(inputs).distance.item() == pytest.approx(mean_squared(ours, theirs), rel=1e-4)


def test_one_step_with_features_by_hand():
    """Equal shapes, so no adapter; alpha 0 leaves cross-entropy, beta weighs the features."""
    points, labels = blobs(n=12).tensors
    student, reference, teacher = mlp(), mlp(), mlp(seed=1)
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-2, weight_decay=1e-2)
    loss = cross_entropy(reference(points), labels)
    loss = loss + 0.5 * ((reference[:2](points) - teacher[:2](points).detach()) ** 2).mean()
    loss.backward()
    optimizer.step()
    found = run(student, teacher, blobs(n=12), features=("1", "1"), alpha=0, beta=0.5, epochs=1, batch_size=12, lr=1e-2)
    torch.testing.assert_close(weights(found), weights(reference), rtol=1e-5, atol=1e-5)


def test_features_come_closer_to_the_teachers():
    student, teacher, data = mlp(), mlp(seed=1), blobs()
    distances = []
    for beta in (0, 10):
        found = run(student, teacher, data, features=("0", "0"), beta=beta, epochs=20, lr=1e-2)
        distances.append(mean_squared(*(features_of(model, 1, data.tensors[0]) for model in (found, teacher))))
    assert distances[1] < distances[0] / 4


def test_a_layer_that_runs_twice_counts_as_it_ran_last():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.head(self.inner(self.inner(x)))

    student, teacher, inputs = Twice(), mlp(3), torch.rand(4, 3)
    lesson = _Lesson(student, teacher, inputs[:1], ("inner", "0"), seed=0)
    last = student.inner(student.inner(inputs)).detach()
    assert lesson(inputs).distance.item() == pytest.approx(
        mean_squared(last, features_of(teacher, 1, inputs)), rel=1e-4
    )


# Few labels


@settings(deadline=None)
@given(
    labels=st.lists(st.integers(-1, 3), min_size=1, max_size=60),
    share=st.floats(0, 1),
    larger=st.floats(0, 1),
    seed=st.integers(0, 9),
)
def test_few_labels_keeps_its_share_of_each_class(labels, share, larger, seed):
    data = TensorDataset(torch.arange(len(labels)), torch.tensor(labels))
    few = few_labels(data, share, seed=seed)
    assert len(few) == len(data)
    kept = []
    for i, truth in enumerate(labels):
        sample, label = few[i]
        assert sample == i
        assert label in (truth, -1)
        if label != -1:
            kept.append(i)
    for klass in set(labels) - {-1}:
        exact = share * labels.count(klass)
        here = sum(labels[i] == klass for i in kept)
        assert abs(here - exact) <= 0.5 or here == 1 > exact > 0
    assert [int(sample) for sample, _ in few.labelled] == kept
    assert all(few.labelled[k][1] == labels[i] for k, i in enumerate(kept))
    if larger >= share:
        assert set(kept) <= {int(sample) for sample, _ in few_labels(data, larger, seed=seed).labelled}


def test_other_seeds_keep_other_labels_and_no_way_of_reading_shows_the_hidden_ones():
    data = blobs(60)
    few = few_labels(data, 0.1, seed=1)
    read = [int(label) for _, label in few]
    assert sum(label >= 0 for label in read) == 6
    assert torch.cat([labels for _, labels in DataLoader(few, batch_size=7)]).tolist() == read
    assert [int(few[i - 60][1]) for i in range(60)] == read
    assert read == [int(label) for _, label in few_labels(data, 0.1, seed=1)]
    assert read != [int(label) for _, label in few_labels(data, 0.1, seed=2)]
    assert all(label == -1 for _, label in few_labels(data, 0))


def test_few_labels_carries_what_the_data_set_says_of_itself():
    """Its classes are checked, its augmentation is used, and images of one scan are held out together."""
    digits = datasets.load("digits", split="train")
    few = few_labels(digits, 0.5)
    with pytest.raises(CompanionError, match="was trained for other classes"):
        run(models.create("simple_cnn", labels="abcdefghij"), models.create("simple_cnn"), few)
    hard = datasets.load("hard_digits", split="train")
    assert train.loop._groups(few_labels(hard, 0.1)) == hard.groups.tolist()
    assert train.loop.attribute(few, "augmentation") == digits.augmentation


# What is refused


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"temperature": 0}, "temperature is 0: give a number above 0"),
        ({"temperature": -1.0}, r"temperature is -1\.0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"alpha": -0.1}, r"alpha is -0\.1: give a number from 0 to 1"),
        ({"alpha": 1.1}, r"alpha is 1\.1"),
        ({"alpha": math.nan}, "alpha is nan"),
        ({"beta": -1}, "beta is -1"),
        ({"epochs": 0}, "epochs is 0"),
        ({"precision": "int3"}, "no precision 'int3'"),
        ({"device": "abacus"}, "no device 'abacus'"),
        ({"teacher": mlp(classes=4)}, "the student has 3 classes, the teacher 4"),
        ({"teacher": nn.Linear(5, 3)}, r"Linear cannot run as the teacher on an example of shape \(1, 3\)"),
        ({"student": nn.Linear(5, 3)}, r"Linear cannot run as the student on an example of shape \(1, 3\)"),
        ({"teacher": nn.Unflatten(1, (3, 1))}, r"the teacher must answer with scores \[N, classes\], not \[1, 3, 1\]"),
        ({"data": unlabelled(blobs())}, "no sample has a label, so only the teacher can be learnt from: give alpha=1"),
        ({"data": TensorDataset(torch.empty(0, 3), torch.empty(0))}, "the data set is empty"),
        ({"data": [1, 2]}, "must be a pair"),
        ({"data": TensorDataset(torch.rand(4, 3), torch.tensor([0, 1, 3, 2]))}, "sample 2 has the label 3"),
        ({"data": TensorDataset(torch.rand(4, 3), torch.tensor([0, 1, -2, 2]))}, "sample 2 has the label -2"),
        ({"features": ("0", "layer9")}, "the teacher has no layer 'layer9': name one of 0, 1, 2"),
        ({"features": ("layer9", "0")}, "the student has no layer 'layer9'"),
        *(
            ({"features": features}, "name one layer of the student and one of the teacher")
            for features in (("0",), ("0", "0", "0"), "0", 5, (0, 1))
        ),
        ({"features": ("0", "0"), "cache": "answers.safetensors"}, "give either features or a file as cache"),
    ],
)
@pytest.mark.parametrize("cache", [True, False])
def test_bad_input_is_refused_in_one_sentence(given, says, cache):
    given = {"student": mlp(), "teacher": mlp(seed=1), "data": None, "cache": cache} | given
    with pytest.raises(CompanionError, match=says) as caught:
        run(given.pop("student"), given.pop("teacher"), given.pop("data"), **given)
    assert "\n" not in str(caught.value)


def test_features_that_are_no_maps_are_refused():
    tokens = nn.Sequential(nn.Unflatten(1, (3, 1)), nn.Flatten(), nn.Linear(3, 3))
    with pytest.raises(CompanionError, match=r"must be maps .* not \[1, 3, 1\]: name other layers"):
        run(tokens, mlp(), features=("0", "0"))


@pytest.mark.parametrize("cache", [True, False])
def test_answers_that_are_not_finite_are_refused(cache):
    """From the weights, or for one sample in the middle of the data."""
    broken = mlp()
    broken[0].weight.data[0, 0] = math.nan
    with pytest.raises(CompanionError, match="the teacher answers with numbers that are not finite"):
        run(mlp(), broken, cache=cache)
    with pytest.raises(CompanionError, match="the student answers with numbers that are not finite"):
        run(broken, mlp(), cache=cache)
    points, labels = blobs().tensors
    points = points.clone()
    points[20, 0] = math.inf
    with pytest.raises(CompanionError, match="not finite"):
        run(mlp(), mlp(seed=1), TensorDataset(points, labels), cache=cache)


def test_masks_and_shares_out_of_range_are_refused():
    class Masks(Dataset):
        task = "segment"

        def __len__(self):
            return 2

        def __getitem__(self, i):
            return torch.rand(3, 8, 8), torch.zeros(8, 8, dtype=torch.long)

    with pytest.raises(CompanionError, match="distillation is for classification"):
        run(convnet(), convnet(), Masks())
    for share in (-0.1, 1.5, 400, math.nan):
        with pytest.raises(CompanionError, match=r"share is .*: give the share of the labels to keep, from 0 to 1"):
            few_labels(blobs(), share)


def test_a_killed_run_goes_on_but_not_with_another_loss(teacher, tmp_path):
    path = tmp_path / "run.checkpoint"

    class Stop(Exception):
        pass

    def stop(epoch):
        if epoch.epoch == 2:
            raise Stop

    given = {"checkpoint": path, "checkpoint_seconds": 0, "features": ("0", "0")}
    with pytest.raises(Stop):
        run(mlp(), teacher, on_epoch=stop, **given)
    for other, says in (({"alpha": 0.5}, "alpha is 0.9"), ({"temperature": 2.0}, "temperature is 4.0")):
        with pytest.raises(CompanionError, match=says):
            run(mlp(), teacher, resume=True, **given, **other)
    with pytest.raises(CompanionError, match="its teacher is"):
        run(mlp(), mlp(32, seed=8), resume=True, **given)
    found = run(mlp(), teacher, resume=True, **given)
    assert torch.equal(weights(found), weights(run(mlp(), teacher, features=("0", "0"))))


def test_it_pays_where_labels_are_few():
    """With 5 labels of each digit: the teacher's answers for the others are worth far more than 3 points."""
    digits, exam = (datasets.load("digits", split=split) for split in ("train", "test"))
    few = few_labels(digits, 0.04)
    assert len(few.labelled) == 50
    given = {"batch_size": 50, "lr": 3e-3, "validation": 0, "augment": None, "progress": False}
    teacher = models.create("simple_cnn", labels=digits.labels, seed=0)
    train.fit(teacher, digits, epochs=4, **given)
    alone, taught = (models.create("simple_cnn", channels=(4, 8), hidden=32, seed=1) for _ in "ab")
    train.fit(alone, few.labelled, epochs=104, **given)  # 104 steps, as 4 epochs of 26
    taught = distill(taught, teacher, few, epochs=4, **given)
    without, with_teacher = (train.evaluate(model, exam, progress=False).main for model in (alone, taught))
    assert with_teacher > without + 0.03
