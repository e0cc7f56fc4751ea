import math

import pytest
import torch
from torch.nn import functional as F

from weightlab.tasks.models import GPT, GPTConfig

SMALL = GPTConfig(vocabulary=11, context=6, width=8, depth=2, heads=2)


def reference(model, symbols):
    """The forward pass of one sequence in float64, written out with explicit loops over heads."""
    state = {name: value.double() for name, value in model.state_dict().items()}
    config = model.config

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    time, size = len(symbols), config.width // config.heads
    x = state["token_embedding.weight"][symbols] + state["position_embedding.weight"][:time]
    for i in range(config.depth):
        q, k, v = linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attention.qkv").split(config.width, -1)
        heads = []
        for h in range(config.heads):
            part = slice(h * size, (h + 1) * size)
            scores = q[:, part] @ k[:, part].T / math.sqrt(size)
            scores = scores.masked_fill(torch.ones(time, time).triu(1).bool(), -math.inf)
            heads.append(scores.softmax(-1) @ v[:, part])
        x = x + linear(torch.cat(heads, -1), f"blocks.{i}.attention.out")
        inner = linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.feed_forward.up")
        inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
        x = x + linear(inner, f"blocks.{i}.feed_forward.down")
    return norm(x, "norm") @ state["head.weight"].T


def test_forward_matches_the_formula():
    model = GPT(SMALL, torch.Generator().manual_seed(0)).double()
    symbols = torch.randint(11, (3, 6), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model(symbols), torch.stack([reference(model, row) for row in symbols]))


def test_no_position_sees_a_later_one():
    model = GPT(SMALL, torch.Generator().manual_seed(0))
    symbols = torch.randint(11, (1, 6))
    changed = symbols.clone()
    changed[0, 3] = (changed[0, 3] + 1) % 11
    difference = (model(symbols) - model(changed)).abs().amax(-1)[0]
    assert (difference[:3] == 0).all()
    assert (difference[3:] > 0).all()


def test_weights_come_from_the_generator_alone():
    a, b = (GPT(SMALL, torch.Generator().manual_seed(5)) for _ in range(2))
    other = GPT(SMALL, torch.Generator().manual_seed(6))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.head.weight, other.head.weight)


def test_initial_standard_deviations():
    model = GPT(GPTConfig(vocabulary=97, width=192, depth=3), torch.Generator().manual_seed(0))
    std = 0.02 * math.sqrt(768 / 192)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            expected = std / math.sqrt(6) if name.endswith(("out.weight", "down.weight")) else std
            assert parameter.std().item() == pytest.approx(expected, rel=0.05), name
        else:
            constant = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            assert (parameter == constant).all(), name


def test_a_tied_head_is_the_embedding():
    model = GPT(GPTConfig(vocabulary=11, context=6, width=8, heads=2, tied=True))
    assert model.head.weight is model.token_embedding.weight
    untied = sum(p.numel() for p in GPT(SMALL).parameters())
    assert sum(p.numel() for p in model.parameters()) == untied - 11 * 8


def test_dropout_acts_in_training_only():
    model = GPT(GPTConfig(vocabulary=11, context=6, width=8, heads=2, dropout=0.5))
    symbols = torch.zeros(1, 6, dtype=torch.long)
    assert not torch.equal(model(symbols), model(symbols))
    model.eval()
    assert torch.equal(model(symbols), model(symbols))


def test_overfits_one_sequence():
    model = GPT(SMALL, torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    symbols = torch.tensor([[1, 2, 3, 1, 4, 5, 9]])
    for _ in range(100):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(symbols[:, :-1])[0], symbols[0, 1:])
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


def test_impossible_shapes_are_refused():
    with pytest.raises(ValueError, match="width must be a multiple of heads, not 10 for 4 heads"):
        GPTConfig(vocabulary=11, width=10)
    with pytest.raises(ValueError, match="depth must be at least 1, not 0"):
        GPTConfig(vocabulary=11, depth=0)
