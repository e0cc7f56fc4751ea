"""The verb `merge`: one network from several."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from weightlab.cli.common import Debug, Json, Stopped, app, command_line, names, print_json, stderr, stdout
from weightlab.exceptions import UsageError


class Method(StrEnum):
    """How networks become one."""

    weights = "weights"
    average = "average"
    slerp = "slerp"
    task_arithmetic = "task-arithmetic"


class Scheme(StrEnum):
    """What more than two networks are matched to."""

    mean = "mean"
    star = "star"


@app.command("merge")
def merge(
    models: Annotated[
        list[str], typer.Argument(help="Safetensors files, or folders as on the Hugging Face Hub.")
    ],
    out: Annotated[str, typer.Option(help="File or folder to write, whichever the first model is.")],
    method: Annotated[
        Method,
        typer.Option(
            help="weights: match units, then average (networks trained apart); average, slerp: as they are (trained "
            "from one start); task-arithmetic: add what each learned since --base."
        ),
    ],
    lam: Annotated[
        float | None, typer.Option(help="Share of the second of two models. Default: 0.5.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Weight of each model by comma, divided by their sum. Default: equal.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="For task-arithmetic: what the models were trained from.")
    ] = None,
    scale: Annotated[
        str | None,
        typer.Option(
            help="For task-arithmetic: factor of what was learned, one for all or one each. Default: 1."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="What to run: `file.py:object` (a module, a function that makes one, or (module, input)), or a folder "
            "that transformers knows. Default: the task's, or the first folder's.",
            rich_help_panel="Running the network",
        ),
    ] = None,
    input_shape: Annotated[
        str | None,
        typer.Option(
            help="Shape of a random input for the model, e.g. `1,3,32,32`.",
            rich_help_panel="Running the network",
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="Task that gives model, data, losses and scores: a name such as `digits-mlp`, or `my_task.py:task`.",
            rich_help_panel="Running the network",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Batches (inputs, classes) instead of a task, as `file.py:object`.",
            rich_help_panel="Running the network",
        ),
    ] = None,
    batches: Annotated[
        int, typer.Option(help="Batches to use of the data.", min=1, rich_help_panel="Running the network")
    ] = 50,
    reset_batch_norm: Annotated[
        bool,
        typer.Option(
            "--reset-batch-norm",
            help="Take batch norm's running statistics anew from the data.",
            rich_help_panel="Running the network",
        ),
    ] = False,
    spec: Annotated[
        str | None,
        typer.Option(
            help="JSON file that says what moves together, `{tensor: [group or null, ...]}`. Default: found by a "
            "forward pass.",
            rich_help_panel="Matching",
        ),
    ] = None,
    scheme: Annotated[
        Scheme,
        typer.Option(
            help="More than two models: match each to the mean of the others until none gains, or all to the first.",
            rich_help_panel="Matching",
        ),
    ] = Scheme.mean,
    restarts: Annotated[
        int, typer.Option(help="Orders to try in each matching.", min=1, rich_help_panel="Matching")
    ] = 5,
    seed: Annotated[
        int, typer.Option(help="For orders, data and random inputs.", rich_help_panel="Matching")
    ] = 0,
    report: Annotated[str | None, typer.Option(help="HTML page to write.", rich_help_panel="Output")] = None,
    points: Annotated[
        int,
        typer.Option(help="Points of the loss curve between two models.", min=3, rich_help_panel="Output"),
    ] = 11,
    force: Annotated[
        bool,
        typer.Option("--force", help="Replace what --out and --report hold.", rich_help_panel="Output"),
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Merge networks of one architecture into one, file by file.

    Names, dtypes, shards, config and tokenizer are those of the first model (of --base, if there is one). Average, slerp and
    task-arithmetic hold one tensor of each model at a time. Nothing is run from the files.

    **Examples**

    `weightlab merge a.safetensors b.safetensors --out c.safetensors --method weights --task digits-mlp --report merge.html`

    `weightlab merge run1.safetensors run2.safetensors --out both.safetensors --method weights --model net.py:build --input-shape 1,3,32,32`

    `weightlab merge ./chat ./code --out ./both --method task-arithmetic --base ./base --scale 0.4`
    """
    adds = method is Method.task_arithmetic
    if adds and (weights is not None or lam is not None):
        raise UsageError("--weights and --lam are for averages; task-arithmetic takes --scale")
    if not adds and scale is not None:
        raise UsageError(f"--scale is for task-arithmetic; {method.value} takes --weights or --lam")
    numbers = _numbers("--scale", scale) if adds else _numbers("--weights", weights)

    from weightlab._progress import WorkBar
    from weightlab.cli.merge_inputs import bench
    from weightlab.merge.file_merge import merge_checkpoints
    from weightlab.merge.merge_settings import Settings
    from weightlab.merge.merge_summary import summary

    settings = Settings(
        method=method.value, weights=numbers, lam=lam, base=base, spec=spec, scheme=scheme.value, seed=seed,
        restarts=restarts, reset_batch_norm=reset_batch_norm, points=points, report=report, force=force,
    )  # fmt: skip
    runs = method is Method.weights or any((model, task, data, input_shape, reset_batch_norm))
    try:
        with WorkBar(console=stderr, quiet=as_json) as display:
            given = None
            if runs:
                display.tell("preparing the model", 0, 1)
                given = bench(
                    model=model, input_shape=input_shape, task=task, data=data, first=models[0], batches=batches, seed=seed
                )  # fmt: skip
            result = merge_checkpoints(
                models, out, settings, bench=given, tell=display.tell, command=command_line()
            )
    except KeyboardInterrupt:
        raise Stopped("Stopped; nothing was written.") from None
    if as_json:
        print_json(result)
    else:
        stdout.print(summary(result), markup=False, highlight=False, soft_wrap=True)


def _numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(number) for number in names(text))
    except ValueError:
        raise UsageError(f"{option} takes numbers by comma, e.g. 0.6,0.4, not {text!r}") from None
