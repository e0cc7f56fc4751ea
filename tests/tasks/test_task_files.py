import subprocess
import sys

import pytest

from weightlab.exceptions import TaskError, UsageError
from weightlab.tasks import load_object, source_fingerprint
from weightlab.tasks.files import is_file_ref


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def message(ref):
    with pytest.raises(UsageError) as caught:
        load_object(ref)
    text = str(caught.value)
    assert text.count("\n") <= 1
    assert "Traceback" not in text
    return text


def test_loads_an_object_relative_to_the_working_directory(tmp_path, monkeypatch):
    write(tmp_path / "mine.py", "thing = [1, 2]")
    monkeypatch.chdir(tmp_path)
    assert load_object("mine.py:thing") == [1, 2]


def test_files_of_one_name_keep_their_own_modules(tmp_path):
    for folder in ("a", "b"):
        write(tmp_path / folder / "task.py", f"def where(): return {folder!r} + __name__")
    first, second = (load_object(f"{tmp_path}/{folder}/task.py:where") for folder in ("a", "b"))
    assert first()[0] == "a"
    assert second()[0] == "b"
    assert sys.modules[first.__module__] is not sys.modules[second.__module__]


def test_an_unchanged_file_runs_once_and_an_edited_one_again(tmp_path):
    path = write(tmp_path / "mine.py", "thing = object()")
    first = load_object(f"{path}:thing")
    assert load_object(f"{path}:thing") is first
    path.write_text("thing = 7")
    assert load_object(f"{path}:thing") == 7


def test_dataclasses_annotations_and_neighbours_work(tmp_path):
    write(tmp_path / "neighbour_of_mine.py", "value = 3")
    path = write(
        tmp_path / "mine.py",
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from neighbour_of_mine import value\n"
        "@dataclass\n"
        "class Point:\n"
        "    x: int = value\n",
    )
    assert load_object(f"{path}:Point")().x == 3


def test_the_loader_does_not_lend_its_future_imports(tmp_path):
    path = write(tmp_path / "mine.py", "def f(x: int): pass\nkind = f.__annotations__['x']")
    assert load_object(f"{path}:kind") is int


def test_loads_again_in_another_process(tmp_path):
    path = write(tmp_path / "mine.py", "thing = 42")
    code = f"from weightlab.tasks import load_object; print(load_object({str(path) + ':thing'!r}))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "42"


def test_missing_object_lists_what_there_is_and_the_nearest(tmp_path):
    path = write(tmp_path / "mine.py", "import math\ntask = 1\n_hidden = 2")
    text = message(f"{path}:tsak")
    assert "no object 'tsak'" in text
    assert "math, task" in text
    assert "did you mean 'task'?" in text
    assert "_hidden" not in text


def test_missing_file(tmp_path):
    assert "No such file" in message(f"{tmp_path}/nowhere.py:task")
    assert "directory" in message(f"{tmp_path}:task")


@pytest.mark.parametrize("ref", ["mine.py", "mine.py:", ":task", "mine.py:two words"])
def test_reference_without_object(ref):
    assert "path.py:object" in message(ref)


def test_syntax_error_names_file_and_line(tmp_path):
    path = write(tmp_path / "mine.py", "x = 1\ndef broken(:\n    pass\n")
    assert message(f"{path}:x").startswith(f"{path}:2: syntax error: ")


def test_null_bytes_and_wrong_encoding_are_named(tmp_path):
    path = tmp_path / "mine.py"
    for content in (b"x = 1\0", b"x = '\xff'"):
        path.write_bytes(content)
        assert message(f"{path}:x").startswith(str(path))


def test_error_while_executing_names_the_files_own_line(tmp_path):
    path = write(tmp_path / "mine.py", "import json\n\njson.loads('{')\n")
    text = message(f"{path}:x")
    assert text.startswith(f"{path}:3: JSONDecodeError: ")
    path.write_text("raise SystemExit(3)")
    assert message(f"{path}:x").startswith(f"{path}:1: SystemExit")


def test_a_failed_file_leaves_no_module(tmp_path):
    path = write(tmp_path / "failing_file.py", "1 / 0")
    message(f"{path}:x")
    assert not [name for name in sys.modules if "failing_file" in name]


def test_weightlabs_own_errors_and_interrupts_pass(tmp_path):
    path = write(
        tmp_path / "mine.py", "from weightlab.exceptions import TaskError\nraise TaskError('no data')"
    )
    with pytest.raises(TaskError, match=r"^no data$"):
        load_object(f"{path}:x")
    path.write_text("raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        load_object(f"{path}:x")


def test_source_fingerprint_follows_the_contents_alone(tmp_path):
    a, b = write(tmp_path / "a.py", "x = 1"), write(tmp_path / "b.py", "x = 1")
    assert source_fingerprint(f"{a}:x") == source_fingerprint(f"{b}:x")
    b.write_text("x = 2")
    assert source_fingerprint(f"{a}:x") != source_fingerprint(f"{b}:x")
    with pytest.raises(UsageError, match=r"nowhere\.py"):
        source_fingerprint(f"{tmp_path}/nowhere.py:x")


def test_names_are_told_from_files():
    assert all(map(is_file_ref, ["a.py:b", "a.py", "dir/a", "dir\\a.py:b"]))
    assert not any(map(is_file_ref, ["docs-gpt", "my_task", ""]))
