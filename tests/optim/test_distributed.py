import contextlib
import copy
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import distributed_checks as checks
import pytest
import torch
import torch.distributed as dist
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from weightlab.optim import ARO, AuON, HybridAuON, consolidate, distribute
from weightlab.optim.distributed import deal_out, rows_of_shards

SCRIPT = Path(__file__).with_name("distributed_checks.py")
PATIENCE = 240
# Methods whose arithmetic does not depend on how many matrices are moved at once, and so is the same to the bit.
SAME_KERNELS = ("alone", "auon", "keeping", "split")
ROUNDING = 2e-6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where four processes have left their figures, of all checks; they are started once for all workers."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    where, done = base / "distributed", base / "distributed" / "done"
    with FileLock(base / "distributed.lock"):
        if not done.exists():
            where.mkdir(exist_ok=True)
            run_checks(where)
            done.touch()
    return where


def run_checks(where):
    command = [sys.executable, "-W", "ignore", str(SCRIPT), str(where)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    log = where / "log"
    with log.open("w") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)
        try:
            code = process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            code = f"none within {PATIENCE} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code != 0:
        pytest.fail(f"exit code {code}\n{log.read_text()[-6000:]}")


@pytest.fixture(scope="module")
def figures(folder):
    """Check -> figures of each rank."""
    by_rank = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(checks.WORLD)]
    return {name: [results[name] for results in by_rank] for name in by_rank[0]}


def on_every_rank(figures, check):
    """Names and figures of a check, for all ranks."""
    return [item for results in figures[check] for item in results.items()]


def test_steps_are_those_of_one_process(figures):
    cases = on_every_rank(figures, "steps")
    assert len(cases) == 4 * (2 * len(checks.METHODS) + 3 * 3)
    for name, (error, agree) in cases:
        exact = name.split(": ")[1] in SAME_KERNELS
        assert error == 0 if exact else error < ROUNDING, name
        assert agree, f"{name}: ranks differ"


def test_half_precision_is_the_same_to_the_bit(figures):
    assert all(error == 0 for _, error in on_every_rank(figures, "half_precision"))


def test_every_matrix_is_seen_whole_by_one_rank(figures):
    for name, seen in on_every_rank(figures, "work_is_shared"):
        assert seen["once each"], name
        assert seen["each works"], name
        assert seen["momentum is sharded"] is ("shards" in name), name


def test_linear_rules_stay_with_every_rank(figures):
    # One rank of four has stepped alone, and did not wait for anybody.
    assert all(
        owner is None for _, owners in on_every_rank(figures, "linear_rules_do_not_talk") for owner in owners
    )


def test_training_by_ddp_and_fsdp_is_training_on_all_the_data(figures):
    for name, (error, agree) in on_every_rank(figures, "data_parallel_training"):
        assert error < 1e-5, name
        assert agree, name


def test_groups_missing_gradients_and_tensor_learning_rates(figures):
    assert all(error == 0 for _, error in on_every_rank(figures, "options"))


def test_nan_on_one_rank_is_known_to_all(figures):
    for name, found in on_every_rank(figures, "nonfinite"):
        assert found["error"] < ROUNDING, name
        assert "equal.0.weight" in (found["message"] or ""), name
        assert found["unmoved"], name


def test_state_of_rules_is_with_owners_and_whole_in_checkpoints(figures):
    for name, found in on_every_rank(figures, "state_of_owners"):
        if "->" in name:
            assert found < ROUNDING, name
        else:
            assert found["holders"] == ([2] if "on 2" in name else [1]), name
            assert found["state error"] < 1e-4, name
            assert found["local after"], name


def test_consolidated_state_is_had_by_one_rank_alone(figures):
    assert figures["consolidate"][0] == {"hybrid": 0.0, "keeping": 0.0}


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("columns", ["layer.weight", "Shard(dim=1)", "use_matrix_rule=False"]),
        ("two dims", ["(8, 8)", "Shard(dim=0), Shard(dim=0)"]),
        ("tensor parallel", ["wide", "mesh of shape (2, 2)"]),
        ("partial", ["Partial"]),
        ("partial gradient", ["Partial", "redistribute"]),
        ("twice", ["already"]),
        ("type", ["MatrixOptimizer", "SGD"]),
    ],
)
def test_what_cannot_be_shared_is_refused(figures, case, words):
    for results in figures["refusals"]:
        assert all(word in (results[case] or "") for word in words), results[case]


def test_refused_steps_move_nothing_and_adamw_takes_any_placement(figures):
    assert all(results["unmoved"] and results["adamw"] is None for results in figures["refusals"])


def test_groups_that_share_state_stay_together(figures):
    for name, (error, owners) in on_every_rank(figures, "whole_groups"):
        assert owners == 1, name
        assert error < ROUNDING, name


def test_distributed_checkpoints_go_on_with_as_many_ranks_and_with_more(figures):
    for name, error in on_every_rank(figures, "checkpoints"):
        if name.endswith("names"):
            assert error is True, name
        elif name.endswith("shards on 2"):
            assert error == 0, name  # As many ranks as saved it.
        else:
            assert error < ROUNDING, name


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("method", ["hybrid", "keeping pieces", "aro", "trion"])
def test_distributed_checkpoints_go_on_in_one_process(folder, method):
    net = checks.build(seed=1)
    optimizer = checks.make(method, net)
    checks.load(net, optimizer, folder / f"{method} saved by 0", no_dist=True)
    checks.advance(net, optimizer, range(3, 6))
    reached = torch.load(folder / f"{method} reached.pt", weights_only=True)
    for weight, expected in zip(checks.weights(net), reached, strict=True):
        torch.testing.assert_close(weight, expected, rtol=0, atol=ROUNDING * float(expected.abs().max()))


# ---- without processes


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=7), st.integers(1, 3))
def test_loads_are_at_most_four_thirds_of_the_best(costs, workers):
    loads = [0.0] * workers
    dealt = deal_out(costs, loads)
    assert loads == [
        sum(c for c, w in zip(costs, dealt, strict=True) if w == worker) for worker in range(workers)
    ]
    best = min(
        max(sum(c for c, w in zip(costs, ways, strict=True) if w == worker) for worker in range(workers))
        for ways in itertools.product(range(workers), repeat=len(costs))
    )
    assert max(loads) <= 4 / 3 * best


@given(st.integers(0, 30), st.integers(1, 9))
@settings(max_examples=50, deadline=None)
def test_rows_of_shards_are_those_of_chunk(rows, shards):
    chunks = [len(chunk) for chunk in torch.empty(rows, 1).chunk(shards)] if rows else []
    assert rows_of_shards(rows, shards) == chunks + [0] * (shards - len(chunks))


def test_costs_count_matrices_and_nothing_else():
    params = [nn.Parameter(torch.ones(4, 8))]
    optimizer = HybridAuON(params)
    group = optimizer.param_groups[0]
    assert optimizer.cost((4, 8), group) == optimizer.cost((8, 4), group) == 4 * 4 * 8
    assert optimizer.cost((4, 2, 2, 2), group) == 4 * 4 * 8
    assert optimizer.cost((4, 2, 8), {**group, "stacked": True}) == 4 * (2 * 2 * 8)
    assert optimizer.cost((4, 8), {**group, "split": {"parts": 2}}) == 2 * (2 * 2 * 8)
    assert optimizer.cost((5,), group) == optimizer.cost((), group) == optimizer.cost((0, 3), group) == 0
    assert AuON(params).cost((4, 8), AuON(params).param_groups[0]) == 0


def test_distribute_needs_a_process_group():
    assert not dist.is_initialized()
    optimizer = ARO([nn.Parameter(torch.ones(2, 2))])
    with pytest.raises(RuntimeError, match="init_process_group"):
        distribute(optimizer)
    assert optimizer.sharing is None


def test_consolidate_leaves_other_optimizers_alone():
    wrapped = AcceleratedOptimizer(ARO([nn.Parameter(torch.ones(2, 2))]))
    for optimizer in (torch.optim.SGD([torch.ones(1)]), wrapped, wrapped.optimizer):
        before = copy.deepcopy(optimizer.state_dict())
        consolidate(optimizer)
        assert optimizer.state_dict() == before


class AcceleratedOptimizer(torch.optim.Optimizer):
    """What Accelerate makes of an optimizer, in short."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def state_dict(self):
        return self.optimizer.state_dict()
