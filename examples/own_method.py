# SPDX-License-Identifier: Apache-2.0
"""A method of one's own behind the protocol of fe.methods, beside EWC-LoRA and plain LoRA on two tasks.

    python own_method.py --quick
    python own_method.py --epochs 30 --strengths 0 1 10 100 --seeds 0 1 2

The idea: what a task adds should be near what the task before has added, strength/2 |B A - D|^2, where D is
the last task's B A. It knows no data, unlike a Fisher. On these two small tasks it keeps as much as EWC-LoRA
does at the same accuracy on the second: the table shows how to compare methods, not which one is better.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_ewclora as fe
from fused_ewclora.methods import EWCLoRA, LoRA
from fused_ewclora.methods.method import Loader, Loss, Method

CONFIG = fe.LoRAConfig(r=4, target_modules=["0", "2"])
Batches = list[tuple[Tensor, Tensor]]


class NearLast(LoRA):
    """Sequential LoRA with a pull of each task's B A towards that of the last task.

    D is kept as its factors, and |B A - D|^2 from products of r x r: no matrix of a layer's size is made.
    """

    def __init__(self, model: nn.Module, config: fe.LoRAConfig | None = None, *, strength: float) -> None:
        super().__init__(model, config)
        self.strength = strength
        self.last: list[tuple[Tensor, Tensor]] = []  # A and B of the last task, by adapter

    def factors(self) -> list[tuple[Tensor, Tensor]]:
        return [(a, b) for layer in self.layers.values() for _, a, b in layer.adapter_parameters()]

    def penalty(self) -> Tensor:
        """Exactly 0 during the first task."""
        total = super().penalty()
        for (a, b), (c, d) in zip(self.factors(), self.last, strict=False):
            left, right = torch.cat([b, -d], 1), torch.cat([a, c])  # B A - D = left right
            total = total + self.strength / 2 * ((left.T @ left) * (right @ right.T)).sum()
        return total

    def _end(self, loader: Loader, loss_fn: Loss | None) -> None:
        learned = [(a.detach().clone(), b.detach().clone()) for a, b in self.factors()]
        super()._end(loader, loss_fn)  # W <- W + B A; A and B anew
        self.last = learned  # after it: an error changes nothing


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))


def batches(seed: int, task: int) -> Batches:
    """On which side of a plane a point is; each task has a plane of its own, through its own ten inputs."""
    generator = torch.Generator().manual_seed(100 * seed + task)
    x, normal = torch.randn(512, 20, generator=generator), torch.randn(20, generator=generator)
    normal[10 * (1 - task) :][:10] = 0.0
    labels = (x @ normal > 0).long()
    return list(zip(torch.split(x, 32), torch.split(labels, 32), strict=True))


@torch.no_grad()
def accuracy(model: nn.Module, data: Batches) -> float:
    return sum(float((model(x).argmax(1) == y).float().mean()) for x, y in data) / len(data)


def run(method: Method, tasks: list[Batches], epochs: int) -> list[float]:
    """Trains on the tasks in turn; accuracies on all of them afterwards, for samples held out."""
    for number, data in enumerate(tasks):
        train = data[:8]
        method.begin_task(number)
        optimizer = torch.optim.Adam((p for p in method.model.parameters() if p.requires_grad), lr=0.01)
        for step in range(epochs * len(train)):
            x, y = train[step % len(train)]
            optimizer.zero_grad()
            torch.autograd.backward(F.cross_entropy(method.model(x), y) + method.penalty())
            optimizer.step()
            method.after_step(step, epochs * len(train))
        method.end_task(train, F.cross_entropy)
    model = method.export()  # a plain one
    return [accuracy(model, data[8:]) for data in tasks]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few epochs, one seed")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.01, 0.1, 1.0])
    parser.add_argument("--lambdas", type=float, nargs="+", default=[10.0, 100.0, 1000.0])
    args = parser.parse_args()
    epochs, seeds = (5, [0]) if args.quick else (args.epochs, args.seeds)

    print(
        f"{'method':>22} {'task 0':>8} {'task 1':>8}   accuracies after both tasks, means over seeds {seeds}"
    )
    for name, values in (("LoRA", [0.0]), ("NearLast", args.strengths), ("EWCLoRA", args.lambdas)):
        for value in values:
            found = []
            for seed in seeds:
                model = network(seed)
                method: Method
                if name == "NearLast":
                    method = NearLast(model, CONFIG, strength=value)
                elif name == "EWCLoRA":
                    method = EWCLoRA(model, CONFIG, ewc_lambda=value)
                else:
                    method = LoRA(model, CONFIG)
                found.append(run(method, [batches(seed, task) for task in range(2)], epochs))
            first, second = (sum(column) / len(seeds) for column in zip(*found, strict=True))
            print(f"{f'{name} {value:g}':>22} {first:8.1%} {second:8.1%}")


if __name__ == "__main__":
    main()
