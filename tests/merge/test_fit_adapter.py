import math

import pytest
import torch
from scipy.linalg import orthogonal_procrustes
from scipy.optimize import minimize
from torch import nn
from torch.nn import functional as F

from weightlab.linalg import orthogonality_deviation
from weightlab.merge import CompatibilityAdapter, LossWeights, fit_adapter, retrieval_report
from weightlab.merge.embedding_maps import pair_moments, squared_error, within_tolerance
from weightlab.merge.trained_maps import Maps, contrastive_loss, train


def gaussian(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def pairs(d_new, d_old, n=300, noise=0.1):
    """New embeddings with a decaying spectrum, and old ones that no rotation of them fits."""
    z = gaussian(n, d_new) * torch.logspace(0, -1, d_new, dtype=torch.float64)
    return z, z @ gaussian(d_new, d_old, seed=1) / d_new**0.5 + noise * gaussian(n, d_old, seed=2)


SHAPES = [(6, 6), (8, 5), (5, 8)]


class TestClosedForms:
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("bias", [False, True])
    def test_affine_is_least_squares(self, shape, bias):
        z, h = pairs(*shape)
        h = h + 0.3
        adapter = fit_adapter(z, h, kind="affine", bias=bias, normalize=False)
        design = torch.cat([z, torch.ones(len(z), 1, dtype=z.dtype)], 1) if bias else z
        expected = torch.linalg.lstsq(design, h).solution
        found = adapter.to_old(z)
        torch.testing.assert_close(found, design @ expected, rtol=1e-8, atol=1e-8)

    @pytest.mark.parametrize("tol", [math.inf, 1e3])
    @pytest.mark.parametrize("shape", SHAPES)
    def test_a_tolerance_that_does_not_bind_is_least_squares(self, shape, tol):
        z, h = pairs(*shape)
        affine = fit_adapter(z, h, kind="affine")
        loose = fit_adapter(z, h, kind="lambda", tol=tol)
        assert torch.equal(loose.backward_map.weight, affine.backward_map.weight)
        assert torch.equal(loose.forward_map.weight, affine.forward_map.weight)

    @pytest.mark.parametrize("kind", ["orthogonal", "lambda"])
    def test_no_tolerance_is_procrustes(self, kind):
        z, h = pairs(6, 6)
        adapter = fit_adapter(z, h, kind=kind, tol=0.0, normalize=False)
        R, _ = orthogonal_procrustes(z.numpy(), h.numpy())
        torch.testing.assert_close(
            adapter.backward_map.weight.detach(), torch.from_numpy(R.T), rtol=0, atol=1e-10
        )

    @pytest.mark.parametrize("shape", [(8, 5), (5, 8)])
    def test_procrustes_of_other_dimensions_is_that_of_padded_embeddings(self, shape):
        z, h = pairs(*shape)
        size = max(shape)
        R, _ = orthogonal_procrustes(
            F.pad(z, (0, size - shape[0])).numpy(), F.pad(h, (0, size - shape[1])).numpy()
        )
        adapter = fit_adapter(z, h, kind="orthogonal", normalize=False)
        expected = torch.from_numpy(R.T.copy())[: shape[1], : shape[0]]
        W = adapter.backward_map.weight.detach()
        assert adapter.deviation < 1e-12
        # Padding leaves the rotation of what is padded open, but not where embeddings lie.
        torch.testing.assert_close((W * (h.T @ z)).sum(), (expected * (h.T @ z)).sum())

    def test_a_shift_is_found_beside_a_rotation(self):
        z = gaussian(200, 5) + 1
        Q = torch.linalg.qr(gaussian(5, 5, seed=1)).Q
        shift = gaussian(5, seed=2)
        adapter = fit_adapter(z, z @ Q.T + shift, kind="orthogonal", bias=True, normalize=False)
        torch.testing.assert_close(adapter.backward_map.weight.detach(), Q)
        torch.testing.assert_close(adapter.backward_map.bias.detach(), shift)

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("tol", [0.1, 0.5, 1.5])
    def test_between_both_it_is_stationary_within_the_tolerance(self, shape, tol):
        moments = pair_moments(*pairs(*shape))
        W = within_tolerance(moments, tol, steps=1000)
        assert float(orthogonality_deviation(W)) == pytest.approx(tol, rel=1e-9)
        pull = torch.func.grad(lambda w: squared_error(moments, w))(W)
        normal = torch.func.grad(lambda w: orthogonality_deviation(w).square())(W)
        # The only way down that is left leads out of the tolerance.
        multiplier = -float((pull * normal).sum() / (normal * normal).sum())
        assert multiplier > 0
        assert float((pull + multiplier * normal).norm()) < 2e-3 * float(pull.norm())

    @pytest.mark.parametrize("tol", [0.1, 0.5, 1.5])
    def test_a_solver_that_knows_nothing_of_maps_does_no_better(self, tol):
        moments = pair_moments(*pairs(5, 5))
        W = within_tolerance(moments, tol)

        def objective(flat):
            w = torch.tensor(flat).view(5, 5).requires_grad_()
            error = squared_error(moments, w)
            error.backward()
            return error.item(), w.grad.flatten().numpy()

        def slack(flat):
            return tol**2 - float(orthogonality_deviation(torch.tensor(flat).view(5, 5))) ** 2

        best = min(
            minimize(
                objective, start.flatten().numpy(), jac=True, method="SLSQP",
                constraints=[{"type": "ineq", "fun": slack}], options={"ftol": 1e-12, "maxiter": 300},
            ).fun
            for start in (W, torch.linalg.qr(gaussian(5, 5, seed=8)).Q)
        )  # fmt: skip
        assert float(squared_error(moments, W)) <= best * (1 + 1e-4)

    def test_error_falls_as_the_tolerance_grows(self):
        moments = pair_moments(*pairs(8, 8))
        errors = [float(squared_error(moments, within_tolerance(moments, t))) for t in (0, 0.2, 0.5, 1, 2, 9)]
        assert errors == sorted(errors, reverse=True)
        assert errors[0] > 1.5 * errors[-1]

    def test_problems_of_a_batch_are_apart(self):
        first, second = pairs(5, 5), (gaussian(300, 5, seed=5), gaussian(300, 5, seed=6))
        together = pair_moments(*(torch.stack(both) for both in zip(first, second, strict=True)))
        found = within_tolerance(together, 0.4)
        for W, each in zip(found, (first, second), strict=True):
            alone = pair_moments(*each)
            torch.testing.assert_close(squared_error(alone, W), squared_error(alone, within_tolerance(alone, 0.4)),
                                       rtol=1e-3, atol=0)  # fmt: skip

    def test_fewer_pairs_than_dimensions(self):
        z, h = gaussian(4, 10), gaussian(4, 10, seed=1)
        for kind, tol in (("affine", 0.0), ("orthogonal", 0.0), ("lambda", 0.3)):
            adapter = fit_adapter(z, h, kind=kind, tol=tol)
            assert adapter.to_old(z).isfinite().all()
        exact = fit_adapter(z, h, kind="affine", normalize=False)
        torch.testing.assert_close(exact.to_old(z), h)

    def test_a_pull_forward_is_that_of_both_maps_together(self):
        z, h = pairs(4, 4)
        weights = LossWeights(forward=2.0)
        adapter = fit_adapter(z, h, kind="affine", weights=weights, normalize=False)

        def joint(W, V):
            mapped = z @ W.T
            return (mapped - h).square().sum(1).mean() + 2 * (h @ V.T - mapped).square().sum(1).mean()

        W, V = adapter.backward_map.weight.detach(), adapter.forward_map.weight.detach()
        gradients = torch.func.grad(joint, argnums=(0, 1))(W, V)
        assert max(float(g.abs().max()) for g in gradients) < 1e-10


class TestTheMap:
    def test_tolerance_bounds_what_becomes_of_inner_products(self):
        z, h = pairs(8, 8)
        adapter = fit_adapter(z, h, tol=0.6, relative=False)
        assert adapter.deviation == pytest.approx(0.6, rel=1e-6)
        x = F.normalize(gaussian(500, 8, seed=9), dim=1)
        mapped = adapter.to_old(x)
        change = (mapped @ mapped.T - x @ x.T).detach().abs().max()
        assert float(change) <= 0.6

    def test_relative_tolerance_is_one_for_a_direction(self):
        z, h = pairs(9, 4)
        assert fit_adapter(z, h, tol=0.1).deviation == pytest.approx(0.2, rel=1e-6)

    def test_a_rotation_costs_nothing_and_a_bias_does(self):
        z, h = pairs(6, 6)
        y = torch.arange(300) % 5
        before = retrieval_report(z, z, y, y, exclude_self=True)
        plain = fit_adapter(z, h, kind="orthogonal")
        assert retrieval_report(plain(z), plain(z), y, y, exclude_self=True) == before
        shifted = fit_adapter(z, h + 2, kind="orthogonal", bias=True)
        assert shifted.deviation < 1e-9
        assert retrieval_report(shifted(z), shifted(z), y, y, exclude_self=True) != before

    def test_lift_goes_where_to_old_takes_new_ones(self):
        z, h = pairs(6, 5)
        adapter = fit_adapter(z, h, kind="lambda")
        mapped = adapter.to_old(z)
        assert (adapter.lift(h) - mapped).square().sum() < (F.normalize(h, dim=1) - mapped).square().sum()
        torch.testing.assert_close(adapter(z), adapter.to_old(z))

    def test_without_a_forward_map(self):
        z, h = pairs(4, 4)
        adapter = fit_adapter(z, h, forward=False)
        assert adapter.forward_map is None
        with pytest.raises(ValueError, match="fit it with forward=True"):
            adapter.lift(h)

    def test_leading_dimensions_dtypes_and_modes(self):
        z, h = pairs(4, 3)
        adapter = fit_adapter(z.float(), h)
        assert adapter.to_old(z.float().view(10, 30, 4)).shape == (10, 30, 3)
        assert adapter.backward_map.weight.dtype == torch.float32
        assert not adapter.training
        assert fit_adapter(z.bfloat16(), h).backward_map.weight.dtype == torch.float32
        assert not any(t.requires_grad for t in (z, h))


class TestTraining:
    def test_penalty_arrives_near_the_closed_form(self):
        z, h = (x.float() for x in pairs(5, 5))
        arguments = {"tol": 0.5, "relative": False, "normalize": False, "forward": False}
        exact = fit_adapter(z, h, **arguments)
        trained = fit_adapter(
            z, h, method="penalty", steps=800, lr=0.02, weights=LossWeights(penalty=100), **arguments
        )
        assert trained.deviation == pytest.approx(0.5, abs=0.01)
        errors = [(a.to_old(z) - h).square().sum(1).mean().item() for a in (exact, trained)]
        assert errors[1] == pytest.approx(errors[0], rel=0.02)

    @pytest.mark.parametrize(("kind", "deviation"), [("orthogonal", 0.0), ("lambda", 0.3)])
    def test_projection_holds_with_a_contrastive_term(self, kind, deviation):
        z, h = (x.float() for x in pairs(6, 4, n=100))
        y = torch.arange(100) % 4
        adapter = fit_adapter(
            z, h, y, kind=kind, tol=0.3, relative=False, weights=(1, 0, 1), steps=40, lr=0.05, bias=True
        )
        assert adapter.deviation == pytest.approx(deviation, abs=1e-5)

    def test_contrastive_term_gathers_classes(self):
        y = torch.arange(200) % 4
        z, h = (x.float() for x in pairs(6, 6, n=200, noise=1.0))
        h = h + gaussian(4, 6, seed=7, dtype=torch.float32)[y]

        def loss(adapter):
            mapped = adapter.to_old(z)
            return contrastive_loss(mapped, F.normalize(h, dim=1), y, y).item()

        plain = fit_adapter(z, h, y, kind="affine")
        drawn = fit_adapter(z, h, y, kind="affine", weights=LossWeights(contrastive=1.0), steps=200, lr=0.02)
        assert loss(drawn) < loss(plain) - 0.01

    def test_contrastive_loss_is_the_formula(self):
        anchors, keys = gaussian(3, 4), gaussian(5, 4, seed=1)
        y, other = [0, 1, 2], [0, 0, 1, 1, 3]
        cosine = F.cosine_similarity(anchors[:, None], keys[None], dim=-1) / 0.5
        terms = []
        for i, row in enumerate(cosine.tolist()):
            total = math.log(sum(math.exp(x) for x in row))
            right = [x for x, label in zip(row, other, strict=True) if label == y[i]]
            if right:
                terms.append(sum(total - x for x in right) / len(right))
        assert len(terms) == 2
        found = contrastive_loss(anchors, keys, torch.tensor(y), torch.tensor(other), 0.5)
        assert float(found) == pytest.approx(sum(terms) / 2)

    def test_an_anchor_is_no_key_of_its_own(self):
        anchors, others = gaussian(3, 4), gaussian(2, 4, seed=1)
        y = torch.tensor([0, 0, 1, 0, 2])
        found = contrastive_loss(anchors, torch.cat([anchors, others]), y[:3], y, own=True)
        apart = []
        for i in range(2):
            rest = torch.arange(5) != i
            keys = torch.cat([anchors, others])[rest]
            apart.append(float(contrastive_loss(anchors[i : i + 1], keys, y[i : i + 1], y[rest])))
        # The third has no other of its class, and does not count.
        assert float(found) == pytest.approx(sum(apart) / 2)

    def test_joint_training_moves_both_maps(self):
        z, h = (x.float() for x in pairs(4, 4, n=60))
        y = torch.arange(60) % 3
        start = Maps(torch.eye(4), None, torch.eye(4), None)
        weights = LossWeights(1, 1, 1)
        before = [p.clone() for p in (start.W, start.V)]
        end = train(z, h, start, labels=y, weights=weights, steps=5, lr=0.01)
        assert not torch.equal(end.W, start.W)
        assert not torch.equal(end.V, start.V)
        assert all(torch.equal(a, b) for a, b in zip(before, (start.W, start.V), strict=True))
        assert not end.W.requires_grad

    def test_problems_of_a_batch_train_as_alone(self):
        z, h = gaussian(2, 50, 4, dtype=torch.float32), gaussian(2, 50, 4, seed=1, dtype=torch.float32)
        y = torch.arange(50).remainder(3).expand(2, 50)
        start, rates = torch.eye(4).expand(2, 4, 4), torch.tensor([0.01, 0.03])
        weights = LossWeights(contrastive=1.0)
        both = train(z, h, Maps(start), labels=y, weights=weights, steps=10, lr=rates, tol=0.2)
        for i in range(2):
            alone = train(
                z[i],
                h[i],
                Maps(start[i]),
                labels=y[i],
                weights=weights,
                steps=10,
                lr=float(rates[i]),
                tol=0.2,
            )
            torch.testing.assert_close(both.W[i], alone.W)

    def test_adam_is_pytorchs(self):
        z, h = gaussian(40, 3), gaussian(40, 3, seed=1)
        found = train(z, h, Maps(torch.eye(3, dtype=torch.float64)), weights=LossWeights(), steps=8, lr=0.05)
        layer = nn.Linear(3, 3, bias=False).double()
        nn.init.eye_(layer.weight)
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
        for step in range(8):
            optimizer.param_groups[0]["lr"] = 0.05 * (1 + math.cos(math.pi * step / 8)) / 2
            optimizer.zero_grad()
            (layer(z) - h).square().sum(1).mean().backward()
            optimizer.step()
        torch.testing.assert_close(found.W, layer.weight.detach(), rtol=1e-6, atol=1e-6)

    def test_equal_generators_give_equal_maps(self):
        z, h = (x.float() for x in pairs(4, 4))
        maps = [
            fit_adapter(
                z, h, method="penalty", steps=5, batch_size=32, generator=torch.Generator().manual_seed(seed)
            )
            for seed in (0, 0, 1)
        ]
        weights = [m.backward_map.weight for m in maps]
        assert torch.equal(weights[0], weights[1])
        assert not torch.equal(weights[0], weights[2])


class TestFiles:
    @pytest.mark.parametrize(("bias", "forward", "normalize"), [(False, True, True), (True, False, False)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_come_back_bit_for_bit(self, tmp_path, bias, forward, normalize, dtype):
        z, h = (x.to(dtype) for x in pairs(5, 3))
        adapter = fit_adapter(z, h, bias=bias, forward=forward, normalize=normalize)
        adapter.save(tmp_path / "adapter.safetensors")
        again = CompatibilityAdapter.load(tmp_path / "adapter.safetensors")
        assert torch.equal(again.to_old(z), adapter.to_old(z))
        assert (again.forward_map is not None) == forward
        assert again.normalize == normalize
        assert again.info == adapter.info
        assert again.info["kind"] == "lambda"
        if forward:
            assert torch.equal(again.lift(h), adapter.lift(h))

    def test_other_files_are_told_apart(self, tmp_path):
        from safetensors.torch import save_file

        save_file({"w": torch.ones(2)}, tmp_path / "other.safetensors")
        (tmp_path / "text.safetensors").write_text("hello, this is no tensor file")
        with pytest.raises(ValueError, match="is no compatibility adapter"):
            CompatibilityAdapter.load(tmp_path / "other.safetensors")
        with pytest.raises(ValueError, match="is no safetensors file"):
            CompatibilityAdapter.load(tmp_path / "text.safetensors")
        with pytest.raises(FileNotFoundError):
            CompatibilityAdapter.load(tmp_path / "missing.safetensors")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"h_old": torch.ones(3, 2)}, ValueError, "pairs, row by row, got 4 and 3 rows"),
        ({"z_new": torch.ones(4, 2, dtype=torch.int32)}, TypeError, "z_new must be of floating-point type"),
        ({"z_new": torch.zeros(4, 2)}, ValueError, "4 rows of z_new are zero.*: 0, 1, 2, 3;"),
        ({"h_old": torch.full((4, 2), math.inf)}, ValueError, "4 rows of h_old are not finite"),
        ({"labels": torch.arange(3)}, ValueError, r"labels must have shape \(4,\)"),
        ({"weights": (1, 0, 0.5)}, ValueError, r"weights.contrastive=0.5 needs labels"),
        ({"weights": (0, 1)}, ValueError, "weights.backward must be above 0"),
        ({"weights": (1, -1)}, ValueError, "weights must be finite and at least 0"),
        ({"weights": (1, 1), "forward": False}, ValueError, "weights.forward=1 needs a forward map"),
        ({"tol": -0.1}, ValueError, "tol must be at least 0, got -0.1"),
        ({"kind": "strict"}, ValueError, "kind must be one of .* got 'strict'"),
        ({"method": "sgd"}, ValueError, "method must be one of .* got 'sgd'"),
        ({"method": "penalty", "kind": "affine"}, ValueError, "nothing to penalise"),
        ({"method": "penalty", "gate": "relu"}, ValueError, "gate must be one of"),
        ({"steps": 0}, ValueError, "steps must be above 0, got 0"),
        ({"temperature": 0.0}, ValueError, "temperature must be above 0"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        fit_adapter(**({"z_new": torch.ones(4, 2), "h_old": torch.ones(4, 2)} | change))
