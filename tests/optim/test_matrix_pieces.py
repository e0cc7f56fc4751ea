import copy
import io

import pytest
import torch
from torch import nn

from weightlab.linalg import newton_schulz
from weightlab.optim import ARO, ROOT, AuON, DCTAdamW, HybridAuON, MatrixOptimizer, Trion
from weightlab.optim.matrix_pieces import piece_sizes, pieces


class Orthogonal(MatrixOptimizer):
    """Newton-Schulz with a factor that depends on the shape, and a state of its own that is no float."""

    batched = True

    def __init__(self, params, lr=0.1, momentum=0.9, **options):
        self.seen = []
        super().__init__(params, {"lr": lr, "momentum": momentum}, **options)

    def batches_equal_shapes(self, group):
        return self.batched

    def directions(self, updates, states, group):
        for update, state in zip(updates, states, strict=True):
            self.seen.append(tuple(update.shape))
            state["sizes"] = state.get("sizes", torch.zeros(2, dtype=torch.int16)) + torch.tensor(
                update.shape, dtype=torch.int16
            )
        return super().directions(updates, states, group)

    def direction(self, update, group):
        return newton_schulz(update)

    def lr_factor(self, shape, group):
        return float(shape[0])


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run(params, grads, steps=2, **options):
    optimizer = Orthogonal(params, **options)
    for step in range(steps):
        for p, g in zip(params, grads, strict=True):
            p.grad = g * (step + 1) + g.square()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((5, 6, 4), {"stacked": True}),
        ((2, 3, 6, 4), {"stacked": True}),
        ((9, 4), {"split": {"parts": 3}}),
        ((9, 4), {"split": (5, 2, 2)}),
        ((4, 9), {"split": {"sizes": [5, 4], "dim": 1}}),
        ((3, 6, 4), {"stacked": True, "split": {"parts": 2, "dim": 1}}),
        ((6, 2, 3, 3), {"split": (4, 2)}),
        ((6, 4, 3), {"split": {"parts": 2, "dim": 1}}),
    ],
)
def test_each_piece_moves_as_a_parameter_of_its_own(monkeypatch, shape, options, batched):
    monkeypatch.setattr(Orthogonal, "batched", batched)
    whole = nn.Parameter(drawn(*shape))
    grad = drawn(*shape, seed=1)
    split, stacked = options.get("split"), options.get("stacked", False)
    apart = [nn.Parameter(piece.clone()) for piece in pieces(whole.detach(), split, stacked)]
    run(apart, pieces(grad, split, stacked))
    run([whole], [grad], **options)
    for piece, alone in zip(pieces(whole.detach(), split, stacked), apart, strict=True):
        torch.testing.assert_close(piece, alone.detach(), rtol=1e-5, atol=1e-6)


def test_without_the_option_a_stack_is_a_kernel():
    whole = nn.Parameter(drawn(5, 6, 4))
    assert run([whole], [drawn(5, 6, 4)], steps=1).seen == [(5, 24)]
    assert run([whole], [drawn(5, 6, 4)], steps=1, stacked=True).seen == [(6, 4)] * 5


def test_equal_pieces_of_different_parameters_share_a_call():
    class Counts(Orthogonal):
        def direction(self, update, group):
            self.seen.append(("call", tuple(update.shape)))
            return update

    params = [nn.Parameter(drawn(8, 3)) for _ in range(2)]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = Counts(params, split=(4, 2, 2))
    optimizer.step()
    calls = [shape for shape in optimizer.seen if shape[0] == "call"]
    assert sorted(calls) == [("call", (2, 4, 3)), ("call", (4, 2, 3))]


def test_only_the_groups_matrices_are_split():
    layer = nn.Linear(4, 6)
    layer(torch.ones(4)).sum().backward()
    optimizer = Orthogonal([{"params": layer.parameters(), "split": {"parts": 2}}])
    optimizer.step()
    assert optimizer.seen == [(3, 4)] * 2


def test_state_of_pieces_resumes_bit_exactly_in_its_own_dtype():
    def steps(p, optimizer, numbers):
        for number in numbers:
            p.grad = drawn(6, 4, seed=number)
            optimizer.step()

    p = nn.Parameter(drawn(6, 4))
    optimizer = Orthogonal([p], split=(4, 2))
    steps(p, optimizer, range(2))
    file = io.BytesIO()
    torch.save((p.detach(), optimizer.state_dict()), file)
    steps(p, optimizer, range(2, 4))
    file.seek(0)
    weight, state = torch.load(file, weights_only=True)
    again = nn.Parameter(weight)
    resumed = Orthogonal([again], split=(4, 2))
    resumed.load_state_dict(state)
    steps(again, resumed, range(2, 4))
    assert torch.equal(p, again)
    kept = resumed.state[again]["pieces"]
    assert [(piece["sizes"].tolist(), piece["sizes"].dtype) for piece in kept] == [
        ([16, 16], torch.int16),
        ([8, 16], torch.int16),
    ]


@pytest.mark.parametrize("method", [ARO, AuON, DCTAdamW, HybridAuON, ROOT, Trion])
def test_every_method_takes_the_options_for_all_groups_at_once(method):
    options = {"stacked": True, "split": {"parts": 2}, "nonfinite": "skip"}
    moved = []
    for own_group in (False, True):
        w = nn.Parameter(drawn(2, 6, 4))
        optimizer = method([{"params": [w], **options}]) if own_group else method([w], **options)
        for seed in (1, 2):
            w.grad = drawn(2, 6, 4, seed=seed)
            optimizer.step()
        assert optimizer.param_groups[0].items() >= options.items()
        moved.append(w.detach())
    assert torch.equal(*moved)
    alone = nn.Parameter(drawn(2, 6, 4)[1, 3:].clone())
    optimizer = method([alone])
    for seed in (1, 2):
        alone.grad = drawn(2, 6, 4, seed=seed)[1, 3:]
        optimizer.step()
    torch.testing.assert_close(moved[0][1, 3:], alone.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("method", [HybridAuON, ROOT, Trion])
def test_the_fastest_type_is_bfloat16_only_where_it_is_native(method, native, monkeypatch):
    monkeypatch.setattr("weightlab.linalg.native_dtype.has_native_bfloat16", lambda device: native)
    moved = []
    for dtype in ("auto", torch.bfloat16 if native else torch.float32):
        w = nn.Parameter(drawn(6, 4))
        w.grad = drawn(6, 4, seed=1)
        method([w], ns_dtype=dtype).step()
        moved.append(w.detach())
    assert torch.equal(*moved)


@pytest.mark.parametrize("method", [ARO, AuON, DCTAdamW, HybridAuON, ROOT, Trion])
def test_an_option_that_there_is_not_is_refused(method):
    with pytest.raises(TypeError, match=rf"{method.__name__} has no option nesterof"):
        method([nn.Parameter(torch.zeros(2, 2))], nesterof=True)


def test_options_survive_states_saved_before_they_existed():
    p = nn.Parameter(drawn(6, 4))
    optimizer = Orthogonal([p], split=(4, 2))
    state = copy.deepcopy(optimizer.state_dict())
    for option in ("stacked", "split", "nonfinite"):
        del state["param_groups"][0][option]
    optimizer.load_state_dict(state)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.seen == [(6, 4)]


def test_hybrid_splits_heads():
    """A fused projection moves as if heads were parameters; three steps of the whole would mix them."""
    whole = nn.Parameter(drawn(12, 8))
    heads = [nn.Parameter(piece.clone()) for piece in whole.detach().split(4)]
    grad = drawn(12, 8, seed=3)
    for params, grads, options in (
        ([whole], [grad], {"split": {"parts": 3}}),
        (heads, grad.split(4), {}),
    ):
        optimizer = HybridAuON([{"params": params, **options}], adjust_lr="match_rms_adamw")
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        optimizer.step()
    torch.testing.assert_close(whole.detach(), torch.cat([h.detach() for h in heads]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "split", "stacked", "error", "words"),
    [
        ((10, 4), {"parts": 3}, False, ValueError, r"3 equal parts.*size 10.*\(10, 4\)"),
        ((10, 4), (5, 4), False, ValueError, r"\(5, 4\).*sum to 10.*\(10, 4\)"),
        ((10, 4), (), False, ValueError, "positive"),
        ((10, 4), (10, 0), False, ValueError, "positive"),
        ((10, 4), {"parts": 0}, False, ValueError, "0 equal parts"),
        ((10, 4), {"parts": 2.0}, False, ValueError, "2.0 equal parts"),
        ((10, 4), {"parts": 2, "dim": 2}, False, ValueError, "dim must be 0"),
        ((10, 4), {"parts": 2, "sizes": (5, 5)}, False, ValueError, "either"),
        ((10, 4), {"rows": 2}, False, ValueError, "either"),
        ((10,), (5, 5), False, ValueError, r"\(10,\)"),
        ((3, 10, 4), (3,), True, ValueError, r"sum to 10.*\(3, 10, 4\)"),
        ((10, 4), "qkv", False, TypeError, "'qkv'"),
        ((10, 4), 3, False, TypeError, "parts"),
    ],
)
def test_splits_that_do_not_fit(shape, split, stacked, error, words):
    with pytest.raises(error, match=words):
        piece_sizes(shape, split, stacked)
    with pytest.raises(error, match=words):
        Orthogonal(
            [{"params": [nn.Parameter(torch.ones(shape))], "use_matrix_rule": True}],
            split=split,
            stacked=stacked,
        )
