"""What can be measured, as data: operations, shapes, dtypes and presets, and how many bytes and FLOPs each of
them takes at least.

FLOPs are those of matrix products, a multiplication and an addition each; what is done to single elements is
not counted. Bytes are those of every input read once per pass that needs it and every result written once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .shapes import GIANT, LLAMA, RELEASE, T5, Model, TextModel

Shape = dict[str, int | str]
OPS = (
    "ewc_penalty", "fisher_accumulate", "lora_linear", "lora_linear_slices", "training_step", "fisher_pass",
)  # fmt: skip
PRESETS = {  # what each is for; the seconds per provider and case that are its default
    "cpu": ("shapes for two cores, the default", 0.7),
    "quick": ("about a minute: shows that everything runs, and roughly how fast", 0.02),
    "full": ("the whole registry: hours, and the memory of a server", 1.0),
}
VITS = (RELEASE.base, RELEASE.large, RELEASE.huge, GIANT)
TEXTS = (LLAMA, T5)
TINY = Model("tiny", 32, 1, 5, 2)  # a vision transformer for tests
BATCHES, TEXT_BATCHES = (1, 16, 64, 256), (1, 8)
RANKS = (4, 10, 16, 30, 64)
DTYPES = ("float32", "bfloat16")
COMPILED, PEFT, BACKPACK, OPACUS = "torch.compile", "peft", "backpack", "opacus"
COMPILED_COMPOSITION = "torch.compile of the composition"
EXPLICIT, LOOP = "explicit deltaW, eager penalty", "batch size 1"

# Peers that every case of an op has; floors and ours come on top and always run.
PEERS: dict[str, tuple[str, ...]] = {
    "ewc_penalty": ("eager autograd", COMPILED, "stacked bmm"),
    "fisher_accumulate": ("einsum", "torch.func vmap(grad)", "batch size 1", BACKPACK, OPACUS),
    "lora_linear": ("composition", "addmm", COMPILED_COMPOSITION, PEFT),
    "lora_linear_slices": ("composition", COMPILED_COMPOSITION),
    "training_step": (EXPLICIT,),
    "fisher_pass": (LOOP, BACKPACK, OPACUS),
}
BATCH_MODE_PEERS = ("product, then square and add",)  # of fisher_accumulate in mode "batch"


class Work(NamedTuple):
    """What a case must do at least."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Workload:
    """One case to come, without anything allocated. dtype: of the data; "fisher float32" is that of F, with
    the rest in fp32."""

    op: str
    shape: Shape
    dtype: str

    def size(self, name: str) -> int:
        """A number of the shape."""
        return int(self.shape[name])

    @property
    def torch_dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.dtype.removeprefix("fisher "))
        return found

    @property
    def work(self) -> Work:
        return COSTS[self.op](self)

    def __str__(self) -> str:
        return f"{self.op}  {', '.join(f'{k} {v}' for k, v in self.shape.items())}  {self.dtype}"


def _linear(one: Workload, adapters: int, width: int) -> Work:
    """Forward x W^T and z B^T with z = x A^T; backward dy W, and u = dy B with its products u A, dy^T z and
    u^T x. dy and x are read again in the backward pass, z and u stay in cache."""
    rows, d_in, d_out, rank = (one.size(name) for name in ("rows", "d_in", "d_out", "rank"))
    base = 2.0 * rows * d_in * d_out
    low_rank = 2.0 * rows * rank * adapters * (d_in + width)
    factors = rank * adapters * (d_in + width)
    forward = rows * (d_in + d_out) + d_in * d_out + d_out + factors
    backward = rows * (2 * d_in + d_out) + d_in * d_out + 2 * factors
    return Work(2 * base + 3 * low_rank, one.torch_dtype.itemsize * float(forward + backward))


def _penalty(one: Workload) -> Work:
    """delta = B A, (F delta) A^T and B^T (F delta), each 2 r FLOPs per element of F; F is read once."""
    d_in, d_out, rank = (one.size(name) for name in ("d_in", "d_out", "rank"))
    elements, factors = d_in * d_out, rank * (d_in + d_out)
    each = one.torch_dtype.itemsize * elements + 4 * 2 * factors
    return Work(6.0 * rank * elements * one.size("adapters"), float(each * one.size("adapters")))


def _fisher(one: Workload) -> Work:
    """One product dy_n^T x_n per sample; F, fp32, is read and written."""
    n, t, d_in, d_out = (one.size(name) for name in ("samples", "tokens", "d_in", "d_out"))
    moved = one.torch_dtype.itemsize * n * t * (d_in + d_out) + 8 * d_in * d_out
    return Work(2.0 * n * t * d_in * d_out, float(moved))


def _blocks(one: Workload) -> tuple[float, float, float]:
    """Parameters of a block's linears, FLOPs of the linears of all blocks and of their attention, forward."""
    model = next(m for m in (*VITS, *TEXTS, TINY) if m.name == one.shape["model"])
    parameters = float(sum(d_in * d_out for d_in, d_out in model.linears().values()))
    n, t, blocks = one.size("samples"), one.size("tokens"), one.size("blocks")
    width = model.width if isinstance(model, Model) else model.layers["q"][1]
    return parameters, 2.0 * n * t * blocks * parameters, 4.0 * n * t * t * blocks * width


def _step(one: Workload) -> Work:
    """Linears forward, and backward to their inputs; attention forward, and 2.5 times that backward. Every
    frozen weight is read in both passes. Adapters and the penalty are what is to be judged: not counted."""
    parameters, products, attention = _blocks(one)
    return Work(2 * products + 3.5 * attention, 8.0 * parameters * one.size("blocks"))


def _pass(one: Workload) -> Work:
    """A training step without adapters per batch, and dy_n^T x_n of the two matrices whose Fisher is
    estimated, which is read and written."""
    _, products, attention = _blocks(one)
    n, t, blocks = one.size("samples"), one.size("tokens"), one.size("blocks")
    matrix = 2.0 * one.size("width") ** 2
    each = 2 * products + 3.5 * attention + 2.0 * n * t * blocks * matrix
    step = _step(one).bytes + 8.0 * blocks * matrix
    return Work(one.size("batches") * each, one.size("batches") * step)


COSTS: dict[str, Callable[[Workload], Work]] = {
    "lora_linear": lambda one: _linear(one, 1, one.size("d_out")),
    "lora_linear_slices": lambda one: _linear(one, 2, one.size("d_out") // 3),
    "ewc_penalty": _penalty,
    "fisher_accumulate": _fisher,
    "training_step": _step,
    "fisher_pass": _pass,
}


def linear(
    label: str, rows: int, sizes: tuple[int, int], rank: int, dtype: str = "float32", slices: bool = False
) -> Workload:
    """LoRA linear, forward and backward; `slices`: adapters on k and v of a packed qkv."""
    shape: Shape = {"model": label, "rows": rows, "d_in": sizes[0], "d_out": sizes[1], "rank": rank}
    return Workload("lora_linear_slices" if slices else "lora_linear", shape, dtype)


def penalty(label: str, sizes: tuple[int, int], adapters: int, rank: int, dtype: str = "float32") -> Workload:
    """The penalty on that many matrices with its gradients; dtype is that of F."""
    shape: Shape = {
        "model": label, "d_out": sizes[1], "d_in": sizes[0], "adapters": adapters, "rank": rank
    }  # fmt: skip
    return Workload("ewc_penalty", shape, f"fisher {dtype}")


def fisher(
    label: str, samples: int, tokens: int, sizes: tuple[int, int], mode: str = "sample",
    dtype: str = "float32",
) -> Workload:  # fmt: skip
    """Fisher accumulation of one layer."""
    shape: Shape = {
        "model": label, "samples": samples, "tokens": tokens, "d_in": sizes[0], "d_out": sizes[1],
        "mode": mode,
    }  # fmt: skip
    return Workload("fisher_accumulate", shape, dtype)


def label_of(model: Model | TextModel, name: str) -> str:
    """The name of a linear of a model in records: "ViT-B fc1"."""
    return f"{model.name.split('/')[0]} {name}"


def quick() -> Iterator[Workload]:
    """One image or two, full width."""
    d = RELEASE.base.width
    yield penalty("ViT-B k,v", (d, d), 4, 10)
    yield fisher("ViT-B k", 2, 197, (d, d))
    yield linear("ViT-B proj, one image", 197, (d, d), 10)
    yield linear("ViT-B qkv, slices k,v", 197, (d, 3 * d), 10, slices=True)


def cpu() -> Iterator[Workload]:
    """What the targets are about, and around it other ranks, dtypes, few rows, and models of text."""
    b, l = RELEASE.base.width, RELEASE.large.width  # noqa: E741
    rows = 16 * RELEASE.base.tokens
    yield penalty("ViT-B k,v", (b, b), 12, 10)
    for rank in (10, 4, 30, 64):
        yield penalty("ViT-L k,v", (l, l), 12, rank)
    yield penalty("ViT-L k,v", (l, l), 12, 10, "bfloat16")
    yield fisher("ViT-B k", 16, 197, (b, b))
    yield fisher("ViT-B k", 16, 197, (b, b), "batch")
    yield fisher("ViT-B fc1", 16, 197, (b, 4 * b))
    yield fisher("ViT-L k", 16, 197, (l, l))
    yield fisher("ViT-B head, one token", 256, 1, (b, b))
    for name in ("proj", "fc1", "fc2"):
        yield linear(f"ViT-B {name}", rows, RELEASE.base.linears()[name], 10)
    yield linear("ViT-L proj", rows, (l, l), 10)
    yield linear("ViT-B proj", rows, (b, b), 30)
    yield linear("ViT-B proj, one image", 197, (b, b), 10)
    yield linear("ViT-B proj, 16 rows", 16, (b, b), 10)
    yield linear(label_of(LLAMA, "v"), LLAMA.tokens, LLAMA.layers["v"], 16)
    yield linear(label_of(T5, "wi"), T5.tokens, T5.layers["wi"], 16)
    yield linear("ViT-B qkv, slices k,v", rows, (b, 3 * b), 10, slices=True)


def full() -> Iterator[Workload]:
    """Every model, linear, batch, rank and dtype."""
    for model in (*VITS, *TEXTS):
        batches = BATCHES if isinstance(model, Model) else TEXT_BATCHES
        for name, sizes in model.linears().items():
            label = label_of(model, name)
            for dtype in DTYPES:
                for rank in RANKS:
                    yield penalty(label, sizes, model.depth, rank, dtype)
                    for batch in batches:
                        yield linear(label, batch * model.tokens, sizes, rank, dtype)
                for batch in batches:
                    for mode in ("sample", "batch"):
                        yield fisher(label, batch, model.tokens, sizes, mode, dtype)
        if isinstance(model, Model):
            yield from _kv_of_qkv(model)


def _kv_of_qkv(model: Model) -> Iterator[Workload]:
    """The published adapters: k and v of every block."""
    d = model.width
    for dtype in DTYPES:
        for rank in RANKS:
            yield penalty(label_of(model, "k,v"), (d, d), 2 * model.depth, rank, dtype)
            for batch in BATCHES:
                label = label_of(model, "qkv, slices k,v")
                yield linear(label, batch * model.tokens, (d, 3 * d), rank, dtype, slices=True)


_OF_PRESET: dict[str, Callable[[], Iterator[Workload]]] = {"cpu": cpu, "quick": quick, "full": full}


def workloads(ops: tuple[str, ...], preset: str) -> list[Workload]:
    """Those of a preset that are about `ops`."""
    if preset not in _OF_PRESET:
        raise ValueError(f"preset: expected one of {', '.join(_OF_PRESET)}, got {preset!r}")
    return [one for one in _OF_PRESET[preset]() if one.op in ops]
