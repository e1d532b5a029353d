# SPDX-License-Identifier: Apache-2.0
"""Base training, and the class-incremental protocol: a head per task, trained alone, evaluated together."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_ewclora as fe

from ..literals import FisherMode
from ..metrics import ContinualMetrics
from .evaluation import PERCENT, accuracies, check_finite
from .formats import DataError
from .scenario import Scenario, Split, select, task_classes
from .vit import Classifier, VisionTransformer, key_value_config

BASE_LEARNING_RATE = 2e-3
BASE_WEIGHT_DECAY = 0.05
BASE_BATCH = 64
EVALUATION_BATCH = 1000
# Ranges of the random affine maps in base training (radians, relative size, relative shift), which keep the
# base from memorising the 1,400 digits of scikit-learn.
AUGMENT_ANGLE, AUGMENT_SCALE, AUGMENT_SHIFT = 0.3, 0.15, 0.15


@dataclass(frozen=True)
class Recipe:
    """All settings of a run besides data and seed. Both methods share all of them except the lambda.

    Chosen on the development seeds 100 and 101, which are not among the reported ones. Learning rates and
    epochs were chosen for plain LoRA: among rates of 5e-4 .. 3e-3 for adapters and 3e-3 .. 3e-2 for heads,
    and 5 or 10 epochs, these reach an A_avg within 0.5 points of the best; lower rates (5e-4, 3e-3) forget
    less, but learn new tasks less well. Then ewc_lambda: the best A_last and A_avg among 150, 300, 600 on the
    same seeds. It belongs to Fisher mode "sample"; `fe.convert_lambda` gives the value for "batch".
    """

    tasks: int = 5
    rank: int = 10
    epochs: int = 10
    batch_size: int = 32
    adapter_lr: float = 1e-3
    head_lr: float = 5e-3
    ewc_lambda: float = 600.0
    fisher_mode: FisherMode = "sample"
    train_per_class: int = 400
    test_per_class: int = 200
    base_steps: int = 800
    base_per_class: int = 3000
    dim: int = 64
    depth: int = 4
    num_heads: int = 4
    patches: int = 4  # per side


@dataclass
class Result:
    """One run: the accuracy matrices, penalties and times."""

    method: str
    seed: int
    ewc_lambda: float
    classes: list[tuple[int, ...]]
    metrics: ContinualMetrics
    train_seconds: float = 0.0
    fisher_seconds: float = 0.0
    penalties: list[float] = field(default_factory=list)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """A random rotation, scaling and shift of each image of `[N, C, S, S]`."""
    draws = 2.0 * torch.rand(4, len(images), generator=generator) - 1.0
    angle, size = AUGMENT_ANGLE * draws[0], 1.0 + AUGMENT_SCALE * draws[1]
    cos, sin = size * angle.cos(), size * angle.sin()
    shift_x, shift_y = 2.0 * AUGMENT_SHIFT * draws[2:]  # the grid spans -1..1
    theta = torch.stack([torch.stack([cos, -sin, shift_x], 1), torch.stack([sin, cos, shift_y], 1)], 1)
    grid = F.affine_grid(theta.to(images.device), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def batches(
    split: Split, size: int, generator: torch.Generator | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """The training data once, shuffled if a generator is given."""
    count = len(split.train_labels)
    order = torch.arange(count) if generator is None else torch.randperm(count, generator=generator)
    for index in order.split(size):
        yield split.train_images[index], split.train_labels[index]


def check(scenario: Scenario, recipe: Recipe) -> None:
    """Raises `DataError` for data that the recipe cannot use, before anything is trained."""
    side = scenario.continual.train_images.shape[-1]
    if side % recipe.patches:
        raise DataError(f"images: expected a side that {recipe.patches} divides, got {side} pixels")
    task_classes(scenario, recipe.tasks, seed=0)


def train_base(
    scenario: Scenario, recipe: Recipe, seed: int, device: torch.device
) -> tuple[VisionTransformer, float]:
    """A transformer trained on the base classes, and its test accuracy in percent."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    split = select(scenario.base, scenario.base_classes, recipe.base_per_class, recipe.test_per_class, seed)
    side = split.train_images.shape[-1]
    backbone = VisionTransformer(
        side, side // recipe.patches, split.train_images.shape[1], recipe.dim, recipe.depth, recipe.num_heads
    )
    model = Classifier(backbone)
    model.add_head(len(split.classes))
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), BASE_LEARNING_RATE, weight_decay=BASE_WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, BASE_LEARNING_RATE, total_steps=recipe.base_steps
    )
    for _ in range(recipe.base_steps):
        index = torch.randint(len(split.train_labels), (BASE_BATCH,), generator=generator)
        images = augment(split.train_images[index], generator).to(device)
        optimizer.zero_grad()
        F.cross_entropy(model(images), split.train_labels[index].to(device)).backward()
        optimizer.step()
        schedule.step()
    return backbone, evaluate(model, [split], device)[0][0]


def evaluate(model: Classifier, splits: list[Split], device: torch.device) -> tuple[list[float], list[float]]:
    """Class-incremental and task-aware accuracy on the test images of every split, in percent."""

    def batches_of(split: Split) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = split.test_images.split(EVALUATION_BATCH), split.test_labels.split(EVALUATION_BATCH)
        return ((x.to(device), y) for x, y in zip(images, labels, strict=True))

    return accuracies(model, [(len(split.classes), batches_of(split)) for split in splits])


def adapted(backbone: VisionTransformer, rank: int) -> Classifier:
    """A frozen copy of the backbone with adapters on the k and v rows of every packed qkv; no head yet."""
    model = Classifier(copy.deepcopy(backbone))
    fe.inject(model, key_value_config(backbone.dim, rank))
    return model


def train_task(
    model: Classifier,
    ewc: fe.EWC,
    split: Split,
    recipe: Recipe,
    generator: torch.Generator,
    device: torch.device,
) -> float:
    """Train adapters and newest head on one task (Adam, cosine to 0 per epoch); returns the last penalty."""
    head = list(model.heads[-1].parameters())
    adapters = [p for p in model.backbone.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(
        [{"params": adapters, "lr": recipe.adapter_lr}, {"params": head, "lr": recipe.head_lr}]
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.epochs)
    penalty = torch.zeros(())
    for _ in range(recipe.epochs):
        for images, labels in batches(split, recipe.batch_size, generator):
            optimizer.zero_grad()
            F.cross_entropy(model(images.to(device)), labels.to(device)).backward()
            if ewc.ewc_lambda:
                penalty = ewc.add_penalty_grad_()
            optimizer.step()
        schedule.step()
    return float(penalty)


def run_method(
    method: str,
    backbone: VisionTransformer,
    scenario: Scenario,
    recipe: Recipe,
    seed: int,
    ewc_lambda: float,
    device: torch.device,
    progress: Callable[[str], None],
) -> Result:
    """All tasks in sequence; accuracies are taken after each task was merged into the base weights.

    With ewc_lambda 0 this is plain sequential LoRA: same data order, adapter and head initialisation, no
    penalty.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = adapted(backbone, recipe.rank).to(device)
    ewc = fe.EWC(model, ewc_lambda=ewc_lambda, fisher_mode=recipe.fisher_mode)
    classes = task_classes(scenario, recipe.tasks, seed)
    splits: list[Split] = []
    result = Result(method, seed, ewc_lambda, classes, ContinualMetrics([1], PERCENT))
    rows: list[tuple[list[float], list[float]]] = []
    for t, names in enumerate(classes):
        splits.append(select(scenario.continual, names, recipe.train_per_class, recipe.test_per_class, seed))
        model.add_head(len(names)).to(device)
        start = time.perf_counter()
        result.penalties.append(train_task(model, ewc, splits[t], recipe, generator, device))
        trained = time.perf_counter()
        ewc.end_task(list(batches(splits[t], recipe.batch_size)), F.cross_entropy, progress=False)
        result.train_seconds += trained - start
        result.fisher_seconds += time.perf_counter() - trained
        rows.append(evaluate(model, splits, device))
        seen = sum(rows[-1][0]) / (t + 1)
        progress(
            f"seed {seed}  {method:8s}  task {t + 1}/{recipe.tasks}  accuracy on all classes {seen:5.1f} %"
        )
    result.metrics = ContinualMetrics.from_matrix(
        [cil for cil, _ in rows], [len(s.test_labels) for s in splits], [til for _, til in rows], PERCENT
    )
    check_finite(model, method)
    return result
