"""The command line: `weightlab trial`, `papers`, `reproduce`, `report`, `adapt`, `merge-adapters`.

Nothing here imports torch until a verb needs it, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from typer.exceptions import TyperException

from weightlab.exceptions import UsageError, WeightlabError

if TYPE_CHECKING:
    from weightlab.trial.result import TrialReport

INTERRUPTED = 130

app = typer.Typer(
    help="Methods about neural-network weights as PyTorch parts, and fair trials that measure what they are worth.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
papers_app = typer.Typer(rich_markup_mode="markdown")
app.add_typer(papers_app, name="papers")

stdout = Console()
stderr = Console(stderr=True)


class EngineName(StrEnum):
    """Where runs are carried out."""

    local = "local"
    process = "process"
    ray = "ray"


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


class _Stopped(Exception):
    """Ctrl-C, with word of how to go on; of a KeyboardInterrupt typer keeps no message."""


Debug = Annotated[
    bool, typer.Option("--debug", help="Show the full traceback of an error.", rich_help_panel="Output")
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on standard output.", rich_help_panel="Output")
]


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def _print_json(value: Any) -> None:
    from weightlab.trial.report.export import dumps

    sys.stdout.write(dumps(value) + "\n")


@app.command()
def trial(
    task: Annotated[
        str, typer.Option(help="Task, or several by comma: a name such as `docs-gpt`, or `my_task.py:task`.")
    ],
    arms: Annotated[
        str, typer.Option(help="Arms by comma: names such as `adamw,muon,auon`, or `my_arm.py:arm`.")
    ],
    baseline: Annotated[
        str | None, typer.Option(help="Arm that the others are compared with. Default: the first.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps a run. Default: the task's.")] = None,
    tune: Annotated[
        int, typer.Option(help="Quasi-random tuning points an arm; 0 takes default hyper-parameters.")
    ] = 6,
    seeds: Annotated[int, typer.Option(help="Seeds to report on, paired between arms.")] = 5,
    tune_seeds: Annotated[
        int,
        typer.Option(help="Seeds a tuning point, other than the reported ones.", rich_help_panel="Protocol"),
    ] = 1,
    widen: Annotated[
        int,
        typer.Option(
            help="Further tuning rounds for all arms, spaces widened where an optimum lay at the edge.",
            rich_help_panel="Protocol",
        ),
    ] = 0,
    minimal_effect: Annotated[
        float | None,
        typer.Option(
            help="Smallest improvement worth claiming, in metric units. Default: the task's.",
            rich_help_panel="Protocol",
        ),
    ] = None,
    level: Annotated[
        float, typer.Option(help="Confidence level of intervals and verdicts.", rich_help_panel="Protocol")
    ] = 0.95,
    eval_points: Annotated[
        int, typer.Option(help="Evaluations along a run.", rich_help_panel="Protocol")
    ] = 10,
    store: Annotated[
        Path,
        typer.Option(
            help="SQLite file that keeps every run; a trial resumes from it.", rich_help_panel="Running"
        ),
    ] = Path("weightlab.sqlite"),
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for report.html, report.json, runs.csv. Default: weightlab-out/TASK.",
            rich_help_panel="Running",
        ),
    ] = None,
    engine: Annotated[
        EngineName,
        typer.Option(help="Where runs happen; the numbers are the same.", rich_help_panel="Running"),
    ] = EngineName.local,
    workers: Annotated[
        int | None,
        typer.Option(help="Runs at once (process, ray). Default: one a core.", rich_help_panel="Running"),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help="Ray cluster to join, e.g. `auto`.", rich_help_panel="Running"),
    ] = None,
    threads: Annotated[
        int, typer.Option(help="CPU threads a run; results on CPU depend on it.", rich_help_panel="Running")
    ] = 1,
    device: Annotated[
        str, typer.Option(help="Torch device: cpu, cuda, cuda:1, mps.", rich_help_panel="Running")
    ] = "cpu",
    timeout: Annotated[
        float | None,
        typer.Option(help="Seconds after which a run counts as failed.", rich_help_panel="Running"),
    ] = None,
    fresh: Annotated[
        bool,
        typer.Option(
            "--fresh", help="Start over: do not reuse this trial's stored runs.", rich_help_panel="Running"
        ),
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Put methods on trial against a baseline: equal tuning, paired seeds, intervals, a verdict.

    Each arm is tuned on --tune points, then run on --seeds fresh seeds with the same initial weights and
    data order as the baseline. Ctrl-C keeps what was done; the same command continues.

    **Examples**

    `weightlab trial --task docs-gpt --arms adamw,muon,auon`

    `weightlab trial --task digits-mlp --arms adamw,auon --tune 8 --seeds 10 --engine process`

    `weightlab trial --task my_task.py:task --arms adamw,my_arm.py:arm`
    """
    tasks, chosen = _names(task), _names(arms)
    if not tasks:
        raise UsageError("no task given; try --task docs-gpt")
    from weightlab.trial import registry
    from weightlab.trial.profiles import performance_profile
    from weightlab.trial.report import live, terminal
    from weightlab.trial.trial import run_trial

    command = _command()
    reports: list[TrialReport] = []
    for name in tasks:
        problem = registry.task(name)
        runs = len(chosen) * (tune * tune_seeds * (1 + widen) + seeds)
        with live.LiveDisplay(problem.metric, problem.mode, total=runs, quiet=as_json) as display:
            reports.append(
                run_trial(
                    name, chosen, baseline=baseline, steps=steps, tune=tune, tune_seeds=tune_seeds, seeds=seeds,
                    widen=widen, eval_points=eval_points, threads=threads, device=device, timeout=timeout,
                    minimal_effect=minimal_effect, level=level, store=store, fresh=fresh, engine=engine.value,
                    workers=workers, address=address, display=display, command=command,
                )
            )  # fmt: skip
    profile = None
    if len(reports) > 1:
        profile = performance_profile(_times_to_target(reports), [report.task for report in reports])
    page = _write_reports(reports, profile, out or Path("weightlab-out") / "+".join(r.task for r in reports))
    if as_json:
        objects = [report.to_dict() for report in reports]
        _print_json(objects[0] if profile is None else {"trials": objects, "profile": profile.to_dict()})
    else:
        for report in reports:
            terminal.render(report, console=stdout, html=page)
        if profile is not None:
            terminal.render_profile(profile, console=stdout)
    _fail_if_an_arm_never_ran(reports)


def _command() -> str:
    return shlex.join(["weightlab", *sys.argv[1:]])


def _times_to_target(reports: Sequence[TrialReport]) -> dict[str, list[float | None]]:
    names = [arm.name for arm in reports[0].arms]
    times: dict[str, list[float | None]] = {name: [] for name in names}
    for report in reports:
        reached: dict[str, float | None] = {}
        for arm in report.arms:
            if arm.versus is not None:
                reached.update(arm.versus.time_to_target)
        for name in names:
            times[name].append(reached.get(name))
    return times


def _write_reports(reports: Sequence[TrialReport], profile: Any, folder: Path) -> Path:
    from weightlab.trial.report import export, html

    folder.mkdir(parents=True, exist_ok=True)
    for report in reports:
        stem = "" if len(reports) == 1 else f"-{Path(report.task).stem}"
        export.write_json(report, folder / f"report{stem}.json")
        export.write_csv(report, folder / f"runs{stem}.csv")
    return html.write(reports, folder / "report.html", profile=profile)


def _fail_if_an_arm_never_ran(reports: Sequence[TrialReport]) -> None:
    broken = [
        f"{arm.name} on {report.task} ({arm.runs[0].error})"
        for report in reports
        for arm in report.arms
        if all(run.status in ("error", "timeout") for run in arm.runs)
    ]
    if broken:
        raise WeightlabError(f"failed in every run: {'; '.join(broken)}")


@app.command()
def report(
    store: Annotated[Path, typer.Option(help="SQLite file that trials were kept in.")] = Path(
        "weightlab.sqlite"
    ),
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the trials in a store: verdicts, and the command that shows each again without new runs.

    **Example**: `weightlab report --store weightlab.sqlite`
    """
    from contextlib import closing

    from rich.table import Table

    from weightlab.trial.store import Store

    if not store.exists():
        raise UsageError(f"there is no store at {store}; name one with --store, or run a trial first")
    with closing(Store(store, read_only=True)) as opened:
        kept = list(opened.trials())
    if as_json:
        _print_json(kept)
        return
    table = Table("when", "task", "verdicts", "command", box=None, header_style="bold")
    for entry in kept:
        verdicts = [
            f"{arm['name']} {arm['versus']['verdict']}" for arm in entry["arms"] if arm["versus"] is not None
        ]
        table.add_row(entry["created_at"], entry["task"], "\n".join(verdicts), entry["command"])
    stdout.print(table if kept else f"no finished trial in {store}")


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
        _print_json(catalogue.to_json())
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
        _print_json([{**objects[entry.paper.slug], "score": score} for entry, score in found])
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
        _print_json(next(item for item in catalogue.to_json() if item["slug"] == entry.paper.slug))
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


@app.command()
def adapt(
    model: Annotated[
        str, typer.Argument(help="Folder of a causal language model, or its id on the Hugging Face Hub.")
    ],
    data: Annotated[
        str,
        typer.Option(
            help="Text: a file (.txt, .jsonl, .parquet), a folder of such, or a data set's id `owner/name[:config]`."
        ),
    ],
    out: Annotated[str, typer.Option(help="Folder to write the adapter to.")],
    method: Annotated[
        str,
        typer.Option(help="lora, rslora, dora, pissa, eva, orthogonal, bone, sorsa or svfit."),
    ] = "lora",
    rank: Annotated[
        int | None, typer.Option(help="Rank (Bone: block size). Default: 16; svfit: by energy.")
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(help="Scales the update by alpha/rank. Default: rank.")
    ] = None,
    targets: Annotated[
        str, typer.Option(help="Layers to adapt by comma, e.g. `q_proj,v_proj`. Default: all but the head.")
    ] = "all-linear",
    variant: Annotated[
        str | None,
        typer.Option(
            help="Form of the method: bone affine, affine_row, additive, mini; eva covariance, incremental, sketch; "
            "orthogonal orthogonal, gaussian, hadamard; sorsa coupled, decoupled."
        ),
    ] = None,
    options: Annotated[
        list[str] | None,
        typer.Option("--set", help="A further setting NAME=VALUE of the method, e.g. `rho=1`; repeatable."),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            help="Peak learning rate, the first thing to tune. Default: the method's.",
            rich_help_panel="Training",
        ),
    ] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the text.", rich_help_panel="Training")] = 1.0,
    steps: Annotated[
        int | None, typer.Option(help="Optimizer steps, instead of --epochs.", rich_help_panel="Training")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Blocks in a batch.", rich_help_panel="Training")] = 8,
    accumulate: Annotated[int, typer.Option(help="Batches in a step.", rich_help_panel="Training")] = 1,
    block_size: Annotated[
        int | None,
        typer.Option(
            help="Tokens in a block. Default: 512, or the model's limit.", rich_help_panel="Training"
        ),
    ] = None,
    bf16: Annotated[
        bool,
        typer.Option("--bf16", help="Base model and products in bfloat16.", rich_help_panel="Training"),
    ] = False,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing",
            help="Recompute activations instead of keeping them.",
            rich_help_panel="Training",
        ),
    ] = False,
    cpu: Annotated[
        bool, typer.Option("--cpu", help="Leave the GPU alone.", rich_help_panel="Training")
    ] = False,
    seed: Annotated[
        int,
        typer.Option(help="For data order, dropout and random starts.", rich_help_panel="Training"),
    ] = 0,
    eval_fraction: Annotated[
        float,
        typer.Option(
            help="Share of the text, its end, on which the loss is taken before and after.",
            rich_help_panel="Text",
        ),
    ] = 0.1,
    text_field: Annotated[
        str, typer.Option(help="Column that holds the text.", rich_help_panel="Text")
    ] = "text",
    split: Annotated[str, typer.Option(help="Part of a data set.", rich_help_panel="Text")] = "train",
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Folder or id of the tokenizer. Default: MODEL.", rich_help_panel="Text"),
    ] = None,
    as_lora: Annotated[
        bool,
        typer.Option(
            "--as-lora",
            help="Write a plain LoRA, which loads without weightlab (not Bone's affine forms).",
            rich_help_panel="Output",
        ),
    ] = False,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue an interrupted run.", rich_help_panel="Output"),
    ] = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="Replace what --out holds, and start over.", rich_help_panel="Output"),
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Fine-tune a causal language model on a text by few parameters, and write a PEFT adapter.

    Ctrl-C keeps a checkpoint; the same command with --resume continues. Adapters by bone, sorsa and svfit load in
    PEFT after `import weightlab.adapters; weightlab.adapters.register()`.

    **Examples**

    `weightlab adapt ./model --data notes.txt --out notes-adapter --method eva`

    `weightlab adapt owner/model --data pages.jsonl --out pages --method bone --variant affine --rank 64 --bf16`
    """
    from weightlab.adapters import finetune

    settings = finetune.Settings(
        model=model, data=data, out=out, method=method, rank=rank, alpha=alpha, targets=tuple(_names(targets)),
        variant=variant, options=_options(options or []), lr=lr, epochs=epochs, steps=steps, batch_size=batch_size,
        accumulate=accumulate, block_size=block_size, bf16=bf16, gradient_checkpointing=gradient_checkpointing,
        cpu=cpu, seed=seed, eval_fraction=eval_fraction, text_field=text_field, split=split, tokenizer=tokenizer,
        as_lora=as_lora,
    )  # fmt: skip
    display = finetune.Display(quiet=as_json, console=stderr)
    try:
        report = finetune.finetune(settings, resume=resume, force=force, display=display, command=_command())
    except KeyboardInterrupt as error:
        raise _Stopped(str(error)) from None
    if as_json:
        _print_json(report)
    else:
        stdout.print(finetune.summary(report), markup=False, highlight=False, soft_wrap=True)


def _options(settings: Sequence[str]) -> dict[str, Any]:
    """Read settings `name=value`, values in JSON if they are that, else as text."""
    import json

    found: dict[str, Any] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not (name.isidentifier() and equals):
            raise UsageError(f"--set {setting!r} is not NAME=VALUE, e.g. --set rho=1")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return found


class MergeMethod(StrEnum):
    """What merging writes."""

    cat = "cat"
    sum = "sum"


@app.command("merge-adapters")
def merge_adapters(
    adapters: Annotated[list[str], typer.Argument(help="Folders of adapters of one base model.")],
    out: Annotated[str, typer.Option(help="Folder to write.")],
    weights: Annotated[
        str | None,
        typer.Option(
            help="Factor of each by comma, e.g. `0.6,0.6`; they need not add up to 1. Default: 1 each."
        ),
    ] = None,
    method: Annotated[
        MergeMethod, typer.Option(help="cat: one LoRA whose rank is the sum; sum: the base model, merged.")
    ] = MergeMethod.cat,
    base: Annotated[
        str | None,
        typer.Option(help="Base model, where one is needed: folder or Hub id. Default: the adapter's own."),
    ] = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Replace what --out holds.", rich_help_panel="Output"),
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Add up adapters exactly, into one LoRA or into the base model.

    Plain LoRAs are concatenated without loading the base model; adapters by sorsa and svfit become LoRAs first, which
    needs it.

    **Examples**

    `weightlab merge-adapters cat dog --out both --weights 0.6,0.6`

    `weightlab merge-adapters cat dog --out model-with-both --method sum --base ./model`
    """
    from weightlab.adapters import merge_files

    try:
        factors = [float(weight) for weight in _names(weights)] if weights is not None else None
    except ValueError:
        raise UsageError(f"--weights takes numbers by comma, e.g. 0.6,0.6, not {weights!r}") from None
    result = merge_files.command(
        adapters,
        out,
        weights=factors,
        method=method.value,
        base=base,
        force=force,
        console=stderr,
        quiet=as_json,
    )
    if as_json:
        _print_json(result)
    else:
        stdout.print(merge_files.summary(result), markup=False, highlight=False, soft_wrap=True)


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
    except _Stopped as stopped:
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
