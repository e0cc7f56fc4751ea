import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from weightlab._hub import PROBE_SECONDS, hub_answers
from weightlab.exceptions import TaskError
from weightlab.tasks import EnglishGPT, ShakespeareGPT
from weightlab.tasks.data import decode, hub, load_text, model_file, parquet_files


def write_text(folder, split, documents, part="00000-of-00001"):
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": documents}), folder / f"{split}-{part}.parquet")


def test_files_of_a_split_are_found_in_order(data_folder):
    folder = data_folder / "owner/set/config"
    for part in ("00001-of-00002", "00000-of-00002"):
        write_text(folder, "train", ["x"], part)
    write_text(folder, "test", ["x"])
    assert [path.name for path in parquet_files("owner/set", "config", "train")] == [
        "train-00000-of-00002.parquet",
        "train-00001-of-00002.parquet",
    ]


def test_documents_are_joined_over_all_files(data_folder):
    folder = data_folder / "owner/set"
    write_text(folder, "train", ["one", "two"], "00000-of-00002")
    write_text(folder, "train", ["three"], "00001-of-00002")
    assert decode(load_text("owner/set", "train")) == "one\n\ntwo\n\nthree"


@pytest.mark.parametrize(
    ("task", "repository"),
    [(ShakespeareGPT, "karpathy/tiny_shakespeare"), (EnglishGPT, "technical-english")],
)
def test_text_tasks_read_the_hubs_layout(data_folder, task, repository):
    texts = {"train": "abc " * 100, "validation": "def " * 100, "test": "ghi " * 100}
    for split, text in texts.items():
        write_text(data_folder / repository, split, [text])
    task = task(context=8)
    assert {split: decode(task.text(split)) for split in texts} == texts


@pytest.mark.parametrize("root", ["", "/nowhere"])
@pytest.mark.parametrize(
    "find", [lambda: parquet_files("owner/set", "c", "train"), lambda: model_file("owner/set")]
)
def test_missing_data_name_both_ways(data_folder, monkeypatch, find, root):
    monkeypatch.setenv("WEIGHTLAB_DATA", root)
    with pytest.raises(TaskError) as caught:
        find()
    text = str(caught.value)
    assert text.count("\n") == 1
    assert "Set WEIGHTLAB_DATA to a folder that contains owner/set/, or connect to huggingface.co" in text
    assert (f"WEIGHTLAB_DATA={root} does not contain it" if root else "WEIGHTLAB_DATA is not set") in text


def test_data_that_are_not_on_the_hub_do_not_send_there(data_folder):
    with pytest.raises(TaskError, match="the Hugging Face Hub does not have it") as caught:
        EnglishGPT().fingerprint()
    assert "connect" not in str(caught.value)


def test_a_local_repository_without_the_file_is_named(data_folder):
    (data_folder / "owner/set").mkdir(parents=True)
    with pytest.raises(TaskError, match=r"owner/set has no c/train-\*\.parquet"):
        parquet_files("owner/set", "c", "train")
    with pytest.raises(TaskError, match=r"owner/set has no model\.safetensors"):
        model_file("owner/set")


class FakeHub:
    """Stands for huggingface_hub: revision -> folder, or an error."""

    def __init__(self, snapshots):
        self.snapshots = snapshots
        self.calls = []

    def snapshot_download(self, repository, *, revision, **options):
        self.calls.append({"repository": repository, "revision": revision, **options})
        found = self.snapshots[revision]
        if isinstance(found, Exception):
            raise found
        return str(found)


def use_hub(monkeypatch, snapshots, online=True):
    fake = FakeHub(snapshots)
    monkeypatch.setattr(hub, "require", lambda module, extra: fake)
    monkeypatch.setattr(hub, "hub_answers", lambda extra: online)
    return fake


def test_the_hub_is_asked_for_the_splits_files_only(data_folder, tmp_path, monkeypatch):
    write_text(tmp_path / "snapshot/config", "train", ["x"])
    fake = use_hub(monkeypatch, {None: tmp_path / "snapshot"})
    (file,) = parquet_files("owner/set", "config", "train")
    assert file.parent == tmp_path / "snapshot/config"
    (call,) = fake.calls
    assert call["allow_patterns"] == ["config/train-*.parquet"]
    assert call["repo_type"] == "dataset"
    assert call["local_files_only"] is False


def test_a_repository_with_a_script_is_read_from_its_converted_branch(data_folder, tmp_path, monkeypatch):
    (tmp_path / "main").mkdir()
    write_text(tmp_path / "converted/default/train", "0000", ["x"], "of")
    use_hub(monkeypatch, {None: tmp_path / "main", "refs/convert/parquet": tmp_path / "converted"})
    assert [path.parent.name for path in parquet_files("owner/set", "", "train")] == ["train"]


def test_offline_the_hubs_cache_is_read(data_folder, tmp_path, monkeypatch):
    write_text(tmp_path / "snapshot/config", "train", ["x"])
    fake = use_hub(monkeypatch, {None: tmp_path / "snapshot"}, online=False)
    assert parquet_files("owner/set", "config", "train")
    assert fake.calls[0]["local_files_only"] is True


def test_what_the_hub_answers_is_passed_on(data_folder, monkeypatch):
    error = RuntimeError("404 no such set\nRequest ID 5")
    use_hub(monkeypatch, {None: error, "refs/convert/parquet": error})
    with pytest.raises(TaskError, match="the Hub answered RuntimeError: 404 no such set") as caught:
        parquet_files("owner/set", "config", "train")
    assert "Request ID" not in str(caught.value)


def test_hf_hub_offline_is_obeyed_without_a_look_at_the_network(monkeypatch):
    import huggingface_hub

    hub_answers.cache_clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: pytest.fail("asked the network"))
    assert not hub_answers("trial")
    hub_answers.cache_clear()


def test_a_dead_network_is_noticed_by_one_short_question(monkeypatch):
    import huggingface_hub

    questions = []

    class Session:
        def head(self, url, timeout):
            questions.append(timeout)
            raise OSError("no route")

    hub_answers.cache_clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    assert not hub_answers("trial")
    assert not hub_answers("trial")
    assert questions == [PROBE_SECONDS]
    hub_answers.cache_clear()
