"""Coefficients of odd quintic polynomials that drive singular values towards one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class CoefficientSet:
    """Polynomials `a·s + b·s³ + c·s⁵` to apply one after another to singular values in [0, 1].

    Attributes:
        triples: `(a, b, c)` of each step. A single triple is used at every step.
        steps: Steps taken unless the caller asks for another number.
        safety: The matrix is divided by `safety · ‖X‖_F` first; above 1 where the polynomials
            diverge just beyond 1 and rounding must not carry a singular value there.
        source: Where the numbers come from.
        by_shape: `((rows, columns), triples)` pairs, rows ≤ columns, for a set fitted to several shapes.
            A matrix of another shape takes those of the nearest aspect ratio, by its logarithm:
            the spread of a random matrix's singular values is a matter of the ratio, and hardly of the
            size.
    """

    triples: tuple[Triple, ...]
    steps: int
    safety: float = 1.0
    source: str = ""
    by_shape: tuple[tuple[tuple[int, int], tuple[Triple, ...]], ...] = ()

    def schedule(self, steps: int | None = None, shape: tuple[int, int] | None = None) -> tuple[Triple, ...]:
        """Return the triple of each step.

        Args:
            steps: Number of steps; `None` for the set's own.
            shape: `(rows, columns)` of the matrix in either order, for a set with `by_shape`. Without
                it, `triples` are used.

        Raises:
            ValueError: If `steps` is below 1, or beyond the steps that the set is fitted for.

        Example:
            >>> len(COEFFICIENTS["muon"].schedule()), len(COEFFICIENTS["cans"].schedule(3))
            (5, 3)
            >>> COEFFICIENTS["root"].schedule(1, shape=(3072, 768))
            ((2.9794, -3.6674, 1.6207),)
        """
        steps = self.steps if steps is None else steps
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        triples = self._of_shape(shape)
        if len(triples) == 1:
            return triples * steps
        if steps > len(triples):
            raise ValueError(
                f"steps={steps} is more than the {len(triples)} triples that the coefficients hold; "
                "ask for fewer steps, or give one triple, which is used at every step"
            )
        return triples[:steps]

    def _of_shape(self, shape: tuple[int, int] | None) -> tuple[Triple, ...]:
        if not self.by_shape or shape is None or min(shape) < 1:
            return self.triples
        shape = (min(shape), max(shape))
        best, nearest = self.triples, math.inf
        for (rows, columns), triples in self.by_shape:
            if (rows, columns) == shape:
                return triples
            distance = abs(math.log(shape[1] / shape[0]) - math.log(columns / rows))
            if distance < nearest:
                best, nearest = triples, distance
        return best


COEFFICIENTS: dict[str, CoefficientSet] = {
    "muon": CoefficientSet(
        triples=((3.4445, -4.7750, 2.0315),),
        steps=5,
        source="Muon: An optimizer for hidden layers in neural networks (K. Jordan, 2024); torch.optim.Muon. "
        "Steep at zero, does not converge: singular values end up between about 0.7 and 1.2.",
    ),
    "polar_express": CoefficientSet(
        triples=(
            (8.15655, -22.48329, 15.87877),
            (4.04293, -2.80892, 0.50002),
            (3.89167, -2.77248, 0.50606),
            (3.28575, -2.36813, 0.46449),
            (2.34654, -1.70978, 0.42324),
        ),
        steps=5,
        safety=1.02,
        source="The Polar Express: Optimal Matrix Sign Methods and Their Application to the Muon Algorithm, "
        "arXiv 2505.16932; five steps, safety 2e-2, cushion 2.",
    ),
    "cans": CoefficientSet(
        triples=(
            (8.4703, -25.1081, 18.6293),
            (4.1828, -3.1087, 0.5806),
            (3.9619, -2.9541, 0.5630),
            (3.2866, -2.4647, 0.5074),
            (2.2737, -1.6447, 0.4162),
        ),
        steps=5,
        source="Accelerating Newton-Schulz Iteration for Orthogonalization via Chebyshev-type Polynomials, "
        "arXiv 2506.10935.",
    ),
    "quintic": CoefficientSet(
        triples=(
            (4.0848, -6.8946, 2.9270),
            (3.9505, -6.3029, 2.6377),
            (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012),
        ),
        steps=5,
        source="Squeezing 1-2% Efficiency Gains Out of Muon by Optimizing the Newton-Schulz Coefficients "
        "(F. L. Cesista, You J., K. Jordan, 2025).",
    ),
    "root": CoefficientSet(
        triples=((3.4445, -4.7750, 2.0315),),
        steps=5,
        by_shape=(
            ((2048, 2048), ((3.4916, -4.8224, 2.1095),)),
            ((2048, 3072), ((3.4509, -4.5790, 1.9325),)),
            ((2048, 8192), ((2.9794, -3.6674, 1.6207),)),
            ((2048, 16384), ((3.1943, -3.8221, 1.5322),)),
        ),
        source="ROOT: Robust Orthogonalized Optimizer for Neural Network Training, arXiv 2511.20626, official code; "
        "one triple a shape, fitted to momentum mixed with random matrices. The official code takes Muon's "
        "triple for other shapes, here it is the fitted one of the nearest aspect ratio.",
    ),
    "classic": CoefficientSet(
        triples=((15 / 8, -10 / 8, 3 / 8),),
        steps=12,
        source="Newton-Schulz of order five: the Taylor polynomial of x·(x²)^(-1/2) at x = 1; converges cubically.",
    ),
    "cubic": CoefficientSet(
        triples=((1.5, -0.5, 0.0),),
        steps=20,
        source="Newton-Schulz of order three; converges quadratically.",
    ),
}
"""Named coefficient sets, as `newton_schulz(X, coefficients=name)` takes them."""


def resolve_coefficients(
    coefficients: str | CoefficientSet | Sequence[Sequence[float]],
) -> CoefficientSet:
    """Turn whatever a caller may give for `coefficients` into a `CoefficientSet`.

    Args:
        coefficients: A key of `COEFFICIENTS`, a `CoefficientSet`, or a sequence of `(a, b, c)`.

    Raises:
        ValueError: If the name is unknown, the sequence empty, or an entry not three numbers.

    Example:
        >>> resolve_coefficients([(1.5, -0.5, 0.0)]).steps
        1
    """
    if isinstance(coefficients, CoefficientSet):
        return coefficients
    if isinstance(coefficients, str):
        if coefficients not in COEFFICIENTS:
            raise ValueError(
                f"unknown coefficients {coefficients!r}; known are {', '.join(sorted(COEFFICIENTS))}, "
                "or give a list of (a, b, c)"
            )
        return COEFFICIENTS[coefficients]
    triples = [tuple(triple) if isinstance(triple, Sequence) else triple for triple in coefficients]
    for triple in triples:
        if not isinstance(triple, tuple) or len(triple) != 3:
            raise ValueError(f"coefficients must be (a, b, c) triples, got {triple!r} among them")
    if not triples:
        raise ValueError("coefficients must hold at least one (a, b, c), got an empty sequence")
    return CoefficientSet(triples=tuple(cast("list[Triple]", triples)), steps=len(triples))
