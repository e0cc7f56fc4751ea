import json
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from weightlab.exceptions import UsageError
from weightlab.inspect import Checkpoint, TensorInfo


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(4, 3, generator=generator),
        "a.bias": torch.randn(4, generator=generator).bfloat16(),
        "b.weight": torch.randn(2, 3, 1, 1, generator=generator).half(),
    }


def same(checkpoint, tensors):
    assert set(checkpoint) == set(tensors)
    assert len(checkpoint) == len(tensors)
    for name, tensor in tensors.items():
        assert checkpoint.infos[name] == TensorInfo(tuple(tensor.shape), tensor.dtype)
        assert torch.equal(checkpoint[name], tensor)


def sharded(folder, tensors, suffix="safetensors", start="model"):
    names = {name: f"{start}-{i:05}.{suffix}" for i, name in enumerate(tensors)}
    for name, file in names.items():
        (save_file if suffix == "safetensors" else torch.save)({name: tensors[name]}, folder / file)
    (folder / f"{start}.{suffix}.index.json").write_text(json.dumps({"weight_map": names}))
    return names


def test_state_dict_file_and_folders(tensors, tmp_path):
    same(Checkpoint(tensors), tensors)
    file = tmp_path / "model.safetensors"
    save_file(tensors, file)
    same(Checkpoint(file), tensors)
    same(Checkpoint(str(tmp_path)), tensors)
    folder = tmp_path / "sharded"
    folder.mkdir()
    names = sharded(folder, tensors)
    same(Checkpoint(folder), tensors)
    assert Checkpoint(folder).files == tuple(folder / name for name in names.values())
    old = tmp_path / "old"
    old.mkdir()
    sharded(old, tensors, "bin", "pytorch_model")
    same(Checkpoint(old), tensors)
    assert Checkpoint(tensors).files == ()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("key", [None, "state_dict", "model"])
def test_files_of_torch_save(tensors, tmp_path, zipped, key):
    path = tmp_path / "weights.pth"
    content = tensors if key is None else {"epoch": 3, key: {f"module.{n}": t for n, t in tensors.items()}}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    same(Checkpoint(path), tensors)


def test_mapped_files_are_mapped_anew_and_read_the_same(tensors, tmp_path, monkeypatch):
    path = tmp_path / "weights.pt"
    torch.save(tensors, path)
    checkpoint = Checkpoint(path)
    first = checkpoint["a.weight"]
    monkeypatch.setattr("weightlab.inspect.checkpoint._KEPT_PAGES", 1)
    same(checkpoint, tensors)
    # Tensors that were handed out before are still whole.
    assert torch.equal(first, tensors["a.weight"])
    assert checkpoint["a.weight"].data_ptr() != first.data_ptr()


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_rows_of_a_stack_are_read_alone(tmp_path, suffix):
    stack = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    (save_file if suffix == "safetensors" else torch.save)({"experts": stack}, tmp_path / f"m.{suffix}")
    for checkpoint in (Checkpoint(tmp_path / f"m.{suffix}"), Checkpoint({"experts": stack})):
        for index in range(4):
            assert torch.equal(checkpoint.row("experts", index), stack[index])


def test_ids_are_looked_for_in_the_data_folder(tensors, tmp_path, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    save_file(tensors, tmp_path / "owner" / "name" / "model.safetensors")
    monkeypatch.setenv("WEIGHTLAB_DATA", str(tmp_path))
    checkpoint = Checkpoint("owner/name")
    same(checkpoint, tensors)
    assert checkpoint.source == "owner/name"


class Hub:
    """Answers as the client does, for one repository."""

    def __init__(self, folder):
        self.folder, self.files, self.patterns = folder, sorted(path.name for path in folder.iterdir()), None

    def list_repo_files(self, repository):
        if repository != "owner/name":
            raise ValueError("404\nnot found")
        return [*self.files, "onnx/model.safetensors"]

    def snapshot_download(self, repository, *, allow_patterns=None, local_files_only=False):
        if local_files_only:
            raise ValueError("not in the cache")
        self.patterns = allow_patterns
        return str(self.folder)


@pytest.fixture
def hub(tensors, tmp_path, monkeypatch):
    folder = tmp_path / "snapshot"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin")
    for name in ("consolidated.safetensors", "config.json", "README.md"):
        (folder / name).write_text("{}")
    client = Hub(folder)
    monkeypatch.delenv("WEIGHTLAB_DATA", raising=False)
    monkeypatch.setattr("weightlab.inspect.hub_weights.hub_answers", lambda: True)
    monkeypatch.setattr("weightlab.inspect.hub_weights.require", lambda *names: client)
    return client


def test_ids_are_asked_of_the_hub(hub, tensors, monkeypatch):
    same(Checkpoint("owner/name"), tensors)
    assert hub.patterns == ["model.safetensors", "config.json"]
    with pytest.raises(UsageError, match=r"no checkpoint other/name: .* Hugging Face Hub: 404$"):
        Checkpoint("other/name")
    hub.files = ["README.md"]
    with pytest.raises(UsageError, match=r"has no safetensors or \.bin file"):
        Checkpoint("owner/name")
    monkeypatch.setattr("weightlab.inspect.hub_weights.hub_answers", lambda: False)
    with pytest.raises(UsageError, match="not in the cache"):
        Checkpoint("owner/name")
    for file in ("folder/nowhere.pt", "folder/nowhere.safetensors"):
        with pytest.raises(UsageError, match="cannot read"):
            Checkpoint(file)


def test_modules_have_tied_parameters_once():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    assert list(Checkpoint(model)) == ["embed.weight"]
    assert list(Checkpoint(model.state_dict())) == ["embed.weight"]
    assert not Checkpoint(model)["embed.weight"].requires_grad


class Code:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_pickles_are_refused_and_not_run(tensors, tmp_path, capsys):
    plain = tmp_path / "plain.pt"
    plain.write_bytes(pickle.dumps({"a": Code()}))
    with pytest.raises(UsageError, match="plain pickle, which may run code"):
        Checkpoint(plain)
    for zipped in (True, False):
        whole = tmp_path / "whole.pt"
        torch.save({**tensors, "x": Code()}, whole, _use_new_zipfile_serialization=zipped)
        with pytest.raises(UsageError, match="more than tensors, and loading it would run code"):
            Checkpoint(whole)
    assert "this must not run" not in capsys.readouterr().out


@pytest.mark.parametrize("keep", [0.3, 0.97])
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_truncated_files_are_refused(tensors, tmp_path, keep, suffix):
    path = tmp_path / f"model.{suffix}"
    if suffix == "pt":
        torch.save(tensors, path)
    else:
        save_file(tensors, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(UsageError, match="truncated"):
        Checkpoint(path)


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
def test_foreign_and_empty_files_are_refused(tmp_path, name):
    path = tmp_path / name
    path.write_text("no weights in here, but a text of some length")
    with pytest.raises(UsageError, match=r"no safetensors file|no checkpoint that can be read"):
        Checkpoint(path)
    path.write_bytes(b"")
    with pytest.raises(UsageError, match="is empty"):
        Checkpoint(path)


def test_other_archives_are_refused(tmp_path):
    import zipfile

    path = tmp_path / "photos.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "text")
    with pytest.raises(UsageError, match="truncated or damaged"):
        Checkpoint(path)


def test_incomplete_folders_are_refused(tensors, tmp_path):
    with pytest.raises(UsageError, match=r"neither model\.safetensors"):
        Checkpoint(tmp_path)
    names = sharded(tmp_path, tensors)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {**names, "c": names["a.bias"]}}))
    with pytest.raises(UsageError, match="its index names c, which"):
        Checkpoint(tmp_path)
    (tmp_path / names["a.bias"]).unlink()
    with pytest.raises(UsageError, match=r"1 of 3 shards are missing, e\.g\. model-00001"):
        Checkpoint(tmp_path)
    index.write_text("{")
    with pytest.raises(UsageError, match=r"index\.json is damaged"):
        Checkpoint(tmp_path)


def test_other_bad_sources(tmp_path):
    with pytest.raises(TypeError, match="a module, a state dict or a path, got int"):
        Checkpoint(3)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"cannot read .*nowhere\.pt: No such file"):
        Checkpoint(tmp_path / "nowhere.pt")
    with pytest.raises(UsageError, match="holds no tensors"):
        Checkpoint({})
    torch.save({"epoch": 3}, tmp_path / "a.pt")
    with pytest.raises(UsageError, match="holds no tensors"):
        Checkpoint(tmp_path / "a.pt")
