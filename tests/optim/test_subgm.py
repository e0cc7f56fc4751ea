import io
import math

import pytest
import torch
from torch import nn

from weightlab import tasks
from weightlab.optim import SubGM, robust_recover, small_spectral_
from weightlab.optim.robust_recovery import auto_decay
from weightlab.trial import registry

D, R = 8, 2


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def sensing(share=0.0, m=320, seed=0):
    V = torch.linalg.qr(normal(D, R, seed=seed)).Q
    X = V @ V.T
    A = normal(m, D, D, seed=seed + 1)
    noise = torch.where(torch.arange(m) < share * m, 10 * normal(m, seed=seed + 2), 0.0)
    return A, (A * X).sum((1, 2)) + noise, X


def fit(A, y, rank, *, alpha, steps, scale=1.0, **options):
    U = nn.Parameter(torch.empty(D, rank, dtype=torch.float64))
    small_spectral_(U, A, y, alpha)
    optimizer = SubGM([U], alpha=alpha, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        (scale * ((A * (U @ U.T)).sum((1, 2)) - y).abs().mean()).backward()
        optimizer.step()
    return U.detach()


def parameters(dtype=torch.float64):
    return [
        nn.Parameter(normal(*shape, seed=i, dtype=dtype)) for i, shape in enumerate([(4, 2), (6,), (4, 2)])
    ]


def with_gradients(params, step):
    for i, p in enumerate(params):
        p.grad = normal(*p.shape, seed=100 * step + i + 7, dtype=p.dtype)


def train(optimizer, params, steps):
    for step in steps:
        with_gradients(params, step)
        optimizer.step()
    return [p.detach().clone() for p in params]


def test_steps_follow_the_formula():
    params, lr, decay = parameters(), 0.1, 0.8
    expected = [p.detach().clone() for p in params]
    optimizer = SubGM(params, lr, decay)
    for step in range(4):
        with_gradients(params, step)
        for i, p in enumerate(params):
            size, slope = expected[i].norm(), p.grad.norm()
            expected[i] = expected[i] - 2 * lr * decay**step * size / slope * p.grad
        optimizer.step()
    for p, q in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=1e-12, atol=0)


@pytest.mark.filterwarnings("ignore:1 of 1 results did not escape")
def test_while_the_signal_grows_it_is_the_papers_step_by_the_spectral_norm():
    """With U in Q's leading eigenspace, ‖D‖_F/(2‖U‖_F) is ‖Q‖₂."""
    A, y, _ = sensing()
    paper = robust_recover(A, y, D, 1, alpha=1e-3, lr=0.1, decay=0.999, max_iter=10, normalize="spectral")
    ours = fit(A, y, 1, alpha=1e-3, steps=10, lr=0.1, decay=0.999)
    torch.testing.assert_close(ours, paper.U, rtol=1e-9, atol=0)


def test_recovers_from_outliers_whatever_the_scale_of_the_loss():
    A, y, X = sensing(share=0.2)
    results = [fit(A, y, R, alpha=1e-2, steps=600, scale=scale) for scale in (1.0, 2.0**20)]
    assert (results[0] @ results[0].T - X).norm() < 1e-3 * X.norm()
    assert torch.equal(*results)


def test_a_smaller_start_leaves_less_in_superfluous_directions():
    A, y, X = sensing(share=0.1, m=640)
    errors = []
    for alpha, steps in ((1e-1, 300), (1e-3, 900)):
        U = fit(A, y, D, alpha=alpha, steps=steps)
        errors.append(((U @ U.T - X).norm() / X.norm()).item())
    assert errors[1] < errors[0] / 3
    assert errors[1] < 1e-2


def test_default_decay_is_derived_from_alpha_group_by_group():
    p, q = parameters()[:2]
    optimizer = SubGM([{"params": p}, {"params": q, "lr": 0.1, "alpha": 1e-8}], alpha=1e-4)
    assert optimizer.param_groups[0]["decay"] == pytest.approx(auto_decay(0.2, 1e-4))
    assert optimizer.param_groups[1]["decay"] == pytest.approx(1 - 0.05 / math.log(1e8))


def test_zero_stays_and_zero_gradients_move_nothing():
    zero, still = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(3))
    zero.grad, still.grad = torch.ones(3), torch.zeros(3)
    SubGM([zero, still]).step()
    assert torch.equal(zero, torch.zeros(3))
    assert torch.equal(still, torch.ones(3))


def test_a_nan_in_the_gradient_shows():
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.tensor([1.0, math.nan, 1.0])
    SubGM([p]).step()
    assert p.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_foreach_changes_nothing(dtype):
    runs = []
    for foreach in (False, True):
        params = parameters(dtype)
        runs.append(train(SubGM(params, 0.1, 0.9, foreach=foreach), params, range(3)))
    for one, many in zip(*runs, strict=True):
        torch.testing.assert_close(one, many, rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_bfloat16_follows_float64():
    params, exact = parameters(torch.bfloat16), parameters(torch.bfloat16)
    exact = [nn.Parameter(p.detach().double()) for p in exact]
    ours = train(SubGM(params, 0.05, 0.9), params, range(2))
    theirs = train(SubGM(exact, 0.05, 0.9), exact, range(2))
    for one, other in zip(ours, theirs, strict=True):
        assert (one.double() - other).norm() < 0.01 * other.norm()


def test_resuming_from_disk_is_bit_exact():
    params = parameters()
    optimizer = SubGM(params, 0.1, 0.8)
    train(optimizer, params, range(3))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    resumed = SubGM(copies)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    onward = train(optimizer, params, range(3, 6))
    for p, q in zip(train(resumed, copies, range(3, 6)), onward, strict=True):
        assert torch.equal(p, q)


def test_schedulers_scale_on_top_of_decay():
    (p, *_) = parameters()
    optimizer = SubGM([p], 0.1, 0.5)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    shares = []
    for step in range(3):
        before = p.detach().clone()
        with_gradients([p], step)
        optimizer.step()
        schedule.step()
        shares.append(((p.detach() - before).norm() / before.norm()).item())
    assert shares == pytest.approx([0.2, 0.05, 0.0125])


def test_a_parameter_without_gradient_does_not_count_steps():
    p, late = parameters()[:2]
    optimizer = SubGM([("p", p), ("late", late)], 0.1, 0.5)
    with_gradients([p], 0)
    optimizer.step()
    before = late.detach().clone()
    late.grad = normal(6, seed=50)
    optimizer.step()
    assert ((late - before).norm() / before.norm()).item() == pytest.approx(0.2)


def test_closure_and_grad_scaler():
    p = nn.Parameter(torch.ones(3))
    optimizer = SubGM([p], 0.1)

    def closure():
        optimizer.zero_grad()
        loss = p.abs().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3
    torch.testing.assert_close(p.detach(), torch.full((3,), 0.8))

    scaler = torch.amp.GradScaler("cpu")
    before = p.detach().clone()
    p.grad = torch.full_like(p, math.inf)
    scaler.scale(torch.zeros(()))
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(p.detach(), before)


def test_sparse_gradient_is_refused_before_anything_moves():
    body, table = nn.Parameter(torch.ones(3)), nn.Embedding(5, 3, sparse=True)
    table(torch.tensor([1, 2])).sum().backward()
    body.grad = torch.ones(3)
    with pytest.raises(TypeError, match="sparse"):
        SubGM([body, table.weight]).step()
    assert torch.equal(body, torch.ones(3))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": 0.0}, "lr"),
        ({"lr": 1.0}, "lr"),
        ({"lr": math.nan}, "lr"),
        ({"decay": 0.0}, "decay"),
        ({"decay": 1.1}, "decay"),
        ({"decay": "none"}, "decay.*'none'"),
        ({"alpha": 0.0}, "alpha"),
        ({"alpha": 1.0}, "alpha"),
    ],
)
def test_options_out_of_range(options, words):
    with pytest.raises(ValueError, match=words):
        SubGM(parameters(), **options)
    optimizer = SubGM(parameters())
    with pytest.raises(ValueError, match=words):
        optimizer.add_param_group({"params": parameters(), **options})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("dtype", [torch.cfloat, torch.long])
def test_parameters_it_cannot_move(dtype):
    with pytest.raises(TypeError, match=str(dtype)):
        SubGM([torch.ones(2, dtype=dtype)])


def test_arm_moves_every_parameter_once():
    net, arm = tasks.get("digits-mlp").build(torch.Generator().manual_seed(0)), registry.arm("subgm")
    optimizers = arm.optimizer(net, arm.defaults)
    before = [p.detach().clone() for p in net.parameters()]
    net(torch.ones(1, 64)).square().sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    moved = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, moved)) == sorted(map(id, net.parameters()))
    assert all((p != q).any() for p, q in zip(net.parameters(), before, strict=True))
