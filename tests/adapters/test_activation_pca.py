import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

from weightlab.adapters import ActivationPCA
from weightlab.linalg import StreamingMoments

METHODS = pytest.mark.parametrize("method", ["covariance", "incremental", "sketch"])


class Attention(nn.Module):
    """Three layers fed by one tensor, and one by another."""

    def __init__(self, d=6, dropout=0.0):
        super().__init__()
        self.query, self.key, self.value = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, d)
        self.out = nn.Linear(d, 3)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        mixed = torch.softmax(self.query(x) @ self.key(x).mT, -1) @ self.value(x)
        return self.out(self.dropout(mixed))


class Conv1D(nn.Module):
    """As in transformers: the weight is (in, out)."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))

    def forward(self, x):
        return x @ self.weight


def batches(count=4, size=5, d=6, seed=0, length=7):
    generator = torch.Generator().manual_seed(seed)
    scales = torch.linspace(3, 0.3, d)
    return [torch.randn(size, length, d, generator=generator) * scales + 1 for _ in range(count)]


def seeded(make, seed=0):
    torch.manual_seed(seed)
    return make()


def reference(X, k, center=True):
    X = X.double().reshape(-1, X.shape[-1])
    X = X - X.mean(0) if center else X
    _, s, V = torch.linalg.svd(X, full_matrices=False)
    V = V * V.gather(-1, V.abs().argmax(-1, keepdim=True)).sign()
    return V[:k], s[:k], s[:k].square() / s.square().sum()


def run(model, data, *args, **options):
    with ActivationPCA(model, *args, progress=False, **options) as pca, torch.no_grad():
        for batch in data:
            model(batch)
    return pca


@METHODS
@pytest.mark.parametrize("center", [True, False])
def test_one_svd_of_all_inputs(method, center):
    model, data = seeded(Attention), batches()
    pca = run(model, data, 6, ["query"], method=method, center=center)
    for got, expected in zip(pca.components()["query"], reference(torch.cat(data), 6, center), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_one_batch_is_scikit_learns_pca():
    decomposition = pytest.importorskip("sklearn.decomposition")
    (batch,) = batches(1)
    found = run(seeded(Attention), [batch], 4, ["query"]).components()["query"]
    pca = decomposition.PCA(4, svd_solver="full").fit(batch.double().reshape(-1, 6).numpy())
    theirs = torch.from_numpy(pca.components_)
    torch.testing.assert_close(
        found.directions, theirs * (theirs * found.directions).sum(-1, keepdim=True).sign()
    )
    torch.testing.assert_close(found.singular_values, torch.from_numpy(pca.singular_values_))
    torch.testing.assert_close(found.ratios, torch.from_numpy(pca.explained_variance_ratio_))


def test_axes_of_a_diagonal_gaussian_are_found():
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([1.0, 4.0, 0.5, 2.0])
    x = torch.randn(20_000, 4, generator=generator) * scales
    found = run(nn.Sequential(nn.Linear(4, 2)), x.split(1000), 3).components()["0"]
    torch.testing.assert_close(
        found.directions, torch.eye(4, dtype=torch.float64)[[1, 3, 0]], rtol=0, atol=0.03
    )
    torch.testing.assert_close(
        found.ratios,
        torch.tensor([16.0, 4.0, 1.0]).double() / scales.double().square().sum(),
        rtol=0.05,
        atol=0,
    )


def test_equal_inputs_share_one_state_and_one_update(monkeypatch):
    model, data = seeded(Attention), batches()
    seen = []
    update = StreamingMoments.update
    monkeypatch.setattr(
        StreamingMoments, "update", lambda self, rows: (seen.append(rows.shape), update(self, rows))[1]
    )
    pca = run(model, data, 2)
    assert pca.groups == {"query": ("query", "key", "value"), "out": ("out",)}
    assert len(seen) == 2 * len(data)
    components = pca.components()
    assert components["key"].directions is components["query"].directions
    assert pca.counts == dict.fromkeys(["query", "key", "value", "out"], 4 * 35)
    apart = run(model, data, 2, share_inputs=False)
    assert len(apart.groups) == 4
    for name, expected in components.items():
        for got, value in zip(apart.components()[name], expected, strict=True):
            assert torch.equal(got, value)


def test_a_module_called_twice_counts_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.other = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            once = self.layer(x)
            return self.other(self.layer(once)) + self.layer(x)

    model, x = seeded(Twice), torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    pca = run(model, [x, x], 3)
    assert pca.groups == {"layer": ("layer",), "other": ("other",)}
    assert pca.counts == {"layer": 30, "other": 10}
    inputs = torch.cat([x, model.layer(x).detach(), x])
    torch.testing.assert_close(pca.components()["layer"].ratios, reference(inputs, 3)[2])


def test_changing_a_tensor_in_place_makes_it_another_input():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            x = x + 0
            first = self.a(x)
            return first + self.b(x.mul_(2))

    assert len(run(seeded(InPlace), [torch.randn(5, 3)], 1).groups) == 2


def test_layers_that_stop_sharing_are_told_of():
    class Parting(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.a(x) + self.b(x if len(x) == 4 else x + 1)

    model = seeded(Parting)
    together, apart = torch.ones(4, 3), torch.ones(5, 3)
    with pytest.raises(RuntimeError, match=r"\['a', 'b'\] were fed one tensor at first.*share_inputs=False"):
        run(model, [together, apart], 1)
    assert run(model, [together, apart], 1, share_inputs=False).counts == {"a": 9, "b": 9}


@METHODS
def test_masked_positions_have_no_influence(method):
    model, (batch,) = seeded(Attention), batches(1)
    mask = torch.rand(5, 7, generator=torch.Generator().manual_seed(1)) < 0.5
    pca = ActivationPCA(model, 3, ["query"], method=method, progress=False)
    with pca:
        pca.mask = mask
        model(torch.where(mask[..., None], batch, 1e4))
        pca.mask = torch.zeros(5, 7, dtype=torch.bool)
        model(batch * 1e4)
    expected = run(model, [batch[mask]], 3, ["query"], method=method).components()["query"]
    for got, value in zip(pca.components()["query"], expected, strict=True):
        torch.testing.assert_close(got, value)
    assert pca.counts["query"] == int(mask.sum())


def test_masks_fit_flattened_pooled_and_whole_examples():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.flat, self.pooled = nn.Linear(6, 2), nn.Linear(6, 2), nn.Linear(6, 2)

        def forward(self, x):
            return self.tokens(x), self.flat(x.reshape(-1, 6)), self.pooled(x.mean(1))

    model, (batch,) = seeded(Heads), batches(1)
    pca = ActivationPCA(model, 1, progress=False)
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[0], mask[1, 3:] = False, False
    with pca:
        pca.mask = mask
        model(batch)
        assert pca.counts == {"tokens": 24, "flat": 24, "pooled": 4}
        pca.mask = mask.any(1)
        with pytest.raises(
            ValueError, match=r"mask of shape \(5,\) does not fit the input \(35, 6\) of layer 'flat'"
        ):
            model(batch)
        assert pca.counts["tokens"] == 24 + 28
        with pytest.raises(TypeError, match=r"mask must hold booleans, got torch\.int64"):
            pca.mask = mask.long()


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3},
        {"kernel_size": (2, 3), "stride": 2, "padding": (1, 0), "dilation": (1, 2)},
        {"kernel_size": 3, "padding": "same", "padding_mode": "reflect"},
    ],
)
def test_patches_of_a_convolution_are_what_its_kernel_multiplies(options):
    conv = seeded(lambda: nn.Conv2d(2, 4, bias=False, **options))
    x = torch.randn(3, 2, 7, 8, generator=torch.Generator().manual_seed(0))
    pca = run(nn.Sequential(conv), [x], 5)
    found = pca.components()["0"]
    conv.weight.data = found.directions.float()[:4].reshape(conv.weight.shape)
    scores = conv(x).movedim(1, -1).reshape(-1, 4).detach()
    scores -= scores.mean(0)
    torch.testing.assert_close(scores.norm(dim=0).double(), found.singular_values[:4], rtol=1e-4, atol=1e-4)
    assert pca.counts["0"] == len(scores)


def test_transposed_linear_layers_of_transformers():
    layer = seeded(lambda: Conv1D(5, 6))
    data = batches(1)
    found = run(nn.Sequential(layer), data, 2).components()["0"]
    torch.testing.assert_close(found.ratios, reference(data[0], 2)[2])


def test_bfloat16_models_are_summed_up_in_float64():
    model = seeded(Attention).bfloat16()
    data = [batch.bfloat16() for batch in batches(20)]
    pca = run(model, data, 3, ["query"])
    found = pca.components()["query"]
    assert found.directions.dtype == torch.float64
    for got, expected in zip(found, reference(torch.cat(data), 3), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fails", [False, True])
def test_hooks_and_training_flags_come_back(fails):
    model = seeded(lambda: Attention(dropout=0.5)).train()
    model.key.eval()
    flags = {name: module.training for name, module in model.named_modules()}
    pca = ActivationPCA(model, 2, progress=False)
    wrong = torch.ones(2, 7, 5)
    try:
        with pca:
            assert not model.dropout.training
            model(batches(1)[0])
            model(wrong if fails else batches(1)[0])
    except ValueError:
        assert fails
    assert {name: module.training for name, module in model.named_modules()} == flags
    assert not any(module._forward_pre_hooks for module in model.modules())
    counts = pca.counts
    model(batches(1)[0])
    assert pca.counts == counts
    with pca:
        model(batches(1)[0])
    assert pca.counts["out"] == counts["out"] + 35


@METHODS
def test_two_ranks_merged_are_one(method):
    model, data = seeded(Attention), batches(6)
    k = 6
    whole, first, second = (run(model, part, k, method=method) for part in (data, data[:2], data[2:]))
    first.merge(second)
    assert first.counts == whole.counts
    for name, expected in whole.components().items():
        for got, value in zip(first.components()[name], expected, strict=True):
            torch.testing.assert_close(got, value, rtol=1e-4, atol=1e-5)
    assert second.counts["out"] == 4 * 35


def test_order_of_batches_does_not_matter():
    model, data = seeded(Attention), batches(6)
    forth, back = run(model, data, 3).components(), run(model, data[::-1], 3).components()
    for name, expected in forth.items():
        for got, value in zip(back[name], expected, strict=True):
            torch.testing.assert_close(got, value, rtol=1e-9, atol=1e-9)


@METHODS
def test_state_resumes_to_the_bit(method, tmp_path):
    model, data = seeded(Attention), batches()
    whole = run(model, data, 3, method=method)
    part = run(model, data[:2], 3, method=method)
    torch.save(part.state_dict(), tmp_path / "state.pt")
    resumed = ActivationPCA(model, 3, method=method, progress=False)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert resumed.groups == part.groups
    with resumed, torch.no_grad():
        for batch in data[2:]:
            model(batch)
    for name, expected in whole.components().items():
        for got, value in zip(resumed.components()[name], expected, strict=True):
            assert torch.equal(got, value)
    other = ActivationPCA(model, 3, ["out"], progress=False)
    with pytest.raises(ValueError, match="state has layers"):
        other.load_state_dict(part.state_dict())


class TestFit:
    def test_stops_when_subspaces_have_settled(self):
        data = batches(64, size=20)
        model = seeded(Attention)
        pca = ActivationPCA(model, 2, ["query"], progress=False)
        done, converged = pca.fit(data, tau=0.99)
        assert converged
        assert done in (4, 8, 16, 32)
        assert pca.fit(data, tau=1.0) == (64, False)

    def test_flat_spectra_do_not_settle_by_small_steps(self):
        generator = torch.Generator().manual_seed(0)
        data = torch.randn(64, 16, 64, generator=generator).unbind()
        model = nn.Sequential(nn.Linear(64, 1))
        settled = ActivationPCA(model, 4, progress=False)
        assert settled.fit(data, tau=0.99) == (64, False)
        # One more batch turns the basis by less than the threshold all the same.
        steps = [run(model, data[:count], 4).components()["0"].directions for count in (63, 64)]
        cosine = ((steps[0] @ steps[1].T).square().sum() / 4).sqrt()
        assert cosine > 0.98

    def test_only_needed_components_have_to_settle(self):
        generator = torch.Generator().manual_seed(0)
        data = (torch.randn(32, 16, 64, generator=generator) * torch.tensor([30.0] + [1.0] * 63)).unbind()
        pca = ActivationPCA(nn.Sequential(nn.Linear(64, 1)), 4, progress=False)
        assert pca.fit(data, tau=0.98, needed=lambda components: {"0": 1}).converged
        pca = ActivationPCA(nn.Sequential(nn.Linear(64, 1)), 4, progress=False)
        assert not pca.fit(data, tau=0.98).converged

    def test_batches_may_be_mappings_tuples_or_endless(self):
        model, data = seeded(Attention), batches(2)

        def endless():
            while True:
                yield {"x": data[0]}

        pca = ActivationPCA(model, 2, progress=False)
        assert pca.fit(endless(), max_batches=3, tau=1.0) == (3, False)
        assert pca.fit([(batch, torch.zeros(5)) for batch in data], tau=1.0).batches == 2
        assert pca.fit([[batch] for batch in data], tau=1.0).batches == 2
        assert pca.fit([data], forward_fn=lambda model, batch: model(batch[1]), tau=1.0).batches == 1
        assert pca.counts["out"] == 35 * 8
        assert all(p.grad is None for p in model.parameters())

    def test_bad_input_is_named(self):
        pca = ActivationPCA(seeded(Attention), 2, progress=False)
        with pytest.raises(ValueError, match="batches is empty"):
            pca.fit([])
        for tau in (-0.1, 1.1, float("nan")):
            with pytest.raises(ValueError, match=r"tau must be in \[0, 1\], a cosine"):
                pca.fit(batches(), tau=tau)
        with pytest.raises(ValueError, match="max_batches must be at least 1, got 0"):
            pca.fit(batches(), max_batches=0)


@METHODS
def test_no_variance_is_no_nan(method):
    model = nn.Sequential(nn.Linear(4, 2))
    found = run(model, [torch.full((9, 4), 2.0)], 2, method=method).components()["0"]
    assert torch.equal(found.ratios, torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(found.directions @ found.directions.T, torch.eye(2, dtype=torch.float64))


def test_bad_input_is_named():
    model = seeded(Attention)
    with pytest.raises(ValueError, match="method must be one of covariance, incremental, sketch, got 'svd'"):
        ActivationPCA(model, 2, method="svd")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"layers names \['nope'\], which the model does not have"):
        ActivationPCA(model, 2, ["nope"])
    with pytest.raises(ValueError, match="there is no layer to look at"):
        ActivationPCA(nn.ReLU(), 2)
    with pytest.raises(ValueError, match="n_components must be at least 1, got 0 for 'key'"):
        ActivationPCA(model, {"query": 1, "key": 0}, ["query", "key"])
    with pytest.raises(
        TypeError, match="layer 'dropout' is a Dropout; it must be a Linear, Conv1D or Conv2d"
    ):
        ActivationPCA(model, 2, ["dropout"])
    with pytest.raises(ValueError, match="layer '0' is a Conv2d of 2 groups"):
        ActivationPCA(nn.Sequential(nn.Conv2d(2, 2, 1, groups=2)), 2)
    pca = ActivationPCA(model, 6, ["query", "out"], progress=False)
    with pytest.raises(ValueError, match=r"no input reached \['query', 'out'\]"):
        pca.components()
    with pca:
        model(torch.randn(1, 3, 6))
        with pytest.raises(RuntimeError, match="already entered"), pca:
            pass
    with pytest.raises(ValueError, match="layer 'query' saw 3 rows, fewer than its 6 components"):
        pca.components()
    broken = copy.deepcopy(model)
    broken.value.bias.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="layer 'out': rows hold values that are not finite"):
        run(broken, batches(1), 2).components()
    with (
        pytest.raises(
            TypeError, match=r"layer 'query' must be fed a real floating-point tensor, got torch\.int64"
        ),
        ActivationPCA(model, 2, ["query"]),
    ):
        model.query(torch.ones(2, 6, dtype=torch.int64))
    with pytest.raises(ValueError, match="method and groups must be the same"):
        run(model, batches(1), 2).merge(run(model, batches(1), 2, ["out"]))


def reduce_on(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model, data = seeded(Attention), batches(6)
    for method in ("covariance", "incremental", "sketch"):
        pca = run(model, data[:2] if rank else data[2:], 6, method=method).all_reduce()
        torch.save((pca.state_dict(), pca.counts), f"{folder}/{method}-{rank}.pt")
    pca = run(model, data, 2, ["out"] if rank else ["query"])
    with pytest.raises(ValueError, match="processes have seen different groups of layers"):
        pca.all_reduce()
    dist.destroy_process_group()


def test_processes_end_with_what_one_would_have_seen(tmp_path):
    torch.multiprocessing.spawn(reduce_on, (str(tmp_path),), nprocs=2)
    model, data = seeded(Attention), batches(6)
    for method in ("covariance", "incremental", "sketch"):
        whole = run(model, data, 6, method=method)
        (first, counts), (second, _) = (
            torch.load(tmp_path / f"{method}-{rank}.pt", weights_only=True) for rank in range(2)
        )
        assert counts == whole.counts
        reduced = ActivationPCA(model, 6, method=method, progress=False)
        reduced.load_state_dict(first)
        for name, state in first["streams"].items():
            assert all(torch.equal(value, second["streams"][name][key]) for key, value in state.items())
        for name, expected in whole.components().items():
            for got, value in zip(reduced.components()[name], expected, strict=True):
                torch.testing.assert_close(got, value, rtol=1e-4, atol=1e-5)
