import copy
import io

import pytest
import torch
from torch import nn

from weightlab.linalg import dct_matrix, newton_schulz
from weightlab.optim import Trion


def gaussian(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def parameter(*shape, seed=0, dtype=torch.float64):
    return nn.Parameter(gaussian(*shape, seed=seed, dtype=dtype))


def reference(W, gradients, *, rank, lr, momentum=0.95, weight_decay=0.0, scale=1.0):
    """The method for a tall W, with full matrices."""
    n = W.shape[1]
    Q = dct_matrix(n, dtype=torch.float64).T
    M = torch.zeros_like(W)
    for G in gradients:
        M = M + G
        S = (M @ Q).abs().sum(0)
        columns = sorted(sorted(range(n), key=lambda j: (-S[j].item(), j))[:rank])
        g = M @ Q[:, columns]
        M = M - (1 - momentum) * g @ Q[:, columns].T
        step = newton_schulz(g, "muon", 5) @ Q[:, columns].T
        W = W * (1 - lr * weight_decay) - lr * scale * step
    return W, M


@pytest.mark.parametrize("transform", ["matmul", "fft"])
@pytest.mark.parametrize(
    ("adjust_lr", "scale"),
    [("original", (9 / 6) ** 0.5), ("match_rms_adamw", 0.2 * 3.0), ("dion", (9 / 6) ** 0.5), (None, 1.0)],
)
def test_steps_follow_the_formulas(adjust_lr, scale, transform):
    w = parameter(9, 6)
    gradients = [gaussian(9, 6, seed=s) for s in range(1, 8)]
    expected, M = reference(
        w.detach(), gradients, rank=2, lr=0.02, momentum=0.9, weight_decay=0.1, scale=scale
    )
    optimizer = Trion([w], momentum=0.9, weight_decay=0.1, rank=2, adjust_lr=adjust_lr, transform=transform)
    for G in gradients:
        w.grad = G
        optimizer.step()
    torch.testing.assert_close(w.detach(), expected)
    torch.testing.assert_close(optimizer.state[w]["momentum"], M)


def test_dion_scale_shrinks_wide_matrices_and_the_original_does_not():
    moved = {}
    for adjust_lr in ("dion", "original", None):
        w = nn.Parameter(torch.zeros(3, 12))
        w.grad = gaussian(3, 12, dtype=torch.float32)
        Trion([w], rank=2, adjust_lr=adjust_lr).step()
        moved[adjust_lr] = w.detach().norm()
    torch.testing.assert_close(moved["dion"], moved[None] / 2)
    torch.testing.assert_close(moved["original"], moved[None])


def test_transposed_gradients_give_the_transposed_trajectory():
    w = parameter(5, 8)
    t = nn.Parameter(w.detach().T.clone())
    optimizers = Trion([w], rank=2, adjust_lr=None), Trion([t], rank=2, adjust_lr=None)
    for seed in range(4):
        w.grad = gaussian(5, 8, seed=seed)
        t.grad = w.grad.T.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(w.detach(), t.detach().T)


@pytest.mark.parametrize("shape", [(20, 12), (12, 20)])
def test_update_has_the_rank_and_the_singular_values_of_newton_schulz(shape):
    w = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    w.grad = gaussian(*shape)
    Trion([w], lr=1.0, rank=4, adjust_lr=None, coefficients="classic", ns_steps=12).step()
    values = torch.linalg.svdvals(w.detach())
    torch.testing.assert_close(values[:4], torch.ones(4, dtype=torch.float64), rtol=1e-5, atol=1e-5)
    assert values[4:].max() < 1e-12


def test_full_rank_is_the_orthogonal_factor_and_its_buffer_decays():
    w = nn.Parameter(torch.zeros(8, 6, dtype=torch.float64))
    G = gaussian(8, 6)
    w.grad = G
    optimizer = Trion([w], lr=1.0, rank=6, adjust_lr=None, coefficients="classic", ns_steps=30)
    optimizer.step()
    U, _, V = torch.linalg.svd(G, full_matrices=False)
    torch.testing.assert_close(-w.detach(), U @ V, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(optimizer.state[w]["momentum"], 0.95 * G)


def test_what_was_not_captured_is_kept_whole():
    w = nn.Parameter(torch.zeros(4, 3, dtype=torch.float64))
    G = torch.ones(4, 1) @ torch.tensor([[3.0, 2.0, 1.0]])
    w.grad = G.double()
    optimizer = Trion([w], rank=1, momentum=0.5, basis="identity")
    optimizer.step()
    assert optimizer.state[w]["momentum"][0].tolist() == [1.5, 2.0, 1.0]
    w.grad = torch.zeros_like(w)
    optimizer.step()
    assert optimizer.state[w]["momentum"][0].tolist() == [1.5, 1.0, 1.0]


def test_equal_shapes_together_move_as_apart():
    shapes = [(9, 6), (6, 9), (9, 6), (6, 3, 3), (4, 4)]
    together = [parameter(*s, seed=i) for i, s in enumerate(shapes)]
    apart = copy.deepcopy(together)
    optimizers = [Trion(together, rank=2), *(Trion([p], rank=2) for p in apart)]
    for step in range(3):
        for i, (p, q) in enumerate(zip(together, apart, strict=True)):
            p.grad = gaussian(*p.shape, seed=9 * step + i)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(together, apart, strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumes_bit_exactly(dtype):
    def run(optimizer, params, steps):
        for step in steps:
            for i, p in enumerate(params):
                p.grad = gaussian(*p.shape, seed=9 * step + i).to(dtype)
            optimizer.step()

    params = [parameter(6, 4, dtype=dtype), parameter(4, 2, 3, seed=1, dtype=dtype)]
    optimizer = Trion(params, rank=2, coefficients=[(1.5, -0.5, 0.0)])
    run(optimizer, params, range(3))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    again = copy.deepcopy(params)
    resumed = Trion(again, rank=2)
    resumed.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    run(optimizer, params, range(3, 6))
    run(resumed, again, range(3, 6))
    for p, q in zip(params, again, strict=True):
        assert torch.equal(p, q)


def test_state_is_one_buffer():
    w = parameter(6, 4, dtype=torch.float32)
    w.grad = torch.ones(6, 4)
    optimizer = Trion([w], rank=2)
    optimizer.step()
    assert {name: tuple(t.shape) for name, t in optimizer.state[w].items()} == {"momentum": (6, 4)}


def test_zero_and_nan_gradients():
    w, other = parameter(6, 4), parameter(6, 4)
    before = w.detach().clone()
    optimizer = Trion([w, other], rank=2)
    w.grad, other.grad = torch.zeros_like(w), torch.zeros_like(w)
    optimizer.step()
    assert torch.equal(w, before)
    w.grad, other.grad = torch.full_like(w, torch.nan), torch.ones_like(w)
    optimizer.step()
    assert w.isnan().any()
    assert other.isfinite().all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 0}, "rank"),
        ({"momentum": 1.0}, "momentum"),
        ({"coefficients": "muo"}, "unknown coefficients 'muo'"),
        ({"ns_steps": 0}, "steps"),
        ({"ns_dtype": "bfloat16"}, "ns_dtype must be a floating-point torch.dtype"),
        ({"basis": "svd"}, "basis must be one of dct2"),
        ({"select_norm": 3}, "norm"),
        ({"transform": "x"}, "transform"),
        ({"adjust_lr": "kimi"}, "adjust_lr"),
        ({"apply_to": "all"}, "takes matrices"),
    ],
)
def test_options_out_of_range(options, words):
    with pytest.raises(ValueError, match=words):
        Trion(nn.Linear(2, 2).parameters(), **options)
