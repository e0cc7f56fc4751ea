"""`weightlab trial` and `weightlab report`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weightlab.cli.common import (
    Debug,
    EngineName,
    Json,
    app,
    command_line,
    names,
    print_json,
    stdout,
)
from weightlab.exceptions import UsageError, WeightlabError

if TYPE_CHECKING:
    from weightlab.trial.result import TrialReport


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
    tasks, chosen = names(task), names(arms)
    if not tasks:
        raise UsageError("no task given; try --task docs-gpt")
    from weightlab.trial import registry
    from weightlab.trial.profiles import performance_profile
    from weightlab.trial.report import live, terminal
    from weightlab.trial.trial import run_trial

    command = command_line()
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
        print_json(objects[0] if profile is None else {"trials": objects, "profile": profile.to_dict()})
    else:
        for report in reports:
            terminal.render(report, console=stdout, html=page)
        if profile is not None:
            terminal.render_profile(profile, console=stdout)
    _fail_if_an_arm_never_ran(reports)


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
        print_json(kept)
        return
    table = Table("when", "task", "verdicts", "command", box=None, header_style="bold")
    for entry in kept:
        verdicts = [
            f"{arm['name']} {arm['versus']['verdict']}" for arm in entry["arms"] if arm["versus"] is not None
        ]
        table.add_row(entry["created_at"], entry["task"], "\n".join(verdicts), entry["command"])
    stdout.print(table if kept else f"no finished trial in {store}")
