"""The verb `compat`: making a new embedding model answer to an old index."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from weightlab.cli.common import Debug, Json, Stopped, app, command_line, names, print_json, stderr, stdout
from weightlab.exceptions import UsageError


class _FitByDefault(TyperGroup):
    """`weightlab compat NEW OLD` is `weightlab compat fit NEW OLD`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help"):
            args = ["fit", *args]
        return super().parse_args(ctx, args)


compat_app = typer.Typer(
    cls=_FitByDefault,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Map embeddings of a new model to the space of an old one, so that an old index goes on being of use.",
)
app.add_typer(compat_app, name="compat")


@compat_app.command("fit")
def fit(
    new: Annotated[
        str, typer.Argument(help="Embeddings by the new model, one item a row: .safetensors or .npy.")
    ],
    old: Annotated[
        str, typer.Argument(help="Embeddings of the same items, in the same order, by the old one.")
    ],
    out: Annotated[
        str,
        typer.Option(help="Adapter to write, .safetensors; report (.json) and page (.html) go beside it."),
    ],
    labels: Annotated[
        str | None, typer.Option(help="Classes of the items, to judge maps by: .safetensors or .npy.")
    ] = None,
    tol: Annotated[
        str, typer.Option(help="Tolerances λ/√d by comma, tried beside a rotation and an affine map.")
    ] = "0.05,0.1,0.2,0.5,1",
    bias: Annotated[
        bool, typer.Option("--bias", help="Maps with a bias, which changes angles even beside a rotation.")
    ] = False,
    most_drop: Annotated[
        float | None,
        typer.Option(
            help="Points of 100 that the chosen map may cost among new embeddings. Default: 0.5; without labels 10."
        ),
    ] = None,
    contrastive: Annotated[
        float,
        typer.Option(help="Weight of a loss that gathers classes; needs --labels, and trains by steps."),
    ] = 0.0,
    steps: Annotated[int, typer.Option(help="Training steps of --contrastive.", min=1)] = 600,
    held_out: Annotated[float, typer.Option(help="Share of pairs to measure on, and not to fit to.")] = 0.2,
    seed: Annotated[int, typer.Option(help="Draws what is held out.")] = 0,
    new_tensor: Annotated[
        str | None, typer.Option(help="Tensor in NEW, where there are several.", rich_help_panel="Files")
    ] = None,
    old_tensor: Annotated[
        str | None, typer.Option(help="Tensor in OLD, where there are several.", rich_help_panel="Files")
    ] = None,
    label_tensor: Annotated[
        str | None, typer.Option(help="Tensor in --labels, where there are several.", rich_help_panel="Files")
    ] = None,
    no_html: Annotated[
        bool, typer.Option("--no-html", help="Write no page.", rich_help_panel="Output")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace files that exist.", rich_help_panel="Output")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Fit maps from rotations to affine ones to paired embeddings, and choose by what they keep and find.

    Of the maps that cost at most --most-drop points of what is found among new embeddings, the one that finds most
    in the old gallery is chosen and written. Numbers are of pairs held out.

    **Examples**

    `weightlab compat new.npy old.npy --labels classes.npy --out to-old.safetensors`

    `weightlab compat both.safetensors both.safetensors --new-tensor v2 --old-tensor v1 --out to-v1.safetensors`

    `weightlab compat apply to-old.safetensors queries.npy --out mapped.npy`
    """
    try:
        tols = tuple(float(number) for number in names(tol))
    except ValueError:
        raise UsageError(f"--tol takes numbers by comma, e.g. 0.1,0.2, not {tol!r}") from None
    from weightlab._progress import WorkBar
    from weightlab.merge import compat_files

    settings = compat_files.Settings(
        out=out, labels=labels, new_tensor=new_tensor, old_tensor=old_tensor, label_tensor=label_tensor, tols=tols,
        bias=bias, held_out=held_out, most_drop=None if most_drop is None else most_drop / 100, contrastive=contrastive, steps=steps, seed=seed, html=not no_html,
        force=force,
    )  # fmt: skip
    try:
        with WorkBar(console=stderr, quiet=as_json) as display:
            result = compat_files.fit_files(new, old, settings, tell=display.tell, command=command_line())
    except KeyboardInterrupt:
        raise Stopped("Stopped; nothing is lost, as nothing takes long: run it again.") from None
    if as_json:
        print_json(result)
    else:
        stdout.print(compat_files.summary(result), markup=False, highlight=False, soft_wrap=True)


@compat_app.command("apply")
def apply(
    adapter: Annotated[str, typer.Argument(help="Adapter that `weightlab compat` wrote.")],
    embeddings: Annotated[str, typer.Argument(help="Embeddings to map: .safetensors or .npy.")],
    out: Annotated[str, typer.Option(help="File to write: .safetensors or .npy.")],
    lift: Annotated[
        bool,
        typer.Option(
            "--lift", help="Lift old embeddings to where new ones are mapped, instead of mapping new ones."
        ),
    ] = False,
    tensor: Annotated[str | None, typer.Option(help="Tensor in EMBEDDINGS, where there are several.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace --out.", rich_help_panel="Output")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Map embeddings of a file by an adapter: new ones to the old space, or old ones with --lift.

    **Examples**

    `weightlab compat apply to-old.safetensors queries.npy --out mapped.npy`

    `weightlab compat apply to-old.safetensors index.npy --lift --out lifted.npy`
    """
    from weightlab._progress import WorkBar
    from weightlab.merge import compat_files

    try:
        with WorkBar(console=stderr, quiet=as_json) as display:
            result = compat_files.apply_file(
                adapter, embeddings, out, lift=lift, tensor=tensor, force=force, tell=display.tell
            )
    except KeyboardInterrupt:
        raise Stopped("Stopped; nothing was written.") from None
    if as_json:
        print_json(result)
    else:
        before, after = result["dimensions"]
        stdout.print(
            f"{result['items']:,} embeddings, {before} to {after} dimensions: {out}",
            markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip
