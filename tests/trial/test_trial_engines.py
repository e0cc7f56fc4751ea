"""Engines: the same results everywhere, and none lost to whatever a run does to its process."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from weightlab.exceptions import MissingDependencyError, TaskError, TrialError, UsageError
from weightlab.trial import engines
from weightlab.trial.engines.base import Engine
from weightlab.trial.engines.local import LocalEngine
from weightlab.trial.engines.process import ProcessEngine
from weightlab.trial.spec import Job, Progress, RunResult, RunSpec

HERE = Path(__file__).parent
FAKE = "engine_fakes:execute"
posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")


def job(action: str = "", seed: int = 0, **fields) -> Job:
    spec = RunSpec("t", "", action, "", {}, seed, "test", 100, 2, 8, fields.pop("threads", 1), "cpu", {})
    return Job(spec, fields.pop("task_ref", ""), action, **fields)


def drain(engine: Engine, seconds: float = 60.0) -> list[RunResult]:
    """Wait until nothing is running any more."""
    results, until = [], time.monotonic() + seconds
    while engine.running and time.monotonic() < until:
        results += engine.wait(0.5)
    assert not engine.running
    return results


def one(engine: Engine, work: Job) -> RunResult:
    engine.submit(work)
    (result,) = drain(engine)
    return result


@pytest.fixture(autouse=True)
def _fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HERE))


@pytest.fixture
def local() -> Iterator[Engine]:
    with LocalEngine(execute=FAKE) as engine:
        yield engine


@pytest.fixture
def process() -> Iterator[ProcessEngine]:
    with ProcessEngine(2, execute=FAKE) as engine:
        yield engine


@pytest.fixture(scope="module")
def ray() -> Iterator[Engine]:
    """One small cluster for all tests: starting it takes seconds."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed")
    from weightlab.trial.engines.ray import RayEngine

    sys.path.insert(0, str(HERE))
    with RayEngine(2, execute=FAKE) as engine:
        yield engine
    sys.path.remove(str(HERE))


@pytest.fixture(params=["local", "process", "ray"])
def engine(request: pytest.FixtureRequest) -> Engine:
    return request.getfixturevalue(request.param)


isolating = pytest.mark.parametrize("engine", ["process", "ray"], indirect=True)


def comparable(result: RunResult) -> tuple:
    return result.spec, result.status, result.metrics["loss"], result.metrics["infinite"], result.curve


def test_results_are_the_same_bits_on_every_engine(engine):
    jobs = [job("", seed) for seed in range(4)]
    results = {}
    waiting = list(jobs)
    while waiting or engine.running:
        while waiting and engine.running < engine.capacity:
            engine.submit(waiting.pop(0))
        assert 1 <= engine.running <= engine.capacity
        for result in engine.wait(30.0):
            results[result.key] = result
    with LocalEngine(execute=FAKE) as reference:
        expected = {work.spec.key: comparable(one(reference, work)) for work in jobs}
    assert {key: comparable(result) for key, result in results.items()} == expected
    assert engine.wait(1.0) == []


def test_progress_is_thinned_but_keeps_what_matters(engine):
    seen: list[Progress] = []
    engine.on_progress = seen.append
    assert one(engine, job("steps")).status == "ok"
    engine.on_progress = lambda progress: None
    assert seen[0] == Progress(seen[0].key, 0, 100)
    assert seen[1] == Progress(seen[0].key, 0, 100, untrained=4.5, weights_hash="w")
    assert seen[-1].step == 100
    steps = [progress.step for progress in seen]
    assert steps == sorted(steps)
    assert len(seen) < 50


@posix
def test_a_run_past_its_time_is_ended(engine):
    result = one(engine, job("hang", timeout=0.3))
    assert (result.status, result.timeout, result.untrained, result.weights_hash) == (
        "timeout",
        0.3,
        4.5,
        "w",
    )
    assert result.error == "stopped after its time limit of 0.3 s"
    assert result.total_seconds is not None
    assert result.total_seconds >= 0.3
    assert result.created_at
    assert result.host
    assert one(engine, job("", 1)).status == "ok", "the engine goes on"


@pytest.mark.parametrize(
    ("action", "kind", "message"),
    [
        ("task error", TaskError, "the loss is a vector\nof length 3"),
        ("own task error", TaskError, "mine"),
        ("missing", MissingDependencyError, "install it"),
    ],
)
def test_a_task_at_fault_raises_in_the_trial(engine, action, kind, message):
    engine.submit(job(action))
    with pytest.raises(kind) as caught:
        drain(engine)
    assert str(caught.value) == message
    assert engine.running == 0
    assert one(engine, job("", 1)).status == "ok"


@isolating
def test_a_defect_of_ours_is_not_blamed_on_an_arm(engine):
    engine.submit(job("bug"))
    with pytest.raises(RuntimeError, match=r"(?s)engine_fakes.*ValueError: never mind"):
        drain(engine)


def test_an_arm_that_exits_is_a_failed_run(engine):
    result = one(engine, job("sys.exit"))
    assert (result.status, result.error, result.untrained) == ("error", "SystemExit: enough", 4.5)


@isolating
@pytest.mark.parametrize("action", ["exit", "segfault"])
def test_a_worker_that_dies_is_a_failed_run(engine, action, capsys):
    result = one(engine, job(action))
    assert result.status == "error"
    assert (result.untrained, result.weights_hash) == (4.5, "w")
    assert result.error is not None
    if isinstance(engine, ProcessEngine):
        expected = {"exit": "exited with code 7", "segfault": "died of SIGSEGV"}[action]
        assert result.error == f"its worker process {expected}"
    assert one(engine, job("", 1)).status == "ok", "the worker is replaced"
    assert capsys.readouterr().out == "", "standard output is the trial's own"


@posix
def test_a_run_that_catches_everything_is_ended_all_the_same(local, monkeypatch):
    monkeypatch.setattr("weightlab.trial.engines.local._REPEAT_SECONDS", 0.05)
    result = one(local, job("hang bare", timeout=0.1, task_ref=str(time.monotonic() + 0.2)))
    assert result.status == "timeout"


@posix
def test_a_time_limit_leaves_no_timer_or_handler_behind(local):
    before = signal.getsignal(signal.SIGALRM)
    assert one(local, job("", timeout=5.0)).status == "ok"
    assert one(local, job("hang", timeout=0.05)).status == "timeout"
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGALRM) is before


def test_closing_a_local_engine_forgets_its_queue(local):
    local.submit(job())
    local.close()
    assert local.wait(1.0) == []


@posix
def test_a_hang_in_c_is_ended_by_killing_its_worker(process):
    assert one(process, job("hang in C", timeout=0.3)).status == "timeout"


def test_workers_live_long_and_are_apart(process):
    pids = [one(process, job("noise", seed)).metrics["pid"] for seed in range(3)]
    assert len(set(pids)) == 1
    assert pids[0] != os.getpid()


def test_threads_are_fixed_before_a_worker_starts(process):
    assert one(process, job("", threads=3)).metrics["threads"] == 3


def test_runs_on_cuda_are_spread_over_the_devices():
    with ProcessEngine(2, execute=FAKE, devices=("cuda:0", "cuda:1")) as engine:
        for seed in range(2):
            engine.submit(job("steps", seed, device="cuda"))
        assert {result.host for result in drain(engine)} == {"cuda:0", "cuda:1"}
        assert one(engine, job("", device="cuda:1")).host == "cuda:1"


def test_a_good_result_is_handed_over_before_another_runs_fault(process):
    for action in ("", "task error"):
        process.submit(job(action))
    time.sleep(1.5)
    results, faults = [], 0
    while process.running:
        try:
            results += process.wait(5.0)
        except TaskError:
            faults += 1
    assert ([result.status for result in results], faults) == (["ok"], 1)


def test_a_worker_that_cannot_start_is_nobodys_result(capfd):
    with ProcessEngine(1, execute="no_such_module:execute") as engine:
        engine.submit(job())
        with pytest.raises(TrialError, match="exited with code 1 before it could start"):
            drain(engine)
    assert "no_such_module" in capfd.readouterr().err


def descendants() -> set[int]:
    """Live processes whose environment carries this test run's mark."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                environment = (entry / "environ").read_bytes()
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if f"WEIGHTLAB_TEST_MARK={os.getpid()}".encode() in environment and state not in "ZX":
                found.add(int(entry.name))
    return found


def none_left() -> bool:
    until = time.monotonic() + 20
    while descendants() and time.monotonic() < until:
        time.sleep(0.02)
    return not descendants()


linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


@linux
def test_close_leaves_no_process(monkeypatch):
    monkeypatch.setenv("WEIGHTLAB_TEST_MARK", str(os.getpid()))
    engine = ProcessEngine(2, execute=FAKE)
    engine.submit(job("hang"))
    engine.submit(job("hang with child"))
    assert engine.wait(1.0) == []
    assert len(descendants()) >= 2
    engine.close()
    engine.close()
    assert engine.running == 0
    assert none_left()


PARENT = """
import sys, threading
sys.path.insert(0, sys.argv[1])
from weightlab.trial.engines.process import ProcessEngine
from weightlab.trial.spec import Job, RunSpec

def main():
    engine = ProcessEngine(2, lambda progress: print("progress", flush=True), execute="engine_fakes:execute")
    for seed, action in enumerate(("hang", sys.argv[2])):
        engine.submit(Job(RunSpec("t", "", action, "", {}, seed, "test", 9, 2, 8, 1, "cpu", {}), "", action))
    engine.wait(60)

if sys.argv[3] == "thread":
    thread = threading.Thread(target=main)
    thread.start()
    thread.join()
else:
    main()
"""


@linux
@pytest.mark.parametrize(("action", "where"), [("hang in C", "main"), ("hang", "thread")])
def test_a_killed_parent_leaves_no_orphan(action, where):
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(HERE), action, where],
        stdout=subprocess.PIPE,
        env={**os.environ, "WEIGHTLAB_TEST_MARK": str(os.getpid())},
    )
    assert parent.stdout is not None
    for _ in range(4):
        assert parent.stdout.readline() == b"progress\n"
    assert len(descendants()) == 3
    parent.kill()
    parent.communicate()
    assert none_left()


def test_create_makes_engines_by_name(monkeypatch):
    with engines.create("local", workers=4) as local, engines.create("process", workers=3) as process:
        assert (local.capacity, process.capacity) == (1, 3)
    with engines.create("process") as process:
        assert process.capacity >= 1
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    for device, capacity in (("cuda", 2), ("cuda:1", 1), ("mps", 1)):
        with engines.create("process", device=device) as process:
            assert process.capacity == capacity


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "proces"}, "unknown engine 'proces'; did you mean 'process'\\? .*local, process, ray"),
        ({"name": "slurm"}, "unknown engine 'slurm'; known engines"),
        ({"name": "process", "workers": 0}, "workers must be at least 1; got 0"),
        ({"name": "ray", "workers": -1}, "workers must be at least 1; got -1"),
        ({"name": "local", "address": "auto"}, "address"),
    ],
)
def test_create_refuses_what_makes_no_sense(arguments, message):
    with pytest.raises(UsageError, match=message):
        engines.create(**arguments)


def test_a_missing_ray_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependencyError, match=r"weightlab\[ray\]"):
        engines.create("ray")
