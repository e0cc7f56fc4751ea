"""Maps between spaces of paired embeddings, trained by gradients: where a loss or a penalty has no closed form."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from weightlab.linalg import relaxed_polar_factor


class Maps(NamedTuple):
    """A map of new embeddings to the old space, and perhaps one of old embeddings to where it takes them.

    Attributes:
        W: `(..., d_h, d_z)`.
        b: `(..., d_h)`, or None.
        V: `(..., d_h, d_h)`, or None.
        c: `(..., d_h)`, or None.
    """

    W: Tensor
    b: Tensor | None = None
    V: Tensor | None = None
    c: Tensor | None = None


class LossWeights(NamedTuple):
    """What maps are fitted to.

    Attributes:
        backward: Weight of the mean of `‖B(z) − h‖²`. Default 1.
        forward: Weight of the mean of `‖F(h) − B(z)‖²` in fitting B. Default 0: F is fitted to B and B not to F.
        contrastive: Weight of the supervised contrastive loss, which needs labels. Default 0.
        penalty: Weight of the penalty, where one is used. Default 10.
    """

    backward: float = 1.0
    forward: float = 0.0
    contrastive: float = 0.0
    penalty: float = 10.0


def apply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Rows `(..., n, d)` mapped."""
    y = x @ weight.mT
    return y if bias is None else y + bias.unsqueeze(-2)


def contrastive_loss(
    anchors: Tensor,
    keys: Tensor,
    anchor_labels: Tensor,
    key_labels: Tensor,
    temperature: float = 0.1,
    *,
    own: bool = False,
) -> Tensor:
    r"""Supervised contrastive loss by cosine: each anchor is to be closer to keys of its class than to others.

    For an anchor, the mean over the keys of its class of `−log softmax(cos / temperature)`.

    Args:
        anchors: `(..., a, d)`.
        keys: `(..., k, d)`.
        anchor_labels: `(..., a)`, integers of at least 0.
        key_labels: `(..., k)`.
        temperature: Default 0.1.
        own: Whether the first keys are the anchors, each of which is then no key of its own. Default False.

    Returns:
        `(...)`, the mean over anchors that have a key of their class.

    Complexity:
        `O(a·k·d)`.
    """
    anchors, keys = F.normalize(anchors, dim=-1), F.normalize(keys, dim=-1)
    logits = anchors @ keys.mT / temperature
    # Sums over the keys of a class stand in for the mask of all pairs.
    classes = F.one_hot(key_labels, int(torch.maximum(anchor_labels.max(), key_labels.max())) + 1).to(keys)
    sums, counts = classes.mT @ keys, classes.sum(-2)
    index = anchor_labels.unsqueeze(-1).expand(anchors.shape)
    towards = (anchors * sums.gather(-2, index)).sum(-1) / temperature
    counts = counts.gather(-1, anchor_labels)
    if own:
        diagonal = logits.diagonal(dim1=-2, dim2=-1)
        towards, counts = towards - diagonal, counts - 1
        diagonal = torch.full_like(diagonal, -torch.inf)
        logits = logits.diagonal_scatter(diagonal, dim1=-2, dim2=-1)
    each = torch.where(counts > 0, logits.logsumexp(-1) - towards / counts.clamp_min(1), 0)
    return each.sum(-1) / (counts > 0).sum(-1).clamp_min(1)


def train(
    z: Tensor,
    h: Tensor,
    start: Maps,
    *,
    labels: Tensor | None = None,
    weights: LossWeights,
    temperature: float = 0.1,
    penalty: Callable[[Tensor], Tensor] | None = None,
    tol: float = math.inf,
    steps: int = 600,
    lr: float | Tensor = 3e-3,
    batch_size: int = 512,
    generator: torch.Generator | None = None,
) -> Maps:
    """Train maps by Adam on batches of pairs, the learning rate decaying to 0 along a cosine.

    Leading dimensions are problems of their own, which share the choice of rows and nothing else.

    Args:
        z: New embeddings `(..., n, d_z)`.
        h: Old ones `(..., n, d_h)`.
        start: Where to start. V is trained only where `weights.forward` is not 0.
        labels: `(..., n)`, for the contrastive loss.
        weights: See `LossWeights`.
        temperature: Of the contrastive loss.
        penalty: A function of W, `(...)`.
        tol: After each step W is brought within this distance of orthogonality.
        steps: Steps of Adam.
        lr: Learning rate, one or one for each problem.
        batch_size: Pairs in a batch, drawn with replacement; all of them where there are fewer.
        generator: Draws the batches.

    Returns:
        The maps, without history.
    """
    joint = weights.forward != 0 and start.V is not None
    moving = [p.clone().requires_grad_() for p in (start.W, start.b) if p is not None]
    maps = Maps(moving[0], moving[1] if start.b is not None else None)
    if joint:
        lifted = [p.clone().requires_grad_() for p in (start.V, start.c) if p is not None]
        maps = maps._replace(V=lifted[0], c=lifted[1] if start.c is not None else None)
        moving += lifted
    # Adam's steps are linear in the learning rate, so one optimizer serves problems of different ones by scaled steps.
    optimizer = torch.optim.Adam(moving, lr=1.0)
    rates = torch.as_tensor(lr, dtype=z.dtype, device=z.device)
    n = z.size(-2)
    for step in range(steps):
        if n > batch_size:
            rows = torch.randint(n, (batch_size,), generator=generator).to(z.device)
            batch = z[..., rows, :], h[..., rows, :], None if labels is None else labels[..., rows]
        else:
            batch = z, h, labels
        loss = _loss(*batch, maps, weights, temperature)
        if penalty is not None:
            loss = loss + weights.penalty * penalty(maps.W)
        optimizer.zero_grad()
        loss.sum().backward()
        before = [p.detach().clone() for p in moving]
        optimizer.step()
        with torch.no_grad():
            now = rates * (1 + math.cos(math.pi * step / steps)) / 2
            for p, old in zip(moving, before, strict=True):
                scale = now.reshape(now.shape + (1,) * (p.ndim - now.ndim)) if now.ndim else now
                p.copy_(old + scale * (p - old))
            if not math.isinf(tol):
                maps.W.copy_(relaxed_polar_factor(maps.W, tol))
    b, V, c = (None if p is None else p.detach() for p in maps[1:])
    return Maps(maps.W.detach(), b, V, c)


def _loss(
    z: Tensor, h: Tensor, labels: Tensor | None, maps: Maps, weights: LossWeights, temperature: float
) -> Tensor:
    mapped = apply(z, maps.W, maps.b)
    loss = weights.backward * (mapped - h).square().sum(-1).mean(-1)
    moved = [mapped]
    if maps.V is not None:
        lifted = apply(h, maps.V, maps.c)
        loss = loss + weights.forward * (lifted - mapped).square().sum(-1).mean(-1)
        moved.append(lifted)
    if labels is not None and weights.contrastive:
        anchors = torch.cat(moved, -2)
        classes = torch.cat([labels] * (len(moved) + 1), -1)
        loss = loss + weights.contrastive * contrastive_loss(
            anchors,
            torch.cat([anchors, h], -2),
            classes[..., : anchors.size(-2)],
            classes,
            temperature,
            own=True,
        )
    return loss
