"""The scaffold of claims about adapters, against runs done by hand."""

import math
import statistics
from dataclasses import replace

import pytest
import torch

from weightlab.papers import adaptation
from weightlab.papers.schema import ClaimContext
from weightlab.tasks import AdaptDigits
from weightlab.trial import registry
from weightlab.trial.runner import execute
from weightlab.trial.spec import CurvePoint, Job, RunSpec

SEEDS, STEPS = 3, 16


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "adaptation"))


def small(**options):
    return AdaptDigits(**{"hidden": (16,), "batch_size": 16, "steps": STEPS, "pretrain_steps": 30, **options})


@pytest.fixture
def ctx(tmp_path):
    return ClaimContext("smoke", tmp_path, tmp_path / "store.sqlite")


def arms():
    return {
        "all": adaptation.variant("full-finetune"),
        "biases": adaptation.variant("bitfit", weight_decay=0.0),
        "two": adaptation.variant("random-diagonal", r=2),
    }


def test_every_number_is_that_of_the_run(ctx):
    found = adaptation.adapt(ctx, small(), arms(), tune=1, seeds=SEEDS, eval_points=4)
    assert list(found.outcomes) == ["all", "biases", "two"]
    assert list(found.seeds) == [0, 1, 2]
    for name, given in arms().items():
        arm, outcome = registry.arm(given) if isinstance(given, str) else given, found.outcomes[name]
        for seed in range(SEEDS):
            spec = RunSpec(
                "", "", arm.name, "", outcome.hyperparameters, seed, "test", STEPS, 4, 16, 1, "cpu", {}
            )
            run = execute(Job(spec, registry.keep(small()), registry.keep(arm)))
            assert outcome.scores[seed] == (run.metrics["error"] if run.status == "ok" else run.untrained)
            assert {key: values[seed] for key, values in outcome.metrics.items()} == run.metrics
            losses = [point.train_loss for point in run.curve[1:]]
            assert outcome.first[seed] == pytest.approx(losses[0])
            assert outcome.early[seed] == pytest.approx(statistics.fmean(losses[:2]))
            assert outcome.late[seed] == pytest.approx(statistics.fmean(losses[2:]))
    assert {name: outcome.trained for name, outcome in found.outcomes.items()} == {
        "all": 64 * 16 + 16 + 16 * 10 + 10,
        "biases": 16,
        "two": 2,
    }
    mean, (low, high) = found.difference("biases", "all")
    assert mean == pytest.approx(
        statistics.fmean(
            b - a for a, b in zip(found.outcomes["all"].scores, found.outcomes["biases"].scores, strict=True)
        )
    )
    assert low <= mean <= high
    mean, _ = found.log_ratio("biases", "all", "first")
    ratios = [
        math.log(b / a)
        for a, b in zip(found.outcomes["all"].first, found.outcomes["biases"].first, strict=True)
    ]
    assert mean == pytest.approx(statistics.fmean(ratios))


def test_a_second_call_reads_the_store(ctx):
    first = adaptation.adapt(ctx, small(), arms(), tune=1, seeds=2, eval_points=4)
    told = []
    again = adaptation.adapt(
        replace(ctx, progress=lambda part, what: told.append(what)),
        small(),
        arms(),
        tune=1,
        seeds=2,
        eval_points=4,
    )
    assert again.outcomes == first.outcomes
    assert not told


def test_tables_and_figures_have_a_row_and_a_line_for_each_arm(ctx):
    found = adaptation.adapt(ctx, small(), arms(), tune=0, seeds=2, eval_points=4)
    rows = found.table("all")
    assert [row["arm"] for row in rows] == ["all", "biases", "two"]
    assert len({tuple(row) for row in rows}) == 1
    assert rows[0]["minus all"] == rows[0]["low"] == rows[0]["high"] == 0
    assert rows[1]["source error"] == statistics.fmean(found.outcomes["biases"].metrics["source_error"])
    for testing in (False, True):
        figure = found.figure("two", "all", testing=testing)
        assert [line["name"] for line in figure["series"]] == ["all", "two"]
        for line in figure["series"]:
            assert len(line["x"]) == len(line["y"]) == 4 + testing
            assert all(a <= b <= c for a, b, c in zip(line["low"], line["y"], line["high"], strict=True))
    assert len(found.figure()["series"]) == 3


def test_a_failed_run_counts_and_says_nothing_of_what_it_lacks(ctx):
    def fail(model, hyperparameters):
        raise ValueError("never")

    failing = replace(registry.arm("bitfit"), name="failing", transform=fail)
    task = small()
    found = adaptation._outcome(_report(ctx, task, failing), STEPS, trained=0)
    assert found.failures == 2
    assert found.early == found.first == found.late == [math.inf, math.inf]
    assert min(found.scores) > 0.5
    assert found.metrics == {}
    assert adaptation.paired([math.inf, 2.0], [1.0, 1.0])[0] == math.inf
    assert adaptation.paired([math.inf], [math.inf])[0] == 0
    mean, interval = adaptation.paired([math.nan, 2.0], [1.0, 1.0])
    assert math.isnan(mean)
    assert interval == (-math.inf, math.inf)


def _report(ctx, task, arm):
    from weightlab.papers import trials

    return trials.run_trial(ctx, task, ["bitfit", arm], tune=0, seeds=2, eval_points=4).arm(arm.name)


def test_variants_say_what_they_fix():
    assert adaptation.variant("lora") == "lora"
    arm = adaptation.variant("lora", r=4, weight_decay=0.0, lr=(1e-3, 1e-1))
    assert arm.name == "lora (r 4, weight_decay 0, lr 0.001 to 0.1)"
    assert list(arm.search_space) == ["lr"]
    assert (arm.search_space["lr"].low, arm.search_space["lr"].high) == (1e-3, 1e-1)
    assert (arm.defaults["r"], arm.defaults["weight_decay"], arm.defaults["lr"]) == (
        4,
        0.0,
        pytest.approx(1e-2),
    )
    assert registry.arm("lora").defaults["r"] == 8
    with pytest.raises(ValueError, match=r"arm 'lora' has no rank; it has: .*r"):
        adaptation.variant("lora", rank=4)


def test_evaluations_must_end_quarters(ctx):
    for eval_points, steps in ((6, 12), (8, 12), (4, 10)):
        with pytest.raises(ValueError, match=f"divides the {steps} steps, not {eval_points}"):
            adaptation.adapt(ctx, small(steps=steps), arms(), tune=0, seeds=1, eval_points=eval_points)


def test_losses_are_weighted_by_steps():
    curve = [CurvePoint(0, 0.0, None, 1.0)]
    curve += [CurvePoint(s, 0.0, loss, 1.0) for s, loss in ((2, 5.0), (8, 1.0), (10, 4.0))]
    assert adaptation.mean_loss(curve, 0, 10) == pytest.approx((2 * 5 + 6 * 1 + 2 * 4) / 10)
    assert adaptation.mean_loss(curve, 2, 8) == 1.0
    assert adaptation.mean_loss(curve[:3], 0, 10) == math.inf
    assert adaptation.mean_loss([], 0, 10) == math.inf


def test_counting_leaves_the_random_state_alone():
    state = torch.get_rng_state()
    adaptation.trained_parameters(small(), registry.arm("random-diagonal"), {})
    assert torch.equal(torch.get_rng_state(), state)
