"""`weightlab data-scores`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, cast

import typer

from weightlab.cli.common import Debug, Json, Stopped, app, command_line, names, print_json, stderr, stdout
from weightlab.exceptions import UsageError

if TYPE_CHECKING:
    from weightlab.inspect.scoring import Score

_ROWS = 10


@app.command("data-scores")
def data_scores(
    out: Annotated[str, typer.Option(help="Folder for table, page, report and the runs.")],
    task: Annotated[
        str | None, typer.Option(help="Task whose training set to score: `digits-mlp`, or `my_task.py:task`.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Or examples: .npz or .safetensors with x and y (and x_test, y_test); a .parquet file; a folder of those, "
            "or of images in a folder a class; a data set's id `owner/name[:config]`."
        ),
    ] = None,
    score: Annotated[
        str,
        typer.Option(help="Scores by comma: el2n, grand, forgetting, margin, loss, aum. The first ranks."),
    ] = "el2n",
    runs: Annotated[int, typer.Option(help="Models to train; scores are means over them.")] = 10,
    epochs: Annotated[
        int, typer.Option(help="Passes over the data before scoring; fewer for small or easy data.")
    ] = 10,
    retrain: Annotated[
        str | None,
        typer.Option(
            help="Shares of the easiest to leave out by comma, e.g. `0.3,0.5,0.7`: retrain without them.",
            rich_help_panel="Retraining",
        ),
    ] = None,
    offset: Annotated[
        float,
        typer.Option(
            help="Also retrain without this share of the hardest, e.g. 0.05.", rich_help_panel="Retraining"
        ),
    ] = 0.0,
    seeds: Annotated[int, typer.Option(help="Trainings of each choice.", rich_help_panel="Retraining")] = 5,
    retrain_epochs: Annotated[
        int,
        typer.Option(
            help="Steps of every training, as passes over all examples.", rich_help_panel="Retraining"
        ),
    ] = 20,
    model: Annotated[
        str | None,
        typer.Option(
            help="mlp, resnet8, resnet20, or `my_model.py:build`. Default: resnet8 for images of 16 pixels and more.",
            rich_help_panel="Data and model",
        ),
    ] = None,
    image: Annotated[
        str, typer.Option(help="Column of images in Parquet.", rich_help_panel="Data and model")
    ] = "image",
    label: Annotated[
        str, typer.Option(help="Column of labels in Parquet.", rich_help_panel="Data and model")
    ] = "label",
    split: Annotated[str, typer.Option(help="Split to score.", rich_help_panel="Data and model")] = "train",
    test_split: Annotated[
        str, typer.Option(help="Split to test retrained models on.", rich_help_panel="Data and model")
    ] = "test",
    size: Annotated[
        int | None,
        typer.Option(help="Side in pixels to scale images to.", rich_help_panel="Data and model"),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(help="Score the first so many examples only.", rich_help_panel="Data and model"),
    ] = None,
    lr: Annotated[float, typer.Option(help="Learning rate.", rich_help_panel="Training")] = 0.05,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Examples in a batch. Default: the task's, or 128.", rich_help_panel="Training"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Decides everything random.", rich_help_panel="Training")] = 0,
    device: Annotated[
        str | None,
        typer.Option(help="Torch device. Default: cuda if there is one.", rich_help_panel="Training"),
    ] = None,
    show: Annotated[
        int, typer.Option(help="Examples on a sheet of the page.", rich_help_panel="Output")
    ] = 48,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with what --out holds; also to add runs or retrainings.",
            rich_help_panel="Output",
        ),
    ] = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="Forget what --out holds, and start over.", rich_help_panel="Output"),
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Score how hard each example of a training set is, show those that look mislabelled, and retrain without some.

    Small models are trained for a few epochs from several starts. Ctrl-C keeps the runs that are done.

    **Examples**

    `weightlab data-scores --task digits-mlp --out digits-scores --epochs 3 --retrain 0.3,0.5,0.7`

    `weightlab data-scores --data photos/ --size 32 --out photo-scores --score el2n,aum`

    `weightlab data-scores --data uoft-cs/cifar10:plain_text --image img --out cifar-scores --device cuda`
    """
    from weightlab._progress import WorkBar
    from weightlab.trial.scoring.run import Settings, score_data, summary

    try:
        shares = tuple(float(share) for share in names(retrain))
    except ValueError:
        raise UsageError(f"--retrain takes shares by comma, e.g. 0.3,0.5, not {retrain!r}") from None
    settings = Settings(
        out=out, task=task, data=data, model=model, image=image, label=label, split=split, test_split=test_split,
        size=size, limit=limit, scores=cast("tuple[Score, ...]", tuple(names(score))), runs=runs, epochs=epochs,
        batch_size=batch_size, lr=lr, seed=seed, device=device, show=show, retrain=shares, offset=offset, seeds=seeds,
        retrain_epochs=retrain_epochs,
    )  # fmt: skip
    display = WorkBar(quiet=as_json, console=stderr)
    try:
        outcome = score_data(settings, resume=resume, force=force, display=display, command=command_line())
    except KeyboardInterrupt as error:
        raise Stopped(str(error)) from None
    if as_json:
        print_json(outcome.report)
        return
    stdout.print(outcome.found[settings.scores[0]].table(_ROWS))
    stdout.print(summary(outcome), markup=False, highlight=False, soft_wrap=True)
