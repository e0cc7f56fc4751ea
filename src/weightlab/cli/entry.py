"""Running the command line: exit codes, and errors in words."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import typer
from typer.exceptions import TyperException

from weightlab.cli.common import Stopped, app, stderr
from weightlab.exceptions import WeightlabError

INTERRUPTED = 130


def _explain(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
    return "\n".join(lines[:2])


def _explain_usage(error: Any, say: Callable[[str], None]) -> int:
    message = error.format_message()
    if message:
        verb = error.ctx.command_path if getattr(error, "ctx", None) else "weightlab"
        say(f"Error: {message}\n(see {verb} --help)")
    return error.exit_code


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 1 for a failure, 2 for a wrong request, 130 for Ctrl-C."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments

    def say(text: str) -> None:
        stderr.print(text, markup=False, highlight=False, soft_wrap=True)

    try:
        code = typer.main.get_command(app).main(args=arguments, prog_name="weightlab", standalone_mode=False)
    except Stopped as stopped:
        say(f"\n{stopped}")
        return INTERRUPTED
    except (typer.Abort, KeyboardInterrupt):
        code = INTERRUPTED
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - whoever read our output is gone; say no more
        return 0
    except Exception as error:
        if debug:
            raise
        if isinstance(error, WeightlabError):
            say(f"Error: {_explain(error)}")
            return error.exit_code
        if isinstance(error, TyperException) and hasattr(error, "format_message"):
            return _explain_usage(error, say)
        say(f"Error: {type(error).__name__}: {_explain(error)} (unexpected; --debug shows where)")
        return 1
    if code == INTERRUPTED:
        say("\nStopped. Finished runs are kept; the same command continues.")
    return code if isinstance(code, int) else 0


def main() -> NoReturn:
    """Entry point of the `weightlab` command."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    sys.exit(run())
