"""Runs on a Ray cluster, or on a small one started on this machine."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from weightlab._lazy import require
from weightlab.exceptions import TrialError
from weightlab.trial.engines.base import Engine
from weightlab.trial.engines.outcome import (
    EXECUTE,
    Watched,
    job_from_dict,
    job_to_dict,
    pack,
    perform,
    resolve,
    thread_environment,
    unpack,
)
from weightlab.trial.spec import Job, Progress, RunResult

_LOOK_SECONDS = 0.1


class RayEngine(Engine):
    """Carries out runs as Ray tasks; results come back here, so only this process needs the store.

    Every run reserves its number of CPU threads, and a GPU if it is to run on one. A run that
    exceeds its time limit is cancelled by force; a worker that dies makes its run an `"error"`.

    Args:
        workers: Runs in flight at once.
        on_progress: Called, from `wait`, with signs of life.
        address: Cluster to join, as for `ray.init`; `None` starts one on this machine.
        execute: `"module:function"` that carries out a run.

    Raises:
        MissingDependencyError: When Ray is not installed.
    """

    def __init__(
        self,
        workers: int,
        on_progress: Callable[[Progress], None] | None = None,
        *,
        address: str | None = None,
        execute: str = EXECUTE,
    ) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        # Ray prints the obituaries of its workers on standard output, where `--json` puts its object.
        os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
        self._ray = require("ray", "ray")
        super().__init__(on_progress)
        self.capacity = workers
        self._address = address
        self._execute = execute
        self._runs: dict[Any, tuple[str, Watched]] = {}
        self._mailbox: Any = None
        self._owns_cluster = False

    @property
    def running(self) -> int:
        """Runs submitted and not handed back yet."""
        return len(self._runs)

    def submit(self, job: Job) -> None:
        """Queue a run on the cluster, which is joined or started with the first one."""
        if self._mailbox is None:
            self._join(job.spec.threads)
        on_gpu = job.device.startswith("cuda")
        name = uuid.uuid4().hex
        task = self._ray.remote(_carry_out).options(
            num_cpus=job.spec.threads, num_gpus=1 if on_gpu else 0, max_retries=0
        )
        data = job_to_dict(job) | ({"device": "cuda"} if on_gpu else {})
        ref = task.remote(data, self._execute, self._mailbox, name, sys.path, os.getcwd())
        self._runs[ref] = (name, Watched(job))

    def wait(self, timeout: float) -> list[RunResult]:
        """Hand back runs that ended, waiting up to `timeout` seconds for the first.

        Raises:
            WeightlabError: What a task raised in a worker, with the same class and message.
            TrialError: When the cluster lost a machine or cannot be reached any more.
        """
        until = time.monotonic() + timeout
        results: list[RunResult] = []
        while self._runs and not results:
            seconds = min(_LOOK_SECONDS, max(0.0, until - time.monotonic()))
            done, _ = self._ray.wait(list(self._runs), num_returns=1, timeout=seconds)
            self._read_mail()
            results += [self._result(ref) for ref in done]
            results += self._end_overdue()
            if time.monotonic() >= until:
                break
        return results

    def close(self) -> None:
        """Cancel whatever is in flight and leave the cluster; stop it if it was started here."""
        if self._mailbox is None:
            return
        runs, self._runs = self._runs, {}
        mailbox, self._mailbox = self._mailbox, None
        with suppress(Exception):  # a cluster that is gone has nothing to cancel
            for ref in runs:
                self._ray.cancel(ref, force=True)
            self._ray.kill(mailbox)
        if self._owns_cluster:
            self._ray.shutdown()

    def _join(self, threads: int) -> None:
        ray = self._ray
        self._owns_cluster = not ray.is_initialized()
        options: dict[str, Any] = {"address": self._address}
        if self._address is None and self._owns_cluster:
            cpus = max(os.cpu_count() or 1, self.capacity * threads)
            options = {"num_cpus": cpus, "include_dashboard": False}
        in_main = threading.current_thread() is threading.main_thread()
        on_terminate = signal.getsignal(signal.SIGTERM)
        before = {name: os.environ.get(name) for name in thread_environment(threads)}
        os.environ.update(thread_environment(threads))  # inherited by the workers of a cluster started here
        try:
            ray.init(ignore_reinit_error=True, logging_level=logging.ERROR, log_to_driver=False, **options)
        except ConnectionError as error:
            raise TrialError(
                f"no Ray cluster at {self._address!r}; start one with: ray start --head"
            ) from error
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
            if in_main:  # Ray puts its own handler there
                signal.signal(signal.SIGTERM, on_terminate)
        self._mailbox = ray.remote(_Mailbox).options(num_cpus=0).remote()

    def _read_mail(self) -> None:
        try:
            mail: dict[str, list[dict[str, Any] | None]] = self._ray.get(self._mailbox.collect.remote())
        except self._ray.exceptions.RayError as error:
            raise self._lost(error) from error
        for name, watched in self._runs.values():
            for letter in mail.get(name, ()):
                if letter is None:
                    watched.start()
                else:
                    progress = Progress(**letter)
                    watched.note(progress)
                    self.on_progress(progress)

    def _result(self, ref: Any) -> RunResult:
        _, watched = self._runs.pop(ref)
        known = self._ray.exceptions
        try:
            outcome = self._ray.get(ref)
        except (known.WorkerCrashedError, known.OutOfMemoryError) as error:
            return watched.failed("error", f"its worker process died ({type(error).__name__})")
        except known.RayError as error:
            raise self._lost(error) from error
        return unpack(outcome)

    def _end_overdue(self) -> list[RunResult]:
        results = []
        for ref, (_, watched) in list(self._runs.items()):
            if watched.overdue:
                del self._runs[ref]
                self._ray.cancel(ref, force=True)
                results.append(watched.timed_out())
        return results

    def _lost(self, error: Exception) -> TrialError:
        first = (str(error).strip().splitlines() or [""])[0]
        return TrialError(
            f"the Ray cluster failed ({type(error).__name__}: {first}); what was finished is kept: "
            "the same command continues"
        )


class _Mailbox:
    """An actor that keeps signs of life until the engine collects them; `None` says that a run began."""

    def __init__(self) -> None:
        self._mail: dict[str, list[dict[str, Any] | None]] = {}

    def post(self, name: str, letter: dict[str, Any] | None) -> None:
        """Keep a letter of the run called `name`."""
        self._mail.setdefault(name, []).append(letter)

    def collect(self) -> dict[str, list[dict[str, Any] | None]]:
        """Hand over all letters."""
        mail, self._mail = self._mail, {}
        return mail


def _carry_out(
    data: dict[str, Any], execute: str, mailbox: Any, name: str, path: list[str], folder: str
) -> dict[str, Any]:
    """Carry out a run in a Ray worker that sees the files which the trial's process sees, where they exist."""
    sys.path.extend(entry for entry in path if entry not in sys.path)
    with suppress(OSError):
        os.chdir(folder)
    job = job_from_dict(data)
    function = resolve(execute)
    arrive = require("ray", "ray").wait
    posted = [mailbox.post.remote(name, None)]
    known: list[Any] = []

    def report(progress: Progress) -> None:
        posted[:] = [mailbox.post.remote(name, asdict(progress))]
        facts = [progress.untrained, progress.weights_hash]
        if facts != known:  # they must have arrived should the run now take this process down
            arrive(posted)
            known[:] = facts

    outcome = pack(lambda: perform(function, job, report))
    arrive(posted)  # letters arrive in order, so none comes after the result
    return outcome
