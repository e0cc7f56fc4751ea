import math
from functools import partial

import pytest
import torch
from torch import nn

from weightlab.linalg import clip_outliers, newton_schulz
from weightlab.linalg.coefficients import COEFFICIENTS, CoefficientSet
from weightlab.optim import ROOT
from weightlab.optim.root import root_update

MUON = (3.4445, -4.7750, 2.0315)
MuonLike = partial(ROOT, clip_quantile=None, coefficients="muon")


def gaussian(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def polynomial(values, triples):
    for a, b, c in triples:
        values = a * values + b * values**3 + c * values**5
    return values


def reference_update(u, *, q, triples):
    """Soft threshold, then the polynomials on the singular values, in float64 from the definitions."""
    u = u.double()
    if q is not None:
        bound = u.abs().flatten().quantile(q) + 1e-9
        u = u - u.sign() * (u.abs() - bound).clamp_min(0)
    left, s, right = torch.linalg.svd(u, full_matrices=False)
    return left @ torch.diag(polynomial(s / (s.norm() + 1e-7), triples)) @ right


def reference_steps(w, grads, *, lr, weight_decay, momentum, nesterov, q, triples):
    """The official order of operations, with its sum of gradients for a momentum."""
    w, m = w.double(), torch.zeros_like(w, dtype=torch.float64)
    for g in grads:
        m = momentum * m + g.double()
        u = g.double() + momentum * m if nesterov else m
        w = w * (1 - lr * weight_decay)
        w = w - lr * 0.2 * math.sqrt(max(w.shape)) * reference_update(u, q=q, triples=triples)
    return w


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), 0).item()


@pytest.mark.parametrize("shape", [(12, 12), (8, 30), (30, 8), (1, 6), (6, 1)])
@pytest.mark.parametrize("q", [0.9, 0.5, None, 1.0])
@pytest.mark.parametrize("nesterov", [True, False])
def test_steps_follow_the_formulas(shape, q, nesterov):
    triples = [(15 / 8, -10 / 8, 3 / 8)] * 5
    options = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9, "nesterov": nesterov}
    w = nn.Parameter(gaussian(*shape))
    grads = [gaussian(*shape, seed=k) for k in (1, 2, 3)]
    expected = reference_steps(w.detach(), grads, q=q, triples=triples, **options)
    optimizer = ROOT([w], clip_quantile=q, coefficients=triples, **options)
    for g in grads:
        w.grad = g.clone()
        optimizer.step()
    torch.testing.assert_close(w.detach().double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(24, 24), (16, 48), (48, 16)])
@pytest.mark.parametrize("adjust_lr", ["original", "match_rms_adamw"])
def test_without_its_two_changes_it_is_torchs_muon(shape, adjust_lr):
    start = gaussian(*shape)
    moved = []
    for build in (
        partial(MuonLike, adjust_lr=adjust_lr),
        partial(MuonLike, adjust_lr=adjust_lr, ns_dtype=torch.bfloat16),
        partial(torch.optim.Muon, adjust_lr_fn=adjust_lr),
    ):
        w = nn.Parameter(start.clone())
        optimizer = build([w], lr=0.1, weight_decay=0.0)
        for k in range(3):
            w.grad = gaussian(*shape, seed=k + 1)
            optimizer.step()
        moved.append(w.detach() - start)
    wide, half, muon = moved
    assert cosine(wide, muon) > 0.999
    assert cosine(half, muon) > 0.999
    torch.testing.assert_close(half.norm(), muon.norm(), rtol=5e-3, atol=0)


def test_muon_form_in_float32_keeps_to_float64():
    w = nn.Parameter(gaussian(32, 48))
    grads = [gaussian(32, 48, seed=k) for k in (1, 2)]
    options = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.95, "nesterov": True}
    expected = reference_steps(w.detach(), grads, q=None, triples=[MUON] * 5, **options)
    optimizer = MuonLike([w], **options)
    for g in grads:
        w.grad = g.clone()
        optimizer.step()
    torch.testing.assert_close(w.detach().double(), expected, rtol=1e-5, atol=2e-6)


def test_one_entry_cannot_take_the_update_over():
    """One entry a million times too large turns Muon's update into nearly rank one; ROOT hardly sees it."""
    clean = gaussian(128, 192)
    spiked = clean.clone()
    spiked[3, 5] = 1e6
    change = {}
    for name, q in (("muon", None), ("root", 0.9)):
        before, after = (
            root_update(u, clip_quantile=q, coefficients="polar_express") for u in (clean, spiked)
        )
        change[name] = ((after - before).norm() / before.norm()).item()
    assert change["root"] < 0.05
    assert change["muon"] > 0.8


def test_clipping_depends_on_the_basis_and_orthogonalising_does_not():
    u, rotation = gaussian(20, 30), torch.linalg.qr(gaussian(20, 20, seed=1)).Q
    free = partial(root_update, clip_quantile=None, coefficients="quintic")
    clipped = partial(root_update, clip_quantile=0.9, coefficients="quintic")
    torch.testing.assert_close(free(rotation @ u), rotation @ free(u), rtol=1e-3, atol=1e-4)
    assert (clipped(rotation @ u) - rotation @ clipped(u)).norm() > 0.05 * clipped(u).norm()


def test_scale_and_transposition():
    u = gaussian(20, 30)
    torch.testing.assert_close(root_update(1000 * u), root_update(u), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(root_update(u.mT), root_update(u).mT, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(root_update(-u), -root_update(u))


def test_equal_singular_values_go_through_the_polynomial():
    triples = [(3.5, -4.8, 2.1), (2.0, -1.5, 0.5)]
    u = torch.linalg.qr(gaussian(30, 6)).Q.mT
    expected = polynomial(torch.tensor(1 / math.sqrt(6)), triples) * u
    made = root_update(u, clip_quantile=None, coefficients=triples, ns_steps=2)
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)


def test_what_is_clipped_stays_in_the_buffer():
    w = nn.Parameter(torch.zeros(6, 6))
    w.grad = gaussian(6, 6)
    w.grad[0, 0] = 100.0
    optimizer = ROOT([w], momentum=0.5)
    optimizer.step()
    assert torch.equal(optimizer.state[w]["momentum_buffer"], w.grad * 0.5)
    assert set(optimizer.state[w]) == {"momentum_buffer"}


def test_shapes_are_stacked_with_their_transposes():
    class Seen(ROOT):
        def direction(self, update, group):
            shapes.append(tuple(update.shape))
            return super().direction(update, group)

    shapes = []
    params = [nn.Parameter(gaussian(*shape)) for shape in [(4, 9), (9, 4), (4, 3, 3), (4, 4)]]
    alone = [nn.Parameter(p.detach().clone()) for p in params]
    for p, q in zip(params, alone, strict=True):
        p.grad = gaussian(*p.shape, seed=1)
        q.grad = p.grad.clone()
    Seen(params).step()
    assert sorted(shapes) == [(3, 4, 9), (4, 4)]
    for q in alone:
        ROOT([q]).step()
    for p, q in zip(params, alone, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("ns_dtype", [None, torch.float64])
def test_nearly_equal_small_shapes_share_a_call_and_move_as_alone(ns_dtype, monkeypatch):
    seen = []

    def noted(X, *args, **kwargs):
        seen.append(tuple(X.shape))
        return newton_schulz(X, *args, **kwargs)

    monkeypatch.setattr("weightlab.linalg.matrix_sign.newton_schulz", noted)
    shapes = [(16, 104), (100, 16), (16, 101), (100, 100), (101, 101), (16, 128)]
    together = [nn.Parameter(gaussian(*shape)) for shape in shapes]
    alone = [nn.Parameter(p.detach().clone()) for p in together]
    for seed, (p, q) in enumerate(zip(together, alone, strict=True)):
        p.grad = gaussian(*p.shape, seed=seed)
        q.grad = p.grad.clone()
    # Columns of zeros must not lower the quantile that entries are clipped at.
    ROOT(together, clip_quantile=0.9, ns_dtype=ns_dtype).step()
    assert seen == [(3, 16, 104)]
    for p, q in zip(together, alone, strict=True):
        ROOT([q], clip_quantile=0.9, ns_dtype=ns_dtype).step()
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "sides"), [((4, 4), (4, 4)), ((8, 2), (2, 8)), ((3, 14), (2, 8)), ((5, 6), (4, 4))]
)
def test_table_goes_by_shape_and_else_by_aspect_ratio(shape, sides):
    table = {(4, 4): [(3.4, -4.7, 2.0)], (8, 2): [(2.9, -3.6, 1.6)]}
    u = gaussian(*shape)
    triples = table.get(sides, table.get(sides[::-1]))
    made = root_update(u, clip_quantile=None, coefficients=table)
    torch.testing.assert_close(
        made.double(), reference_update(u, q=None, triples=triples * 5), rtol=1e-4, atol=1e-5
    )


def test_default_coefficients_are_those_of_the_shape():
    u = gaussian(16, 64)
    fitted = dict(COEFFICIENTS["root"].by_shape)[2048, 8192]
    made = root_update(u, clip_quantile=None)
    torch.testing.assert_close(
        made.double(), reference_update(u, q=None, triples=fitted * 5), rtol=1e-4, atol=1e-5
    )


def test_few_nonzero_entries_still_move():
    """Nine in ten entries are zero, so is their quantile."""
    u = torch.zeros(20, 20)
    u[2, 3], u[7, 11] = 4.0, -2.0
    made = root_update(u, coefficients="muon")
    assert made[2, 3] == -made[7, 11]
    assert made[2, 3] > 0


def test_sampled_quantile_moves_almost_alike():
    u = gaussian(128, 200)
    assert cosine(root_update(u, clip_sample=2000), root_update(u)) > 0.999
    assert not torch.equal(root_update(u, clip_sample=2000), root_update(u))


def test_batch_equals_one_at_a_time():
    u = gaussian(3, 10, 14)
    together = root_update(u)
    for one, made in zip(u, together, strict=True):
        torch.testing.assert_close(root_update(one), made, rtol=1e-4, atol=1e-5)
        assert torch.equal(clip_outliers(u)[0], clip_outliers(u[0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_precisions(dtype):
    u = gaussian(12, 20).to(dtype)
    made = root_update(u, coefficients="quintic")
    assert made.dtype == dtype
    assert cosine(made, reference_update(u, q=0.9, triples=COEFFICIENTS["quintic"].triples)) > 0.999


def test_zero_nan_and_empty():
    assert not root_update(torch.zeros(4, 5)).any()
    u = gaussian(2, 4, 5)
    u[1, 2, 2] = math.nan
    made = root_update(u)
    assert made[0].isfinite().all()
    assert made[1].isnan().all()
    assert root_update(torch.ones(0, 5)).shape == (0, 5)


def test_update_has_the_root_mean_square_of_adamws():
    w = nn.Parameter(torch.zeros(16, 64))
    w.grad = gaussian(16, 64)
    ROOT([w], lr=1.0, momentum=0.0).step()
    assert w.detach().square().mean().sqrt().item() == pytest.approx(0.2, rel=0.1)


def test_compiles():
    torch._dynamo.reset()
    u = gaussian(10, 14)
    compiled = torch.compile(root_update, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(u), root_update(u), rtol=1e-4, atol=1e-5)


def test_groups_set_their_own_options():
    params = [nn.Parameter(gaussian(6, 6)) for _ in range(2)]
    optimizer = ROOT([{"params": params[:1]}, {"params": params[1:], "clip_quantile": None, "ns_steps": 3}])
    assert [g["clip_quantile"] for g in optimizer.param_groups] == [0.9, None]
    with pytest.raises(ValueError, match="clip_quantile"):
        optimizer.add_param_group({"params": [nn.Parameter(gaussian(6, 6))], "clip_quantile": 2.0})


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"clip_quantile": 0.0}, ValueError, "clip_quantile must be in"),
        ({"clip_quantile": 1.01}, ValueError, "clip_quantile must be in"),
        ({"clip_sample": 0}, ValueError, "clip_sample"),
        ({"ns_steps": 0}, ValueError, "ns_steps"),
        ({"ns_steps": 2.0}, ValueError, "ns_steps"),
        ({"ns_dtype": torch.int8}, ValueError, "ns_dtype must be a floating-point torch.dtype"),
        ({"ns_steps": 6, "coefficients": "polar_express"}, ValueError, "5 triples"),
        ({"eps": 0.0}, ValueError, "eps"),
        ({"adjust_lr": "adam"}, ValueError, "adjust_lr"),
        ({"coefficients": "best"}, ValueError, "muon.*polar_express"),
        ({"coefficients": [(1.0, 2.0)]}, ValueError, "triples"),
        ({"coefficients": []}, ValueError, "at least one"),
        ({"coefficients": {}}, ValueError, "at least one shape"),
        ({"coefficients": {4: [MUON]}}, ValueError, "keyed by"),
        ({"coefficients": {(0, 4): [MUON]}}, ValueError, "keyed by"),
        ({"coefficients": {(4, 4): [(1.0,)]}}, ValueError, "triples"),
        ({"coefficients": CoefficientSet((MUON,), 5)}, TypeError, "CoefficientSet"),
        ({"momentum": 1.0}, ValueError, "momentum"),
        ({"lr": -1.0}, ValueError, "lr"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay"),
        ({"nonfinite": "drop"}, ValueError, "nonfinite"),
    ],
)
def test_options_out_of_range(options, error, words):
    with pytest.raises(error, match=words):
        ROOT([nn.Parameter(torch.ones(2, 2))], **options)


def test_vectors_are_refused_by_the_rule_and_go_to_adamw():
    layer = nn.Linear(4, 3)
    with pytest.raises(ValueError, match=r"matrices.*\(3,\)"):
        ROOT(layer.parameters(), apply_to="all")
    with pytest.raises(ValueError, match=r"matrices.*\(3,\)"):
        ROOT([{"params": layer.parameters(), "use_matrix_rule": True}])
    assert [g["use_matrix_rule"] for g in ROOT(layer.parameters()).param_groups] == [True, False]


def test_complex_and_sparse_are_refused():
    with pytest.raises(TypeError, match="complex64"):
        ROOT([nn.Parameter(torch.ones(2, 2, dtype=torch.cfloat))])
    table = nn.Embedding(5, 4, sparse=True)
    optimizer = ROOT(table.parameters())
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match="sparse"):
        optimizer.step()
