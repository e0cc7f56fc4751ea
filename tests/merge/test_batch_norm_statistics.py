from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from weightlab.merge import reset_batch_norm_
from weightlab.merge.batch_norm_statistics import Moments
from weightlab.nn import GhostBatchNorm2d


def pooled(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    x = torch.cat([part.double().transpose(0, 1).flatten(1) for part in parts], dim=1)
    return x.mean(1), x.var(1)


def convnet(norm: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 5, 3), norm, nn.Dropout(0.5), nn.ReLU(), nn.Flatten(), nn.Linear(80, 3))


def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [3 + 2 * torch.randn(n, 2, 6, 6, generator=generator) for n in (7, 4, 2)]


@pytest.mark.parametrize(
    "norm",
    [nn.BatchNorm2d(5), nn.SyncBatchNorm(5), GhostBatchNorm2d(5, ghost_size=2)],
    ids=lambda n: type(n).__name__,
)
def test_statistics_are_those_of_all_data_at_once(norm: nn.Module):
    model = convnet(norm)
    assert reset_batch_norm_(model, images()) == ["1"]
    mean, variance = pooled([model[0](x).detach() for x in images()])
    assert torch.allclose(norm.running_mean.double(), mean, rtol=1e-5, atol=1e-6)
    assert torch.allclose(norm.running_var.double(), variance, rtol=1e-5)
    assert norm.num_batches_tracked.item() == 3


def test_one_batch_gives_what_training_with_momentum_none_gives():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3), nn.BatchNorm1d(3)
    ).double()
    x = torch.randn(9, 4).double()
    reset_batch_norm_(model, [(x, "labels")])
    ours = {name: y.clone() for name, y in model.named_buffers()}
    torch.optim.swa_utils.update_bn([x], model)
    for name, y in model.named_buffers():
        assert torch.allclose(ours[name].double(), y.double(), rtol=1e-12), name
    # Hence in evaluation the batch comes out of the first norm as it does in training, but for its biased variance.
    ratio = (8 / 9) ** 0.5
    head = model[:2]
    assert torch.allclose(head.eval()(x), head.train()(x) * ratio, atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=2, max_size=5), st.integers(-1000, 1000))
def test_pooling_does_not_depend_on_how_data_are_cut(sizes: list[int], shift: int):
    generator = torch.Generator().manual_seed(sum(sizes))
    x = shift + torch.randn(sum(sizes), 3, 2, generator=generator).double()
    moments = Moments()
    for part in x.split(sizes):
        moments.add(part)
    mean, variance = pooled([x])
    assert torch.allclose(moments.mean, mean, rtol=1e-12, atol=1e-12)
    assert torch.allclose(moments.variance("x"), variance, rtol=1e-9)


def test_all_else_stays_as_it_was():
    model = convnet(nn.BatchNorm2d(5)).train()
    model[3].eval()
    model(images()[0]).sum().backward()
    kept = {name: x.clone() for name, x in model.state_dict().items()}
    grads = [p.grad.clone() for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    state = torch.random.get_rng_state()
    reset_batch_norm_(model, images())
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    changed = {name for name, x in model.state_dict().items() if not torch.equal(x, kept[name])}
    assert changed == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    # Dropout was off.
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_result_does_not_depend_on_the_statistics_before():
    first, second = convnet(nn.BatchNorm2d(5)), convnet(nn.BatchNorm2d(5))
    second[1].running_mean.fill_(5)
    second[1].running_var.fill_(100)
    reset_batch_norm_(first, images())
    reset_batch_norm_(second, images())
    assert all(torch.equal(x, y) for x, y in zip(first.buffers(), second.buffers(), strict=True))


def test_layers_used_twice_unused_or_without_statistics():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.idle = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
            self.own = nn.BatchNorm1d(3, track_running_stats=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.shared(x) + self.own(self.shared(x + 10))

    model = Model()
    x = torch.randn(8, 3)
    assert reset_batch_norm_(model, [x]) == ["shared"]
    mean, variance = pooled([x, x + 10])
    assert torch.allclose(model.shared.running_mean.double(), mean, rtol=1e-5)
    assert torch.allclose(model.shared.running_var.double(), variance, rtol=1e-5)
    assert model.idle.running_mean.tolist() == [0, 0, 0]


def test_half_precision_moments_are_not_taken_in_half_precision():
    norm = nn.BatchNorm1d(1).bfloat16()
    x = (1000 + torch.arange(512.0)[:, None] % 2 * 8).bfloat16()
    assert reset_batch_norm_(norm, [x]) == [""]
    assert norm.running_mean.dtype == torch.bfloat16
    assert norm.running_mean.item() == torch.tensor(1004.0).bfloat16().item()
    assert norm.running_var.item() == pytest.approx(16, rel=0.01)


def test_own_way_to_run_a_batch():
    norm = nn.BatchNorm1d(2)
    batch = {"x": torch.randn(6, 2)}
    reset_batch_norm_(norm, [batch], forward=lambda model, batch: model(batch["x"]))
    assert torch.allclose(norm.running_mean, batch["x"].mean(0), atol=1e-6)


def test_bad_data_leave_the_model_as_it_was():
    model = convnet(nn.BatchNorm2d(5)).train()
    kept = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(ValueError, match="there are no batches"):
        reset_batch_norm_(model, [])
    with pytest.raises(ValueError, match="the input of 1 has values that are not finite"):
        reset_batch_norm_(model, [*images(), torch.full((2, 2, 6, 6), torch.inf)])
    with pytest.raises(RuntimeError):
        reset_batch_norm_(model, [*images(), torch.zeros(2, 9, 6, 6)])
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        reset_batch_norm_(nn.BatchNorm1d(3), [torch.zeros(1, 3)])
    assert all(torch.equal(x, kept[name]) for name, x in model.state_dict().items())
    assert all(m.training for m in model.modules())
    assert not any(m._forward_pre_hooks for m in model.modules() if isinstance(m, _BatchNorm))
