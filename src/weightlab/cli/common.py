"""What all verbs of the command line share."""

from __future__ import annotations

import shlex
import sys
from enum import StrEnum
from typing import Annotated, Any

import typer
from rich.console import Console

app = typer.Typer(
    help="Methods about neural-network weights as PyTorch parts, and fair trials that measure what they are worth.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

stdout = Console()
stderr = Console(stderr=True)

Debug = Annotated[
    bool, typer.Option("--debug", help="Show the full traceback of an error.", rich_help_panel="Output")
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on standard output.", rich_help_panel="Output")
]


class EngineName(StrEnum):
    """Where runs are carried out."""

    local = "local"
    process = "process"
    ray = "ray"


class Stopped(Exception):
    """Ctrl-C, with word of how to go on; of a KeyboardInterrupt typer keeps no message."""


def names(text: str | None) -> list[str]:
    """Split a list by comma.

    Example:
        >>> names("adamw, muon")
        ['adamw', 'muon']
    """
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def print_json(value: Any) -> None:
    """Write one JSON object to standard output."""
    from weightlab.trial.report.export import dumps

    sys.stdout.write(dumps(value) + "\n")


def command_line() -> str:
    """Return the command as it was typed."""
    return shlex.join(["weightlab", *sys.argv[1:]])
