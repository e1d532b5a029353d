# SPDX-License-Identifier: Apache-2.0
"""Constructors of workloads, one per operation; presets list their results."""

from __future__ import annotations

from .shapes import Model, TextModel
from .workload import ALL_LINEARS, BOTH, WHOLE, Shape, Workload

OF_TIMM = " of timm"  # suffix of the label of a model that timm builds, with adapters on all of qkv
OF_TORCHVISION = " of torchvision"  # of one whose attentions are nn.MultiheadAttention, adapters on k and v


def label_of(model: Model | TextModel, name: str) -> str:
    """The name of a linear of a model in records: "ViT-B fc1"."""
    return f"{model.name.split('/')[0]} {name}"


def linear(
    label: str, rows: int, sizes: tuple[int, int], rank: int, dtype: str = "float32", slices: bool = False,
    which: str = BOTH, part: str = WHOLE,
) -> Workload:  # fmt: skip
    """LoRA linear, forward and backward or one pass; `slices`: adapters on k and v of a packed qkv."""
    shape: Shape = {"model": label, "rows": rows, "d_in": sizes[0], "d_out": sizes[1], "rank": rank}
    if which != BOTH:
        shape["pass"] = which
    return Workload("lora_linear_slices" if slices else "lora_linear", shape, dtype, part)


def penalty(
    label: str, sizes: tuple[int, int], adapters: int, rank: int, dtype: str = "float32",
    precision: str | None = None, part: str = WHOLE,
) -> Workload:  # fmt: skip
    """The penalty on so many matrices, with its gradients; dtype is that of F. precision None: the current
    setting of PyTorch, by default "highest"."""
    shape: Shape = {
        "model": label, "d_out": sizes[1], "d_in": sizes[0], "adapters": adapters, "rank": rank
    }  # fmt: skip
    if precision is not None:
        shape["precision"] = precision
    return Workload("ewc_penalty", shape, f"fisher {dtype}", part)


def penalty_of_all_linears(model: Model, rank: int, dtype: str, precision: str, part: str) -> Workload:
    """The penalty on every linear of a model; d_out and d_in are those of the first."""
    sizes = model.linears()
    label, count = label_of(model, "all linears"), len(sizes) * model.depth
    workload = penalty(label, next(iter(sizes.values())), count, rank, dtype, precision, part)
    workload.shape["linears"] = ALL_LINEARS
    return workload


def structured_penalty(
    label: str, sizes: tuple[int, int], adapters: int, rank: int, kind: str, part: str = WHOLE
) -> Workload:
    """The penalty of Fishers of a kind of `workload.STRUCTURES`."""
    workload = penalty(label, sizes, adapters, rank, part=part)
    return Workload("structured_penalty", {**workload.shape, "fisher": kind}, workload.dtype, part)


def l1_penalty(
    label: str, sizes: tuple[int, int], adapters: int, rank: int, precision: str | None = None,
    part: str = WHOLE,
) -> Workload:  # fmt: skip
    """The l1 norm of so many products B A, with its gradients; precision as in `penalty`."""
    workload = penalty(label, sizes, adapters, rank, precision=precision, part=part)
    return Workload("l1_penalty", workload.shape, "float32", part)


def fisher_sums(
    label: str, samples: int, tokens: int, sizes: tuple[int, int], dtype: str = "float32", part: str = WHOLE
) -> Workload:
    """Row and column sums of the Fisher of single samples of one layer."""
    shape: Shape = {
        "model": label, "samples": samples, "tokens": tokens, "d_in": sizes[0], "d_out": sizes[1]
    }  # fmt: skip
    return Workload("fisher_sums", shape, dtype, part)


def fisher(
    label: str, samples: int, tokens: int, sizes: tuple[int, int], mode: str = "sample",
    dtype: str = "float32", part: str = WHOLE,
) -> Workload:  # fmt: skip
    """Fisher accumulation of one layer."""
    shape: Shape = {
        "model": label, "samples": samples, "tokens": tokens, "d_in": sizes[0], "d_out": sizes[1],
        "mode": mode,
    }  # fmt: skip
    return Workload("fisher_accumulate", shape, dtype, part)


def merge(
    label: str, sizes: tuple[int, int], adapters: int, rank: int, dtype: str = "float32", part: str = WHOLE
) -> Workload:
    """Adapters merged into so many weights in one call."""
    shape: Shape = {
        "model": label, "d_out": sizes[1], "d_in": sizes[0], "adapters": adapters, "rank": rank
    }  # fmt: skip
    return Workload("merge", shape, dtype, part)


def threshold(label: str, vectors: int, length: int, part: str = WHOLE) -> Workload:
    """The soft threshold on vectors of scales, all in one call."""
    return Workload("soft_threshold", {"model": label, "vectors": vectors, "length": length}, "float32", part)


def step(
    model: str, blocks: int, samples: int, tokens: int, rank: int, optimizer: str = "SGD",
    dtype: str = "float32", part: str = WHOLE,
) -> Workload:  # fmt: skip
    """A training step: forward, penalty, backward, optimizer. Adapters are on k and v, of text models on q
    and v."""
    shape: Shape = {
        "model": model, "blocks": blocks, "samples": samples, "tokens": tokens, "rank": rank,
        "optimizer": optimizer,
    }  # fmt: skip
    return Workload("training_step", shape, dtype, part)


def adapted_model(model: str, blocks: int, samples: int, tokens: int, rank: int) -> Workload:
    """Forward and backward of an adapted model of timm or torchvision."""
    shape: Shape = {"model": model, "blocks": blocks, "samples": samples, "tokens": tokens, "rank": rank}
    return Workload("adapted_model", shape, "float32")


def fisher_pass(
    model: Model, blocks: int, samples: int, batches: int, rank: int, tokens: int | None = None
) -> Workload:
    """A Fisher pass over batches; F of k and v of every block."""
    shape: Shape = {
        "model": model.name, "blocks": blocks, "samples": samples, "batches": batches,
        "tokens": tokens or model.tokens, "width": model.width, "rank": rank,
    }  # fmt: skip
    return Workload("fisher_pass", shape, "float32")
