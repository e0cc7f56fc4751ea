"""What the repository says of itself is true: commands, options, links, snippets, versions, laziness."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import typer

import weightlab
from weightlab.cli import app
from weightlab.papers import all_papers
from weightlab.trial import run_trial

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("adapters", "inspect", "linalg", "merge", "nn", "optim", "papers", "tasks", "train", "trial")
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def fences(page: Path, language: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    blocks = [(found[1], found[3]) for found in FENCE.finditer(text) if found[2] == language]
    return ["\n".join(line.removeprefix(indent) for line in block.splitlines()) for indent, block in blocks]


def shell_lines(page: Path) -> Iterator[str]:
    """Commands of a page: lines of its shell blocks and its inline code."""
    for block in (*fences(page, "sh"), *fences(page, "bash"), *fences(page, "console")):
        yield from (line.strip().removeprefix("$ ") for line in block.replace("\\\n", " ").splitlines())
    yield from re.findall(r"`([^`\n]+)`", FENCE.sub("", page.read_text(encoding="utf-8")))


def words(line: str) -> list[str]:
    """Words of a command up to a comment, a pipe or another command."""
    try:
        found = shlex.split(re.split(r"\s#\s|\s#$| \| | && |;", line)[0])
    except ValueError:
        return []
    while found and re.fullmatch(r"[A-Z_]+=.*", found[0]):
        found.pop(0)
    return found


def makefile_targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


def unknown_words(command: list[str]) -> list[str]:
    """Words of a `weightlab ...` command that name no command and no option."""
    level, wrong = typer.main.get_command(app), []
    options = {"--help", "-h"}
    for word in command:
        children = getattr(level, "commands", {})
        if word.startswith("-"):
            known = options | {name for parameter in level.params for name in parameter.opts}
            if word.partition("=")[0] not in known:
                wrong.append(word)
        elif word in children:
            level = children[word]
        elif children and not level.params:
            wrong.append(word)
    return wrong


@cache
def paper_pages() -> frozenset[str]:
    """Pages that the documentation's hook generates."""
    return frozenset({"index.md", *(f"{entry.paper.slug}.md" for entry in all_papers())})


def test_first_screen_of_the_readme_has_both_commands():
    first = "\n".join((ROOT / "README.md").read_text().splitlines()[:40])
    assert re.search(r"^make demo\b", first, re.MULTILINE)
    assert re.search(r"^make test\b", first, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_make_targets_on_a_page_exist(page: Path):
    named = {
        word
        for command in map(words, shell_lines(page))
        if command[:1] == ["make"]
        for word in command[1:]
        if word.isalpha()
    }
    assert named <= makefile_targets()


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_commands_and_options_on_a_page_exist(page: Path):
    for line in shell_lines(page):
        command = words(line)
        if command and Path(command[0]).name == "weightlab":
            assert unknown_words(command[1:]) == [], line


def test_a_wrong_option_would_be_noticed():
    assert unknown_words(["trial", "--taks", "docs-gpt"]) == ["--taks"]
    assert unknown_words(["trail", "--task", "docs-gpt"]) == ["trail", "--task", "docs-gpt"]
    assert unknown_words(["papers", "show", "auon", "--json"]) == []


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_relative_links_lead_somewhere(page: Path):
    text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text(encoding="utf-8")))
    links = re.findall(r"\]\(([^)\s]+)[^)]*\)", text) + re.findall(r"^\[[^\]]+\]: (\S+)", text, re.MULTILINE)
    for link in links:
        target, _, _ = link.partition("#")
        if not target or re.match(r"[a-z]+:", target):
            continue
        path = (page.parent / target).resolve()
        if path.parent == ROOT / "docs" / "papers":
            assert path.name in paper_pages(), link
        else:
            assert path.exists(), link


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_scripts_named_on_a_page_exist(page: Path):
    named = set(re.findall(r"\b(?:benchmarks|examples)/\w+\.py\b", page.read_text(encoding="utf-8")))
    assert {name for name in named if not (ROOT / name).is_file()} == set()


def test_every_benchmark_is_on_the_benchmarks_page():
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    assert {
        path.name for path in ROOT.glob("benchmarks/*.py") if f"`benchmarks/{path.name}`" not in page
    } == set()


def test_python_on_the_pages_compiles():
    for page in PAGES:
        for block in fences(page, "python"):
            compile(block, relative(page), "exec")


@pytest.mark.parametrize("name", ["README.md", "docs/getting-started.md"])
def test_python_on_first_pages_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for block in fences(ROOT / name, "python"):
        exec(compile(block, name, "exec"), {"__name__": "page"})


def test_the_readmes_own_task_can_be_put_on_trial(tmp_path: Path):
    block = next(block for block in fences(ROOT / "README.md", "python") if "# my_task.py" in block)
    file = tmp_path / "my_task.py"
    file.write_text(block)
    report = run_trial(f"{file}:task", ["adamw", "muon"], steps=20, tune=0, seeds=2)
    assert report.paired
    assert all(arm.failures == 0 for arm in report.arms)


@pytest.mark.parametrize("room", ROOMS)
def test_public_names_of_a_room_resolve(room: str):
    module = importlib.import_module(f"weightlab.{room}")
    assert module.__all__
    assert dir(module) == sorted(module.__all__)
    for name in module.__all__:
        assert getattr(module, name) is not None


@pytest.mark.parametrize("room", ROOMS)
def test_public_names_of_a_room_are_on_its_api_page(room: str):
    page = (ROOT / "docs" / "api" / f"{room}.md").read_text()
    documented = set(re.findall(rf"^::: weightlab\.{room}\.(\w+)", page, re.MULTILINE))
    module = importlib.import_module(f"weightlab.{room}")
    public = {name for name in module.__all__ if not isinstance(getattr(module, name), ModuleType)}
    assert public - documented == set()


@pytest.mark.parametrize("name", ["README.md", "docs/index.md"])
def test_number_of_working_methods_is_true(name: str):
    told = re.findall(r"(\d+) of the (\d+) methods work", (ROOT / name).read_text())
    entries = all_papers()
    working = [entry for entry in entries if entry.status != "planned"]
    assert told == [(str(len(working)), str(len(entries)))]


def test_every_room_is_reachable_from_the_package():
    assert {*ROOMS, "exceptions"} == set(weightlab.__all__)


@pytest.mark.parametrize(
    "code",
    [
        "import weightlab",
        *(f"import weightlab.{room}" for room in ROOMS),
        "from weightlab.cli import run; run(['--help'])",
        "from weightlab.cli import run; run(['trial', '--help'])",
        "from weightlab.cli import run; run(['papers', '--json'])",
    ],
)
def test_torch_is_not_loaded_by(code: str):
    check = f"{code}\nimport sys\nsys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_versions_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == weightlab.__version__
    citation = (ROOT / "CITATION.cff").read_text()
    cited = re.search(r"^version: (\S+)$", citation, re.MULTILINE)
    assert cited is not None
    assert cited[1] == weightlab.__version__
    released = re.findall(
        r"^## (\d\S+) - (\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )
    assert released[0][0] == weightlab.__version__
    assert f'date-released: "{released[0][1]}"' in citation


def test_licence_is_the_one_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["license"] == "Apache-2.0"
    assert "Apache License\n" in (ROOT / "LICENSE").read_text()
    assert "license: Apache-2.0" in (ROOT / "CITATION.cff").read_text()


def test_no_build_paths_in_tracked_files():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    forbidden = re.compile(rb"(?<![\w.])/" + rb"(?:work|tmp/s|root|home/\w+)/")
    found = [
        name
        for name in listed.stdout.split("\0")
        if name and (ROOT / name).is_file() and forbidden.search((ROOT / name).read_bytes())
    ]
    assert found == []
