"""What optimizers ask of gradients before anything moves."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer


def refuse_sparse(optimizer: Optimizer, parameter: Tensor) -> None:
    """Raise TypeError if a parameter has a gradient and it is sparse.

    Example:
        >>> weight = torch.ones(2, requires_grad=True)
        >>> weight.sum().backward()
        >>> refuse_sparse(torch.optim.SGD([weight]), weight)
    """
    if parameter.grad is not None and parameter.grad.layout != torch.strided:
        raise TypeError(
            f"{type(optimizer).__name__} does not take sparse gradients, got {parameter.grad.layout} for a "
            f"parameter of shape {tuple(parameter.shape)}; use sparse=False or torch.optim.SparseAdam"
        )
