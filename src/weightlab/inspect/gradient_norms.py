"""Exact norms of each example's gradient, without the gradients."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.dropout import _DropoutNd

from weightlab.inspect._example_batch import ExampleBatch
from weightlab.inspect._example_losses import LossFunction, ModelWithLoss
from weightlab.inspect._ghost_graph import Run, ghost_squares
from weightlab.inspect._ghost_norms import accumulation_dtype
from weightlab.inspect._ghost_rules import Batch

Method = Literal["auto", "ghost", "vmap", "loop"]
ParameterChoice = Literal["all", "last"] | Iterable[str] | Callable[[str, nn.Parameter], bool]

# Entries that temporary tensors of the closed forms may have: few enough to stay in a processor's cache.
_BUFFER = 2**20
# Entries that the gradients of the examples that vmap takes at once may have.
_GRADIENTS = 2**24


def grad_norms(
    model: nn.Module,
    inputs: Any,
    targets: Any,
    loss_fn: LossFunction = functional.cross_entropy,
    *,
    params: ParameterChoice = "all",
    method: Method = "auto",
    squared: bool = False,
    chunk_size: int | None = None,
) -> Tensor:
    """Norm of the gradient of each example's loss with respect to the parameters.

    One pass forward and one backward over the batch, without the gradients of weights: autograd has kept what every
    weight was multiplied with, and the norm of an example's gradient follows from that and from the gradient of the
    product. This is exact, as a loop over the examples is. Parameters that are used in a way without a closed form are
    differentiated by `torch.func.vmap`, or in a loop if the model cannot be vectorised;
    [`grad_norm_methods`][weightlab.inspect.grad_norm_methods] says which. Closed forms there are for parameters of
    linear layers, convolutions (transposed ones, too), embeddings, layer, group, instance and evaluated batch norms,
    for attention, and for parameters that are added or multiplied to activations, however the modules that do so are
    written, and also if they are used several times or tied. One example of each batch is also differentiated by
    itself, and a closed form that gives it another norm is not used.

    The model is left as it was: weights, their `.grad`, mode, and the state of the random generators.

    Args:
        model: The model, in a mode in which examples do not mix and nothing is drawn at random: `model.eval()` for
            models with batch norm or dropout.
        inputs: A tensor, a tuple of arguments or a dict of keyword arguments. Every tensor in it has one entry an
            example, in the first dimension; other values are handed on.
        targets: Second argument of `loss_fn`: a tensor, a tuple or dict of tensors, or None; likewise.
        loss_fn: Called with the model's outputs and the targets. May give the loss of every example, shape `(B,)`, or one
            number; the latter is asked for each example alone, so that a mean over the batch does not divide the
            gradients. Default: `torch.nn.functional.cross_entropy`.
        params: `"all"` (default) that require a gradient; those of the `"last"` module in order of registration, usually
            the head, which spares the way back through the others; names, also patterns like `"layer4.*"`; or a
            function of name and parameter that says whether to count it.
        method: `"auto"` (default), or only `"ghost"` (the closed forms), only `"vmap"` or only a `"loop"`.
        squared: Return squared norms.
        chunk_size: Number of examples that `vmap` takes at a time. Default: as many as have 2²⁴ numbers in their
            gradients.

    Returns:
        Shape `(B,)`, float32, or float64 for a model in float64. Half precision is added up in float32.

    Raises:
        TypeError: If `model` is no module or has complex parameters, `inputs` holds no tensor or the outputs do not suit
            `loss_fn`.
        ValueError: If a batch norm or dropout is in training mode (the module is named), or the model draws at random
            in another way that shows; tensors are empty or of
            different lengths; no parameter is chosen; `loss_fn` gives another shape; or `method="ghost"` and a parameter
            has no closed form (it is named, with the reason).

    Complexity:
        Forward and backward without the gradients of weights, and for a weight `(m, n)` that is used at T positions
        `T m n` or `T² (m + n)` an example, whichever is less; for T = 1, `m + n`. The check of one example adds 1/B of
        a forward and backward pass. Memory: activations and their gradients; never one gradient an example of a matrix
        or kernel.

    References:
        Deep Learning on a Data Diet: Finding Important Examples Early in Training, arXiv 2107.07075, for the score
        (GraNd). Efficient Per-Example Gradient Computations, arXiv 1510.01799, for the closed form of linear layers.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> inputs, targets = torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([0, 1])
        >>> error = model(inputs).softmax(1) - functional.one_hot(targets)
        >>> expected = error.norm(dim=1) * (inputs.square().sum(1) + 1).sqrt()
        >>> torch.allclose(grad_norms(model, inputs, targets), expected)
        True
    """
    squares, _ = _measure(model, inputs, targets, loss_fn, params, method, chunk_size)
    return squares if squared else squares.sqrt()


def grad_norm_methods(
    model: nn.Module,
    inputs: Any,
    targets: Any,
    loss_fn: LossFunction = functional.cross_entropy,
    *,
    params: ParameterChoice = "all",
    method: Method = "auto",
) -> dict[str, str]:
    """How [`grad_norms`][weightlab.inspect.grad_norms] computes the part of each parameter.

    Computes the norms as well, so a small batch will do; it should have three examples or more.

    Args:
        model: As in `grad_norms`; so are the others.
        inputs: A batch.
        targets: Its targets.
        loss_fn: The loss.
        params: Which parameters.
        method: Which method.

    Returns:
        For each parameter's name, `"ghost"`, `"vmap"` or `"loop"`.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.PReLU(), nn.Linear(3, 2))
        >>> grad_norm_methods(model, torch.ones(4, 2), torch.tensor([0, 1, 1, 0]))
        {'0.weight': 'ghost', '0.bias': 'ghost', '1.weight': 'vmap', '2.weight': 'ghost', '2.bias': 'ghost'}
    """
    return _measure(model, inputs, targets, loss_fn, params, method, None)[1]


def _measure(
    model: nn.Module,
    inputs: Any,
    targets: Any,
    loss_fn: LossFunction,
    params: ParameterChoice,
    method: Method,
    chunk_size: int | None,
) -> tuple[Tensor, dict[str, str]]:
    """Squared norms, and the method for each parameter."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if method not in ("auto", "ghost", "vmap", "loop"):
        raise ValueError(f'method must be "auto", "ghost", "vmap" or "loop", got {method!r}')
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    model = getattr(model, "_orig_mod", model)  # of a compiled model, whose graph hides what happens inside
    _check_modes(model)
    chosen = _choose(model, params)
    devices = {p.device for p in chosen.values() if p.device.type == "cuda"}
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices):
        batch, task = ExampleBatch(inputs, targets), ModelWithLoss(model, loss_fn)
        squares: list[Tensor] = []
        methods: dict[str, str] = {}
        rest, sample = chosen, None
        if method in ("auto", "ghost"):
            closed, reasons, sample = _ghost(task, batch, chosen)
            if method == "ghost" and reasons:
                name, reason = next(iter(reasons.items()))
                raise ValueError(
                    f"method='ghost' has no closed form for {name}, which {reason}; method='auto' can"
                )
            squares += closed.values()
            methods |= dict.fromkeys(closed, "ghost")
            rest = {name: p for name, p in chosen.items() if name not in closed}
        if rest:
            if method == "vmap":
                found = _vmap(task, batch, rest, chunk_size)
            else:
                found = _vmap_if_right(task, batch, rest, chunk_size, sample) if sample else None
            methods |= dict.fromkeys(rest, "loop" if found is None else "vmap")
            squares.append(_loop(task, batch, rest) if found is None else found)
        return torch.stack(squares).sum(0), {name: methods[name] for name in chosen}


@dataclass(frozen=True)
class _Sample:
    """One example of a batch with the true norms of its gradients."""

    example: int
    norms: Mapping[str, Tensor]
    tolerance: float

    def agrees(self, squares: Tensor, norms: Sequence[Tensor]) -> list[bool]:
        """Whether squared norms `(n,)` are those of the example, up to rounding."""
        found, true = squares.sqrt(), torch.stack(list(norms))
        slack = 0.1 * self.tolerance * torch.stack(list(self.norms.values())).norm()
        near = (found - true).abs() <= self.tolerance * true + slack
        return (near | (found == true) | (found.isnan() & true.isnan())).tolist()


def _ghost(
    task: ModelWithLoss, batch: ExampleBatch, chosen: Mapping[str, nn.Parameter]
) -> tuple[dict[str, Tensor], dict[str, str], _Sample]:
    """Squared norms of the parameters with a closed form, why the others have none, and the example for checks."""

    def run(some: ExampleBatch) -> tuple[Run, Tensor]:
        outputs, losses = task(some)
        return Run(outputs, losses.sum()), losses.detach()

    full, losses = run(batch)
    if not full.loss.requires_grad:
        raise ValueError("the losses do not depend on the parameters of the model")
    # Of all examples, the one with the largest loss has a gradient that stands out from rounding.
    example = int(losses.argmax())
    alone = full if batch.size == 1 else run(batch[[example]])[0]
    gradients = torch.autograd.grad(alone.loss, list(chosen.values()), retain_graph=True, allow_unused=True)
    norms = {name: _norm(g, losses) for name, g in zip(chosen, gradients, strict=True)}
    del gradients
    sample = _Sample(example, norms, _tolerance(chosen.values()))

    def probes() -> Iterator[tuple[Run, Batch]]:
        yield alone, Batch(batch.size, example)
        if batch.size > 2:
            # What PyTorch does depends on the layout in memory, which is special where a dimension is 1.
            yield run(batch[[example, (example + 1) % batch.size]])[0], Batch(batch.size, example, 2)

    squares, reasons = ghost_squares(chosen, full, batch.size, probes(), _BUFFER)
    if squares:
        of_example = torch.stack([square[example] for square in squares.values()])
        good = sample.agrees(of_example, [norms[name] for name in squares])
        for name in [name for name, same in zip(squares, good, strict=True) if not same]:
            del squares[name]
            reasons[name] = "has another gradient when the example is alone"
    return squares, reasons, sample


def _norm(gradient: Tensor | None, like: Tensor) -> Tensor:
    dtype = accumulation_dtype(like.dtype)
    if gradient is None:
        return like.new_zeros((), dtype=dtype)
    return torch.linalg.vector_norm(gradient, dtype=accumulation_dtype(gradient.dtype)).to(like.device, dtype)


def _tolerance(parameters: Iterable[Tensor]) -> float:
    """How far rounding may take two ways to a norm apart: 1 % in float32, 30 % in half precision."""
    dtypes = {p.dtype for p in parameters}
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        dtypes.add(torch.bfloat16)
    return min(0.3, 30 * max(torch.finfo(dtype).eps for dtype in dtypes) ** 0.5)


def _vmap(
    task: ModelWithLoss, batch: ExampleBatch, chosen: Mapping[str, nn.Parameter], chunk_size: int | None
) -> Tensor:
    """Squared norms from each example's gradients, some examples at a time."""
    parameters = {f"model.{name}": p.detach() for name, p in chosen.items()}

    def loss(parameters: dict[str, Tensor], *one: Tensor) -> Tensor:
        _, losses = functional_call(task, parameters, (batch.like([x[None] for x in one]),))
        return losses.sum()

    def square(*one: Tensor) -> Tensor:
        gradients = grad(loss)(parameters, *one).values()
        return torch.stack([g.to(accumulation_dtype(g.dtype)).square().sum() for g in gradients]).sum()

    if chunk_size is None:
        chunk_size = max(1, _GRADIENTS // sum(p.numel() for p in parameters.values()))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop because")
        return vmap(square, chunk_size=chunk_size)(*batch.tensors)


def _vmap_if_right(
    task: ModelWithLoss,
    batch: ExampleBatch,
    chosen: Mapping[str, nn.Parameter],
    chunk_size: int | None,
    sample: _Sample,
) -> Tensor | None:
    """As `_vmap`; None if the model cannot be vectorised or an example has another gradient then."""
    try:
        squares = _vmap(task, batch, chosen, chunk_size)
    except Exception as error:  # whatever a model does that cannot be vectorised; the loop meets true errors
        if "randomness" in str(error):
            raise ValueError(
                "the model draws at random, so that an example has no gradient of its own; call model.eval() first"
            ) from error
        return None
    true = torch.stack([sample.norms[name] for name in chosen]).norm()
    return squares if all(sample.agrees(squares[[sample.example]], [true])) else None


def _loop(task: ModelWithLoss, batch: ExampleBatch, chosen: Mapping[str, nn.Parameter]) -> Tensor:
    """Squared norms from each example's gradients, one after the other."""
    squares = []
    for i in range(batch.size):
        _, losses = task(batch[[i]])
        gradients = torch.autograd.grad(losses.sum(), list(chosen.values()), allow_unused=True)
        squares.append(torch.stack([_norm(g, losses) for g in gradients]).square().sum())
    return torch.stack(squares)


def _check_modes(model: nn.Module) -> None:
    for name, module in model.named_modules():
        what = f"{type(module).__name__} {name!r}" if name else type(module).__name__
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            mend = "call model.eval() first" if module.training else "it keeps no running statistics"
            raise ValueError(
                f"{what} mixes the examples of a batch, so that none has a gradient of its own; {mend}"
            )
        if module.training and isinstance(module, _NormBase) and module.running_mean is not None:
            raise ValueError(f"{what} would change its running statistics; call model.eval() first")
        if module.training and _dropout(module) > 0:
            raise ValueError(f"{what} drops at random; call model.eval() first")


def _dropout(module: nn.Module) -> float:
    if isinstance(module, _DropoutNd):
        return module.p
    return module.dropout if isinstance(module, nn.RNNBase | nn.MultiheadAttention) else 0.0


def _choose(model: nn.Module, params: ParameterChoice) -> dict[str, nn.Parameter]:
    """The parameters to differentiate by, each under its first name."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise ValueError("no parameter of the model requires a gradient")
    for name, p in trained.items():
        if not p.is_floating_point():
            raise TypeError(f"grad_norms needs real parameters, and {name} is of type {p.dtype}")
    if params == "all":
        return trained
    if params == "last":
        last = [m for m in model.modules() if any(p.requires_grad for p in m.parameters(recurse=False))][-1]
        wanted = {id(p) for p in last.parameters(recurse=False)}
    elif isinstance(params, str):
        raise ValueError(f'params must be "all", "last", names or a function, got {params!r}')
    elif not isinstance(params, Iterable):
        wanted = {id(p) for name, p in trained.items() if params(name, p)}
        if not wanted:
            raise ValueError("params chose no parameter that requires a gradient")
    else:
        wanted = set()
        every = [(n, p) for n, p in model.named_parameters(remove_duplicate=False) if p.requires_grad]
        for pattern in params:
            found = {id(p) for name, p in every if fnmatch.fnmatchcase(name, pattern)}
            if not found:
                raise ValueError(
                    f"no parameter that requires a gradient is named {pattern!r}; names are like {every[0][0]!r}"
                )
            wanted |= found
        if not wanted:
            raise ValueError("params names no parameter")
    return {name: p for name, p in trained.items() if id(p) in wanted}
