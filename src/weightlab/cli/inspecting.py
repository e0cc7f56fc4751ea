"""`weightlab inspect`."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from weightlab.cli.common import Debug, Json, Stopped, app, command_line, names, stderr, stdout

if TYPE_CHECKING:
    from weightlab.inspect.reading import Reading

_MOST_NAMES = 6


class Kernels(StrEnum):
    """How a kernel is made matrices."""

    slices = "slices"
    flattened = "flattened"


class Precision(StrEnum):
    """Type to compute in."""

    float64 = "float64"
    float32 = "float32"


@app.command()
def inspect(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="A safetensors or .pt file, a folder (sharded, or with a LoRA), or an id `owner/name` on the Hugging Face Hub."
        ),
    ],
    compare: Annotated[
        str | None,
        typer.Option(
            help="Another checkpoint of the same architecture, such as CHECKPOINT fine-tuned: read what has changed."
        ),
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Patterns of layers by comma, e.g. `'*.attn.*,*.mlp.*'`. Default: all.")
    ] = None,
    randomize: Annotated[
        bool,
        typer.Option(
            "--randomize", help="Compare each layer with shuffles of its entries; at least twice the time."
        ),
    ] = False,
    split_qkv: Annotated[
        bool,
        typer.Option("--split-qkv", help="Read fused query-key-value projections as three."),
    ] = False,
    conv: Annotated[
        Kernels, typer.Option(help="Read kernels as one matrix a position, or as one in all.")
    ] = Kernels.slices,
    dtype: Annotated[
        Precision, typer.Option(help="Compute in; float32 is faster and leaves out ranks.")
    ] = Precision.float64,
    device: Annotated[str | None, typer.Option(help="Torch device: cpu, cuda, mps. Default: cpu.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the shuffles.")] = 0,
    min_eigenvalues: Annotated[
        int, typer.Option(help="Layers with fewer are not fitted.", rich_help_panel="Limits")
    ] = 8,
    max_eigenvalues: Annotated[
        int, typer.Option(help="Layers whose shorter side is longer are not read.", rich_help_panel="Limits")
    ] = 15_000,
    html: Annotated[
        str | None, typer.Option(help="Page to write, with every layer's spectrum.", rich_help_panel="Output")
    ] = None,
    csv: Annotated[
        str | None, typer.Option(help="Table to write, one row a layer.", rich_help_panel="Output")
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on with what an interrupted run has read.", rich_help_panel="Output"
        ),
    ] = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="Replace files that exist, and start over.", rich_help_panel="Output"),
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Read the weights of a model: spectra, power-law tails, ranks and norms of every layer.

    Tensors are read one at a time, whatever the size of the model. Ctrl-C keeps the layers that are done; the same
    command with --resume goes on.

    **Examples**

    `weightlab inspect model.safetensors --html report.html`

    `weightlab inspect ./llama --randomize --layers '*self_attn*' --csv layers.csv`

    `weightlab inspect ./base --compare ./fine-tuned --html changes.html`
    """
    from weightlab._progress import WorkBar
    from weightlab.inspect.reading import Settings, read

    settings = Settings(
        checkpoint=checkpoint, compare=compare, layers=tuple(names(layers)), split_qkv=split_qkv, conv=conv.value,
        randomize=randomize, seed=seed, dtype=dtype.value, device=device, min_eigenvalues=min_eigenvalues,
        max_eigenvalues=max_eigenvalues, html=html, csv=csv,
    )  # fmt: skip
    bar = WorkBar(quiet=as_json, console=stderr)
    try:
        reading = read(settings, resume=resume, force=force, bar=bar, command=command_line())
    except KeyboardInterrupt as error:
        raise Stopped(str(error)) from None
    if as_json:
        typer.echo(reading.result.to_json(), nl=False)
        return
    stdout.print(reading.result)
    for line in _told(reading, html=html, csv=csv):
        stdout.print(line, markup=False, highlight=False, soft_wrap=True)


def _told(reading: Reading, *, html: str | None, csv: str | None) -> list[str]:
    """What the table does not say: flags and what they mean, layers left out, files, where to read on."""
    from weightlab.inspect.comparison import Comparison
    from weightlab.inspect.report import FLAGS

    result, lines = reading.result, []
    compared = isinstance(result, Comparison)
    for flag, layers in (result.new_flags if compared else result.flags).items():
        lines += [f"{'newly ' if compared else ''}{flag}: {FLAGS[flag]}", f"    {_listed(layers)}"]
    if compared:
        differ = [f"{name} {old} → {new}" for name, (old, new) in result.shapes_differ.items()]
        for what, layers in (
            (f"only in {result.before.source}", result.only_before),
            (f"only in {result.after.source}", result.only_after),
            ("of different shapes", differ),
        ):
            if layers:
                lines += [f"{what}, not compared:", f"    {_listed(layers)}"]
    else:
        summary = result.summary
        fitted = f"{summary['fitted']:.0f} of {summary['layers']:.0f} layers fitted"
        lines.insert(0, f"{fitted}, {summary['parameters']:,.0f} parameters in them")
    lines += [f"{what}: {path}" for what, path in (("page", html), ("table", csv)) if path is not None]
    where = "on the page" if html is not None else "on the page that --html writes"
    return [*lines, f"What the numbers mean, and what they do not: {where}, and in docs/reading-weights.md"]


def _listed(names: tuple[str, ...] | list[str]) -> str:
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
