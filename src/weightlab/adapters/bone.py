"""Bone as a PEFT method: the frozen weight is updated blockwise through one small trained tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weightlab.adapters._peft import Conv1D
from weightlab.adapters.block_affine import (
    BlockAffine,
    block_shape,
    bone_delta,
    bone_linear,
    bone_weight,
    is_affine,
    resolve_variant,
    slice_sum,
)
from weightlab.adapters.layouts import ConvolutionLayout, EmbeddingLayout
from weightlab.adapters.registration import register
from weightlab.adapters.tuner import AdapterConfig, AdapterLayer, AdapterModel, check

__all__ = ["BlockAffine", "BoneConfig", "BoneLayer", "BoneModel", "bone_linear", "bone_weight"]


@dataclass
class BoneConfig(AdapterConfig):
    r"""Settings of Bone.

    Each weight is cut into r × r blocks, and one tensor D of zeros is trained. By the default variant all blocks of a
    block-row share one block of it, and become :math:`W_{ab} + W_{ab} D_a + D_a`: the frozen weight steers the update. What
    trains is r·out numbers a layer. No singular value decomposition, no random start, no scale.

    Variants:

    * `"affine"` (default; alias `"bat"`, as PEFT's `MissConfig(init_weights="bat")` is called): the paper's. r must divide
      both sides of every adapted weight. The update is of full rank. Adapters that are active together act one on the
      result of the other, in order.
    * `"affine_row"`: shared along block-columns; r·in numbers.
    * `"additive"` (alias `"miss"`, PEFT's default): W + Dᵀ [I I … I], which is LoRA whose A is a frozen tiled identity:
      `to_lora` writes it exactly. Any r up to in. Cheaper, and what later versions of the paper propose.
    * `"mini"`: additive with D tiled along out, r·mini_r numbers.

    Gradients of D are sums over in/r blocks, hence larger than LoRA's, and the best learning rate is lower; tune it.

    Attributes:
        r: Side of a block. Default 64, the paper's.
        variant: See above. Each adapter of a model may have its own.
        mini_r: Columns of D, in the variant `"mini"` alone; must divide out. Default None: 1, the paper's.
        dropout: In every variant. An affine update with dropout takes a second full product in training.

    Raises:
        ValueError: If a field is out of range, or later, if r or mini_r does not fit a weight or a weight is not finite.
        TypeError: If an affine update is asked of a weight whose quantisation cannot be undone.

    Complexity:
        See `bone_linear`.

    Paper:
        "Bone: Block Affine Transformation as Parameter Efficient Fine-tuning Methods for Large Language Models",
        arXiv 2409.15371. This is the method of its first versions; the last are called MiSS.

    Example:
        >>> from peft import get_peft_model
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 6)), BoneConfig(r=2, target_modules=["0"]))
        >>> sum(p.numel() for p in model.parameters() if p.requires_grad)
        12
    """

    method = "bone"

    r: int = 64
    variant: str = "affine"
    mini_r: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.variant = resolve_variant(self.variant)
        check(
            f"mini_r={self.mini_r!r}",
            self.mini_r is None or self.variant == "mini",
            'None unless variant="mini"',
        )


class BoneLayer(AdapterLayer):
    """A layer whose weight is updated blockwise."""

    prefix = "bone_"
    adapter_layer_names = ("bone_blocks",)
    other_param_names = ("variants",)

    def make_containers(self) -> None:
        """Create empty containers."""
        self.bone_blocks = nn.ParameterDict()
        self.variants: dict[str, str] = {}

    def reset_adapter(self, name: str, config: BoneConfig, r: int, initialize: bool) -> None:  # type: ignore[override]
        """Create D, zeros.

        Raises:
            ValueError: If r or mini_r does not fit the weight, or the weight is not finite.
            TypeError: If the variant is affine and the weight's quantisation cannot be undone.
        """
        try:
            shape = block_shape(*self.shape, r, config.variant, config.mini_r)
        except ValueError as error:
            raise ValueError(
                f"target module {self.key!r}: {error}, or set another r in rank_pattern"
            ) from None
        if initialize and (is_affine(config.variant) or self.quantization_backend is None):
            self.start_matrix()
        self.variants[name] = config.variant
        self.bone_blocks[name] = self.new_parameter(*shape)

    def is_additive(self, name: str) -> bool:
        """Whether the update does not depend on the weight."""
        return not is_affine(self.variants[name])

    def effective_weight(self, name: str, weight: Tensor) -> Tensor:
        """Return the updated matrix."""
        return bone_weight(weight, self.bone_blocks[name].to(weight.dtype), self.variants[name])

    def delta_weight(self, name: str) -> Tensor:
        """Return the update of the base's own weight, (out, in)."""
        blocks = self.bone_blocks[name]
        weight = blocks.new_empty(self.shape) if self.is_additive(name) else self.base_matrix()
        return bone_delta(weight, blocks, self.variants[name])

    def lora_factors(self, name: str) -> tuple[Tensor, Tensor]:
        """Return A, the tiled identity, and B = Dᵀ.

        Raises:
            TypeError: If the variant is affine.
        """
        if not self.is_additive(name):
            return super().lora_factors(name)
        blocks = self.bone_blocks[name].detach()
        out, inputs = self.shape
        r, columns = blocks.shape
        identity = torch.eye(r, dtype=blocks.dtype, device=blocks.device)
        return identity.repeat(1, -(-inputs // r))[:, :inputs], blocks.mT.repeat(out // columns, 1)

    def adapt(self, name: str, x: Tensor, result: Tensor) -> Tensor:
        """Add an additive adapter's share of the output."""
        blocks = self.bone_blocks[name]
        dtype = self.compute_dtype(x, blocks.dtype)
        if not isinstance(self.layout, EmbeddingLayout | ConvolutionLayout):
            share = slice_sum(self._input(x, dtype), blocks.shape[0]) @ blocks.to(dtype)
            repeats = self.shape[0] // blocks.shape[1]
            return result + (share if repeats == 1 else share.repeat(*(1 for _ in share.shape[1:]), repeats))
        base = self.get_base_layer()
        right, _ = self.lora_factors(name)
        left = blocks.mT.repeat(self.shape[0] // blocks.shape[1], 1)
        features = self.layout.project(base, self._input(x, dtype), right.to(dtype))
        return result + self.layout.expand(base, features, left.to(dtype))

    def adapted(self, names: Sequence[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the layer with some adapters: one on a plain linear layer by `bone_linear`, else one by one."""
        dropped = [
            name for name in names if self.training and not isinstance(self.dropouts[name], nn.Identity)
        ]
        if len(names) == 1 and not dropped and self._is_plain(x):
            (name,) = names
            base: Any = self.get_base_layer()
            weight = self.layout.matrix(base.weight)
            return bone_linear(x, weight, self.bone_blocks[name], base.bias, self.variants[name])
        if not dropped or all(self.is_additive(name) for name in names):
            return super().adapted(names, x, *args, **kwargs)
        result = self.base_layer(x, *args, **kwargs)
        base, output = self.get_base_layer(), result.dtype
        dtype = self.compute_dtype(x, self.get_base_weight().dtype)
        matrix = self.base_matrix()
        for name in names:
            blocks, variant = self.bone_blocks[name], self.variants[name]
            delta = bone_delta(matrix, blocks.to(matrix.dtype), variant)
            matrix = matrix + delta
            seen = self._input(self.dropouts[name](x) if x.is_floating_point() else x, dtype)
            result = result + self.layout.apply(base, seen, delta.to(dtype))
        return result.to(output)

    def _is_plain(self, x: Tensor) -> bool:
        """Whether the base is a linear layer that nobody watches, so that it need not be called itself."""
        base = self.base_layer
        return (
            type(base) in (nn.Linear, Conv1D)
            and self.quantization_backend is None
            and "forward" not in vars(base)
            and not (
                base._forward_hooks
                or base._forward_pre_hooks
                or base._backward_hooks
                or base._backward_pre_hooks
            )
            and (x.dtype == base.weight.dtype or torch.is_autocast_enabled(x.device.type))
        )


class BoneModel(AdapterModel):
    """A model with Bone adapters."""

    prefix = "bone_"
    tuner_layer_cls = BoneLayer


register()
