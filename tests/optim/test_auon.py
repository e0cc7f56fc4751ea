import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightlab.linalg import newton_schulz
from weightlab.optim import AuON, HybridAuON, auon_update
from weightlab.optim.auon import power_sum_widths

TINY = 1e-30
RESOLUTION = torch.finfo(torch.float32).eps


def gaussian(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def reference_brake(u, gamma):
    """Root mean square of cosh, in float64, straight from the definition."""
    u = u.double()
    x = gamma * u / u.norm()
    return x.cosh().square().mean().sqrt().item()


def brake(u, gamma):
    """The brake as `auon_update` applies it."""
    step = auon_update(u, gamma=gamma, normalize=False, eps=TINY)
    return (u.double().norm() / step.double().norm()).item() - 1e-8


def spike(n):
    u = torch.zeros(n)
    u[n // 2] = 2.5
    return u


def reference_step(w, m, g, *, lr, momentum=0.95, weight_decay=0.0, gamma=1.0, nesterov=True, normalize=True):
    """One step in float64, written from the formulas. Returns the new parameter and buffer."""
    w, m, g = w.double(), m.double(), g.double()
    m = momentum * m + (1 - momentum) * g
    u = (1 - momentum) * g + momentum * m if nesterov else m
    r = reference_brake(u, gamma)
    step = (u / (u.norm() + 1e-7) if normalize else u) / (r + 1e-8)
    return w * (1 - lr * weight_decay) - lr * step, m


@pytest.mark.parametrize("size", [1, 2, 10, 1000, 10**6])
@pytest.mark.parametrize("gamma", [0.1, 1.0, 1.5])
@pytest.mark.parametrize("kind", ["gaussian", "equal", "spike"])
def test_brake_stays_within_its_bounds(size, gamma, kind):
    u = {"gaussian": gaussian(size), "equal": torch.full((size,), 0.3), "spike": spike(size)}[kind]
    low, high = math.sqrt(1 + gamma**2 / size), math.sqrt(1 + math.sinh(gamma) ** 2 / size)
    # The measured brake is the ratio of two norms of float32 tensors.
    assert low - 3 * RESOLUTION <= brake(u, gamma) <= high + 3 * RESOLUTION
    if kind == "spike":
        assert brake(u, gamma) == pytest.approx(high, abs=3 * RESOLUTION)


def test_one_entry_is_braked_by_cosh_gamma():
    for gamma in (0.5, 1.0, 1.5, 10.0):
        assert brake(torch.tensor([-3.0]), gamma) == pytest.approx(math.cosh(gamma), rel=1e-6)


# Sizes on both sides of every change of form: exact, 4, 2 and 1 power sums.
SIZES = [3, 700, 33_000, 60_000, 120_000, 400_000, 900_000]


@pytest.mark.parametrize(
    ("gamma", "size"), [*((g, n) for g in (0.3, 1.0, 1.5, 3.0) for n in SIZES), (1.5, 5_000_000)]
)
def test_every_form_of_the_brake_is_exact_to_float32(gamma, size):
    heavy = gaussian(size, seed=1)
    heavy /= gaussian(size, seed=2)
    for u in (gaussian(size), heavy, spike(size)):
        reference = reference_brake(u, gamma)
        step = auon_update(u, gamma=gamma, normalize=False, eps=TINY)
        largest = u.abs().argmax()
        got = u[largest].double() / step[largest].double()
        # resolution of r, then the rounding of its inverse and of the product
        assert abs(got.item() - reference) <= 2.5 * RESOLUTION * reference


@settings(max_examples=60, deadline=None)
@given(
    gamma=st.floats(0.01, 4.0),
    entries=st.lists(st.floats(-1, 1).filter(lambda x: x == 0 or abs(x) > 1e-6), min_size=1, max_size=30),
)
def test_power_sums_bracket_the_energy(gamma, entries):
    x = torch.tensor(entries, dtype=torch.float64)
    if x.norm() == 0:
        x[0] = 1.0
    x = gamma * x / x.norm()
    energy = x.sinh().square().sum().item()
    p1, p2, p3, p4 = ((x ** (2 * k)).sum().item() for k in range(1, 5))
    lower = {
        1: p1,
        2: p1 * math.sinh(math.sqrt(p2 / p1)) ** 2 / (p2 / p1),
        4: p1 + p2 / 3 + 2 * p3 / 45 + p4 / 315,
    }
    for count, width in power_sum_widths(gamma).items():
        slack = 1e-12 * energy
        assert lower[count] - slack <= energy <= lower[count] + width + slack


def test_spike_never_lowers_the_brake():
    base = gaussian(50, seed=3).double()
    last = 0.0
    for size in (0.0, 1.0, 3.0, 10.0, 100.0):
        u = base.clone()
        u[7] = base[7].abs() + size
        r = brake(u / u.norm(), 1.5)
        assert r >= last
        last = r


def test_brake_ignores_the_order_of_entries():
    u = gaussian(300).double()
    assert brake(u, 1.5) == pytest.approx(brake(u[torch.randperm(300)], 1.5), rel=1e-12)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("gamma", [0.0, 1.0, 1.5, 40.0, "rms"])
def test_direction_and_condition_number_are_those_of_the_momentum(normalize, gamma):
    u = gaussian(12, 20).double()
    step = auon_update(u, gamma=gamma, normalize=normalize)
    torch.testing.assert_close(step / step.norm(), u / u.norm(), rtol=1e-10, atol=0)
    assert torch.linalg.cond(step).item() == pytest.approx(torch.linalg.cond(u).item(), rel=1e-9)


def test_normalised_form_ignores_scale_and_code_form_is_linear():
    u = gaussian(40, 50)
    for c in (1e-6, 1e-3, 1e3, 1e6):
        torch.testing.assert_close(auon_update(c * u, eps=TINY), auon_update(u, eps=TINY), rtol=2e-6, atol=0)
        code = partial(auon_update, gamma=1.5, normalize=False, eps=TINY)
        torch.testing.assert_close(code(c * u), c * code(u), rtol=2e-6, atol=0)


def test_scale_does_not_matter_for_power_sums_of_tiny_gradients():
    u = gaussian(60_000)
    torch.testing.assert_close(auon_update(1e-12 * u, eps=TINY), auon_update(u, eps=TINY), rtol=1e-6, atol=0)


def test_rotations_pass_through_up_to_the_brake():
    u = gaussian(16, 24).double()
    p, q = (
        torch.linalg.qr(gaussian(16, 16, seed=1).double())[0],
        torch.linalg.qr(gaussian(24, 24).double())[0],
    )
    rotated, step = auon_update(p @ u @ q), p @ auon_update(u) @ q
    assert (rotated - step).norm() <= math.sinh(1.0) ** 2 / u.numel() * step.norm()


def test_normalised_step_has_norm_below_one_and_gamma_zero_exactly_one():
    u = gaussian(30, 40).double()
    assert auon_update(u).norm() < 1
    torch.testing.assert_close(auon_update(u, gamma=0, eps=TINY), u / u.norm(), rtol=1e-14, atol=0)
    assert torch.equal(auon_update(u, gamma=0, normalize=False), u)


def test_repair_brakes_heavy_tails():
    n = 20_000
    r_gaussian = brake(gaussian(n).double(), "rms")
    assert r_gaussian == pytest.approx(math.sqrt(0.5 * (1 + math.e**2)), rel=0.02)
    heavy = gaussian(n, seed=1).double() * (gaussian(n, seed=2).abs().double() + 0.1) ** -0.5
    assert brake(heavy, "rms") > 2 * r_gaussian


@pytest.mark.parametrize("gamma", [40.0, "rms"])
@pytest.mark.parametrize("size", [4, 1_000_000])
def test_strong_brake_stays_finite_and_does_not_vanish(gamma, size):
    for u in (torch.ones(size), spike(size)):
        step = auon_update(u, gamma=gamma)
        assert step.isfinite().all()
        assert step.abs().max() > 0


@pytest.mark.parametrize("gamma", [0.0, 1.0, "rms"])
@pytest.mark.parametrize("size", SIZES)
def test_zero_gives_zero_and_nan_gives_nan(gamma, size):
    assert auon_update(torch.zeros(size), gamma=gamma).eq(0).all()
    u = gaussian(size)
    u[1] = math.nan
    assert auon_update(u, gamma=gamma).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (5,), (200, 300)])
def test_half_precision_norms_are_float32(dtype, shape):
    u = (gaussian(*shape) * 300).to(dtype)
    step = auon_update(u)
    assert step.dtype == dtype
    expected = u.double() / u.double().norm() / reference_brake(u, 1.0)
    torch.testing.assert_close(step.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-7)


def test_empty_tensor():
    assert auon_update(torch.empty(0, 3)).shape == (0, 3)


@pytest.mark.parametrize("size", [10, 60_000, 200_000])
@pytest.mark.parametrize("gamma", [1.0, "rms"])
def test_compiles_without_graph_breaks(size, gamma):
    u = gaussian(size)
    compiled = torch.compile(partial(auon_update, gamma=gamma), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(u), auon_update(u, gamma=gamma), rtol=1e-6, atol=0)


@pytest.mark.parametrize("gamma", [-1.0, 41.0, math.nan, "max"])
def test_gamma_out_of_range(gamma):
    with pytest.raises(ValueError, match="gamma"):
        auon_update(torch.ones(2), gamma=gamma)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("options", [{}, {"normalize": False, "gamma": 1.5}, {"gamma": 0.0}])
@pytest.mark.parametrize("shape", [(), (7,), (5, 8), (4, 3, 2, 2)])
def test_steps_follow_the_formulas(shape, options, nesterov):
    w = torch.nn.Parameter(gaussian(*shape))
    optimizer = AuON([w], lr=0.03, momentum=0.9, weight_decay=0.1, nesterov=nesterov, **options)
    expected, m = w.detach().double(), torch.zeros(shape)
    for seed in range(5):
        w.grad = gaussian(*shape, seed=seed + 10)
        expected, m = reference_step(
            expected, m, w.grad, lr=0.03, momentum=0.9, weight_decay=0.1, nesterov=nesterov, **options
        )
        optimizer.step()
    torch.testing.assert_close(w.detach().double(), expected, rtol=1e-5, atol=1e-6)


def test_code_form_without_brake_is_averaged_nesterov_sgd():
    w = torch.nn.Parameter(gaussian(6, 5))
    optimizer = AuON([w], lr=0.1, gamma=0.0, normalize=False)
    by_hand, m = w.detach().clone(), torch.zeros(6, 5)
    for seed in range(10):
        w.grad = gaussian(6, 5, seed=seed)
        optimizer.step()
        m.lerp_(w.grad, 1 - 0.95)
        by_hand.sub_(w.grad.lerp(m, 0.95), alpha=0.1)
    torch.testing.assert_close(w.detach(), by_hand, rtol=0, atol=1e-7)


def test_brake_of_the_code_form_is_a_constant_for_real_sizes():
    """Over 20 steps the code form differs from plain SGD by the constant 1/r and hardly else."""
    runs = []
    for gamma in (0.0, 1.5):
        w = torch.nn.Parameter(torch.zeros(64, 32))
        optimizer = AuON([w], lr=0.1, gamma=gamma, normalize=False)
        for seed in range(20):
            w.grad = gaussian(64, 32, seed=seed)
            optimizer.step()
        runs.append(w.detach())
    difference = ((runs[0] - runs[1]).norm() / runs[0].norm()).item()
    assert difference == pytest.approx(1.5**2 / (2 * 64 * 32), rel=0.02)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (6, 3, 2, 2)])
def test_hybrid_moves_like_muon(shape):
    w = torch.nn.Parameter(torch.zeros(shape))
    w.grad = gaussian(*shape)
    HybridAuON([w], lr=1.0, momentum=0.0).step()
    orthogonal = newton_schulz(w.grad.flatten(1), "muon", 5)
    cosine = torch.nn.functional.cosine_similarity(w.detach().flatten(), -orthogonal.flatten(), dim=0)
    assert cosine > 1 - 1e-6
    r = reference_brake(orthogonal, 1.5)
    torch.testing.assert_close(w.detach().flatten(1), -orthogonal / r, rtol=1e-5, atol=1e-6)


def test_hybrid_in_bfloat16_moves_like_the_one_in_float32():
    moved = []
    for dtype in (None, torch.bfloat16):
        w = torch.nn.Parameter(torch.zeros(16, 24))
        w.grad = gaussian(16, 24)
        HybridAuON([w], lr=1.0, momentum=0.0, ns_dtype=dtype).step()
        moved.append(w.detach().flatten())
    assert not torch.equal(*moved)
    assert torch.nn.functional.cosine_similarity(*moved, dim=0) > 0.999


def test_hybrid_with_one_step_normalised_is_the_papers():
    w = torch.nn.Parameter(torch.zeros(8, 9))
    w.grad = gaussian(8, 9)
    HybridAuON([w], lr=1.0, momentum=0.0, ns_steps=1, normalize=True, gamma=1.0).step()
    torch.testing.assert_close(w.detach(), -auon_update(newton_schulz(w.grad, "muon", 1)))


def test_hybrid_without_steps_is_auon_and_only_brakes_vectors():
    runs = []
    for optimizer in (AuON, partial(HybridAuON, gamma=1.0, normalize=True, ns_steps=0)):
        w = torch.nn.Parameter(gaussian(4, 5))
        w.grad = gaussian(4, 5, seed=1)
        optimizer([w]).step()
        runs.append(w.detach())
    assert torch.equal(*runs)

    v = torch.nn.Parameter(torch.zeros(6))
    v.grad = gaussian(6)
    HybridAuON([v], lr=1.0, momentum=0.0).step()
    torch.testing.assert_close(v.detach(), -v.grad / reference_brake(v.grad, 1.5))


def test_hybrid_batches_equal_shapes_without_changing_the_result():
    shapes = [(6, 9), (6, 9), (9, 6), (6, 3, 3), (6,)]
    together = [torch.nn.Parameter(gaussian(*s, seed=i)) for i, s in enumerate(shapes)]
    apart = [torch.nn.Parameter(p.detach().clone()) for p in together]
    optimizers = [HybridAuON(together), *(HybridAuON([p]) for p in apart)]
    for i, (p, q) in enumerate(zip(together, apart, strict=True)):
        p.grad = gaussian(*p.shape, seed=50 + i)
        q.grad = p.grad.clone()
    for optimizer in optimizers:
        optimizer.step()
    for p, q in zip(together, apart, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("optimizer", "shape", "expected"),
    [
        (partial(AuON, gamma=0.0), (30, 50), 1 / math.sqrt(1500)),
        (partial(AuON, gamma=0.0, adjust_lr="match_rms_adamw"), (30, 50), 0.2),
        (partial(AuON, gamma=0.0, adjust_lr="match_rms_adamw"), (50,), 0.2),
        (partial(AuON, gamma=0.0, adjust_lr="original"), (400, 4), 10 / math.sqrt(1600)),
        (partial(AuON, gamma=0.0, adjust_lr="original"), (400,), 1 / math.sqrt(400)),
        (partial(HybridAuON, adjust_lr="match_rms_adamw", ns_steps=5), (16, 64), 0.2),
    ],
)
def test_root_mean_square_of_the_step(optimizer, shape, expected):
    w = torch.nn.Parameter(torch.zeros(shape))
    w.grad = gaussian(*shape)
    optimizer([w], lr=1.0, momentum=0.0).step()
    tolerance = 0.25 if optimizer.func is HybridAuON else 1e-4  # Muon's polynomial does not converge
    assert w.detach().square().mean().sqrt().item() == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": -0.1}, "lr"),
        ({"lr": math.nan}, "lr"),
        ({"momentum": 1.0}, "momentum"),
        ({"momentum": -0.1}, "momentum"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"gamma": -1.0}, "gamma"),
        ({"gamma": 100.0}, "gamma"),
        ({"ns_steps": -1}, "ns_steps"),
        ({"eps": 0.0}, "eps"),
        ({"adjust_lr": "adam"}, "adjust_lr"),
        ({"adjust_lr": "match_rms_adamw", "normalize": False}, "normalize=False"),
        ({"apply_to": "some"}, "apply_to"),
        ({"adamw": {"beta": 0.9}}, "beta"),
        ({"adamw": {"betas": (0.9, 1.0)}}, "betas"),
    ],
)
def test_options_out_of_range(options, words):
    with pytest.raises(ValueError, match=words):
        AuON([torch.nn.Parameter(torch.ones(2, 2))], **options)


def test_state_is_half_of_adamws():
    shapes = [(64, 32), (128,), (8, 4, 3, 3)]

    def state_bytes(cls):
        params = [torch.nn.Parameter(gaussian(*s)) for s in shapes]
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer = cls(params)
        optimizer.step()
        return sum(
            t.numel() * t.element_size() for s in optimizer.state.values() for t in s.values() if t.ndim > 0
        )

    assert state_bytes(AuON) * 2 == state_bytes(torch.optim.AdamW)
