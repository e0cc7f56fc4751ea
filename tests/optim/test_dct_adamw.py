import copy
import io
import math

import pytest
import torch
from torch import nn

from weightlab.linalg import dct_matrix
from weightlab.linalg.column_selection import basis_vectors
from weightlab.optim import DCTAdamW
from weightlab.optim.quantized_buffer import decode

SHAPES = [(9, 6), (6, 9), (9, 6), (5, 5), (4, 3, 2, 2)]


def gaussian(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def parameter(*shape, seed=0, dtype=torch.float32):
    return nn.Parameter(gaussian(*shape, seed=seed, dtype=dtype))


def run(optimizer, steps):
    """Step with gradients that depend on the step and the parameter's place alone."""
    for step in steps:
        for group in optimizer.param_groups:
            for i, p in enumerate(group["params"]):
                p.grad = gaussian(*p.shape, seed=100 * step + i).to(p.dtype)
        optimizer.step()


def through_disk(state):
    file = io.BytesIO()
    torch.save(state, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


def reference(
    W,
    gradients,
    *,
    rank,
    lr=1e-3,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=0.0,
    gap=1,
    p=1,
    transport=True,
    feedback=False,
):
    """The method for a tall W in float64, with full matrices Q, masks and projections."""
    n = W.shape[1]
    Q = dct_matrix(n, dtype=torch.float64).T
    W = W.double()
    m = v = None
    error = torch.zeros_like(W)
    columns = []
    for t, G in enumerate(gradients, start=1):
        G = G.double() + error
        previous = columns
        if t == 1 or t % gap == 0:
            S = (G @ Q).abs() ** p
            columns = sorted(sorted(range(n), key=lambda j: (-S[:, j].sum().item(), j))[:rank])
        g = G @ Q[:, columns]
        if feedback:
            error = G - g @ Q[:, columns].T
        if m is None:
            m, v = torch.zeros_like(g), torch.zeros_like(g)
        elif transport:
            A = Q[:, previous].T @ Q[:, columns]
            m, v = m @ A, (v @ A).abs()
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g**2
        step = (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps)
        W = W * (1 - lr * weight_decay) - lr * step @ Q[:, columns].T
    return W, error


OPTIONS = [
    {},
    {"transport": False},
    {"p": 2, "weight_decay": 0.1},
    {"gap": 3},
    {"gap": 2, "feedback": True},
    {"feedback": True, "betas": (0.8, 0.95), "eps": 1e-3},
]


@pytest.mark.parametrize("transform", ["matmul", "fft"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", [(9, 6), (13, 7)])
def test_steps_follow_the_formulas(shape, options, transform):
    W = gaussian(*shape, dtype=torch.float64)
    gradients = [gaussian(*shape, seed=s, dtype=torch.float64) for s in range(1, 9)]
    expected, error = reference(W, gradients, rank=3, lr=0.01, **options)
    names = {"p": "select_norm", "gap": "update_gap"}
    given = {names.get(k, k): v for k, v in options.items() if k != "feedback"}
    if "feedback" in options:
        given["error_feedback"] = "fp32"
    w = nn.Parameter(W.clone())
    optimizer = DCTAdamW([w], lr=0.01, rank=3, transform=transform, **given)
    for G in gradients:
        w.grad = G
        optimizer.step()
    torch.testing.assert_close(w.detach(), expected, rtol=1e-9, atol=1e-9)
    if "feedback" in options:
        torch.testing.assert_close(optimizer.state[w]["error_feedback_error"], error)


@pytest.mark.parametrize("basis", ["dct2", "dct3", "random", "identity"])
@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
def test_full_rank_is_adamw_in_the_rotated_basis(shape, basis):
    n = min(shape)
    Q = basis_vectors(torch.arange(n), n, basis, torch.float64).T
    turn = (lambda X: X @ Q) if shape[0] >= shape[1] else (lambda X: Q.T @ X)
    w = parameter(*shape, dtype=torch.float64)
    rotated = nn.Parameter(turn(w.detach()))
    ours = DCTAdamW([w], lr=0.02, weight_decay=0.1, rank=99, basis=basis)
    theirs = torch.optim.AdamW([rotated], lr=0.02, weight_decay=0.1)
    for seed in range(6):
        w.grad = gaussian(*shape, seed=seed, dtype=torch.float64)
        rotated.grad = turn(w.grad)
        ours.step()
        theirs.step()
    torch.testing.assert_close(turn(w.detach()), rotated.detach())


def test_full_rank_in_coordinates_is_adamw():
    w, twin = parameter(7, 4), parameter(7, 4)
    ours, theirs = DCTAdamW([w], rank=1.0, basis="identity"), torch.optim.AdamW([twin], weight_decay=0.0)
    for optimizer in (ours, theirs):
        run(optimizer, range(5))
    torch.testing.assert_close(w, twin, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"update_gap": 2, "error_feedback": "int8"}, {"basis": "svd"}])
def test_transposed_gradients_give_the_transposed_trajectory(options):
    w = parameter(5, 8, dtype=torch.float64)
    t = nn.Parameter(w.detach().T.clone())
    optimizers = DCTAdamW([w], rank=2, **options), DCTAdamW([t], rank=2, **options)
    for seed in range(5):
        w.grad = gaussian(5, 8, seed=seed, dtype=torch.float64)
        t.grad = w.grad.T.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(w.detach(), t.detach().T)


@pytest.mark.parametrize(
    "options", [{"lr": 0.02}, {"lr": 0.02, "betas": (0.8, 0.9), "eps": 1e-4, "weight_decay": 0.3}]
)
def test_vectors_and_large_matrices_move_by_adamw(options):
    shapes = [(7,), (), (3, 12), (12, 3)]
    ours, theirs = ([parameter(*s) for s in shapes] for _ in range(2))
    for optimizer in (
        DCTAdamW([{"params": ours, "use_matrix_rule": True}], rank=1, max_dim=12, **options),
        torch.optim.AdamW(theirs, **{"weight_decay": 0.0, **options}),
    ):
        run(optimizer, range(5))
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_adamw_for_the_rest_has_the_rules_own_options_unless_told():
    net = nn.Linear(4, 4)
    given = {"lr": 0.5, "betas": (0.7, 0.8), "eps": 1e-5, "weight_decay": 0.25}
    _, rest = DCTAdamW(net.parameters(), **given).param_groups
    assert {k: rest[k] for k in given} == given
    _, rest = DCTAdamW(net.parameters(), **given, adamw={"lr": 0.125}).param_groups
    assert (rest["lr"], rest["eps"]) == (0.125, 1e-5)


@pytest.mark.parametrize("basis", ["dct2", "svd"])
@pytest.mark.parametrize("feedback", [None, "fp32", "int8", "int4"])
def test_equal_shapes_together_move_as_apart(basis, feedback):
    options = {"rank": 2, "update_gap": 2, "basis": basis, "error_feedback": feedback, "lr": 0.01}
    together = [parameter(*s, seed=i, dtype=torch.float64) for i, s in enumerate(SHAPES)]
    apart = copy.deepcopy(together)
    optimizers = [DCTAdamW(together, **options), *(DCTAdamW([p], **options) for p in apart)]
    for step in range(5):
        for i, (p, q) in enumerate(zip(together, apart, strict=True)):
            # One starts later and is at another step than those that it is stacked with.
            p.grad = None if i == 2 and step == 0 else gaussian(*p.shape, seed=9 * step + i).double()
            q.grad = None if p.grad is None else p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(together, apart, strict=True):
        torch.testing.assert_close(p, q)


def test_large_matrices_take_the_same_step_as_small_ones():
    """300 columns go by FFT in pieces of the cache's size, the product does not."""
    w, twin = parameter(900, 300), parameter(900, 300)
    for p, transform in ((w, "fft"), (twin, "matmul")):
        run(DCTAdamW([p], rank=30, transform=transform, eps=1e-4), range(3))
    torch.testing.assert_close(w, twin, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("storage", ["fp32", "int8", "int4"])
def test_error_feedback_loses_nothing(storage):
    """What was projected and what is kept add up to all gradients, to the error of storing at every step."""
    w = parameter(6, 5, dtype=torch.float64)
    optimizer = DCTAdamW([w], rank=2, error_feedback=storage)
    Q = dct_matrix(5, dtype=torch.float64)
    total, sent, kept, slack = torch.zeros(6, 5), torch.zeros(6, 5), torch.zeros(6, 5), torch.zeros(6, 1)
    for seed in range(10):
        w.grad = gaussian(6, 5, seed=seed).double()
        optimizer.step()
        total = total + w.grad
        P = Q[optimizer.state[w]["indices"]]
        projected = (w.grad + kept) @ P.T @ P
        sent = sent + projected
        dropped = w.grad + kept - projected
        state = optimizer.state[w]
        kept = decode(
            {k.removeprefix("error_feedback_"): v for k, v in state.items() if "error" in k}, 5
        ).double()
        if storage != "fp32":
            slack = slack + state["error_feedback_unit"] / 2 + 1e-6
            assert ((kept - dropped).abs() <= state["error_feedback_unit"] / 2 + 1e-6).all()
    assert ((sent + kept - total).abs() <= slack + 1e-12).all()


def test_error_feedback_moves_what_rank_alone_never_would():
    G = gaussian(6, 1) @ torch.tensor([[3.0, 1.0, 0.5, 0.1]])
    moved = {}
    for feedback in (None, "fp32"):
        w = nn.Parameter(torch.zeros(6, 4))
        optimizer = DCTAdamW([w], rank=1, basis="identity", error_feedback=feedback)
        for _ in range(80):
            w.grad = G.clone()
            optimizer.step()
        moved[feedback] = int(w.detach().abs().sum(0).gt(0).sum())
    assert moved == {None: 1, "fp32": 4}


def test_moments_follow_their_basis_vectors():
    w = nn.Parameter(torch.zeros(5, 4))
    optimizer = DCTAdamW([w], rank=2, basis="identity", betas=(0.5, 0.5))
    w.grad = torch.tensor([[1.0, 2.0, 0.0, 0.0]]).expand(5, 4)
    optimizer.step()
    w.grad = torch.tensor([[0.0, 4.0, 3.0, 0.0]]).expand(5, 4)
    optimizer.step()
    state = optimizer.state[w]
    assert state["indices"].tolist() == [1, 2]
    assert state["low_exp_avg"][0].tolist() == [0.5 * 1.0 + 2.0, 1.5]
    assert state["low_exp_avg_sq"][0].tolist() == [0.5 * 2.0 + 8.0, 4.5]


def test_columns_change_at_multiples_of_the_gap_only():
    w = parameter(8, 8)
    optimizer = DCTAdamW([w], rank=2, update_gap=3)
    seen = []
    for step in range(1, 8):
        run(optimizer, [step])
        seen.append(optimizer.state[w]["indices"].tolist())
    assert seen[0] == seen[1]
    assert seen[2] == seen[3] == seen[4]
    assert seen[5] == seen[6]
    assert seen[1] != seen[2] != seen[5]


def test_svd_basis_projects_on_the_gradients_own_vectors():
    w = nn.Parameter(torch.zeros(7, 5, dtype=torch.float64))
    w.grad = gaussian(7, 5, dtype=torch.float64)
    optimizer = DCTAdamW([w], lr=1.0, rank=2, basis="svd", betas=(0.0, 0.0), eps=1e12)
    optimizer.step()  # with such an eps Adam is the identity divided by it
    U, S, V = torch.linalg.svd(w.grad, full_matrices=False)
    torch.testing.assert_close(-1e12 * w.detach(), U[:, :2] * S[:2] @ V[:2])


def test_svd_basis_carries_moments_whatever_signs_the_vectors_have():
    """The same gradient again leaves the moments where they were, even if LAPACK flips its vectors."""
    G = gaussian(7, 5, dtype=torch.float64)
    svd = nn.Parameter(torch.zeros(7, 5, dtype=torch.float64))
    optimizer = DCTAdamW([svd], rank=5, basis="svd", betas=(0.9, 0.9))
    for _ in range(3):
        svd.grad = G
        optimizer.step()
    state = optimizer.state[svd]
    low = G @ state["vectors"].T
    torch.testing.assert_close(state["low_exp_avg"], (1 - 0.9**3) * low)
    torch.testing.assert_close(state["low_exp_avg_sq"], (1 - 0.9**3) * low**2)
    state["vectors"].neg_()
    state["low_exp_avg"].neg_()
    svd.grad = G
    optimizer.step()
    torch.testing.assert_close(
        state["low_exp_avg"] @ state["vectors"], (1 - 0.9**4) * G, rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_state_is_as_small_as_the_theory_says(shape):
    def state_bytes(**options):
        w = parameter(*shape)
        optimizer = DCTAdamW([w], rank=6, **options)
        run(optimizer, range(2))
        return sum(t.numel() * t.element_size() for t in optimizer.state[w].values() if t.ndim > 0)

    moments, indices = 2 * 40 * 6 * 4, 6 * 8
    assert state_bytes() == moments + indices
    assert state_bytes(basis="svd") == moments + 6 * 24 * 4
    assert state_bytes(error_feedback="fp32") == moments + indices + 40 * 24 * 4
    assert state_bytes(error_feedback="int8") == moments + indices + 40 * (24 + 8)
    assert state_bytes(error_feedback="int4") == moments + indices + 40 * (12 + 8)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"update_gap": 3, "error_feedback": "int4"},
        {"error_feedback": "int8"},
        {"basis": "svd", "update_gap": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumes_bit_exactly_with_indices_and_codes_as_they_were(options, dtype):
    params = [parameter(*s, seed=i, dtype=dtype) for i, s in enumerate([*SHAPES, (5,)])]
    optimizer = DCTAdamW(params, rank=2, **options)
    run(optimizer, range(4))
    saved = through_disk(optimizer.state_dict())
    again = copy.deepcopy(params)
    resumed = DCTAdamW(again, rank=2, **options)
    resumed.load_state_dict(saved)
    for p, q in zip(params, again, strict=True):
        for name, value in optimizer.state[p].items():
            assert resumed.state[q][name].dtype == value.dtype
    run(optimizer, range(4, 8))
    run(resumed, range(4, 8))
    for p, q in zip(params, again, strict=True):
        assert torch.equal(p, q)


def test_a_saved_state_holds_no_more_than_its_tensors():
    params = [parameter(30, 30, seed=i) for i in range(20)]
    optimizer = DCTAdamW(params, rank=3)
    run(optimizer, range(3))
    for state in optimizer.state.values():
        for value in state.values():
            assert value.untyped_storage().nbytes() == value.numel() * value.element_size()


def test_several_shorter_sides_in_one_model():
    params = [parameter(*s) for s in ((8, 56), (64, 64), (16, 64), (64, 16), (3, 3), (1, 9), (9, 1), (1, 1))]
    before = [p.detach().clone() for p in params]
    run(DCTAdamW(params, rank=4), range(3))
    for p, old in zip(params, before, strict=True):
        assert p.isfinite().all()
        assert not torch.equal(p, old)


def test_half_precision_keeps_moments_in_float32():
    w = nn.Parameter(gaussian(6, 4).bfloat16())
    optimizer = DCTAdamW([w], rank=2, lr=0.1)
    run(optimizer, range(2))
    assert optimizer.state[w]["low_exp_avg"].dtype == torch.float32
    twin = nn.Parameter(gaussian(6, 4).bfloat16().float())
    other = DCTAdamW([twin], rank=2, lr=0.1)
    for step in range(2):
        twin.grad = gaussian(6, 4, seed=100 * step).bfloat16().float()
        other.step()
    torch.testing.assert_close(w.float(), twin, rtol=2**-6, atol=1e-3)


@pytest.mark.parametrize("basis", ["dct2", "dct3", "random", "identity", "svd"])
def test_zero_and_nan_gradients(basis):
    w, other = parameter(6, 4), parameter(6, 4)
    optimizer = DCTAdamW([w, other], rank=2, basis=basis)
    before = w.detach().clone()
    w.grad, other.grad = torch.zeros(6, 4), torch.zeros(6, 4)
    optimizer.step()
    assert torch.equal(w, before)
    w.grad, other.grad = torch.full((6, 4), math.nan), torch.ones(6, 4)
    optimizer.step()
    assert w.isnan().any()
    assert other.isfinite().all()


def test_empty_parameters_are_passed_over():
    w = nn.Parameter(torch.empty(0, 4))
    w.grad = torch.empty(0, 4)
    DCTAdamW([w]).step()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"rank": -3}, "rank"),
        ({"rank": 1.5}, "fraction"),
        ({"basis": "hadamard"}, "basis must be one of dct2.*'hadamard'"),
        ({"transform": "fht"}, "transform"),
        ({"select_norm": 0}, "norm"),
        ({"error_feedback": "int2"}, "error_feedback.*'int2'"),
        ({"update_gap": 0}, "update_gap.*got 0"),
        ({"update_gap": 1.5}, "update_gap"),
        ({"max_dim": 0}, "max_dim"),
        ({"betas": (0.9, 1.0)}, r"betas.*\(0.9, 1.0\)"),
        ({"betas": (0.9,)}, "betas"),
        ({"eps": -1.0}, "eps"),
        ({"lr": -1.0}, "lr"),
        ({"weight_decay": -1.0}, "weight_decay"),
    ],
)
def test_options_out_of_range(options, words):
    with pytest.raises(ValueError, match=words):
        DCTAdamW([nn.Parameter(torch.ones(2, 2))], **options)


def test_complex_and_sparse_are_refused():
    with pytest.raises(TypeError, match="complex64"):
        DCTAdamW([nn.Parameter(torch.ones(2, 2, dtype=torch.cfloat))])
    w = nn.Parameter(torch.ones(2, 2))
    w.grad = torch.ones(2, 2).to_sparse()
    with pytest.raises(TypeError, match="sparse"):
        DCTAdamW([w]).step()
