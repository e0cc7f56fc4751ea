"""Runs that engines are tested with, imported by name in worker processes."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time

from weightlab.exceptions import MissingDependencyError, TaskError
from weightlab.trial.spec import CurvePoint, Job, Progress, RunResult


class OwnTaskError(TaskError):
    """A user's subclass, which the parent cannot know."""


def execute(job: Job, on_progress=None) -> RunResult:
    """Do what the job's `arm_ref` says."""
    spec, action = job.spec, job.arm_ref
    report = on_progress or (lambda progress: None)
    report(Progress(spec.key, 0, spec.steps))
    report(Progress(spec.key, 0, spec.steps, untrained=4.5, weights_hash="w"))
    if action == "hang":
        while True:
            with contextlib.suppress(Exception):
                time.sleep(60)
    elif action == "hang in C":
        ctypes.CDLL(None).sleep(60)
    elif action == "hang bare":
        while True:
            try:
                time.sleep(60)
            except:  # noqa: E722
                if time.monotonic() > float(job.task_ref):
                    raise
    elif action == "hang with child":
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        print("noise on standard output", flush=True)
        time.sleep(60)
    elif action == "exit":
        os._exit(7)
    elif action == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
        time.sleep(60)
    elif action == "sys.exit":
        sys.exit("enough")
    elif action == "task error":
        raise TaskError("the loss is a vector\nof length 3")
    elif action == "own task error":
        raise OwnTaskError("mine")
    elif action == "missing":
        raise MissingDependencyError("install it")
    elif action == "bug":
        raise ValueError("never mind")
    elif action == "steps":
        for step in range(1, spec.steps + 1):
            time.sleep(0.001)
            report(Progress(spec.key, step, spec.steps, 1.0, 4.5, "w"))
    elif action == "noise":
        print("{not json}", flush=True)
        assert sys.stdin.read() == ""
    values = [spec.seed / 7 + i / 3 for i in range(3)]
    curve = tuple(CurvePoint(i, value, None, value**0.5) for i, value in enumerate(values))
    metrics = {
        "loss": sum(values) / 3,
        "infinite": float("inf"),
        "pid": float(os.getpid()),
        "threads": float(os.environ.get("OMP_NUM_THREADS", "0")),
    }
    return RunResult(spec, "ok", metrics, 4.5, curve, weights_hash="w", host=job.device)
