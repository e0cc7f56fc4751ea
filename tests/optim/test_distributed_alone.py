"""One rank with a process group: what a script for many is first tried on."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor

from weightlab.optim import ARO, ROOT, AuON, DCTAdamW, HybridAuON, Trion, distribute


@pytest.fixture
def mesh(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def sharded(net, mesh):
    return fully_shard(net, mesh=mesh)


def copied(net, mesh):
    for layer in net[::2]:
        for name, p in list(layer.named_parameters()):
            setattr(layer, name, nn.Parameter(distribute_tensor(p.data, mesh, [Replicate()])))
    return net


def train(net, optimizer, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        for p in net.parameters():
            p.grad = (p.detach() + 0.1).square()
        optimizer.step()
    return [getattr(p, "full_tensor", p.detach)() for p in net.parameters()]


@pytest.mark.parametrize("place", [sharded, copied])
@pytest.mark.parametrize("method", [ARO, AuON, DCTAdamW, HybridAuON, ROOT, Trion])
def test_a_mesh_of_one_rank_moves_weights_as_no_mesh_does(method, place, mesh):
    alone = build()
    expected = train(alone, method(alone.named_parameters(), lr=0.01))
    net = place(build(), mesh)
    found = train(net, method(net.named_parameters(), lr=0.01))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", [AuON, ROOT])
def test_distribute_changes_nothing_for_one_rank(method, mesh):
    nets = [build(), build()]
    optimizers = [method(net.named_parameters(), lr=0.01) for net in nets]
    distribute(optimizers[1])
    first, second = (train(net, optimizer) for net, optimizer in zip(nets, optimizers, strict=True))
    assert all(map(torch.equal, first, second))
