import math
import warnings

import pytest
import torch

from weightlab.optim import (
    robust_recover,
    robust_recovery,
    sign_correlation,
    small_spectral_,
)
from weightlab.optim.robust_recovery import auto_decay

D, R, M = 8, 2, 320


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def low_rank(d=D, r=R, seed=0):
    V = torch.linalg.qr(normal(d, r, seed=seed)).Q
    return V @ V.T


def problem(*, share=0.0, size=10.0, d=D, r=R, m=M, seed=0, sigma=0.0):
    """Operator, measurements and truth; the same but for the outliers, whatever their size."""
    X = low_rank(d, r, seed)
    A = normal(m, d, d, seed=seed + 100)
    hit = torch.arange(m) < share * m
    noise = torch.where(hit, size * normal(m, seed=seed + 200), 0.0) + sigma * normal(m, seed=seed + 300)
    return A, (A * X).sum((1, 2)) + noise, X


def vectors(share=0.0, d=D, r=R, m=600, seed=0):
    X, a = low_rank(d, r, seed), normal(m, d, seed=seed + 100)
    outliers = torch.where(torch.arange(m) < share * m, 10 * normal(m, seed=seed + 200), 0.0)
    return a, (a @ X * a).sum(1) + outliers, X


def error(result, X):
    return ((result.X - X).norm() / X.norm()).item()


def reference_q(U, A, y):
    total = torch.zeros(A.shape[1:], dtype=torch.float64)
    for matrix, value in zip(A, y, strict=True):
        residual = (matrix * (U @ U.T)).sum() - value
        total += residual.sign() * (matrix + matrix.T) / 2
    return total / len(y)


# ---- the direction


def test_direction_is_the_formulas():
    A, y, _ = problem(share=0.2, m=40)
    U = normal(D, 3, seed=5)
    Q, loss = sign_correlation(U, A, y)
    torch.testing.assert_close(Q, reference_q(U, A, y), rtol=1e-12, atol=1e-13)
    assert torch.equal(Q, Q.T)
    torch.testing.assert_close(loss, ((A * (U @ U.T)).sum((1, 2)) - y).abs().mean())


def test_at_the_origin_it_is_minus_the_correlation_with_the_signs_of_y():
    A, y, _ = problem(share=0.2)
    Q, loss = sign_correlation(torch.zeros(D, 1, dtype=torch.float64), A, y)
    correlation = (y.sign()[:, None, None] * A).mean(0)
    torch.testing.assert_close(Q, -(correlation + correlation.T) / 2)
    torch.testing.assert_close(loss, y.abs().mean())


@pytest.mark.parametrize("rank_one", [False, True])
def test_gradient_agrees_with_finite_differences(rank_one):
    operator, y, _ = vectors(share=0.2, m=40) if rank_one else problem(share=0.2, m=40)
    U, step = normal(D, 3, seed=6), 1e-7
    Q, _ = sign_correlation(U, operator, y, center=False)
    for index in [(0, 0), (3, 1), (7, 2)]:
        moved = [U.clone(), U.clone()]
        for matrix, sign in zip(moved, (1, -1), strict=True):
            matrix[index] += sign * step
        up, down = (sign_correlation(matrix, operator, y, center=False)[1] for matrix in moved)
        slope = (up - down) / (2 * step)
        torch.testing.assert_close(slope, (2 * Q @ U)[index], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("noise", "expected"),
    [
        ("none", lambda delta: 1.0),
        ("fixed", lambda delta: math.exp(-(0.5**2) / (2 * delta**2))),
        ("outliers", lambda delta: 0.7 + 0.3 * math.exp(-(4.0**2) / (2 * delta**2))),
        ("gaussian", lambda delta: delta / math.sqrt(delta**2 + 0.7**2)),
    ],
)
def test_signal_in_the_direction_is_as_sign_rip_says(noise, expected):
    m, d = 100_000, 3
    A, X, U = normal(m, d, d, seed=1), low_rank(d, 1, seed=2), 0.3 * normal(d, d, seed=3)
    kinds = {
        "none": torch.zeros(m, dtype=torch.float64),
        "fixed": torch.full((m,), 0.5, dtype=torch.float64),
        "outliers": torch.where(torch.arange(m) < 0.3 * m, 4.0, 0.0).double(),
        "gaussian": 0.7 * normal(m, seed=4),
    }
    Q, _ = sign_correlation(U, A, (A * X).sum((1, 2)) + kinds[noise])
    delta = U @ U.T - X
    unit = delta / delta.norm()
    phi = math.sqrt(2 / math.pi) * expected(delta.norm().item())
    standard_error = 1 / math.sqrt(m)
    assert (Q * unit).sum().item() == pytest.approx(phi, abs=4 * standard_error)
    assert (Q - phi * unit).norm() < 6 * d * standard_error


def test_operators_of_all_kinds_agree():
    a, y, _ = vectors(share=0.2)
    A = a[:, :, None] * a[:, None, :]

    class Pair:
        def forward(self, X):
            return (a @ X * a).sum(1)

        def adjoint(self, v):
            return (a * v[:, None]).T @ a

    U = normal(D, 4, seed=7)
    for center in (False, True):
        expected = sign_correlation(U, A, y, center=center)
        for operator in (a, Pair()):
            for ours, theirs in zip(sign_correlation(U, operator, y, center=center), expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    first = robust_recover(A, y, D, 3, center=True, max_iter=200)
    for operator in (a, Pair()):
        again = robust_recover(operator, y, D, 3, center=True, max_iter=200)
        torch.testing.assert_close(again.X, first.X, rtol=1e-8, atol=1e-10)


def test_blocks_of_rows_change_nothing(monkeypatch):
    U = normal(D, 3, seed=8)
    for operator, y, _ in (problem(share=0.2), vectors(share=0.2)):
        whole = sign_correlation(U, operator, y)
        monkeypatch.setattr(robust_recovery, "_BLOCK_BYTES", 4000)
        blocks = sign_correlation(U, operator, y)
        assert len(robust_recovery._sensing(operator, y, D, None).parts) > 3
        monkeypatch.undo()
        for ours, theirs in zip(blocks, whole, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


# ---- recovery


def test_first_steps_follow_the_formulas():
    A, y, _ = problem(share=0.2)
    result = robust_recover(A, y, D, 3, alpha=0.7, lr=0.1, decay=0.9, max_iter=4)
    U = torch.empty(D, 3, dtype=torch.float64)
    small_spectral_(U, A, y, alpha=0.7)
    losses = []
    for t in range(4):
        Q = reference_q(U, A, y)
        losses.append(((A * (U @ U.T)).sum((1, 2)) - y).abs().mean())
        U = U - 2 * 0.1 * 0.9**t / Q.norm() * Q @ U
    torch.testing.assert_close(result.U, U, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(result.loss_history[:4], torch.stack(losses))
    assert result.loss_history.shape == (5,)


def test_spectral_start_is_small_and_points_at_the_truth():
    A, y, X = problem(m=4000)
    U = torch.nn.Parameter(torch.empty(D, R, dtype=torch.float64))
    assert small_spectral_(U, A, y, alpha=1e-3) is U
    assert (U @ U.T).norm().item() == pytest.approx(1e-6 * X.norm().item(), rel=0.1)
    cosine = torch.nn.functional.cosine_similarity((U @ U.T).flatten(), X.flatten(), dim=0)
    assert cosine > 0.98


@pytest.mark.parametrize("normalize", ["fro", "spectral"])
@pytest.mark.parametrize(("share", "bound"), [(0.0, 1e-6), (0.3, 1e-5)])
def test_recovers_with_the_true_rank(share, bound, normalize):
    A, y, X = problem(share=share)
    result = robust_recover(A, y, D, R, alpha=1e-3, normalize=normalize)
    assert error(result, X) < bound
    assert bool(result.escaped)
    torch.testing.assert_close(result.X, result.U @ result.U.T)


def test_size_of_outliers_does_not_count():
    small, large = (robust_recover(*problem(share=0.2, size=size)[:2], D, alpha=1e-3) for size in (10.0, 1e6))
    X = low_rank()
    assert error(small, X) < 0.02
    assert error(large, X) == pytest.approx(error(small, X), rel=0.2)


def test_superfluous_directions_stay_small_and_smaller_from_a_smaller_start():
    A, y, X = problem(share=0.1, m=640)
    errors = []
    for alpha in (1e-2, 1e-4):
        result = robust_recover(A, y, D, alpha=alpha)
        errors.append(error(result, X))
    values = torch.linalg.svdvals(result.U)
    assert values[R] < 0.1 * values[R - 1]
    assert errors[1] < errors[0] / 5


def test_scaling_y_scales_the_factor_by_the_root():
    A, y, _ = problem(share=0.2)
    first = robust_recover(A, y, D, max_iter=300)
    assert torch.equal(robust_recover(A, 4 * y, D, max_iter=300).U, 2 * first.U)
    # Operators of another scale are another unit of y.
    scaled = robust_recover(4 * A, y, D, max_iter=300)
    torch.testing.assert_close(scaled.U, first.U / 2, rtol=1e-12, atol=0)


def test_polyak_is_free_of_units_as_well_and_converges_without_noise():
    A, y, X = problem()
    first = robust_recover(A, y, D, R, alpha=1e-3, step="polyak", max_iter=400)
    assert error(first, X) < 1e-6
    other = robust_recover(A, 1e6 * y, D, R, alpha=1e-3, step="polyak", max_iter=400)
    assert error(other, 1e6 * X) < 1e-6
    other = robust_recover(1e-3 * A, y, D, R, alpha=1e-3, step="polyak", max_iter=400)
    assert error(other, 1e3 * X) < 1e-6


def test_rotating_the_operator_rotates_the_result():
    A, y, _ = problem(share=0.2)
    P = torch.linalg.qr(normal(D, D, seed=9)).Q
    first = robust_recover(A, y, D, 4, max_iter=150)
    turned = robust_recover(P @ A @ P.T, y, D, 4, max_iter=150)
    torch.testing.assert_close(turned.X, P @ first.X @ P.T, rtol=1e-7, atol=1e-9 * first.X.norm().item())


def test_vectors_need_the_offset():
    a, y, X = vectors(share=0.2)
    assert error(robust_recover(a, y, D, R, alpha=1e-3), X) < 1e-6
    origin = torch.zeros(D, 1, dtype=torch.float64)
    blind, _ = sign_correlation(origin, a, (a @ X * a).sum(1), center=False)
    torch.testing.assert_close(blind, -(a.T @ a) / len(a))
    seeing, _ = sign_correlation(origin, a, (a @ X * a).sum(1))
    values, directions = torch.linalg.eigh(-seeing)
    overlap = torch.linalg.eigh(X).eigenvectors[:, -R:].T @ directions[:, -R:]
    assert torch.linalg.svdvals(overlap).min() > 0.9
    assert values[-1] > 0.1


def test_offset_makes_dense_measurements_blind_to_a_constant():
    A, y, X = problem(share=0.1)
    result = robust_recover(A, y + 5.0, D, R, alpha=1e-3, center=True)
    assert error(result, X) < 1e-5


def test_float32():
    A, y, X = problem(share=0.2)
    result = robust_recover(A.float(), y.float(), D, R, alpha=1e-3)
    assert result.U.dtype == torch.float32
    assert error(result, X) < 1e-5


# ---- batches


def test_problems_solved_together_equal_problems_solved_alone(monkeypatch):
    problems = [problem(share=0.2, seed=seed) for seed in (0, 1)]
    A, y, _ = (torch.stack(parts) for parts in zip(*problems, strict=True))
    together = robust_recover(A, y, D, 3, max_iter=100)
    monkeypatch.setattr(robust_recovery, "_ALONE", 1)
    one_by_one = robust_recover(A, y, D, 3, max_iter=100)
    assert together.loss_history.shape == one_by_one.loss_history.shape == (101, 2)
    for index, (A, y, _) in enumerate(problems):
        alone = robust_recover(A, y, D, 3, max_iter=100)
        for batch in (together, one_by_one):
            torch.testing.assert_close(batch.X[index], alone.X, rtol=1e-8, atol=1e-12)
            torch.testing.assert_close(batch.loss_history[:, index], alone.loss_history)
            assert batch.escaped[index] == alone.escaped
            torch.testing.assert_close(batch.scale[index], alone.scale)


@pytest.mark.parametrize("kind", [problem, vectors])
def test_one_operator_serves_several_measurements(kind):
    operator, y, _ = kind(share=0.2)
    matrices = operator if operator.ndim == 3 else operator[:, :, None] * operator[:, None, :]
    other = (matrices * low_rank(seed=50)).sum((1, 2))
    together = robust_recover(operator, torch.stack([y, other]), D, 3, max_iter=60, alpha=0.5)
    for index, values in enumerate((y, other)):
        alone = robust_recover(operator, values, D, 3, max_iter=60, alpha=0.5)
        torch.testing.assert_close(together.X[index], alone.X, rtol=1e-8, atol=1e-10)
    if kind is vectors:
        stacked = robust_recover(
            torch.stack([operator] * 2), torch.stack([y, other]), D, 3, max_iter=60, alpha=0.5
        )
        torch.testing.assert_close(stacked.X, together.X, rtol=1e-8, atol=1e-10)


# ---- what can be known without the truth


def test_detection_tells_signal_from_noise():
    A, y, _ = problem()
    assert bool(robust_recover(A, y, D, max_iter=300, decay=0.99).detected)
    noise = normal(M, seed=11)
    result = robust_recover(A, noise, D, max_iter=300, decay=0.99)
    assert not bool(result.detected)
    assert result.X.norm() > 0.1  # noise is fitted all the same
    correlation = sign_correlation(torch.zeros(D, 1, dtype=torch.float64), A, noise)[0]
    null = torch.linalg.matrix_norm(correlation, 2) / result.detection
    assert null.item() == pytest.approx(math.sqrt(2 * D / M), rel=0.15)


def test_too_fast_a_decay_never_escapes_and_says_so():
    A, y, X = problem()
    with pytest.warns(UserWarning, match=r"1 of 1 results did not escape the origin.*decay \(0.9\)"):
        result = robust_recover(A, y, D, alpha=1e-8, decay=0.9)
    assert not bool(result.escaped)
    assert error(result, X) == pytest.approx(1, abs=1e-6)
    assert bool(robust_recover(A, y, D, alpha=1e-8).escaped)


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("alpha", [0.5, 1e-2, 1e-6])
def test_default_decay_escapes_from_any_start(alpha, rank):
    A, y, X = problem(d=10, r=rank, m=600)
    result = robust_recover(A, y, 10, rank, alpha=alpha)
    assert bool(result.escaped)
    assert error(result, X) < 1e-5


@pytest.mark.parametrize("share", [0.3, 0.6])
def test_many_outliers_do_not_look_like_a_failed_escape(share):
    A, y, X = problem(share=share, m=2400, size=1e3)
    result = robust_recover(A, y, D, R, alpha=1e-3)
    assert error(result, X) < 1e-5
    assert bool(result.escaped)


def test_default_decay_leaves_growth_for_four_times_the_logarithm():
    for alpha in (1e-2, 1e-8):
        growth = 2 * 0.2 / (1 - auto_decay(0.2, alpha))
        assert growth == pytest.approx(4 * math.log(1 / alpha))


@pytest.mark.parametrize("share", [0.0, 0.4])
@pytest.mark.parametrize("kind", [problem, vectors])
def test_scale_is_near_the_norm_and_no_unit_counts(kind, share):
    operator, y, X = kind(share=share, m=2000)
    y[::10] = y[0] if kind is vectors else 0.0  # the starting point of neither
    result = robust_recover(operator, y, D, R, alpha=0.1)
    assert 0.7 * X.norm() < result.scale < 2.5 * X.norm()
    larger = robust_recover(3 * operator, y, D, R, alpha=0.1)
    torch.testing.assert_close(larger.scale, result.scale / (9 if kind is vectors else 3))


def test_generator_decides_the_random_start():
    A, y, X = problem()
    runs = [
        robust_recover(A, y, D, R, alpha=1e-2, init="random", generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(runs[0].U, runs[1].U)
    assert not torch.allclose(runs[0].U, runs[2].U, atol=1e-3)
    for result in runs:
        assert error(result, X) < 1e-6


# ---- bad input


@pytest.mark.parametrize(("value", "center"), [(0.0, False), (0.0, True), (3.0, True)])
def test_nothing_measured_gives_zero_with_a_warning(value, center):
    y = torch.full((M,), value, dtype=torch.float64)
    with pytest.warns(UserWarning, match="y is zero, or constant"):
        result = robust_recover(problem()[0], y, D, max_iter=5, center=center)
    assert torch.equal(result.U, torch.zeros(D, D, dtype=torch.float64))
    assert not result.loss_history.isnan().any()


def test_no_semidefinite_signal_gives_zero_with_a_warning():
    a, y, _ = vectors()
    with pytest.warns(UserWarning, match="no positive eigenvalue"):
        result = robust_recover(a, -y, D, center=False, max_iter=5)
    assert not result.U.any()
    assert not bool(result.escaped)


def wrong(**changes):
    A, y, _ = problem(m=20)
    arguments = {"operator": A, "y": y, "dim": D, **changes}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return robust_recover(**arguments)


class OnlyForward:
    def forward(self, X):
        return X


class BadShapes:
    def __init__(self, measured, matrix):
        self.measured, self.matrix = measured, matrix

    def forward(self, X):
        return torch.zeros(self.measured, dtype=torch.float64)

    def adjoint(self, v):
        return torch.zeros(self.matrix, dtype=torch.float64)


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"y": torch.zeros(19).double()}, ValueError, r"m = 19.*\(20, 8, 8\)"),
        ({"dim": 7}, ValueError, "dim = 7"),
        ({"operator": normal(20, 8, 5)}, ValueError, "8 by 5.*square"),
        ({"operator": normal(20)}, ValueError, r"\(20,\)"),
        ({"y": torch.full((20,), math.nan).double()}, ValueError, "20 NaN or infinite"),
        ({"y": torch.full((20,), math.inf).double()}, ValueError, "finite"),
        ({"operator": torch.full((20, 8, 8), math.nan).double()}, ValueError, "operator must be finite"),
        ({"y": torch.zeros(2, 2, 5).double()}, ValueError, r"\(2, 2, 5\)"),
        ({"y": torch.zeros(0).double()}, ValueError, "m > 0"),
        ({"y": torch.zeros(20)}, TypeError, "float64.*float32"),
        ({"y": torch.zeros(20, dtype=torch.long)}, TypeError, "int64"),
        ({"y": [0.0] * 20}, TypeError, "list"),
        ({"operator": OnlyForward()}, TypeError, "OnlyForward"),
        ({"operator": BadShapes(3, (8, 8))}, ValueError, "forward must return.*20"),
        ({"operator": BadShapes(20, (8, 7))}, ValueError, "adjoint must return.*8 by 8"),
        ({"operator": BadShapes(20, (7, 7))}, ValueError, "adjoint must return.*8 by 8"),
        ({"operator": BadShapes(20, (8, 8)), "y": torch.zeros(2, 20).double()}, ValueError, "one problem"),
        (
            {"operator": torch.zeros(8, 8, 8).double(), "y": torch.zeros(8, 8).double()},
            ValueError,
            "can mean",
        ),
        ({"rank": 9}, ValueError, "rank.*dim = 8.*9"),
        ({"rank": 0}, ValueError, "rank"),
        ({"alpha": 1.0}, ValueError, "alpha"),
        ({"alpha": 0.0}, ValueError, "alpha"),
        ({"lr": 0.0}, ValueError, "lr"),
        ({"lr": math.nan}, ValueError, "lr"),
        ({"decay": 1.0}, ValueError, "decay"),
        ({"decay": 0.0}, ValueError, "decay"),
        ({"max_iter": 0}, ValueError, "max_iter"),
        ({"step": "armijo"}, ValueError, "step.*'polyak'.*'armijo'"),
        ({"normalize": "nuclear"}, ValueError, "normalize"),
        ({"init": "zeros"}, ValueError, "init"),
    ],
)
def test_bad_input(changes, kind, words):
    with pytest.raises(kind, match=words):
        wrong(**changes)


@pytest.mark.parametrize("shape", [(D,), (2, D, 3)])
def test_factor_must_fit_the_measurements(shape):
    A, y, _ = problem(m=20)
    with pytest.raises(ValueError, match="U must have shape"):
        small_spectral_(torch.empty(shape, dtype=torch.float64), A, y)
