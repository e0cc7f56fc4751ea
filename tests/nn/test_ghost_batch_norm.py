from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from weightlab.nn import GhostBatchNorm, GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d
from weightlab.nn.ghost_batch_norm import divide, running_weights

KINDS: dict[int, tuple[type[GhostBatchNorm], type[nn.Module], tuple[int, ...]]] = {
    2: (GhostBatchNorm1d, nn.BatchNorm1d, ()),
    3: (GhostBatchNorm1d, nn.BatchNorm1d, (5,)),
    4: (GhostBatchNorm2d, nn.BatchNorm2d, (3, 4)),
    5: (GhostBatchNorm3d, nn.BatchNorm3d, (2, 3, 2)),
}
CHANNELS = 3


def images(batch: int, ndim: int = 2, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, CHANNELS, *KINDS[ndim][2])
    return torch.randn(shape, generator=generator, dtype=torch.float64).mul(2).add(1).to(dtype)


def pair(ndim: int, ghost_size: int, **options: Any) -> tuple[GhostBatchNorm, Any]:
    """A ghost layer and PyTorch's, with the same unremarkable weights and buffers."""
    ghost, plain, _ = KINDS[ndim]
    ours = ghost(CHANNELS, ghost_size, dtype=torch.float64, **options)
    shared = {k: v for k, v in options.items() if k in ("eps", "momentum", "affine", "track_running_stats")}
    theirs = plain(CHANNELS, dtype=torch.float64, **shared)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, tensor in theirs.state_dict().items():
            if name != "num_batches_tracked":
                tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype) + 0.5)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def run(layer: nn.Module, pieces: list[Tensor]) -> tuple[list[Tensor], list[Tensor], dict[str, Tensor]]:
    """Outputs, gradients of each piece and of the parameters, and the buffers after it."""
    pieces = [piece.detach().requires_grad_() for piece in pieces]
    outputs = [layer(piece) for piece in pieces]
    sum((y.sin() * (1 + torch.arange(y.numel()).view_as(y) % 7)).sum() for y in outputs).backward()
    grads = [p.grad for p in (*pieces, *layer.parameters())]
    assert all(g is not None for g in grads)
    return [y.detach() for y in outputs], grads, {k: v.clone() for k, v in layer.named_buffers()}


def ghost_rows(batch: int, ghost_size: int, assignment: str, remainder: str) -> list[list[int]]:
    """Members of each ghost, from the definition."""
    if batch <= ghost_size:
        return [list(range(batch))]
    rest = batch % ghost_size
    tail = 0 if rest == 0 else rest + ghost_size if remainder == "merge" else rest
    whole = (batch - tail) // ghost_size
    if assignment == "contiguous":
        ghosts = [list(range(i * ghost_size, (i + 1) * ghost_size)) for i in range(whole)]
    else:
        ghosts = [[r for r in range(batch - tail) if r % whole == i] for i in range(whole)]
    return ghosts + ([list(range(batch - tail, batch))] if tail else [])


def assert_same(ours: Any, theirs: Any, **tolerance: float) -> None:
    torch.testing.assert_close(ours, theirs, **(tolerance or {"rtol": 1e-11, "atol": 1e-11}))


def check_against_loop(x: Tensor, ndim: int, ghost_size: int, **options: Any) -> None:
    ours, theirs = pair(ndim, ghost_size, **options)
    rows = ghost_rows(
        len(x), ghost_size, options.get("assignment", "contiguous"), options.get("remainder", "merge")
    )
    x = x.detach()
    (y,), (gx, *parameters), buffers = run(ours, [x])
    # The gradient of the reference needs the same weights on the outputs, so those go along with the rows.
    leaf = x.clone(memory_format=torch.contiguous_format).requires_grad_()
    outputs = []
    for members in rows:
        outputs.append(theirs(leaf[members]))
    order = torch.tensor([row for members in rows for row in members])
    reference = torch.cat(outputs)[order.argsort()]
    (reference.sin() * (1 + torch.arange(reference.numel()).view_as(reference) % 7)).sum().backward()
    assert_same(y, reference.detach(), rtol=1e-11, atol=1e-11)
    assert_same(gx, leaf.grad)
    assert_same(parameters, [p.grad for p in theirs.parameters()])
    assert_same(buffers, dict(theirs.named_buffers()))


@pytest.mark.parametrize("assignment", ["contiguous", "strided"])
@pytest.mark.parametrize(
    ("ndim", "batch", "remainder"),
    [
        *((ndim, batch, "merge") for ndim in KINDS for batch in (12, 13, 15)),
        *((ndim, batch, "keep") for ndim in KINDS for batch in (13, 15) if (ndim, batch) != (2, 13)),
        (2, 12, "error"),
    ],
)
def test_equals_a_loop_over_the_ghosts(ndim: int, assignment: str, batch: int, remainder: str):
    check_against_loop(images(batch, ndim), ndim, 4, assignment=assignment, remainder=remainder)


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}, {"momentum": None}])
@pytest.mark.parametrize("assignment", ["contiguous", "strided"])
def test_equals_the_loop_with_other_settings(options: dict[str, Any], assignment: str):
    check_against_loop(images(14, 4), 4, 4, assignment=assignment, eps=0.3, **options)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(2, 40),
    st.integers(2, 12),
    st.sampled_from(["contiguous", "strided"]),
    st.sampled_from([0.0, 0.01, 0.5, 1.0, None]),
)
def test_equals_the_loop_for_any_sizes(batch: int, ghost_size: int, assignment: str, momentum: float | None):
    check_against_loop(images(batch), 2, ghost_size, assignment=assignment, momentum=momentum)


def test_momentum_none_averages_over_all_ghosts_of_all_batches():
    ours, _ = pair(2, 4, momentum=None)
    ours.reset_running_stats()
    batches = [images(8, seed=0), images(12, seed=1), images(4, seed=2)]
    for batch in batches:
        ours(batch)
    ghosts = [ghost for batch in batches for ghost in batch.split(4)]
    assert_same(ours.running_mean, torch.stack([g.mean(0) for g in ghosts]).mean(0))
    assert_same(ours.running_var, torch.stack([g.var(0) for g in ghosts]).mean(0))
    assert ours.num_batches_tracked == len(ghosts)


@pytest.mark.parametrize("assignment", ["contiguous", "strided"])
@pytest.mark.parametrize("batch", [5, 8])
def test_batches_up_to_a_ghost_are_plain_batch_norm_to_the_bit(assignment: str, batch: int):
    ours, theirs = pair(4, 8, assignment=assignment, remainder="error")
    torch.testing.assert_close(run(ours, [images(batch, 4)]), run(theirs, [images(batch, 4)]), rtol=0, atol=0)


@pytest.mark.parametrize("assignment", ["contiguous", "strided"])
def test_ghosts_of_equal_content_are_plain_batch_norm(assignment: str):
    ours, theirs = pair(2, 6, assignment=assignment)
    ghost = images(6)
    x = ghost.repeat(4, 1) if assignment == "contiguous" else ghost.repeat_interleave(4, 0)
    assert_same(ours(x), theirs(x))


@pytest.mark.parametrize("ndim", KINDS)
def test_each_ghost_gets_mean_beta_and_deviation_gamma(ndim: int):
    ours, _ = pair(ndim, 4, eps=0.1)
    x = images(12, ndim)
    for before, after in zip(x.split(4), ours(x).detach().split(4), strict=True):
        dims = [0, *range(2, ndim)]
        variance = before.var(dims, correction=0)
        assert_same(after.mean(dims), ours.bias.detach())
        assert_same(
            after.std(dims, correction=0), ours.weight.detach().abs() * (variance / (variance + 0.1)).sqrt()
        )


@pytest.mark.parametrize("assignment", ["contiguous", "strided"])
def test_gradients_stay_within_the_ghost(assignment: str):
    ours, _ = pair(2, 4, assignment=assignment)
    x = images(12).requires_grad_()
    ours(x)[0].square().sum().backward()
    touched = x.grad.abs().sum(1).nonzero().flatten().tolist()
    assert touched == ghost_rows(12, 4, assignment, "merge")[0]


@pytest.mark.parametrize("track", [True, False])
def test_evaluation_has_no_ghosts(track: bool):
    ours, theirs = pair(2, 2, track_running_stats=track)
    for batch in (1, 7) if track else (7,):
        assert torch.equal(ours.eval()(images(batch)), theirs.eval()(images(batch)))


class TestRunningStatistics:
    @given(st.integers(1, 200), st.floats(0, 1))
    @settings(max_examples=50, deadline=None)
    def test_weights_and_what_is_kept_sum_to_one(self, count: int, momentum: float):
        weights = running_weights(count, momentum, torch.zeros((), dtype=torch.float64))
        assert float(weights.sum()) + (1 - momentum) ** count == pytest.approx(1, abs=1e-12)

    def test_one_ghost_is_the_ordinary_update(self):
        assert running_weights(1, 0.1, torch.zeros(())).tolist() == pytest.approx([0.1])

    def test_paper_momentum_forgets_nearly_all_in_32_ghosts(self):
        layer = GhostBatchNorm1d(1, ghost_size=2)
        layer.running_mean.fill_(1.0)
        layer(torch.tensor([[-1.0], [1.0]]).repeat(32, 1))
        assert layer.running_mean.item() == pytest.approx(0.9**32, rel=1e-5)

    def test_momentum_per_batch_forgets_as_plain_batch_norm_does(self):
        layer = GhostBatchNorm1d(1, ghost_size=2, momentum_per="batch")
        layer.running_mean.fill_(1.0)
        layer(torch.tensor([[-1.0], [1.0]]).repeat(32, 1))
        assert layer.running_mean.item() == pytest.approx(0.9, rel=1e-5)

    def test_autocast_does_not_reach_them(self):
        plain, cast = GhostBatchNorm1d(CHANNELS, 4), GhostBatchNorm1d(CHANNELS, 4)
        x = images(12, dtype=torch.float32)
        plain(x)
        with torch.autocast("cpu", torch.bfloat16):
            cast(x)
        torch.testing.assert_close(plain.running_var, cast.running_var, rtol=0, atol=0)


class TestLayouts:
    @pytest.mark.parametrize("assignment", ["contiguous", "strided"])
    @pytest.mark.parametrize("batch", [12, 14])
    @pytest.mark.parametrize(("ndim", "layout"), [(4, torch.channels_last), (5, torch.channels_last_3d)])
    def test_channels_last_comes_out_as_it_went_in(
        self, assignment: str, batch: int, ndim: int, layout: torch.memory_format
    ):
        x = images(batch, ndim).contiguous(memory_format=layout)
        check_against_loop(x, ndim, 4, assignment=assignment)
        ours, _ = pair(ndim, 4, assignment=assignment)
        assert ours(x).is_contiguous(memory_format=layout)

    @pytest.mark.parametrize("assignment", ["contiguous", "strided"])
    def test_views_that_are_not_contiguous(self, assignment: str):
        wide = images(24, 4)
        for x in (
            wide[::2],
            wide.transpose(2, 3)[:12],
            wide[:12, :, :, ::2],
            wide[:1].expand(12, -1, -1, -1),
        ):
            assert not x.is_contiguous()
            check_against_loop(x, 4, 4, assignment=assignment)

    @pytest.mark.parametrize("assignment", ["contiguous", "strided"])
    @pytest.mark.parametrize("half", [False, True])
    def test_bfloat16(self, assignment: str, half: bool):
        x = images(13, 4, dtype=torch.bfloat16)
        layer = GhostBatchNorm2d(CHANNELS, 4, assignment=assignment)
        reference = copy.deepcopy(layer)
        if half:
            layer.to(torch.bfloat16)
        y = layer(x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), reference(x.float()), rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(layer.running_var.float(), reference.running_var, rtol=1e-2, atol=1e-2)

    def test_transposing_fold_equals_one_by_one(self):
        """The path that other devices take for contiguous ghosts, on a CPU."""
        from weightlab.nn.ghost_batch_norm import _folded, ghost_normalize

        for x in (images(12, 2), images(12, 4), images(12, 4).contiguous(memory_format=torch.channels_last)):
            weight, bias = torch.rand(2, CHANNELS, dtype=torch.float64)
            first, second = torch.zeros(2, 2, 3, CHANNELS, dtype=torch.float64)
            folded = _folded(x, 3, weight, bias, first, 1e-5, transposed=True)
            assert_same(folded, ghost_normalize(x, divide(12, 4), weight, bias, second))
            assert_same(first, second)
            assert folded.stride() == x.stride()


class TestAutograd:
    @pytest.mark.parametrize("assignment", ["contiguous", "strided"])
    @pytest.mark.parametrize("ndim", [2, 4])
    def test_first_and_second_derivatives(self, assignment: str, ndim: int):
        ours, _ = pair(ndim, 3, assignment=assignment)
        x = images(7, ndim)[..., :2].contiguous() if ndim == 4 else images(7, ndim)
        weight, bias = ours.weight.detach().requires_grad_(), ours.bias.detach().requires_grad_()

        def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return torch.func.functional_call(ours, {"weight": weight, "bias": bias}, (x,))

        assert torch.autograd.gradcheck(call, (x.requires_grad_(), weight, bias))
        if ndim == 2:
            assert torch.autograd.gradgradcheck(call, (x, weight, bias))

    @pytest.mark.parametrize("assignment", ["contiguous", "strided"])
    def test_compiles_without_a_graph_break(self, assignment: str):
        layer, eager = pair(4, 4, assignment=assignment)[0], pair(4, 4, assignment=assignment)[0]
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        x = images(14, 4)
        ours, theirs = run(compiled, [x]), run(eager, [x])
        assert_same(ours[:2], theirs[:2])
        assert_same(dict(layer.named_buffers()), dict(eager.named_buffers()))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.body = nn.Sequential(
            nn.Linear(4 * 36, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(F.relu(self.norm(self.conv(x))).flatten(1))


class TestConvert:
    def test_one_pass_equals_accumulation_over_micro_batches(self):
        torch.manual_seed(0)
        net = Net().double()
        converted = GhostBatchNorm.convert(copy.deepcopy(net), ghost_size=8)
        x, labels = torch.randn(32, 1, 8, 8, dtype=torch.float64), torch.randint(3, (32,))
        F.cross_entropy(converted(x), labels).backward()
        for piece, wanted in zip(x.split(8), labels.split(8), strict=True):
            (F.cross_entropy(net(piece), wanted) / 4).backward()
        for (name, ours), theirs in zip(converted.named_parameters(), net.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12, msg=name)
        assert_same(dict(converted.named_buffers()), dict(net.named_buffers()), rtol=1e-12, atol=1e-12)

    def test_keeps_objects_settings_and_mode(self):
        net = nn.Sequential(nn.BatchNorm1d(4, eps=0.1, momentum=None, affine=False), nn.BatchNorm2d(3).eval())
        net[1].weight.requires_grad_(False)
        before = dict(net.state_dict(keep_vars=True))
        converted = GhostBatchNorm.convert(
            net, 16, assignment="strided", remainder="keep", momentum_per="batch"
        )
        assert converted is net
        assert {k: id(v) for k, v in net.state_dict(keep_vars=True).items()} == {
            k: id(v) for k, v in before.items()
        }
        one, two = net
        assert isinstance(one, GhostBatchNorm1d)
        assert isinstance(two, GhostBatchNorm2d)
        assert (one.eps, one.momentum, one.affine, one.training, two.training) == (
            0.1,
            None,
            False,
            True,
            False,
        )
        assert (one.ghost_size, one.assignment, one.remainder, one.momentum_per) == (
            16,
            "strided",
            "keep",
            "batch",
        )
        assert not two.weight.requires_grad

    def test_converts_the_root_shared_layers_and_ghosts(self):
        assert isinstance(GhostBatchNorm.convert(nn.BatchNorm3d(2)), GhostBatchNorm3d)
        shared = nn.BatchNorm1d(2)
        net = GhostBatchNorm.convert(nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)}), 8)
        assert net["a"] is net["b"][0]
        again = GhostBatchNorm.convert(net, 4)
        assert again["a"].ghost_size == 4
        assert again["a"].weight is shared.weight

    def test_a_dimension_s_class_converts_that_dimension(self):
        net = GhostBatchNorm2d.convert(Net(), 8)
        assert type(net.norm) is GhostBatchNorm2d
        assert type(net.body[1]) is nn.BatchNorm1d

    def test_leaves_alone_what_may_do_more(self):
        class WithActivation(nn.BatchNorm1d):
            def forward(self, input: Tensor) -> Tensor:
                return super().forward(input).relu()

        net = GhostBatchNorm.convert(nn.Sequential(WithActivation(2), nn.SyncBatchNorm(2), nn.LayerNorm(2)))
        assert [type(layer) for layer in net] == [WithActivation, nn.SyncBatchNorm, nn.LayerNorm]

    def test_lazy_layers_must_have_seen_a_batch(self):
        net = nn.Sequential(nn.LazyBatchNorm1d())
        with pytest.raises(ValueError, match="run a batch through"):
            GhostBatchNorm.convert(net)
        net(torch.randn(4, 3))
        assert isinstance(GhostBatchNorm.convert(net)[0], GhostBatchNorm1d)

    @pytest.mark.parametrize("ndim", KINDS)
    def test_state_dicts_go_both_ways(self, ndim: int):
        ours, theirs = pair(ndim, 4)
        ours(images(12, ndim))
        theirs.load_state_dict(ours.state_dict())
        assert torch.equal(ours.eval()(images(3, ndim)), theirs.eval()(images(3, ndim)))

    def test_update_bn_of_weight_averaging_counts_every_ghost(self):
        layer = GhostBatchNorm1d(CHANNELS, 4, dtype=torch.float64)
        batches = [images(8, seed=seed) for seed in range(3)]
        torch.optim.swa_utils.update_bn(batches, layer)
        assert_same(layer.running_mean, torch.cat(batches).mean(0))
        assert layer.momentum == 0.1


class TestBadInput:
    @pytest.mark.parametrize("size", [2.0, "2", True, None])
    def test_ghost_size_must_be_an_integer(self, size: Any):
        with pytest.raises(TypeError, match=r"ghost_size must be an integer.*got"):
            GhostBatchNorm1d(2, size)

    @pytest.mark.parametrize("size", [0, -3])
    def test_ghost_size_must_be_positive(self, size: int):
        with pytest.raises(ValueError, match=f"ghost_size must be at least 1, got {size}"):
            GhostBatchNorm1d(2, size)

    @pytest.mark.parametrize("option", ["assignment", "remainder", "momentum_per"])
    def test_options_are_listed(self, option: str):
        with pytest.raises(ValueError, match=rf"{option} must be one of \w+, \w+.*got 'x'"):
            GhostBatchNorm1d(2, **{option: "x"})

    @pytest.mark.parametrize(
        "layer", [GhostBatchNorm1d(2, 2), GhostBatchNorm2d(2, 2), GhostBatchNorm3d(2, 2)]
    )
    def test_wrong_dimensions(self, layer: GhostBatchNorm):
        with pytest.raises(ValueError, match=r"expected .*D"):
            layer(torch.randn(4, 2, 1, 1, 1, 1))

    def test_wrong_channels(self):
        with pytest.raises(ValueError, match="3 channels, not num_features=2"):
            GhostBatchNorm1d(2, 2)(torch.randn(4, 3))

    def test_remainder_can_be_refused(self):
        with pytest.raises(ValueError, match="a batch of 5 is no multiple of ghost_size=2"):
            GhostBatchNorm1d(2, 2, remainder="error")(torch.randn(5, 2))

    @pytest.mark.parametrize(("size", "batch"), [(1, 4), (4, 9)])
    def test_one_value_a_channel_has_no_variance(self, size: int, batch: int):
        layer = GhostBatchNorm1d(2, size, remainder="keep")
        before = copy.deepcopy(layer.state_dict())
        with pytest.raises(ValueError, match="a ghost of 1 sample has one value a channel"):
            layer(torch.randn(batch, 2))
        assert_same(layer.state_dict(), before)
        assert GhostBatchNorm1d(2, size, remainder="keep")(torch.randn(batch, 2, 3)).isfinite().all()

    def test_nan_stays_within_its_ghost(self):
        x = images(12)
        x[5] = math.nan
        for assignment in ("contiguous", "strided"):
            layer, _ = pair(2, 4, assignment=assignment)
            bad = layer(x).isnan().any(1).nonzero().flatten().tolist()
            ghosts = ghost_rows(12, 4, assignment, "merge")
            assert bad == next(members for members in ghosts if 5 in members)


@given(st.integers(1, 500), st.integers(1, 64), st.sampled_from(["merge", "keep"]))
@settings(max_examples=100, deadline=None)
def test_division_covers_the_batch(batch: int, size: int, remainder: Any):
    ghosts = divide(batch, size, remainder)
    assert ghosts.whole * size + ghosts.tail == batch
    assert ghosts.tail < (2 * size if remainder == "merge" else size) or ghosts == (0, batch)
