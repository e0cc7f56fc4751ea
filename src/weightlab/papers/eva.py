"""Parameter Efficient Fine-tuning via Explained Variance Adaptation (arXiv 2410.07170)."""

from __future__ import annotations

import functools
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightlab.papers.schema import Claim, ClaimContext, ClaimResult, Paper, Scale, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn

    from weightlab.papers.adaptation import Adaptation
    from weightlab.tasks.base import Task

PAPER = Paper(
    number=14,
    slug="eva",
    title="Parameter Efficient Fine-tuning via Explained Variance Adaptation",
    authors=(
        "Fabian Paischer",
        "Lukas Hauzenberger",
        "Thomas Schmied",
        "Benedikt Alkin",
        "Marc Peter Deisenroth",
        "Sepp Hochreiter",
    ),
    author_count=6,
    date="2024-10-09",
    arxiv="2410.07170",
    venue="NeurIPS 2025",
    code=("ml-jku/EVA", "BenediktAlkin/vtab1k-pytorch"),
    summary=(
        "EVA starts LoRA from data. Before training, mini-batches of the downstream data pass through the "
        "frozen model, and for the input of every adapted layer a principal-component basis is built "
        "incrementally until it stops turning. The down-projection starts as the leading components and "
        "the up-projection at zero, so the function is unchanged but the first gradients see the "
        "directions of largest variance. Ranks are then redistributed over the layers so that a fixed "
        "budget explains the most variance; training itself is plain LoRA. Faster convergence and the "
        "best average over language, vision and reinforcement learning are claimed, at a small cost of "
        "initialisation, and later versions prove that the choice maximises the expected gradient. The "
        "components have unit norm, which is a larger first gradient than LoRA's usual start by a factor "
        "of √3, so a random orthonormal start and a tuned learning rate for each arm are the baselines "
        "that isolate the effect of the data. The first versions were titled One Initialization to Rule "
        "them All."
    ),
    room="adapters",
    parts=("adapters.eva_init_", "adapters.ActivationPCA", "adapters.allocate_ranks"),
    keywords=(
        "PEFT",
        "LoRA",
        "initialization",
        "PCA",
        "incremental SVD",
        "rank allocation",
        "One Initialization to Rule them All",
        "fine-tuning",
    ),
)

RANK = 8
SHARE = 0.9
GAIN = 0.02
ARMS = {
    "LoRA": "lora",
    "unit rows": "lora-unit-rows",
    "orthonormal rows": "lora-orthonormal",
    "EVA": "eva-rho1",
    "EVA, rho 2": "eva",
    "last components": "lora-bottom",
    "PiSSA": "pissa",
}


@dataclass(frozen=True)
class _Size:
    """What a scale costs on a task.

    Attributes:
        steps: Training steps.
        tune: Learning rates and weight decays tried by each arm.
        seeds: Report seeds, and seeds of the gradients.
        batches: Batches to find components in, and as many to take gradients of.
    """

    steps: int
    tune: int
    seeds: int
    batches: int


SIZES: dict[Scale, dict[str, _Size]] = {
    "smoke": {"adapt-digits": _Size(steps=8, tune=0, seeds=2, batches=4)},
    "cpu": {
        "adapt-digits": _Size(steps=160, tune=6, seeds=8, batches=16),
        "adapt-code": _Size(steps=60, tune=4, seeds=5, batches=16),
    },
}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of a mean over seeds."""
    from weightlab.trial.statistics import PairedMean

    return PairedMean(values).interval(0.95)


def judge_above(intervals: Sequence[tuple[float, float]], threshold: float) -> Verdict:
    """Judge "all means lie above the threshold" by their intervals."""
    if all(low > threshold for low, _ in intervals):
        return "held"
    return "not held" if any(high < threshold for _, high in intervals) else "inconclusive"


def gradient_moments(
    model: nn.Module, layers: Sequence[str], task: Task, batches: Sequence[Any]
) -> dict[str, Tensor]:
    """Sum of ‖g‖² x xᵀ over all rows of a layer's input x, g the loss's gradient by that row's output.

    With B = 0 and scaling s, a row alone gives B the gradient s·g (A x)ᵀ, so for any A the sum of their squared
    norms is s²·tr(A M Aᵀ) with this M, whatever g and x have to do with each other.
    """
    import torch

    moments: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def forward(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            x = args[0].detach().flatten(0, -2).double()

            def backward(grad: Tensor) -> None:
                weights = grad.flatten(0, -2).double().square().sum(-1, keepdim=True)
                moments[name] = moments.get(name, 0) + (x * weights).T @ x

            output.register_hook(backward)

        return forward

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in layers]
    try:
        for batch in batches:
            task.loss(model, batch).backward()
            model.zero_grad(set_to_none=True)
    finally:
        for handle in handles:
            handle.remove()
    assert all(torch.isfinite(moment).all() for moment in moments.values())
    return moments


def attained(rows: Tensor, moments: Tensor) -> float:
    """tr(A M Aᵀ) over the most that as many orthonormal rows can reach."""
    import torch

    best = torch.linalg.eigvalsh(moments)[-len(rows) :].sum()
    return float(((rows @ moments) * rows).sum() / best)


def _gradient_shares(task: Task, seed: int, batches: int) -> dict[str, dict[str, float]]:
    """Kind of A -> layer -> share attained on batches that A was not made from."""
    from itertools import islice

    import torch
    from torch import nn

    from weightlab.adapters import ActivationPCA
    from weightlab.trial.hashing import derive_seed
    from weightlab.trial.runner import endless

    model = task.build(torch.Generator().manual_seed(derive_seed(seed, "weights"))).eval()
    sizes = {name: each.in_features for name, each in model.named_modules() if isinstance(each, nn.Linear)}
    layers = list(sizes)
    data = endless(task, torch.Generator().manual_seed(derive_seed(seed, "data")))
    seen, unseen = list(islice(data, batches)), list(islice(data, batches))
    moments = gradient_moments(model, layers, task, unseen)
    shares: dict[str, dict[str, float]] = {"EVA": {}, "not centred": {}, "random": {}, "last components": {}}
    for kind, center in (("EVA", True), ("not centred", False)):
        # All of them, so that the last ones are known too.
        pca = ActivationPCA(model, sizes, layers, center=center, progress=False)
        pca.fit(seen, forward_fn=task.loss, tau=1.0)
        for name, found in pca.components().items():
            shares[kind][name] = attained(found.directions[:RANK], moments[name])
            if center:
                shares["last components"][name] = attained(found.directions[-RANK:], moments[name])
    for name, M in moments.items():
        # The expectation over uniformly random orthonormal rows is exact: r/d of the trace.
        best = torch.linalg.eigvalsh(M)[-RANK:].sum()
        shares["random"][name] = float(RANK / len(M) * M.trace() / best)
    return shares


def _one_thread(run: Callable[[ClaimContext], ClaimResult]) -> Callable[[ClaimContext], ClaimResult]:
    """Run with one thread, as trials do: pre-trained models are kept for each number of threads apart."""

    @functools.wraps(run)
    def wrapped(ctx: ClaimContext) -> ClaimResult:
        import torch

        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return run(ctx)
        finally:
            torch.set_num_threads(threads)

    return wrapped


@_one_thread
def _gradient_signal(ctx: ClaimContext) -> ClaimResult:
    from weightlab import tasks

    started = time.perf_counter()
    sizes = SIZES[ctx.scale]
    means: dict[str, dict[str, list[float]]] = {}
    for number, (slug, size) in enumerate(sizes.items()):
        task = tasks.get(slug)
        for seed in range(size.seeds):
            done = (number + seed / size.seeds) / len(sizes)
            ctx.progress(done, f"gradients of {slug}, seed {seed}")
            for kind, shares in _gradient_shares(task, seed, size.batches).items():
                means.setdefault(slug, {}).setdefault(kind, []).append(statistics.fmean(shares.values()))
    intervals = {slug: interval(kinds["EVA"]) for slug, kinds in means.items()}
    worst = min(intervals, key=lambda slug: statistics.fmean(means[slug]["EVA"]))
    low, high = intervals[worst]
    parts = [
        f"{statistics.fmean(kinds['EVA']):.1%} (95 % interval {intervals[slug][0]:.1%} to "
        f"{intervals[slug][1]:.1%}) on {slug}, where random rows get {statistics.fmean(kinds['random']):.1%} and "
        f"components that are not centred {statistics.fmean(kinds['not centred']):.1%}"
        for slug, kinds in means.items()
    ]
    return ClaimResult(
        verdict=judge_above(list(intervals.values()), SHARE),
        measured=f"EVA's rows get this much of the most squared gradient that rank {RANK} can: "
        f"{'; '.join(parts)}.",
        value=statistics.fmean(means[worst]["EVA"]),
        interval=(low, high),
        table=[
            {
                "task": slug,
                "rows of A": kind,
                "share": statistics.fmean(values),
                "low": bounds[0],
                "high": bounds[1],
            }
            for slug, kinds in means.items()
            for kind, values in kinds.items()
            for bounds in [interval(values)]
        ],
        cost=time.perf_counter() - started,
        seeds=range(max(size.seeds for size in sizes.values())),
    )


def judge_better(early: tuple[float, float], final: tuple[float, float]) -> Verdict:
    """Judge "the loss falls faster and ends no worse".

    Args:
        early: Interval of the relative difference of early losses.
        final: Interval of the difference of final scores, in the task's minimal effects; positive is worse.
    """
    if early[1] < -GAIN and final[1] < 1:
        return "held"
    return "not held" if early[0] > -GAIN or final[0] > 1 else "inconclusive"


def judge_cheaper(parameters: tuple[float, float], final: tuple[float, float]) -> Verdict:
    """Judge "fewer parameters, and no worse", by intervals of the relative and, as above, final differences."""
    if parameters[1] < 0 and final[1] < 1:
        return "held"
    return "not held" if parameters[0] > 0 or final[0] > 1 else "inconclusive"


def judge_all(verdicts: Sequence[Verdict]) -> Verdict:
    """Judge "on every task"."""
    if "not held" in verdicts:
        return "not held"
    return "inconclusive" if "inconclusive" in verdicts else "held"


def _train(ctx: ClaimContext) -> dict[str, Adaptation]:
    """Train every arm on every task; a second call reads the store."""
    from weightlab.papers.adaptation import adapt

    sizes = SIZES[ctx.scale]
    return {
        task: adapt(
            ctx,
            task,
            ARMS,
            tune=size.tune,
            seeds=size.seeds,
            steps=size.steps,
            eval_points=4,
            span=(number / len(sizes), (number + 1) / len(sizes)),
        )
        for number, (task, size) in enumerate(sizes.items())
    }


def relative(first: Sequence[float], second: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """Mean of second over first, less one, paired by seed, and its 95 % interval.

    Example:
        >>> relative([1.0, 2.0], [1.5, 3.0])
        (0.5, (0.5, 0.5))
    """
    changes = [b / a - 1 for a, b in zip(first, second, strict=True)]
    return statistics.fmean(changes), interval(changes)


def _final(found: Adaptation, slug: str, first: str, second: str) -> tuple[float, tuple[float, float]]:
    """Second final score minus the first, in the task's minimal effects."""
    from weightlab import tasks

    effect = tasks.get(slug).minimal_effect
    mean, (low, high) = found.difference(second, first)
    return mean / effect, (low / effect, high / effect)


def _percent(value: float, bounds: tuple[float, float]) -> str:
    return f"{value:+.1%} (95 % interval {bounds[0]:+.1%} to {bounds[1]:+.1%})"


def _times(value: float, bounds: tuple[float, float]) -> str:
    return f"{value:+.2f} ({bounds[0]:+.2f} to {bounds[1]:+.2f}) minimal effects"


@_one_thread
def _beats_random(ctx: ClaimContext) -> ClaimResult:
    trained = _train(ctx)
    parts: list[str] = []
    verdicts: list[Verdict] = []
    early: dict[str, tuple[float, tuple[float, float]]] = {}
    for slug, found in trained.items():
        first, second = (found.outcomes[name].first for name in ("orthonormal rows", "EVA"))
        early[slug], final = relative(first, second), _final(found, slug, "orthonormal rows", "EVA")
        verdicts.append(judge_better(early[slug][1], final[1]))
        parts.append(
            f"on {slug} early loss {_percent(*early[slug])}, final score worse by {_times(*final)}: {verdicts[-1]}"
        )
    decisive = max(early, key=lambda slug: early[slug][0])
    return ClaimResult(
        verdict=judge_all(verdicts),
        measured=f"EVA against random orthonormal rows, each tuned: {'; '.join(parts)}.",
        value=early[decisive][0],
        interval=early[decisive][1],
        figure=trained[decisive].figure(),
        table=[
            {"task": slug, **row}
            for slug, found in trained.items()
            for row in _table(found, "orthonormal rows")
        ],
        cost=sum(found.cost for found in trained.values()),
        seeds=max((found.seeds for found in trained.values()), key=len),
    )


def _table(found: Adaptation, baseline: str) -> list[dict[str, Any]]:
    """A row for each arm, without what differs between tasks."""
    columns = ("arm", "trained", "learning rate", "at an edge", "loss, first quarter", "loss, second half")
    scores = {name: statistics.fmean(outcome.scores) for name, outcome in found.outcomes.items()}
    return [
        {**{column: row[column] for column in columns}, "final score": scores[row["arm"]]}
        for row in found.table(baseline)
    ]


@_one_thread
def _cheaper(ctx: ClaimContext) -> ClaimResult:
    from weightlab import tasks
    from weightlab.papers.adaptation import trained_parameters
    from weightlab.trial import registry

    trained = _train(ctx)
    parts: list[str] = []
    rows: list[dict[str, Any]] = []
    verdicts: list[Verdict] = []
    saved: dict[str, tuple[float, tuple[float, float]]] = {}
    for slug, found in trained.items():
        counts = {
            name: [
                float(trained_parameters(tasks.get(slug), registry.arm(ARMS[name]), {}, seed))
                for seed in found.seeds
            ]
            for name in ("EVA", "EVA, rho 2")
        }
        saved[slug] = relative(counts["EVA"], counts["EVA, rho 2"])
        final = _final(found, slug, "EVA", "EVA, rho 2")
        verdicts.append(judge_cheaper(saved[slug][1], final[1]))
        parts.append(
            f"on {slug} parameters {_percent(*saved[slug])}, final score worse by {_times(*final)}: {verdicts[-1]}"
        )
        rows += [
            {
                "task": slug,
                "rho": rho,
                "parameters": statistics.fmean(counts[name]),
                "final score": statistics.fmean(found.outcomes[name].scores),
            }
            for rho, name in ((1, "EVA"), (2, "EVA, rho 2"))
        ]
    decisive = max(saved, key=lambda slug: saved[slug][0])
    return ClaimResult(
        verdict=judge_all(verdicts),
        measured=f"rho 2 against rho 1 at the same sum of ranks: {'; '.join(parts)}.",
        value=saved[decisive][0],
        interval=saved[decisive][1],
        table=rows,
        cost=sum(found.cost for found in trained.values()),
        seeds=max((found.seeds for found in trained.values()), key=len),
    )


CLAIMS: tuple[Claim, ...] = (
    Claim(
        name="gradient-signal",
        statement="Of all orthonormal rows, the leading principal components of a layer's input give the "
        "up-projection close to the largest expected squared gradient at the start.",
        threshold=f"Share of the largest mean squared gradient of B that {RANK} orthonormal rows can reach, by "
        "single rows of unseen batches, averaged over all linear layers of the pre-trained model. Held if the "
        f"95 % interval over seeds lies above {SHARE:.0%} on both tasks; not held if on one it lies below.",
        expected="the largest, if gradients at the output do not depend on the input and inputs have no mean",
        run=_gradient_signal,
    ),
    Claim(
        name="beats-random-rows",
        statement="Started from the leading components, LoRA's loss falls faster than from random orthonormal rows, "
        "and it ends no worse.",
        threshold=f"Mean training loss over the first quarter of steps, relative, and final score, in the task's "
        "minimal effects, EVA (rho 1) minus random orthonormal rows, paired by seed, each at the best of as many "
        f"points of learning rate and weight decay. Held if on both tasks the 95 % intervals lie below -{GAIN:.0%} and below 1; not held if on "
        f"one the first lies above -{GAIN:.0%} or the second above 1.",
        expected="faster convergence and the best average over language, vision and reinforcement learning",
        run=_beats_random,
    ),
    Claim(
        name="redistribution",
        statement="Dealing ranks anew with rho = 2 ends no worse than rho = 1 and trains fewer parameters.",
        threshold="Trained parameters, relative, and final score, in the task's minimal effects, rho 2 minus rho 1, "
        "paired by seed, each at the best of as many points of learning rate and weight decay. Held if on both tasks the "
        "95 % intervals lie below 0 and below 1; not held if on one the first lies above 0 or the second above 1.",
        expected="ranks move from wide layers to narrow ones",
        run=_cheaper,
    ),
)
