"""What a trial survives, through the command line: kills, full disks, bad files, bad arms, bad words."""

import importlib.util
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from weightlab.trial.store import Store

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

TASK = """
import time

import torch
from torch import nn

from weightlab.tasks.base import Task


class Line(Task):
    name, metric, mode, batch_size, steps, minimal_effect = "line", "error", "min", 8, 12, 1e-3
    pause = 0.0

    def __init__(self):
        generator = torch.Generator().manual_seed(7)
        self.x = torch.randn(96, 4, generator=generator)
        self.y = self.x @ torch.tensor([1.0, -2.0, 3.0, 0.5]) + 0.1 * torch.randn(96, generator=generator)
        self.rows = {"train": slice(0, 64), "validation": slice(64, 80), "test": slice(80, 96)}

    def build(self, generator):
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

    def batches(self, split, generator):
        x, y = self.x[self.rows[split]], self.y[self.rows[split]]
        for rows in torch.randperm(len(x), generator=generator).split(8):
            yield x[rows], y[rows]

    def loss(self, model, batch):
        time.sleep(self.pause)
        return (model(batch[0]).squeeze(1) - batch[1]).square().mean()

    def evaluate(self, model, split):
        x, y = self.x[self.rows[split]], self.y[self.rows[split]]
        return {"error": (model(x).squeeze(1) - y).square().mean().item()}


class Slow(Line):
    pause = 0.003


class Vector(Line):
    def loss(self, model, batch):
        return (model(batch[0]).squeeze(1) - batch[1]).square()


class Faceless:
    name, mode, batch_size = "faceless", "min", 8


task, slow, vector, faceless = Line(), Slow(), Vector(), Faceless()
"""

ARMS = """
import time

import torch
from optuna.distributions import FloatDistribution

from weightlab.trial import Arm


def make(name, optimizer, **changes):
    return Arm(
        name=name,
        optimizer=optimizer,
        search_space={"lr": FloatDistribution(1e-3, 1e-1, log=True)},
        defaults={"lr": 1e-2},
        **changes,
    )


def sgd(model, h):
    return torch.optim.SGD(model.parameters(), lr=h["lr"])


def broken(model, h):
    raise ValueError("this arm is broken\\nbeyond repair")


def hang(*, model, step, steps):
    try:
        time.sleep(60)
    except Exception:
        pass


arm = make("plain", sgd)
momentum = make("momentum", lambda model, h: torch.optim.SGD(model.parameters(), lr=h["lr"], momentum=0.9))
raises = make("raises", broken)
nan = make("nan", sgd, penalty=lambda model, h: float("nan") * sum(p.sum() for p in model.parameters()))
hangs = make("hangs", sgd, callbacks=lambda model, optimizers, h: [hang])
"""


WATCHED = "s.sqlite-wal"
"""Every claim of a run and every result is written here first."""


class Outcome:
    def __init__(self, reply: dict[str, Any]) -> None:
        self.code: int = reply["code"]
        self.stdout: str = reply["stdout"]
        self.stderr: str = reply["stderr"]

    @property
    def report(self) -> dict[str, Any]:
        assert self.code == 0, self.stderr
        return json.loads(self.stdout)

    def says(self, *words: str, code: int) -> None:
        """Check that it failed with one or two lines on standard error that hold all the words."""
        assert self.code == code, (self.code, self.stderr)
        assert 1 <= len(self.stderr.strip().splitlines()) <= 2, self.stderr
        assert "Traceback" not in self.stdout + self.stderr
        assert "unexpected" not in self.stderr
        for word in words:
            assert word in self.stderr


class Shell:
    """The command line in `folder`, where `my.py` holds tasks and `arms.py` holds arms."""

    def __init__(self, server: subprocess.Popen[str], folder: Path) -> None:
        self.server, self.folder = server, folder
        (folder / "my.py").write_text(TASK)
        (folder / "arms.py").write_text(ARMS)

    def together(self, *commands: dict[str, Any]) -> list[Outcome]:
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(
            json.dumps([{"folder": str(self.folder), **command} for command in commands]) + "\n"
        )
        self.server.stdin.flush()
        return [Outcome(reply) for reply in json.loads(self.server.stdout.readline())]

    def __call__(self, *arguments: str, **extra: Any) -> Outcome:
        return self.together({"arguments": arguments, **extra})[0]

    def trial(self, *arguments: str, **extra: Any) -> Outcome:
        return self(*trial(*arguments), **extra)


def trial(*arguments: str) -> list[str]:
    defaults = {
        "--task": "my.py:task",
        "--arms": "adamw,arms.py:arm",
        "--tune": "2",
        "--seeds": "3",
        "--store": "s.sqlite",
        "--out": "out",
    }
    given = dict(zip(arguments[::2], arguments[1::2], strict=True))
    pairs = [item for pair in (defaults | given).items() for item in pair]
    return ["trial", *pairs, "--json"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[str]]:
    # One thread and no GPU: a process that has started other threads cannot be forked.
    alone = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, Path(__file__).with_name("fork_server.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **alone, "CUDA_VISIBLE_DEVICES": ""},
    ) as running:
        assert running.stdin is not None
        assert running.stdout is not None
        shell = Shell(running, tmp_path_factory.mktemp("warm"))
        running.stdin.write(json.dumps([{"folder": str(shell.folder), "arguments": trial()}]) + "\n")
        running.stdin.flush()
        assert running.stdout.readline() == "0\n"
        yield running
        running.stdin.close()


@pytest.fixture
def shell(server: subprocess.Popen[str], tmp_path: Path) -> Shell:
    return Shell(server, tmp_path)


def table(report: dict[str, Any]) -> list[Any]:
    """What a trial found, without the clock's part in it."""
    timed = {"time_matched", "time_to_target", "speedup"}
    rows: list[Any] = [report["task"], report["baseline"], report["budget"], report["paired"]]
    for arm in report["arms"]:
        versus = arm["versus"] and {name: value for name, value in arm["versus"].items() if name not in timed}
        rows.append([arm["name"], arm["hyperparameters"], arm["metric"], arm["tuning"], versus])
    return rows


def rows(store: Path) -> dict[str, dict[str, Any]]:
    """Runs in a store by key, read without the product's help; checks that none is there twice."""
    with closing(sqlite3.connect(store)) as raw:
        found = raw.execute("SELECT key, result FROM runs").fetchall()
    counts = Counter(key for key, _ in found)
    assert set(counts.values()) <= {1}, "a run was done twice"
    return {key: json.loads(text) for key, text in found}


def outcome_bits(run: dict[str, Any]) -> list[Any]:
    points = [[point["step"], point["train_loss"], point["metric"]] for point in run["curve"]]
    return [run["status"], run["metrics"], run["untrained"], points, run["weights_hash"], run["data_hash"]]


def test_twenty_kills_at_random_moments_change_nothing(shell):
    big = ("--task", "my.py:slow", "--arms", "adamw,arms.py:arm,arms.py:momentum", "--tune", "4")
    big = (*big, "--seeds", "12")
    reference = shell.trial(*big, "--store", "whole.sqlite")
    rng = random.Random(20)
    killed = []
    for attempt in range(20):
        # Half of them while it starts up and reads the store; half amid training and writing.
        moment: dict[str, Any] = {"after": rng.uniform(0, 0.15)}
        if attempt % 2:
            moment = {"watch": WATCHED, "changes": rng.randint(1, 4), "after": rng.uniform(0, 0.04)}
        killed.append(shell.trial(*big, signal=signal.SIGKILL, **moment).code)
    assert killed == [-signal.SIGKILL] * 20
    with Store(shell.folder / "s.sqlite") as store:
        before = {result.key: result.to_dict() for result in store.results()}
    assert before
    last = shell.trial(*big)
    whole, pieces = rows(shell.folder / "whole.sqlite"), rows(shell.folder / "s.sqlite")
    assert pieces.keys() == whole.keys()
    assert len(pieces) == 3 * (4 + 12) > len(before)
    for key, run in whole.items():
        assert outcome_bits(pieces[key]) == outcome_bits(run)
    for key, run in before.items():
        assert pieces[key]["created_at"] == run["created_at"]
    assert table(last.report) == table(reference.report)
    assert table(shell.trial(*big).report) == table(reference.report), "and once more out of the store alone"
    assert len(rows(shell.folder / "s.sqlite")) == len(pieces)


def test_two_processes_share_one_store(shell):
    arguments = trial("--task", "my.py:slow", "--seeds", "6")
    reference = shell.trial("--task", "my.py:slow", "--seeds", "6", "--store", "alone.sqlite")
    one, two = shell.together({"arguments": arguments}, {"arguments": [*arguments, "--out", "other"]})
    assert table(one.report) == table(two.report) == table(reference.report)
    both, alone = rows(shell.folder / "s.sqlite"), rows(shell.folder / "alone.sqlite")
    assert both.keys() == alone.keys()
    for key, run in alone.items():
        assert outcome_bits(both[key]) == outcome_bits(run)


def test_ctrl_c_keeps_everything_and_the_same_command_continues(shell):
    slow = ("--task", "my.py:slow", "--seeds", "12")
    stopped = shell.trial(*slow, signal=signal.SIGINT, after=0.01, watch=WATCHED, changes=5)
    stopped.says("same command continues", code=130)
    kept = rows(shell.folder / "s.sqlite")
    done = shell.trial(*slow)
    assert len(done.report["arms"][0]["metric"]["per_seed"]) == 12
    finished = rows(shell.folder / "s.sqlite")
    assert len(finished) == 2 * (2 + 12)
    assert kept.items() <= finished.items()


@pytest.mark.parametrize("engine", ["process", "ray"])
def test_engines_store_the_same_bits(shell, engine):
    if engine == "ray" and importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed")
    here = shell.trial("--store", "local.sqlite")
    there = shell.trial("--engine", engine, "--workers", "2")
    assert table(there.report) == table(here.report)
    local, remote = rows(shell.folder / "local.sqlite"), rows(shell.folder / "s.sqlite")
    assert remote.keys() == local.keys()
    for key, run in local.items():
        assert outcome_bits(remote[key]) == outcome_bits(run)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4096])


def _make_foreign(path: Path) -> None:
    path.unlink()
    with closing(sqlite3.connect(path)) as raw:
        raw.execute("CREATE TABLE runs (key TEXT, result TEXT)")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_truncate, "damaged or cut short"),
        (_make_foreign, "another program"),
        (lambda path: path.write_text("my,thesis,data\n" * 99), "not a weightlab store"),
        (lambda path: path.chmod(0o444), "read-only"),
    ],
    ids=["truncated", "foreign", "text", "read-only"],
)
def test_a_store_that_cannot_be_used_is_left_as_it_is(shell, spoil, message):
    store = shell.folder / "s.sqlite"
    assert shell.trial().code == 0
    spoil(store)
    before = store.read_bytes(), store.stat().st_mode
    shell.trial().says("s.sqlite", message, code=1)
    assert (store.read_bytes(), store.stat().st_mode) == before
    assert [path.name for path in shell.folder.glob("s.sqlite*")] == ["s.sqlite"]


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounting needs root on Linux")
def test_a_full_disk_stops_the_trial_and_space_continues_it(shell):
    disk = shell.folder / "disk"
    disk.mkdir()
    size = ["-o", "size=176k", "none", str(disk)]
    if subprocess.run(["mount", "-t", "tmpfs", *size], capture_output=True).returncode:
        pytest.skip("mount is not permitted here")
    try:
        arguments = ("--store", "disk/s.sqlite", "--seeds", "25")
        shell.trial(*arguments).says("disk/s.sqlite", "full", code=1)
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        kept = rows(disk / "s.sqlite")
        assert kept
        assert shell.trial(*arguments).code == 0
        finished = rows(disk / "s.sqlite")
        assert len(finished) == 2 * (2 + 25)
        assert kept.items() <= finished.items()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_an_arm_that_raises_fails_with_its_error(shell):
    shell.trial("--arms", "adamw,arms.py:raises").says("raises", "ValueError: this arm is broken", code=1)
    runs = rows(shell.folder / "s.sqlite").values()
    assert {run["status"] for run in runs if run["spec"]["arm"] == "raises"} == {"error"}
    assert {run["status"] for run in runs if run["spec"]["arm"] == "adamw"} == {"ok"}
    shell.trial("--arms", "arms.py:raises,adamw").says("baseline 'raises'", "this arm is broken", code=1)


def test_an_arm_that_returns_nan_scores_as_the_untrained_model(shell):
    report = shell.trial("--arms", "adamw,arms.py:nan").report
    adamw, nan = report["arms"]
    untrained = {
        run["spec"]["seed"]: run["untrained"]
        for run in rows(shell.folder / "s.sqlite").values()
        if run["spec"]["split"] == "test"
    }
    assert nan["failures"] == 3
    assert nan["metric"]["per_seed"] == [untrained[seed] for seed in range(3)]
    assert nan["versus"]["verdict"] != "held"
    assert adamw["failures"] == 0


def test_an_arm_that_hangs_is_stopped_at_the_time_limit(shell):
    options = ("--arms", "adamw,arms.py:hangs", "--tune", "1", "--seeds", "2", "--timeout", "0.5")
    shell.trial(*options).says("hangs", "time limit of 0.5 s", code=1)
    runs = rows(shell.folder / "s.sqlite").values()
    stopped = [run for run in runs if run["spec"]["arm"] == "hangs"]
    assert {run["status"] for run in stopped} == {"timeout"}
    assert all(run["untrained"] is not None and run["weights_hash"] for run in stopped)
    good = [run for run in runs if run["spec"]["arm"] == "adamw"]
    assert [run["status"] for run in good] == ["ok"] * 3


@pytest.mark.parametrize(
    ("arguments", "words", "code"),
    [
        (["--task", "broken.py:task"], ["broken.py:2", "syntax error"], 2),
        (["--task", "nowhere.py:task"], ["nowhere.py"], 2),
        (["--task", "my.py:tusk"], ["'tusk'", "did you mean 'task'"], 2),
        (["--task", "my.py:faceless"], ["faceless", "metric"], None),
        (["--task", "my.py:vector"], ["loss() must return a scalar", "(8,)"], 1),
        (["--task", "digits-mpl"], ["digits-mpl", "digits-mlp"], 2),
        (["--arms", "adamw,sdg"], ["sdg", "'sgd'"], 2),
        (["--baseline", "adam"], ["adam", "'adamw'"], 2),
        (["--arms", "adamw,arms.py:rises"], ["'rises'", "'raises'"], 2),
        (["--arms", "adamw,my.py:task"], ["my.py:task", "Arm"], 2),
        (["--seeds", "0"], ["seeds must be at least 1; got 0"], 2),
        (["--steps", "-5"], ["steps must be at least 1; got -5"], 2),
        (["--tune", "-1"], ["tune must be at least 0; got -1"], 2),
        (["--timeout", "0"], ["timeout must be positive; got 0"], 2),
        (["--device", "tpu9"], ["tpu9"], 2),
        (["--engine", "process", "--workers", "0"], ["workers must be at least 1; got 0"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_requests_get_a_line_and_write_nothing(shell, arguments, words, code):
    (shell.folder / "broken.py").write_text("x = 1\ntask = (\n")
    outcome = shell.trial(*arguments)
    outcome.says(*words, code=outcome.code if code is None else code)
    assert outcome.code in (1, 2)
    assert outcome.stdout == ""
    assert not (shell.folder / "out").exists()


def test_an_option_that_does_not_exist_is_a_usage_error(shell):
    outcome = shell("trial", "--task", "my.py:task", "--arms", "adamw", "--sedes", "3")
    assert outcome.code == 2
    assert "--seeds" in outcome.stderr
    assert "Traceback" not in outcome.stderr


def test_debug_shows_where(shell):
    outcome = shell("trial", "--task", "my.py:vector", "--arms", "adamw", "--debug")
    assert "Traceback" in outcome.stderr
    assert "TaskError" in outcome.stderr
