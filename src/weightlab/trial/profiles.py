"""Performance profiles: several tasks' times to target in one picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from weightlab.exceptions import UsageError
from weightlab.trial.result import Profile


def performance_profile(
    times: Mapping[str, Sequence[float | None]], tasks: Sequence[str], max_tau: float = 4.0
) -> Profile:
    """Build the performance profile of arms over tasks, as AlgoPerf scores training algorithms.

    The ratio r of an arm on a task is its time over the best arm's time there, infinite where it does
    not reach the target. Its profile at tau is the share of tasks with r <= tau; its score is the area
    under the profile over [1, max_tau], divided by max_tau - 1. An arm that is fastest on every task
    scores 1, one that is never within `max_tau` times the best scores 0. A task that no arm solves
    counts against all.

    References: Dolan and Moré, "Benchmarking Optimization Software with Performance Profiles"
    (arXiv:cs/0102001); Dahl et al., "Benchmarking Neural Network Training Algorithms"
    (arXiv:2306.07179), whose max_tau is 4.

    Args:
        times: Arm name -> median seconds to target, one a task in the order of `tasks`; `None` where
            the target is not reached.
        tasks: Names of the tasks.
        max_tau: Largest ratio looked at, > 1.

    Returns:
        The profile. It is piecewise constant: `fractions[arm][i]` holds from `taus[i]` until
        `taus[i + 1]`. `taus` are 1, every ratio up to `max_tau`, and `max_tau`.

    Raises:
        UsageError: When there are no tasks, an arm's times do not match them, a time is negative or
            NaN, or `max_tau` is not above 1.

    Example:
        >>> profile = performance_profile({"a": [1.0, 3.0], "b": [2.0, None]}, ["x", "y"], max_tau=3.0)
        >>> profile.taus, profile.fractions["b"], profile.scores
        ((1.0, 2.0, 3.0), (0.0, 0.5, 0.5), {'a': 1.0, 'b': 0.25})
    """
    if not (math.isfinite(max_tau) and max_tau > 1):
        raise UsageError(f"max_tau must be a number above 1, not {max_tau}")
    if not tasks:
        raise UsageError("a performance profile needs at least one task")
    seconds = {name: _seconds(name, arm, len(tasks)) for name, arm in times.items()}
    best = [min((arm[task] for arm in seconds.values()), default=math.inf) for task in range(len(tasks))]
    ratios = {
        name: [_ratio(time, fastest) for time, fastest in zip(arm, best, strict=True)]
        for name, arm in seconds.items()
    }
    taus = sorted({1.0, max_tau, *(r for arm in ratios.values() for r in arm if r <= max_tau)})
    return Profile(
        tasks=tuple(tasks),
        times={name: tuple(arm) for name, arm in times.items()},
        taus=tuple(taus),
        fractions={
            name: tuple(sum(r <= tau for r in arm) / len(tasks) for tau in taus)
            for name, arm in ratios.items()
        },
        scores={
            name: sum(max(0.0, max_tau - r) for r in arm) / (max_tau - 1) / len(tasks)
            for name, arm in ratios.items()
        },
    )


def _seconds(name: str, times: Sequence[float | None], tasks: int) -> list[float]:
    if len(times) != tasks:
        raise UsageError(f"arm {name!r} has {len(times)} times for {tasks} tasks; give one a task, or None")
    seconds = [math.inf if time is None else time for time in times]
    for time in seconds:
        if not time >= 0:
            raise UsageError(f"arm {name!r} has the time {time}; times are seconds >= 0, or None")
    return seconds


def _ratio(time: float, fastest: float) -> float:
    if math.isinf(time):
        return math.inf
    if time == fastest:
        return 1.0
    return time / fastest if fastest > 0 else math.inf
