"""Runs in worker processes on this machine."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from weightlab.exceptions import TrialError
from weightlab.trial.engines.base import Engine
from weightlab.trial.engines.outcome import (
    EXECUTE,
    Watched,
    job_to_dict,
    thread_environment,
    unpack,
)
from weightlab.trial.engines.worker import DIE_WITH_PARENT
from weightlab.trial.spec import Job, Progress, RunResult

_LOOK_SECONDS = 0.2
Events = queue.SimpleQueue[tuple["_Worker", dict[str, Any] | None]]


class ProcessEngine(Engine):
    """Carries out runs in long-lived worker processes, each one run at a time.

    Workers are fresh interpreters, started when first needed, with their thread counts fixed from
    the start. A run that exceeds its time limit is killed with its worker; a worker that dies makes
    its run an `"error"`. Either is replaced. Workers end with this process, however it ends.

    Args:
        workers: Runs in flight at once.
        on_progress: Called, from `wait`, with signs of life.
        devices: Devices that workers take turns with for runs on `"cuda"`.
        execute: `"module:function"` that carries out a run.
    """

    def __init__(
        self,
        workers: int,
        on_progress: Callable[[Progress], None] | None = None,
        *,
        devices: Sequence[str] = (),
        execute: str = EXECUTE,
    ) -> None:
        super().__init__(on_progress)
        self.capacity = workers
        self._devices = devices
        self._execute = execute
        self._events: Events = queue.SimpleQueue()
        self._workers: dict[int, _Worker] = {}

    @property
    def running(self) -> int:
        """Runs submitted and not handed back yet."""
        return sum(worker.run is not None for worker in self._workers.values())

    def submit(self, job: Job) -> None:
        """Give a run to an idle worker, or to a new one."""
        slot = next((slot for slot, worker in self._workers.items() if worker.idle), None)
        if slot is None:
            slot = next(slot for slot in range(self.capacity) if slot not in self._workers)
            self._workers[slot] = _Worker(self._events, self._execute, job.spec.threads)
        if job.device == "cuda" and self._devices:
            job = replace(job, device=self._devices[slot % len(self._devices)])
        self._workers[slot].give(job)

    def wait(self, timeout: float) -> list[RunResult]:
        """Hand back runs that ended, waiting up to `timeout` seconds for the first.

        Raises:
            WeightlabError: What a task raised in a worker, with the same class and message.
            TrialError: When a worker cannot even start.
        """
        until = time.monotonic() + timeout
        while self.running:
            result = self._receive(min(until, *self._deadlines()) - time.monotonic())
            results = [result] if result else self._end_overdue() or self._bury_dead()
            if results or time.monotonic() >= until:
                return results
        return []

    def close(self) -> None:
        """Kill all workers and whatever they are doing."""
        workers, self._workers = self._workers, {}
        for worker in workers.values():
            worker.kill()
        for worker in workers.values():
            worker.free()

    def _deadlines(self) -> list[float]:
        runs = [worker.run for worker in self._workers.values() if worker.run is not None]
        return [time.monotonic() + _LOOK_SECONDS, *(run.deadline for run in runs if run.deadline is not None)]

    def _receive(self, seconds: float) -> RunResult | None:
        """Read what workers send, up to the first result, waiting up to `seconds` for the first message."""
        with suppress(queue.Empty):
            worker, message = self._events.get(timeout=max(0.0, seconds))
            while True:
                if message is not None and worker in self._workers.values():
                    result = self._read(worker, message)
                    if result is not None:
                        return result
                worker, message = self._events.get_nowait()
        return None

    def _read(self, worker: _Worker, message: dict[str, Any]) -> RunResult | None:
        run = worker.run
        if run is None:
            return None
        if "started" in message:
            run.start()
        elif "progress" in message:
            progress = Progress(**message["progress"])
            run.note(progress)
            self.on_progress(progress)
        else:
            worker.run = None
            return unpack(message)
        return None

    def _end_overdue(self) -> list[RunResult]:
        results = []
        for slot, worker in list(self._workers.items()):
            if worker.run is not None and worker.run.overdue:
                results.append(worker.run.timed_out())
                self._drop(slot)
        return results

    def _bury_dead(self) -> list[RunResult]:
        for slot, worker in list(self._workers.items()):
            if not worker.dead:
                continue
            worker.listener.join(1.0)
            if not self._events.empty():  # its result may be among them
                return []
            run = worker.run
            self._drop(slot)
            if run is None:
                continue
            if run.started is None:
                raise TrialError(
                    f"a worker process {worker.last_words} before it could start; "
                    "--engine local does without workers"
                )
            return [run.failed("error", f"its worker process {worker.last_words}")]
        return []

    def _drop(self, slot: int) -> None:
        worker = self._workers.pop(slot)
        worker.kill()
        worker.free()


class _Worker:
    """One worker process, and the thread that puts what it sends among the engine's events."""

    def __init__(self, events: Events, execute: str, threads: int) -> None:
        self.run: Watched | None = None
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        command = [sys.executable, "-P", "-m", "weightlab.trial.engines.worker", execute]
        # The kernel watches the thread that started the worker; only the main one lives as long as we do.
        if threading.current_thread() is threading.main_thread():
            command.append(DIE_WITH_PARENT)
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **thread_environment(threads), "PYTHONPATH": path},
            encoding="utf-8",
            start_new_session=True,
        )
        self.listener = threading.Thread(target=self._listen, args=(events,), daemon=True)
        self.listener.start()

    @property
    def dead(self) -> bool:
        """Whether the process has ended, or hung up."""
        return self.process.poll() is not None or not self.listener.is_alive()

    @property
    def idle(self) -> bool:
        """Whether it can be given a run."""
        return self.run is None and not self.dead

    @property
    def last_words(self) -> str:
        """How the process ended; call after `kill` of a dead one."""
        code = self.process.returncode
        if code >= 0:
            return f"exited with code {code}"
        with suppress(ValueError):
            return f"died of {signal.Signals(-code).name}"
        return f"died of signal {-code}"

    def give(self, job: Job) -> None:
        """Send it a run. If it has died meanwhile, `wait` finds out."""
        self.run = Watched(job)
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(job_to_dict(job)) + "\n")
            self.process.stdin.flush()

    def kill(self) -> None:
        """Kill it with everything it started."""
        if self.process.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                if not self.listener.is_alive():  # it hung up by itself: let it tell how it ended
                    self.process.wait(1.0)
        with suppress(ProcessLookupError, PermissionError):
            if hasattr(os, "killpg"):
                os.killpg(self.process.pid, signal.SIGKILL)
            else:
                self.process.kill()

    def free(self) -> None:
        """Reap it and close the pipes."""
        self.process.wait()
        self.listener.join(1.0)
        with suppress(BrokenPipeError):
            if self.process.stdin is not None:
                self.process.stdin.close()
        # A process that the run left behind may hold the other end open; then the pipe is left to it.
        if self.process.stdout is not None and not self.listener.is_alive():
            self.process.stdout.close()

    def _listen(self, events: Events) -> None:
        assert self.process.stdout is not None
        with suppress(ValueError):  # a line that a killed worker did not finish
            for line in self.process.stdout:
                events.put((self, json.loads(line)))
        events.put((self, None))
