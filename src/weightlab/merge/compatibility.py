"""Making a new embedding model answer to an old index: small maps between two frozen spaces."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from typing import Any, Literal, get_args

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from weightlab.linalg import orthogonality_deviation
from weightlab.merge import embedding_maps, trained_maps
from weightlab.merge.retrieval import check_embeddings, check_labels
from weightlab.merge.trained_maps import LossWeights, Maps
from weightlab.nn import OrthogonalityPenalty
from weightlab.nn.orthogonality_penalty import Gate

MapKind = Literal["affine", "orthogonal", "lambda"]
MapMethod = Literal["projection", "penalty"]
_HEADER = "weightlab_compatibility_adapter"


class CompatibilityAdapter(nn.Module):
    """Maps between the spaces of a new and an old embedding model.

    Called like a layer it is `to_old`. Made by `fit_adapter` or `load`.

    Args:
        d_new: Dimensions of new embeddings.
        d_old: Dimensions of old embeddings.
        bias: Whether the maps have biases. Default False.
        forward: Whether there is a map for the old gallery, too. Default True.
        normalize: Whether embeddings are scaled to length 1 before they are mapped. Default True.
        info: How it was fitted, kept beside the weights in files: values of JSON.

    Attributes:
        backward_map: `nn.Linear` from new embeddings to the old space, the paper's backward map B.
        forward_map: `nn.Linear` from old embeddings to where `backward_map` takes new ones of the same items, the
            paper's forward map F; or None.
        info: As given.

    Example:
        >>> z = torch.randn(100, 8)
        >>> adapter = fit_adapter(z, z[:, :6] * torch.tensor([2.0, 1, 1, 1, 1, 1]), tol=0.5, relative=False)
        >>> adapter.to_old(z).shape, adapter.lift(z[:, :6]).shape
        (torch.Size([100, 6]), torch.Size([100, 6]))
        >>> round(adapter.deviation, 3)
        0.5
    """

    forward_map: nn.Linear | None

    def __init__(
        self,
        d_new: int,
        d_old: int,
        *,
        bias: bool = False,
        forward: bool = True,
        normalize: bool = True,
        info: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.normalize = normalize
        self.info = dict(info or {})
        self.backward_map = nn.Linear(d_new, d_old, bias=bias)
        self.forward_map = nn.Linear(d_old, d_old, bias=bias) if forward else None

    def forward(self, new: Tensor) -> Tensor:
        """As `to_old`."""
        return self.to_old(new)

    def to_old(self, new: Tensor) -> Tensor:
        """Map new embeddings `(..., d_new)` to the old space, `(..., d_old)`, to search an old gallery."""
        return self.backward_map(self._scaled(new))

    def lift(self, old: Tensor) -> Tensor:
        """Map old embeddings `(..., d_old)` to where `to_old` takes new ones, to stand in for them.

        Raises:
            ValueError: If the adapter was fitted without a forward map.
        """
        if self.forward_map is None:
            raise ValueError("this adapter has no forward map; fit it with forward=True")
        return self.forward_map(self._scaled(old))

    @property
    def deviation(self) -> float:
        """D of the backward map, see `weightlab.linalg.orthogonality_deviation`: 0 where it is a rotation."""
        return float(orthogonality_deviation(self.backward_map.weight.detach()))

    def _scaled(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) if self.normalize else x

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, with settings and `info` in its header."""
        safetensors.torch.save_file(self.state_dict(), os.fspath(path), self.metadata())

    def metadata(self) -> dict[str, str]:
        """The header of the file."""
        # One key: safetensors writes several in no fixed order.
        return {_HEADER: json.dumps({"version": 1, "normalize": self.normalize, "info": self.info})}

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CompatibilityAdapter:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is no such file.
        """
        try:
            with safe_open(os.fspath(path), framework="pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is no safetensors file: {error}") from error
        weight = tensors.get("backward_map.weight")
        if _HEADER not in header or weight is None:
            raise ValueError(f"{path} is no compatibility adapter; write one with CompatibilityAdapter.save")
        settings = json.loads(header[_HEADER])
        adapter = cls(
            weight.size(1),
            weight.size(0),
            bias="backward_map.bias" in tensors,
            forward="forward_map.weight" in tensors,
            normalize=settings["normalize"],
            info=settings["info"],
        ).to(weight.dtype)
        adapter.load_state_dict(tensors)
        return adapter


def fit_adapter(
    z_new: Tensor,
    h_old: Tensor,
    labels: Tensor | None = None,
    *,
    kind: MapKind = "lambda",
    tol: float = 0.2,
    relative: bool = True,
    method: MapMethod = "projection",
    gate: Gate = "hinge2",
    sharpness: float = 10.0,
    bias: bool = False,
    forward: bool = True,
    normalize: bool = True,
    weights: LossWeights | Sequence[float] = LossWeights(),  # noqa: B008 - a tuple
    temperature: float = 0.1,
    steps: int = 600,
    lr: float = 3e-3,
    batch_size: int = 512,
    generator: torch.Generator | None = None,
) -> CompatibilityAdapter:
    r"""Fit maps between the spaces of a new and an old model from embeddings of the same items by both.

    The backward map :math:`B(z) = Wz` takes new embeddings to the old space. A free one (`"affine"`) adapts best to the items at
    hand and bends the new model's space; a rotation (`"orthogonal"`) keeps all angles and can adapt no further; `"lambda"`
    may leave the rotations by :math:`\|WW^\top - I\|_F \le \lambda`, so that cosines change by at most about λ.

    Without a contrastive term and by projection the fit is in closed form from second moments of the data, or nearly so: least squares
    (`"affine"`, or any tolerance that does not bind), Procrustes (`"orthogonal"`, or `tol=0`), else descent of some
    tens of steps within the tolerance. Otherwise maps are trained by Adam from there.

    Args:
        z_new: `(n, d_new)`, floating point, of the new model.
        h_old: `(n, d_old)`, row i of the same item as in `z_new`. Dimensions may differ: W is then rectangular, and
            its short side is what is to be orthonormal.
        labels: `(n,)` integers, for the contrastive term.
        kind: `"affine"`, `"orthogonal"` or `"lambda"` (default).
        tol: λ for `"lambda"`, at least 0. Default 0.2.
        relative: Whether λ is for a direction, `tol·√min(d_new, d_old)` in all. Default True.
        method: `"projection"` (default) keeps W within λ at all times. `"penalty"`, for `"lambda"` only, adds
            `OrthogonalityPenalty` to the loss as the paper does.
        gate: Of the penalty.
        sharpness: Of the penalty.
        bias: Whether maps have biases. Default False: a shift changes cosines even after a rotation.
        forward: Whether to fit a map for the old gallery, too, by least squares to B(z). Default True.
        normalize: Whether to scale embeddings to length 1 before all else. Default True, for search by cosine.
        weights: `LossWeights`, or as many numbers. With `forward` above 0, B is drawn to what a map of old
            embeddings can reach.
        temperature: Of the contrastive term. Default 0.1.
        steps: Steps of Adam, where it is used. Default 600.
        lr: Its first learning rate. Default 3e-3.
        batch_size: Pairs in its batches. Default 512.
        generator: Draws its batches. Default PyTorch's global one.

    Returns:
        A `CompatibilityAdapter` in evaluation mode, of the dtype of `z_new` but at least float32, on its device.

    Raises:
        TypeError: If embeddings are not of floating-point type, or labels not integers.
        ValueError: If lengths differ, rows are zero or not finite, options are out of range, or labels are missing though
            `weights.contrastive` is above 0.

    Complexity:
        `O(n·d²)` to sum up the data, `O(d³)` a step after that. By Adam `O(batch_size·d²)` a step, and `O(d³)` more.

    Reference:
        "λ-Orthogonality Regularization for Compatible Representation Learning", arXiv 2509.16664. That backward, forward and
        contrastive terms are combined is the paper's; their weights and details, and the penalty's gate, are inferred. Fitting
        by projection is derived here.

    Example:
        >>> z = torch.randn(50, 4)
        >>> rotation = torch.linalg.qr(torch.randn(4, 4)).Q
        >>> adapter = fit_adapter(z, z @ rotation.T, kind="orthogonal", normalize=False)
        >>> bool(torch.allclose(adapter.backward_map.weight, rotation, atol=1e-5))
        True
    """
    z, h = check_embeddings(z_new, "z_new"), check_embeddings(h_old, "h_old")
    weights = LossWeights(*weights)
    _check_options(
        kind, tol, method, weights, steps=steps, lr=lr, batch_size=batch_size, temperature=temperature
    )
    if weights.forward and not forward:
        raise ValueError(f"weights.forward={weights.forward:g} needs a forward map; set forward=True")
    if len(z) != len(h):
        raise ValueError(
            f"z_new and h_old must be pairs, row by row, got {len(z)} and {len(h)} rows; keep the items that both have"
        )
    if labels is not None:
        labels = check_labels(labels, len(z), "labels").to(z.device).unique(return_inverse=True)[1]
    elif weights.contrastive:
        raise ValueError(
            f"weights.contrastive={weights.contrastive:g} needs labels; pass labels or set it to 0"
        )
    h = h.to(z)
    if normalize:
        z, h = F.normalize(z, dim=1), F.normalize(h, dim=1)
    limit = {"affine": math.inf, "orthogonal": 0.0, "lambda": tol}[kind]
    limit *= min(z.size(1), h.size(1)) ** 0.5 if relative and 0 < limit < math.inf else 1.0

    moments = embedding_maps.pair_moments(z, h, center=bias)
    pulled = moments
    if weights.forward:
        pulled = embedding_maps.pulled_forward(moments, weights.forward / weights.backward)
    # A penalty is to find its way within the tolerance by itself.
    start = 0.0 if method == "penalty" else limit
    maps = _closed_form(z, h, moments, embedding_maps.within_tolerance(pulled, start), bias, forward)
    if weights.contrastive or method == "penalty":
        penalty = OrthogonalityPenalty(limit, gate, sharpness) if method == "penalty" else None
        maps = trained_maps.train(
            z, h, maps, labels=labels, weights=weights, temperature=temperature, penalty=penalty,
            tol=math.inf if penalty is not None else limit, steps=steps, lr=lr, batch_size=batch_size, generator=generator,
        )  # fmt: skip
        if maps.V is None:
            maps = _closed_form(z, h, moments, maps.W, bias, forward, maps.b)

    info = {
        "kind": kind,
        "method": method,
        "tol": None if math.isinf(limit) else limit,
        "bias": bias,
        "items": len(z),
        "weights": weights._asdict(),
    }
    adapter = CompatibilityAdapter(
        z.size(1), h.size(1), bias=bias, forward=forward, normalize=normalize, info=info
    ).to(z)
    with torch.no_grad():
        for layer, weight, offset in (
            (adapter.backward_map, maps.W, maps.b),
            (adapter.forward_map, maps.V, maps.c),
        ):
            if layer is not None and weight is not None:
                layer.weight.copy_(weight)
                if offset is not None:
                    layer.bias.copy_(offset)
    return adapter.eval()


def _closed_form(
    z: Tensor,
    h: Tensor,
    moments: embedding_maps.PairMoments,
    W: Tensor,
    bias: bool,
    forward: bool,
    b: Tensor | None = None,
) -> Maps:
    """Complete W by the bias that is best beside it, and the forward map that is best for both."""
    if bias and b is None:
        b = embedding_maps.bias_for(moments, W.double())
    maps = Maps(W.to(z.dtype), None if b is None else b.to(z.dtype))
    if not forward:
        return maps
    lift = embedding_maps.pair_moments(h, trained_maps.apply(z, maps.W, maps.b), center=bias)
    V = embedding_maps.least_squares(lift)
    c = embedding_maps.bias_for(lift, V).to(z.dtype) if bias else None
    return maps._replace(V=V.to(z.dtype), c=c)


def _check_options(
    kind: str, tol: float, method: str, weights: LossWeights, *, temperature: float, **positive: float
) -> None:
    if kind not in get_args(MapKind):
        raise ValueError(f"kind must be one of {get_args(MapKind)}, got {kind!r}")
    if method not in get_args(MapMethod):
        raise ValueError(f"method must be one of {get_args(MapMethod)}, got {method!r}")
    if method == "penalty" and kind != "lambda":
        raise ValueError(f'method="penalty" is for kind="lambda", not {kind!r}: there is nothing to penalise')
    if not tol >= 0:
        raise ValueError(f"tol must be at least 0, got {tol}")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if not all(math.isfinite(w) and w >= 0 for w in weights):
        raise ValueError(f"weights must be finite and at least 0, got {tuple(weights)}")
    if not weights.backward > 0:
        raise ValueError("weights.backward must be above 0: without it nothing ties B to the old space")
    for name, value in positive.items():
        if not value > 0:
            raise ValueError(f"{name} must be above 0, got {value}")
