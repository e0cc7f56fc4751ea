"""How hard one example is for a classifier, from its logits and its label."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def el2n(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the norm of the error vector, ‖softmax(z) − onehot(y)‖₂.

    Computed from the classes but y, as √(Σ p_k² + (Σ p_k)²), so that examples which are learned to the last digit still
    differ, instead of all being rounded to 0.

    Args:
        logits: Floating `(..., K)`; half precision is computed in float32.
        targets: Classes, integers in `[0, K)`, whose shape broadcasts to `(...)`; e.g. `(N,)` for logits `(runs, N, K)`.

    Returns:
        `(...)`, between 0 and √2, differentiable in the logits.

    Raises:
        TypeError: If the logits are not floating or the targets not integers.
        ValueError: If there are fewer than two classes, the shapes do not fit, or a target is out of range.

    Complexity:
        O(K) an example.

    References:
        Deep Learning on a Data Diet: Finding Important Examples Early in Training, arXiv 2107.07075.

    Example:
        >>> el2n(torch.zeros(2, 4), torch.tensor([0, 3])) == 0.75**0.5
        tensor([True, True])
    """
    _, others = _split(_upcast(logits).softmax(-1), check_targets(logits, targets))
    others = others.clamp(min=0)
    total = others.sum(-1)
    # Squares of small probabilities would underflow; those of their shares do not.
    shares = others / total.clamp(min=torch.finfo(total.dtype).tiny)[..., None]
    return total * (1 + shares.square().sum(-1)).sqrt()


def prediction_margin(logits: Tensor, targets: Tensor) -> Tensor:
    """Return how far the likeliest other class is ahead of the label, max_{k≠y} p_k − p_y, p = softmax(z).

    Positive where the example is classified wrongly. The sign is that of the paper's official code: the larger, the
    harder.

    Args:
        logits: As for [`el2n`][weightlab.inspect.el2n].
        targets: As there.

    Returns:
        `(...)`, between −1 and 1.

    Raises:
        TypeError: As there.
        ValueError: As there.

    Example:
        >>> prediction_margin(torch.tensor([[9.0, 0.0, 0.0]]).log(), torch.tensor([1]))
        tensor([1.])
    """
    own, others = _split(_upcast(logits).softmax(-1), check_targets(logits, targets))
    return others.amax(-1) - own


def logit_margin(logits: Tensor, targets: Tensor) -> Tensor:
    """Return how far the label is ahead of the best other class, z_y − max_{k≠y} z_k.

    Its mean over training is the [area under the margin][weightlab.inspect.AreaUnderMargin]. Mind the sign: the
    smaller, the harder.

    Args:
        logits: As for [`el2n`][weightlab.inspect.el2n].
        targets: As there.

    Returns:
        `(...)`.

    Raises:
        TypeError: As there.
        ValueError: As there.

    Example:
        >>> logit_margin(torch.tensor([[2.0, 5.0, 1.0]]), torch.tensor([0]))
        tensor([-3.])
    """
    own, others = _split(_upcast(logits), check_targets(logits, targets))
    return own - others.amax(-1)


def example_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of each example in nats, −ln p_y.

    Args:
        logits: As for [`el2n`][weightlab.inspect.el2n].
        targets: As there.

    Returns:
        `(...)`.

    Raises:
        TypeError: As there.
        ValueError: As there.

    Example:
        >>> example_loss(torch.zeros(1, 4), torch.tensor([2])).exp()
        tensor([4.])
    """
    targets = check_targets(logits, targets)
    return F.cross_entropy(
        _upcast(logits).movedim(-1, 1) if logits.ndim > 1 else _upcast(logits), targets, reduction="none"
    )


def check_targets(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the targets as int64 in the shape of the logits' leading dimensions, or say what is wrong with them."""
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating, got {logits.dtype}")
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise TypeError(f"targets must be integer classes, got {targets.dtype}")
    if logits.ndim == 0 or logits.shape[-1] < 2:
        raise ValueError(
            f"logits must end in a dimension of at least 2 classes, got shape {tuple(logits.shape)}"
        )
    try:
        targets = targets.long().expand(logits.shape[:-1])
    except RuntimeError:
        raise ValueError(
            f"targets must have, or broadcast to, shape {tuple(logits.shape[:-1])}, got {tuple(targets.shape)}"
        ) from None
    if not torch.compiler.is_compiling():
        wrong = (targets < 0) | (targets >= logits.shape[-1])
        if bool(wrong.any()):
            raise ValueError(f"targets must be in [0, {logits.shape[-1]}), got {int(targets[wrong][0])}")
    return targets


def _upcast(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _split(values: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Part the label's value from the others', in whose place the label has -inf."""
    own = values.gather(-1, targets[..., None])
    return own.squeeze(-1), values.scatter(-1, targets[..., None], -torch.inf)
