import copy
import math
from functools import partial

import pytest
import test_matrix_optimizer as contract
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from weightlab.linalg import sinkhorn_normalize
from weightlab.optim import ARO, aro_alignment, aro_direction, aro_rotation, row_normalize

# Where rows of signs differ in one place only, QR puts an exact zero there, and rounding errors decide its sign:
# tests with the rule sign, or adam's first step, which is the same, have many columns for few rows.
BASES = {"sinkhorn": sinkhorn_normalize, "sign": torch.sign, "row_norm": row_normalize}
every_base = pytest.mark.parametrize("base", BASES)
every_policy = pytest.mark.parametrize("policy", ["qr", "polar", "eigen", "none"])


def gaussian(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def orthogonal(k, seed=0, dtype=torch.float64):
    return torch.linalg.qr(gaussian(k, k, seed=seed, dtype=dtype))[0]


def run(start, gradients, state=None, **options):
    """Weights after each gradient."""
    w = nn.Parameter(start.clone())
    optimizer = ARO([w], **options)
    optimizer.state[w].update(state or {})
    path = []
    for gradient in gradients:
        w.grad = gradient.to(w.dtype)
        optimizer.step()
        path.append(w.detach().clone())
    return path, optimizer.state[w]


def update(gradients, **options):
    """The last update, for a learning rate of 1 and no decay."""
    start = torch.zeros_like(gradients[0])
    path, _ = run(start, gradients, lr=1.0, weight_decay=0.0, **options)
    return (path[-2] if len(path) > 1 else start) - path[-1]


def rms(X):
    return X.double().square().mean().sqrt()


# ---- the update, against the formulas


def plain_sinkhorn(X):
    for _ in range(5):
        X = X.shape[1] ** 0.5 * X / X.norm(dim=1, keepdim=True)
        X = X.shape[0] ** 0.5 * X / X.norm(dim=0, keepdim=True)
    return X


def reference(start, gradients, base, policy, beta=0.9, beta2=0.8, lr=0.1, decay=0.3):
    """ARO in float64, one matrix at a time."""
    f = {
        "sinkhorn": plain_sinkhorn,
        "sign": torch.sign,
        "row_norm": lambda X: X / X.square().mean(1, keepdim=True).sqrt(),
    }.get(base)
    W, tall = (start.T, True) if start.shape[0] > start.shape[1] else (start, False)
    M, V, R = torch.zeros_like(W), torch.zeros_like(W), torch.eye(W.shape[0], dtype=W.dtype)
    path = []
    for gradient in gradients:
        G = gradient.T if tall else gradient
        M = beta * M + (1 - beta) * G
        Z = R.T @ M
        A = M @ (Z / (beta2 * V + (1 - beta2) * Z**2).sqrt() if f is None else f(Z)).T
        if policy == "qr":
            R = torch.linalg.qr(A).Q
        elif policy == "polar":
            U, _, Vh = torch.linalg.svd(A)
            R = U @ Vh
        elif policy == "eigen":
            R = torch.linalg.eigh(M @ M.T).eigenvectors.flip(-1)
        Z = R.T @ M
        V = beta2 * V + (1 - beta2) * Z**2
        U = R @ (Z / V.sqrt() if f is None else f(Z))
        W = (1 - lr * decay) * W - lr * 0.2 * U / U.square().mean().sqrt()
        path.append(W.T if tall else W)
    return path


@pytest.mark.parametrize("base", [*BASES, "adam"])
@every_policy
@pytest.mark.parametrize("shape", [(4, 30), (30, 4), (20, 20)])
def test_steps_are_the_formulas(base, policy, shape):
    start, gradients = gaussian(*shape), [gaussian(*shape, seed=i) for i in range(1, 6)]
    options = {"betas": (0.9, 0.8)} if base == "adam" else {"momentum": 0.9}
    path, _ = run(start, gradients, base=base, policy=policy, lr=0.1, weight_decay=0.3, **options)
    for ours, expected in zip(path, reference(start, gradients, base, policy), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-9)


def test_without_rotation_it_is_sinkhorn_descent_with_momentum():
    gradients = [gaussian(5, 3, seed=i) for i in range(4)]
    moved = update(gradients, policy="none", momentum=0.5)
    M = sum(0.5 ** (4 - i) * g for i, g in enumerate(gradients))
    torch.testing.assert_close(moved, 0.2 * plain_sinkhorn(M.T).T / rms(plain_sinkhorn(M.T)))


@every_base
def test_first_step_does_not_depend_on_momentum(base):
    G = gaussian(4, 30)
    torch.testing.assert_close(update([G], base=base, momentum=0.0), update([G], base=base, momentum=0.99))


@every_policy
@pytest.mark.parametrize("base", [*BASES, "adam"])
@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (3, 2, 5), (1, 8), (8, 1)])
def test_root_mean_square_of_the_update_is_the_one_asked_for(policy, base, shape):
    moved = update([gaussian(*shape, seed=i) for i in range(3)], policy=policy, base=base, rms=0.35)
    assert rms(moved) == pytest.approx(0.35, rel=1e-9)


def test_row_norm_on_a_constant_gradient_becomes_orthogonalisation():
    U, V = orthogonal(4), orthogonal(6, seed=1)[:, :4]
    G = U * torch.tensor([8.0, 4.0, 2.0, 1.0]) @ V.T
    moved = update([G] * 60, base="row_norm", momentum=0.0, rms=None)
    torch.testing.assert_close(moved, 6**0.5 * U @ V.T, rtol=0, atol=1e-10)


def test_eigenbasis_diagonalises_the_momentum():
    _, state = run(torch.zeros(4, 6).double(), [gaussian(4, 6)], policy="eigen")
    Z = state["rotation"].T @ state["momentum_buffer"]
    gram = Z @ Z.T
    torch.testing.assert_close(gram, gram.diagonal().diag(), rtol=0, atol=1e-14)


@pytest.mark.parametrize("qr", ["householder", "cholesky"])
@every_base
@pytest.mark.parametrize("condition", [10.0, 1e4])
def test_rotations_stay_orthogonal_in_float32(qr, base, condition):
    k = 48
    scales = torch.logspace(0, -math.log10(condition), k).unsqueeze(1)
    w = nn.Parameter(torch.zeros(k, 2 * k))
    optimizer = ARO([w], base=base, qr=qr)
    for i in range(20):
        w.grad = orthogonal(k, dtype=torch.float32) @ (
            scales * gaussian(k, 2 * k, seed=i, dtype=torch.float32)
        )
        optimizer.step()
        R = optimizer.state[w]["rotation"]
        assert (R.T @ R - torch.eye(k)).norm() < 1e-4


def test_backends_agree_where_the_matrix_is_well_conditioned():
    gradients = [gaussian(32, 64, seed=i, dtype=torch.float32) for i in range(4)]
    by_reflections, by_cholesky = (update(gradients, qr=qr) for qr in ("householder", "cholesky"))
    assert (by_reflections - by_cholesky).norm() < 1e-4 * by_reflections.norm()


# ---- symmetries


@every_base
def test_turning_everything_turns_the_trajectory(base):
    Q = orthogonal(4, seed=9)
    start, gradients = gaussian(4, 30), [gaussian(4, 30, seed=i) for i in range(1, 5)]
    plain, _ = run(start, gradients, base=base)
    turned, _ = run(Q @ start, [Q @ g for g in gradients], state={"rotation": Q.clone()}, base=base)
    torch.testing.assert_close(torch.stack(turned), Q @ torch.stack(plain), rtol=1e-8, atol=1e-10)


@every_base
def test_columns_may_be_permuted_and_flipped(base):
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    flips = gaussian(7, seed=5).sign()
    gradients = [gaussian(4, 7, seed=i) for i in range(4)]
    changed = update([(g * flips)[:, order] for g in gradients], base=base)
    torch.testing.assert_close(changed, (update(gradients, base=base) * flips)[:, order])


@every_base
def test_signs_of_the_frame_do_not_matter(base):
    M, R = gaussian(5, 8), orthogonal(5)
    flips = torch.tensor([1.0, -1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    torch.testing.assert_close(aro_direction(M, R * flips, BASES[base]), aro_direction(M, R, BASES[base]))


@pytest.mark.parametrize("shape", [(4, 6), (6, 4)])
def test_sides_are_transposes_of_one_another(shape):
    gradients = [gaussian(*shape, seed=i) for i in range(3)]
    left = update(gradients, side="left")
    right = update([g.T for g in gradients], side="right")
    torch.testing.assert_close(left, right.T)
    smaller = "left" if shape[0] < shape[1] else "right"
    torch.testing.assert_close(update(gradients), update(gradients, side=smaller))


@settings(max_examples=20, deadline=None)
@given(
    base=st.sampled_from(["sign", "row_norm"]),
    seed=st.integers(0, 10**6),
    k=st.integers(1, 6),
    n=st.integers(1, 8),
    spread=st.floats(0, 3),
)
def test_polar_frame_never_slows_the_decrease(base, seed, k, n, spread):
    G = torch.logspace(0, -spread, k).double().unsqueeze(1) * gaussian(k, n, seed=seed)
    R = orthogonal(k, seed=seed)
    before = aro_alignment(G, R, BASES[base])
    for _ in range(5):
        R = aro_rotation(G, R, BASES[base], policy="polar")
        after = aro_alignment(G, R, BASES[base])
        assert after >= before * (1 - 1e-10)
        before = after


def test_alignment_is_the_slope_of_the_loss():
    G, R = gaussian(4, 6), orthogonal(4)
    expected = (G * aro_direction(G, R, torch.sign)).sum() / G.norm()
    torch.testing.assert_close(aro_alignment(G, R, torch.sign), expected)
    assert aro_alignment(torch.zeros(2, 3), torch.eye(2), torch.sign) == 0


# ---- awkward gradients


@every_policy
@pytest.mark.parametrize("base", [*BASES, "adam"])
@pytest.mark.parametrize(
    "gradient",
    [
        gaussian(30, 3),
        gaussian(3, 30),
        gaussian(1, 7),
        gaussian(7, 1),
        gaussian(4, 1) @ gaussian(1, 6),
        torch.cat([gaussian(3, 30), torch.zeros(3, 30)]),
        torch.cat([gaussian(4, 30), torch.zeros(4, 5)], 1),
        torch.eye(5, 8),
    ],
    ids=["tall", "wide", "row", "column", "rank 1", "zero rows", "zero columns", "one entry a row"],
)
def test_size_of_the_gradient_does_not_matter(policy, base, gradient):
    one = update([gradient.float()] * 2, policy=policy, base=base)
    assert one.isfinite().all()
    assert rms(one) == pytest.approx(0.2, rel=1e-5)
    for scale in (1e-12, 1e12):
        other = update([gradient.float() * scale] * 2, policy=policy, base=base)
        assert rms(other) == pytest.approx(0.2, rel=1e-5)
        assert nn.functional.cosine_similarity(one.flatten(), other.flatten(), 0) > 0.999


@every_base
def test_rank_one_gradient_lowers_the_loss_alike_by_either_backend(base):
    G = gaussian(8, 1, dtype=torch.float32) @ gaussian(1, 16, seed=1, dtype=torch.float32)
    decreases = []
    for qr in ("householder", "cholesky"):
        moved = update([G] * 3, base=base, qr=qr)
        assert rms(moved) == pytest.approx(0.2, rel=1e-5)
        decreases.append(float((G * moved).sum()))
    assert decreases[0] == pytest.approx(decreases[1], rel=1e-3)
    assert decreases[0] > 0


@every_base
def test_rounding_errors_are_not_made_into_directions(base):
    """A frame along a rank-1 gradient leaves all other rows to rounding; the step must be of rank 1 as well."""
    G = (gaussian(16, 1) @ gaussian(1, 40, seed=1)).float()
    singular = torch.linalg.svdvals(update([G] * 3, base=base))
    assert singular[1] < 1e-5 * singular[0]


@every_policy
@pytest.mark.parametrize("base", [*BASES, "adam"])
def test_zero_gradients_leave_weights_and_frame_alone(policy, base):
    start = gaussian(3, 5, dtype=torch.float32)
    zero = torch.zeros(3, 5)
    path, state = run(start, [zero, zero], policy=policy, base=base, weight_decay=0.0)
    assert torch.equal(path[-1], start)
    if policy != "none":
        assert torch.equal(state["rotation"], torch.eye(3))
    late, _ = run(start, [zero, gaussian(3, 5)], policy=policy, base=base, weight_decay=0.0)
    assert rms(late[-1] - start) == pytest.approx(2e-4, rel=1e-3)


def test_half_precision_parameters_have_a_float32_frame_and_step():
    wide, narrow = (
        run(
            gaussian(6, 9, dtype=dtype) * 0,
            [gaussian(6, 9, dtype=torch.bfloat16)] * 2,
            lr=0.1,
            weight_decay=0.0,
        )
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert narrow[1]["rotation"].dtype == torch.float32
    assert narrow[1]["momentum_buffer"].dtype == torch.bfloat16
    torch.testing.assert_close(narrow[0][0].float(), wide[0][0], rtol=1e-2, atol=1e-3)


def test_nan_stays_in_its_matrix_of_a_stack():
    a, b = (nn.Parameter(torch.zeros(4, 4)) for _ in range(2))
    for policy in ("qr", "polar", "eigen"):
        optimizer = ARO([a, b], policy=policy, base="sign")
        a.grad, b.grad = gaussian(4, 4, dtype=torch.float32), gaussian(4, 4, seed=1, dtype=torch.float32)
        a.grad[0, 0] = float("nan")
        optimizer.step()
        assert a.isnan().any()
        assert b.isfinite().all()


def test_empty_parameters_are_fine():
    a, b = nn.Parameter(torch.zeros(0, 4)), nn.Parameter(torch.zeros(4, 4))
    optimizer = ARO([a, b])
    a.grad, b.grad = torch.zeros(0, 4), torch.ones(4, 4)
    optimizer.step()
    assert (b != 0).all()


# ---- options


def test_frame_turns_at_every_so_many_steps_and_resumes_in_between():
    gradients = [gaussian(4, 6, seed=i) for i in range(8)]
    w = nn.Parameter(gaussian(4, 6))
    optimizer = ARO([w], rotation_every=3)
    frames = []
    for step, gradient in enumerate(gradients):
        if step == 4:
            saved = contract.through_disk(optimizer.state_dict())
            w = nn.Parameter(w.detach().clone())
            optimizer = ARO([w], rotation_every=3)
            optimizer.load_state_dict(saved)
        w.grad = gradient
        optimizer.step()
        frames.append(optimizer.state[w]["rotation"].clone())
    turned = [not torch.equal(a, b) for a, b in zip([torch.eye(4).double(), *frames], frames, strict=False)]
    assert turned == [True, False, False, True, False, False, True, False]
    expected = update(gradients[:2], rotation_every=3)
    M = 0.05 * (0.95 * gradients[0] + gradients[1])
    U = frames[0] @ plain_sinkhorn(frames[0].T @ M)
    torch.testing.assert_close(expected, 0.2 * U / rms(U))


def test_state_is_momentum_and_frame_of_the_smaller_side():
    gradients = [gaussian(12, 5)] * 2
    _, state = run(gaussian(12, 5), gradients)
    assert {key: tuple(value.shape) for key, value in state.items()} == {
        "momentum_buffer": (12, 5),
        "rotation": (5, 5),
    }
    _, state = run(gaussian(12, 5), gradients, base="adam")
    assert state["second_moment"].shape == (5, 12)
    _, state = run(gaussian(12, 5), gradients, policy="none")
    assert set(state) == {"momentum_buffer"}


def test_own_base_rule_is_used_kept_by_copies_and_asked_for_after_loading():
    gradients = [gaussian(4, 6, seed=i) for i in range(3)]
    own = update(gradients, base=lambda Z: Z.sign())
    torch.testing.assert_close(own, update(gradients, base="sign"))

    w = nn.Parameter(torch.zeros(4, 6))
    optimizer = ARO([w], base=torch.sign)
    w.grad = torch.ones(4, 6)
    copied = copy.deepcopy(optimizer)
    copied.step()
    optimizer.step()
    saved = contract.through_disk(optimizer.state_dict())
    other = ARO([w])
    other.load_state_dict(saved)
    with pytest.raises(ValueError, match="pass the function as base"):
        other.step()
    with pytest.raises(ValueError, match=r"\(1, 4, 3\).*\(1, 4, 6\)"):
        update(gradients, base=lambda Z: Z[..., :3], policy="none")


def test_stacked_experts_move_as_matrices_of_their_own():
    gradients = [gaussian(3, 4, 6, seed=i) for i in range(3)]
    together = update(gradients, stacked=True)
    apart = torch.stack([update([g[i] for g in gradients]) for i in range(3)])
    torch.testing.assert_close(together, apart)


def shared(shapes, steps=3, same=False, **options):
    """Parameters after some steps with a shared frame, and the frame."""
    params = [nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in shapes]
    group = {"params": params, "share_rotation": True, "use_matrix_rule": True, **options}
    optimizer = ARO([group], weight_decay=0.0)
    for step in range(steps):
        for i, p in enumerate(params):
            p.grad = gaussian(*p.shape, seed=10 * step + (0 if same else i))
        optimizer.step()
    (frame,) = [state["rotation"] for state in optimizer.state.values() if "rotation" in state]
    return [p.detach() for p in params], frame


@pytest.mark.parametrize("shape", [(4, 6), (6, 4)])
def test_shared_frame_of_one_parameter_or_of_twins_is_its_own(shape):
    gradients = [gaussian(*shape, seed=10 * step) for step in range(3)]
    path, state = run(torch.zeros(shape).double(), gradients, weight_decay=0.0)
    for count in (1, 2):
        params, frame = shared([shape] * count, same=True)
        torch.testing.assert_close(frame, state["rotation"])
        for p in params:
            torch.testing.assert_close(p, path[-1])


def test_shared_frame_comes_from_all_momenta_together():
    """A block of a transformer: what reads from the residual stream on the right, what writes to it on the left."""
    shapes, sides = [(4, 4), (7, 4), (4, 9)], ["right", "right", "left"]
    params, frame = shared(shapes, steps=1, side=sides)
    Ms = [gaussian(*s, seed=i) for i, s in enumerate(shapes)]
    Ms = [M.T if side == "right" else M for M, side in zip(Ms, sides, strict=True)]
    A = sum(M @ plain_sinkhorn(M).T for M in Ms)
    Q, R = torch.linalg.qr(A)
    torch.testing.assert_close(frame, Q * R.diagonal().sign())
    for p, M, side in zip(params, Ms, sides, strict=True):
        U = frame @ plain_sinkhorn(frame.T @ M)
        U = 1e-3 * 0.2 * U / rms(U)
        torch.testing.assert_close(-p, U.T if side == "right" else U)


def test_shared_frame_takes_the_common_side_and_outlives_missing_gradients():
    params = [nn.Parameter(torch.zeros(shape)) for shape in [(9, 4), (4, 3), (4, 4)]]
    optimizer = ARO([{"params": params, "share_rotation": True}])
    for present in ([0, 1, 2], [1], [1, 2]):
        for i, p in enumerate(params):
            p.grad = gaussian(*p.shape, dtype=torch.float32) if i in present else None
        optimizer.step()
    assert all(s["rotation"].shape == (4, 4) for s in optimizer.state.values() if "rotation" in s)
    assert all((p != 0).all() for p in params)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"base": "muon"}, ValueError, "same direction in every frame"),
        ({"base": "lion"}, ValueError, "sinkhorn, sign, row_norm, adam.*'lion'"),
        ({"base": "own"}, ValueError, "'own'"),
        ({"base": 3}, TypeError, "int"),
        ({"policy": "svd"}, ValueError, "policy.*qr, polar, eigen, none.*'svd'"),
        ({"qr": "gram"}, ValueError, "qr.*'gram'"),
        ({"rms": 0.0}, ValueError, "rms.*0.0"),
        ({"rms": -1.0}, ValueError, "rms"),
        ({"side": "top"}, ValueError, "side.*'top'"),
        ({"side": ["left", "top"]}, ValueError, "side"),
        ({"side": ["left"]}, ValueError, "1 sides for the 2 parameters"),
        ({"rotation_every": 0}, ValueError, "rotation_every.*0"),
        ({"rotation_every": 2.5}, ValueError, "rotation_every.*2.5"),
        ({"sinkhorn_iters": 0}, ValueError, "sinkhorn_iters"),
        ({"betas": (0.9, 0.9)}, ValueError, "betas.*sinkhorn"),
        ({"base": "adam", "betas": (0.9, 1.0)}, ValueError, "betas.*1.0"),
        ({"base": "adam", "betas": (1.0, 0.9)}, ValueError, "momentum.*1.0"),
        ({"share_rotation": True}, ValueError, "in common.*5, 4"),
        ({"share_rotation": True, "side": "left"}, ValueError, r"sizes \[5, 3\]"),
        ({"share_rotation": True, "stacked": True, "side": "left"}, ValueError, "stacked"),
    ],
)
def test_bad_options(options, error, words):
    with pytest.raises(error, match=words):
        ARO([nn.Parameter(torch.ones(5, 4)), nn.Parameter(torch.ones(3, 6))], **options)


def test_vectors_under_the_rule_and_mixed_dtypes_that_share_are_refused():
    with pytest.raises(ValueError, match=r"matrices.*\(3,\)"):
        ARO([nn.Parameter(torch.ones(3))], apply_to="all")
    params = [nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3, 3).double())]
    with pytest.raises(ValueError, match="one dtype"):
        ARO([{"params": params, "share_rotation": True}])
    with pytest.raises(ValueError, match="given to the optimizer"):
        ARO([{"params": params, "base": torch.sign}])
    with pytest.raises(ValueError, match="policy"):
        aro_rotation(torch.ones(2, 2), torch.eye(2), torch.sign, policy="svd")


# ---- what every optimizer on the base must do

CONTRACT = {
    "qr": ARO,
    "cholesky": partial(ARO, qr="cholesky", base="sign", rotation_every=2),
    "polar": partial(ARO, base="row_norm", policy="polar"),
    "eigen": partial(ARO, policy="eigen"),
    "adam": partial(ARO, base="adam", betas=(0.9, 0.99)),
}


@pytest.mark.parametrize("name", CONTRACT)
@pytest.mark.parametrize(
    "check",
    [
        contract.test_gradients_are_left_alone_and_none_is_skipped,
        contract.test_zero_gradient_moves_nothing_but_decay,
        contract.test_nan_stays_with_its_parameter,
        contract.test_same_run_twice_is_bit_identical,
        contract.test_maximize_is_the_step_of_the_negated_gradient,
        contract.test_tensor_lr_equals_float_lr,
        contract.test_resumes_bit_exactly_from_a_safe_file,
        contract.test_copies_go_their_own_way,
        contract.test_schedulers_scale_both_learning_rates,
        contract.test_closure_runs_with_gradients_and_its_loss_comes_back,
        contract.test_grad_scaler_gives_the_unscaled_step_and_skips_overflow,
        contract.test_training_goes_downhill,
    ],
    ids=lambda check: check.__name__,
)
def test_contract(check, name):
    check(CONTRACT[name])


@pytest.mark.parametrize("policy", ["qr", "eigen"])
def test_step_never_waits_for_the_device(policy):
    w = nn.Parameter(torch.zeros(6, 8))
    w.grad = gaussian(6, 8, dtype=torch.float32)
    optimizer = ARO([w], policy=policy, lr=torch.tensor(0.01))
    with contract.NoReadBack():
        optimizer.step()


def test_resumes_bit_exactly_in_half_precision():
    gradients = [gaussian(5, 7, seed=i, dtype=torch.bfloat16) for i in range(6)]
    whole, _ = run(torch.zeros(5, 7, dtype=torch.bfloat16), gradients)
    half, _ = run(torch.zeros(5, 7, dtype=torch.bfloat16), gradients[:3])
    w = nn.Parameter(torch.zeros(5, 7, dtype=torch.bfloat16))
    first = ARO([w])
    for gradient in gradients[:3]:
        w.grad = gradient
        first.step()
    resumed = nn.Parameter(half[-1].clone())
    second = ARO([resumed])
    second.load_state_dict(contract.through_disk(first.state_dict()))
    for gradient in gradients[3:]:
        resumed.grad = gradient
        second.step()
    assert torch.equal(resumed, whole[-1])


def test_memory_layout_does_not_matter():
    gradients = [gaussian(6, 9, seed=i, dtype=torch.float32) for i in range(4)]
    plain, _ = run(torch.zeros(6, 9), gradients)
    w = nn.Parameter(torch.zeros(9, 6).T)
    optimizer = ARO([w])
    for gradient in gradients:
        w.grad = gradient.T.contiguous().T
        optimizer.step()
    torch.testing.assert_close(w.detach(), plain[-1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("policy", ["qr", "polar", "eigen"])
def test_rotation_compiles_without_graph_breaks(policy):
    rule = partial(aro_rotation, f=sinkhorn_normalize, policy=policy)
    compiled = torch.compile(rule, fullgraph=True, backend="aot_eager")
    M, R = gaussian(2, 4, 6), orthogonal(4).expand(2, 4, 4)
    torch.testing.assert_close(compiled(M, R), rule(M, R))
