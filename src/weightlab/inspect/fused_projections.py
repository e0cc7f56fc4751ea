"""How queries, keys and values lie in one fused weight."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

_FUSED = re.compile(r"(^|[._])(qkv|c_attn|query_key_value|in_proj_weight|Wqkv|qkv_proj)([._]|$)")
# Architectures of transformers that store q, k, v of the first head, then those of the second, and so on.
_BY_HEAD = ("bloom", "gpt_neox", "gpt_neox_japanese", "persimmon")


class FusedProjection(NamedTuple):
    """One side of a weight, as groups of rows for q, k and v.

    Attributes:
        side: Which dimension is fused.
        groups: How often q, k, v take turns along it.
        sizes: Rows of q, k and v in a group.
    """

    side: int
    groups: int
    sizes: tuple[int, int, int]

    def part(self, weight: Tensor, index: int) -> Tensor:
        """Cut out q, k or v (0, 1, 2).

        Example:
            >>> import torch
            >>> FusedProjection(0, 2, (2, 1, 1)).part(torch.arange(8.0)[:, None], 0).flatten()
            tensor([0., 1., 4., 5.])
        """
        turns = weight.unflatten(self.side, (self.groups, sum(self.sizes)))
        start = sum(self.sizes[:index])
        return turns.narrow(self.side + 1, start, self.sizes[index]).flatten(self.side, self.side + 1)


def fused_projection(
    name: str, shape: tuple[int, ...], config: Mapping[str, Any] | None = None
) -> FusedProjection | None:
    """Find out whether a weight is a fused projection whose parts can be told.

    Args:
        name: Fused ones are named `qkv`, `c_attn`, `query_key_value`, `in_proj_weight`, `Wqkv` or `qkv_proj`.
        shape: Of a matrix.
        config: The model's `config.json`. It tells fewer heads of keys and values than of queries (Phi-3,
            DBRX, multi-query attention), and that parts take turns by head (GPT-NeoX, BLOOM, Falcon, ...).

    Returns:
        None if it is not fused, or its layout is not known: CodeGen's, and a `query_key_value` without a config. Without
        one, the others are taken to be three parts of equal size one after the other, as in GPT-2 and
        `nn.MultiheadAttention`.

    Example:
        >>> fused_projection("h.0.attn.c_attn.weight", (768, 2304))
        FusedProjection(side=1, groups=1, sizes=(768, 768, 768))
        >>> neox = {"model_type": "gpt_neox", "num_attention_heads": 8, "hidden_size": 512}
        >>> fused_projection("layers.0.attention.query_key_value.weight", (1536, 512), neox)
        FusedProjection(side=0, groups=8, sizes=(64, 64, 64))
    """
    if len(shape) != 2 or not _FUSED.search(name):
        return None
    facts = config or {}
    kind, rows = facts.get("model_type"), shape[0]
    if kind == "codegen":
        return None
    heads = _number(facts, "num_attention_heads", "n_head", "n_heads", "num_heads")
    width = _number(facts, "hidden_size", "n_embd", "d_model")
    if heads and width:
        keys = _key_heads(facts, heads)
        size = _number(facts, "head_dim") or width // heads
        new_falcon = kind == "falcon" and bool(facts.get("new_decoder_architecture"))
        turns = kind in _BY_HEAD or (kind in ("falcon", "gpt_bigcode") and keys == heads)
        if rows == (heads + 2 * keys) * size and keys > 0 and heads % keys == 0:
            if new_falcon or turns:
                return FusedProjection(0, keys, (heads // keys * size, size, size))
            return FusedProjection(0, 1, (heads * size, keys * size, keys * size))
    if "query_key_value" in name or max(shape) != 3 * min(shape):
        return None
    third = min(shape)
    return FusedProjection(shape.index(max(shape)), 1, (third, third, third))


def _key_heads(facts: Mapping[str, Any], heads: int) -> int:
    kind = facts.get("model_type")
    if kind in ("falcon", "gpt_bigcode") and not facts.get("new_decoder_architecture"):
        return 1 if facts.get("multi_query", True) else heads
    attention = facts.get("attn_config")
    nested = _number(attention, "kv_n_heads") if isinstance(attention, Mapping) else None
    return nested or _number(facts, "num_key_value_heads", "num_kv_heads", "multi_query_group_num") or heads


def _number(facts: Mapping[str, Any], *names: str) -> int | None:
    return next((value for name in names if isinstance(value := facts.get(name), int) and value > 0), None)
