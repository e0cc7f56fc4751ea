"""The trial itself: plan runs, tune, report, compare. It knows no method and no engine by name."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol, TypeVar

from weightlab.exceptions import TrialError, UsageError
from weightlab.tasks.base import Task
from weightlab.trial import analysis, engines, registry, runner, tuning
from weightlab.trial.arm import Arm
from weightlab.trial.engines.base import Engine
from weightlab.trial.result import ArmReport, BudgetReport, SeedRun, TrialReport, TuningPoint
from weightlab.trial.spec import Job, Progress, RunResult, RunSpec, Scalar
from weightlab.trial.store import Store

FIRST_TUNING_SEED = 1_000_000
POLL_SECONDS = 0.2
Tried = list[tuple[Mapping[str, Scalar], list[RunResult]]]
"""Points of an arm's search space, each with its tuning runs."""
T = TypeVar("T")


class Display(Protocol):
    """What a trial tells whoever watches it."""

    def start_phase(self, name: str, total: int, done: int) -> None:
        """Announce a phase of `total` runs, `done` of which were already in the store."""

    def started(self, job: Job) -> None:
        """Announce that a run begins."""

    def progress(self, progress: Progress, /) -> None:
        """Pass on a sign of life."""

    def finished(self, result: RunResult, score: float) -> None:
        """Announce a run's end."""

    def reused(self, result: RunResult, score: float) -> None:
        """Announce a run that the store already held."""


class Silent(Display):
    """A display that shows nothing."""


@dataclass(frozen=True)
class Plan:
    """A trial's settings with everything resolved: the same plan always means the same runs.

    Attributes:
        task: The task.
        task_ref: Reference that engines load it by.
        arms: Arms in the order asked for.
        arm_refs: Arm name -> reference.
        baseline: Name of the arm that the others are compared with.
        steps: Training steps a run.
        tune: Tuning points an arm in each round.
        tune_seeds: Seeds of tuning runs.
        seeds: Seeds of report runs, disjoint from the former.
        widen: Further rounds of tuning, each in the arm's space widened where its optimum lay at an edge.
        eval_points: Evaluations along a run.
        threads: CPU threads a run.
        device: Torch device string.
        timeout: Seconds a run may take.
        minimal_effect: Smallest improvement worth claiming, in metric units.
        level: Confidence level.
    """

    task: Task
    task_ref: str
    arms: tuple[Arm, ...]
    arm_refs: Mapping[str, str]
    baseline: str
    steps: int
    tune: int
    tune_seeds: tuple[int, ...]
    seeds: tuple[int, ...]
    widen: int
    eval_points: int
    threads: int
    device: str
    timeout: float | None
    minimal_effect: float
    level: float


def _reference(thing: object, kind: type) -> str:
    if isinstance(thing, str):
        return thing
    if isinstance(thing, kind):
        return registry.keep(thing)
    raise UsageError(
        f"{thing!r} is neither a name, a path.py:object reference nor a {kind.__module__}.{kind.__name__}"
    )


def _at_least(name: str, value: float, least: float) -> None:
    if not value >= least:
        raise UsageError(f"{name} must be at least {least}; got {value}")


def plan(
    task: str | Task,
    arms: Sequence[str | Arm],
    *,
    baseline: str | None = None,
    steps: int | None = None,
    tune: int = 6,
    tune_seeds: int = 1,
    seeds: int = 5,
    widen: int = 0,
    eval_points: int = 10,
    threads: int = 1,
    device: str = "cpu",
    timeout: float | None = None,
    minimal_effect: float | None = None,
    level: float = 0.95,
) -> Plan:
    """Resolve and check a trial's settings; see `run_trial` for what they mean.

    Raises:
        UsageError: When a name is unknown, a number is out of range or the device does not exist.
    """
    _at_least("seeds", seeds, 1)
    _at_least("tune", tune, 0)
    _at_least("tune_seeds", tune_seeds, 1)
    _at_least("widen", widen, 0)
    _at_least("eval_points", eval_points, 1)
    _at_least("threads", threads, 1)
    if steps is not None:
        _at_least("steps", steps, 1)
    if minimal_effect is not None:
        _at_least("minimal_effect", minimal_effect, 0)
    if timeout is not None and not timeout > 0:
        raise UsageError(f"timeout must be positive; got {timeout}")
    if not 0.5 < level < 1:
        raise UsageError(f"level must lie between 0.5 and 1; got {level}")
    _check_device(device)
    if not arms:
        raise UsageError("no arms given; name at least one, e.g. adamw,auon")

    task_ref = _reference(task, Task)
    loaded_task = registry.task(task_ref)
    loaded: dict[str, Arm] = {}
    refs: dict[str, str] = {}
    for entry in arms:
        ref = _reference(entry, Arm)
        arm = registry.arm(ref)
        if arm.name in loaded:
            raise UsageError(f"two arms are called {arm.name!r}; name each once, or rename one")
        loaded[arm.name], refs[arm.name] = arm, ref
    if baseline is None:
        base = next(iter(loaded))
    elif baseline in loaded:
        base = baseline
    else:
        arm = registry.arm(baseline)
        base = arm.name
        loaded, refs = {base: arm, **loaded}, {base: baseline, **refs}
    for arm in loaded.values():
        tuning.validate_space(arm.name, arm.search_space)
        missing = [name for name in arm.search_space if name not in arm.defaults]
        if tune == 0 and missing:
            raise UsageError(
                f"arm {arm.name!r} has no default for {', '.join(missing)}: use --tune 1 or more"
            )
    return Plan(
        task=loaded_task,
        task_ref=task_ref,
        arms=tuple(loaded.values()),
        arm_refs=refs,
        baseline=base,
        steps=steps if steps is not None else loaded_task.steps,
        tune=tune,
        tune_seeds=tuple(range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + tune_seeds)),
        seeds=tuple(range(seeds)),
        widen=widen,
        eval_points=eval_points,
        threads=threads,
        device=device,
        timeout=timeout,
        minimal_effect=loaded_task.minimal_effect if minimal_effect is None else minimal_effect,
        level=level,
    )


def _check_device(device: str) -> None:
    import torch

    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise UsageError(f"device {device!r} is not one that PyTorch knows; try cpu or cuda") from error
    available = {
        "cpu": lambda: True,
        "cuda": torch.cuda.is_available,
        "mps": torch.backends.mps.is_available,
    }.get(kind, lambda: False)
    if not available():
        raise UsageError(f"device {device!r} is not available here; leave --device out to run on the CPU")


class Trial:
    """A plan being carried out on an engine, out of and into a store."""

    def __init__(self, plan: Plan, store: Store, engine: Engine, display: Display | None = None) -> None:
        self.plan, self.store, self.engine = plan, store, engine
        self.display = display or Silent()
        self.engine.on_progress = self.display.progress
        self.results: dict[str, RunResult] = {}
        self._task_fingerprint = registry.task_fingerprint(plan.task_ref)
        self._arm_fingerprints = {name: registry.arm_fingerprint(ref) for name, ref in plan.arm_refs.items()}
        self._versions = {arm.name: runner.versions(arm) for arm in plan.arms}
        self._device_kind = runner.device_kind(plan.device)

    @property
    def key(self) -> str:
        """Hash of everything that determines the trial's runs and its verdicts."""
        plan = self.plan
        facts = {
            "task": [plan.task.name, self._task_fingerprint],
            "arms": sorted(self._arm_fingerprints.items()),
            "baseline": plan.baseline,
            "settings": [
                plan.steps, plan.tune, plan.tune_seeds, plan.seeds, plan.widen, plan.eval_points,
                plan.threads, self._device_kind, plan.minimal_effect, plan.level,
            ],
            "versions": self._versions,
        }  # fmt: skip
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def job(self, arm: Arm, hyperparameters: Mapping[str, Scalar], seed: int, split: str) -> Job:
        """Describe one run."""
        plan = self.plan
        spec = RunSpec(
            task=plan.task.name,
            task_fingerprint=self._task_fingerprint,
            arm=arm.name,
            arm_fingerprint=self._arm_fingerprints[arm.name],
            hyperparameters=dict(hyperparameters),
            seed=seed,
            split="validation" if split == "validation" else "test",
            steps=plan.steps,
            eval_points=plan.eval_points,
            batch_size=plan.task.batch_size,
            threads=plan.threads,
            device=self._device_kind,
            versions=self._versions[arm.name],
        )
        return Job(spec, plan.task_ref, plan.arm_refs[arm.name], plan.device, plan.timeout)

    def forget(self) -> None:
        """Hide all stored runs of this trial's arms at these settings, whatever their hyper-parameters and seeds."""
        kept_apart = {"hyperparameters", "seed", "split"}
        mine = [
            {k: v for k, v in self.job(arm, {}, 0, "test").spec.to_dict().items() if k not in kept_apart}
            for arm in self.plan.arms
        ]
        self.store.discard(
            [
                result.key
                for result in self.store.results()
                if {k: v for k, v in result.spec.to_dict().items() if k not in kept_apart} in mine
            ]
        )

    def score(self, result: RunResult) -> float:
        """Score a run: its final metric, or for a failed one what the untrained model scores.

        A run that failed before the untrained model was scored takes that figure from another run
        of the same seed, which starts from the same model.
        """
        if result.status == "ok":
            return result.metrics[self.plan.task.metric]
        if result.untrained is not None:
            return result.untrained
        for other in self.results.values():
            same = other.spec.seed == result.spec.seed and other.spec.split == result.spec.split
            if same and other.untrained is not None:
                return other.untrained
        return math.inf if self.plan.task.mode == "min" else -math.inf

    def usable(self, result: RunResult | None) -> bool:
        """Whether a stored result stands: a timed-out run is repeated when it may take longer now."""
        if result is None or result.status != "timeout":
            return result is not None
        limit = self.plan.timeout
        return limit is not None and result.timeout is not None and limit <= result.timeout

    def run(self, phase: str, jobs: Sequence[Job]) -> dict[str, RunResult]:
        """Carry out the jobs that the store does not hold yet; return all results by key."""
        stored = self.store.get_many([job.spec.key for job in jobs])
        results = {key: result for key, result in stored.items() if self.usable(result)}
        self.store.discard([key for key in stored if key not in results])
        self.results.update(results)
        todo = deque(job for job in jobs if job.spec.key not in results)
        self.display.start_phase(phase, len(jobs), len(results))
        for result in results.values():
            self.display.reused(result, self.score(result))
        in_flight: set[str] = set()

        def take(result: RunResult) -> None:
            results[result.key] = self.results[result.key] = result
            self.display.finished(result, self.score(result))

        try:
            while todo or self.engine.running:
                for _ in range(len(todo)):
                    if self.engine.running >= self.engine.capacity:
                        break
                    job = todo.popleft()
                    key = job.spec.key
                    if self.store.claim(key):
                        in_flight.add(key)
                        self.display.started(job)
                        self.engine.submit(job)
                    elif (found := self.store.get(key)) is not None:
                        take(found)
                    else:
                        todo.append(job)
                if self.engine.running:
                    for result in self.engine.wait(POLL_SECONDS):
                        self.store.put(result)
                        in_flight.discard(result.key)
                        take(result)
                elif todo:
                    time.sleep(POLL_SECONDS)
        except BaseException:
            self.engine.close()
            for key in in_flight:
                self.store.release(key)
            raise
        return results

    def tune(self) -> dict[str, Tried]:
        """Try every arm's tuning points; return per arm the points with their runs."""
        plan = self.plan
        tried: dict[str, Tried] = {arm.name: [] for arm in plan.arms}
        spaces = {arm.name: dict(arm.search_space) for arm in plan.arms}
        drawn = dict.fromkeys(tried, 0)
        for round_number in range(1 + plan.widen if plan.tune else 0):
            wanted: dict[str, list[tuple[Mapping[str, Scalar], list[Job]]]] = {}
            for arm in plan.arms:
                if space := spaces[arm.name]:
                    points = tuning.sample(space, drawn[arm.name] + plan.tune)[drawn[arm.name] :]
                    wanted[arm.name] = [
                        (point, [self.job(arm, point, seed, "validation") for seed in plan.tune_seeds])
                        for point in points
                    ]
            # Arms take turns, so that a machine that slows down or heats up does so for all of them.
            jobs = _take_turns([[job for _, jobs in points for job in jobs] for points in wanted.values()])
            results = self.run("tuning" if round_number == 0 else f"tuning, round {round_number + 1}", jobs)
            for name, points in wanted.items():
                tried[name] += [(point, [results[job.spec.key] for job in jobs]) for point, jobs in points]
            for arm in plan.arms:
                if not spaces[arm.name] or round_number == plan.widen:
                    continue
                chosen = self.best(tried[arm.name])[0]
                if tuning.edges(spaces[arm.name], chosen):
                    spaces[arm.name] = dict(tuning.widen(spaces[arm.name], chosen))
                    drawn[arm.name] = 0
                else:
                    drawn[arm.name] += plan.tune
        self._spaces = spaces
        return tried

    def mean_score(self, runs: Sequence[RunResult]) -> float:
        """Mean score over the tuning seeds of one point."""
        return statistics.fmean(self.score(run) for run in runs)

    def best(self, tried: Tried) -> tuple[Mapping[str, Scalar], list[RunResult]]:
        """Return the point with the best mean validation score; the first of equals."""
        sign = 1 if self.plan.task.mode == "min" else -1
        ranked = [
            (all(run.status != "ok" for run in runs), sign * self.mean_score(runs)) for _, runs in tried
        ]
        return tried[min(range(len(tried)), key=ranked.__getitem__)]

    def report(self, command: str = "") -> TrialReport:
        """Carry out the whole trial, or what is left of it, and return its report.

        Raises:
            TrialError: When the baseline failed in every tuning run: there is nothing to compare with.
        """
        plan = self.plan
        tried = self.tune()
        chosen: dict[str, Mapping[str, Scalar]] = {}
        hopeless: dict[str, RunResult] = {}
        for arm in plan.arms:
            chosen[arm.name] = self.best(tried[arm.name])[0] if tried[arm.name] else {}
            runs = [run for _, runs in tried[arm.name] for run in runs]
            if runs and all(run.status in ("error", "timeout") for run in runs):
                hopeless[arm.name] = runs[0]
        if plan.baseline in hopeless:
            raise TrialError(
                f"the baseline {plan.baseline!r} failed in every tuning run: {hopeless[plan.baseline].error}"
            )
        jobs = {
            arm.name: [self.job(arm, chosen[arm.name], seed, "test") for seed in plan.seeds]
            for arm in plan.arms
        }
        results = self.run("report runs", _take_turns([jobs[name] for name in jobs if name not in hopeless]))
        for name, failed in hopeless.items():
            for job in jobs[name]:
                error = f"not run, since every tuning run failed: {failed.error}"
                results[job.spec.key] = RunResult(job.spec, failed.status, error=error)
        by_arm = {name: [results[job.spec.key] for job in jobs[name]] for name in jobs}
        if all(run.status in ("error", "timeout") for run in by_arm[plan.baseline]):
            raise TrialError(
                f"the baseline {plan.baseline!r} failed in every run: {by_arm[plan.baseline][0].error}"
            )
        report = self._write(tried, chosen, by_arm, command)
        self.store.save_trial(self.key, report.to_dict())
        return report

    def _write(
        self,
        tried: Mapping[str, Tried],
        chosen: Mapping[str, Mapping[str, Scalar]],
        by_arm: Mapping[str, Sequence[RunResult]],
        command: str,
    ) -> TrialReport:
        plan = self.plan
        seed_runs = {
            name: [
                SeedRun(r.spec.seed, self.score(r), r.status, r.curve, r.train_seconds, r.error, r.metrics)
                for r in results
            ]
            for name, results in by_arm.items()
        }
        step_ms = {name: _median(r.step_ms for r in results) for name, results in by_arm.items()}
        target = plan.task.target
        if target is None:
            target = statistics.median(run.score for run in seed_runs[plan.baseline])
        versus = analysis.compare_arms(
            seed_runs,
            baseline=plan.baseline,
            mode=plan.task.mode,
            minimal_effect=plan.minimal_effect,
            level=plan.level,
            step_ms=step_ms,
            steps=plan.steps,
            target=target,
        )
        disagreements = analysis.unpaired(by_arm)
        notes = [*self._notes(tried, by_arm), *disagreements]
        reports = []
        for arm in plan.arms:
            scores = [run.score for run in seed_runs[arm.name]]
            space = self._spaces[arm.name] if plan.tune else {}
            edges = tuple(tuning.edges(space, chosen[arm.name])) if space else ()
            notes += [
                f"{arm.name}: tuned {edge}; its true optimum may lie outside (try --widen 1)"
                for edge in edges
            ]
            reports.append(
                ArmReport(
                    name=arm.name,
                    description=arm.description,
                    hyperparameters={**arm.defaults, **chosen[arm.name]},
                    tuning=tuple(
                        TuningPoint(point, self.mean_score(runs), runs[0].status, point == chosen[arm.name])
                        for point, runs in tried[arm.name]
                    ),
                    edges=edges,
                    runs=tuple(seed_runs[arm.name]),
                    mean=statistics.fmean(scores),
                    std=statistics.stdev(scores)
                    if len(scores) > 1 and all(map(math.isfinite, scores))
                    else 0.0,
                    failures=sum(run.status != "ok" for run in seed_runs[arm.name]),
                    step_ms=step_ms[arm.name],
                    train_seconds=_median(r.train_seconds for r in by_arm[arm.name]),
                    peak_memory_mb=max(
                        (r.peak_memory_mb for r in by_arm[arm.name] if r.peak_memory_mb), default=None
                    ),
                    state_mb=max(
                        (r.state_mb for r in by_arm[arm.name] if r.state_mb is not None), default=None
                    ),
                    versus=versus.get(arm.name),
                )
            )
        return TrialReport(
            task=plan.task.name,
            task_description=plan.task.description,
            baseline=plan.baseline,
            metric=plan.task.metric,
            mode=plan.task.mode,
            minimal_effect=plan.minimal_effect,
            level=plan.level,
            target=target,
            budget=BudgetReport(
                steps=plan.steps,
                tune=plan.tune * (1 + plan.widen),
                tune_seeds=plan.tune_seeds,
                seeds=plan.seeds,
                batch_size=plan.task.batch_size,
                eval_points=plan.eval_points,
                threads=plan.threads,
                device=self._device_kind,
            ),
            arms=tuple(reports),
            paired=not disagreements,
            notes=tuple(notes),
            command=command,
            versions={name: v for versions in self._versions.values() for name, v in versions.items()},
            created_at=max((r.created_at for r in self.results.values()), default=_now()),
            seconds=sum(r.total_seconds or 0.0 for r in self.results.values()),
        )

    def _notes(
        self,
        tried: Mapping[str, Tried],
        by_arm: Mapping[str, Sequence[RunResult]],
    ) -> Iterator[str]:
        dimensions = {arm.name: tuning.free_dimensions(arm.search_space) for arm in self.plan.arms}
        usual = dimensions[self.plan.baseline]
        for arm in self.plan.arms:
            if self.plan.tune and dimensions[arm.name] != usual:
                why = arm.dimension_note or "no reason given: read its result with care"
                yield f"{arm.name} tunes {dimensions[arm.name]} dimensions, {self.plan.baseline} {usual}: {why}"
            failed = [run for run in by_arm[arm.name] if run.status != "ok"]
            if failed:
                yield (
                    f"{arm.name}: {len(failed)} of {len(by_arm[arm.name])} report runs failed and score as the "
                    f"untrained model; first: {failed[0].status}, {failed[0].error}"
                )
            tuned = [run for _, runs in tried[arm.name] for run in runs]
            broken = [run for run in tuned if run.status in ("error", "timeout")]
            if broken and not failed:
                yield f"{arm.name}: {len(broken)} of {len(tuned)} tuning runs failed; first: {broken[0].error}"


def _take_turns(queues: Sequence[Sequence[T]]) -> list[T]:
    return [entry for turn in zip_longest(*queues) for entry in turn if entry is not None]


def _median(values: Iterable[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return statistics.median(present) if present else None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def run_trial(
    task: str | Task,
    arms: Sequence[str | Arm],
    *,
    baseline: str | None = None,
    steps: int | None = None,
    tune: int = 6,
    tune_seeds: int = 1,
    seeds: int = 5,
    widen: int = 0,
    eval_points: int = 10,
    threads: int = 1,
    device: str = "cpu",
    timeout: float | None = None,
    minimal_effect: float | None = None,
    level: float = 0.95,
    store: str | Path | None = None,
    fresh: bool = False,
    engine: str = "local",
    workers: int | None = None,
    address: str | None = None,
    display: Display | None = None,
    command: str = "",
) -> TrialReport:
    """Put arms on trial against a baseline and say what the difference is worth.

    Every arm gets `tune` quasi-random points of its search space, tuned on the validation split with
    tuning seeds; the best point is run on `seeds` other seeds and scored on the test split, paired
    with the baseline by initial weights and data order. What is already in the store is not repeated.

    Args:
        task: Registered name, `path.py:object`, or a `Task`.
        arms: Registered names, `path.py:object` references, or `Arm`s.
        baseline: The arm that the others are compared with; the first one by default.
        steps: Training steps a run; the task's default if `None`.
        tune: Tuning points an arm. 0 means the arms' default hyper-parameters.
        tune_seeds: Seeds that each tuning point is run with.
        seeds: Report seeds, 0 ... `seeds - 1`. From 6 on intervals are BCa bootstrap, below paired t.
        widen: Further rounds of `tune` points for every arm, each in its own space, widened where the
            optimum lay at its edge.
        eval_points: Evaluations along a run.
        threads: CPU threads a run; part of what determines its numbers.
        device: Torch device string.
        timeout: Seconds after which a run counts as failed.
        minimal_effect: Smallest improvement worth claiming, in metric units; the task's by default.
        level: Confidence level.
        store: SQLite file that keeps every run; a temporary one if `None`.
        fresh: Forget this trial's stored runs first (they stay in the file's history).
        engine: `"local"` (this process), `"process"` (local workers) or `"ray"`.
        workers: Runs at once, for engines that have workers.
        address: Address of a Ray cluster.
        display: Told what happens; silent by default.
        command: Command line to quote in the report.

    Returns:
        The report; draw it with `weightlab.trial.report`.

    Raises:
        UsageError: For settings out of range and unknown names.
        TaskError: When the task itself does not work.
        StoreError: When the store is unusable.
        TrialError: When the baseline fails throughout.

    Example:
        >>> report = run_trial("digits-mlp", ["adamw", "sgd"], steps=20, tune=1, seeds=2)
        >>> report.arm("sgd").versus.verdict in ("held", "not held", "inconclusive")
        True
    """
    settled = plan(
        task,
        arms,
        baseline=baseline,
        steps=steps,
        tune=tune,
        tune_seeds=tune_seeds,
        seeds=seeds,
        widen=widen,
        eval_points=eval_points,
        threads=threads,
        device=device,
        timeout=timeout,
        minimal_effect=minimal_effect,
        level=level,
    )
    live = [ref for ref in (settled.task_ref, *settled.arm_refs.values()) if registry.is_live(ref)]
    if live and engine != "local":
        raise UsageError(
            f"engine {engine!r} cannot send live objects to other processes: give tasks and arms as "
            "registered names or path.py:object, or use engine='local'"
        )
    with ExitStack() as stack:
        if store is None:
            store = Path(stack.enter_context(TemporaryDirectory(prefix="weightlab-"))) / "store.sqlite"
        opened = stack.enter_context(closing(Store(store)))
        pool = stack.enter_context(engines.create(engine, workers=workers, device=device, address=address))
        trial = Trial(settled, opened, pool, display)
        if fresh:
            trial.forget()
        return trial.report(command)
