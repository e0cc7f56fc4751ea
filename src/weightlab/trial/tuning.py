"""Search spaces: quasi-random points for every arm, and what to say when the best one sits at an edge."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from weightlab._lazy import require
from weightlab.exceptions import UsageError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

    from weightlab.trial.spec import Scalar

EDGE = 0.1


def sample(space: Mapping[str, BaseDistribution], n: int, seed: int = 0) -> list[dict[str, Scalar]]:
    """Draw `n` quasi-random points of a search space: a scrambled Sobol sequence (Optuna's QMCSampler).

    The sequence lives in the unit cube of the space's free dimensions, sorted by name, and depends on
    their number and `seed` alone: arms with equally many free dimensions try the same points of the
    cube, each mapped to its own ranges (logarithmically where the distribution says so). A longer
    sample begins with the shorter one.

    Args:
        space: Name -> Optuna distribution: float or integer, linear, log or stepped, or categorical. A
            distribution of a single value takes no dimension.
        n: Points.
        seed: Seeds the scrambling.

    Returns:
        `n` mappings with plain Python values. A space without a free dimension has only one point, so
        that one is returned once, however many were asked for.

    Raises:
        UsageError: When `n` is negative.
        MissingDependencyError: When Optuna is not installed.

    Complexity:
        O(n^2) steps of the Sobol generator, which is nothing for the hundreds a trial can afford.

    Example:
        >>> from optuna.distributions import FloatDistribution
        >>> space = {"lr": FloatDistribution(1e-4, 1e-1, log=True)}
        >>> len(sample(space, 4)), sample(space, 4)[:2] == sample(space, 2)
        (4, True)
        >>> sample({}, 4)
        [{}]
    """
    if n < 0:
        raise UsageError(f"the number of tuning points must be 0 or more, not {n}")
    optuna = require("optuna", "trial")
    distributions = optuna.distributions
    free: dict[str, Any] = {name: space[name] for name in sorted(space) if not space[name].single()}
    # Every release of the sampler takes floats, not every one categorical dimensions.
    choices = {
        name: each.choices
        for name, each in free.items()
        if isinstance(each, distributions.CategoricalDistribution)
    }
    cube = free | {name: distributions.FloatDistribution(0.0, 1.0) for name in choices}
    only: dict[str, Any] = {name: space[name] for name in space if name not in free}
    fixed = {name: each.low if hasattr(each, "low") else each.choices[0] for name, each in only.items()}
    if not free:
        return [fixed][:n]
    points = []
    with _quiet(optuna):
        study = optuna.create_study()
        sampler = optuna.samplers.QMCSampler(qmc_type="sobol", scramble=True, seed=seed)
        trial = optuna.trial.create_trial(state=optuna.trial.TrialState.RUNNING)
        for _ in range(n):
            # Asked through a study, the sampler would draw its first point at random. With the space
            # given outright, every point belongs to the sequence.
            drawn = sampler.sample_relative(study, trial, cube)
            for name, values in choices.items():
                drawn[name] = values[min(int(drawn[name] * len(values)), len(values) - 1)]
            points.append({name: fixed.get(name, drawn.get(name)) for name in space})
    return points


def validate_space(arm: str, space: Mapping[str, object]) -> None:
    """Refuse a search space that holds anything but Optuna distributions.

    Raises:
        UsageError: Naming the arm and the hyper-parameter.
        MissingDependencyError: When Optuna is not installed.

    Example:
        >>> validate_space("mine", {"lr": (1e-4, 1e-1)})
        Traceback (most recent call last):
        weightlab.exceptions.UsageError: arm 'mine': search_space['lr'] is (0.0001, 0.1), not an Optuna
        distribution such as FloatDistribution(1e-4, 1e-1, log=True)
    """
    base = require("optuna.distributions", "trial").BaseDistribution
    for name, distribution in space.items():
        if not isinstance(distribution, base):
            raise UsageError(
                f"arm {arm!r}: search_space[{name!r}] is {distribution!r}, not an Optuna distribution "
                "such as FloatDistribution(1e-4, 1e-1, log=True)"
            )


def free_dimensions(space: Mapping[str, BaseDistribution]) -> int:
    """Count the hyper-parameters that a search space leaves open: those with more than one value.

    Example:
        >>> from optuna.distributions import FloatDistribution, IntDistribution
        >>> free_dimensions({"lr": FloatDistribution(0.1, 1.0), "rank": IntDistribution(4, 4)})
        1
    """
    return sum(not distribution.single() for distribution in space.values())


def edges(space: Mapping[str, BaseDistribution], chosen: Mapping[str, Any]) -> list[str]:
    """Name the numeric hyper-parameters whose chosen value lies in the outer 10 % of their range.

    Positions are taken in the range's own scale: logarithmic for a log distribution.

    Args:
        space: The search space.
        chosen: The point chosen by tuning; further entries are ignored.

    Example:
        >>> from optuna.distributions import FloatDistribution
        >>> edges({"lr": FloatDistribution(1e-4, 1e-1, log=True)}, {"lr": 0.08})
        ['lr at its upper edge']
    """
    sides = _sides(space, chosen)
    return [f"{name} at its {'lower' if side < 0 else 'upper'} edge" for name, side in sides.items()]


def widen(space: Mapping[str, BaseDistribution], chosen: Mapping[str, Any]) -> dict[str, BaseDistribution]:
    """Move every edge that `edges` flags outwards by half the range, in the range's own scale.

    A log range stays positive (an integer one at 1 or more), a linear range that is not negative stays
    so, and a linear range within [0, 1] stays within, being a probability or a decay rate. Integers
    and stepped ranges move by whole steps.

    Args:
        space: The search space.
        chosen: The point chosen by tuning.

    Returns:
        A new space with the other distributions as they were.

    Example:
        >>> from optuna.distributions import FloatDistribution
        >>> widen({"lr": FloatDistribution(1e-4, 1e-2, log=True)}, {"lr": 1e-2})
        {'lr': FloatDistribution(high=0.1, log=True, low=0.0001, step=None)}
    """
    return {**space, **{name: _moved(space[name], side) for name, side in _sides(space, chosen).items()}}


def _sides(space: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, int]:
    """Map each flagged hyper-parameter to -1 (lower edge) or 1 (upper edge)."""
    sides = {}
    for name, range_ in space.items():
        if range_.single() or not hasattr(range_, "low"):
            continue
        scale = math.log if range_.log else float
        low, high = scale(range_.low), scale(range_.high)
        position = (scale(chosen[name]) - low) / (high - low)
        if not EDGE < position < 1 - EDGE:
            sides[name] = -1 if position <= EDGE else 1
    return sides


def _moved(range_: Any, side: int) -> BaseDistribution:
    distributions = require("optuna.distributions", "trial")
    integer = isinstance(range_, distributions.IntDistribution)
    old = range_.low if side < 0 else range_.high
    if range_.log:
        reach = abs(old * (range_.high / range_.low) ** (side / 2) - old)
    else:
        reach = (range_.high - range_.low) / 2
    room = math.inf
    if side < 0 and range_.low >= 0:
        room = old - (1 if range_.log and integer else 0)
    elif side > 0 and not (integer or range_.log) and range_.low >= 0 and range_.high <= 1:
        room = 1 - old
    if range_.step:
        # In decimals, because Optuna refuses a range that rounding makes a hair longer than its steps.
        steps = math.floor(min(math.ceil(reach / range_.step - 1e-9), room / range_.step + 1e-9))
        moved = Decimal(str(old)) + side * steps * Decimal(str(range_.step))
        new = int(moved) if integer else float(moved)
    else:
        new = old + side * min(reach, room)
    low, high = (new, range_.high) if side < 0 else (range_.low, new)
    kind = distributions.IntDistribution if integer else distributions.FloatDistribution
    return kind(low, high, log=range_.log, step=range_.step)


@contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    """Keep Optuna from announcing the throw-away study, and from warning that the sampler is experimental."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)
