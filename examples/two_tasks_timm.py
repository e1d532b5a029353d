# SPDX-License-Identifier: Apache-2.0
"""Two tasks with a Vision Transformer of timm: adapters on k and v of qkv, EWC, saved, loaded, merged.

    python two_tasks_timm.py --quick
    python two_tasks_timm.py --tasks flowers birds --model vit_base_patch16_224 --epochs 5

Each folder of --tasks has train/<class>/ and val/<class>/ with images.
Each task has the logits of its classes.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from timm.data.config import resolve_model_data_config
from timm.data.dataset_factory import create_dataset
from timm.data.transforms_factory import create_transform
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import fused_ewclora as fe

QUICK: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


class Task(NamedTuple):
    train: Dataset[tuple[Tensor, ...]]
    test: Dataset[tuple[Tensor, ...]]
    classes: slice  # its logits; labels count from 0

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits[:, self.classes], labels)


def random_task(number: int) -> Task:
    """Two classes: one channel is dark or bright; every task has a channel of its own."""
    labels = torch.arange(128) % 2
    images = torch.randn(128, 3, 16, 16)
    images[:, number] += (labels - 0.5)[:, None, None]
    train, test = (TensorDataset(images[part], labels[part]) for part in (slice(64), slice(64, None)))
    return Task(train, test, slice(2 * number, 2 * number + 2))


def task_in(folder: str, model: nn.Module, first: int) -> Task:
    config = resolve_model_data_config(model)  # type: ignore[no-untyped-call]  # timm
    transform = create_transform(**config)
    train: Any = create_dataset("", folder, "train", transform=transform)  # of many classes
    test = create_dataset("", folder, "val", transform=transform)
    return Task(train, test, slice(first, first + len(train.reader.class_to_idx)))


@torch.no_grad()
def accuracy(model: nn.Module, task: Task, device: str) -> float:
    model.eval()
    right = total = 0
    for images, labels in DataLoader(task.test, batch_size=64):
        found = model(images.to(device))[:, task.classes].argmax(1).cpu()
        right, total = right + int((found == labels).sum()), total + len(labels)
    return right / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model, random images")
    parser.add_argument("--tasks", nargs=2, metavar="FOLDER")
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--ewc-lambda", type=float, default=1e3, help="of fisher_mode='sample'")
    parser.add_argument("--out", default="two-tasks-timm")
    args = parser.parse_args()
    if not args.quick and not args.tasks:
        parser.error("give --quick, or --tasks with two folders of images")

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Any, for what timm's models have and an nn.Module has not.
    model: Any = timm.create_model(args.model, pretrained=not args.quick, **(QUICK if args.quick else {}))
    if args.quick:
        tasks = [random_task(0), random_task(1)]
    else:
        first = task_in(args.tasks[0], model, 0)
        tasks = [first, task_in(args.tasks[1], model, first.classes.stop)]
    model.reset_classifier(tasks[-1].classes.stop)
    model.to(device)
    plain = copy.deepcopy(model)  # what the checkpoint is loaded into below

    config = fe.LoRAConfig(r=8, target_modules=["qkv"], slices=("k", "v"))
    print(fe.inject(model, config))
    model.get_classifier().requires_grad_(True)  # inject has frozen the head, too
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
        shares = [f"{accuracy(model, seen, device):.1%}" for seen in tasks[: number + 1]]
        print(f"after task {number}: accuracies {', '.join(shares)}")

    fe.save_pretrained(args.out, model, ewc)  # adapters, changed weights, the head, Fishers
    fe.inject(plain, config)  # in another program: the same pretrained model, the same configuration
    fe.load_pretrained(args.out, plain, fe.EWC(plain, ewc_lambda=args.ewc_lambda, fisher_mode="sample"))
    fe.eject(plain)  # a plain timm model, with what it learned in its weights
    torch.save(plain.state_dict(), f"{args.out}/merged.pt")
    print(f"loaded and merged: accuracies {', '.join(f'{accuracy(plain, t, device):.1%}' for t in tasks)}")


if __name__ == "__main__":
    main()
