import copy
import io
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from weightlab.optim import ROOT, AuON, DCTAdamW, HybridAuON, MatrixOptimizer, Trion, split_named_parameters

METHODS = {
    "auon": AuON,
    "auon-code": partial(AuON, normalize=False, gamma=1.5, weight_decay=0.1),
    "auon-rms": partial(AuON, gamma="rms"),
    "hybrid": partial(HybridAuON, adjust_lr="match_rms_adamw"),
    "hybrid-bf16": partial(HybridAuON, ns_dtype=torch.bfloat16, ns_steps=3),
    "root": ROOT,
    "root-muon": partial(ROOT, clip_quantile=None, coefficients="muon", ns_dtype=torch.bfloat16),
    "dct-adamw": partial(DCTAdamW, rank=2, weight_decay=0.1),
    "dct-adamw-feedback": partial(DCTAdamW, rank=0.5, update_gap=2, error_feedback="int8"),
    "trion": partial(Trion, rank=2),
    "mixed": partial(HybridAuON, apply_to="matrices", adamw={"lr": 1e-2, "weight_decay": 0.1}),
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


class Sign(MatrixOptimizer):
    """The smallest subclass there is."""

    def __init__(self, params, lr=0.1, momentum=0.0, **options):
        super().__init__(params, {"lr": lr, "momentum": momentum}, **options)

    def direction(self, update, group):
        return update.sign()


class Shapes(Sign):
    """Notes what it is called with."""

    batched = False

    def __init__(self, *args, **kwargs):
        self.seen = []
        super().__init__(*args, **kwargs)

    def batches_equal_shapes(self, group):
        return self.batched

    def direction(self, update, group):
        self.seen.append(tuple(update.shape))
        return update


def model(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    layers = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 8),
        nn.LayerNorm(8),
        nn.Linear(8, 8),
        nn.Linear(8, 3),
    )
    return layers.to(dtype)


def backward(net, step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(5, 1, 4, 4, generator=generator).to(next(net.parameters()).dtype)
    loss = net(x).square().mean()
    loss.backward()
    return loss


def train(net, optimizer, steps, scheduler=None):
    for step in steps:
        optimizer.zero_grad()
        backward(net, step)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def weights(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def through_disk(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# ---- grouping


def test_unnamed_parameters_go_by_dimensions():
    net = model()
    optimizer = Sign(net.parameters())
    rule, adamw = optimizer.param_groups
    assert rule["use_matrix_rule"]
    assert not adamw["use_matrix_rule"]
    assert all(p.ndim >= 2 for p in rule["params"])
    assert all(p.ndim < 2 for p in adamw["params"])
    assert len(rule["params"]) + len(adamw["params"]) == len(list(net.parameters()))


def test_names_keep_embeddings_out():
    net = nn.ModuleDict({"wte": nn.Embedding(5, 4), "body": nn.Linear(4, 4), "lm_head": nn.Linear(4, 5)})
    rule, adamw = Sign(net.named_parameters()).param_groups
    assert rule["param_names"] == ["body.weight"]
    assert "wte.weight" in adamw["param_names"]


def test_groups_may_settle_it_and_take_their_own_options():
    net = model()
    matrices, rest = split_named_parameters(net)
    optimizer = Sign(
        [
            {"params": matrices, "use_matrix_rule": True, "lr": 0.5},
            {"params": rest, "use_matrix_rule": False, "lr": 0.25, "weight_decay": 0.125, "eps": 1e-6},
        ]
    )
    rule, adamw = optimizer.param_groups
    assert (rule["lr"], adamw["lr"], adamw["weight_decay"], adamw["eps"]) == (0.5, 0.25, 0.125, 1e-6)
    assert adamw["betas"] == (0.9, 0.95)


def test_split_group_gives_its_options_to_the_rule_and_adamw_its_entry():
    net = nn.Linear(3, 3)
    group = {"params": net.parameters(), "lr": 0.5, "weight_decay": 0.3, "adamw": {"lr": 0.25}}
    rule, adamw = Sign([group], adamw={"eps": 1e-5}).param_groups
    assert (rule["lr"], rule["weight_decay"]) == (0.5, 0.3)
    assert (adamw["lr"], adamw["weight_decay"], adamw["eps"]) == (0.25, 0.0, 1e-5)


def test_apply_to_all_makes_one_group():
    optimizer = AuON(model().parameters())
    assert [g["use_matrix_rule"] for g in optimizer.param_groups] == [True]


def test_added_group_is_split_and_moves():
    net, head = model(), nn.Linear(3, 3)
    optimizer = Sign(net.parameters())
    optimizer.add_param_group({"params": head.parameters(), "lr": 0.5})
    assert [g["use_matrix_rule"] for g in optimizer.param_groups] == [True, False, True, False]
    assert optimizer.param_groups[2]["lr"] == 0.5
    before = weights(head)
    head(torch.ones(3)).sum().backward()
    optimizer.step()
    assert (weights(head) != before).all()


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: Sign(nn.Linear(2, 2)), TypeError, "named_parameters"),
        (lambda: Sign([]), ValueError, "empty"),
        (lambda: Sign([torch.ones(2, 2, dtype=torch.cfloat)]), TypeError, "complex64"),
        (lambda: Sign([("steps", torch.ones(2, dtype=torch.long))]), TypeError, "'steps'.*int64"),
        (lambda: Sign([1.0]), TypeError, "float"),
        (lambda: Sign([{"params": {nn.Parameter(torch.ones(2))}}]), TypeError, "order"),
        (lambda: Sign([nn.Parameter(torch.ones(2, 2))] * 2), (ValueError, UserWarning), "duplicate"),
        (lambda: Sign([{"params": [nn.Parameter(torch.ones(2, 2))], "lr": -1}]), ValueError, "lr"),
        (lambda: Sign(nn.Linear(2, 2).parameters(), adamw={"lr": -1.0}), ValueError, "lr"),
        (lambda: Sign(nn.Linear(2, 2).parameters(), lr=torch.ones(2)), ValueError, "tensor lr"),
        (lambda: Sign(nn.Linear(2, 2).parameters()).add_param_group([]), TypeError, "list"),
    ],
)
def test_bad_parameters(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_sparse_gradient_is_refused_before_anything_moves():
    net = nn.ModuleDict({"body": nn.Linear(4, 4), "table": nn.Embedding(5, 4, sparse=True)})
    optimizer = Sign(net.named_parameters())
    net["body"](net["table"](torch.tensor([1, 2]))).sum().backward()
    before = weights(net)
    with pytest.raises(TypeError, match="sparse"):
        optimizer.step()
    assert torch.equal(weights(net), before)


# ---- the step


def test_adamw_for_the_rest_is_torchs():
    nets = model(), model()
    options = {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1}
    ours = Sign([{"params": nets[0].parameters(), "use_matrix_rule": False, **options}])
    theirs = torch.optim.AdamW(nets[1].parameters(), **options)
    train(nets[0], ours, range(4))
    train(nets[1], theirs, range(4))
    assert torch.equal(weights(nets[0]), weights(nets[1]))


def test_decay_momentum_and_rule_by_hand():
    w = nn.Parameter(torch.tensor([[1.0, -2.0]]))
    optimizer = Sign([w], lr=0.1, momentum=0.5)
    optimizer.param_groups[0]["weight_decay"] = 0.2
    w.grad = torch.tensor([[1.0, 1.0]])
    optimizer.step()
    torch.testing.assert_close(w.detach(), torch.tensor([[0.98 - 0.1, -1.96 - 0.1]]))
    w.grad = torch.tensor([[-3.0, 0.5]])  # buffer: 0.25 - 1.5 < 0, 0.25 + 0.25 > 0
    optimizer.step()
    torch.testing.assert_close(w.detach(), torch.tensor([[0.88 * 0.98 + 0.1, -2.06 * 0.98 - 0.1]]))


def test_kernels_are_flattened_and_equal_shapes_stacked():
    shapes = [(4, 6), (4, 6), (4, 3, 2), (4, 3, 2, 1), (2, 2), (4, 2, 3)]
    params = [nn.Parameter(torch.randn(s)) for s in shapes]
    for p in params:
        p.grad = torch.ones_like(p)
    one_by_one, stacked = Shapes(params), Shapes(params)
    stacked.batched = True
    one_by_one.step()
    stacked.step()
    assert sorted(one_by_one.seen) == sorted([(4, 6)] * 5 + [(2, 2)])
    assert sorted(stacked.seen) == [(2, 2), (5, 4, 6)]


def test_unflattened_rule_sees_the_parameters_own_shape():
    w = nn.Parameter(torch.ones(2, 3, 4))
    w.grad = torch.ones_like(w)
    optimizer = Shapes([w])
    optimizer.flatten = False
    optimizer.step()
    assert optimizer.seen == [(2, 3, 4)]


def test_rule_is_required():
    w = nn.Parameter(torch.ones(2, 2))
    w.grad = torch.ones_like(w)
    with pytest.raises(NotImplementedError, match="direction"):
        MatrixOptimizer([w], {"lr": 0.1}).step()


@every_method
def test_gradients_are_left_alone_and_none_is_skipped(method):
    net = model()
    optimizer = method(net.parameters())
    backward(net, 0)
    frozen = net[3].weight
    frozen.grad = None
    kept = frozen.detach().clone()
    grads = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    optimizer.step()
    assert torch.equal(frozen, kept)
    assert all(
        torch.equal(p.grad, g)
        for p, g in zip([p for p in net.parameters() if p.grad is not None], grads, strict=True)
    )


@every_method
def test_zero_gradient_moves_nothing_but_decay(method):
    net = model()
    optimizer = method(net.parameters())
    before = [p.detach().clone() for p in net.parameters()]
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    decayed = {id(p): 1 - g["lr"] * g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    for p, old in zip(net.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), old * decayed[id(p)])


@every_method
def test_nan_stays_with_its_parameter(method):
    net = model()
    optimizer = method(net.parameters())
    backward(net, 0)
    net[3].weight.grad[0, 0] = float("nan")
    optimizer.step()
    assert net[3].weight.isnan().any()
    assert not any(p.isnan().any() for name, p in net.named_parameters() if name != "3.weight")


@every_method
def test_same_run_twice_is_bit_identical(method):
    nets = model(), model()
    for net in nets:
        train(net, method(net.parameters()), range(3))
    assert torch.equal(weights(nets[0]), weights(nets[1]))


@every_method
def test_maximize_is_the_step_of_the_negated_gradient(method):
    nets = model(), model()
    optimizers = [method(nets[0].parameters(), maximize=True), method(nets[1].parameters())]
    for net in nets:
        backward(net, 0)
    for p in nets[1].parameters():
        p.grad.neg_()
    for optimizer in optimizers:
        optimizer.step()
    assert torch.equal(weights(nets[0]), weights(nets[1]))


@every_method
def test_foreach_equals_one_at_a_time(method):
    nets = model(), model()
    for net, foreach in zip(nets, (True, False), strict=True):
        train(net, method(net.parameters(), foreach=foreach), range(4))
    torch.testing.assert_close(weights(nets[0]), weights(nets[1]), rtol=1e-5, atol=1e-6)


@every_method
def test_tensor_lr_equals_float_lr(method):
    # In float64 and with an lr that binary holds exactly, only a wrong formula can tell the two apart.
    nets = model().double(), model().double()
    for net, lr in zip(nets, (torch.tensor(2.0**-6, dtype=torch.float64), 2.0**-6), strict=True):
        train(net, method(net.parameters(), lr=lr), range(3))
    torch.testing.assert_close(weights(nets[0]), weights(nets[1]), rtol=1e-12, atol=1e-14)


@every_method
def test_resumes_bit_exactly_from_a_safe_file(method):
    net = model()
    optimizer = method(net.named_parameters())
    train(net, optimizer, range(3))
    saved = through_disk({"model": net.state_dict(), "optimizer": optimizer.state_dict()})
    train(net, optimizer, range(3, 6))

    resumed = model(seed=1)
    again = method(resumed.named_parameters())
    resumed.load_state_dict(saved["model"])
    again.load_state_dict(saved["optimizer"])
    train(resumed, again, range(3, 6))
    assert torch.equal(weights(net), weights(resumed))


@every_method
def test_copies_go_their_own_way(method):
    net = model()
    optimizer = method(net.parameters())
    train(net, optimizer, range(2))
    twin, twin_optimizer = copy.deepcopy((net, optimizer))
    train(net, optimizer, range(2, 4))
    train(twin, twin_optimizer, range(2, 4))
    assert torch.equal(weights(net), weights(twin))


@every_method
def test_schedulers_scale_both_learning_rates(method):
    net = model()
    optimizer = method(net.parameters())
    peaks = [g["lr"] for g in optimizer.param_groups]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    train(net, optimizer, range(2), scheduler)
    assert [g["lr"] for g in optimizer.param_groups] == [peak * 0.25 for peak in peaks]


def test_one_cycle_scheduler_turns_momentum():
    optimizer = AuON(model().parameters())
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    assert optimizer.param_groups[0]["momentum"] == 0.95


@every_method
def test_closure_runs_with_gradients_and_its_loss_comes_back(method):
    net = model()
    optimizer = method(net.parameters())

    def closure():
        optimizer.zero_grad()
        return backward(net, 0)

    before = weights(net)
    assert optimizer.step(closure).requires_grad
    assert not torch.equal(weights(net), before)


@every_method
def test_grad_scaler_gives_the_unscaled_step_and_skips_overflow(method):
    nets = model(), model()
    plain, scaled = (method(net.parameters()) for net in nets)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    backward(nets[0], 0)
    plain.step()
    generator = torch.Generator().manual_seed(0)
    scaler.scale(nets[1](torch.randn(5, 1, 4, 4, generator=generator)).square().mean()).backward()
    scaler.step(scaled)
    scaler.update()
    assert torch.equal(weights(nets[0]), weights(nets[1]))

    before = weights(nets[1])
    for p in nets[1].parameters():
        p.grad.fill_(float("inf"))
    scaler.scale(torch.zeros(()))
    scaler.step(scaled)
    assert torch.equal(weights(nets[1]), before)


@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_follow_float32(method, dtype):
    net, wide = model(), model()
    net.to(dtype)
    for p, q in zip(net.parameters(), wide.parameters(), strict=True):
        q.data = p.detach().float()
        q.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(0)).to(dtype).float()
        p.grad = q.grad.to(dtype)
    method(net.parameters()).step()
    method(wide.parameters()).step()
    assert all(p.dtype == dtype for p in net.parameters())
    torch.testing.assert_close(
        weights(net).float(),
        weights(wide),
        rtol=2 * torch.finfo(dtype).eps,
        atol=1e-3 if dtype != torch.float64 else 1e-6,
    )


def test_small_steps_and_decay_survive_half_precision():
    """1 − lr·weight_decay rounds to 1 in bfloat16, but what is decayed and added is rounded only once."""
    w = nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    optimizer = AuON([w], lr=2.0**-9, weight_decay=1.0, gamma=0.0)
    w.grad = torch.ones_like(w)
    optimizer.step()  # 1 − 2⁻⁹ − 2⁻⁹/4: nearer to the next bfloat16 number, 1 − 2⁻⁸, than to 1
    assert (w == 1 - 2.0**-8).all()

    w = nn.Parameter(torch.zeros(4, 4, dtype=torch.float16))
    w.grad = torch.full_like(w, 2000.0)
    AuON([w], lr=1e-3, momentum=0.0, gamma=0.0).step()
    torch.testing.assert_close(w.float(), torch.full((4, 4), -1e-3 / 4), rtol=1e-3, atol=0)


@every_method
def test_memory_layout_does_not_matter(method):
    nets = model(), model().to(memory_format=torch.channels_last)
    with torch.no_grad():
        nets[1][3].weight = nn.Parameter(nets[1][3].weight.T.contiguous().T)
    for net in nets:
        train(net, method(net.parameters()), range(3))
    assert nets[1][3].weight.stride() == (1, 8)
    torch.testing.assert_close(weights(nets[0]), weights(nets[1]), rtol=1e-4, atol=1e-6)


class NoReadBack(TorchDispatchMode):
    """Fails on anything that hands a tensor's value to the host."""

    forbidden = frozenset(
        {"aten::_local_scalar_dense", "aten::item", "aten::equal", "aten::is_nonzero", "aten::nonzero"}
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func._schema.name not in self.forbidden, f"{func} reads a value back to the host"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["auon", "auon-code", "auon-rms"])
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_step_never_waits_for_the_device(name, tensor_lr):
    net = model()
    net.append(nn.Linear(3, 20_000))  # large enough for the brake's power sums
    net.append(nn.Linear(20_000, 40))
    optimizer = METHODS[name](net.parameters(), lr=torch.tensor(0.01) if tensor_lr else 0.01)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    with NoReadBack():
        optimizer.step()
    with pytest.raises(AssertionError, match="host"), NoReadBack():
        torch.ones(()).item()


@pytest.mark.parametrize("name", ["auon", "auon-rms", "hybrid", "root", "root-muon"])
def test_step_runs_where_no_values_exist(name):
    """Rules that may look at values on a CPU, where nothing waits for them, must not do so elsewhere."""
    net = model()
    net.append(nn.Linear(3, 400))
    net.append(nn.Linear(400, 90))
    net.to("meta")
    for p in net.parameters():
        p.grad = torch.empty_like(p)
    METHODS[name](net.parameters()).step()


@every_method
def test_training_goes_downhill(method):
    net = model()
    optimizer = method(net.parameters(), lr=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = backward(net, 0).item()
        for _ in range(20):
            optimizer.zero_grad()
            last = backward(net, 0).item()
            optimizer.step()
    assert last < 0.9 * first
