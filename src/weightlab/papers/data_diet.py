"""Deep Learning on a Data Diet: Finding Important Examples Early in Training (arXiv 2107.07075)."""

from __future__ import annotations

import functools
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from weightlab.papers.figure import rounded
from weightlab.papers.schema import Claim, ClaimContext, ClaimResult, Paper, Scale, Verdict

if TYPE_CHECKING:
    from torch import Tensor

    from weightlab.inspect.selection import Strategy

Tell = Callable[[float, str], None]

PAPER = Paper(
    number=27,
    slug="data-diet",
    title="Deep Learning on a Data Diet: Finding Important Examples Early in Training",
    author_count=3,
    date="2021-07-14",
    arxiv="2107.07075",
    venue="NeurIPS 2021",
    code=("mansheej/data_diet",),
    summary=(
        "Much of a training set can be dropped if one knows which examples matter. Every example is "
        "scored early in training by how far it would move the weights: the expected norm of its loss "
        "gradient (GraNd), or its cheap stand-in, the norm of the error vector (EL2N), averaged over "
        "several independent runs. Examples with low scores are removed and a new network is trained on "
        "the rest for the same number of steps. The paper reports that half of CIFAR-10 can be dropped "
        "with no loss of test accuracy, and that the scores point at mislabelled examples. EL2N after "
        "some epochs has been reproduced by others; GraNd at initialisation has not (arXiv 2303.14753 "
        "traces the original figure to a checkpoint-restore error), so scores from an untrained network "
        "are no evidence. Keeping the hardest examples is expected to backfire when very little data is "
        "left."
    ),
    room="inspect",
    parts=(
        "inspect.data_scores",
        "inspect.el2n",
        "inspect.grad_norms",
        "inspect.ForgettingTracker",
        "inspect.select",
    ),
    keywords=(
        "data pruning",
        "GraNd",
        "EL2N",
        "forgetting",
        "coreset",
        "label noise",
        "per-example gradients",
    ),
)


TRAIN = 1200
EPOCHS, BATCH, LR = 2, 64, 0.05
WRONG = 0.1
WITHIN = 0.005
DETECTED = 0.95
AGREE = 0.9
# The range of learning rates was chosen on the splits 0 to 11.
FIRST_SEED, TUNING_SEEDS, RANDOM_SEEDS = 12, 1000, 10_000
STACK = 128


@dataclass(frozen=True)
class _Size:
    """What a scale costs.

    Attributes:
        seeds: Splits of the digits to report on.
        tuning_seeds: Other splits, on which each arm's learning rate is chosen.
        lrs: The learning rates to choose from.
        runs: Models that a score is the mean of.
        steps: Of each training after pruning.
        forgetting: Splits and epochs of scoring by forgetting.
    """

    seeds: int
    tuning_seeds: int
    lrs: tuple[float, ...]
    runs: int
    steps: int
    forgetting: tuple[int, int]

    @property
    def splits(self) -> range:
        """Seeds of the splits to report on."""
        return range(FIRST_SEED, FIRST_SEED + self.seeds)


SIZES: dict[Scale, _Size] = {
    "smoke": _Size(seeds=2, tuning_seeds=1, lrs=(0.1,), runs=2, steps=40, forgetting=(1, 3)),
    "cpu": _Size(
        seeds=12,
        tuning_seeds=2,
        lrs=(0.005, 0.02, 0.05, 0.1, 0.2, 0.4),
        runs=10,
        steps=1500,
        forgetting=(3, 20),
    ),
}


@dataclass(frozen=True)
class Arm:
    """One way to choose what to train on.

    Attributes:
        keep: Share to keep.
        strategy: As for `select`.
        score: Which score.
        offset: Share to leave out.
    """

    keep: float = 1.0
    strategy: Strategy = "hard"
    score: str = "el2n"
    offset: float = 0.0


ALL = "all"
CLEAN = {
    ALL: Arm(),
    **{
        f"{100 * keep:.0f} %, {name}": replace(arm, keep=keep)
        for keep in (0.75, 0.5, 0.3)
        for name, arm in (
            ("largest EL2N", Arm()),
            ("random", Arm(strategy="random")),
            ("smallest EL2N", Arm(strategy="easy")),
            ("largest EL2N but the top 5 %", Arm(strategy="offset", offset=0.05)),
        )
    },
    "50 %, largest GraNd": Arm(0.5, score="grand"),
    "50 %, largest GraNd at the start": Arm(0.5, score="grand at the start"),
    "50 %, largest input norm": Arm(0.5, score="input norm"),
}
NOISY = {
    ALL: Arm(),
    "50 %, largest EL2N": Arm(0.5),
    "50 %, random": Arm(0.5, "random"),
    "50 %, largest EL2N but the top 10 %": Arm(0.5, "offset", offset=0.1),
}


@dataclass(frozen=True, eq=False)
class _Split:
    """The digits, parted at random, with their scores.

    Attributes:
        seed: Of the split.
        inputs: `(1797, 64)`.
        labels: `(1797,)`, some wrong if asked for.
        train: Indices to train on.
        test: The others.
        wrong: Which of `train` have a wrong label.
        runs: EL2N by run, `(runs, 1200)`.
        scores: Score -> `(1200,)`, of `train`.
    """

    seed: int
    inputs: Tensor
    labels: Tensor
    train: Tensor
    test: Tensor
    wrong: Tensor
    runs: Tensor
    scores: dict[str, Tensor]

    def subset(self, arm: Arm) -> Tensor:
        """Indices that an arm trains on."""
        import torch

        from weightlab.inspect import select

        generator = torch.Generator().manual_seed(RANDOM_SEEDS + self.seed)
        scores = self.scores[arm.score]
        return self.train[select(scores, arm.keep, arm.strategy, offset=arm.offset, generator=generator)]


@functools.cache
def _split(seed: int, noise: float, runs: int) -> _Split:
    import torch

    from weightlab.inspect import data_scores
    from weightlab.tasks.digits_mlp import digits
    from weightlab.tasks.models.mlp import MLP

    parts = list(digits().values())
    inputs = torch.cat([pixels for pixels, _ in parts]).flatten(1).float() / 16
    labels = torch.cat([labels for _, labels in parts])
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    train, test = order[:TRAIN], order[TRAIN:]
    flipped = torch.randperm(TRAIN, generator=generator)[: round(noise * TRAIN)]
    shift = torch.randint(1, 10, flipped.shape, generator=generator)
    labels[train[flipped]] = (labels[train[flipped]] + shift) % 10
    wrong = torch.zeros(TRAIN, dtype=torch.bool)
    wrong[flipped] = True
    data = (inputs[train], labels[train])

    def model() -> MLP:
        return MLP([64, 128, 10])

    settings = {"runs": runs, "batch_size": BATCH, "lr": LR, "seed": seed}
    found = data_scores(model, data, ["el2n", "grand"], epochs=EPOCHS, **settings)
    scores = {name: score.scores for name, score in found.items()}
    if not noise:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="scores of an untrained network")
            start = data_scores(model, data, "grand", epochs=0, **settings)
        scores |= {"grand at the start": start.scores, "input norm": inputs[train].norm(dim=1)}
    return _Split(seed, inputs, labels, train, test, wrong, found["el2n"].per_run, scores)


@dataclass(frozen=True)
class _Outcome:
    """Test accuracies by arm, one a split, and the arms' learning rates."""

    accuracies: dict[str, list[float]]
    lrs: dict[str, float]


_OUTCOMES: dict[tuple[Scale, float], _Outcome] = {}


def _trained(ctx: ClaimContext, noise: float) -> _Outcome:
    """Return the outcome of all trainings, which several claims are judged by."""
    key = (ctx.scale, noise)
    if key not in _OUTCOMES:
        _OUTCOMES[key] = _train(ctx.scale, noise, ctx.progress)
    return _OUTCOMES[key]


def _train(scale: Scale, noise: float, tell: Tell) -> _Outcome:
    """Train every arm on every split, each with the learning rate that is best for it on other splits."""
    size, arms = SIZES[scale], NOISY if noise else CLEAN
    splits = []
    seeds = [*size.splits, *range(TUNING_SEEDS, TUNING_SEEDS + size.tuning_seeds)]
    for number, seed in enumerate(seeds):
        tell(0.3 * number / len(seeds), f"scoring split {number + 1} of {len(seeds)}")
        splits.append(_split(seed, noise, size.runs))
    reported, tuning = splits[: size.seeds], splits[size.seeds :]
    grid = [(name, lr) for name in arms for lr in size.lrs]
    tuned = _accuracies(tuning, [(arms[name], lr) for name, lr in grid], size.steps, _part(tell, 0.3, 0.6))
    lrs = {}
    for name in arms:
        means = {
            lr: statistics.fmean(values)
            for (other, lr), values in zip(grid, tuned, strict=True)
            if other == name
        }
        lrs[name] = max(means, key=lambda lr: means[lr])
    final = _accuracies(
        reported, [(arm, lrs[name]) for name, arm in arms.items()], size.steps, _part(tell, 0.6, 1.0)
    )
    return _Outcome(dict(zip(arms, final, strict=True)), lrs)


def _part(tell: Tell, start: float, end: float) -> Tell:
    return lambda fraction, message: tell(start + (end - start) * fraction, message)


def _accuracies(
    splits: Sequence[_Split],
    points: Sequence[tuple[Arm, float]],
    steps: int,
    tell: Tell,
) -> list[list[float]]:
    """Return accuracies by point and split. All points of a split start from the same weights."""
    import torch

    from weightlab.papers._stacked_perceptrons import Training, logits, train_stacked

    jobs = [(split, Training(split.subset(arm), lr, split.seed)) for arm, lr in points for split in splits]
    found: list[float] = []

    def told(done: float) -> None:
        here = len(found) + done * min(STACK, len(jobs) - len(found))
        tell(here / len(jobs), f"training {len(jobs)} networks on subsets")

    for start in range(0, len(jobs), STACK):
        stack = jobs[start : start + STACK]
        inputs, labels = stack[0][0].inputs, torch.stack([split.labels for split, _ in stack])
        parameters = train_stacked(
            inputs,
            labels,
            [training for _, training in stack],
            classes=10,
            steps=steps,
            batch_size=BATCH,
            tell=told,
        )
        predicted = logits(parameters, inputs).argmax(-1)
        right = (predicted == labels).double()
        found += [float(row[split.test].mean()) for row, (split, _) in zip(right, stack, strict=True)]
    return [found[number * len(splits) : (number + 1) * len(splits)] for number in range(len(points))]


def _interval(differences: Sequence[float]) -> tuple[float, float]:
    from weightlab.trial.statistics import PairedMean

    return PairedMean(differences).interval(0.95)


def _minus(outcome: _Outcome, first: str, second: str) -> list[float]:
    pairs = zip(outcome.accuracies[first], outcome.accuracies[second], strict=True)
    return [a - b for a, b in pairs]


def judge(*tests: tuple[tuple[float, float], float]) -> Verdict:
    """Judge "each mean lies above its bound" by pairs of an interval and a bound.

    Example:
        >>> judge(((0.1, 0.2), 0.0), ((-0.1, 0.2), -0.5)), judge(((0.1, 0.2), 0.0), ((-0.2, -0.1), 0.0))
        ('held', 'not held')
    """
    if all(low > bound for (low, _), bound in tests):
        return "held"
    return "not held" if any(high < bound for (_, high), bound in tests) else "inconclusive"


def _rows(outcome: _Outcome, arms: Mapping[str, Arm]) -> list[dict[str, Any]]:
    rows = []
    for name in arms:
        differences = _minus(outcome, name, ALL)
        low, high = _interval(differences)
        rows.append(
            {
                "trained on": name,
                "accuracy, %": 100 * statistics.fmean(outcome.accuracies[name]),
                "minus all, points": 100 * statistics.fmean(differences),
                "low": 100 * low,
                "high": 100 * high,
                "learning rate": outcome.lrs[name],
            }
        )
    return rows


def _curves(outcome: _Outcome, arms: Mapping[str, Arm]) -> dict[str, Any]:
    """Accuracy by the share that is kept, one line a strategy."""
    lines: dict[str, list[tuple[float, list[float]]]] = {}
    for name, arm in arms.items():
        if name != ALL:
            values = outcome.accuracies[name]
            lines.setdefault(name.partition(", ")[2], [(1.0, outcome.accuracies[ALL])]).append(
                (arm.keep, values)
            )
    series = []
    for name, points in lines.items():
        points.sort(key=lambda point: point[0])
        intervals = [_interval(values) for _, values in points]
        series.append(
            {
                "name": name,
                "x": [100 * keep for keep, _ in points],
                "y": rounded(100 * statistics.fmean(values) for _, values in points),
                "low": rounded(100 * low for low, _ in intervals),
                "high": rounded(100 * high for _, high in intervals),
            }
        )
    return {
        "title": "Test accuracy at equal steps",
        "x_label": "share of the training set that is kept, %",
        "y_label": "test accuracy, %",
        "series": series,
    }


def _compared(
    ctx: ClaimContext, noise: float, first: str, others: Mapping[str, float], sign: float = 1.0
) -> ClaimResult:
    """Judge whether the first arm's accuracy, times `sign`, exceeds each other's by more than a bound."""
    outcome = _trained(ctx, noise)
    arms = NOISY if noise else CLEAN
    differences = {other: _minus(outcome, first, other) for other in others}
    intervals = {other: _interval(values) for other, values in differences.items()}
    signed = [
        ((low, high) if sign > 0 else (-high, -low), others[other])
        for other, (low, high) in intervals.items()
    ]
    told = ", ".join(
        f"{100 * statistics.fmean(values):+.2f} points to {other} "
        f"(95 % interval {100 * intervals[other][0]:+.2f} to {100 * intervals[other][1]:+.2f})"
        for other, values in differences.items()
    )
    last = list(others)[-1]
    return ClaimResult(
        verdict=judge(*signed),
        measured=f"{first}: test accuracy {100 * statistics.fmean(outcome.accuracies[first]):.2f} %, {told}; "
        f"{SIZES[ctx.scale].seeds} splits.",
        value=statistics.fmean(differences[last]),
        interval=intervals[last],
        figure=_curves(outcome, arms),
        table=_rows(outcome, arms),
        seeds=SIZES[ctx.scale].splits,
    )


def _half(ctx: ClaimContext) -> ClaimResult:
    return _compared(ctx, 0.0, "50 %, largest EL2N", {ALL: -WITHIN, "50 %, random": 0.0})


def _reversal(ctx: ClaimContext) -> ClaimResult:
    return _compared(ctx, 0.0, "30 %, largest EL2N", {"30 %, random": 0.0}, sign=-1.0)


def _offset_clean(ctx: ClaimContext) -> ClaimResult:
    first, second = "50 %, largest EL2N but the top 5 %", "50 %, largest EL2N"
    return _compared(ctx, 0.0, first, {second: 0.0}, sign=-1.0)


def _offset_noisy(ctx: ClaimContext) -> ClaimResult:
    first, second = "50 %, largest EL2N but the top 10 %", "50 %, largest EL2N"
    return _compared(ctx, WRONG, first, {second: 0.0})


def _start(ctx: ClaimContext) -> ClaimResult:
    return _compared(ctx, 0.0, "50 %, largest GraNd at the start", {ALL: -WITHIN, "50 %, random": 0.0})


def detection(scores: Tensor, wrong: Tensor) -> float:
    """Return the area under the ROC curve: how often an example with a wrong label has the larger score.

    Example:
        >>> import torch
        >>> detection(torch.tensor([0.1, 0.9, 0.5]), torch.tensor([False, True, True]))
        1.0
    """
    bad, good = scores[wrong, None], scores[~wrong]
    return float(((bad > good).double() + 0.5 * (bad == good)).mean())


def _noise(ctx: ClaimContext) -> ClaimResult:
    size = SIZES[ctx.scale]
    counts = [count for count in (1, 2, 5, 10) if count <= size.runs]
    areas: dict[str, list[list[float]]] = {"EL2N": []}
    grand = []
    for number, seed in enumerate(size.splits):
        ctx.progress(number / size.seeds, f"scoring split {number + 1} of {size.seeds} with wrong labels")
        split = _split(seed, WRONG, size.runs)
        areas["EL2N"].append([detection(split.runs[:count].mean(0), split.wrong) for count in counts])
        grand.append(detection(split.scores["grand"], split.wrong))
    by_count = list(zip(*areas["EL2N"], strict=True))
    low, high = _interval(by_count[-1])
    mean = statistics.fmean(by_count[-1])
    return ClaimResult(
        verdict=judge(((low, high), DETECTED)),
        measured=f"EL2N of {size.runs} runs finds the {100 * WRONG:.0f} % wrong labels with an area under the ROC curve of "
        f"{mean:.4f} (95 % interval {low:.4f} to {high:.4f}, {size.seeds} splits); of one run "
        f"{statistics.fmean(by_count[0]):.4f}; GraNd {statistics.fmean(grand):.4f}.",
        value=mean,
        interval=(low, high),
        figure={
            "title": "Wrong labels found by EL2N",
            "x_label": "runs averaged",
            "y_label": "area under the ROC curve",
            "series": [
                {
                    "name": "mean, lowest and highest split",
                    "x": counts,
                    "y": rounded(statistics.fmean(values) for values in by_count),
                    "low": rounded(min(values) for values in by_count),
                    "high": rounded(max(values) for values in by_count),
                }
            ],
        },
        seeds=size.splits,
    )


def _agreement(ctx: ClaimContext) -> ClaimResult:
    from weightlab.inspect import data_scores, rank_correlation
    from weightlab.tasks.models.mlp import MLP

    size = SIZES[ctx.scale]
    splits = [_split(seed, 0.0, size.runs) for seed in size.splits]

    def to_el2n(score: str) -> list[float]:
        return [rank_correlation(split.scores["el2n"], split.scores[score]) for split in splits]

    pairs = {"EL2N and GraNd": to_el2n("grand")}
    pairs["EL2N of one run and of all"] = [
        rank_correlation(split.runs[0], split.scores["el2n"]) for split in splits
    ]
    count, epochs = size.forgetting
    forgotten = []
    for number, split in enumerate(splits[:count]):
        ctx.progress(number / count, f"counting what is forgotten, split {number + 1} of {count}")
        data = (split.inputs[split.train], split.labels[split.train])
        scores = data_scores(
            lambda: MLP([64, 128, 10]),
            data,
            "forgetting",
            runs=size.runs,
            epochs=epochs,
            batch_size=BATCH,
            lr=LR,
            seed=split.seed,
        )
        forgotten.append(rank_correlation(split.scores["el2n"], scores.scores))
    pairs[f"EL2N and forgetting over {epochs} epochs"] = forgotten
    pairs["EL2N and GraNd at the start"] = to_el2n("grand at the start")
    pairs["EL2N and input norm"] = to_el2n("input norm")
    pairs["GraNd at the start and input norm"] = [
        rank_correlation(split.scores["grand at the start"], split.scores["input norm"]) for split in splits
    ]
    rows = []
    for name, values in pairs.items():
        low, high = _interval(values)
        rows.append(
            {
                "pair": name,
                "rank correlation": statistics.fmean(values),
                "low": low,
                "high": high,
                "splits": len(values),
            }
        )
    first, second = rows[:2]
    return ClaimResult(
        verdict=judge(*(((row["low"], row["high"]), AGREE) for row in (first, second))),
        measured="; ".join(f"{row['pair']}: rank correlation {row['rank correlation']:.3f}" for row in rows)
        + f" (95 % interval of the first {first['low']:.3f} to {first['high']:.3f}).",
        value=first["rank correlation"],
        interval=(first["low"], first["high"]),
        table=rows,
        seeds=size.splits,
    )


CLAIMS: tuple[Claim, ...] = (
    Claim(
        name="half-of-the-data",
        statement="Trained for the same number of steps on the half of the digits with the largest EL2N, networks are as "
        "good as on all digits, and better than on a random half.",
        threshold="Held if the 95 % interval of the difference of test accuracies, paired by split, lies above -0.5 "
        "points to all and above 0 to the random half; not held if either lies below.",
        expected="half of CIFAR-10 can be dropped with slightly better accuracy",
        run=_half,
    ),
    Claim(
        name="reversal",
        statement="With 30 % left the order reverses: networks trained on the largest EL2N are worse than on a random "
        "choice.",
        threshold="Held if the 95 % interval of the difference of test accuracies, paired by split, lies below 0; not "
        "held if it lies above 0.",
        expected="the paper shows losses at high pruning; that hard examples alone are too little is known from others",
        run=_reversal,
    ),
    Claim(
        name="offset-on-clean-labels",
        statement="Where labels are right, leaving out the hardest 5 % before keeping the hardest half costs accuracy.",
        threshold="Held if the 95 % interval of the difference of test accuracies, paired by split, lies below 0; not "
        "held if it lies above 0.",
        expected="the paper finds that leaving out the very hardest helps",
        run=_offset_clean,
    ),
    Claim(
        name="offset-on-wrong-labels",
        statement="With 10 % of the labels wrong, leaving out the hardest 10 % before keeping the hardest half gains "
        "accuracy.",
        threshold="Held if the 95 % interval of the difference of test accuracies, paired by split, lies above 0; not "
        "held if it lies below 0.",
        expected="leaving out the top few per cent helps under label noise",
        run=_offset_noisy,
    ),
    Claim(
        name="finds-wrong-labels",
        statement="EL2N early in training, the mean of ten runs, tells wrong labels (10 % of them) from right ones.",
        threshold="Held if the 95 % interval of the area under the ROC curve, over splits, lies above 0.95; not held if "
        "it lies below.",
        expected="high scores point at label noise",
        run=_noise,
    ),
    Claim(
        name="scores-agree",
        statement="EL2N ranks examples as GraNd does, and one run ranks them as the mean of ten does.",
        threshold="Held if the 95 % intervals of both of Spearman's correlations, over splits, lie above 0.9; not held "
        "if either lies below.",
        expected="EL2N is GraNd where the logits' gradients are orthogonal and equally long",
        run=_agreement,
    ),
    Claim(
        name="scores-at-the-start",
        statement="GraNd of untrained networks already shows which half to keep: as good as all, and better than a "
        "random half.",
        threshold="Held if the 95 % interval of the difference of test accuracies, paired by split, lies above -0.5 "
        "points to all and above 0 to the random half; not held if either lies below.",
        expected="claimed by the paper, not reproduced by arXiv 2303.14753",
        run=_start,
    ),
)
