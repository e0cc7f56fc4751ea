"""Several processes train one model, by DDP or FSDP2, and go on from checkpoints in any number:

torchrun --nproc-per-node 2 examples/distributed_training.py --shard --checkpoint /tmp/digits --steps 100
torchrun --nproc-per-node 1 examples/distributed_training.py --checkpoint /tmp/digits --steps 200
"""

import argparse
import gc
from pathlib import Path

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from weightlab.optim import HybridAuON, distribute

WIDTH, BATCH = 96, 64


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10)
    )


def optimizer_for(model: nn.Module) -> HybridAuON:
    return HybridAuON(model.named_parameters(), lr=0.01, apply_to="matrices", adjust_lr="match_rms_adamw")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--shard", action="store_true", help="FSDP2 instead of DDP")
    parser.add_argument(
        "--checkpoint", type=Path, help="folder whose last step to go on from; saved to at the end"
    )
    args = parser.parse_args()

    dist.init_process_group()  # gloo for tensors on the CPU, nccl for those on GPUs
    train(args)
    leave()


def train(args: argparse.Namespace) -> None:
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if device.type != "cpu":
        torch.accelerator.set_device_index(rank % torch.accelerator.device_count())
    model = build().to(device)
    if args.shard:
        fully_shard(model, mesh=init_device_mesh(device.type, (ranks,)))
        run, optimizer = model, optimizer_for(model)
    else:
        run, optimizer = DistributedDataParallel(model), distribute(optimizer_for(model))

    saved_steps = [int(folder.name) for folder in args.checkpoint.glob("*")] if args.checkpoint else []
    first = max(saved_steps, default=0)
    if first:
        parts = get_state_dict(model, optimizer)
        saved = {"model": parts[0], "optimizer": parts[1]}
        load(saved, checkpoint_id=args.checkpoint / str(first))
        set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])

    x, y = (torch.as_tensor(part, device=device) for part in load_digits(return_X_y=True))
    x = x.float() / 16
    for step in range(first, args.steps):
        rows = torch.randint(1500, (BATCH,), generator=torch.Generator().manual_seed(step))
        mine = rows.chunk(ranks)[rank].to(device)  # Ranks share the batch and average their gradients.
        optimizer.zero_grad()
        cross_entropy(run(x[mine]), y[mine]).backward()
        optimizer.step()

    with torch.no_grad():
        scores = run(x[1500:])
    if rank == 0:
        loss, error = cross_entropy(scores, y[1500:]), (scores.argmax(1) != y[1500:]).float().mean()
        print(
            f"steps {first} to {args.steps}, {ranks} rank(s): loss {loss:.6f}, error {error:.4f}", flush=True
        )
    if args.checkpoint:
        parts = get_state_dict(model, optimizer)
        saved = {"model": parts[0], "optimizer": parts[1]}
        save(saved, checkpoint_id=args.checkpoint / str(args.steps))


def leave() -> None:
    """Leave no thread of gloo behind: one that still holds tensors when Python shuts down aborts the process."""
    dist.barrier()  # Nobody leaves while another still talks to it.
    gc.collect()  # Sharded modules refer to themselves,
    _clear_sharding_prop_cache()  # and this cache to their mesh, which keeps the group alive.
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
