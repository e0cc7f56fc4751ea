"""Ghost batch normalization: batch norm whose statistics are those of small groups within the batch."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

Assignment = Literal["contiguous", "strided"]
Remainder = Literal["merge", "keep", "error"]
MomentumPer = Literal["ghost", "batch"]
M = TypeVar("M", bound=nn.Module)


class Ghosts(NamedTuple):
    """How a batch falls into ghosts: `whole` ones of the full size, then one of `tail` samples if any."""

    whole: int
    tail: int

    @property
    def number(self) -> int:
        """Ghosts in all."""
        return self.whole + (self.tail > 0)


def divide(batch: int, ghost_size: int, remainder: Remainder = "merge") -> Ghosts:
    """Divide a batch into ghosts. A batch no larger than a ghost is one ghost.

    Args:
        batch: Samples in the batch.
        ghost_size: Samples in a ghost.
        remainder: What becomes of `batch % ghost_size` samples; see `GhostBatchNorm`.

    Raises:
        ValueError: If there is a remainder and `remainder="error"`.

    Example:
        >>> divide(100, 32), divide(100, 32, "keep")
        (Ghosts(whole=2, tail=36), Ghosts(whole=3, tail=4))
    """
    if batch <= ghost_size:
        return Ghosts(0, batch)
    whole, rest = divmod(batch, ghost_size)
    if rest and remainder == "error":
        raise ValueError(
            f"a batch of {batch} is no multiple of ghost_size={ghost_size}: change either, drop the last batch of "
            'an epoch, or set remainder to "merge" or "keep"'
        )
    if rest and remainder == "merge":
        return Ghosts(whole - 1, ghost_size + rest)
    return Ghosts(whole, rest)


def running_weights(count: int, momentum: float, like: Tensor) -> Tensor:
    r"""Weights that `count` successive exponential updates leave to their statistics.

    After K updates with momentum :math:`\eta` a running value is
    :math:`(1-\eta)^K\,\text{old} + \sum_{l<K} \eta(1-\eta)^{K-1-l}\,\text{new}_l`.

    Args:
        count: K.
        momentum: :math:`\eta`, in [0, 1].
        like: Gives dtype and device.

    Returns:
        K weights, the first statistic's first. With :math:`(1-\eta)^K` they sum to one.

    Example:
        >>> running_weights(3, 0.5, torch.zeros(()))
        tensor([0.1250, 0.2500, 0.5000])
    """
    ages = torch.arange(count - 1, -1, -1, dtype=like.dtype, device=like.device)
    return momentum * (1 - momentum) ** ages


def ghost_normalize(
    x: Tensor,
    ghosts: Ghosts,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    statistics: Tensor | None = None,
    *,
    assignment: Assignment = "contiguous",
    eps: float = 1e-5,
) -> Tensor:
    """Normalise each ghost by its own mean and biased variance, then scale and shift by channel.

    Args:
        x: `(N, C, *)`.
        ghosts: From `divide(N, ...)`.
        weight: Scale `(C,)`; `None` for one.
        bias: Shift `(C,)`; `None` for zero.
        statistics: Zeros `(2, ghosts.number, C)`, overwritten with the ghosts' means and unbiased variances; `None`
            if not wanted.
        assignment: As in `GhostBatchNorm`.
        eps: Added to the variance.

    Returns:
        A tensor like `x`, in its memory format.

    Complexity:
        Linear. `"strided"`: one call for all whole ghosts, on a view. `"contiguous"`: on a CPU one call a ghost, since
        copies cost more there; elsewhere one call for all, between two copies.

    Example:
        >>> x = torch.tensor([[0.0], [2.0], [5.0], [7.0]])
        >>> ghost_normalize(x, divide(4, 2)).flatten().round()
        tensor([-1.,  1., -1.,  1.])
    """
    whole, tail = ghosts
    size = (x.shape[0] - tail) // max(whole, 1)
    if assignment == "contiguous" and x.device.type == "cpu":
        pieces = x.split([size] * whole + [tail] * (tail > 0))
        rows = [None] * len(pieces) if statistics is None else statistics.unbind(1)
        return torch.cat([_batch_norm(p, weight, bias, r, eps) for p, r in zip(pieces, rows, strict=True)])
    transposed = assignment == "contiguous"
    if not tail:
        return _folded(x, whole, weight, bias, statistics, eps, transposed=transposed)
    if not whole:
        return _batch_norm(x, weight, bias, None if statistics is None else statistics[:, 0], eps)
    head, rest = x.split([whole * size, tail])
    first, last = (None, None) if statistics is None else (statistics[:, :whole], statistics[:, whole])
    return torch.cat(
        [
            _folded(head, whole, weight, bias, first, eps, transposed=transposed),
            _batch_norm(rest, weight, bias, last, eps),
        ]
    )


def _folded(
    x: Tensor,
    ghosts: int,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor | None,
    eps: float,
    *,
    transposed: bool,
) -> Tensor:
    """Show samples l, l + K, l + 2K, ... of K ghosts as channels of their own and normalise them at once.

    `transposed` brings successive samples into that order first, and the result back.
    """
    layout = _memory_format(x)
    size = x.shape[0] // ghosts
    if transposed:
        x = x.unflatten(0, (ghosts, size)).transpose(0, 1).flatten(0, 1)
    folded = x.contiguous().view(size, ghosts * x.shape[1], *x.shape[2:])
    y = _batch_norm(
        folded,
        None if weight is None else weight.repeat(ghosts),
        None if bias is None else bias.repeat(ghosts),
        None if statistics is None else statistics.view(2, -1),
        eps,
    ).view(x.shape)
    if transposed:
        y = y.unflatten(0, (size, ghosts)).transpose(0, 1).flatten(0, 1)
    return y.contiguous(memory_format=layout)


def _batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, statistics: Tensor | None, eps: float
) -> Tensor:
    """Normalise by channel; with a momentum of one, "running" statistics are the batch's."""
    mean, variance = (None, None) if statistics is None else statistics.unbind()
    return F.batch_norm(x, mean, variance, weight, bias, training=True, momentum=1.0, eps=eps)


def _memory_format(x: Tensor) -> torch.memory_format:
    if not x.is_contiguous():
        for ndim, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
            if x.ndim == ndim and x.is_contiguous(memory_format=layout):
                return layout
    return torch.contiguous_format


class GhostBatchNorm(_BatchNorm):
    r"""Batch normalization over ghosts: groups of `ghost_size` samples inside the batch.

    The base of `GhostBatchNorm1d`, `GhostBatchNorm2d` and `GhostBatchNorm3d`, which take inputs of shape `(N, C)` or
    `(N, C, L)`, `(N, C, H, W)` and `(N, C, D, H, W)`. In training, with mean :math:`\mu_l` and biased variance
    :math:`\sigma_l^2` of ghost l, by channel:

    .. math:: y = \gamma\,(x - \mu_l) / \sqrt{\sigma_l^2 + \epsilon} + \beta

    A large batch keeps the noise of small-batch statistics: its strength is set by `ghost_size` alone, about
    :math:`1/\sqrt{g}` of the activations' size for g values a channel. Each sample's gradient touches its own ghost only.
    In evaluation there are no ghosts: running statistics are used as by `torch.nn.BatchNorm1d` (or, with
    `track_running_stats=False`, the statistics of the whole batch). State dicts are those of PyTorch's layers and
    load in both directions.

    Running statistics are updated as if the K ghosts had come one after another, so with `momentum=0.1` the memory is of some
    ten *ghosts*: 32 of them replace all but 3 % of it. Use a smaller momentum, or `momentum_per="batch"`. (The
    paper prints an exponent for this update whose weights do not sum to one; this is the official code's.)

    Args:
        num_features: Channels C.
        ghost_size: Samples in a ghost. Default 128, the paper's. Batches up to this size are normalised as a whole.
        eps: Added to the variance. Default 1e-5.
        momentum: Weight of the new value in running statistics; `None` for the plain average over all ghosts. Default 0.1.
        affine: Learn :math:`\gamma` and :math:`\beta`. Default True.
        track_running_stats: Keep running statistics. Default True.
        assignment: `"contiguous"` (default): ghosts are successive samples, as when the batch is fed in pieces.
            `"strided"`: of K whole ghosts, the l-th has the samples l, l + K, l + 2K, ... Equivalent for shuffled
            data, and as fast as one batch normalization: the ghosts are channels of a view.
        remainder: What becomes of the samples left when the batch is no multiple of `ghost_size`. `"merge"`
            (default): they join the last ghost. `"keep"`: they are a smaller ghost. `"error"`: they are refused.
        momentum_per: `"ghost"` (default, the paper's) or `"batch"`: with :math:`1 - (1-\eta)^{1/K}` a ghost, so that a batch
            forgets as much as with plain batch normalization, whatever K.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        TypeError: If `ghost_size` is no integer.
        ValueError: If `ghost_size` is below one, an option is unknown, the input has the wrong number of dimensions or
            channels, or a ghost holds a single value a channel, which has no variance.

    Complexity:
        That of batch normalization; see `ghost_normalize` for the number of calls.

    References:
        Train longer, generalize better: closing the generalization gap in large batch training of neural networks,
        arXiv 1705.08741.

    Example:
        >>> layer = GhostBatchNorm1d(3, ghost_size=4)
        >>> y = layer(torch.randn(8, 3))
        >>> y.view(2, 4, 3).mean(1).abs().max() < 1e-5, layer.num_batches_tracked
        (tensor(True), tensor(2))
        >>> model = GhostBatchNorm.convert(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), ghost_size=16)
    """

    def __init__(
        self,
        num_features: int,
        ghost_size: int = 128,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        assignment: Assignment = "contiguous",
        remainder: Remainder = "merge",
        momentum_per: MomentumPer = "ghost",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if isinstance(ghost_size, bool) or not isinstance(ghost_size, int):
            raise TypeError(f"ghost_size must be an integer number of samples, got {ghost_size!r}")
        if ghost_size < 1:
            raise ValueError(f"ghost_size must be at least 1, got {ghost_size}")
        for name, value, options in (
            ("assignment", assignment, Assignment),
            ("remainder", remainder, Remainder),
            ("momentum_per", momentum_per, MomentumPer),
        ):
            if value not in get_args(options):
                raise ValueError(f"{name} must be one of {', '.join(get_args(options))}, got {value!r}")
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self.ghost_size = ghost_size
        self.assignment: Assignment = assignment
        self.remainder: Remainder = remainder
        self.momentum_per: MomentumPer = momentum_per

    def forward(self, input: Tensor) -> Tensor:
        """Normalise by ghosts when training, else as PyTorch's layer does."""
        self._check_input_dim(input)
        if not self.training:
            return super().forward(input)
        ghosts = divide(input.shape[0], self.ghost_size, self.remainder)
        if ghosts.number < 2:
            return super().forward(input)
        self._check_sizes(input, ghosts)
        statistics = None
        if self.running_mean is not None:
            statistics = self.running_mean.new_zeros(2, ghosts.number, self.num_features)
        output = ghost_normalize(
            input,
            ghosts,
            self.weight,
            self.bias,
            statistics,
            assignment=self.assignment,
            eps=self.eps,
        )
        if statistics is not None:
            self._update_running(statistics)
        return output

    def _check_sizes(self, input: Tensor, ghosts: Ghosts) -> None:
        if input.shape[1] != self.num_features:
            raise ValueError(
                f"input of shape {tuple(input.shape)} has {input.shape[1]} channels, not num_features={self.num_features}"
            )
        smallest = min(ghosts.tail or self.ghost_size, self.ghost_size)
        if smallest * input[0, 0].numel() < 2:
            raise ValueError(
                f"a ghost of {smallest} sample has one value a channel and so no variance, for input of shape "
                f'{tuple(input.shape)}: set ghost_size to 2 or more and remainder to "merge"'
            )

    @torch.no_grad()
    def _update_running(self, statistics: Tensor) -> None:
        count = statistics.shape[1]
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(count)
        for running, new in zip((self.running_mean, self.running_var), statistics, strict=True):
            assert running is not None
            wide = torch.promote_types(running.dtype, torch.float32)
            new = new.to(wide)
            if self.momentum is None:
                share = count / self.num_batches_tracked.to(wide)
                running.lerp_(new.mean(0).to(running.dtype), share.to(running.dtype))
                continue
            momentum = self.momentum
            if self.momentum_per == "batch":
                momentum = 1 - (1 - momentum) ** (1 / count)
            # No matrix product: autocast would take it to half precision.
            weights = running_weights(count, momentum, new)
            running.mul_((1 - momentum) ** count).add_((weights[:, None] * new).sum(0))

    def extra_repr(self) -> str:
        """Return PyTorch's line and what is this layer's own."""
        own = f"ghost_size={self.ghost_size}, assignment={self.assignment!r}, remainder={self.remainder!r}"
        return f"{super().extra_repr()}, {own}, momentum_per={self.momentum_per!r}"

    @classmethod
    def convert(cls, module: M, ghost_size: int = 128, **options: Any) -> M:
        """Replace batch norm layers within a module by ghost batch norm layers.

        Like `torch.nn.SyncBatchNorm.convert_sync_batchnorm`. Parameters and buffers are the same objects as before, so
        optimizers made earlier stay valid; settings and the training mode are kept. Layers that are used in
        several places stay shared. Subclasses of PyTorch's layers, which may do more than normalise, and
        `SyncBatchNorm` are left alone.

        Args:
            module: Any module. Changed in place, unless it is a batch norm layer itself.
            ghost_size: Samples in a ghost. Default 128.
            **options: `assignment`, `remainder` and `momentum_per` of the new layers.

        Returns:
            The module, or its replacement. `GhostBatchNorm.convert` covers all dimensions,
            `GhostBatchNorm2d.convert` only `BatchNorm2d` (and earlier `GhostBatchNorm2d`), and so on.

        Raises:
            ValueError: For lazy layers that have not seen a batch yet, and as the constructor.

        Example:
            >>> GhostBatchNorm.convert(nn.BatchNorm2d(8), ghost_size=32).ghost_size
            32
        """
        done: dict[nn.Module, nn.Module] = {}

        def replaced(old: nn.Module) -> nn.Module:
            if old not in done:
                done[old] = cls._replacement(old, ghost_size, options)
                for name, child in old._modules.items():
                    if child is not None:
                        old._modules[name] = replaced(child)
            return done[old]

        return replaced(module)  # pyright: ignore[reportReturnType]

    @classmethod
    def _replacement(cls, old: nn.Module, ghost_size: int, options: dict[str, Any]) -> nn.Module:
        if isinstance(old, _BatchNorm) and isinstance(old, LazyModuleMixin):
            raise ValueError(f"{type(old).__name__} has no size yet: run a batch through the model first")
        kind = _GHOSTS.get(type(old))
        if kind is None or not issubclass(kind, cls):
            return old
        assert isinstance(old, _BatchNorm)
        new = kind(
            old.num_features,
            ghost_size,
            old.eps,
            old.momentum,
            old.affine,
            old.track_running_stats,
            device="meta",
            **options,
        )
        new._parameters.update(old._parameters)
        new._buffers.update(old._buffers)
        return new.train(old.training)


class GhostBatchNorm1d(GhostBatchNorm, nn.BatchNorm1d):
    """Ghost batch normalization of `(N, C)` or `(N, C, L)`; see `GhostBatchNorm`.

    Example:
        >>> GhostBatchNorm1d(8, ghost_size=16)(torch.randn(64, 8)).shape
        torch.Size([64, 8])
    """


class GhostBatchNorm2d(GhostBatchNorm, nn.BatchNorm2d):
    """Ghost batch normalization of `(N, C, H, W)`; see `GhostBatchNorm`.

    Example:
        >>> GhostBatchNorm2d(8, ghost_size=16, assignment="strided")(torch.randn(64, 8, 5, 5)).shape
        torch.Size([64, 8, 5, 5])
    """


class GhostBatchNorm3d(GhostBatchNorm, nn.BatchNorm3d):
    """Ghost batch normalization of `(N, C, D, H, W)`; see `GhostBatchNorm`.

    Example:
        >>> GhostBatchNorm3d(2, ghost_size=4)(torch.randn(8, 2, 3, 3, 3)).shape
        torch.Size([8, 2, 3, 3, 3])
    """


_GHOSTS: dict[type[nn.Module], type[GhostBatchNorm]] = {
    nn.BatchNorm1d: GhostBatchNorm1d,
    nn.BatchNorm2d: GhostBatchNorm2d,
    nn.BatchNorm3d: GhostBatchNorm3d,
    GhostBatchNorm1d: GhostBatchNorm1d,
    GhostBatchNorm2d: GhostBatchNorm2d,
    GhostBatchNorm3d: GhostBatchNorm3d,
}
