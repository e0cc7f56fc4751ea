from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from weightlab.train import DistanceFromInit, fit_laws

STEPS = [10, 13, 20, 40, 70, 100, 250, 600, 1000]
GROWTH: dict[str, Any] = {"log": math.log, "sqrt": math.sqrt, "linear": float}


class TestFitLaws:
    @settings(max_examples=40, deadline=None)
    @given(st.sampled_from(sorted(GROWTH)), st.floats(-5, 5), st.floats(0.1, 5))
    def test_recovers_affine_laws(self, name: Any, a: float, b: float):
        law = fit_laws(STEPS, [a + b * GROWTH[name](t) for t in STEPS])[name]
        assert (law.a, law.b) == pytest.approx((a, b), abs=1e-7)
        assert law.r2 == pytest.approx(1)
        assert law(37.0) == pytest.approx(a + b * GROWTH[name](37.0))

    @settings(max_examples=40, deadline=None)
    @given(st.floats(0.1, 10), st.floats(-2, 2).filter(lambda b: abs(b) > 0.05))
    def test_recovers_powers(self, a: float, b: float):
        law = fit_laws(STEPS, [a * t**b for t in STEPS])["power"]
        assert (law.a, law.b) == pytest.approx((a, b), rel=1e-4)
        assert law(37.0) == pytest.approx(a * 37.0**b, rel=1e-5)

    @pytest.mark.parametrize("name", [*GROWTH, "power"])
    def test_puts_the_true_law_first(self, name: str):
        law = GROWTH.get(name, lambda t: t**0.8 / 3)
        noise = torch.randn(len(STEPS), generator=torch.Generator().manual_seed(0)).tolist()
        spread = law(STEPS[-1]) - law(STEPS[0])
        laws = fit_laws(
            STEPS,
            [
                law(t) + 0.003 * spread * e + (name != "power") * spread
                for t, e in zip(STEPS, noise, strict=True)
            ],
        )
        assert next(iter(laws)) == name
        ranked = list(laws.values())
        assert ranked == sorted(ranked, key=lambda law: -law.r2) == sorted(ranked, key=lambda law: law.aic)

    def test_r2_and_aic_against_their_definitions(self):
        d = [1.0, 2.0, 2.5, 2.0, 4.0, 3.0, 3.5, 5.0, 4.5]
        law = fit_laws(STEPS, d)["sqrt"]
        mean = sum(d) / 9
        error = sum((law(t) - y) ** 2 for t, y in zip(STEPS, d, strict=True))
        assert law.r2 == pytest.approx(1 - error / sum((y - mean) ** 2 for y in d))
        assert law.aic == pytest.approx(9 * math.log(error / 9) + 2 * 2)
        for shifted in (lambda t: law(t) + 0.05, lambda t: law(t) * 1.02):
            assert sum((shifted(t) - y) ** 2 for t, y in zip(STEPS, d, strict=True)) > error

    def test_no_exponent_nearby_fits_better(self):
        d = [1.0, 2.0, 2.5, 2.0, 4.0, 3.0, 3.5, 5.0, 4.5]
        law = fit_laws(STEPS, d)["power"]
        error = sum((law(t) - y) ** 2 for t, y in zip(STEPS, d, strict=True))
        for a in (0.99, 1.0, 1.01):
            for b in (-0.01, 0.0, 0.01):
                if (a, b) != (1.0, 0.0):
                    other = sum(
                        (a * law.a * t ** (law.b + b) - y) ** 2 for t, y in zip(STEPS, d, strict=True)
                    )
                    assert other > error

    def test_constant_distances_are_explained(self):
        assert fit_laws(STEPS, [2.0] * len(STEPS))["log"].r2 == 1

    @pytest.mark.parametrize(
        ("steps", "distances", "message"),
        [
            ([1, 2], [1.0, 2.0], "at least 3 different steps"),
            ([1, 1, 2, 2], [1.0, 1.0, 2.0, 2.0], "at least 3 different steps"),
            ([1, 2, 3], [1.0, 2.0], "of one length"),
            ([0, 1, 2], [1.0, 2.0, 3.0], "above 0"),
            ([1, 2, 3], [1.0, math.nan, 3.0], "finite"),
        ],
    )
    def test_bad_input(self, steps: Any, distances: Any, message: str):
        with pytest.raises(ValueError, match=message):
            fit_laws(steps, distances)


def walk(model: nn.Module, tracker: DistanceFromInit, steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape, generator=generator), alpha=0.01)
        tracker(model=model, step=step + 1, steps=steps)


class TestTracker:
    def test_first_step_of_sgd_is_lr_times_the_gradient_s_norm(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
        tracker = DistanceFromInit(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        model(torch.randn(5, 3, dtype=torch.float64)).square().sum().backward()
        norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
        optimizer.step()
        tracker()
        assert tracker.distances == pytest.approx([0.3 * norm.item()], rel=1e-12)
        assert tracker.distance().ndim == 0

    def test_measures_evenly_in_the_logarithm(self):
        model = nn.Linear(2, 2)
        tracker = DistanceFromInit(model, points_per_decade=4)
        walk(model, tracker, 1000)
        assert tracker.steps[0] == 1
        assert tracker.step == 1000
        assert all(before < after for before, after in zip(tracker.steps, tracker.steps[1:], strict=False))
        for low, high in ((10, 100), (100, 1000)):
            assert sum(low <= step < high for step in tracker.steps) == 4
        with pytest.raises(ValueError, match="points_per_decade must be above 0, got 0"):
            DistanceFromInit(model, 0)

    def test_a_random_walk_goes_with_the_square_root(self):
        model = nn.Linear(50, 50)
        tracker = DistanceFromInit(model)
        walk(model, tracker, 400)
        laws = tracker.fit()
        assert laws["power"].b == pytest.approx(0.5, abs=0.02)
        assert laws["power"].a == pytest.approx(0.01 * math.sqrt(50 * 51), rel=0.05)
        assert laws["sqrt"].r2 > 0.999 > laws["log"].r2

    def test_fit_uses_the_window_asked_for(self):
        tracker = DistanceFromInit(nn.Linear(1, 1))
        tracker.steps = [1, 5, *STEPS, 2000, 4000]
        tracker.distances = [90.0, 90.0, *(1 + 2 * math.log(t) for t in STEPS), 90.0, 90.0]
        law = tracker.fit(first=10, last=1000)["log"]
        assert (law.a, law.b) == pytest.approx((1, 2))
        assert tracker.fit(first=1)["log"].r2 < 0.9
        with pytest.raises(ValueError, match="2 measurements between steps 11 and 20"):
            tracker.fit(first=11, last=20)

    def test_ignores_frozen_parameters_and_counts_shared_ones_once(self):
        model = nn.ModuleList([nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)])
        model.append(model[0])
        model[1].weight.requires_grad_(False)
        tracker = DistanceFromInit(model)
        with torch.no_grad():
            model[0].weight += 3.0
            model[1].weight += 100.0
        assert tracker.distance().item() == pytest.approx(3.0)
        with pytest.raises(ValueError, match="no parameter that requires gradients"):
            DistanceFromInit(model[1])

    def test_half_precision_is_measured_in_single(self):
        model = nn.Linear(300, 300).half()
        tracker = DistanceFromInit(model)
        with torch.no_grad():
            model.weight += 300.0  # sum of squares far beyond float16
        assert tracker.distance().item() == pytest.approx(9e4, rel=1e-3)

    def test_goes_on_after_a_restart_as_if_nothing_had_happened(self):
        torch.manual_seed(0)
        model, twin = nn.Linear(4, 4), nn.Linear(4, 4)
        twin.load_state_dict(model.state_dict())
        whole, first = DistanceFromInit(model), DistanceFromInit(twin)
        walk(model, whole, 30, seed=1)
        walk(model, whole, 30, seed=2)
        walk(twin, first, 30, seed=1)
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        second = DistanceFromInit(twin)
        second.load_state_dict(torch.load(file, weights_only=True))
        walk(twin, second, 30, seed=2)
        assert (second.steps, second.distances) == (whole.steps, whole.distances)

    def test_refuses_another_model_s_state_and_keeps_its_own(self):
        tracker = DistanceFromInit(nn.Linear(2, 2))
        tracker()
        with pytest.raises(
            ValueError, match=r"shapes \[\(3, 3\), \(3,\)\], this one has \[\(2, 2\), \(2,\)\]"
        ):
            tracker.load_state_dict(DistanceFromInit(nn.Linear(3, 3)).state_dict())
        assert tracker.steps == [1]
