# SPDX-License-Identifier: Apache-2.0
"""Penalty and consolidation over tasks."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import KEYS, WIDTH, adapted, assert_same, batches, data, layers, randomise, snapshot
from torch import Tensor

from fused_ewclora import functional as FE
from fused_ewclora.ewc import controller as ewc_module
from fused_ewclora.ewc.controller import EWC
from fused_ewclora.ewc.settings import convert_lambda
from fused_ewclora.layers.linear import LoRALinear


def products(model) -> dict[str, Tensor]:
    """B diag(s) A by Fisher key."""
    held = {}
    for name in ("qkv", "fc"):
        for piece, a, b in model.get_submodule(name).adapter_parameters():
            held[f"{name}.{piece.name}" if piece.name else name] = (b * piece.scaling) @ a
    return held


def explicit_penalty(ewc, model) -> Tensor:
    """(lambda/2) sum F (B diag(s) A)^2, written out."""
    delta = products(model)
    return (
        0.5
        * ewc.ewc_lambda
        * sum((ewc.fishers[key].to(delta[key].dtype) * delta[key] ** 2).sum() for key in KEYS)
    )


def after_one_task(**options) -> tuple:
    """A model in its second task, with random adapters."""
    model = adapted(dtype=options.pop("dtype", torch.float64), lora_alpha=options.pop("lora_alpha", None))
    dtype = model.head.weight.dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    ewc = EWC(model, **{"ewc_lambda": 20.0, "fisher_dtype": wide, **options})
    x, y = data(8, dtype=dtype)
    ewc.end_task(batches(x, y, 4), F.cross_entropy)
    randomise(model)
    return model, ewc


def test_zero_first_task():
    """The penalty is exactly zero in the first task and can be backpropagated."""
    model = adapted()
    ewc = EWC(model, ewc_lambda=20.0)
    penalty = ewc.penalty()
    assert penalty.dtype == torch.float32 and penalty.shape == () and penalty.item() == 0.0
    penalty.backward()
    x, y = data(2)
    loss = F.cross_entropy(model(x), y)
    assert (loss + ewc.penalty()).item() == loss.item()
    (loss + ewc.penalty()).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert ewc.add_penalty_grad_().item() == 0.0
    assert grads and all(
        torch.equal(p.grad, grads[name]) for name, p in model.named_parameters() if name in grads
    )


@pytest.mark.parametrize("lora_alpha", [None, 3.0])
@pytest.mark.parametrize("ewc_lambda", [0.0, 2.5, 1e7])
def test_penalty_formula(lora_alpha, ewc_lambda):
    """The penalty and its gradients match the formula."""
    model, ewc = after_one_task(lora_alpha=lora_alpha, ewc_lambda=ewc_lambda)
    parameters = [p for layer in layers(model) for _, a, b in layer.adapter_parameters() for p in (a, b)]
    expected = explicit_penalty(ewc, model)
    actual = ewc.penalty()
    torch.testing.assert_close(actual, expected.detach(), rtol=1e-12, atol=0.0)
    for ours, theirs in zip(
        torch.autograd.grad(actual, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12 * float(theirs.abs().max()))


def test_penalty_single_call(monkeypatch):
    """The penalty is one call for all adapters."""
    _, ewc = after_one_task()
    calls = []
    original = FE.ewc_penalty
    monkeypatch.setattr(
        FE, "ewc_penalty", lambda *args, **kw: calls.append(len(args[0])) or original(*args, **kw)
    )
    ewc.penalty()
    assert calls == [len(KEYS)]


def test_fp32_penalty_bf16():
    """The fp32 penalty stays fp32 even beside a bf16 model."""
    for dtype in (torch.float32, torch.bfloat16):
        _, ewc = after_one_task(dtype=dtype)
        assert ewc.penalty().dtype == torch.float32


@pytest.mark.parametrize("grad_scale", [1.0, 65536.0, torch.tensor(1024.0)])
def test_add_gradients(grad_scale):
    """Adding gradients directly equals a scaled backward pass."""
    model, ewc = after_one_task(ewc_lambda=50.0)
    other = copy.deepcopy(model)
    other_ewc = EWC(other, ewc_lambda=50.0, fisher_dtype=torch.float64)
    other_ewc.load_state_dict(ewc.state_dict())
    x, y = data(4, seed=9)
    penalty = other_ewc.penalty()
    ((F.cross_entropy(other(x), y) + penalty) * grad_scale).backward()
    (F.cross_entropy(model(x), y) * grad_scale).backward()
    value = ewc.add_penalty_grad_(grad_scale=grad_scale)
    assert not value.requires_grad and torch.equal(value, penalty.detach())
    for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(
                ours.grad, theirs.grad, rtol=1e-12, atol=1e-12 * float(theirs.grad.abs().max()), msg=name
            )


def test_grad_scaler_lambda():
    """Unscaling by a gradient scaler restores the effect of lambda."""
    model, ewc = after_one_task(dtype=torch.float32, ewc_lambda=50.0)
    parameters = [p for layer in layers(model) for _, a, b in layer.adapter_parameters() for p in (a, b)]
    scaler = torch.amp.GradScaler("cpu", init_scale=4096.0)
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    expected = torch.autograd.grad(ewc.penalty(), parameters)
    scaler.scale(sum(p.sum() * 0.0 for p in parameters)).backward()
    ewc.add_penalty_grad_(grad_scale=scaler.get_scale())
    scaler.unscale_(optimizer)
    for parameter, grad in zip(parameters, expected, strict=True):
        assert torch.equal(parameter.grad, grad)  # powers of two are exact


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("merge_mode", ["delta", "factors"])
def test_consolidation_rounding(dtype, merge_mode):
    """Consolidation keeps the function up to one rounding of the weight."""
    model = adapted(dtype=dtype)
    x, y = data(6, dtype=dtype)
    before = model(x).detach().double()
    exact = {name: _exact_weight(model.get_submodule(name)) for name in ("qkv", "fc")}
    ewc = EWC(
        model, merge_mode=merge_mode, fisher_dtype=torch.float64 if dtype == torch.float64 else torch.float32
    )
    ewc.end_task([(x, y)], F.cross_entropy)
    for name, weight in exact.items():
        layer = model.get_submodule(name)
        sum_error = 4 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps * weight.abs().max()
        ulp = torch.finfo(dtype).eps / 2 * weight.abs() + sum_error
        assert torch.all((layer.weight.double() - weight).abs() <= ulp), name
        assert all(bool((b == 0).all()) for _, _, b in layer.adapter_parameters())
    tolerance = 20 * torch.finfo(dtype).eps * float(before.abs().max())
    assert float((model(x).detach().double() - before).abs().max()) <= tolerance


def _exact_weight(layer: LoRALinear) -> Tensor:
    weight = layer.weight.detach().double().clone()
    for piece, a, b in layer.adapter_parameters():
        delta, done = (b.detach().double() * piece.scaling) @ a.detach().double(), 0
        for start, stop in piece.rows:
            weight[start:stop] += delta[done : done + stop - start]
            done += stop - start
    return weight


def test_untouched_rows():
    """Rows without an adapter never change."""
    model = adapted()
    before = model.qkv.weight[:WIDTH].clone()
    x, y = data(4)
    EWC(model).end_task([(x, y)], F.cross_entropy)
    assert torch.equal(model.qkv.weight[:WIDTH], before)


@given(
    gamma=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    update=st.sampled_from(["sum", "convex"]),
    override=st.booleans(),
)
def test_two_task_recursion(gamma, update, override):
    """F = gamma F_1 + F_2, or gamma F_1 + (1 - gamma) F_2; F_t from a fresh controller on the same model."""
    model = adapted()
    options = {"update": update, "fisher_dtype": torch.float64}
    ewc = EWC(model, gamma=1.0 if override else gamma, **options)
    tasks = [data(5, seed=1), data(7, seed=2)]
    alone = []
    for x, y in tasks:
        single = EWC(copy.deepcopy(model), **options)
        single.end_task([(x, y)], F.cross_entropy)
        alone.append(single.fishers)
        ewc.estimate_fisher([(x, y)], F.cross_entropy)
        ewc.consolidate(gamma if override else None)
        randomise(model)
    weight = 1.0 if update == "sum" else 1.0 - gamma
    for key in KEYS:
        torch.testing.assert_close(
            ewc.fishers[key], gamma * alone[0][key] + weight * alone[1][key], rtol=1e-14, atol=0.0
        )
    assert [record.gamma for record in ewc.history] == [gamma, gamma] and ewc.tasks == 2


def test_gamma_zero_infinity():
    """A gamma of zero copies and does not multiply infinity."""
    _, ewc = after_one_task(check_finite=False, gamma=0.0)
    next(iter(ewc.fishers.values())).fill_(torch.inf)
    x, y = data(4)
    ewc.end_task([(x, y)], F.cross_entropy)
    assert all(bool(fisher.isfinite().all()) for fisher in ewc.fishers.values())


def test_factor_merging_sum():
    """Factor merging gives the sum of the factors from the first weight on."""
    model = adapted()
    start = {name: model.get_submodule(name).weight.clone() for name in ("qkv", "fc")}
    ewc = EWC(model, merge_mode="factors", fisher_dtype=torch.float64)
    sums: dict[str, list[Tensor]] = {}
    for seed in range(3):
        randomise(model)
        for name in ("qkv", "fc"):
            for piece, a, b in model.get_submodule(name).adapter_parameters():
                held = sums.setdefault(f"{name}.{piece.name}", [torch.zeros_like(a), torch.zeros_like(b)])
                sums[f"{name}.{piece.name}"] = [held[0] + a.detach(), held[1] + b.detach()]
        x, y = data(4, seed=seed)
        ewc.end_task([(x, y)], F.cross_entropy)
        for name, weight in start.items():
            expected = weight.clone()
            for piece in model.get_submodule(name).adapter_slices:
                sum_a, sum_b = sums[f"{name}.{piece.name}"]
                for first, last in piece.rows:
                    expected[first:last] += (sum_b * piece.scaling) @ sum_a
            torch.testing.assert_close(model.get_submodule(name).weight, expected, rtol=0.0, atol=1e-14)


def test_merge_modes_differ():
    """The two merge modes differ by cross terms from the second task on."""
    deltas = []
    for merge_mode in ("delta", "factors"):
        model = adapted()
        ewc = EWC(model, merge_mode=merge_mode, generator=torch.Generator().manual_seed(1))
        x, y = data(4)
        ewc.end_task([(x, y)], F.cross_entropy)
        first = model.fc.weight.clone()
        torch.manual_seed(5)
        randomise(model)
        ewc.end_task([(x, y)], F.cross_entropy)
        deltas.append((first, model.fc.weight.clone()))
    torch.testing.assert_close(deltas[0][0], deltas[1][0], rtol=0.0, atol=1e-15)
    assert float((deltas[0][1] - deltas[1][1]).abs().max()) > 1e-3


def test_consolidation_in_place():
    """Consolidation works in place and resets the adapters."""
    model, ewc = after_one_task()
    parameters, fishers = dict(model.named_parameters()), ewc.fishers
    pointers = {key: fisher.data_ptr() for key, fisher in fishers.items()}
    x, y = data(4)
    ewc.end_task([(x, y)], F.cross_entropy)
    assert all(dict(model.named_parameters())[name] is p for name, p in parameters.items())
    assert all(ewc.fishers[key] is fishers[key] and pointers[key] == fishers[key].data_ptr() for key in KEYS)
    for layer in layers(model):
        for _, a, b in layer.adapter_parameters():
            assert not b.any() and float(a.detach().std()) > 0
            assert float(a.detach().abs().max()) <= layer.in_features**-0.5


def test_adapter_generator():
    """The generator decides the next adapters."""
    starts = []
    for _ in range(2):
        model = adapted()
        ewc = EWC(model, generator=torch.Generator().manual_seed(7))
        torch.rand(3)  # the default generator plays no part
        x, y = data(4)
        ewc.end_task([(x, y)], F.cross_entropy)
        starts.append(model.fc.lora_A.clone())
    assert torch.equal(*starts)


def test_bf16_fisher_rounding():
    """The bf16 Fisher is the fp32 one rounded once per task."""
    ewcs = [
        after_one_task(dtype=torch.float32, fisher_dtype=dtype)[1]
        for dtype in (torch.float32, torch.bfloat16)
    ]
    for key in KEYS:
        assert ewcs[1].fishers[key].dtype == torch.bfloat16
        assert torch.equal(ewcs[1].fishers[key], ewcs[0].fishers[key].bfloat16())
    assert ewcs[1].penalty().item() == pytest.approx(ewcs[0].penalty().item(), rel=2**-8)


def test_constant_memory():
    """Memory is constant over tasks."""

    def tensors() -> list[Tensor]:
        gc.collect()
        return [o for o in gc.get_objects() if type(o) in (Tensor, torch.nn.Parameter)]

    _, ewc = after_one_task()
    x, y = data(4)
    kept = tensors()  # those of other tests, too, which else may go in the meantime
    counts = []
    for _ in range(4):
        ewc.end_task([(x, y)], F.cross_entropy)
        counts.append(len(tensors()))
        assert ewc.state_dict()["config"].get("task") is None  # the task's buffers are gone
    assert len(set(counts)) == 1, counts
    del kept


def test_replaced_parameters():
    """The penalty follows parameters that were replaced."""
    model, ewc = after_one_task()
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    before = ewc.penalty().item()
    with torch.no_grad():
        model.fc.lora_B.mul_(2.0)
    assert ewc.penalty().item() > before


def test_resume_bitwise():
    """Training continues bit for bit after a `state_dict` round trip."""
    model, ewc = after_one_task(merge_mode="factors")
    x, y = data(4)
    ewc.estimate_fisher([(x, y)], F.cross_entropy)  # saved in the middle of a task boundary
    other = copy.deepcopy(model)
    other_ewc = EWC(other, fisher_dtype=torch.float64, merge_mode="factors")
    other_ewc.load_state_dict(copy.deepcopy(ewc.state_dict()))
    for one in (ewc, other_ewc):
        torch.manual_seed(0)
        one.consolidate()
    assert_same(snapshot(model, ewc.fishers), snapshot(other, other_ewc.fishers))
    assert ewc.history == other_ewc.history


def test_loaded_state_is_a_copy():
    """Tasks that end after a load leave the state that was loaded as it was."""
    model, ewc = after_one_task(merge_mode="factors")
    x, y = data(4)
    ewc.estimate_fisher([(x, y)], F.cross_entropy)
    saved = ewc.state_dict()["tensors"]
    before = copy.deepcopy(saved)
    other = copy.deepcopy(model)
    other_ewc = EWC(other, fisher_dtype=torch.float64, merge_mode="factors")
    other_ewc.load_state_dict(ewc.state_dict())
    other_ewc.estimate_fisher([(x, y)], F.cross_entropy)
    other_ewc.consolidate()
    other_ewc.end_task([(x, y)], F.cross_entropy)
    assert_same(before, saved)


@pytest.mark.parametrize("wrap", ["ddp", "compile"])
def test_keys_ignore_wrappers(wrap):
    """Keys do not depend on wrappers."""
    model, ewc = after_one_task()
    if wrap == "compile":
        wrapped = torch.compile(model, backend="eager")
    else:
        wrapped = torch.nn.Sequential()
        wrapped.add_module("module", model)  # the names of DistributedDataParallel
    other = EWC(wrapped, ewc_lambda=20.0, fisher_dtype=torch.float64)
    assert list(other.layers) == ["qkv", "fc"]
    other.load_state_dict(ewc.state_dict())
    assert torch.equal(other.penalty(), ewc.penalty())


def test_compiled_same_values():
    """Compiled models give the same Fisher, and compiled penalties the same value."""
    x, y = data(6, dtype=torch.float32)
    model = adapted(dtype=torch.float32)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager")
    F.cross_entropy(compiled(x), y).backward()  # traced before any Fisher pass
    ewcs = [EWC(compiled, ewc_lambda=10.0), EWC(twin, ewc_lambda=10.0)]
    for ewc, one in zip(ewcs, (compiled, twin), strict=True):
        ewc.end_task(batches(x, y, 4), F.cross_entropy)
        torch.manual_seed(3)
        randomise(one)
    assert all(torch.equal(ewcs[0].fishers[key], ewcs[1].fishers[key]) for key in KEYS)
    step = torch.compile(
        lambda a: F.cross_entropy(model(a), y) + ewcs[0].penalty(), backend="aot_eager", fullgraph=True
    )
    torch.testing.assert_close(step(x), F.cross_entropy(model(x), y) + ewcs[0].penalty())


def test_convert_lambda_law():
    """`convert_lambda` keeps the penalty unchanged where the batch law holds."""
    assert convert_lambda(1e7, "batch", "sample", 128) == 78125.0
    assert convert_lambda(78125.0, "sample", "batch", 128) == 1e7
    assert convert_lambda(3.0, "batch", "batch", 128) == 3.0


def test_public_module():
    """The module is part of the public names."""
    import fused_ewclora as fe

    assert fe.EWC is ewc_module.EWC and fe.convert_lambda is convert_lambda


def test_compile_first_task():
    """The first task compiles without a graph break."""
    model = adapted(dtype=torch.float32)
    ewc = EWC(model)
    x, y = data(3, dtype=torch.float32)
    step = torch.compile(
        lambda a: F.cross_entropy(model(a), y) + ewc.penalty(), backend="aot_eager", fullgraph=True
    )
    torch.testing.assert_close(step(x), F.cross_entropy(model(x), y))
