"""A worker process: `python -m weightlab.trial.engines.worker EXECUTE`, jobs in, outcomes out.

One JSON object a line. In: a job. Out: `{"started": true}`, then `{"progress": ...}` about ten times a
second, then the outcome. What the run itself prints goes to standard error.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict
from typing import IO, Any

from weightlab.trial.engines.outcome import job_from_dict, pack, perform, resolve
from weightlab.trial.spec import Progress

DIE_WITH_PARENT = "--die-with-parent"


def serve(
    execute: str, jobs: queue.SimpleQueue[dict[str, Any]], send: Callable[[dict[str, Any]], None]
) -> None:
    """Carry out jobs for ever."""
    function = resolve(execute)

    def report(progress: Progress) -> None:
        send({"progress": asdict(progress)})

    while True:
        job = job_from_dict(jobs.get())
        send({"started": True})
        send(pack(lambda job=job: perform(function, job, report)))


def _listen(inbox: IO[str], jobs: queue.SimpleQueue[dict[str, Any]]) -> None:
    for line in inbox:
        jobs.put(json.loads(line))
    os._exit(0)  # the parent is gone: nobody wants the run that may be in flight


def _take_standard_streams() -> tuple[IO[str], IO[str]]:
    """Keep the two pipes for the protocol alone, whatever user code reads or prints."""
    inbox = os.fdopen(os.dup(0), encoding="utf-8")
    outbox = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return inbox, outbox


def _die_with_parent() -> None:
    """Have Linux kill this process when its parent ends, even while a run blocks every Python thread."""
    if sys.platform == "linux":
        import ctypes

        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def main() -> None:
    """Serve until the parent closes the pipe or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if DIE_WITH_PARENT in sys.argv:
        _die_with_parent()
    inbox, outbox = _take_standard_streams()
    jobs: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(inbox, jobs), daemon=True).start()

    def send(message: dict[str, Any]) -> None:
        outbox.write(json.dumps(message) + "\n")
        outbox.flush()

    serve(sys.argv[1], jobs, send)


if __name__ == "__main__":
    main()
