import copy
from functools import partial

import pytest
import torch
from torch import nn

from weightlab.optim import AuON, HybridAuON, MatrixOptimizer

NAN, INF = float("nan"), float("inf")


class Averages(MatrixOptimizer):
    """Keeps a second average and replaces it at every step, as rules with rotations do."""

    def __init__(self, params, lr=0.1, momentum=0.9, **options):
        super().__init__(params, {"lr": lr, "momentum": momentum, **options})

    def directions(self, updates, states, group):
        for update, state in zip(updates, states, strict=True):
            state["average"] = 0.5 * state.get("average", torch.ones_like(update)) + 0.5 * update
        return super().directions(updates, states, group)

    def direction(self, update, group):
        return update.sign()


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 5), nn.Linear(5, 2))


def fill(model, seed, bad=()):
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        p.grad = torch.randn(p.shape, generator=generator)
        if name in bad:
            p.grad.view(-1)[0] = bad[name]


def state_tensors(optimizer, p):
    found = []

    def walk(value):
        if isinstance(value, torch.Tensor):
            found.append(value.clone())
        elif isinstance(value, dict):
            for key in sorted(value):
                walk(value[key])
        elif isinstance(value, list):
            for part in value:
                walk(part)

    walk(optimizer.state[p])
    return found


METHODS = {
    "auon": AuON,
    "hybrid": partial(HybridAuON, apply_to="matrices"),
    "averages": Averages,
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def build(method, model, nonfinite, **options):
    params = [{"params": model.named_parameters(), "nonfinite": nonfinite, **options}]
    return method(params)


@every_method
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_raise_names_the_parameters_before_anything_moves(method, value):
    model = net()
    optimizer = build(method, model, "raise")
    fill(model, 0)
    optimizer.step()
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    fill(model, 1, {"1.bias": value, "2.weight": value})
    with pytest.raises(ValueError, match=r"2 gradient.*") as caught:
        optimizer.step()
    assert "'2.weight'" in str(caught.value)
    assert "'1.bias'" in str(caught.value)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[0][key])
    for index, state in optimizer.state_dict()["state"].items():
        assert torch.equal(
            torch.cat([torch.as_tensor(t).flatten() for t in state.values()]),
            torch.cat([torch.as_tensor(t).flatten() for t in before[1][index].values()]),
        )


def test_raise_without_names_tells_place_and_shape():
    model = net()
    optimizer = AuON([{"params": model.parameters(), "nonfinite": "raise"}])
    fill(model, 0, {"2.weight": NAN})
    with pytest.raises(ValueError, match=r"parameter 4 of its group, of shape \(5, 5\)"):
        optimizer.step()


@every_method
@pytest.mark.parametrize("first", [True, False])
def test_skip_leaves_the_bad_and_moves_the_others(method, first):
    bad = {"0.bias": INF, "2.weight": NAN}
    model, clean = net(), net()
    optimizer, reference = build(method, model, "skip"), build(method, clean, "ignore")
    if not first:
        for m, o in ((model, optimizer), (clean, reference)):
            fill(m, 0)
            o.step()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    states = {name: state_tensors(optimizer, p) for name, p in model.named_parameters()}
    fill(model, 1, bad)
    optimizer.step()
    fill(clean, 1)
    reference.step()
    for (name, p), q in zip(model.named_parameters(), clean.parameters(), strict=True):
        after = state_tensors(optimizer, p)
        if name not in bad:
            torch.testing.assert_close(p, q)
            continue
        assert torch.equal(p, before[name])
        assert all(t.isfinite().all() for t in after)
        if not first:
            assert all(torch.equal(a, b) for a, b in zip(after, states[name], strict=True))


# What a rule sets up at its first step it may set up from a zero gradient; hence not "averages", True.
@pytest.mark.parametrize(
    ("name", "first"), [("auon", True), ("hybrid", True), *((name, False) for name in METHODS)]
)
def test_after_a_skipped_step_all_goes_on_as_if_it_had_not_been(name, first):
    """Every gradient bad: the run equals one without that step, to the bit."""
    method = METHODS[name]
    model, clean = net(), net()
    optimizer, reference = build(method, model, "skip"), build(method, clean, "ignore")
    for step in range(4):
        if step == (0 if first else 2):
            fill(model, 9, {parameter: NAN for parameter, _ in model.named_parameters()})
            optimizer.step()
        fill(model, step)
        optimizer.step()
        fill(clean, step)
        reference.step()
    for p, q in zip(model.parameters(), clean.parameters(), strict=True):
        assert torch.equal(p, q)


def test_skip_works_on_pieces_and_half_precision():
    p = nn.Parameter(torch.ones(6, 4, dtype=torch.float16))
    optimizer = Averages([{"params": [p], "split": (4, 2), "nonfinite": "skip"}])
    p.grad = torch.full_like(p, 60_000.0)  # finite, though its square is not
    optimizer.step()
    assert (p < 1).all()
    before, states = p.detach().clone(), state_tensors(optimizer, p)
    p.grad[5, 3] = INF
    optimizer.step()
    assert torch.equal(p, before)
    assert all(torch.equal(a, b) for a, b in zip(state_tensors(optimizer, p), states, strict=True))


def test_skip_takes_empty_and_meta_tensors():
    empty = nn.Parameter(torch.ones(0, 4))
    empty.grad = torch.ones(0, 4)
    optimizer = AuON([{"params": [empty], "nonfinite": "skip"}])
    optimizer.step()
    model = net().to("meta")
    for p in model.parameters():
        p.grad = torch.empty_like(p)
    AuON([{"params": model.parameters(), "nonfinite": "skip"}]).step()


@pytest.mark.parametrize("bad", ["mask", None, True])
def test_unknown_policy(bad):
    with pytest.raises(ValueError, match="nonfinite"):
        AuON([{"params": [nn.Parameter(torch.ones(2, 2))], "nonfinite": bad}])


class TestMismatchedState:
    def pair(self, wide):
        first = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, wide))
        optimizer = AuON(first.named_parameters())
        for p in first.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        return first, optimizer

    def test_shapes_are_named_and_nothing_changes(self):
        _, saved = self.pair(5)
        model, optimizer = self.pair(3)
        before = [state_tensors(optimizer, p) for p in model.parameters()]
        optimizer.param_groups[0]["lr"] = 0.125
        with pytest.raises(ValueError, match=r"\(5, 4\).*'1.weight'.*\(3, 4\)"):
            optimizer.load_state_dict(saved.state_dict())
        assert optimizer.param_groups[0]["lr"] == 0.125
        for p, old in zip(model.parameters(), before, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(state_tensors(optimizer, p), old, strict=True))

    def test_another_division_into_rules(self):
        model, _ = self.pair(3)
        rule = AuON([{"params": model.parameters(), "use_matrix_rule": True}])
        other = AuON([{"params": model.parameters(), "use_matrix_rule": False}])
        with pytest.raises(ValueError, match="group 0 has use_matrix_rule=False"):
            other.load_state_dict(rule.state_dict())

    def test_another_number_of_groups_or_parameters(self):
        model, optimizer = self.pair(3)
        with pytest.raises(ValueError, match="number of parameter groups"):
            AuON(model.parameters(), apply_to="matrices").load_state_dict(optimizer.state_dict())
        with pytest.raises(ValueError, match="size of optimizer's group"):
            AuON(model[0].parameters()).load_state_dict(optimizer.state_dict())
