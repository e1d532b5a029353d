# SPDX-License-Identifier: Apache-2.0
"""What can be measured, as data: operations, shapes, dtypes, peers and presets, for CPUs and GPUs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from . import gpu_preset, whole_models
from .shapes import LLAMA, RELEASE, T5, Model
from .workload import COSTS, LATER, MAIN, OP, SMALL, STRUCTURES, TEXTS, VITS, Workload
from .workloads import (
    OF_TORCHVISION,
    fisher,
    fisher_sums,
    l1_penalty,
    label_of,
    linear,
    merge,
    penalty,
    structured_penalty,
    threshold,
)

OPS = tuple(COSTS)
PRESETS = {  # for CPUs: description, and default seconds per provider and case
    "cpu": ("shapes for two cores, the default", 0.7),
    "quick": ("about a minute: shows that everything runs, and roughly how fast", 0.02),
    "full": ("the whole registry: hours, and the memory of a server", 1.0),
}
BATCHES, TEXT_BATCHES = (1, 16, 64, 256), (1, 8)
RANKS = (4, 10, 16, 30, 64)
FEW_ROWS = (1, 16, 64, 256, 1024)
DTYPES = ("float32", "bfloat16")
EAGER = "eager autograd"
COMPILED, STACKED, PEFT, BACKPACK, OPACUS = "torch.compile", "stacked bmm", "peft", "backpack", "opacus"
COMPILED_COMPOSITION = "torch.compile of the composition"
EXPLICIT, LOOP = "explicit deltaW, eager penalty", "batch size 1"
COMPOSITION, ADDMM, UNSLOTH = "composition", "addmm", "addmm in Unsloth's order"
FROZEN, WITHOUT = "frozen linear", "LoRA without EWC"
DENSE = "dense F, fp32"  # floor of structured Fishers: this library with what they stand for

# Peers of every case of an op; ours and floors are not listed and always run.
PEERS: dict[str, tuple[str, ...]] = {
    "ewc_penalty": (EAGER, COMPILED, STACKED),
    "structured_penalty": (EAGER, COMPILED),
    "l1_penalty": (EAGER, COMPILED, STACKED),
    "fisher_sums": ("einsum", LOOP),
    "fisher_accumulate": ("einsum", "torch.func vmap(grad)", LOOP, BACKPACK, OPACUS),
    "lora_linear": (COMPOSITION, ADDMM, UNSLOTH, COMPILED_COMPOSITION, PEFT),
    "lora_linear_slices": (COMPOSITION, "added to slices in place", COMPILED_COMPOSITION),
    "merge": ("addmm_ in the dtype of W", "product and sum in fp32"),
    "soft_threshold": ("foreach",),
    "training_step": (EXPLICIT,),
    "adapted_model": (PEFT,),
    "fisher_pass": (LOOP, BACKPACK, OPACUS),
}
BATCH_MODE_PEERS = ("product, then square and add",)  # of fisher_accumulate in mode "batch"
SLOW_PEERS = (COMPILED, COMPILED_COMPOSITION, PEFT)  # measured in the part LATER: they take long to prepare
SMALL_PEERS: dict[str, tuple[str, ...]] = {"lora_linear": (COMPOSITION,)}


def peers(workload: Workload) -> tuple[str, ...]:
    """The peers of a case, or of a part of one."""
    if workload.part in (SMALL, OP):
        return SMALL_PEERS.get(workload.op, ())
    if str(workload.shape["model"]).endswith(OF_TORCHVISION):
        return ()  # PEFT computes something else there
    names = BATCH_MODE_PEERS if workload.shape.get("mode") == "batch" else PEERS[workload.op]
    if workload.part in (MAIN, LATER):
        return tuple(name for name in names if (name in SLOW_PEERS) == (workload.part == LATER))
    return names


def product_floor(workload: Workload) -> str:
    """Name of the floor that is a plain product with as many FLOPs."""
    return "sgemm of equal FLOPs" if workload.dtype.endswith("float32") else "product of equal FLOPs"


def quick() -> Iterator[Workload]:
    """One image or two, full width."""
    d = RELEASE.base.width
    yield penalty("ViT-B k,v", (d, d), 4, 10)
    for kind in STRUCTURES:
        yield structured_penalty("ViT-B k,v", (d, d), 4, 10, kind)
    yield l1_penalty("ViT-B k,v", (d, d), 4, 10)
    yield fisher("ViT-B k", 2, 197, (d, d))
    yield fisher_sums("ViT-B k", 2, 197, (d, d))
    yield linear("ViT-B proj, one image", 197, (d, d), 10)
    yield linear("ViT-B qkv, slices k,v", 197, (d, 3 * d), 10, slices=True)
    yield merge("ViT-B k,v", (d, d), 4, 10)
    yield threshold("scales", 24, 10)
    yield from whole_models.quick()


def cpu() -> Iterator[Workload]:
    """The cases of the targets, then other ranks, dtypes, few rows, and language models."""
    b, l = RELEASE.base.width, RELEASE.large.width  # noqa: E741
    rows = 16 * RELEASE.base.tokens
    yield penalty("ViT-B k,v", (b, b), 12, 10)
    for rank in (10, 4, 30, 64):
        yield penalty("ViT-L k,v", (l, l), 12, rank)
    yield penalty("ViT-L k,v", (l, l), 12, 10, "bfloat16")
    for kind in STRUCTURES:
        yield structured_penalty("ViT-L k,v", (l, l), 12, 10, kind)
    yield l1_penalty("ViT-L k,v", (l, l), 12, 10)
    yield fisher("ViT-B k", 16, 197, (b, b))
    yield fisher("ViT-B k", 16, 197, (b, b), "batch")
    yield fisher("ViT-B fc1", 16, 197, (b, 4 * b))
    yield fisher("ViT-L k", 16, 197, (l, l))
    yield fisher("ViT-B head, one token", 256, 1, (b, b))
    yield fisher_sums("ViT-L k", 16, 197, (l, l))
    yield fisher_sums("ViT-B head, one token", 256, 1, (b, b))
    for name in ("proj", "fc1", "fc2"):
        yield linear(f"ViT-B {name}", rows, RELEASE.base.linears()[name], 10)
    yield linear("ViT-L proj", rows, (l, l), 10)
    yield linear("ViT-B proj", rows, (b, b), 30)
    yield linear("ViT-B proj, one image", 197, (b, b), 10)
    for dtype in DTYPES:
        for name in ("proj", "qkv"):
            for few in FEW_ROWS:
                yield linear(f"ViT-B {name}, {few} rows", few, RELEASE.base.linears()[name], 10, dtype)
    yield linear(label_of(LLAMA, "v"), LLAMA.tokens, LLAMA.layers["v"], 16)
    yield linear(label_of(T5, "wi"), T5.tokens, T5.layers["wi"], 16)
    yield linear("ViT-B qkv, slices k,v", rows, (b, 3 * b), 10, slices=True)
    for dtype in DTYPES:
        yield merge("ViT-L k,v", (l, l), 12, 10, dtype)
    yield threshold("scales", 48, 16)
    yield from whole_models.cpu()


def full() -> Iterator[Workload]:
    """Every model, linear, batch, rank and dtype."""
    for model in (*VITS, *TEXTS):
        batches = BATCHES if isinstance(model, Model) else TEXT_BATCHES
        for name, sizes in model.linears().items():
            label = label_of(model, name)
            for dtype in DTYPES:
                for rank in RANKS:
                    yield penalty(label, sizes, model.depth, rank, dtype)
                    yield merge(label, sizes, model.depth, rank, dtype)
                    for batch in batches:
                        yield linear(label, batch * model.tokens, sizes, rank, dtype)
                for batch in batches:
                    for mode in ("sample", "batch"):
                        yield fisher(label, batch, model.tokens, sizes, mode, dtype)
                    yield fisher_sums(label, batch, model.tokens, sizes, dtype)
        if isinstance(model, Model):
            yield from _kv_of_qkv(model)
    yield threshold("one long vector", 1, 1 << 16)
    yield from whole_models.full()


def _kv_of_qkv(model: Model) -> Iterator[Workload]:
    """The published adapters: k and v of every block."""
    d = model.width
    for dtype in DTYPES:
        for rank in RANKS:
            yield penalty(label_of(model, "k,v"), (d, d), 2 * model.depth, rank, dtype)
            if dtype == "float32":
                for kind in STRUCTURES:
                    yield structured_penalty(label_of(model, "k,v"), (d, d), 2 * model.depth, rank, kind)
                yield l1_penalty(label_of(model, "k,v"), (d, d), 2 * model.depth, rank)
            for batch in BATCHES:
                label = label_of(model, "qkv, slices k,v")
                yield linear(label, batch * model.tokens, (d, 3 * d), rank, dtype, slices=True)


_OF_PRESET: dict[str, Callable[[], Iterator[Workload]]] = {
    "cpu": cpu, "quick": quick, "full": full, "gpu": gpu_preset.gpu, "rehearsal": gpu_preset.rehearsal,
}  # fmt: skip


def workloads(ops: tuple[str, ...], preset: str) -> list[Workload]:
    """The workloads of a preset for the operations `ops`, in its order."""
    if preset not in _OF_PRESET:
        raise ValueError(f"preset: expected one of {', '.join(_OF_PRESET)}, got {preset!r}")
    return [workload for workload in _OF_PRESET[preset]() if workload.op in ops]
