# SPDX-License-Identifier: Apache-2.0
"""Two processes train one model by DDP and add up the Fishers of their shares, to the result of one process.

    torchrun --nproc-per-node 2 distributed.py --quick
    torchrun --nproc-per-node 8 distributed.py --width 1024 --batch-size 256

Every process compares the model that it has at the end with one that it trains alone on all the data.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fused_ewclora as fe

Batches = list[tuple[Tensor, Tensor]]


def network(width: int, device: torch.device) -> nn.Sequential:
    torch.manual_seed(0)
    hidden = nn.Linear(width, width)
    model = nn.Sequential(nn.Linear(32, width), nn.GELU(), hidden, nn.GELU(), nn.Linear(width, 4))
    fe.inject(model, fe.LoRAConfig(r=4, target_modules=["0", "2"]))
    model[4].requires_grad_(True)
    return model.to(device)


def batches(task: int, size: int, device: torch.device) -> Batches:
    generator = torch.Generator().manual_seed(task)
    x, normals = torch.randn(4 * size, 32, generator=generator), torch.randn(32, 4, generator=generator)
    x, y = x.to(device), (x @ normals).argmax(1).to(device)
    return list(zip(torch.split(x, size), torch.split(y, size), strict=True))


def share(data: Batches, rank: int, world: int) -> Batches:
    """Equal parts of every batch; DDP averages over processes, whose batches must be of one size."""
    return [(x[rank::world], y[rank::world]) for x, y in data]


def learn(model: nn.Module, ewc: fe.EWC, data: Batches, *, reduce: bool) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05, momentum=0.9)
    for x, y in 5 * data:
        optimizer.zero_grad()
        # The penalty needs no division by the number of processes: all of them have the same.
        torch.autograd.backward(F.cross_entropy(model(x), y) + ewc.penalty())
        optimizer.step()
    ewc.estimate_fisher(data, F.cross_entropy, progress=False)  # each process over its own share
    if reduce:
        ewc.reduce_fisher_()  # one all-reduce of everything
    ewc.consolidate()  # adapters into the weights; new ones, the same in every process


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small layers")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=64, help="of all processes together")
    parser.add_argument("--out", default="distributed")
    args = parser.parse_args()
    width, size = (32, 16) if args.quick else (args.width, args.batch_size)

    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    device = torch.device("cuda" if on_gpu else "cpu")
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    if size % world:
        parser.error(f"--batch-size: expected a multiple of {world} processes, got {size}")

    model = DistributedDataParallel(network(width, device))
    ewc = fe.EWC(model, ewc_lambda=100.0, fisher_mode="sample")
    alone = network(width, device)
    alone_ewc = fe.EWC(alone, ewc_lambda=100.0, fisher_mode="sample")
    for task in range(2):
        data = batches(task, size, device)
        learn(model, ewc, share(data, rank, world), reduce=True)
        learn(alone, alone_ewc, data, reduce=False)
        with torch.no_grad():  # the A of a new task is random; take the same, to compare
            theirs = dict(model.module.named_parameters())
            for name, parameter in alone.named_parameters():
                if "lora_A" in name:
                    parameter.copy_(theirs[name])

    for name, fisher in alone_ewc.fishers.items():
        torch.testing.assert_close(ewc.fishers[name], fisher, rtol=1e-3, atol=1e-6)
    x, _ = batches(9, size, device)[0]
    torch.testing.assert_close(model(x), alone(x), rtol=1e-3, atol=1e-4)
    print(f"process {rank} of {world}: Fishers and outputs are those of one process", flush=True)
    if rank == 0:
        fe.save_pretrained(args.out, model.module, ewc)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
