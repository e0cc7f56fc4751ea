import io

import pytest
from rich.console import Console

from weightlab._progress import WorkBar


def written(console):
    return console.file.getvalue()


def test_a_bar_on_a_terminal_shows_work_and_names_as_they_are():
    console = Console(force_terminal=True, width=100, file=io.StringIO())
    with WorkBar(console=console) as bar:
        bar.tell("first[0]", 8.0, 10.0)
        bar._bar.refresh()  # type: ignore[union-attr]
    assert "80 %" in written(console)
    assert "first[0]" in written(console)


def test_lines_elsewhere_and_silence_where_it_is_wanted(monkeypatch):
    monkeypatch.setattr("weightlab._progress.PLAIN_EVERY", 0.0)
    plain, quiet = (Console(file=io.StringIO(), width=80) for _ in range(2))
    for console in (plain, quiet):
        with WorkBar(console=console, quiet=console is quiet) as bar:
            bar.phase("reading [all]")
            bar.tell("layer 2 of 3", 8, 10)
            bar.tell("loading", 0, 1)
            bar.say("word")
    assert written(plain) == "reading [all]\nlayer 2 of 3, 80 %, 0 s\nloading, 0 s\nword\n"
    assert written(quiet) == ""


def test_no_line_before_its_time():
    console = Console(file=io.StringIO())
    with WorkBar(console=console) as bar:
        bar.tell("layer", 1, 10)
    assert written(console) == ""


def test_the_bar_is_gone_after_an_error():
    bar = WorkBar(console=Console(force_terminal=True, file=io.StringIO()))

    def stopped():
        with bar:
            bar.tell("layer", 1, 10)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert bar._bar is None
