"""Which way of evaluating the polynomials of the matrix sign is the fastest for a shape."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from weightlab.linalg import symmetric_products
from weightlab.linalg.coefficients import Triple

Method = Literal["direct", "symmetric", "gram"]
METHODS: tuple[Method, ...] = ("direct", "symmetric", "gram")

_LONGEST_SEGMENT = 5
_STEEP = 6.0


@dataclass(frozen=True)
class _Machine:
    """What other things cost in flops of a matrix product, roughly.

    Attributes:
        call: A call of an operator, in flops for the whole batch.
        entry: An entry of a matrix read and written by an elementwise operator.
    """

    call: float
    entry: float


_MACHINES = {"cpu": _Machine(call=4e5, entry=80.0), "cuda": _Machine(call=2e9, entry=1000.0)}


def choose_method(
    m: int,
    n: int,
    schedule: Sequence[Triple],
    dtype: torch.dtype,
    device: torch.device,
    batch: int = 1,
) -> Method:
    """Name the method with the least cost by the flops of each and the measured price of a symmetric product.

    Args:
        m: The shorter side.
        n: The longer side.
        schedule: The triple of each step.
        dtype: Type of the products.
        device: Where they are done. Devices other than CPU and CUDA count as CUDA.
        batch: Number of matrices.

    Example:
        >>> steps = ((3.4445, -4.7750, 2.0315),) * 5
        >>> choose_method(64, 64, steps, torch.float32, torch.device("cpu"))
        'direct'
        >>> choose_method(768, 3072, steps, torch.float32, torch.device("cpu"))
        'gram'
    """
    costs = {name: method_cost(name, m, n, schedule, dtype, device, batch) for name in METHODS}
    return min(METHODS, key=costs.__getitem__)


def method_cost(
    method: Method,
    m: int,
    n: int,
    schedule: Sequence[Triple],
    dtype: torch.dtype,
    device: torch.device,
    batch: int = 1,
) -> float:
    """Cost of a method in flops of a plain matrix product; arguments as in `choose_method`.

    For `"direct"` at K steps it is `K·(4·m²·n + 2·m³)` a matrix, plus the calls.

    Example:
        >>> steps = ((3.4445, -4.7750, 2.0315),) * 5
        >>> cost = method_cost("direct", 1024, 1024, steps, torch.float32, torch.device("cpu"))
        >>> round(cost / (5 * 6 * 1024**3), 2)
        1.0
    """
    machine = _MACHINES.get(device.type, _MACHINES["cuda"])
    half = 1.0 if method == "direct" else symmetric_products.relative_cost(m, dtype, device)
    wide, square = 2.0 * m * m * n, 2.0 * m**3
    flops, calls, passes = 0.0, 0.0, 0.0
    if method == "gram":
        for segment in gram_segments(schedule, dtype):
            steps = len(segment)
            # A = XXᵀ and the last X; of each step A² and, but for the last, two products to carry A on;
            # one product a step after the first to carry P on.
            squares = steps + 2 * (steps - 1) + (steps - 1)
            flops += half * (wide + squares * square) + wide
            calls += 2 + 14 * squares
            # Strips are still in the cache when the other terms are added; whole batches are not.
            passes += (1 if half < 1 and device.type == "cpu" else 5) * squares * m * m + m * n
    else:
        for _, _, c in schedule:
            flops += half * wide + (half * square if c else 0.0) + wide
            calls += 3
            if method == "symmetric":
                passes += m * m
                calls += 1
    return batch * (flops + machine.entry * passes) + machine.call * calls


def gram_segments(schedule: Sequence[Triple], dtype: torch.dtype) -> Iterator[tuple[Triple, ...]]:
    """Cut the steps where the Gram form starts afresh from X, for a spectrum that nothing is known about.

    Example:
        >>> muon = (3.4445, -4.7750, 2.0315)
        >>> [len(s) for s in gram_segments((muon,) * 5, torch.bfloat16)]
        [2, 2, 1]
        >>> [len(s) for s in gram_segments((muon,) * 5, torch.float32)]
        [3, 2]
    """
    rest = tuple(schedule)
    while rest:
        length = gram_segment_length(rest, dtype)
        yield rest[:length]
        rest = rest[length:]


def is_steep(schedule: Sequence[Triple]) -> bool:
    """Whether a step multiplies small singular values so much that half precision asks for care."""
    return any(a > _STEEP for a, _, _ in schedule)


def gram_segment_length(schedule: Sequence[Triple], dtype: torch.dtype, spread: float | None = None) -> int:
    """How many of the steps ahead the Gram form may take before it starts afresh from X.

    Rounding of `A = X Xᵀ` leaves eigenvalues off by about the unit roundoff u of the largest, some below
    zero. A singular value near zero grows by `a` each step, and these grow by `a²`, without X itself to
    correct them. Spectra that do not spread allow more steps, because few eigenvalues are small.

    - float32 and float64: as long as `u·Π a²`, over all steps of the segment but the last, is below 2e-5, or
      2e-3 with a spread below 10.
    - Half precision: two steps; three with a spread below 2, five with one below 0.55. A step as steep as
      the first ones of Polar Express and CANS, a above 6, is one by itself. Give no spread for
      schedules that hold one.

    Never more than five.

    Args:
        schedule: The triples of the steps ahead.
        dtype: Type of the products.
        spread: Variance of the eigenvalues of A over their squared mean. Of a Gaussian m×n matrix it is m/n.

    Example:
        >>> gram_segment_length([(3.4445, -4.7750, 2.0315)] * 5, torch.bfloat16, spread=0.25)
        5
    """
    longest = min(_LONGEST_SEGMENT, len(schedule))
    if torch.finfo(dtype).bits < 32:
        if is_steep(schedule[:1]):
            return 1
        if spread is not None and spread < 0.55:
            return longest
        return min(3 if spread is not None and spread < 2 else 2, longest)
    limit = 2e-3 if spread is not None and spread < 10 else 2e-5
    growth = torch.finfo(dtype).eps / 2
    for length in range(1, longest):
        growth *= schedule[length - 1][0] ** 2
        if growth > limit:
            return length
    return longest
