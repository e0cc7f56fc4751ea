"""How base layers hold their weight, and what a matrix update of it does to an input.

Every layer that can be adapted multiplies by one matrix (out, in): a `Linear` and transformers' `Conv1D` its inputs'
last dimension, an `Embedding` one-hot vectors, a convolution the patches under its kernel, flattened to
in·kernel numbers. Methods see that matrix alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from weightlab.adapters._peft import Conv1D

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
SUPPORTED = "Linear, Conv1D of transformers, Embedding, Conv1d, Conv2d and Conv3d"


class LinearLayout:
    """A layer that multiplies the last dimension, its weight stored (out, in), or (in, out) if `transposed`."""

    def __init__(self, base: nn.Module, transposed: bool = False) -> None:
        self.transposed = transposed
        if transposed:
            self.shape = (int(base.weight.shape[1]), int(base.weight.shape[0]))  # type: ignore[index]
        else:
            self.shape = (int(base.out_features), int(base.in_features))  # type: ignore[arg-type]

    def matrix(self, weight: Tensor) -> Tensor:
        """View a weight as (out, in)."""
        return weight.mT if self.transposed else weight

    def weight(self, matrix: Tensor) -> Tensor:
        """Lay an (out, in) matrix out as the base's weight. Inverse of `matrix`."""
        return matrix.mT.contiguous() if self.transposed else matrix

    def apply(self, base: nn.Module, x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        """Compute the layer's output as if `matrix` were its weight."""
        return F.linear(x, matrix, bias)

    def project(self, base: nn.Module, x: Tensor, right: Tensor) -> Tensor:
        """Multiply the input by `right` (r, in)."""
        return F.linear(x, right)

    def expand(self, base: nn.Module, features: Tensor, left: Tensor) -> Tensor:
        """Multiply what `project` gave by `left` (out, r)."""
        return F.linear(features, left)


class EmbeddingLayout(LinearLayout):
    """An embedding: a product with one-hot inputs, its weight stored (in, out) = (tokens, dimension)."""

    def __init__(self, base: nn.Embedding) -> None:
        self.transposed = True
        self.shape = (base.embedding_dim, base.num_embeddings)

    def apply(self, base: Any, x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        """Look the tokens up in `matrix`, times the factor that some models give their embedding."""
        found = F.embedding(x, matrix.mT, base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq)
        return found * getattr(base, "embed_scale", 1.0)

    def project(self, base: Any, x: Tensor, right: Tensor) -> Tensor:
        """Look the tokens up in `right` (r, tokens)."""
        return self.apply(base, x, right)


class ConvolutionLayout(LinearLayout):
    """A convolution without groups, its kernels flattened."""

    def __init__(self, base: nn.Conv2d) -> None:
        if base.groups != 1:
            raise ValueError(
                f"is a convolution with groups={base.groups}, whose weight is not one matrix; leave it out by "
                "exclude_modules"
            )
        self.transposed = False
        self.kernel = tuple(base.weight.shape[1:])
        self.shape = (base.out_channels, base.weight[0].numel())

    def matrix(self, weight: Tensor) -> Tensor:
        """View kernels as (out, in·kernel)."""
        return weight.flatten(1)

    def weight(self, matrix: Tensor) -> Tensor:
        """Fold an (out, in·kernel) matrix into kernels."""
        return matrix.reshape(-1, *self.kernel)

    def apply(self, base: Any, x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        """Convolve by the rows of `matrix`, with the base's stride, padding and dilation."""
        return base._conv_forward(x, self.weight(matrix), bias)

    def project(self, base: nn.Module, x: Tensor, right: Tensor) -> Tensor:
        """Convolve by `right` (r, in·kernel): r channels."""
        return self.apply(base, x, right)

    def expand(self, base: nn.Module, features: Tensor, left: Tensor) -> Tensor:
        """Mix r channels into out channels."""
        channels = -len(self.kernel)
        return F.linear(features.movedim(channels, -1), left).movedim(-1, channels)


def layout_of(base: nn.Module, quantized: bool = False) -> LinearLayout:
    """Find how a layer holds its weight.

    Args:
        base: The layer.
        quantized: Whether PEFT knows it as a quantised linear layer.

    Raises:
        TypeError: If layers of its class cannot be adapted. The message continues the layer's name.
        ValueError: If it is a convolution in groups.

    Example:
        >>> layout_of(nn.Conv2d(3, 8, 5)).shape
        (8, 75)
    """
    if isinstance(base, NonDynamicallyQuantizableLinear):
        raise TypeError("is read by MultiheadAttention past its forward, so that an adapter would do nothing")
    if isinstance(base, Conv1D):
        layout = LinearLayout(base, transposed=True)
    elif isinstance(base, nn.Linear) or quantized:
        layout = LinearLayout(base)
    elif isinstance(base, nn.Embedding):
        layout = EmbeddingLayout(base)
    elif isinstance(base, CONVOLUTIONS):
        layout = ConvolutionLayout(base)  # type: ignore[arg-type]
    else:
        raise TypeError(f"is a {type(base).__name__}; supported are {SUPPORTED}")
    weight = base.weight
    if not quantized and not (isinstance(weight, Tensor) and weight.dtype in _FLOATING):
        raise TypeError(
            f"holds its weight as {getattr(weight, 'dtype', type(weight).__name__)}, which PEFT cannot dequantise; "
            "adapt the model before it is quantised, or use a backend that PEFT knows"
        )
    return layout


_FLOATING = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
