"""`weightlab papers` and `weightlab reproduce`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from weightlab.cli.common import Debug, EngineName, Json, app, print_json, stdout

papers_app = typer.Typer(rich_markup_mode="markdown")
app.add_typer(papers_app, name="papers")


class ScaleName(StrEnum):
    """How much a claim may cost."""

    smoke = "smoke"
    cpu = "cpu"
    gpu = "gpu"


class Order(StrEnum):
    """Order of the reading list."""

    date = "date"
    room = "room"
    status = "status"


@papers_app.callback(invoke_without_command=True)
def papers(
    context: typer.Context,
    by: Annotated[Order, typer.Option(help="Order: newest first, by room, or by status.")] = Order.date,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the forty papers like a reading list: what each gives, how far it is built, what we measured.

    **Examples**: `weightlab papers --by room`, `weightlab papers search quantisation`, `weightlab papers show auon`
    """
    if context.invoked_subcommand is not None:
        return
    from weightlab.papers import catalogue, display

    if as_json:
        print_json(catalogue.to_json())
    else:
        display.reading_list(catalogue.all_papers(), by=by.value, console=stdout)


@papers_app.command()
def search(
    text: Annotated[
        list[str], typer.Argument(help="Words to look for in titles, summaries, parts, authors.")
    ],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Rank papers by how well they match some words.

    **Example**: `weightlab papers search orthogonal convolution`
    """
    from weightlab.papers import catalogue, display

    found = catalogue.search(" ".join(text))
    if as_json:
        objects = {entry["slug"]: entry for entry in catalogue.to_json()}
        print_json([{**objects[entry.paper.slug], "score": score} for entry, score in found])
    else:
        display.search_results(found, console=stdout)


@papers_app.command()
def show(
    slug: Annotated[str, typer.Argument(help="A paper's short name, as listed by `weightlab papers`.")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Print everything about one paper, and how to try it.

    **Example**: `weightlab papers show auon`
    """
    from weightlab.papers import catalogue, display

    entry = catalogue.get(slug)
    if as_json:
        print_json(next(item for item in catalogue.to_json() if item["slug"] == entry.paper.slug))
    else:
        display.show(entry, console=stdout)


@app.command()
def reproduce(
    slug: Annotated[str, typer.Argument(help="A paper's short name, or `all`.")],
    scale: Annotated[
        ScaleName, typer.Option(help="smoke: seconds; cpu: up to 6 minutes a paper; gpu: up to 10 minutes.")
    ] = ScaleName.smoke,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for SLUG.json. Default: docs/record in a source checkout, else weightlab-out/record."
        ),
    ] = None,
    engine: Annotated[EngineName, typer.Option(help="Where a claim's trials run.")] = EngineName.local,
    workers: Annotated[int | None, typer.Option(help="Runs at once (process, ray).")] = None,
    device: Annotated[
        str | None, typer.Option(help="Torch device. Default: cuda at gpu scale, else cpu.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Re-measure a paper's claims by the protocol in its catalogue entry, and keep the record.

    **Examples**: `weightlab reproduce auon --scale cpu`, `weightlab reproduce all --scale smoke`
    """
    from weightlab.papers import reproduce as reproduction

    reproduction.command(
        slug,
        scale=scale.value,
        out=out,
        engine=engine.value,
        workers=workers,
        device=device,
        as_json=as_json,
        debug=debug,
    )
