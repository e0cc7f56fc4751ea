"""Stochastic gradient Langevin dynamics: SGD whose noise makes it sample from the posterior."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from weightlab.optim import multi_tensor
from weightlab.optim.gradients import refuse_sparse

Preconditioner = Literal["rmsprop"] | None

# Entries that stay in a CPU's cache along with their gradient and noise.
_PIECE = 2**16


class SGLD(Optimizer):
    r"""Stochastic gradient Langevin dynamics: samples from the posterior at temperature T.

    For a loss that is the **mean** of ``−log p(z|θ)`` over n data, with G its (mini-batch) gradient,

    .. math::
        \theta \leftarrow \theta - \mathrm{lr}\,(G + \lambda\theta)
            + \sqrt{2\,\mathrm{lr}\,T / n}\;\xi, \qquad \xi \sim N(0, I).

    With T = 1, small steps and G unbiased this samples ``exp(−n·loss − ½·n·λ·‖θ‖²)``: the posterior under a prior
    of precision ``n·λ``. T = 0 is `torch.optim.SGD`, bit for bit. In the notation of Welling and Teh, "Bayesian
    Learning via Stochastic Gradient Langevin Dynamics" (ICML 2011), the step is ``ε = 2·lr/n``. Leaving out n, as
    with a summed loss's formula and a mean loss, would sample at temperature n.

    A constant step is biased: on a Gaussian posterior with precision H the full-gradient chain has covariance
    ``H⁻¹ (I − εH/4)⁻¹`` and is stable for ``εH < 4``, so ``lr ≤ 0.05·n/λ_max(H)`` errs by 2.6 % at most. Mini-batches
    add the variance of G to that of the noise. To let the bias vanish, let lr decay by a schedule like
    ``LambdaLR(optimizer, lambda t: (1 + t / 1000) ** -0.55)``; the noise follows.

    **Preconditioned** (``"rmsprop"``; "Preconditioned Stochastic Gradient Langevin Dynamics for Deep Neural Networks",
    arXiv 1512.07666): with ``V ← β·V + (1 − β)·G²`` and ``P = 1/(√V + eps)``, the drift is multiplied by P, the noise
    by √P. As usual the term for the change of P with θ is left out, so even small steps sample a
    slightly different distribution.

    **Randomness.** Noise comes from a generator of the optimizer's own, one on each device. Their states
    are in `state_dict` as tensors under ``"generators"``, so that resuming is bit-exact and files load with
    ``weights_only=True``.

    Args:
        params: Parameters, ``(name, parameter)`` pairs, or groups of either. All are sampled; those without a
            gradient get neither drift nor noise.
        lr: Learning rate for the mean loss.
        n_data: Size n of the training set, which turns a mean into the sum that a posterior is made of.
        temperature: T. 1 samples the posterior (default), 0 optimises.
        weight_decay: λ, coupled: the prior's precision divided by n. Default 0.
        preconditioner: None or ``"rmsprop"``.
        beta: Decay of V. Default 0.99.
        eps: Added to √V. Default 1e-5.
        generator: Source of the noise, used as it is, not copied. Default None: one is seeded from
            torch's global generator.
        foreach: Move many tensors with one kernel, if there is no preconditioner. Default None: on
            accelerators. On CPU, pieces of a tensor are moved while they are in the cache.

    Raises:
        TypeError: For complex or integer parameters; at `step`, for sparse gradients.
        ValueError: For options out of range, and for a generator on another device than a parameter.

    Complexity:
        SGD's, and one normal draw per entry, which takes longer than the rest. No state without a
        preconditioner, one buffer with it.

    Example:
        >>> theta = torch.nn.Parameter(torch.zeros(1000))
        >>> optimizer = SGLD([theta], lr=0.05, n_data=100, generator=torch.Generator().manual_seed(0))
        >>> for _ in range(200):
        ...     optimizer.zero_grad()
        ...     (0.5 * theta.square().sum()).backward()  # 1,000 chains at once, each of variance 1/100
        ...     optimizer.step()
        >>> round(theta.var().item(), 3)
        0.01
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        n_data: float,
        temperature: float = 1.0,
        weight_decay: float = 0.0,
        preconditioner: Preconditioner = None,
        *,
        beta: float = 0.99,
        eps: float = 1e-5,
        generator: torch.Generator | None = None,
        foreach: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "n_data": n_data,
            "temperature": temperature,
            "weight_decay": weight_decay,
            "preconditioner": preconditioner,
            "beta": beta,
            "eps": eps,
            "foreach": foreach,
        }
        self._given = generator is not None
        self._generators: dict[str, torch.Generator] = {}
        if generator is not None:
            self._generators[str(generator.device)] = generator
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, after checking its options and parameters."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_group(group)
            for p in group["params"]:
                self._generator(p.device)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def _generator(self, device: torch.device) -> torch.Generator:
        key = str(device)
        if key not in self._generators:
            if self._given:
                raise ValueError(
                    f"the generator is on {', '.join(self._generators)}, but a parameter is on {key}; "
                    f"give torch.Generator({key!r}), or none"
                )
            seed = int(torch.randint(2**62, ()))
            self._generators[key] = torch.Generator(device).manual_seed(seed)
        return self._generators[key]

    def state_dict(self) -> dict[str, Any]:
        """Return the state of `torch.optim.Optimizer`, and the generators' as uint8 tensors."""
        states = {device: generator.get_state() for device, generator in self._generators.items()}
        return {**super().state_dict(), "generators": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned. Noise continues where it was.

        Raises:
            ValueError: If parameter groups do not match, or there are no generators' states for the
                devices of the parameters.
        """
        states = state_dict.get("generators")
        if states is None or not set(self._generators) <= set(states):
            raise ValueError(
                f"state_dict must hold generators for {', '.join(self._generators)}, got "
                f"{', '.join(states) if states else 'none'}; it was saved by another optimizer or on other devices"
            )
        super().load_state_dict({name: state_dict[name] for name in ("state", "param_groups")})
        for device, generator in self._generators.items():
            generator.set_state(states[device].cpu())

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_given": self._given, "_generators": self._generators}

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step.

        Args:
            closure: Evaluates the model again and returns the mean loss, which `step` returns then.

        Raises:
            TypeError: If a gradient is sparse; no parameter has moved then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                refuse_sparse(self, p)
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            lr = float(group["lr"])
            noise = math.sqrt(2 * lr * group["temperature"] / group["n_data"])
            for batch in _batches(params, group["foreach"]):
                if group["preconditioner"] is not None:
                    buffers = [self._square_average(p) for p in batch]
                    self._preconditioned(batch, buffers, group, lr, noise)
                else:
                    self._plain(batch, group["weight_decay"], lr, noise)
        return loss

    def _square_average(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if "square_avg" not in state:
            state["square_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return state["square_avg"]

    def _plain(self, params: list[Tensor], weight_decay: float, lr: float, noise: float) -> None:
        generator = self._generator(params[0].device)
        draws: list[Tensor] = []
        for thetas, grads in _pieces(params, small=noise != 0):
            if weight_decay != 0:
                grads = multi_tensor.add(grads, thetas, alpha=weight_decay)
            multi_tensor.add_(thetas, grads, alpha=-lr)
            if noise != 0:
                # The first piece is the largest; fresh memory for each would cost more than the addition.
                draws = draws or [torch.empty_like(t) for t in thetas]
                if draws[0].shape != thetas[0].shape:
                    draws = [draws[0][: len(thetas[0])]]
                for draw in draws:
                    draw.normal_(generator=generator)
                multi_tensor.add_(thetas, draws, alpha=noise)

    def _preconditioned(
        self, params: list[Tensor], averages: list[Tensor], group: dict[str, Any], lr: float, noise: float
    ) -> None:
        generator = self._generator(params[0].device)
        for p, average in zip(params, averages, strict=True):
            grad: Any = p.grad
            average.mul_(group["beta"]).addcmul_(grad, grad, value=1 - group["beta"])
            root = average.sqrt().add_(group["eps"])
            if group["weight_decay"] != 0:
                grad = grad.add(p, alpha=group["weight_decay"])
            p.addcdiv_(grad, root, value=-lr)
            if noise != 0:
                p.addcdiv_(torch.empty_like(p).normal_(generator=generator), root.sqrt_(), value=noise)


def _batches(params: list[Tensor], foreach: bool | None) -> Iterator[list[Tensor]]:
    """Group parameters of one device and dtype; one by one where `foreach` is off."""
    batches: dict[Any, list[Tensor]] = {}
    for p in params:
        together = p.device.type != "cpu" if foreach is None else foreach
        batches.setdefault((p.device, p.dtype, None if together else id(p)), []).append(p)
    yield from batches.values()


def _pieces(params: list[Tensor], small: bool) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Yield parameters with gradients; if `small`, a large one on a CPU in pieces that stay in its cache."""
    grads: list[Any] = [p.grad for p in params]
    p, grad = params[0], grads[0]
    if not small or len(params) > 1 or p.device.type != "cpu" or p.numel() <= _PIECE or not p.is_contiguous():
        yield params, grads
    else:
        pairs = zip(p.view(-1).split(_PIECE), grad.reshape(-1).split(_PIECE), strict=True)
        for piece, piece_grad in pairs:
            yield [piece], [piece_grad]


def _check_group(group: dict[str, Any]) -> None:
    for name in ("lr", "n_data", "eps"):
        if not 0 < float(group[name]) < math.inf:
            raise ValueError(f"{name} must be above 0 and finite, got {group[name]}")
    for name in ("temperature", "weight_decay"):
        if not 0 <= group[name] < math.inf:
            raise ValueError(f"{name} must be at least 0 and finite, got {group[name]}")
    if not 0 <= group["beta"] < 1:
        raise ValueError(f"beta must be in [0, 1), got {group['beta']}")
    if group["preconditioner"] not in (None, "rmsprop"):
        raise ValueError(f"preconditioner must be None or 'rmsprop', got {group['preconditioner']!r}")
    for p in group["params"]:
        if not p.is_floating_point():
            raise TypeError(
                f"SGLD samples real floating-point parameters, got {p.dtype} of shape {tuple(p.shape)}; "
                "give it to another optimizer"
            )
