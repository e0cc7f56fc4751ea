"""Weights held within a distance of orthogonality."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from weightlab.linalg import relaxed_polar_factor
from weightlab.linalg.relaxed_polar import RelaxedPolarMethod


class RelaxedOrthogonal(nn.Module):
    """The parametrization that `relaxed_orthogonal` registers: a matrix to one within the tolerance.

    Args:
        tol: As there.
        relative: As there.
        method: As there.

    Shape:
        - Input: `(..., m, n)`.
        - Output: The same, of the same dtype.
    """

    def __init__(self, tol: float, relative: bool = False, method: RelaxedPolarMethod = "svd") -> None:
        super().__init__()
        if not tol >= 0:
            raise ValueError(f"tol must be at least 0, got {tol}")
        if method not in ("svd", "polar"):
            raise ValueError(f'method must be "svd" or "polar", got {method!r}')
        self.tol, self.relative = tol, relative
        self.method: RelaxedPolarMethod = method

    def forward(self, X: Tensor) -> Tensor:
        """Bring a matrix within the tolerance."""
        tol = self.tol * min(X.shape[-2:]) ** 0.5 if self.relative else self.tol
        return relaxed_polar_factor(X, tol, method=self.method).to(X.dtype)

    @torch.no_grad()
    def right_inverse(self, W: Tensor) -> Tensor:
        """What is stored for an assigned W: the matrix within the tolerance that W is brought to."""
        return self.forward(W)

    def extra_repr(self) -> str:
        """Settings, for `print`."""
        return f"tol={self.tol:g}, relative={self.relative}, method={self.method!r}"


def relaxed_orthogonal(
    module: nn.Module,
    name: str = "weight",
    *,
    tol: float,
    relative: bool = False,
    method: RelaxedPolarMethod = "svd",
) -> nn.Module:
    r"""Hold a module's weight within a distance of orthogonality, by a parametrization.

    Whatever the optimizer makes of the matrix stored underneath, the weight that the module computes with has
    :math:`\|WW^\top - I\|_F \le \mathrm{tol}` (of the short side), with the same singular vectors: squared singular values
    become :math:`1 + c\,(\sigma^2 - 1)`, :math:`c = \min(1, \mathrm{tol}/D)`. There is no penalty whose weight would have to be
    tuned. `tol=0` gives the polar factor, a strictly orthogonal weight; within the tolerance, nothing changes.

    At once the weight itself is brought within the tolerance, and so is one that is assigned later.
    `torch.nn.utils.parametrize.remove_parametrizations(module, name)` leaves a plain parameter with the values at the time.

    Args:
        module: Has the weight, of shape `(..., m, n)`.
        name: The weight's name. Default `"weight"`.
        tol: λ, at least 0. `math.inf` for no limit.
        relative: Whether `tol` is given for a direction: then `tol·√min(m, n)` is the tolerance. Default False.
        method: How the decomposition is done, `"svd"` (default) or `"polar"`; see `weightlab.linalg.relaxed_polar_factor`.

    Returns:
        `module`.

    Raises:
        TypeError: If the weight is not of real floating-point type.
        ValueError: If there is no such weight, it is no matrix or the kernel of a convolution, `tol` is below 0 or the
            method is unknown.

    Complexity:
        One decomposition each time that the weight is read, cubic in the short side; within the tolerance and on a CPU, one
        Gram matrix. Read it once for several uses by `torch.nn.utils.parametrize.cached()`.

    Reference:
        "λ-Orthogonality Regularization for Compatible Representation Learning", arXiv 2509.16664: the tolerance. As a
        constraint instead of a penalty it is derived here.

    Example:
        >>> layer = relaxed_orthogonal(nn.Linear(6, 6), tol=0.2)
        >>> with torch.no_grad():
        ...     _ = layer.parametrizations.weight.original.mul_(3)
        >>> bool(torch.linalg.matrix_norm(layer.weight @ layer.weight.T - torch.eye(6)) <= 0.2001)
        True
    """
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor):
        raise ValueError(f"{type(module).__name__} has no tensor {name!r}")
    if weight.ndim < 2:
        raise ValueError(f"{name} must be a matrix, got shape {tuple(weight.shape)}")
    if isinstance(module, nn.modules.conv._ConvNd):
        raise ValueError(
            f"{name} is the kernel of a convolution, and an orthogonal kernel is no orthogonal convolution; "
            "parametrize a layer that is one matrix"
        )
    parametrize.register_parametrization(module, name, RelaxedOrthogonal(tol, relative, method))
    return module
