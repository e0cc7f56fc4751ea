"""Checks of distributed optimizers, run by four processes together: `distributed_checks.py FOLDER [CHECK ...]`.

Every check returns figures, which `test_distributed.py` holds against thresholds. One start of the processes
serves all checks: two-rank groups are the rows of a 2×2 mesh, both of which do the same.
"""

import copy
import json
import multiprocessing
import multiprocessing.connection
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from weightlab.linalg import newton_schulz
from weightlab.optim import (
    ARO,
    ROOT,
    AuON,
    DCTAdamW,
    HybridAuON,
    MatrixOptimizer,
    Trion,
    consolidate,
    distribute,
)
from weightlab.optim.matrix_optimizer import Directions, LowRank

WORLD = 4


class Net(nn.Module):
    """Matrices of equal and of odd shapes, fewer rows than ranks, a kernel, and vectors."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3)
        self.inner = nn.Linear(6, 9)
        self.norm = nn.LayerNorm(9)
        self.equal = nn.ModuleList([nn.Linear(9, 9) for _ in range(3)])
        self.outer = nn.Linear(9, 2)

    def forward(self, x):
        x = self.norm(self.inner(self.conv(x).mean((2, 3))))
        for layer in self.equal:
            x = x + layer(x).relu()
        return self.outer(x)


class Alone(MatrixOptimizer):
    """Newton-Schulz, one matrix at a time, so that a share of the matrices runs the same kernels as all."""

    def __init__(self, params, lr=0.02, momentum=0.9, **options):
        self.seen = []
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "nesterov": True, "weight_decay": 0.1}, **options
        )

    def direction(self, update, group):
        self.seen.append(tuple(update.shape))
        return newton_schulz(update, "muon", 5)


class Keeping(MatrixOptimizer):
    """A rule that keeps tensors of several kinds and a number, and gives low-rank directions."""

    def __init__(self, params, lr=0.02, momentum=0.9, **options):
        super().__init__(params, {"lr": lr, "momentum": momentum}, **options)

    def directions(self, updates, states, group):
        found = []
        for update, state in zip(updates, states, strict=True):
            gram = state.setdefault("gram", torch.zeros(len(update), len(update), dtype=torch.float64))
            state["calls"] = state.get("calls", 0) + 1
            state["row"] = gram.diagonal().argmin().reshape(1)
            gram.mul_(0.5).add_(update.double() @ update.double().mT)
            gram[state["row"], state["row"]] += 0.01
            left = torch.linalg.solve(gram + 1e-3 * torch.eye(len(gram)), update.double()).to(update.dtype)
            found.append(LowRank(left, torch.eye(update.shape[1], dtype=update.dtype)))
        return Directions(found, [torch.full((), 0.5)] * len(found))


def small_adamw(method, **options):
    return partial(method, adamw={"lr": 1e-3}, **options)


METHODS = {
    "alone": small_adamw(Alone),
    "hybrid": small_adamw(HybridAuON, apply_to="matrices", adjust_lr="match_rms_adamw", weight_decay=0.1),
    "hybrid on all": partial(HybridAuON, normalize=True, gamma=1.0),
    "auon": partial(AuON, weight_decay=0.1),
    "root": small_adamw(ROOT),
    "aro": small_adamw(ARO, lr=0.01),
    "dct": small_adamw(DCTAdamW, rank=3, error_feedback="int8"),
    "trion": small_adamw(Trion, rank=0.5),
    "keeping": small_adamw(Keeping),
    "keeping pieces": small_adamw(Keeping, momentum=0.0),
    "split": small_adamw(Alone),
}


def make(method, net):
    if method not in ("split", "keeping pieces"):
        return METHODS[method](net.named_parameters())
    named = dict(net.named_parameters())
    fused = [(name, p) for name, p in named.items() if name.startswith("equal") and p.ndim == 2]
    rest = [(name, p) for name, p in named.items() if name not in dict(fused)]
    groups = [{"params": rest}, {"params": fused, "use_matrix_rule": True, "split": (4, 5)}]
    return METHODS[method](groups)


def build(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return Net().to(dtype)


def gradients(net, step):
    """The same on every rank, and for whole and sharded parameters."""
    generator = torch.Generator().manual_seed(step)
    for p in net.parameters():
        g = torch.randn(p.shape, generator=generator).to(p.dtype)
        p.grad = as_placed(g, p)


def as_placed(tensor, like):
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def advance(net, optimizer, steps):
    for step in steps:
        gradients(net, step)
        optimizer.step()


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def weights(net):
    return [whole(p) for p in net.parameters()]


def error(net, reference):
    """The largest difference of weights, relative to the largest weight of the parameter."""
    return max(
        float((a - b).abs().max() / b.abs().max())
        for a, b in zip(weights(net), weights(reference), strict=True)
    )


def shard(net, mesh):
    for layer in net.equal:
        fully_shard(layer, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def pairs():
    """The 2×2 mesh, and of it the row that this rank is in."""
    if not hasattr(pairs, "mesh"):
        pairs.mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    return pairs.mesh


def layouts():
    return {
        "copies on 4": lambda net: (net, None),
        "copies on 2": lambda net: (net, pairs()["shard"].get_group()),
        "shards on 4": lambda net: (shard(net, init_device_mesh("cpu", (WORLD,))), ()),
        "shards on 2": lambda net: (shard(net, pairs()["shard"]), ()),
        "2 copies in 2 shards": lambda net: (shard(net, pairs()), ()),
    }


def placed(layout, method, net):
    net, group = layouts()[layout](net)
    optimizer = make(method, net)
    return net, optimizer if group == () else distribute(optimizer, group)


def every_rank_agrees(net):
    """Whether weights are the same bits on every rank."""
    flat = torch.cat([w.flatten().double() for w in weights(net)])
    low, high = flat.clone(), flat.clone()
    dist.all_reduce(low, dist.ReduceOp.MIN)
    dist.all_reduce(high, dist.ReduceOp.MAX)
    return bool((low == high).all())


def raised(error_type, action):
    try:
        action()
    except error_type as problem:
        return str(problem)
    return None


# ---- checks


def check_steps(folder):
    """The same weights as in one process, for every method in every layout."""
    figures = {}
    for layout in layouts():
        for method in (
            METHODS if layout in ("copies on 4", "2 copies in 2 shards") else ("alone", "hybrid", "aro")
        ):
            reference = build()
            advance(reference, make(method, reference), range(4))
            net, optimizer = placed(layout, method, build())
            advance(net, optimizer, range(4))
            figures[f"{layout}: {method}"] = [error(net, reference), every_rank_agrees(net)]
    return figures


def check_half_precision(folder):
    figures = {}
    for layout in layouts():
        reference = build(torch.bfloat16)
        advance(reference, make("alone", reference), range(3))
        net, optimizer = placed(layout, "alone", build(torch.bfloat16))
        advance(net, optimizer, range(3))
        figures[layout] = error(net, reference)
    return figures


def check_work_is_shared(folder):
    """Each matrix is seen whole, and by one rank of those that hold it."""
    figures = {}
    matrices = sorted(tuple(p.flatten(1).shape) for p in build().parameters() if p.ndim > 1)
    for layout, holders in (
        ("copies on 4", 4),
        ("copies on 2", 2),
        ("shards on 4", 4),
        ("2 copies in 2 shards", 4),
    ):
        net, optimizer = placed(layout, "alone", build())
        advance(net, optimizer, range(1))
        seen = [None] * WORLD
        dist.all_gather_object(seen, optimizer.seen)
        together = [shape for shapes in seen[:holders] for shape in shapes]
        figures[layout] = {
            "once each": sorted(together) == matrices,
            "each works": all(seen),
            "momentum is sharded": isinstance(optimizer.state[net.inner.weight]["momentum_buffer"], DTensor),
        }
    return figures


def check_linear_rules_do_not_talk(folder):
    net, optimizer = placed("copies on 4", "auon", build())
    if dist.get_rank() == 0:
        advance(net, optimizer, range(2))
    dist.barrier()
    return {"owners": [optimizer.sharing.owner(p) for p in net.parameters()]}


def check_data_parallel_training(folder):
    """Real DDP, each rank with data of its own, against one process with all of the data."""
    figures = {}
    x = torch.randn(8, 1, 5, 5, generator=torch.Generator().manual_seed(5))
    mine = x.chunk(WORLD)[dist.get_rank()]
    for layout in ("copies", "shards"):
        reference = build()
        net = build()
        if layout == "copies":
            run = nn.parallel.DistributedDataParallel(net)
            optimizer = distribute(make("hybrid", net))
        else:
            run = net = shard(net, init_device_mesh("cpu", (WORLD,)))
            optimizer = make("hybrid", net)
        expected = make("hybrid", reference)
        schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in (optimizer, expected)]
        for _ in range(4):
            for model, data, o in ((run, mine, optimizer), (reference, x, expected)):
                o.zero_grad()
                model(data).square().mean().backward()
                o.step()
            for schedule in schedules:
                schedule.step()
        figures[layout] = [error(net, reference), every_rank_agrees(net)]
    return figures


def check_options(folder):
    """Groups, missing gradients, added groups, tensor learning rates."""
    figures = {}
    for layout in ("copies on 4", "shards on 4"):
        nets = [build(), build()]
        nets[1], group = layouts()[layout](nets[1])
        optimizers = []
        for net in nets:
            params = list(net.parameters())
            optimizer = Alone(
                [{"params": params[:4], "lr": torch.tensor(0.1)}, {"params": params[4:8], "maximize": True}],
                adamw={"weight_decay": 0.1},
            )
            optimizers.append(optimizer)
        if group != ():
            distribute(optimizers[1], group)
        for net, optimizer in zip(nets, optimizers, strict=True):
            gradients(net, 0)
            net.inner.weight.grad = None
            optimizer.step()
            optimizer.add_param_group({"params": list(net.parameters())[8:], "nesterov": False})
            advance(net, optimizer, (1, 2))
        figures[layout] = error(nets[1], nets[0])
    return figures


def check_nonfinite(folder):
    """NaN in the rows of one rank: all ranks leave that matrix alone, or all raise."""
    figures = {}
    for layout in ("copies on 4", "shards on 4", "2 copies in 2 shards"):
        for method in ("hybrid", "keeping"):
            nets, optimizers = [build(), build()], []
            optimizers.append(make(method, nets[0]))
            nets[1], optimizer = placed(layout, method, nets[1])
            optimizers.append(optimizer)
            for net, optimizer in zip(nets, optimizers, strict=True):
                for group in optimizer.param_groups:
                    group["nonfinite"] = "skip"
                for step in range(4):
                    gradients(net, step)
                    for p in (net.equal[1].weight, net.norm.weight):
                        g = whole(p.grad).clone()
                        g.view(-1)[0] = torch.nan if step % 2 == 0 else 1.0
                        p.grad = as_placed(g, p)
                    optimizer.step()
            before = weights(nets[1])
            for group in optimizers[1].param_groups:
                group["nonfinite"] = "raise"
            gradients(nets[1], 0)
            g = torch.zeros(9, 9)
            g[0, 0] = torch.inf
            nets[1].equal[0].weight.grad = as_placed(g, nets[1].equal[0].weight)
            message = raised(ValueError, optimizers[1].step)
            figures[f"{layout}: {method}"] = {
                "error": error(nets[1], nets[0]),
                "message": message,
                "unmoved": all(map(torch.equal, weights(nets[1]), before)),
            }
    return figures


def check_state_of_owners(folder):
    """What a rule keeps lives on one rank, is whole in state dicts, and goes on from there on any number."""
    figures = {}
    for method in ("keeping", "keeping pieces", "aro", "dct"):
        reference = build()
        expected = make(method, reference)
        advance(reference, expected, range(3))
        saved = {}
        for layout in ("copies on 4", "copies on 2", "shards on 4", "2 copies in 2 shards"):
            net, optimizer = placed(layout, method, build())
            advance(net, optimizer, range(3))
            matrices = [p for p in net.parameters() if p.ndim > 1]
            counts = torch.tensor(
                [len(set(optimizer.state[p]) - {"momentum_buffer"}) > 0 for p in matrices]
            ).int()
            dist.all_reduce(counts)
            state = optimizer.state_dict()
            figures[f"{layout}: {method}"] = {
                "holders": counts.unique().tolist(),
                "state error": difference(state["state"], expected.state_dict()["state"]),
                "local after": sum(len(s) for s in optimizer.state.values())
                < sum(len(s) for s in state["state"].values()),
            }
            saved[layout] = copy.deepcopy((net.state_dict(), state))
        advance(reference, expected, range(3, 6))
        for source, target in (
            ("copies on 4", "1"),
            ("copies on 4", "copies on 2"),
            ("copies on 2", "copies on 4"),
        ):
            net = build(seed=1)
            net, optimizer = (net, make(method, net)) if target == "1" else placed(target, method, net)
            # Optimizers work on in the tensors that they load.
            weights_, state = copy.deepcopy(saved[source])
            net.load_state_dict(weights_)
            optimizer.load_state_dict(state)
            advance(net, optimizer, range(3, 6))
            figures[f"{method}: {source} -> {target}"] = error(net, reference)
    return figures


def difference(state, expected):
    """The largest difference between tensors of two nested states; NaN if their keys or kinds differ."""
    if isinstance(expected, torch.Tensor):
        state = whole(state)
        if state.shape != expected.shape or state.dtype != expected.dtype:
            return float("nan")
        return float((state.double() - expected.double()).abs().max()) if expected.numel() else 0.0
    if isinstance(expected, (dict, list)):
        if type(state) is not type(expected) or len(state) != len(expected):
            return float("nan")
        keys = expected if isinstance(expected, dict) else range(len(expected))
        if isinstance(expected, dict) and set(state) != set(expected):
            return float("nan")
        differences = [difference(state[key], expected[key]) for key in keys]
        return max(differences, default=0.0) if not any(d != d for d in differences) else float("nan")
    return 0.0 if state == expected else float("nan")


def check_consolidate(folder):
    """State dicts taken by one rank alone, after all have consolidated; rules that keep nothing need not."""
    figures = {}
    for method in ("hybrid", "keeping"):
        net, optimizer = placed("copies on 4", method, build())
        advance(net, optimizer, range(2))
        reference = build()
        expected = make(method, reference)
        advance(reference, expected, range(2))
        if method == "keeping":
            consolidate(SimpleNamespace(optimizer=optimizer))  # As Accelerate wraps it.
        if dist.get_rank() == 0:
            figures[method] = difference(optimizer.state_dict()["state"], expected.state_dict()["state"])
        dist.barrier()
    return figures


def check_refusals(folder):
    world = init_device_mesh("cpu", (WORLD,))
    weight = torch.ones(8, 8)

    def parameter(mesh, *placements):
        return nn.Parameter(distribute_tensor(weight, mesh, placements, src_data_rank=None))

    columns = parameter(world, Shard(1))
    partial_ = nn.Parameter(DTensor.from_local(weight, world, [Partial()]))
    rows = parameter(world, Shard(0))
    optimizer = Alone([rows])
    rows.grad = DTensor.from_local(weight, world, [Partial()])
    before = whole(rows)
    distributed = distribute(Alone([nn.Parameter(weight)]))
    copies = Alone([("copies", parameter(world, Replicate()))])
    return {
        "columns": raised(NotImplementedError, lambda: Alone([("layer.weight", columns)])),
        "two dims": raised(NotImplementedError, lambda: Alone([parameter(pairs(), Shard(0), Shard(0))])),
        "tensor parallel": raised(
            NotImplementedError, lambda: Alone([("wide", parameter(pairs(), Shard(0), Shard(1)))])
        ),
        "partial": raised(NotImplementedError, lambda: Alone([partial_])),
        "partial gradient": raised(TypeError, optimizer.step),
        "unmoved": bool(torch.equal(whole(rows), before)),
        "adamw": raised(
            NotImplementedError, lambda: Alone([{"params": [columns], "use_matrix_rule": False}])
        ),
        "twice": raised(ValueError, lambda: distribute(distributed)),
        "type": raised(TypeError, lambda: distribute(torch.optim.SGD([torch.ones(1)]))),  # type: ignore[type-var]
        "copies have owners": copies.param_groups[0]["use_matrix_rule"],
    }


def check_whole_groups(folder):
    """A rotation that a group shares: the group stays on one rank."""
    figures = {}
    for layout in ("copies on 4", "shards on 4"):
        nets = [build(), build()]
        nets[1], group = layouts()[layout](nets[1])
        optimizers = [
            ARO(
                [
                    {"params": [layer.weight for layer in net.equal], "share_rotation": True},
                    {"params": net.inner.weight},
                ]
            )
            for net in nets
        ]
        if group != ():
            distribute(optimizers[1], group)
        for net, optimizer in zip(nets, optimizers, strict=True):
            advance(net, optimizer, range(3))
        owners = {optimizers[1].sharing.owner(layer.weight) for layer in nets[1].equal}
        figures[layout] = [error(nets[1], nets[0]), len(owners)]
    return figures


def check_checkpoints(folder):
    """`torch.distributed.checkpoint`: saved on 2 ranks, gone on from on 2 and on 4; see the test for 1."""
    figures = {}
    pair = pairs()["shard"]
    for method in ("hybrid", "keeping pieces", "aro", "trion"):
        net, optimizer = placed("shards on 2", method, build())
        advance(net, optimizer, range(3))
        state = {"model": get_model_state_dict(net), "optimizer": get_optimizer_state_dict(net, optimizer)}
        saved = folder / f"{method} saved by {dist.get_rank() // 2}"
        dcp.save(state, checkpoint_id=saved, process_group=pair.get_group())
        dist.barrier()
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        full = get_optimizer_state_dict(net, optimizer, options=options)
        advance(net, optimizer, range(3, 6))
        reached = weights(net)
        if dist.get_rank() == 0:
            torch.save(reached, folder / f"{method} reached.pt")
            names = {name for name, _ in net.named_parameters()}
            figures[f"{method}: names"] = set(full["state"]) == names
        for layout in ("shards on 2", "shards on 4") + ("2 copies in 2 shards", "copies on 4") * (
            method == "hybrid"
        ):
            resumed, loaded = placed(layout, method, build(seed=1))
            load(resumed, loaded, folder / f"{method} saved by 0")
            advance(resumed, loaded, range(3, 6))
            figures[f"{method}: {layout}"] = error(resumed, net)
    return figures


def load(net, optimizer, path, **options):
    state = {"model": get_model_state_dict(net), "optimizer": get_optimizer_state_dict(net, optimizer)}
    dcp.load(state, checkpoint_id=path, **options)
    set_model_state_dict(net, state["model"])
    set_optimizer_state_dict(net, optimizer, state["optimizer"])


CHECKS = {
    name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")
}


def run(rank, folder, names):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=60),
    )
    results = {name: CHECKS[name](folder) for name in names}
    (folder / f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def main():
    folder, names = Path(sys.argv[1]), sys.argv[2:] or list(CHECKS)
    # What was imported serves all of them.
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=run, args=(rank, folder, names)) for rank in range(WORLD)]
    for process in processes:
        process.start()
    running = {process.sentinel: process for process in processes}
    while running:
        for sentinel in multiprocessing.connection.wait(list(running)):
            ended = running.pop(sentinel)
            ended.join()
            if ended.exitcode != 0:
                print(f"{ended.name} ended with {ended.exitcode}", file=sys.stderr)
                for process in running.values():  # They wait for the one that failed.
                    process.kill()
                sys.exit(1)


if __name__ == "__main__":
    main()
