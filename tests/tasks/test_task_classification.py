import itertools
import math

import pytest
import torch
from torch import nn

from weightlab.tasks import Cifar10ResNet, Classification, DigitsMLP
from weightlab.tasks.digits_mlp import digits


def seeded(seed):
    return torch.Generator().manual_seed(seed)


class Numbered(Classification):
    """Images that hold their own number."""

    name = "numbered"
    batch_size = 4

    def build(self, generator):
        return nn.Linear(1, 3)

    def images(self, split):
        return torch.arange(11, dtype=torch.uint8)[:, None], torch.arange(11) % 3

    def prepare(self, pixels):
        return pixels.float()


class Guess(nn.Module):
    """Logits for classes 0, 1, 2 that do not depend on the image."""

    def __init__(self, *logits):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, x):
        return self.logits.expand(len(x), 3)


def test_an_epoch_is_full_batches_of_distinct_images_with_their_labels():
    batches = list(Numbered().batches("train", seeded(0)))
    assert [len(labels) for _, labels in batches] == [4, 4]
    pixels, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    assert len(set(pixels.flatten().tolist())) == 8
    assert torch.equal(labels, pixels[:, 0].long() % 3)


def test_epochs_differ_and_depend_on_the_generator_alone():
    task = Numbered()

    def two_epochs(seed):
        generator = seeded(seed)
        return [[x.flatten().tolist() for x, _ in task.batches("train", generator)] for _ in range(2)]

    first, second = two_epochs(0)
    assert first != second
    torch.manual_seed(9)
    assert two_epochs(0) == [first, second]
    assert two_epochs(1) != [first, second]


def test_error_and_loss_of_a_constant_guess(monkeypatch):
    monkeypatch.setattr("weightlab.tasks.classification.EVALUATION_BATCH", 3)
    with torch.no_grad():
        result = Numbered().evaluate(Guess(0.0, math.log(2), 0.0), "test")
    assert result["error"] == pytest.approx(7 / 11)
    assert result["loss"] == pytest.approx((4 * math.log(2) + 7 * math.log(4)) / 11)


def test_digits_splits_are_stratified_and_disjoint():
    parts = digits()
    assert {split: len(labels) for split, (_, labels) in parts.items()} == {
        "train": 1085,
        "validation": 357,
        "test": 355,
    }
    fives = sum(torch.bincount(labels, minlength=10) for _, labels in parts.values()) // 5
    for split, share in (("train", 3), ("validation", 1), ("test", 1)):
        counts = torch.bincount(parts[split][1], minlength=10)
        assert (counts >= share * fives).all()
        assert (counts <= share * (fives + 1)).all()
    everything = torch.cat([pixels.flatten(1) for pixels, _ in parts.values()])
    assert len(everything) == 1797
    assert everything.unique(dim=0).shape[0] == 1797
    assert everything.max() == 16


def test_digits_mlp_learns():
    task = DigitsMLP()
    model = task.build(seeded(0))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    generator = seeded(1)
    epochs = (task.batches("train", generator) for _ in itertools.count())
    for batch in itertools.islice(itertools.chain.from_iterable(epochs), 150):
        optimizer.zero_grad()
        task.loss(model, batch).backward()
        optimizer.step()
    with torch.no_grad():
        assert task.evaluate(model, "test")["error"] < 0.06
        assert task.evaluate(task.build(seeded(0)), "test")["error"] > 0.7


def test_weights_come_from_the_generator_alone():
    task = DigitsMLP()
    torch.manual_seed(1)
    one = task.build(seeded(0)).head.weight
    torch.manual_seed(2)
    assert torch.equal(task.build(seeded(0)).head.weight, one)
    assert not torch.equal(task.build(seeded(1)).head.weight, one)


def test_augmentation_is_a_shift_and_a_mirroring_of_each_image():
    pixels = torch.randint(1, 256, (64, 3, 32, 32), generator=seeded(0)).to(torch.uint8)
    changed = Cifar10ResNet().augment(pixels, seeded(1))
    assert changed.dtype == torch.uint8
    shifts = set()
    padded = nn.functional.pad(pixels, (4, 4, 4, 4))
    for image, result in zip(padded, changed, strict=True):
        found = [
            (dy, dx, mirrored)
            for dy, dx, mirrored in itertools.product(range(9), range(9), (False, True))
            if torch.equal(_crop(image, dy, dx, mirrored), result)
        ]
        assert len(found) == 1
        shifts.add(found[0])
    assert len({shift[:2] for shift in shifts}) > 30
    assert {shift[2] for shift in shifts} == {False, True}
    assert torch.equal(Cifar10ResNet().augment(pixels, seeded(1)), changed)


def _crop(image, dy, dx, mirrored):
    part = image[:, dy : dy + 32, dx : dx + 32]
    return part.flip(-1) if mirrored else part


def test_cifar_pixels_are_normalised_per_channel():
    grey = torch.full((2, 3, 4, 4), 128, dtype=torch.uint8)
    expected = [(128 / 255 - m) / s for m, s in ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))]
    assert Cifar10ResNet().prepare(grey)[1, :, 2, 3].tolist() == pytest.approx(expected, rel=1e-5)


def test_digits_fingerprint_follows_the_settings():
    assert DigitsMLP().fingerprint() == DigitsMLP().fingerprint()
    assert DigitsMLP(hidden=(8,)).fingerprint() != DigitsMLP().fingerprint()
