import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from weightlab.exceptions import UsageError
from weightlab.trial.scoring.reading import read_arrays, read_folders, read_parquet
from weightlab.trial.scoring.sources import data_source, task_source


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_parquet(path, images, labels, names=None, column="img"):
    cells = [{"bytes": png(image), "path": None} for image in images]
    table = pa.table({column: cells, "label": labels})
    if names:
        features = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


class TestArrays:
    def test_npz_and_safetensors_hold_the_same(self, tmp_path):
        x, y = np.random.default_rng(0).normal(size=(6, 4)), np.array([0, 1, 2, 0, 1, 2])
        np.savez(tmp_path / "a.npz", x=x, y=y, x_test=x[:2], y_test=y[:2])
        tensors = {"x": torch.from_numpy(x), "y": torch.from_numpy(y)}
        save_file(
            {**tensors, "x_test": tensors["x"][:2].clone(), "y_test": tensors["y"][:2].clone()},
            tmp_path / "a.safetensors",
        )
        for name in ("a.npz", "a.safetensors"):
            train, test = read_arrays(tmp_path / name)
            torch.testing.assert_close(train.inputs, torch.from_numpy(x).float())
            assert train.labels.tolist() == y.tolist()
            assert test is not None
            assert torch.equal(test.inputs, train.inputs[:2])

    def test_images_become_channels_first(self, tmp_path):
        gray, colour = pixels(5, 6, 7), pixels(5, 6, 7, 3)
        for array, expected in ((gray, gray[:, None]), (colour, colour.transpose(0, 3, 1, 2))):
            np.savez(tmp_path / "a.npz", x=array, y=np.arange(5))
            train, test = read_arrays(tmp_path / "a.npz")
            assert test is None
            assert train.inputs.dtype == torch.uint8
            assert np.array_equal(train.inputs.numpy(), expected)

    @pytest.mark.parametrize(
        ("arrays", "message"),
        [
            ({"x": np.zeros((3, 2))}, "has no array y; it has: x"),
            (
                {"x": np.zeros((3, 2)), "y": np.zeros(3)},
                r"y must hold a whole number an example, \(3,\); it is \(3,\) torch.float64",
            ),
            ({"x": np.zeros((3, 2)), "y": np.zeros(2, int)}, r"\(3,\); it is \(2,\)"),
            ({"x": np.zeros(3), "y": np.zeros(3, int)}, r"x must hold examples, \(N, ...\)"),
            (
                {"x": np.zeros((3, 2)), "y": np.array([0, -1, 1])},
                "y has -1 at 1; classes are numbered from 0",
            ),
            ({"x": np.array([[0.0], [np.nan]]), "y": np.zeros(2, int)}, "x is not finite at example 1"),
            ({"x": np.zeros((2, 1)), "y": np.zeros(2, int), "x_test": np.zeros((2, 1))}, "no array y_test"),
        ],
    )
    def test_refused(self, tmp_path, arrays, message):
        np.savez(tmp_path / "a.npz", **arrays)
        with pytest.raises(UsageError, match=message):
            read_arrays(tmp_path / "a.npz")

    def test_pickles_and_broken_files(self, tmp_path):
        np.savez(tmp_path / "a.npz", x=np.array([{}], dtype=object), y=np.zeros(1, int))
        with pytest.raises(
            UsageError, match=r"cannot read .*a.npz: ValueError: Object arrays cannot be loaded"
        ):
            read_arrays(tmp_path / "a.npz")
        (tmp_path / "a.safetensors").write_bytes(b"nothing")
        with pytest.raises(UsageError, match=r"cannot read .*a.safetensors"):
            read_arrays(tmp_path / "a.safetensors")


class TestParquet:
    def test_images_labels_and_names(self, tmp_path):
        images = pixels(4, 5, 6, 3)
        write_parquet(tmp_path / "train-0.parquet", images, [0, 1, 1, 0], names=["cat", "dog"])
        read = read_parquet([tmp_path / "train-0.parquet"], "img", "label", None)
        assert np.array_equal(read.inputs.numpy(), images.transpose(0, 3, 1, 2))
        assert read.labels.tolist() == [0, 1, 1, 0]
        assert read.classes == ("cat", "dog")
        assert len(read_parquet([tmp_path / "train-0.parquet"], "img", "label", None, 3).labels) == 3

    def test_labels_as_texts(self, tmp_path):
        write_parquet(tmp_path / "a.parquet", pixels(3, 4, 4), ["dog", "cat", "dog"])
        read = read_parquet([tmp_path / "a.parquet"], "img", "label", None)
        assert read.inputs.shape == (3, 1, 4, 4)
        assert (read.labels.tolist(), read.classes) == ([1, 0, 1], ("cat", "dog"))

    def test_sizes(self, tmp_path):
        write_parquet(tmp_path / "a.parquet", [pixels(4, 4), pixels(8, 6, 3)], [0, 1])
        with pytest.raises(UsageError, match="images differ in size, 4x4 to 6x8; --size scales them"):
            read_parquet([tmp_path / "a.parquet"], "img", "label", None)
        assert read_parquet([tmp_path / "a.parquet"], "img", "label", 5).inputs.shape == (2, 3, 5, 5)

    def test_refused(self, tmp_path):
        file = tmp_path / "a.parquet"
        write_parquet(file, pixels(2, 4, 4), [0, -1])
        with pytest.raises(
            UsageError, match=r"has no column 'image'; it has: img, label \(--image, --label\)"
        ):
            read_parquet([file], "image", "label", None)
        with pytest.raises(UsageError, match="column 'label' holds no image in row 0"):
            read_parquet([file], "label", "label", None)
        with pytest.raises(UsageError, match="column 'label' has -1 at 1"):
            read_parquet([file], "img", "label", None)
        pq.write_table(pa.table({"img": [b"no image"], "label": [0]}), file)
        with pytest.raises(UsageError, match=r"a.parquet, row 0 is no readable image"):
            read_parquet([file], "img", "label", None)
        file.write_bytes(b"nothing")
        with pytest.raises(UsageError, match=r"cannot read .*a.parquet"):
            read_parquet([file], "img", "label", None)


class TestFolders:
    def test_a_folder_a_class(self, tmp_path):
        for name, count in (("dog", 2), ("cat", 1)):
            (tmp_path / name).mkdir()
            for number in range(count):
                (tmp_path / name / f"{number}.PNG").write_bytes(png(pixels(4, 4, 3, seed=number)))
        (tmp_path / "dog" / "notes.txt").write_text("no image")
        (tmp_path / "empty").mkdir()
        read = read_folders(tmp_path, None)
        assert read.classes == ("cat", "dog")
        assert read.labels.tolist() == [0, 1, 1]
        assert np.array_equal(read.inputs[2].numpy(), pixels(4, 4, 3, seed=1).transpose(2, 0, 1))

    def test_refused(self, tmp_path):
        with pytest.raises(UsageError, match="holds neither Parquet files nor images in a folder a class"):
            read_folders(tmp_path, None)
        (tmp_path / "cat").mkdir()
        (tmp_path / "cat" / "1.png").write_bytes(b"nothing")
        with pytest.raises(UsageError, match=r"cat/1.png is no readable image"):
            read_folders(tmp_path, None)


class TestSources:
    def test_splits_of_a_hub_layout(self, tmp_path):
        names = ["cat", "dog"]
        write_parquet(tmp_path / "data" / "train-00000-of-00002.parquet", pixels(3, 4, 4), [0, 1, 0], names)
        write_parquet(tmp_path / "data" / "train-00001-of-00002.parquet", pixels(2, 4, 4), [1, 1], names)
        write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", pixels(2, 4, 4), [0, 1], names)
        source = data_source(str(tmp_path), image="img")
        assert source.labels.tolist() == [0, 1, 0, 1, 1]
        assert source.test is not None
        assert source.test[1].tolist() == [0, 1]
        assert (source.called(1), source.model) == ("dog", "mlp")
        assert data_source(str(tmp_path), image="img", test_split=None).test is None
        with pytest.raises(UsageError, match="no Parquet files of a split 'dev'"):
            data_source(str(tmp_path), image="img", split="dev")

    def test_a_repository(self, tmp_path, monkeypatch):
        monkeypatch.setenv("WEIGHTLAB_DATA", str(tmp_path))
        write_parquet(tmp_path / "me" / "pets" / "plain" / "train-0.parquet", pixels(3, 4, 4), [0, 1, 0])
        source = data_source("me/pets:plain", image="img")
        assert (source.name, len(source.labels), source.test) == ("me/pets:plain", 3, None)

    def test_folders_of_splits(self, tmp_path):
        for split, count in (("train", 3), ("test", 2)):
            for name in ("cat", "dog"):
                (tmp_path / split / name).mkdir(parents=True)
                for number in range(count):
                    (tmp_path / split / name / f"{number}.png").write_bytes(
                        png(pixels(16, 16, 3, seed=number))
                    )
        source = data_source(str(tmp_path))
        assert len(source.labels) == 6
        assert source.test is not None
        assert len(source.test[1]) == 4
        assert source.model == "resnet8"

    @pytest.mark.parametrize("model", ["mlp", "resnet8"])
    @pytest.mark.parametrize("channels", [1, 3])
    def test_inputs_are_standardised_by_channel(self, tmp_path, model, channels):
        array = pixels(40, 16, 16, channels)
        array[..., 0] //= 3
        np.savez(tmp_path / "a.npz", x=array, y=np.arange(40) % 3)
        source = data_source(str(tmp_path / "a.npz"), model=model)
        built = source.build()
        assert built(source.inputs[:5]).shape == (5, 3)
        prepared = built.prepare(source.inputs)
        torch.testing.assert_close(
            prepared.mean((0, 2, 3)), torch.zeros(prepared.shape[1]), atol=1e-4, rtol=0
        )
        torch.testing.assert_close(prepared.std((0, 2, 3), correction=0), torch.ones(prepared.shape[1]))

    def test_features_are_standardised_one_by_one(self, tmp_path):
        x = np.random.default_rng(0).normal(size=(50, 3)) * [1, 100, 0] + [0, -1000, 7]
        np.savez(tmp_path / "a.npz", x=x, y=np.arange(50) % 2)
        source = data_source(str(tmp_path / "a.npz"))
        prepared = source.build().prepare(source.inputs)
        torch.testing.assert_close(prepared.mean(0), torch.zeros(3), atol=1e-4, rtol=0)
        torch.testing.assert_close(prepared.std(0, correction=0), torch.tensor([1.0, 1.0, 0.0]))

    def test_ones_own_model(self, tmp_path):
        np.savez(tmp_path / "a.npz", x=np.zeros((4, 2)), y=np.arange(4) % 2)
        (tmp_path / "mine.py").write_text(
            "from torch.nn import Linear\n"
            "build, wide, few = lambda: Linear(2, 2), lambda: Linear(3, 2), lambda: Linear(2, 1)\n"
            "none, broken, number = lambda: None, lambda: 1 / 0, 3\n"
        )
        source = data_source(str(tmp_path / "a.npz"), model=f"{tmp_path}/mine.py:build")
        assert source.build()(source.inputs).shape == (4, 2)
        for name, message in (
            ("wide", r"wide does not take a batch of inputs \(2,\): RuntimeError"),
            ("few", r"few must give logits \(2, 2\) for 2 inputs of 2 classes; it gives \(2, 1\)"),
            ("none", "none gave no module but NoneType"),
            ("broken", "broken could not be called: ZeroDivisionError"),
        ):
            with pytest.raises(UsageError, match=message):
                data_source(str(tmp_path / "a.npz"), model=f"{tmp_path}/mine.py:{name}")
        with pytest.raises(UsageError, match="must be callable without arguments"):
            data_source(str(tmp_path / "a.npz"), model=f"{tmp_path}/mine.py:number")

    @pytest.mark.parametrize(
        ("data", "options", "message"),
        [
            ("a.npz", {"model": "resnet9"}, "unknown model 'resnet9'; known: mlp, resnet8, resnet20"),
            ("a.npz", {"model": "resnet8"}, r"resnet8 is for images; inputs are \(2,\)"),
            ("a.npz", {"size": 0}, "--size must be at least 1; got 0"),
            ("b.npz", {}, "no file or folder b.npz, nor is it a data set's id"),
            ("one.npz", {}, "one.npz has a single class"),
            ("odd.npz", {}, r"the test set's examples, \(3,\) of classes"),
            ("a.csv", {}, "a.csv is neither .npz, .safetensors nor .parquet"),
        ],
    )
    def test_refused(self, tmp_path, monkeypatch, data, options, message):
        monkeypatch.chdir(tmp_path)
        np.savez("a.npz", x=np.zeros((4, 2)), y=np.arange(4) % 2)
        np.savez("one.npz", x=np.zeros((4, 2)), y=np.zeros(4, int))
        np.savez(
            "odd.npz", x=np.zeros((4, 2)), y=np.arange(4) % 2, x_test=np.zeros((2, 3)), y_test=np.arange(2)
        )
        (tmp_path / "a.csv").write_text("x,y")
        with pytest.raises(UsageError, match=message):
            data_source(data, **options)

    def test_identity_follows_data_and_model(self, tmp_path):
        identities = set()
        for x, model in ((np.zeros((4, 2)), "mlp"), (np.ones((4, 2)), "mlp")):
            np.savez(tmp_path / "a.npz", x=x, y=np.arange(4) % 2)
            source = data_source(str(tmp_path / "a.npz"), model=model)
            identities |= {source.identity, source.first(3).identity}
        assert len(identities) == 4

    def test_tasks(self):
        source = task_source("digits-mlp")
        assert source.inputs.shape == (1085, 8, 8)
        assert source.test is not None
        assert len(source.test[1]) == 355
        assert source.augment is None
        torch.manual_seed(3)
        first = source.build()(source.inputs[:4])
        torch.manual_seed(3)
        assert torch.equal(source.build()(source.inputs[:4]), first)
        assert not torch.equal(source.build()(source.inputs[:4]), first)
        with pytest.raises(UsageError, match=r"task docs-gpt has no labelled examples by index"):
            task_source("docs-gpt")
