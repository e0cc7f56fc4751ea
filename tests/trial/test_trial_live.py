from __future__ import annotations

import io
import sys
import threading

import pytest
from rich.console import Console

from weightlab.trial.report.live import LiveDisplay
from weightlab.trial.spec import Job, Progress, RunResult, RunSpec


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def job(arm: str = "adamw", seed: int = 0, split="validation", lr: float = 0.1) -> Job:
    spec = RunSpec("docs-gpt", "t", arm, "a", {"lr": lr}, seed, split, 200, 20, 32, 1, "cpu", {})
    return Job(spec, "docs-gpt", arm)


def result(of: Job, status="ok") -> RunResult:
    return RunResult(of.spec, status)


def display(mode="min", *, terminal=False, width=100, **options) -> tuple[LiveDisplay, io.StringIO, Clock]:
    out, clock = io.StringIO(), Clock()
    console = Console(file=out, force_terminal=terminal, width=width, color_system=None)
    return LiveDisplay("loss", mode, console=console, clock=clock, **options), out, clock


def drawn(live: LiveDisplay, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(live._draw())
    return console.file.getvalue()


def test_plain_lines_at_the_ends_of_phases_and_every_ten_seconds():
    live, out, clock = display()
    with live:
        live.start_phase("tuning", total=3, done=1)
        work = job()
        live.started(work)
        for step in range(200):
            clock.now += 0.1
            live.progress(Progress(work.spec.key, step, 200, 2.0))
        lines = out.getvalue().splitlines()
        assert lines[0] == "tuning: 3 runs, 1 of them kept from before"
        # 20 seconds of progress: one line about every 10.
        assert len(lines) in (2, 3)
        assert lines[1].startswith("tuning: 1 of 3 runs, 1 in flight, 0:10 elapsed, about 0:3")
        live.finished(result(work), 1.5)
        other = job(lr=0.2)
        live.started(other)
        live.finished(result(other), 1.25)
    assert out.getvalue().splitlines()[-1] == (
        "tuning done: 3 runs, 1 of them kept from before, 20.0 s; best validation loss: adamw 1.25"
    )


@pytest.mark.parametrize("terminal", [False, True])
def test_quiet_is_silent(terminal):
    live, out, _ = display(terminal=terminal, quiet=True)
    with live:
        live.start_phase("tuning", total=1, done=0)
        work = job()
        live.started(work)
        live.progress(Progress(work.spec.key, 1, 200))
        live.note("hello")
        live.finished(result(work), 1.0)
    assert out.getvalue() == ""


@pytest.mark.parametrize(("mode", "best"), [("min", "1.25"), ("max", "1.75")])
def test_best_score_follows_the_mode_and_passes_over_failures(mode, best):
    live, out, _ = display(mode)
    with live:
        live.start_phase("tuning", total=5, done=0)
        scores = [(1.5, "ok"), (1.25, "ok"), (1.75, "ok"), (0.1, "diverged"), (9.0, "error")]
        for index, (score, status) in enumerate(scores):
            work = job(lr=index + 1.0)
            live.started(work)
            live.finished(result(work, status), score)
        text = drawn(live)
    assert f"best validation {best}" in text
    assert "2 failed" in text
    assert f"best validation loss: adamw {best}" in out.getvalue()


def test_report_runs_do_not_change_the_best_validation_score():
    live, _, _ = display()
    with live:
        live.start_phase("report runs", total=3, done=0)
        for seed, score in ((100, 1.0), (101, 2.0)):
            live.finished(result(job(seed=seed, split="test")), score)
        text = drawn(live)
    assert "best validation" not in text
    assert "test 1.5, 2 seeds" in text


def test_time_left_counts_only_what_was_carried_out_here():
    live, _, clock = display(total=30)
    with live:
        live.start_phase("tuning", total=10, done=8)
        clock.now += 20
        for lr in (1.0, 2.0):
            live.finished(result(job(lr=lr)), 1.0)
        # Two runs took 20 s; of 30 runs 8 were there before, 20 are left.
        assert live._remaining() == pytest.approx(200.0)
        live.start_phase("report runs", total=20, done=5)
        assert live._remaining() == pytest.approx(150.0)
        work = job(seed=100, split="test")
        live.started(work)
        live.progress(Progress(work.spec.key, 100, 200))
        # Half a run more in the same time: 20 s / 2.5 for each of the 14.5 to come.
        assert live._remaining() == pytest.approx(20 / 2.5 * 14.5)


def test_nothing_is_guessed_before_the_first_step():
    live, _, _ = display()
    with live:
        live.start_phase("tuning", total=4, done=2)
        assert live._remaining() is None
        assert "left" not in drawn(live)


@pytest.mark.parametrize("width", [40, 80, 120])
def test_drawing_fits_and_shows_runs_in_flight(width):
    live, _, _ = display()
    with live:
        live.start_phase("tuning", total=40, done=0)
        for index in range(11):
            work = job("[red]muon[/red]", lr=0.1 + index)
            live.started(work)
            live.progress(Progress(work.spec.key, 50, 200, 1.5))
        text = drawn(live, width)
    assert max(map(len, text.splitlines())) <= width
    assert "and 3 more" in text
    if width == 120:
        assert "[red]muon[/red]" in text
        assert "step 50/200" in text
        assert "loss 1.5" in text
        assert "lr=0.1" in text


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_terminal_is_restored_whichever_way_it_ends(error):
    live, out, _ = display(terminal=True)
    before, streams = set(threading.enumerate()), (sys.stdout, sys.stderr)

    def interrupted():
        with live:
            live.start_phase("tuning", total=2, done=0)
            live.started(job())
            assert "\x1b[?25l" in out.getvalue()
            raise error

    with pytest.raises(error):
        interrupted()
    text = out.getvalue()
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    assert (sys.stdout, sys.stderr) == streams
    assert text.splitlines()[-1].endswith("tuning: 0 of 2 runs, 1 in flight, 0:00 elapsed")
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=10)
        assert not thread.is_alive()


def test_notes_are_printed_as_they_are():
    live, out, _ = display()
    with live:
        live.note("kept [bold]3[/bold] runs\x1b[2J")
    assert out.getvalue() == "kept [bold]3[/bold] runs [2J\n"


def test_phases_that_were_in_the_store_are_told_with_their_scores():
    live, out, _ = display()
    with live:
        live.start_phase("tuning", total=1, done=1)
        live.reused(result(job()), 1.5)
        live.start_phase("report runs", total=1, done=1)
        live.reused(result(job(seed=100, split="test")), 1.75)
    assert out.getvalue().splitlines() == [
        "tuning done: 1 run, kept from before; best validation loss: adamw 1.5",
        "report runs done: 1 run, kept from before; mean test loss: adamw 1.75",
    ]


def test_progress_of_an_unknown_run_is_passed_over():
    live, _, _ = display()
    with live:
        live.start_phase("tuning", total=2, done=0)
        live.progress(Progress("nobody", 1, 2))
        assert "nobody" not in drawn(live)
