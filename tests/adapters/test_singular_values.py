import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from weightlab.adapters import SingularValues, singular_values
from weightlab.adapters.singular_values import CACHE, energy_rank, leading_triples


def gaussian(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def layer_of(weight):
    layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer.requires_grad_(False)


def parametrized(module, *args, **options):
    parametrize.register_parametrization(module, "weight", SingularValues(*args, **options))
    return module.parametrizations.weight[0]


@pytest.fixture(autouse=True)
def _empty_cache():
    CACHE.clear()


@pytest.mark.parametrize(
    ("energy", "kind", "r"),
    [
        (0.99, "squared", 1),  # 100 / 101.01 = 0.990001
        (0.995, "squared", 2),
        (0.9, "nuclear", 1),  # 10 / 11.1 = 0.9009
        (0.99, "nuclear", 2),
        (1.0, "squared", 3),
        (1e-9, "nuclear", 1),
    ],
)
def test_energy_picks_the_smallest_rank(energy, kind, r):
    assert energy_rank(torch.tensor([10.0, 1.0, 0.1]), energy, kind) == r


def test_energy_of_zeros_and_of_a_flat_spectrum():
    assert energy_rank(torch.zeros(4)) == 1
    assert energy_rank(torch.ones(100), 0.5) == 50
    assert energy_rank(torch.ones(100), 1.0) == 100


MODULES = {
    "linear": lambda: nn.Linear(7, 5),
    "wide": lambda: nn.Linear(9, 3),
    "one row": lambda: nn.Linear(6, 1),
    "convolution": lambda: nn.Conv2d(3, 6, 3),
    "embedding": lambda: nn.Embedding(11, 4),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("relative", [False, True])
def test_start_is_the_weight_bit_for_bit(name, dtype, relative):
    module = MODULES[name]().to(dtype).requires_grad_(False)
    weight = module.weight.clone()
    parametrization = parametrized(module, "all", relative=relative)
    assert torch.equal(module.weight, weight)
    assert module.weight.dtype == dtype
    trained = [p for p in module.parameters() if p.requires_grad]
    assert len(trained) == 1
    assert trained[0] is parametrization.delta
    assert trained[0].shape == (min(weight.flatten(1).shape),)


@pytest.mark.parametrize("name", MODULES)
def test_values_of_the_weight_become_sigma_plus_delta(name):
    module = MODULES[name]().double().requires_grad_(False)
    weight = module.weight.flatten(1).clone()
    parametrization = parametrized(module, "all")
    delta = gaussian(*parametrization.delta.shape, seed=3)
    with torch.no_grad():
        parametrization.delta.copy_(delta)
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(module.weight.flatten(1), (U * (S + delta)) @ Vh)
    expected = module.weight.clone()
    parametrize.remove_parametrizations(module, "weight")
    assert torch.equal(module.weight, expected)


def test_relative_values_are_factors():
    weight = gaussian(5, 4)
    layer = layer_of(weight)
    parametrization = parametrized(layer, 2, relative=True)
    with torch.no_grad():
        parametrization.delta.copy_(torch.tensor([1.0, -1.0]))
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    S[0] *= 2
    S[1] = 0
    torch.testing.assert_close(layer.weight, (U * S) @ Vh)


def test_one_for_every_value_gives_the_polar_factor():
    weight = gaussian(5, 4)
    layer = layer_of(weight)
    parametrization = parametrized(layer, "all")
    with torch.no_grad():
        parametrization.delta.copy_(1 - parametrization.sigma)
    U, _, Vh = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(layer.weight, U @ Vh)


def test_scaling_all_values_scales_the_part_they_hold():
    weight = gaussian(6, 8)
    x = gaussian(3, 8, seed=1)
    whole, part = layer_of(weight), layer_of(weight)
    with torch.no_grad():
        of_whole, of_part = parametrized(whole, "all"), parametrized(part, 2)
        of_whole.delta.copy_(1.5 * of_whole.sigma)
        of_part.delta.copy_(1.5 * of_part.sigma)
    torch.testing.assert_close(whole(x) - whole.bias, 2.5 * x @ weight.mT)
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(part.weight - weight, 1.5 * (U[:, :2] * S[:2]) @ Vh[:2])


def test_gradient_is_that_between_the_vectors():
    weight, x, g = gaussian(6, 8), gaussian(10, 8, seed=1), gaussian(10, 6, seed=2)
    layer = layer_of(weight)
    parametrization = parametrized(layer, 3)
    (layer(x) * g).sum().backward()
    U, _, Vh = torch.linalg.svd(weight, full_matrices=False)
    expected = ((g @ U[:, :3]) * (x @ Vh[:3].mT)).sum(0)
    torch.testing.assert_close(parametrization.delta.grad, expected)

    def output(delta):
        parametrization_weight = torch.func.functional_call(
            parametrization, {"delta": delta}, (layer.parametrizations.weight.original,)
        )
        return x @ parametrization_weight.mT

    assert torch.autograd.gradcheck(output, (0.1 * gaussian(3, seed=4).requires_grad_(),))


def test_changes_train_as_the_paper_s_values_do():
    """δ over W and s over W_e = W − U diag(σ) Vᵀ, along the same run of gradient descent."""
    weight, x, y = gaussian(6, 8), gaussian(20, 8, seed=1), gaussian(20, 6, seed=2)
    layer = layer_of(weight)
    layer.bias.zero_()
    parametrization = parametrized(layer, 4)
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    U, Vh = U[:, :4], Vh[:4]
    rest = weight - (U * S[:4]) @ Vh
    torch.testing.assert_close(rest.square().sum(), S[4:].square().sum())
    s = S[:4].clone().requires_grad_()
    optimizers = [torch.optim.SGD([p], lr=1e-2, momentum=0.9) for p in (parametrization.delta, s)]
    for _ in range(50):
        losses = [
            (layer(x) - y).square().mean(),
            (x @ rest.mT + ((x @ Vh.mT) * s) @ U.mT - y).square().mean(),
        ]
        for optimizer, loss in zip(optimizers, losses, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert losses[0] < 0.95 * (x @ weight.mT - y).square().mean()
    torch.testing.assert_close(S[:4] + parametrization.delta, s, rtol=1e-10, atol=0)


def test_equal_values_and_rank_below_r_are_valid():
    for weight in (torch.eye(6, dtype=torch.float64), gaussian(6, 2) @ gaussian(2, 7, seed=1)):
        layer = layer_of(weight)
        parametrization = parametrized(layer, "all")
        with torch.no_grad():
            parametrization.delta.add_(1)
        W, U = layer.weight, parametrization.left
        assert W.isfinite().all()
        torch.testing.assert_close(U.mT @ W @ parametrization.right.mT, (parametrization.sigma + 1).diag())


def test_assignment_changes_the_original_alone():
    layer = layer_of(gaussian(4, 4))
    parametrization = parametrized(layer, 2)
    with torch.no_grad():
        parametrization.delta.fill_(0.5)
    assigned, vectors = gaussian(4, 4, seed=7), parametrization.left.clone()
    layer.weight = assigned
    torch.testing.assert_close(layer.weight, assigned)
    assert torch.equal(parametrization.left, vectors)
    assert (parametrization.delta == 0.5).all()


def test_state_dict_restores_the_layer():
    layer, other = layer_of(gaussian(5, 4)), layer_of(gaussian(5, 4, seed=1))
    of_layer, _ = parametrized(layer, 3), parametrized(other, 3)
    with torch.no_grad():
        of_layer.delta.add_(0.3)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.weight, layer.weight)


def test_equal_weights_are_decomposed_once_and_results_are_not_shared(monkeypatch):
    calls = []
    plain = singular_values.top_svd
    monkeypatch.setattr(singular_values, "top_svd", lambda *a, **k: calls.append(a) or plain(*a, **k))
    weight = gaussian(6, 8)
    first = leading_triples(weight, 3)
    first.left.zero_()
    second = leading_triples(weight.clone().mT.contiguous().mT, 3)
    assert len(calls) == 1
    torch.testing.assert_close(second.left.mT @ second.left, torch.eye(3, dtype=torch.float64))
    for others in ((weight, 2), (2 * weight, 3), (weight.float(), 3), (weight, 3, "full"), (weight, None)):
        leading_triples(*others[:2], svd=others[2] if len(others) > 2 else "auto")
    assert len(calls) == 6
    assert leading_triples(weight, "all").values.shape == leading_triples(weight, 6).values.shape
    assert len(calls) == 7


def test_cache_drops_the_oldest(monkeypatch):
    monkeypatch.setattr(CACHE, "max_bytes", 1500)  # of about 700 each
    for seed in range(3):
        leading_triples(gaussian(6, 8, seed=seed), "all")
        assert CACHE.size() <= 1500
    assert CACHE.size() > 700
    leading_triples(gaussian(60, 80), 60)
    assert CACHE.size() == 0


def test_indistinct_values_are_found():
    spectra = {
        (3.0, 2.0, 1.0): (None, None),
        (3.0, 3.0, 1.0): (1, 1),
        (3.0, 2.0, 2.0): (2, 2),
        (3.0, 2.0, 0.0): (None, None),
        (3.0, 0.0, 0.0): (2, 2),
    }
    for values, (of_two, of_all) in spectra.items():
        matrix = torch.diag(torch.tensor(values))
        assert leading_triples(matrix, 2).indistinct() == of_two
        assert leading_triples(matrix, "all").indistinct() == of_all


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r=0 must be an integer of at least 1"),
        ({"r": True}, "r=True must be"),
        ({"r": 2.0}, "r=2.0 must be"),
        ({"r": "most"}, "r='most' must be an integer of at least 1, \"all\", or None"),
        ({"energy": 0.0}, r"energy=0\.0 must be in \(0, 1\]"),
        ({"energy": 1.1}, r"energy=1\.1 must be in \(0, 1\]"),
        ({"energy": float("nan")}, "energy=nan must be in"),
        ({"energy_kind": "cubic"}, "energy_kind='cubic' must be one of squared, nuclear"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SingularValues(**options)


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (torch.ones(2, 3), ValueError, r"r must be in 1\.\.2 for shape \(2, 3\), got 3"),
        (torch.full((4, 4), torch.nan), ValueError, "W holds NaN or infinity"),
        (torch.ones(4), ValueError, r"at least two dimensions, got \(4,\)"),
        (torch.ones(4, 4, device="meta"), ValueError, "on the meta device has no singular values"),
        (torch.ones(4, 4, dtype=torch.int32), TypeError, "floating-point tensor, got torch.int32"),
    ],
)
def test_bad_weights_are_refused_and_nothing_is_registered(weight, error, message):
    module = nn.Module()
    module.weight = nn.Parameter(weight, requires_grad=False)
    with pytest.raises(error, match=message):
        parametrize.register_parametrization(module, "weight", SingularValues(3))
    assert not parametrize.is_parametrized(module)
    assert module.weight.shape == weight.shape
