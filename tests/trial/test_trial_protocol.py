"""The protocol from end to end, on runs of milliseconds: `run_trial` and the store behind it."""

import dataclasses
import json
import math
import statistics

import pytest
import torch
from small_task import Regression, sgd_arm

from weightlab.exceptions import TrialError, UsageError
from weightlab.trial import run_trial
from weightlab.trial.hashing import derive_seed
from weightlab.trial.store import Store
from weightlab.trial.trial import FIRST_TUNING_SEED

SETTINGS = {"tune": 3, "seeds": 3, "eval_points": 4}


def raw(arm):
    """All of an arm's report that must not depend on the other challengers, timings aside."""
    versus = arm.versus
    return {
        "hyperparameters": arm.hyperparameters,
        "tuning": [(point.hyperparameters, point.score) for point in arm.tuning],
        "scores": [(run.seed, run.score) for run in arm.runs],
        "versus": versus and (list(versus.differences), versus.difference, versus.interval, versus.p_value),
    }


def same(a, b):
    return raw(a) == raw(b)


@pytest.fixture
def store(tmp_path):
    return tmp_path / "store.sqlite"


def results(path):
    with Store(path) as opened:
        return list(opened.results())


def test_every_arm_gets_the_same_budget_on_disjoint_seeds(store):
    arms = [sgd_arm("a"), sgd_arm("b", factor=0.3), sgd_arm("c", factor=3.0)]
    report = run_trial(Regression(), arms, store=store, **SETTINGS)
    runs = results(store)
    for arm in arms:
        mine = [run.spec for run in runs if run.spec.arm == arm.name]
        tuned = [spec for spec in mine if spec.split == "validation"]
        reported = [spec for spec in mine if spec.split == "test"]
        assert len(tuned) == 3
        assert {spec.seed for spec in tuned} == {FIRST_TUNING_SEED}
        assert sorted(spec.seed for spec in reported) == [0, 1, 2]
        assert {spec.steps for spec in mine} == {report.budget.steps} == {Regression.steps}
        assert {json.dumps(spec.hyperparameters) for spec in reported} == {
            json.dumps({"lr": report.arm(arm.name).hyperparameters["lr"]})
        }
    assert len(runs) == 3 * (3 + 3)


def test_the_point_with_the_best_validation_score_is_chosen(store):
    report = run_trial(Regression(), [sgd_arm()], store=store, tune=5, seeds=1)
    arm = report.arm("sgd")
    chosen = [point for point in arm.tuning if point.chosen]
    assert len(chosen) == 1
    assert chosen[0].score == min(point.score for point in arm.tuning)
    assert chosen[0].hyperparameters["lr"] == arm.hyperparameters["lr"]


def test_runs_are_paired_and_the_store_proves_it(store):
    report = run_trial(Regression(), [sgd_arm("a"), sgd_arm("b", factor=0.5)], store=store, **SETTINGS)
    assert report.paired
    by_seed = {}
    for run in results(store):
        by_seed.setdefault(run.spec.seed, set()).add((run.weights_hash, run.data_hash))
    assert all(len(hashes) == 1 for hashes in by_seed.values())
    assert len(set().union(*by_seed.values())) == 4


def test_broken_pairing_is_reported():
    class Unpaired(Regression):
        calls = 0

        def batches(self, split, generator):
            Unpaired.calls += 1
            generator.manual_seed(Unpaired.calls)
            return super().batches(split, generator)

    report = run_trial(Unpaired(), [sgd_arm("a"), sgd_arm("b")], **SETTINGS)
    assert not report.paired
    assert any("training batches differ" in note for note in report.notes)


def test_order_of_arms_and_further_arms_change_nothing_raw():
    a, b, c = sgd_arm("a"), sgd_arm("b", factor=0.4), sgd_arm("c", factor=2.5)
    base = run_trial(Regression(), [a, b], baseline="a", **SETTINGS)
    swapped = run_trial(Regression(), [b, a], baseline="a", **SETTINGS)
    more = run_trial(Regression(), [c, b, a], baseline="a", **SETTINGS)
    for name in ("a", "b"):
        assert same(base.arm(name), swapped.arm(name))
        assert same(base.arm(name), more.arm(name))
    assert [arm.name for arm in more.arms] == ["c", "b", "a"]


def test_identical_arms_differ_by_exactly_nothing():
    report = run_trial(Regression(), [sgd_arm("a"), sgd_arm("twin")], **SETTINGS)
    versus = report.arm("twin").versus
    assert list(versus.differences) == [0.0, 0.0, 0.0]
    assert versus.verdict == "not held"
    assert versus.win_rate == 0.5


def test_difference_is_the_mean_of_paired_scores():
    report = run_trial(Regression(), [sgd_arm("a"), sgd_arm("b", factor=0.2)], **SETTINGS)
    a, b = report.arm("a"), report.arm("b")
    expected = [y.score - x.score for x, y in zip(a.runs, b.runs, strict=True)]
    assert b.versus.differences == pytest.approx(expected, abs=0)
    assert b.versus.difference == pytest.approx(statistics.fmean(expected))
    assert b.versus.difference > 0
    assert b.versus.win_rate == 0.0


def test_a_finished_trial_is_answered_from_the_store(store, monkeypatch):
    arms = [sgd_arm("a"), sgd_arm("b", factor=0.5)]
    task = Regression()
    first = run_trial(task, arms, store=store, **SETTINGS)
    before = results(store)
    monkeypatch.setattr(Regression, "loss", lambda *_: pytest.fail("a finished trial trained again"))
    second = run_trial(task, arms, store=store, **SETTINGS)
    assert second == first
    assert results(store) == before


def test_more_seeds_only_add_runs(store):
    arms = [sgd_arm("a"), sgd_arm("b", factor=0.5)]
    run_trial(Regression(), arms, store=store, **SETTINGS)
    few = {run.key for run in results(store)}
    run_trial(Regression(), arms, store=store, **{**SETTINGS, "seeds": 5})
    many = {run.key for run in results(store)}
    assert few < many
    assert len(many) == len(few) + 4


def test_fresh_starts_over_and_keeps_history_and_other_trials(store):
    arms = [sgd_arm("a"), sgd_arm("b", factor=0.5)]
    task = Regression()
    run_trial(task, arms, store=store, steps=6, **SETTINGS)
    first = run_trial(task, arms, store=store, **SETTINGS)
    second = run_trial(task, arms, store=store, fresh=True, **SETTINGS)
    assert all(same(x, y) for x, y in zip(first.arms, second.arms, strict=True))
    with Store(store) as opened:
        lengths = {run.spec.steps: len(opened.history(run.key)) for run in opened.results()}
    assert lengths[6] < lengths[12]


def test_failures_score_as_the_untrained_model_and_are_not_dropped(store):
    unlucky = {derive_seed(seed, "set-up") for seed in (1, 4)}

    def breaks(model, hyperparameters):
        if torch.initial_seed() in unlucky:
            raise RuntimeError("odd")
        return model

    report = run_trial(
        Regression(), [sgd_arm("a"), sgd_arm("b", transform=breaks)], store=store, tune=1, seeds=8
    )
    arm = report.arm("b")
    broken = [run for run in arm.runs if run.status == "error"]
    assert [run.seed for run in broken] == [1, 4]
    assert arm.failures == 2
    untrained = {run.spec.seed: run.untrained for run in results(store) if run.spec.split == "test"}
    for run in broken:
        assert run.score == untrained[run.seed]
    assert len(arm.versus.differences) == 8
    assert any("score as the untrained model" in note and "odd" in note for note in report.notes)


def test_an_arm_that_never_works_ends_as_not_held_without_wasting_report_runs(store):
    def broken(model, hyperparameters):
        raise ValueError("never")

    arms = [sgd_arm("a"), sgd_arm("broken", transform=broken)]
    report = run_trial(Regression(), arms, store=store, **SETTINGS)
    arm = report.arm("broken")
    assert arm.failures == 3
    assert arm.versus.verdict == "not held"
    assert all("never" in run.error for run in arm.runs)
    assert not [run for run in results(store) if run.spec.arm == "broken" and run.spec.split == "test"]


def test_a_baseline_that_never_works_is_an_error():
    def broken(model, hyperparameters):
        raise ValueError("never")

    with pytest.raises(TrialError, match=r"baseline 'broken'.*never"):
        run_trial(Regression(), [sgd_arm("broken", transform=broken), sgd_arm("b")], **SETTINGS)


def test_maximised_metrics_mirror_minimised_ones():
    arms = [sgd_arm("a"), sgd_arm("b", factor=0.3)]
    low = run_trial(Regression(), arms, **SETTINGS).arm("b").versus
    high = run_trial(Regression(mode="max"), arms, **SETTINGS).arm("b").versus
    assert high.difference == -low.difference
    assert high.interval == pytest.approx((-low.interval[1], -low.interval[0]), rel=1e-12)
    assert high.verdict == low.verdict
    assert high.win_rate == low.win_rate


def test_thresholds_are_the_tasks_or_the_users():
    arms = [sgd_arm("a"), sgd_arm("b", factor=0.3)]
    assert run_trial(Regression(), arms, **SETTINGS).minimal_effect == Regression.minimal_effect
    report = run_trial(Regression(), arms, minimal_effect=0.5, **SETTINGS)
    assert report.minimal_effect == report.arm("b").versus.minimal_effect == 0.5


def test_optimum_at_the_edge_is_flagged_and_widening_gives_all_arms_as_many_runs(store):
    arms = [sgd_arm("a"), sgd_arm("tiny", factor=1e-3)]
    report = run_trial(Regression(), arms, store=store, tune=12, seeds=1)
    assert report.arm("tiny").edges == ("lr at its upper edge",)
    assert any("tiny" in note and "upper edge" in note for note in report.notes)
    wide = run_trial(Regression(), arms, store=store, tune=12, seeds=1, widen=1)
    assert {len(arm.tuning) for arm in wide.arms} == {24} == {wide.budget.tune}
    assert max(p.hyperparameters["lr"] for p in wide.arm("tiny").tuning) > 0.1
    assert wide.arm("tiny").mean <= report.arm("tiny").mean


def test_unequal_dimensions_are_said():
    from optuna.distributions import FloatDistribution

    wide = dataclasses.replace(
        sgd_arm("two"),
        search_space={"lr": FloatDistribution(1e-3, 0.1), "momentum": FloatDistribution(0, 0.9)},
    )
    report = run_trial(Regression(), [sgd_arm("one"), wide], **SETTINGS)
    assert any("two tunes 2 dimensions, one 1: no reason given" in note for note in report.notes)


def test_no_tuning_takes_defaults_and_needs_them():
    report = run_trial(Regression(), [sgd_arm("a")], tune=0, seeds=1)
    assert report.arm("a").hyperparameters == {"lr": 1e-2}
    with pytest.raises(UsageError, match="no default for lr"):
        run_trial(Regression(), [dataclasses.replace(sgd_arm("a"), defaults={})], tune=0, seeds=1)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"seeds": 0}, "seeds must be at least 1; got 0"),
        ({"steps": -3}, "steps must be at least 1; got -3"),
        ({"tune": -1}, "tune must be at least 0; got -1"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"eval_points": 0}, "eval_points must be at least 1"),
        ({"timeout": 0}, "timeout must be positive"),
        ({"level": 95}, "level must lie between 0.5 and 1; got 95"),
        ({"minimal_effect": -0.1}, "minimal_effect must be at least 0"),
        ({"device": "warp"}, "device 'warp' is not one that PyTorch knows"),
        ({"baseline": "adam"}, "unknown arm 'adam'; did you mean 'adamw'"),
        ({"engine": "proces"}, "proces"),
        ({"engine": "process"}, "cannot send live objects"),
        ({"workers": 0, "engine": "local"}, "workers"),
    ],
)
def test_settings_out_of_range(setting, message):
    with pytest.raises(UsageError, match=message):
        run_trial(Regression(), [sgd_arm("a")], **setting)


def test_names_must_be_known_and_unique():
    with pytest.raises(UsageError, match="did you mean 'muon'"):
        run_trial(Regression(), ["adamw", "moun"])
    with pytest.raises(UsageError, match="two arms are called 'a'"):
        run_trial(Regression(), [sgd_arm("a"), sgd_arm("a")])
    with pytest.raises(UsageError, match="no arms given"):
        run_trial(Regression(), [])
    with pytest.raises(UsageError, match="neither a name"):
        run_trial(Regression(), [42])


def test_a_timed_out_run_is_repeated_only_when_it_may_take_longer(store):
    import time

    def slow(model, optimizers, hyperparameters):
        def callback(*, model, step, steps):
            time.sleep(0.05)

        return [callback]

    arms = [sgd_arm("a"), sgd_arm("slow", callbacks=slow)]
    settings = {"store": store, "tune": 1, "seeds": 1, "steps": 12}
    task = Regression()
    hurried = run_trial(task, arms, timeout=0.3, **settings)
    assert hurried.arm("slow").runs[0].status == "timeout"
    count = len(results(store))
    run_trial(task, arms, timeout=0.2, **settings)
    assert len(results(store)) == count
    patient = run_trial(task, arms, timeout=30, **settings)
    assert patient.arm("slow").runs[0].status == "ok"


def test_report_is_plain_json():
    report = run_trial(Regression(), [sgd_arm("a"), sgd_arm("b", factor=0.5)], **SETTINGS)
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert {"task", "baseline", "budget", "arms"} <= data.keys()
    for arm in data["arms"]:
        assert {"name", "hyperparameters", "metric", "step_ms", "peak_memory_mb"} <= arm.keys()
        assert set(arm["metric"]) >= {"name", "mode", "per_seed", "mean"}
        assert math.isclose(arm["metric"]["mean"], statistics.fmean(arm["metric"]["per_seed"]))
    assert {"difference", "interval", "verdict", "time_matched"} <= data["arms"][1]["versus"].keys()
    assert data["arms"][0]["versus"] is None
