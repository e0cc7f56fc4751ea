import copy
import io
import math

import pytest
import torch
from torch import nn
from torch.optim import SGD

from weightlab import tasks
from weightlab.optim import SGLD
from weightlab.trial import registry


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=seeded(seed)).to(dtype)


def parameters(seed=0, dtype=torch.float32):
    shapes = [(), (7,), (5, 8), (4, 3, 2, 2), (300, 300)]
    return [nn.Parameter(normal(*shape, seed=seed + i, dtype=dtype)) for i, shape in enumerate(shapes)]


def with_gradients(params, step):
    for i, p in enumerate(params):
        p.grad = normal(*p.shape, seed=100 * step + i, dtype=p.dtype)
    return params


def run(optimizer, params, steps):
    for step in steps:
        with_gradients(params, step)
        optimizer.step()
    return [p.detach().clone() for p in params]


def through_disk(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def gaussian_chain(precision, lr, n_data, *, chains, steps, seed=0, temperature=1.0, weight_decay=0.0):
    """Sample `chains` chains with the full gradient of a mean loss whose sum over data has this precision."""
    dim = len(precision)
    mean_precision = precision / n_data
    theta = nn.Parameter(torch.zeros(chains, dim, dtype=torch.float64))
    optimizer = SGLD([theta], lr, n_data, temperature, weight_decay, generator=seeded(seed))
    for _ in range(steps):
        theta.grad = theta.detach() @ mean_precision
        optimizer.step()
    return theta.detach()


# ---- what it samples


@pytest.mark.parametrize("step", [0.4, 1.0, 2.0])
def test_stationary_covariance_on_a_gaussian(step):
    """`H⁻¹ (I − εH/4)⁻¹` with ε = 2·lr/n: for large steps far from the posterior's H⁻¹."""
    basis = torch.linalg.qr(normal(3, 3, seed=1, dtype=torch.float64)).Q
    H = basis @ torch.diag(torch.tensor([1.0, 0.6, 0.3], dtype=torch.float64)) @ basis.T * 100
    epsilon, n = step / 100, 50.0
    theta = gaussian_chain(H, epsilon * n / 2, n, chains=20_000, steps=int(30 / step) + 30)
    expected = torch.linalg.inv(H @ (torch.eye(3) - epsilon * H / 4))
    covariance = theta.T @ theta / len(theta)
    assert (covariance - expected).norm() < 0.05 * expected.norm()
    deviation = expected.diagonal().sqrt() / math.sqrt(len(theta))
    assert (theta.mean(0).abs() < 4 * deviation).all()
    if step == 2.0:
        assert (torch.linalg.inv(H) - expected).norm() > 0.2 * expected.norm()


def test_temperature_and_size_of_the_data_set_scale_the_variance():
    H = torch.tensor([[4.0]], dtype=torch.float64)

    def variance(n_data, temperature):
        # The mean loss stays the same, so more data mean a sharper posterior.
        return gaussian_chain(
            H * n_data, 0.02, n_data, chains=20_000, steps=60, temperature=temperature
        ).var()

    # lr·4/2 = εH/4 with H the precision of the mean loss.
    base = 1 / 4 / (1 - 0.02 * 4 / 2)
    # 60 steps forget the start to (1 − 0.08)^120.
    for n_data, temperature in [(1, 1.0), (100, 1.0), (100, 0.25)]:
        expected = base * temperature / n_data
        assert variance(n_data, temperature).item() == pytest.approx(expected, rel=0.05)


def test_weight_decay_is_a_prior_of_precision_n_times_as_large():
    n, decay = 20.0, 3.0
    H = torch.tensor([[n * 1.0]], dtype=torch.float64)
    theta = gaussian_chain(H, 0.01, n, chains=20_000, steps=150, weight_decay=decay)
    precision = n * (1.0 + decay)
    assert theta.var().item() == pytest.approx(1 / precision / (1 - 0.01 * 4 / 2), rel=0.05)


def test_mini_batches_are_the_mean_loss_too():
    """Data x_i ~ N(θ, 1): the posterior is N(mean x, 1/n), found from batches of a tenth."""
    n, chains = 200, 3000
    data = normal(n, seed=3, dtype=torch.float64) + 1.0
    theta = nn.Parameter(torch.full((chains,), data.mean().item(), dtype=torch.float64))
    lr = 0.01
    optimizer = SGLD([theta], lr, n, generator=seeded(1))
    picks = seeded(2)
    for _ in range(300):
        batch = data[torch.randint(n, (20, chains), generator=picks)]
        theta.grad = theta.detach() - batch.mean(0)
        optimizer.step()
    assert theta.mean().item() == pytest.approx(data.mean().item(), abs=4 / math.sqrt(n * chains))
    # Batches add lr²·var/20 a step to the 2·lr/n of the noise.
    drawn = 2 * lr / n + lr**2 * data.var(correction=0).item() / 20
    expected = drawn / (1 - (1 - lr) ** 2)
    assert theta.var().item() == pytest.approx(expected, rel=0.1)


def test_preconditioner_scales_drift_and_noise():
    p, q = (nn.Parameter(torch.zeros(50_000, dtype=torch.float64)) for _ in range(2))
    grads = [3.0, 1.0, 2.0]
    options = {"preconditioner": "rmsprop", "beta": 0.9, "eps": 0.1}
    lr, n = 0.01, 10.0
    optimizers = SGLD([p], lr, n, generator=seeded(), **options), SGLD([q], lr, n, 0.0, **options)
    average, mean, variance = 0.0, 0.0, 0.0
    for grad in grads:
        for parameter, optimizer in zip((p, q), optimizers, strict=True):
            parameter.grad = torch.full_like(parameter, grad)
            optimizer.step()
        average = 0.9 * average + 0.1 * grad**2
        scale = 1 / (math.sqrt(average) + 0.1)
        mean -= lr * scale * grad
        variance += 2 * lr / n * scale
    torch.testing.assert_close(q.detach(), torch.full_like(q, mean), rtol=1e-12, atol=0)
    assert (p.detach() - mean).var().item() == pytest.approx(variance, rel=0.03)
    assert (p.detach() - mean).mean().abs().item() < 4 * math.sqrt(variance / 50_000)


# ---- at temperature 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("foreach", [None, False, True])
def test_at_temperature_0_it_is_sgd_bit_for_bit(dtype, weight_decay, foreach):
    ours, theirs = parameters(dtype=dtype), parameters(dtype=dtype)
    sgld = SGLD(ours, 0.03, 10, temperature=0.0, weight_decay=weight_decay, foreach=foreach)
    sgd = SGD(theirs, lr=0.03, weight_decay=weight_decay)
    for mine, other in zip(run(sgld, ours, range(5)), run(sgd, theirs, range(5)), strict=True):
        assert torch.equal(mine, other)


def test_strided_parameters_move_as_contiguous_ones():
    base = normal(400, 300, seed=5)
    ours, theirs = nn.Parameter(base.T), nn.Parameter(base.T.contiguous())
    for p, optimizer in (
        (ours, SGLD([ours], 0.1, 10, 0.0)),
        (theirs, SGLD([theirs], 0.1, 10, 0.0)),
    ):
        p.grad = normal(300, 400, seed=6)
        optimizer.step()
    assert torch.equal(ours, theirs)


# ---- randomness


def test_every_entry_gets_noise_of_the_right_size_of_its_own():
    # More entries than fit one piece, so that pieces are seen to differ.
    p = nn.Parameter(torch.zeros(2**18))
    p.grad = torch.zeros_like(p)
    SGLD([p], lr=0.5, n_data=4.0, generator=seeded()).step()
    assert p.std().item() == pytest.approx(math.sqrt(2 * 0.5 / 4), rel=0.01)
    assert p.unique().numel() > 0.9 * p.numel()
    pieces = p.detach().view(4, -1)
    correlation = torch.corrcoef(pieces) - torch.eye(4)
    assert correlation.abs().max() < 0.03


@pytest.mark.parametrize("preconditioner", [None, "rmsprop"])
def test_parameters_without_gradient_get_no_noise(preconditioner):
    p, frozen = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    p.grad = torch.zeros(3)
    SGLD([p, frozen], 0.1, 10, preconditioner=preconditioner).step()
    assert torch.equal(frozen, torch.ones(3))
    assert (p != 1).all()


def test_same_generator_same_chain_whatever_the_global_state():
    chains = []
    for seed in (1, 1, 2):
        params = parameters()
        optimizer = SGLD(params, 0.1, 10, generator=seeded(seed))
        torch.rand(seed + 3)
        chains.append(run(optimizer, params, range(3)))
    for first, same, other in zip(*chains, strict=True):
        assert torch.equal(first, same)
        assert not torch.equal(first, other)


def test_without_a_generator_the_global_seed_decides_and_steps_leave_it_alone():
    chains = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        params = parameters()
        optimizers = SGLD(params, 0.1, 10), SGLD(parameters(), 0.1, 10)
        state = torch.get_rng_state()
        chains.append(run(optimizers[0], params, range(2)))
        assert torch.equal(torch.get_rng_state(), state)
        states = [o.state_dict()["generators"]["cpu"] for o in optimizers]
        assert not torch.equal(*states)
    assert all(map(torch.equal, chains[0], chains[1]))
    assert not torch.equal(chains[0][2], chains[2][2])


@pytest.mark.parametrize("preconditioner", [None, "rmsprop"])
@pytest.mark.parametrize("foreach", [None, True])
def test_resuming_from_disk_is_bit_exact(preconditioner, foreach):
    def make(params, seed):
        return SGLD(params, 0.1, 10, preconditioner=preconditioner, foreach=foreach, generator=seeded(seed))

    params = parameters()
    optimizer = make(params, 0)
    run(optimizer, params, range(3))
    saved = through_disk(optimizer.state_dict())
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    onward = run(optimizer, params, range(3, 6))
    resumed = make(copies, 99)
    resumed.load_state_dict(saved)
    for ours, theirs in zip(run(resumed, copies, range(3, 6)), onward, strict=True):
        assert torch.equal(ours, theirs)
    assert saved["generators"]["cpu"].dtype == torch.uint8


def test_a_deep_copy_continues_the_same_chain_by_itself():
    p = nn.Parameter(torch.zeros(5))
    p.grad = torch.zeros(5)
    optimizer = SGLD([p], 0.1, 10, generator=seeded())
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    (q,) = twin.param_groups[0]["params"]
    q.grad = torch.zeros(5)
    optimizer.step()
    twin.step()
    assert torch.equal(p, q)


def test_state_of_another_optimizer_is_refused_and_changes_nothing():
    p = nn.Parameter(torch.ones(3))
    optimizer = SGLD([p], 0.1, 10)
    before = optimizer.state_dict()["generators"]["cpu"]
    with pytest.raises(ValueError, match="generators for cpu, got none"):
        optimizer.load_state_dict(SGD([p], lr=5.0).state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert torch.equal(optimizer.state_dict()["generators"]["cpu"], before)


# ---- as an optimizer


def test_noise_follows_a_schedule():
    p = nn.Parameter(torch.zeros(100_000))
    optimizer = SGLD([p], 0.4, 10, generator=seeded())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.25**t)
    for expected in (0.4, 0.1):
        before = p.detach().clone()
        p.grad = torch.zeros_like(p)
        optimizer.step()
        assert (p - before).std().item() == pytest.approx(math.sqrt(2 * expected / 10), rel=0.02)
        schedule.step()
    optimizer.param_groups[0]["lr"] = 0.0
    before = p.detach().clone()
    optimizer.step()
    assert torch.equal(p.detach(), before)


def test_groups_names_closure_and_tensor_rates():
    net = nn.Linear(3, 2)
    optimizer = SGLD(
        [
            {"params": [("weight", net.weight)], "lr": torch.tensor(0.1)},
            {"params": [("bias", net.bias)], "temperature": 0.0},
        ],
        0.2,
        10,
    )
    before = net.bias.detach().clone()

    def closure():
        optimizer.zero_grad()
        loss = net(torch.ones(4, 3)).mean(0).sum()
        loss.backward()
        return loss

    assert torch.is_tensor(optimizer.step(closure))
    torch.testing.assert_close(net.bias.detach(), before - 0.2)
    assert optimizer.param_groups[0]["param_names"] == ["weight"]


def test_gradients_are_left_as_they_are():
    params = with_gradients(parameters(), 0)
    before = [p.grad.clone() for p in params]
    for preconditioner in (None, "rmsprop"):
        SGLD(params, 0.1, 10, weight_decay=0.1, preconditioner=preconditioner).step()
    for p, grad in zip(params, before, strict=True):
        assert torch.equal(p.grad, grad)


def test_sparse_gradient_is_refused_before_anything_moves():
    body, table = nn.Parameter(torch.ones(3)), nn.Embedding(5, 3, sparse=True)
    table(torch.tensor([1, 2])).sum().backward()
    body.grad = torch.ones(3)
    optimizer = SGLD([body, table.weight], 0.1, 10)
    with pytest.raises(TypeError, match="sparse"):
        optimizer.step()
    assert torch.equal(body, torch.ones(3))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": 0.0}, "lr"),
        ({"lr": -1.0}, "lr"),
        ({"lr": math.nan}, "lr"),
        ({"n_data": 0}, "n_data"),
        ({"n_data": -5}, "n_data"),
        ({"n_data": math.inf}, "n_data"),
        ({"temperature": -0.1}, "temperature"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"preconditioner": "adam"}, "preconditioner.*'adam'"),
        ({"beta": 1.0}, "beta"),
        ({"eps": 0.0}, "eps"),
    ],
)
def test_options_out_of_range(options, words):
    with pytest.raises(ValueError, match=words):
        SGLD([nn.Parameter(torch.ones(2))], **{"lr": 0.1, "n_data": 10, **options})
    optimizer = SGLD([nn.Parameter(torch.ones(2))], 0.1, 10)
    with pytest.raises(ValueError, match=words):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], **options})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("params", "kind", "words"),
    [
        ([torch.ones(2, dtype=torch.cfloat)], TypeError, "complex64"),
        ([torch.ones(2, dtype=torch.long)], TypeError, "int64"),
        ([], ValueError, "empty"),
        ([nn.Parameter(torch.ones(2, device="meta"))], ValueError, "generator is on cpu.*meta"),
    ],
)
def test_bad_parameters(params, kind, words):
    with pytest.raises(kind, match=words):
        SGLD(params, 0.1, 10, generator=seeded())


def test_arms_take_the_digits_for_the_data():
    task = tasks.get("digits-mlp")
    n_data = sum(len(batch[0]) for batch in task.batches("train", seeded()))
    for name in ("sgld", "sgld-tempered", "sgld-cold", "psgld"):
        arm = registry.arm(name)
        assert len(arm.search_space) == 2
        optimizer = arm.optimizer(task.build(seeded()), {"temperature": 0.5, **arm.defaults})
        (group,) = optimizer.param_groups
        assert group["n_data"] == pytest.approx(n_data, rel=0.03)
        assert group["temperature"] == {"sgld-cold": 0.0, "sgld-tempered": 0.5}.get(name, 1.0)
