import pytest

from weightlab import tasks
from weightlab.exceptions import UsageError

TASK = """
from weightlab.tasks import DigitsMLP
class Mine(DigitsMLP):
    name = "mine"
"""


def test_every_name_builds_a_task_of_that_name_without_reading_data(monkeypatch):
    monkeypatch.setenv("WEIGHTLAB_DATA", "/nowhere")
    assert len(tasks.names()) == 10
    for name in tasks.names():
        task = tasks.get(name)
        assert task.name == name
        assert task.description
        assert task.minimal_effect > 0


def test_options_reach_the_task():
    task = tasks.get("docs-gpt", steps=9, width=16)
    assert task.steps == 9
    assert isinstance(task, tasks.DocsGPT)
    assert task.config.width == 16
    with pytest.raises(UsageError, match=r"docs-gpt.*'wdith'"):
        tasks.get("docs-gpt", wdith=16)
    with pytest.raises(UsageError, match=r"docs-gpt: steps must be .*, not 0"):
        tasks.get("docs-gpt", steps=0)


def test_unknown_names_suggest_the_nearest_and_list_all():
    with pytest.raises(UsageError) as caught:
        tasks.load("doc-gpt")
    assert "did you mean docs-gpt?" in str(caught.value)
    assert all(name in str(caught.value) for name in tasks.names())
    with pytest.raises(UsageError, match="unknown task 'zzz'; Known"):
        tasks.get("zzz")


def test_files_are_loaded_once_until_they_change(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(TASK)
    ref = f"{path}:Mine"
    first = tasks.load(ref)
    assert first.name == "mine"
    assert tasks.load(ref) is first
    assert tasks.get(ref, steps=3).steps == 3
    path.write_text(TASK + "    steps_by_hand = 1\n")
    assert tasks.load(ref) is not first


def test_relative_files_of_two_folders_are_two_tasks(tmp_path, monkeypatch):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(TASK + "task = Mine()\n")
    found = []
    for folder in ("a", "b"):
        monkeypatch.chdir(tmp_path / folder)
        found.append(tasks.load("mine.py:task"))
    assert found[0] is not found[1]
