# SPDX-License-Identifier: Apache-2.0
"""Two tasks with torchvision's Vision Transformer, whose attention is an nn.MultiheadAttention, and EWC.

    python two_tasks_torchvision.py --quick
    python two_tasks_torchvision.py --tasks flowers birds --epochs 5

Each folder of --tasks has train/<class>/ and val/<class>/ with images.
Each task has the logits of its classes.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
import torchvision  # type: ignore[import-untyped]  # torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import fused_ewclora as fe

models = torchvision.models
Images = Dataset[tuple[Tensor, ...]]  # with their labels


class Task:
    """Data, and the logits of its classes; labels count from 0."""

    def __init__(self, train: Images, test: Images, classes: slice) -> None:
        self.train, self.test, self.classes = train, test, classes

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits[:, self.classes], labels)

    @torch.no_grad()
    def accuracy(self, model: nn.Module, device: str) -> float:
        model.eval()
        right = total = 0
        for images, labels in DataLoader(self.test, batch_size=64):
            found = model(images.to(device))[:, self.classes].argmax(1).cpu()
            right, total = right + int((found == labels).sum()), total + len(labels)
        return right / total


def random_task(number: int) -> Task:
    """Two classes: one channel is dark or bright; every task has a channel of its own."""
    labels = torch.arange(128) % 2
    images = torch.randn(128, 3, 16, 16)
    images[:, number] += (labels - 0.5)[:, None, None]
    train, test = (TensorDataset(images[part], labels[part]) for part in (slice(64), slice(64, None)))
    return Task(train, test, slice(2 * number, 2 * number + 2))


def task_in(folder: str, first: int) -> Task:
    transform = models.ViT_B_16_Weights.DEFAULT.transforms()
    train, test = (
        torchvision.datasets.ImageFolder(f"{folder}/{split}", transform) for split in ("train", "val")
    )
    return Task(train, test, slice(first, first + len(train.classes)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model, random images")
    parser.add_argument("--tasks", nargs=2, metavar="FOLDER")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--ewc-lambda", type=float, default=1e3, help="of fisher_mode='sample'")
    parser.add_argument("--out", default="two-tasks-torchvision")
    args = parser.parse_args()
    if not args.quick and not args.tasks:
        parser.error("give --quick, or --tasks with two folders of images")

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.quick:
        tasks = [random_task(0), random_task(1)]
        model = models.VisionTransformer(16, 8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64)
    else:
        tasks = [task_in(args.tasks[0], 0)]
        tasks.append(task_in(args.tasks[1], tasks[0].classes.stop))
        model = models.vit_b_16(weights=models.ViT_B_16_Weights.DEFAULT)
    model.heads = nn.Sequential(nn.Linear(model.hidden_dim, tasks[-1].classes.stop))
    model.to(device)

    # The name of an nn.MultiheadAttention selects the rows of k and v in its in_proj_weight.
    print(fe.inject(model, fe.LoRAConfig(r=8, target_modules=["self_attention"], slices=("k", "v"))))
    model.heads.requires_grad_(True)  # inject has frozen the head, too
    ewc = fe.EWC(model, ewc_lambda=args.ewc_lambda, fisher_mode="sample")

    for number, task in enumerate(tasks):
        loader = DataLoader(task.train, batch_size=args.batch_size, shuffle=True)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=5e-3 if args.quick else 5e-4)  # a new one for each task
        for _ in range(args.epochs):
            model.train()
            for images, labels in loader:
                optimizer.zero_grad()
                loss = task.loss(model(images.to(device)), labels.to(device)) + ewc.penalty()
                torch.autograd.backward(loss)
                optimizer.step()
        ewc.end_task(loader, task.loss)  # the Fisher of this task; the adapters into the weights
        shares = [f"{seen.accuracy(model, device):.1%}" for seen in tasks[: number + 1]]
        print(f"after task {number}: accuracies {', '.join(shares)}")

    fe.save_pretrained(args.out, model, ewc)  # to learn a third task from here
    fe.eject(model)  # a plain torchvision model, with what it learned in its weights
    torch.save(model.state_dict(), f"{args.out}/merged.pt")
    print(f"merged: accuracies {', '.join(f'{task.accuracy(model, device):.1%}' for task in tasks)}")


if __name__ == "__main__":
    main()
