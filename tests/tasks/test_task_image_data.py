import io
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from weightlab.exceptions import TaskError
from weightlab.tasks import Cifar10ResNet, MnistMLP
from weightlab.tasks.data import cache_folder, images, load_images
from weightlab.tasks.data.cache import TensorCache


def write_images(path, pixels, labels, column):
    def png(array):
        stream = io.BytesIO()
        Image.fromarray(array).save(stream, "PNG")
        return {"bytes": stream.getvalue(), "path": None}

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({column: [png(array) for array in pixels], "label": labels}), path)


@pytest.fixture
def colour(data_folder):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (7, 32, 32, 3), dtype=np.uint8)
    labels = rng.integers(0, 10, 7).tolist()
    folder = data_folder / "owner/set/config"
    write_images(folder / "train-00000-of-00002.parquet", pixels[:4], labels[:4], "img")
    write_images(folder / "train-00001-of-00002.parquet", pixels[4:], labels[4:], "img")
    return torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.tensor(labels)


def load(limit=None):
    return load_images("owner/set", "config", "train", column="img", limit=limit)


def test_pixels_and_labels_are_read_exactly(colour):
    pixels, labels = load()
    assert pixels.dtype == torch.uint8
    assert labels.dtype == torch.int64
    assert torch.equal(pixels, colour[0])
    assert torch.equal(labels, colour[1])


@pytest.mark.parametrize("limit", [1, 4, 6, 7, 100])
def test_a_limit_reads_the_first_images(colour, limit):
    pixels, labels = load(limit)
    assert torch.equal(pixels, colour[0][:limit])
    assert torch.equal(labels, colour[1][:limit])
    assert not cache_folder().exists()


def test_decoding_happens_once_a_machine(colour, monkeypatch):
    first, fingerprint = load(), images.images_fingerprint("owner/set", "config", "train", column="img")
    load_images.cache_clear()
    monkeypatch.setattr(images, "_decode", lambda *_: pytest.fail("decoded again"))
    assert torch.equal(load().pixels, first.pixels)
    assert torch.equal(load(3).pixels, first.pixels[:3])
    assert images.images_fingerprint("owner/set", "config", "train", column="img") == fingerprint
    assert len(list(cache_folder().iterdir())) == 1


def test_changed_files_are_decoded_anew(colour, data_folder):
    before = images.images_fingerprint("owner/set", "config", "train", column="img")
    path = data_folder / "owner/set/config/train-00000-of-00002.parquet"
    write_images(path, np.zeros((4, 32, 32, 3), np.uint8), [0] * 4, "img")
    assert images.images_fingerprint("owner/set", "config", "train", column="img") != before
    assert load().pixels[:4].sum() == 0


def test_equal_contents_have_one_fingerprint_wherever_they_lie(colour, data_folder, monkeypatch, tmp_path):
    before = images.images_fingerprint("owner/set", "config", "train", column="img")
    os.rename(data_folder, tmp_path / "moved")
    monkeypatch.setenv("WEIGHTLAB_DATA", str(tmp_path / "moved"))
    assert images.images_fingerprint("owner/set", "config", "train", column="img") == before


def test_a_damaged_cache_is_made_again(colour):
    load()
    (file,) = cache_folder().iterdir()
    file.write_bytes(file.read_bytes()[:100])
    load_images.cache_clear()
    assert torch.equal(load().pixels, colour[0])
    load_images.cache_clear()
    assert torch.equal(load().pixels, colour[0])


def test_an_unwritable_cache_only_costs_the_caching(colour, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert torch.equal(load().pixels, colour[0])


def test_an_interrupted_writer_leaves_nothing(data_folder, tmp_path, monkeypatch):
    def fail(source, target):
        raise OSError("disk full")

    source = tmp_path / "source"
    source.write_text("")
    monkeypatch.setattr(os, "replace", fail)
    cache = TensorCache("name", [source], lambda: {"x": torch.ones(2)})
    assert torch.equal(cache.tensors()["x"], torch.ones(2))
    assert not list(cache_folder().iterdir())


def test_other_contents_are_named(data_folder):
    folder = data_folder / "owner/set/config"
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"text": ["no image"]}), folder / "train-00000-of-00001.parquet")
    with pytest.raises(
        TaskError, match=r"train-00000-of-00001\.parquet holds no readable images in column 'img'"
    ):
        load()
    (folder / "train-00000-of-00001.parquet").write_text("no parquet")
    with pytest.raises(TaskError, match=r"train-00000-of-00001\.parquet holds no readable images"):
        load()


@pytest.mark.parametrize(
    ("task", "module", "folder", "column", "shape"),
    [
        (
            Cifar10ResNet(depth=8, batch_size=4),
            "cifar10_resnet",
            "uoft-cs/cifar10/plain_text",
            "img",
            (32, 32, 3),
        ),
        (MnistMLP(hidden=(4,), batch_size=4), "mnist_mlp", "ylecun/mnist/mnist", "image", (28, 28)),
    ],
)
def test_image_tasks_run_on_the_hubs_layout(data_folder, monkeypatch, task, module, folder, column, shape):
    monkeypatch.setattr(f"weightlab.tasks.{module}.VALIDATION_IMAGES", 5)
    rng = np.random.default_rng(0)
    for split, count in (("train", 15), ("test", 6)):
        pixels = rng.integers(0, 256, (count, *shape), dtype=np.uint8)
        labels = rng.integers(0, 10, count).tolist()
        write_images(data_folder / folder / f"{split}-00000-of-00001.parquet", pixels, labels, column)
    assert [len(task.images(split)[1]) for split in ("train", "validation", "test")] == [10, 5, 6]
    train, validation = (task.images(split)[0].flatten(1) for split in ("train", "validation"))
    assert not (train[:, None] == validation[None]).all(-1).any()
    model = task.build(torch.Generator().manual_seed(0))
    batches = list(task.batches("train", torch.Generator().manual_seed(0)))
    assert len(batches) == 2
    task.loss(model, batches[0]).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        assert 0 <= task.evaluate(model.eval(), "test")["error"] <= 1
    assert len(task.fingerprint()) == 64
