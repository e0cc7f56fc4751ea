"""A small GPT: learned positions, pre-norm, causal attention, GPT-2's initialisation."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class GPTConfig:
    """Shape of a `GPT`.

    Attributes:
        vocabulary: Number of symbols.
        context: Longest sequence.
        width: Features of a position; a multiple of `heads`.
        depth: Blocks.
        heads: Attention heads.
        dropout: Probability of dropping, after embedding and at the end of each branch.
        tied: Whether the output head shares the token embedding's weight.
    """

    vocabulary: int
    context: int = 64
    width: int = 64
    depth: int = 2
    heads: int = 4
    dropout: float = 0.0
    tied: bool = False

    def __post_init__(self) -> None:
        for name in ("vocabulary", "context", "width", "depth", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads, not {self.width} for {self.heads} heads")


class Attention(nn.Module):
    """Causal multi-head self-attention, `[batch, time, width] -> [batch, time, width]`."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """Attend from each position to itself and those before it."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two layers with a GELU between, four times as wide inside."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.width, 4 * config.width)
        self.down = nn.Linear(4 * config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each position by itself."""
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """Attention, then feed-forward, each added to the stream of normalised inputs."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width)
        self.attention = Attention(config)
        self.norm2 = nn.LayerNorm(config.width)
        self.feed_forward = FeedForward(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Add both branches to `x`."""
        x = x + self.drop(self.attention(self.norm1(x)))
        return x + self.drop(self.feed_forward(self.norm2(x)))


class GPT(nn.Module):
    """Next-symbol predictor, int64 `[batch, time] -> [batch, time, vocabulary]` logits.

    Weights start as in GPT-2 ("Language Models are Unsupervised Multitask Learners"): normal, those
    that write into the residual stream divided by sqrt(2 depth), biases zero. The standard deviation
    is GPT-2's 0.02 at GPT-2's width of 768 and goes with 1 / sqrt(width): at width 64, 0.02 would leave
    attention asleep for hundreds of steps.

    Args:
        config: The shape.
        generator: Source of the initial weights; by default PyTorch's global one.

    Example:
        >>> model = GPT(GPTConfig(vocabulary=10, context=8, width=16, heads=2))
        >>> model(torch.zeros(3, 8, dtype=torch.long)).shape
        torch.Size([3, 8, 10])
    """

    def __init__(self, config: GPTConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocabulary, config.width)
        self.position_embedding = nn.Embedding(config.context, config.width)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        if config.tied:
            self.head.weight = self.token_embedding.weight
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the initial weights anew."""
        std = 0.02 * math.sqrt(768 / self.config.width)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                into_stream = name.endswith(("out.weight", "down.weight"))
                factor = 1 / math.sqrt(2 * self.config.depth) if into_stream else 1.0
                parameter.normal_(0.0, factor * std, generator=generator)
            elif name.endswith("bias"):
                parameter.zero_()

    def forward(self, symbols: Tensor) -> Tensor:
        """Return the logits of each position's next symbol."""
        positions = torch.arange(symbols.shape[1], device=symbols.device)
        x = self.drop(self.token_embedding(symbols) + self.position_embedding(positions))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))
