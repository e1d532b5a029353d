# SPDX-License-Identifier: Apache-2.0
"""What CUDA graphs and asynchronous streams need, shown without a GPU: the host never looks at a value, and
state stays where it is.

Tensors on the meta device have no values, so whatever reads one raises; a dispatch mode sees the operations
inside of the library's own ops as well, which run the reference.
"""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fused_ewclora as fe
from fused_ewclora import functional as FE
from fused_ewclora.ops import dispatch, schemas

PACKAGE = Path(fe.__file__).parent
CSRC = PACKAGE.parent / "csrc"
VALUE_DEPENDENT = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


def implementation(op: str, args: tuple[Any, ...]) -> Callable[..., Any]:
    """The reference, whatever the device."""
    call = dispatch.Call("cpu", schemas.defining(op, args).dtype)
    return dispatch.choose(op, "reference", call).run


class HostSynchronisation(AssertionError):
    """An operation whose result, or its shape, the host would have to wait for."""


class NoHostSynchronisation(TorchDispatchMode):
    """Raises on them, and on results on another device than `device`. Our ops run the reference inside."""

    def __init__(self, device: str, inside: bool = True) -> None:
        super().__init__()
        self.device, self.inside = device, inside

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if VALUE_DEPENDENT & set(func.tags):
            raise HostSynchronisation(str(func))
        if func.namespace == "fused_ewclora" and self.inside:
            with self:
                result = implementation(func._opname, args)(*args[:-1])
            return None if func._opname.endswith("_") else result
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            # Checkpointing makes an empty one in some versions of PyTorch, which holds nothing to copy.
            if isinstance(tensor, Tensor) and tensor.device.type != self.device and tensor.numel():
                raise HostSynchronisation(f"{func} made a tensor on {tensor.device}")
        return result


def on_meta(**options: Any) -> tuple[nn.Module, fe.EWC]:
    """A model in its second task, without values."""
    model = tiny_models.adapted(dtype=torch.float32, **options)
    ewc = fe.EWC(model, ewc_lambda=3.0, check_finite=False)
    ewc.end_task([tiny_models.data(4, dtype=torch.float32)], F.cross_entropy)
    state = ewc.state_dict()
    model.to("meta")
    ewc = fe.EWC(model, ewc_lambda=3.0, check_finite=False)
    ewc.load_state_dict(state)
    assert {tensor.device.type for tensor in ewc.fishers.values()} == {"meta"}
    return model, ewc


def batch() -> tuple[Tensor, Tensor]:
    x, y = tiny_models.data(4, dtype=torch.float32)
    return x.to("meta"), y.to("meta")


def plain(model: nn.Module) -> None: ...


def with_dropout(model: nn.Module) -> None:
    for layer in tiny_models.layers(model):
        layer.lora_dropout = 0.5


def with_scale_tensors(model: nn.Module) -> None:
    model.fc.lora_scale = nn.Parameter(torch.empty(2, device="meta"))
    model.qkv.lora_scale_k = nn.Parameter(torch.empty((), device="meta"))


@pytest.mark.parametrize(
    ("change", "reentrant"),
    [(plain, None), (plain, False), (plain, True), (with_dropout, False), (with_scale_tensors, None)],
)
def test_step_reads_nothing(change, reentrant):
    """Both forms of the penalty, with gradients there and to be made, a tensor as the factor of one."""
    model, ewc = on_meta(reentrant=reentrant)
    change(model)
    x, y = batch()
    with NoHostSynchronisation("meta"):
        for _ in range(2):
            (F.cross_entropy(model(x), y) + ewc.penalty()).backward()
            ewc.add_penalty_grad_()
            ewc.add_penalty_grad_(torch.empty((), device="meta"))
    for layer in tiny_models.layers(model):
        assert all(p.grad is not None for _, p in layer.named_lora_parameters())


def test_autocast_reads_nothing():
    """Autocast does not look at a value."""
    model, ewc = on_meta()
    x, y = batch()
    with NoHostSynchronisation("meta"), torch.autocast("cpu", dtype=torch.bfloat16):
        (F.cross_entropy(model(x).float(), y) + ewc.penalty()).backward()
    assert model.fc.lora_A.grad is not None


def test_inference_reads_nothing():
    """Inference does not look at a value."""
    model, _ = on_meta()
    x, _ = batch()
    with NoHostSynchronisation("meta"), torch.no_grad():
        model(x)
        with fe.disabled(model):
            model(x)


@pytest.mark.parametrize("mode", ["sample", "batch"])
def test_fisher_reads_nothing(mode):
    """Only its end does, where values are checked, and the check of the samples."""
    model, _ = on_meta(calls=2)
    ewc = fe.EWC(model, fisher_mode=mode, check_finite=False)
    x, y = batch()
    with NoHostSynchronisation("meta"), ewc.accumulate_fisher(check_samples=False):
        for _ in range(2):
            F.cross_entropy(model(x), y).backward()


SHAPES = {
    "x": (2, 3, 6), "dy": (2, 3, 8), "one_x": (3, 6), "one_dy": (3, 8), "w": (8, 6), "bias": (8,),
    "a": (2, 6), "b": (8, 2), "b3": (3, 2), "s": (2,), "factor": (), "f": (8, 6),
}  # fmt: skip
# Everything public, without gradients.
CALLS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "linear": lambda t: FE.lora_linear(t["x"], t["w"], t["bias"], t["a"], t["b"], t["s"]),
    "dropout": lambda t: FE.lora_linear(
        t["x"], t["w"], None, t["a"], t["b"], t["factor"], dropout_p=0.5, training=True
    ),
    "slices": lambda t: FE.lora_linear_slices(t["x"], t["w"], None, [(2, 5, t["a"], t["b3"], t["s"])]),
    "penalty": lambda t: FE.ewc_penalty([t["f"]] * 2, [t["a"]] * 2, [t["b"]] * 2, [t["s"], 0.5]),
    "gradients": lambda t: FE.ewc_penalty_grad_([t["f"]], [t["a"]], [t["b"]], grad_scale=t["factor"]),
    "sample": lambda t: FE.fisher_accumulate_(t["f"], t["x"], t["dy"], check_finite=False),
    "batch": lambda t: FE.fisher_accumulate_(t["f"], t["x"], t["dy"], mode="batch", check_finite=False),
    "one token": lambda t: FE.fisher_accumulate_(t["f"], t["one_x"], t["one_dy"], check_finite=False),
    "merge": lambda t: FE.merge_([t["w"], t["f"]], [t["a"]] * 2, [t["b"]] * 2, [t["s"], 0.5]),
    "threshold": lambda t: FE.soft_threshold_([t["s"], t["a"]], 0.1),
}


@pytest.mark.parametrize("device", ["meta", "cuda"])
@pytest.mark.parametrize("name", CALLS)
def test_ops_read_nothing(name, device):
    """On the meta device with the reference inside; on tensors that claim to be on a GPU up to the op."""
    with FakeTensorMode() if device == "cuda" else nullcontext():
        tensors = {kind: torch.rand(shape, device=device) for kind, shape in SHAPES.items()}
        with NoHostSynchronisation(device, inside=device == "meta"):
            results = tree_leaves(CALLS[name](tensors))
    assert results and all(t.device.type == device for t in results)


LOOKS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda t: t.item(),
    "tolist": lambda t: t.tolist(),
    "cpu": lambda t: t.cpu(),
    "nonzero": lambda t: t.nonzero(),
    "bool": lambda t: bool(t > 0),
    "float": lambda t: float(t),
    "mask": lambda t: t[t > 0],
    "equal": lambda t: torch.equal(t, t),
    "another device": lambda t: torch.zeros((), device="cpu") + t,
}
ON_FAKES = ("item", "tolist", "cpu", "bool", "equal", "another device")  # no indexing without CUDA


@pytest.mark.parametrize(
    ("device", "look"), [*(("meta", look) for look in LOOKS), *(("cuda", look) for look in ON_FAKES)]
)
def test_reads_noticed(look, device):
    """Reading a value is noticed."""
    with FakeTensorMode() if device == "cuda" else nullcontext():
        value = torch.ones((), device=device)
        with NoHostSynchronisation(device), pytest.raises((HostSynchronisation, NotImplementedError)):
            LOOKS[look](value)


# Methods that wait for a value, in all that runs between a call of a module or function and its kernels.
WAITS = {"item", "tolist", "cpu", "numpy", "nonzero", "is_nonzero", "synchronize", "equal", "unique"}
HOT = [
    *sorted((PACKAGE / "ops").glob("*.py")),
    *sorted((PACKAGE / "reference").glob("*.py")),
    PACKAGE / "functional.py",
    *(PACKAGE / "layers" / name for name in ("adapted.py", "linear.py", "slices.py")),
    *(path for path in sorted((PACKAGE / "backends").rglob("*.py")) if "tools" not in path.parts),
]
# (file, function): what it is for.
EXCEPTIONS = {
    ("ops/checks.py", "finite"): "NaN and Inf in a Fisher's inputs, unless check_finite=False",
    ("ops/memory.py", "_share_elements"): "places of elements, on the CPU whatever the device",
    ("reference/fisher_accumulate.py", "sample_bounds"): "offsets of packed samples are validated",
    ("layers/slices.py", "fingerprint"): "of the base weight, at injection",
    ("backends/triton/launch.py", "interpreted"): "a setting of Triton, not a tensor",
    ("backends/triton/tables.py", "overriding"): "a list of Python's",
    ("backends/triton/kept.py", "by_value"): "numbers in host memory, which a graph takes as arguments",
    ("ops/dispatch.py", "forget_tables"): "asked for: what is let go must not be in use",
}


def waits(source: str) -> list[str]:
    """Names of the functions in `source` that call something of WAITS, or bool of anything."""
    found = []

    def walk(node: ast.AST, function: str) -> None:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            function = node.name
        if isinstance(node, ast.Call):
            called = node.func
            if isinstance(called, ast.Attribute) and called.attr in WAITS:
                found.append(function)
            if isinstance(called, ast.Name) and called.id == "bool":
                found.append(function)
        for child in ast.iter_child_nodes(node):
            walk(child, function)

    walk(ast.parse(source), "<module>")
    return found


def test_sources_do_not_wait():
    """The sources of a step wait for values only where the exceptions say so."""
    found = {(str(path.relative_to(PACKAGE)), name) for path in HOT for name in waits(path.read_text())}
    assert found == set(EXCEPTIONS)


def test_search_finds_waits():
    """The search of sources finds waits."""
    source = "def f(x):\n    return x.item()\nclass A:\n    def g(self, x):\n        return bool(x.any())\n"
    assert waits(source) == ["f", "g"]


def test_cuda_does_not_wait():
    """The CUDA sources do not wait for the device."""
    pattern = re.compile(
        r"(Device|Stream|Event)Synchronize|\.item<|\.item\(|kCPU|\.cpu\(\)|cudaMemcpy\(|nonzero"
    )
    sources = [p for p in CSRC.joinpath("cuda").rglob("*") if p.is_file() and "emulator" not in p.parts]
    assert len(sources) > 10
    emulated = re.compile(r"#ifdef FE_EMULATED\n.*?#(else|endif)", re.DOTALL)  # never compiled for a GPU
    texts = {path.name: emulated.sub("", path.read_text()) for path in sources}
    assert [f"{name}: {match[0]}" for name, text in texts.items() for match in pattern.finditer(text)] == []


def places(model: nn.Module, ewc: fe.EWC) -> dict[str, int]:
    """Where everything is that a captured graph may read or write."""
    tensors = {**dict(model.named_parameters()), **{f"F.{key}": f for key, f in ewc.fishers.items()}}
    return {name: tensor.data_ptr() for name, tensor in tensors.items()}


@pytest.fixture
def in_second_task() -> tuple[nn.Module, fe.EWC]:
    model = tiny_models.adapted(dtype=torch.float32)
    ewc = fe.EWC(model, ewc_lambda=20.0)
    ewc.end_task([tiny_models.data(4, dtype=torch.float32)], F.cross_entropy)
    tiny_models.randomise(model)
    return model, ewc


def test_end_keeps_addresses(in_second_task):
    """The end of a task leaves tensors where they are."""
    model, ewc = in_second_task
    before, weight = places(model, ewc), model.fc.weight.clone()
    ewc.end_task([tiny_models.data(4, seed=2, dtype=torch.float32)], F.cross_entropy, gamma=0.5)
    assert places(model, ewc) == before and len(ewc.fishers) == 3
    assert not torch.equal(model.fc.weight, weight)


def test_failure_keeps_addresses(in_second_task):
    """A consolidation that fails leaves tensors where they are."""
    model, ewc = in_second_task
    ewc.estimate_fisher([tiny_models.data(4, dtype=torch.float32)], F.cross_entropy)
    before = places(model, ewc)
    with torch.no_grad():
        model.fc.lora_B[0, 0] = float("inf")
    with pytest.raises(fe.FisherError):
        ewc.consolidate()
    assert places(model, ewc) == before


def test_merge_keeps_addresses(in_second_task):
    """Merging and disabling leave tensors where they are."""
    model, ewc = in_second_task
    before = places(model, ewc)
    fe.merge(model)
    assert places(model, ewc) == before
    with fe.disabled(model):
        assert places(model, ewc) == before
    fe.unmerge(model)
    assert places(model, ewc) == before


def test_load_keeps_addresses(in_second_task, tmp_path):
    """Loading leaves tensors where they are."""
    model, ewc = in_second_task
    fe.save_pretrained(tmp_path, model, ewc)
    saved = copy.deepcopy(model.state_dict()), copy.deepcopy(ewc.state_dict())
    before, trained = places(model, ewc), model.fc.lora_B.clone()
    tiny_models.randomise(model)
    model.load_state_dict(saved[0])
    ewc.load_state_dict(saved[1])
    assert places(model, ewc) == before and torch.equal(model.fc.lora_B, trained)
    tiny_models.randomise(model)
    fe.load_pretrained(tmp_path, model, ewc)
    assert places(model, ewc) == before and torch.equal(model.fc.lora_B, trained)


def test_penalty_keeps_addresses(in_second_task):
    """Gradients of the penalty are added in place."""
    model, ewc = in_second_task
    x, y = tiny_models.data(4, dtype=torch.float32)
    F.cross_entropy(model(x), y).backward()
    grads = {name: p.grad.data_ptr() for name, p in model.named_parameters() if p.grad is not None}
    ewc.add_penalty_grad_()
    assert grads == {name: p.grad.data_ptr() for name, p in model.named_parameters() if p.grad is not None}
