# SPDX-License-Identifier: Apache-2.0
"""Plans: launches of a host from C++, without Triton's launcher and without the host.

The second call of a host with arguments of the same kind is watched: allocations, calls of PyTorch and
launches are noted, with the places that the tensors of the call have in them, and become a plan (csrc/plans).
Later calls that agree in everything that a host decides by (sizes, strides, dtypes, alignment, numbers,
stream) are plans done again. Triton stays the compiler, and launches where it has to: see `unavailable`.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .. import native
from ..candidate import remembers_choices
from . import launch, overlap, specialisation

# Numbers that kernels take as they are, by host: plans do not depend on their values.
NUMBERS = {
    "ewc_penalty": (5,), "factored_penalty": (5,), "l1_penalty": (5,), "fisher_sums_": (5,),
    "fisher_accumulate_": (4,), "soft_threshold_": (1,),
}  # fmt: skip
BY_ADDRESS = ("ewc_penalty", "factored_penalty", "l1_penalty")  # hosts that put addresses into tables
# Hosts that decide by which of their first arguments share memory, and the place of these in a call.
IN_GROUPS = {"merge_": 0, "soft_threshold_": 0}

MOST_MAPS = 3  # of a launch: as many as have an aligned place in C++


class NotPlannable(Exception):
    """Something that a plan cannot repeat, in words."""


class Number(float):
    """A number of the call on its way through a host, which may only hand it to kernels."""

    place: int

    @classmethod
    def at(cls, value: float, place: int) -> Number:
        made = cls(value)
        made.place = place
        return made

    def _refuse(self, *_: Any) -> NoReturn:
        raise NotPlannable("a host computes with a number of the call")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _refuse
    __neg__ = __abs__ = __float__ = __int__ = __bool__ = __lt__ = __gt__ = __le__ = __ge__ = _refuse

    @property
    def plain(self) -> float:
        return float.real.__get__(self)


@remembers_choices
@functools.cache
def unavailable() -> str | None:
    """Why Triton's own launcher launches, or None."""
    if launch.interpreted():
        return "kernels are interpreted"
    extension = native.extension()
    if extension is None:
        return str(native.unavailable())
    if torch.version.hip is not None:
        return "plans launch through the CUDA driver, this is a build for AMD"
    try:
        extension.load_driver(*launch.driver())
        if torch.cuda.is_available():
            extension.check_stream(torch.cuda.current_device())
    except RuntimeError as error:
        return str(error).splitlines()[0]
    from triton import knobs

    for asked, name in (
        (knobs.runtime.debug, "TRITON_DEBUG"),
        (knobs.compilation.instrumentation_mode, "TRITON_INSTRUMENTATION_MODE"),
    ):
        if asked:
            return f"{name} is set"
    return None


def remark() -> str | None:
    """What is to be said about launches on a GPU that Triton's own launcher makes, or None."""
    reason = None if launch.interpreted() else unavailable()
    return None if reason is None else f"launched by Triton's launcher: {reason}"


def forget() -> None:
    """Let go of all plans, and of the tensors that they keep."""
    if (extension := native.extension()) is not None:
        extension.forget_plans()


def planned(name: str, host: Callable[..., Any]) -> Callable[..., Any]:
    """`host`, or the plan that does what it would."""
    numbers, in_groups = NUMBERS.get(name, ()), IN_GROUPS.get(name)
    describe = _described_fisher if name == "fisher_accumulate_" else described

    def run(*given: Any) -> Any:
        if unavailable() is not None:
            return host(*given)
        extension = native.extension()
        assert extension is not None
        plans = extension.plan_host(name, name in BY_ADDRESS)
        if name in BY_ADDRESS:
            arguments = extension.penalty_arguments(*given)
        else:
            tensors, decisions, values = describe(given, numbers)
            if in_groups is not None:
                decisions += (len(group) for group in overlap.groups(given[in_groups]))
            arguments = extension.Arguments(tensors, decisions, values)
        found = plans.replay(arguments)
        return watched(plans, arguments, host, given, numbers) if found is None else _results(name, found)

    return run


def planned_linear(name: str, host: Callable[..., Any]) -> Callable[..., Any]:
    """`planned` for the passes of a LoRA linear. What the host returns for the backward of the same call
    (see `lora_linear`) is of use only in C++, which has both."""
    backward = name.startswith("lora_linear_backward")

    def plain(results: Any) -> Any:
        return list(results) if backward else tuple(results[:2])

    def run(*given: Any) -> Any:
        if unavailable() is not None:
            return plain(host(*given))
        extension = native.extension()
        assert extension is not None
        plans = extension.plan_host(name, False)
        arguments = (
            extension.linear_backward_arguments(*given, [])
            if backward
            else extension.linear_arguments(*given)
        )
        found = plans.replay(arguments)
        return plain(watched(plans, arguments, host, given) if found is None else found)

    return run


def linear_backend(
    forward: tuple[str, Callable[..., Any]], backward: tuple[str, Callable[..., Any]]
) -> int | None:
    """Address of the backend of two hosts, by name, for the node on autograd's tape in C++; None where Python
    launches."""
    if unavailable() is not None:
        return None
    extension = native.extension()
    assert extension is not None

    def missed(host: Callable[..., Any]) -> Callable[..., Any]:
        return lambda plans, arguments, *given: watched(plans, arguments, host, given)

    (name, host), (backward_name, backward_host) = forward, backward
    return extension.linear_backend_of_hosts(
        extension.plan_host(name, False), missed(host),
        extension.plan_host(backward_name, False), missed(backward_host),
    )  # fmt: skip


def watched(
    plans: Any, arguments: Any, host: Callable[..., Any], given: Sequence[Any], numbers: Sequence[int] = ()
) -> Any:
    """What the host returns; plans what it did where that is worth it."""
    result = host(*given)
    if plans.should_record(arguments):
        try:
            plan = record(host, given, numbers)
        except NotPlannable:
            plan = None  # nobody tries again
        plans.add(arguments, plan)
    return result


def _results(name: str, found: list[Tensor]) -> Any:
    """As the host returns them."""
    return None if name.endswith("_") else tuple(found)


def described(
    given: Sequence[Any], numbers: Sequence[int]
) -> tuple[list[Tensor | None], list[int], list[float]]:
    """(tensors, everything else that decides, numbers that do not) of the arguments of a host."""
    tensors: list[Tensor | None] = []
    decisions: list[int] = []

    def add(value: Any) -> None:
        if value is None or isinstance(value, Tensor):
            tensors.append(value)
        elif isinstance(value, (list, tuple)):
            decisions.append(len(value))
            for one in value:
                add(one)
        elif isinstance(value, float):
            decisions.append(int.from_bytes(struct.pack("<d", value), "little", signed=True))
        elif isinstance(value, str):
            decisions.append(hash(value))
        else:
            decisions.append(int(value))

    for place, value in enumerate(given):
        if place not in numbers:
            add(value)
    return tensors, decisions, [float(given[place]) for place in numbers]


def _described_fisher(
    given: Sequence[Any], numbers: Sequence[int]
) -> tuple[list[Tensor | None], list[int], list[float]]:
    """`described` without a look at every argument: a pass calls this once per layer and batch."""
    fisher, x, dy, squares, weight, offsets = given
    return [fisher, x, dy, offsets], [hash(squares)], [weight]


def record(host: Callable[..., Any], given: Sequence[Any], numbers: Sequence[int] = ()) -> Any:
    """The plan of what `host` does for these arguments; nothing is launched and nothing of them is written.

    Raises:
        NotPlannable: it does something that a plan cannot repeat.
    """
    recorder = _Recorder()
    places = iter(range(len(numbers)))

    def replaced(value: Any) -> Any:
        if isinstance(value, Tensor):
            return recorder.given(value)
        if isinstance(value, (list, tuple)):
            return [replaced(one) for one in value]
        if value is None:
            recorder.given(None)
        return value

    arguments = [
        Number.at(value, next(places)) if place in numbers else replaced(value)
        for place, value in enumerate(given)
    ]
    with torch.no_grad(), launch.handing(None, recorder.launched), recorder:
        results = host(*arguments)
    return recorder.plan(results)


_View = tuple[int, bool, int, list[int], list[int]]
_NONE: _View = (-1, False, 0, [], [])
_FRESH = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")


class _Recorder(TorchDispatchMode):
    """Notes what a host does. Operations that write are not carried out, others are on whatever is in memory:
    only sizes count."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[Tensor | None] = []
        self.kept: list[Tensor] = []
        self.made: list[Tensor] = []
        self.steps: list[tuple[str, tuple[Any, ...]]] = []
        # Of tensors that are alive, so that no id is used again: the list and the place of their buffer.
        self.buffers: dict[int, tuple[list[Any], int]] = {}
        self.alive: list[Tensor] = []

    def given(self, tensor: Tensor | None) -> Tensor | None:
        """Another tensor object for the next input: one tensor may be given twice."""
        alias = None if tensor is None else tensor.detach()
        self.inputs.append(alias)
        if alias is not None:
            self._note(alias, self.inputs, len(self.inputs) - 1)
        return alias

    def _note(self, tensor: Tensor, kind: list[Any], place: int) -> None:
        self.alive.append(tensor)
        self.buffers[id(tensor)] = (kind, place)

    def _make(self, tensor: Tensor) -> None:
        self.made.append(tensor)
        self._note(tensor, self.made, len(self.made) - 1)

    def _buffer(self, tensor: Tensor) -> tuple[list[Any], int]:
        found = self.buffers.get(id(tensor))
        if found is None:  # from before this call
            self.kept.append(tensor)
            self._note(tensor, self.kept, len(self.kept) - 1)
            found = self.buffers[id(tensor)]
        return found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.is_view:
            return self._viewed(func(*args, **kwargs), args[0])
        if func.overloadpacket.__name__ in _FRESH:
            out = func(*args, **kwargs)
            self._make(out)
            self.steps.append(("allocate", (list(out.shape), list(out.stride()), out.dtype)))
            return out
        values, tensors = self._arguments(func, args, kwargs)
        step = (func._schema.name, func._schema.overload_name, values, tensors)
        if func._schema.is_mutable:
            self.steps.append(("call", (*step, False)))
            return kwargs.get("out", args[0]) if func._schema.returns else None
        out = func(*args, **kwargs)
        if not isinstance(out, Tensor):
            raise NotPlannable(f"{func} tells the host something about the values of a tensor")
        self._make(out)
        self.steps.append(("call", (*step, True)))
        return out

    def _viewed(self, out: Any, base: Tensor) -> Any:
        kind, place = self._buffer(base)
        for one in out if isinstance(out, (list, tuple)) else (out,):
            self._note(one, kind, place)
        return out

    def _arguments(
        self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> tuple[list[Any], list[tuple[int, int, Tensor]]]:
        """The arguments in the order of the schema, without their tensors; and where these are."""
        values: list[Any] = []
        tensors: list[tuple[int, int, Tensor]] = []
        for i, argument in enumerate(func._schema.arguments):
            if i < len(args):
                value = args[i]
            elif argument.name in kwargs:
                value = kwargs[argument.name]
            else:
                value = argument.default_value
            if isinstance(value, Number):
                raise NotPlannable("a host hands a number of the call to PyTorch")
            if isinstance(value, Tensor):
                self._buffer(value)
                tensors.append((i, -1, value))
                value = None
            elif isinstance(value, (list, tuple)) and any(isinstance(one, Tensor) for one in value):
                for element, one in enumerate(value):
                    self._buffer(one)
                    tensors.append((i, element, one))
                value = [torch.empty(0, device="meta") for _ in value]
            values.append(value)
        return values, tensors

    def launched(self, noted: launch.Launch) -> None:
        """Compiles a launch and notes its parameters."""
        self.steps.append(("launch", (noted, *self._parameters(noted))))

    def _parameters(self, noted: launch.Launch) -> tuple[Any, ...]:
        kernel = compiled(noted)
        parameters = _Parameters(self, kernel.maps)
        values = dict(zip(noted.kernel.arg_names, noted.arguments, strict=False)) | {
            name: value for name, value in noted.options.items() if name in noted.kernel.arg_names
        }
        for name, kind in kernel.signature.items():
            parameters.add(kind, values.get(name))
        for _ in range(2):  # room for what is asked for while a kernel runs, and for profiles: none
            parameters.value(0)
        return kernel, parameters

    def plan(self, results: Any) -> Any:
        """The plan, where `results` are what the host returned."""
        extension = native.extension()
        assert extension is not None
        plan = extension.Plan()
        for tensor in self.kept:
            plan.keep(tensor)
        for kind, step in self.steps:
            if kind == "allocate":
                plan.allocate(*step)
            elif kind == "call":
                name, overload, values, tensors, makes = step
                plan.call(name, overload, values, [(i, e, self._view(t)) for i, e, t in tensors], makes)
            else:
                noted, kernel, parameters = step
                grid = (*noted.grid, 1, 1)[:3]
                plan.launch(
                    kernel.code, grid, kernel.threads, parameters.values, parameters.order,
                    [(v, self._place(t)) for v, t in parameters.pointers], parameters.numbers,
                    [(*m[:-1], self._place(m[-1])) for m in parameters.maps], _about(noted, self.inputs),
                )  # fmt: skip
        for result in _flat(results):
            plan.result(_NONE if result is None else self._view(result))
        return plan

    def _start(self, kind: list[Any]) -> int:
        before = {id(self.inputs): 0, id(self.kept): len(self.inputs)}
        return before.get(id(kind), len(self.inputs) + len(self.kept))

    def _place(self, tensor: Tensor) -> tuple[int, int]:
        kind, place = self._buffer(tensor)
        return self._start(kind) + place, tensor.data_ptr() - kind[place].data_ptr()

    def _view(self, tensor: Tensor) -> _View:
        kind, place = self._buffer(tensor)
        base = kind[place]
        if tensor.dtype != base.dtype:
            raise NotPlannable("a host looks at memory as at another dtype")
        offset = tensor.storage_offset() - base.storage_offset()
        whole = offset == 0 and tensor.shape == base.shape and tensor.stride() == base.stride()
        return self._start(kind) + place, whole, offset, list(tensor.shape), list(tensor.stride())


def _flat(results: Any) -> list[Tensor | None]:
    if results is None:
        return []
    return [results] if isinstance(results, Tensor) else list(results)


def _about(noted: launch.Launch, inputs: Sequence[Tensor | None]) -> str:
    given = ", ".join(f"{list(t.shape)} {str(t.dtype)[6:]}" for t in inputs if t is not None)
    settings = ", ".join(f"{name}={value}" for name, value in noted.options.items())
    return f"{noted.kernel.fn.__name__}: grid {noted.grid}, {settings}, for tensors {given}"


class _Parameters:
    """The parameters of one launch, as Triton's launcher passes them: constants are gone, tuples are spread,
    tensor descriptors are maps with sizes and strides behind them."""

    def __init__(self, recorder: _Recorder, maps: Sequence[dict[str, Any]]) -> None:
        self.recorder, self.descriptions = recorder, iter(maps)
        self.values: list[int] = []
        self.order: list[int] = []
        self.pointers: list[tuple[int, Tensor]] = []
        self.numbers: list[tuple[int, int]] = []
        self.maps: list[tuple[Any, ...]] = []

    def value(self, bits: int) -> None:
        self.order.append(len(self.values))
        self.values.append(bits & 0xFFFFFFFFFFFFFFFF)

    def add(self, kind: Any, value: Any) -> None:
        if isinstance(kind, (tuple, list)):
            for one_kind, one in zip(kind, value, strict=True):
                self.add(one_kind, one)
        elif kind == "constexpr":
            return
        elif kind.startswith("tensordesc"):
            self._descriptor(value)
        elif isinstance(value, Tensor):
            self.recorder._buffer(value)
            self.pointers.append((len(self.values), value))
            self.value(0)
        elif isinstance(value, Number):
            self.numbers.append((len(self.values), value.place))
            self.value(0)
        elif kind in ("fp32", "f32"):
            self.value(int.from_bytes(struct.pack("<f", value), "little"))
        elif kind[0] in "iu":
            self.value(int(value))
        else:
            raise NotPlannable(f"a parameter of type {kind}")

    def _descriptor(self, tiles: Any) -> None:
        description = next(self.descriptions, None)
        if description is None:  # the kernel addresses the tensor itself
            self.add("*", tiles.base)
            for number in (*tiles.shape, *tiles.strides, tiles.padding == "nan", tiles.round_f32_to_tf32):
                self.value(int(number))
        else:
            if description["fp4_padded"] or tiles.round_f32_to_tf32:
                raise NotPlannable("a tensor descriptor that pads or rounds")
            if len(self.maps) == MOST_MAPS:
                raise NotPlannable(f"more than {MOST_MAPS} tensor descriptors")
            self.recorder._buffer(tiles.base)
            self.order.append(-1 - len(self.maps))
            size = description["elem_size"]
            self.maps.append((
                _host_type(description["elem_type"]), description["swizzle"], int(tiles.padding == "nan"),
                size, list(tiles.shape)[::-1], [size * stride for stride in tiles.strides[-2::-1]],
                list(description["block_size"])[::-1], tiles.base,
            ))  # fmt: skip
        for number in (*tiles.shape, *tiles.strides):
            self.value(int(number))


def _host_type(kind: int) -> int:
    """Element types have other numbers in the driver than in Triton's compiler (fp64 and bf16)."""
    return {8: 10, 9: 8, 10: 9}.get(kind, kind)


class Compiled:
    """A kernel that Triton compiled, and what its launch needs to know."""

    def __init__(self, source: specialisation.Specialisation) -> None:
        made = specialisation.compiled(source)
        metadata = made.metadata
        if "cubin" not in made.asm:
            raise NotPlannable("no machine code of an NVIDIA GPU")
        needs = {
            "thread block clusters": getattr(metadata, "num_ctas", 1) != 1,
            "memory while it runs": getattr(metadata, "global_scratch_size", 0) > 0,
            "memory for profiles": getattr(metadata, "profile_scratch_size", 0) > 0,
            "programmatic launches": getattr(metadata, "launch_pdl", 0) != 0,
            "cooperative launches": getattr(metadata, "launch_cooperative_grid", 0) != 0,
        }
        for need, there in needs.items():
            if there:
                raise NotPlannable(f"{metadata.name} needs {need}")
        extension = native.extension()
        assert extension is not None
        self.code = extension.Kernel(made.asm["cubin"], metadata.name, metadata.shared)
        self.threads = 32 * metadata.num_warps
        self.signature = source.signature
        self.maps = list(getattr(metadata, "tensordesc_meta", None) or [])


_compiled: dict[str, Compiled] = {}


def compiled(noted: launch.Launch) -> Compiled:
    """The kernel of a launch, compiled (or taken from Triton's cache) as Triton's own launch would."""
    plain = tuple(value.plain if isinstance(value, Number) else value for value in noted.arguments)
    noted = launch.Launch(noted.kernel, noted.grid, plain, noted.options)
    source = specialisation.specialise(noted, launch.arch_now())
    found = _compiled.get(source.key)
    if found is None:
        found = _compiled[source.key] = Compiled(source)
    return found
