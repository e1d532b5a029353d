# SPDX-License-Identifier: Apache-2.0
"""Schemas and fakes of every op, in one list. Each op is opaque to torch.compile and picks its implementation
when it runs.

The lists of adapters are those of `adapters.Adapters`. `rows` is a flat list of triples (adapter, row_start,
row_stop), which `adapters.row_ranges` reads. `needs` says which gradients are wanted: of
`lora_linear_backward` those of x, weight, bias, every A, every B, every s; of a penalty those of all A, of
all B, of all s. Gradients come in that order, those of a penalty in one flat tensor, so that what is done to
them is one operation, not one per layer. The fishers of `factored_penalty` are the row sums of all adapters,
then their column sums; those of `kronecker_penalty` the factors of all outputs, then those of all inputs.
`l1_penalty` has none, and its own lambda in the place of that of EWC.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..backends.candidate import Call, LinearShape, arch_of, bucket
from ..reference.ewc_penalty import accumulate_dtype as joint_accumulate_dtype
from ..reference.lora_linear import accumulate_dtype
from .adapters import Adapters
from .dispatch import Candidate, are_plain, choose

_ADAPTERS = "Tensor[] lora_as, Tensor[] lora_bs, Tensor?[] scales, float[] scale_factors"
_PENALTY = f"(Tensor[] fishers, {_ADAPTERS}, float ewc_lambda, bool[] needs, str backend) -> (Tensor, Tensor)"
SCHEMAS = {
    "lora_linear": f"(Tensor x, Tensor weight, Tensor? bias, {_ADAPTERS}, int[] rows, float dropout_p, "
    "Tensor? seed, str backend) -> (Tensor, Tensor)",
    "lora_linear_backward": f"(Tensor dy, Tensor? x, Tensor weight, Tensor? bias, Tensor? z, {_ADAPTERS}, "
    "int[] rows, float dropout_p, Tensor? seed, bool[] needs, str backend) -> Tensor[]",
    "ewc_penalty": _PENALTY,
    "factored_penalty": _PENALTY,
    "kronecker_penalty": _PENALTY,
    "l1_penalty": _PENALTY,
    "fisher_accumulate_": "(Tensor(a!) fisher, Tensor x, Tensor dy, str squares, float weight, "
    "Tensor? cu_seqlens, str backend) -> ()",
    "fisher_sums_": "(Tensor(a!) rows, Tensor(b!) columns, Tensor x, Tensor dy, str squares, float weight, "
    "Tensor? cu_seqlens, str backend) -> ()",
    "merge_": f"(Tensor(a!)[] weights, {_ADAPTERS}, str backend) -> ()",
    "soft_threshold_": "(Tensor(a!)[] scales, float kappa, str backend) -> ()",
}

PENALTIES = ("ewc_penalty", "factored_penalty", "kronecker_penalty", "l1_penalty")

ARGUMENTS = {
    op: [argument.name for argument in torch._C.parse_schema(op + schema).arguments]
    for op, schema in SCHEMAS.items()
}

_library = torch.library.Library("fused_ewclora", "DEF")


def _lora_linear_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_as: Sequence[Tensor], *_: Any
) -> tuple[Tensor, Tensor]:
    rows = 1
    for size in x.shape[:-1]:
        rows = rows * size
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    z = x.new_empty((rows, sum(a.shape[0] for a in lora_as)), dtype=accumulate_dtype(x.dtype))
    return y, z


def _lora_linear_backward_fake(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None,
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    scale_factors: Sequence[float],
    rows: Sequence[int],
    dropout_p: float,
    seed: Tensor | None,
    needs: Sequence[bool],
    backend: str,
) -> list[Tensor]:
    inputs = [weight, bias, *lora_as, *lora_bs, *scales]
    grads = [dy.new_empty((*dy.shape[:-1], weight.shape[1]))] if needs[0] else []
    return grads + [
        t.new_empty(t.shape) for t, need in zip(inputs, needs[1:], strict=True) if need and t is not None
    ]


def _penalty_fake(
    fishers: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    scale_factors: Sequence[float],
    ewc_lambda: float,
    needs: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor]:
    acc = joint_accumulate_dtype([*lora_as, *lora_bs])
    length = 0
    for of_kind, need in zip((lora_as, lora_bs, scales), needs, strict=True):
        length += sum(t.numel() for t in of_kind if need and t is not None)
    return lora_as[0].new_empty((), dtype=acc), lora_as[0].new_empty((length,), dtype=acc)


def _writes_its_argument(*_: Any) -> None:
    return None


def _least_served(tensors: Sequence[Tensor]) -> Tensor:
    """A tensor of the dtype that fewest backends run: what serves it serves the whole call."""
    common = (torch.float32, torch.bfloat16, torch.float16)
    return next((t for t in tensors if t.dtype not in common), tensors[0])


def by_name(functions: Mapping[str, Callable[..., Any]]) -> dict[str, Callable[[Sequence[Any]], Any]]:
    """For each op a function of the sequence of its arguments, from one whose parameters are those it reads,
    named as in the schema."""

    def of_all(op: str, function: Callable[..., Any]) -> Callable[[Sequence[Any]], Any]:
        places = [ARGUMENTS[op].index(name) for name in inspect.signature(function).parameters]
        read = operator.itemgetter(*places)
        if len(places) == 1:
            return lambda args: function(read(args))
        return lambda args: function(*read(args))

    return {op: of_all(op, function) for op, function in functions.items()}


# The argument whose device and dtype decide the implementation, and where it is.
_DEFINING = {
    "lora_linear": "x", "lora_linear_backward": "dy", **dict.fromkeys(PENALTIES, "lora_as"),
    "fisher_accumulate_": "x", "fisher_sums_": "x", "merge_": "weights", "soft_threshold_": "scales",
}  # fmt: skip
_DEFINING_PLACE = {op: ARGUMENTS[op].index(name) for op, name in _DEFINING.items()}


def defining(op: str, args: Sequence[Any]) -> Tensor:
    """The tensor whose device and dtype decide the implementation of a call."""
    value = args[_DEFINING_PLACE[op]]
    if isinstance(value, Tensor):
        return value
    return value[0] if op in PENALTIES else _least_served(value)  # all lora_as are of one dtype


_FAKES = {
    "lora_linear": _lora_linear_fake,
    "lora_linear_backward": _lora_linear_backward_fake,
    **dict.fromkeys(PENALTIES, _penalty_fake),
}


def _linear_shape(x: Tensor, weight: Tensor, lora_as: Sequence[Tensor], dropout_p: float) -> LinearShape:
    d_out, d_in = weight.shape
    rows = x.numel() // max(x.shape[-1], 1)
    return LinearShape(bucket(rows), d_in, d_out, sum(a.shape[0] for a in lora_as), dropout_p > 0.0)


def _work(tensors: Sequence[Tensor]) -> int:
    """As if all were of the size of the first: a look at each would cost more than it tells."""
    return bucket(len(tensors) * tensors[0].numel())


# What else decides on a GPU: several algorithms, kernels for some ranks only, launches too small to matter.
_SIZES = by_name(
    {
        "lora_linear": lambda x, weight, lora_as, dropout_p: {
            "shape": _linear_shape(x, weight, lora_as, dropout_p)
        },
        "lora_linear_backward": lambda dy, weight, lora_as, dropout_p: {
            "shape": _linear_shape(dy, weight, lora_as, dropout_p)
        },
        "ewc_penalty": lambda fishers, lora_as: {
            "rank": max(a.shape[0] for a in lora_as), "work": _work(fishers)
        },
        "factored_penalty": lambda lora_as: {
            "rank": max(a.shape[0] for a in lora_as), "work": _work(lora_as)
        },
        "kronecker_penalty": lambda fishers, lora_as: {
            "rank": max(a.shape[0] for a in lora_as), "work": _work(fishers)
        },
        "l1_penalty": lambda lora_as: {
            "rank": max(a.shape[0] for a in lora_as), "work": _work(lora_as)
        },
        "fisher_accumulate_": lambda x, dy: {"work": bucket(x.numel() * dy.shape[-1])},
        "fisher_sums_": lambda x, dy: {"work": bucket(x.numel() * dy.shape[-1])},
        "merge_": lambda weights: {"work": _work(weights)},
        "soft_threshold_": lambda scales: {"work": _work(scales)},
    }
)  # fmt: skip


def _call(op: str, tensor: Tensor, args: Sequence[Any]) -> Call:
    device = tensor.device.type
    if device == "cpu" and not args[-1].startswith("triton"):
        return Call(device, tensor.dtype)
    return _sized(op, tensor, _SIZES[op](args))


def _sized(op: str, tensor: Tensor, sizes: dict[str, Any]) -> Call:
    if tensor.dtype == torch.float32 or op in PENALTIES:
        sizes["precision"] = torch.get_float32_matmul_precision()
    if tensor.is_cuda:
        sizes["captured"] = torch.cuda.is_current_stream_capturing()
    return Call(tensor.device.type, tensor.dtype, arch_of(tensor.device), **sizes)


def call_of(op: str, tensor: Tensor, args: Sequence[Any]) -> Call:
    """What the choice for an op depends on. tensor: x in the place of dy as well; both have as many rows."""
    if op == "lora_linear_backward":
        x, weight, bias, *rest = args
        args = (x, x, weight, bias, None, *rest[:-1], [], rest[-1])
    return _call(op, tensor, args)


def run(candidate: Candidate, device: str, args: Sequence[Any]) -> Any:
    """What `candidate` returns for the arguments of an op, on tensors of `device`."""
    # Autocast has chosen the dtypes of the inputs; sums inside stay as they are.
    if torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return candidate.run(*args[:-1])
    return candidate.run(*args[:-1])


def _chosen(op: str, args: Sequence[Any]) -> tuple[Candidate, str]:
    tensor = defining(op, args)
    return choose(op, args[-1], _call(op, tensor, args)), tensor.device.type


WRITES = {"fisher_accumulate_": 1, "fisher_sums_": 2}  # tensors that an op writes; others write a list


def _implementation(op: str) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        return run(*_chosen(op, args), args)

    def write(*args: Any) -> None:
        run(*_chosen(op, args), args)
        written = args[: WRITES[op]] if op in WRITES else args[0]
        # Kernels write memory that autograd does not see: what it saved of these tensors is no longer there.
        torch.autograd.graph.increment_version(written)

    return write if op.endswith("_") else call


for _op, _schema in SCHEMAS.items():
    _library.define(_op + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_op, _implementation(_op), "CompositeExplicitAutograd")
    torch.library.register_fake(f"fused_ewclora::{_op}", _FAKES.get(_op, _writes_its_argument), lib=_library)

# flat * factor in compiled graphs: with the operands of the penalty as inputs, the compiler sees that second
# derivatives of the penalty, which it does not compute, depend on them, and raises.
_library.define(
    "scaled_gradients(Tensor flat, Tensor factor, Tensor?[] operands) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _scaled_gradients(flat: Tensor, factor: Tensor, operands: Sequence[Tensor | None]) -> Tensor:
    return flat * factor


_library.impl("scaled_gradients", _scaled_gradients, "CompositeExplicitAutograd")
torch.library.register_fake("fused_ewclora::scaled_gradients", _scaled_gradients, lib=_library)


def _observed(tensors: list[Tensor | None]) -> bool:
    """Whether the dispatcher has more to do for these tensors than to call the implementation: somebody
    traces, transforms, records or replaces operations."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._autograd._profiler_enabled()
        or not are_plain()(tensors)
    )


def is_transformed(gradient: Tensor | None = None) -> bool:
    """Whether calls become differentiable PyTorch, which is followed where the ops cannot be: by the
    transforms of `torch.func`, by forward-mode differentiation, and into a module of `torch.jit.trace`.
    gradient: of a backward, which `is_grads_batched=True` puts inside a transform of its own."""
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
        or (gradient is not None and torch._C._functorch.is_legacy_batchedtensor(gradient))
    )


def unwatched() -> bool:
    """Whether calls with plain tensors may go past the dispatcher now."""
    return not _observed([])


def unobserved(op: str, tensors: list[Tensor | None], args: Sequence[Any]) -> Candidate | None:
    """The candidate that serves a call with these arguments, which are lists where the schema has lists; None
    where the dispatcher has to see the call."""
    return None if _observed(tensors) else _chosen(op, args)[0]


def penalty_of_plain(
    op: str,
    rank: int,
    fishers: list[Tensor],
    adapters: Adapters,
    ewc_lambda: float,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor]:
    """A penalty of a call that nobody observes, with plain tensors; `rank` is the largest."""
    like = adapters.lora_as[0]
    device = like.device.type
    if device == "cpu" and not backend.startswith("triton"):
        call = Call(device, like.dtype)
    else:
        work = adapters.lora_as if op in ("factored_penalty", "l1_penalty") else fishers
        call = _sized(op, like, {"rank": rank, "work": _work(work)})
    args = (fishers, *adapters, ewc_lambda, needs, backend)
    return run(choose(op, backend, call), device, args)


def _direct(op: str) -> Callable[..., Any]:
    """The op for callers that autograd has already passed. Through the dispatcher every element of every list
    is converted, twice, which takes longer than a small call."""
    # Calls through the overload skip the lookup that torch.ops.fused_ewclora.<op> makes every time.
    overload = getattr(torch.ops.fused_ewclora, op).default
    implementation = _implementation(op)

    def call(*given: Any) -> Any:
        # Lists, as the dispatcher hands them over.
        args = [list(arg) if type(arg) is tuple else arg for arg in given]
        tensors: list[Tensor | None] = []
        for arg in args:
            if isinstance(arg, Tensor):
                tensors.append(arg)
            elif type(arg) is list and arg and not isinstance(arg[0], (int, float)):
                tensors += arg
        return overload(*args) if _observed(tensors) else implementation(*args)

    return call


def _direct_accumulation(op: str) -> Callable[..., None]:
    """The same for a Fisher, which has no lists: a pass calls it once per layer and batch."""
    overload = getattr(torch.ops.fused_ewclora, op).default
    implementation = _implementation(op)
    count = WRITES[op] + 2

    def call(*args: Any) -> None:
        tensors: list[Tensor | None] = [*args[:count]]
        if (offsets := args[-2]) is not None:
            tensors.append(offsets)
        (overload if _observed(tensors) else implementation)(*args)

    return call


lora_linear = _direct("lora_linear")
lora_linear_backward = _direct("lora_linear_backward")
penalties = {op: _direct(op) for op in PENALTIES}
ewc_penalty = penalties["ewc_penalty"]
scaled_gradients = torch.ops.fused_ewclora.scaled_gradients.default
fisher_accumulate_ = _direct_accumulation("fisher_accumulate_")
fisher_sums_ = _direct_accumulation("fisher_sums_")
merge_ = _direct("merge_")
soft_threshold_ = _direct("soft_threshold_")
