"""A penalty on weights that are farther from orthogonality than a tolerance."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weightlab.linalg import orthogonality_deviation

Gate = Literal["hinge2", "softplus", "sigmoid"]


class Deviation(NamedTuple):
    """How far weights are from orthogonality, and how many directions that is spread over.

    Attributes:
        value: D, one for each weight of a batch.
        directions: d, so that D/√d is the deviation of a direction in root mean square.
    """

    value: Tensor
    directions: int


Form = Callable[[Tensor], Deviation]


def dense(weight: Tensor) -> Deviation:
    """The deviation of matrices: `‖WWᵀ − I‖_F` of the short side.

    Args:
        weight: `(..., m, n)`.

    Example:
        >>> dense(torch.zeros(4, 9))
        Deviation(value=tensor(2.), directions=4)
    """
    return Deviation(orthogonality_deviation(weight), min(weight.shape[-2:]))


class OrthogonalityPenalty(nn.Module):
    r"""Penalise weights whose Gram matrix lies farther than a tolerance from the identity.

    With :math:`D(W) = \|WW^\top - I\|_F` of the short side and tolerance :math:`\lambda`, the penalty is

    ========== =================================================== ==============================================
    gate       penalty                                             pull
    ========== =================================================== ==============================================
    "hinge2"   :math:`\max(0, D - \lambda)^2`                      none within the tolerance
    "softplus" :math:`\ln(1 + e^{a(D - \lambda)}) / a`             some within it, for a smooth gradient
    "sigmoid"  :math:`\mathrm{sigmoid}(a(D - \lambda)) \cdot D`    the most: the norm itself, gated
    ========== =================================================== ==============================================

    Only the hinge makes λ the point that training arrives at. Smooth gates pull inside the tolerance, too: with a large weight
    on the penalty weights end up orthogonal whatever λ is. `deviations` tells where they are.

    λ bounds what a map does: with :math:`D \le \lambda` all singular values lie in
    :math:`[\sqrt{\max(0, 1 - \lambda)}, \sqrt{1 + \lambda}]`, and inner products change by at most :math:`\lambda \|x\|\|y\|`
    for a W that is square or tall. All gates are the same for W and :math:`Q_1 W Q_2` with orthogonal Q.

    Args:
        tol: λ, at least 0. Default 0: strict orthogonality; D² by the hinge.
        gate: Default `"hinge2"`.
        sharpness: a of the smooth gates, above 0. Default 10.
        relative: Whether λ is given for a direction: then `tol·√d`, with d the length of the short side, is the tolerance.
            Default False.
        form: What D is. Default `"dense"`: that of matrices; or a function from a weight to a `Deviation`, for
            weights that stand for another operator than the matrix they are stored as.

    Shape:
        - Weight: `(..., m, n)`, any floating dtype; Gram matrices are computed in float32 at least.
        - Output: `(...)`, one penalty for each matrix.

    Raises:
        ValueError: If `tol` is below 0, `sharpness` not above 0, or the gate or form is unknown.

    Complexity:
        `2·m²·n` flops a matrix forward, for m ≤ n, and twice that backward.

    Reference:
        "λ-Orthogonality Regularization for Compatible Representation Learning", arXiv 2509.16664. Its text says that
        a smooth threshold relaxes the constraint; that the gate is one of these three, and its sharpness, are inferred.

    Example:
        >>> layer = nn.Linear(4, 4)
        >>> with torch.no_grad():
        ...     _ = layer.weight.copy_(2 * torch.eye(4))
        >>> penalty = OrthogonalityPenalty(tol=0.5, relative=True)  # D is 6, and may be 1
        >>> penalty(layer.weight)
        tensor(25., grad_fn=<PowBackward0>)
        >>> penalty.total(nn.Sequential(layer, nn.ReLU(), nn.Linear(4, 2)), "0.*")
        tensor(25., grad_fn=<SumBackward0>)
    """

    def __init__(
        self,
        tol: float = 0.0,
        gate: Gate = "hinge2",
        sharpness: float = 10.0,
        relative: bool = False,
        form: Literal["dense"] | Form = "dense",
    ) -> None:
        super().__init__()
        if not tol >= 0:
            raise ValueError(f"tol must be at least 0, got {tol}")
        if gate not in get_args(Gate):
            raise ValueError(f"gate must be one of {get_args(Gate)}, got {gate!r}")
        if not sharpness > 0:
            raise ValueError(f"sharpness must be above 0, got {sharpness}")
        if form != "dense" and not callable(form):
            raise ValueError(f'form must be "dense" or a function from a weight to a Deviation, got {form!r}')
        self.tol, self.gate, self.sharpness, self.relative, self.form = tol, gate, sharpness, relative, form

    def forward(self, weight: Tensor) -> Tensor:
        """The penalty of a weight, or of each of a batch."""
        deviation = self.deviation(weight)
        excess = deviation.value - self.tol * (deviation.directions**0.5 if self.relative else 1.0)
        if self.gate == "hinge2":
            return excess.clamp_min(0).square()
        if self.gate == "softplus":
            return F.softplus(self.sharpness * excess) / self.sharpness
        return torch.sigmoid(self.sharpness * excess) * deviation.value

    def deviation(self, weight: Tensor) -> Deviation:
        """The weight's distance from orthogonality, before tolerance and gate."""
        return dense(weight) if self.form == "dense" else self.form(weight)  # pyright: ignore[reportCallIssue]

    def total(
        self, model: nn.Module, include: str | Sequence[str] = "*", exclude: str | Sequence[str] = ()
    ) -> Tensor:
        """The sum over a model's weights; see `find_weights`.

        Raises:
            ValueError: If no weight matches.
        """
        return torch.stack([self(w).sum() for w in self._weights(model, include, exclude).values()]).sum()

    @torch.no_grad()
    def deviations(
        self, model: nn.Module, include: str | Sequence[str] = "*", exclude: str | Sequence[str] = ()
    ) -> dict[str, Tensor]:
        """Each weight's distance from orthogonality, by name.

        Raises:
            ValueError: If no weight matches.
        """
        weights = self._weights(model, include, exclude)
        return {name: self.deviation(weight).value for name, weight in weights.items()}

    def _weights(
        self, model: nn.Module, include: str | Sequence[str], exclude: str | Sequence[str]
    ) -> dict[str, Tensor]:
        return find_weights(model, include, exclude, matrices_only=self.form == "dense")

    def extra_repr(self) -> str:
        """Settings, for `print`."""
        smooth = "" if self.gate == "hinge2" else f", sharpness={self.sharpness:g}"
        return f"tol={self.tol:g}, gate={self.gate!r}{smooth}, relative={self.relative}, form={self.form!r}"


def find_weights(
    model: nn.Module,
    include: str | Sequence[str] = "*",
    exclude: str | Sequence[str] = (),
    *,
    matrices_only: bool = True,
) -> dict[str, Tensor]:
    """A model's weights of two dimensions or more, by name, with their gradients' history where they are parametrized.

    Args:
        model: Where to look. Embeddings are left out: their rows are no map.
        include: A pattern, or several, of names such as `"blocks.*.mlp.*.weight"` (`fnmatch`; `*` matches dots too).
        exclude: Patterns of names to leave out.
        matrices_only: Whether kernels, which have more than two dimensions, are left out. Default True: a kernel
            flattened to a matrix says little about the convolution that it stands for.

    Returns:
        Each tensor once, under its first name.

    Raises:
        ValueError: If nothing is left; the message lists what there is.

    Example:
        >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 2))
        >>> list(find_weights(model)), list(find_weights(model, exclude="2.*"))
        (['1.weight', '2.weight'], ['1.weight'])
    """
    wanted, unwanted = ([p] if isinstance(p, str) else list(p) for p in (include, exclude))
    names: list[str] = []
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, module, attribute in _candidates(model):
        weight = getattr(module, attribute)
        if not isinstance(weight, Tensor) or weight.ndim < 2 or not weight.is_floating_point():
            continue
        if matrices_only and weight.ndim > 2:
            continue
        names.append(name)
        if any(fnmatch.fnmatchcase(name, p) for p in wanted) and not any(
            fnmatch.fnmatchcase(name, p) for p in unwanted
        ):
            if id(weight) not in seen:
                found[name] = weight
            seen.add(id(weight))
    if not found:
        available = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        raise ValueError(
            f"no weight matches include={include!r}, exclude={exclude!r}; there are: {available or 'none'}"
        )
    return found


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    for prefix, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag | nn.utils.parametrize.ParametrizationList):
            continue
        # A parametrization's own parameters are not weights; the tensor that it gives is.
        if ".parametrizations." in f".{prefix}.":
            continue
        attributes = [name for name, _ in module.named_parameters(recurse=False)]
        if nn.utils.parametrize.is_parametrized(module):
            attributes += list(module.parametrizations)  # pyright: ignore[reportArgumentType]
        for attribute in attributes:
            yield f"{prefix}.{attribute}".lstrip("."), module, attribute
