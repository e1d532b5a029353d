# SPDX-License-Identifier: Apache-2.0
"""Every method under the conditions of applications: loops with scaled, accumulated and checkpointed losses,
copies, compilation, low precision, and calls that would give something else in silence, which are refused."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import KEYS, Tiny, adapted, assert_same, batches, data, fresh, randomise, snapshot
from torch import Tensor, nn

import fused_ewclora as fe
from fused_ewclora import methods
from fused_ewclora.methods import CLLoRA, KeepLoRA, Method, PerturbAndMerge
from fused_ewclora.methods._composed import Composed

TASKS, STEPS = 2, 3
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("LoRA", {}),
    "EWC-LoRA": ("EWCLoRA", {"ewc_lambda": 30.0}),
    "Factor-EWC": ("FactorEWC", {"ewc_lambda": 30.0}),
    "SD-LoRA": ("SDLoRA", {}),
    "CoDyRA": ("CoDyRA", {"kappa_max": 0.02}),
    "InfLoRA": ("InfLoRA", {"epsilon": 0.6}),
    "KeepLoRA": ("KeepLoRA", {"epsilon_w": 0.4, "epsilon_f": 0.6}),
    "KeepLoRA, official": ("KeepLoRA", {"epsilon_w": 0.4, "epsilon_f": 0.6, "variant": "official"}),
    "O-LoRA": ("OLoRA", {"lambda_1": 0.7}),
    "O-LoRA, official": ("OLoRA", {"lambda_1": 0.3, "lambda_2": 0.2, "variant": "official"}),
    "N-LoRA": ("NLoRA", {"lambda_1": 0.05}),
    "N-LoRA, official": ("NLoRA", {"lambda_1": 0.1, "variant": "official"}),
    "IEL": ("IEL", {"beta": 30.0}),
    "IEL, official": ("IEL", {"beta": 30.0, "variant": "official"}),
    "ITA": ("ITA", {"alpha": 30.0}),
    "ITA, official": ("ITA", {"alpha": 30.0, "variant": "official"}),
    "P&M": ("PerturbAndMerge", {}),
    "CL-LoRA": ("CLLoRA", {"shared": ["qkv"], "orthogonality": 0.3}),
    "CL-LoRA, official": ("CLLoRA", {"shared": ["qkv"], "orthogonality": 0.3, "variant": "official"}),
}
every_method = pytest.mark.parametrize("name", CASES)


def made(name: str, model: Tiny) -> Method:
    kind, options = CASES[name]
    wide = ("EWCLoRA", "IEL", "ITA", "PerturbAndMerge")
    if kind in wide and model.fc.weight.dtype == torch.float64:
        options = {**options, "fisher_dtype": torch.float64}
    method: Method = getattr(methods, kind)(model, **options)
    return method


def early(model: nn.Module, x: Tensor) -> Tensor:
    """The layer that CL-LoRA shares, and the head."""
    return model.head(model.qkv(x)[..., 6:12].mean(1))


def in_dtype(task: int, step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x, y = data(8, seed=10 * task + step)
    return x.to(dtype), y


def prepared(method: Method, task: int) -> list[tuple[Tensor, Tensor]]:
    """The loader of a task that has begun."""
    x, y = in_dtype(task, 9, method.model.head.weight.dtype)
    method.prepare(batches(x, y, 4))
    return batches(x, y, 4)


def optimizer_of(method: Method) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in method.model.parameters() if p.requires_grad], lr=0.4, momentum=0.5)


def step_of(method: Method, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
    """One step of the plainest loop; returns the penalty."""
    optimizer.zero_grad()
    if isinstance(method, CLLoRA) and method.tasks:
        method.distillation(x, lambda x: early(method.model, x)).backward()
        method.reassign_()
    penalty = method.penalty()
    (F.cross_entropy(method.model(x), y) + penalty).backward()
    optimizer.step()
    return penalty.detach()


def trained(method: Method, tasks: range, end_last: bool = True) -> list[Tensor]:
    """Penalties, and outputs in eval mode within and after every task."""
    seen = []
    for task in tasks:
        method.begin_task(task)
        loader = prepared(method, task)
        optimizer = optimizer_of(method)
        for step in range(STEPS):
            seen.append(step_of(method, optimizer, *in_dtype(task, step, loader[0][0].dtype)))
            method.after_step(step, STEPS)
        seen.append(evaluated(method.model))
        if end_last or task < tasks[-1]:
            method.end_task(loader, F.cross_entropy)
            seen.append(evaluated(method.model))
    return seen


@torch.no_grad()
def evaluated(model: nn.Module) -> Tensor:
    model.eval()
    output = model(data(5, seed=99)[0].to(model.head.weight.dtype))
    model.train()
    return output


def exported(method: Method) -> nn.Module:
    return method.export(method.tasks - 1) if isinstance(method, CLLoRA) else method.export()


def everything(method: Method) -> dict[str, Tensor]:
    return snapshot(method.model, {str(i): tensor for i, tensor in enumerate(method.kept_tensors())})


def test_every_method_is_a_case() -> None:
    assert {kind for kind, _ in CASES.values()} == set(methods.__all__) - {"Method"}


def moved(method: Method, other: Method, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer of a copy of the method, with the momentum of the former one."""
    new = optimizer_of(other)
    pairs = zip(optimizer.param_groups[0]["params"], new.param_groups[0]["params"], strict=True)
    for before, after in pairs:
        if before in optimizer.state:
            new.state[after] = copy.deepcopy(optimizer.state[before])
    if other is not method:
        with torch.no_grad():  # which nothing may read any more
            for parameter in method.model.parameters():
                parameter.fill_(torch.nan)
    return new


@every_method
def test_loop_of_an_application(name: str) -> None:
    """A loop with a scaled loss in two batches per step, activation checkpoints, evaluation in between, and
    copied, pickled and reloaded models does the same as the plainest one."""
    torch.manual_seed(0)
    expected = trained(made(name, fresh()), range(TASKS))
    torch.manual_seed(0)
    method = made(name, fresh(reentrant=True))
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)
    seen = []
    for task in range(TASKS):
        method.begin_task(task)
        loader = prepared(method, task)
        optimizer = optimizer_of(method)
        for step in range(STEPS):
            x, y = in_dtype(task, step, torch.float64)
            evaluated(method.model)
            optimizer.zero_grad()
            if isinstance(method, CLLoRA) and task:
                for part in x.split(4):
                    model = method.model
                    scaler.scale(method.distillation(part, lambda x, m=model: early(m, x)) / 2).backward()
                method.reassign_()
            for part, labels in zip(x.split(4), y.split(4), strict=True):
                scaler.scale(F.cross_entropy(method.model(part), labels) / 2).backward()
            evaluated(method.model)
            penalty = method.penalty()
            scaler.scale(penalty).backward()
            scaler.step(optimizer)
            scaler.update()
            method.after_step(step, STEPS)
            seen.append(penalty.detach())
            other = copy.deepcopy(method) if step == 0 else method
            if step == 1:
                state = {key: value.clone() for key, value in other.model.state_dict().items()}
                other.model.load_state_dict(state, assign=True)
            optimizer, method = moved(method, other, optimizer), other
        seen.append(evaluated(method.model))
        method.end_task(loader, F.cross_entropy)
        method = pickle.loads(pickle.dumps(method))
        seen.append(evaluated(method.model))
    torch.testing.assert_close(seen, expected, rtol=1e-9, atol=1e-11)
    assert float((seen[-1] - seen[STEPS]).abs().max()) > 1e-2, "tasks have changed the model"
    plain = exported(method)
    assert type(plain.fc) is nn.Linear
    torch.testing.assert_close(evaluated(plain), seen[-1], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["KeepLoRA", "O-LoRA, official", "IEL, official", "P&M", "CL-LoRA"])
def test_compiled_over_tasks(name: str) -> None:
    """A model and a penalty that were compiled once, without breaks, stay right when tasks replace
    parameters."""
    torch._dynamo.reset()
    method = made(name, fresh())
    model, penalty = (
        torch.compile(f, backend="eager", fullgraph=True) for f in (method.model, method.penalty)
    )
    for task in range(2):
        method.begin_task(task)
        loader = prepared(method, task)
        optimizer = optimizer_of(method)
        for step in range(2):
            x, y = in_dtype(task, step, torch.float64)
            torch.testing.assert_close(model(x), method.model(x), rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(penalty(), method.penalty(), rtol=1e-12, atol=1e-12)
            step_of(method, optimizer, x, y)
            method.after_step(step, 2)
        method.end_task(loader, F.cross_entropy)
    method.model.eval()
    x = data(4)[0]
    torch.testing.assert_close(model(x), method.model(x), rtol=1e-12, atol=1e-12)


PRECISIONS = {"fp16": (torch.float16, False, 5e-3), "autocast": (torch.float32, True, 3e-2)}


@pytest.mark.parametrize("precision", PRECISIONS)
@every_method
def test_precision(name: str, precision: str) -> None:
    """Outputs and penalties are those of fp64, to the precision of the weights or of autocast."""
    dtype, autocast, tolerance = PRECISIONS[precision]
    twins = [made(name, fresh()), made(name, fresh(dtype=dtype))]
    with torch.no_grad():
        for wide, low in zip(*(t.model.parameters() for t in twins), strict=True):
            low.copy_(wide)
    casts = [torch.autocast("cpu", torch.bfloat16, enabled=flag and autocast) for flag in (False, True)]
    for task in range(2):
        for method, cast in zip(twins, casts, strict=True):
            torch.manual_seed(task)
            with cast:
                method.begin_task(task)
        start(*twins)
        results = []
        for method, cast in zip(twins, casts, strict=True):
            torch.manual_seed(10 + task)
            with cast:
                loader = prepared(method, task)
            optimizer, seen = optimizer_of(method), []
            for step in range(STEPS):
                with cast:  # which keeps rounded weights until it ends
                    penalty = step_of(method, optimizer, *in_dtype(task, step, loader[0][0].dtype))
                assert penalty.dtype in (torch.float32, torch.float64)
                seen.append(penalty.double())
                method.after_step(step, STEPS)
            with cast:
                seen.append(evaluated(method.model).double())
                method.end_task(loader, F.cross_entropy)
            with cast:
                seen.append(evaluated(method.model).double())
            results.append(seen)
        torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)
    before = evaluated(twins[1].model)
    after = evaluated(exported(twins[1]))
    rounding = 0.0 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(after, before, rtol=rounding, atol=rounding or 1e-6)


@torch.no_grad()
def start(wide: Method, low: Method) -> None:
    """What a task has drawn is the same in both: random numbers depend on the dtype."""
    drawn = dict(wide.model.named_parameters())
    for name, parameter in low.model.named_parameters():
        if name.rpartition(".")[2].startswith(("lora_A", "lora_scale")):
            parameter.copy_(drawn[name])


@every_method
def test_merged_within_a_task(name: str) -> None:
    """What is merged, also in train mode, is what the model computes in eval mode; until it is unmerged no
    task begins or ends, and no state is saved."""
    method = made(name, fresh())
    trained(method, range(2), end_last=False)
    model = method.model
    if isinstance(method, PerturbAndMerge):
        method._scaled.perturbation = 0.5
    expected = evaluated(model)
    plain = fe.eject(copy.deepcopy(model), merge=True)
    fe.merge(model)
    for merged in (model, plain):
        if merged is not None:
            torch.testing.assert_close(evaluated(merged), expected, rtol=1e-11, atol=1e-12)
    with pytest.raises(fe.EWCLoRAError, match="merged"):
        method.end_task(batches(*data(8), 4), F.cross_entropy)
    fe.unmerge(model)
    method.end_task(batches(*data(8), 4), F.cross_entropy)
    fe.merge(model)
    before = everything(method)
    for call in (method.state_dict, lambda: method.begin_task(2)):
        with pytest.raises(fe.TargetError, match="merged"):
            call()
    if isinstance(method, Composed):
        for call in (method.compose, lambda: method.pretrained().__enter__()):
            with pytest.raises(fe.TargetError, match="merged"):
                call()
    assert_same(before, everything(method))
    fe.unmerge(model)
    trained(method, range(2, 3))


@every_method
def test_parameters_that_are_kept(name: str) -> None:
    """A method whose frozen parameters have been made trainable says so, before a task, after its first step
    and at its end."""
    method = made(name, fresh())
    trained(method, range(1))
    frozen = [(key, p) for key, p in method.model.named_parameters() if "lora" in key and not p.requires_grad]
    assert bool(frozen) == (
        type(method).__name__ not in ("LoRA", "EWCLoRA", "FactorEWC", "CoDyRA", "PerturbAndMerge")
    )
    for key, parameter in frozen:
        parameter.requires_grad_(True)
        with pytest.raises(fe.TargetError, match=rf"begin_task: {key}: expected requires_grad=False"):
            method.begin_task(1)
        parameter.requires_grad_(False)
    method.begin_task(1)
    loader = prepared(method, 1)
    for _, parameter in frozen:
        parameter.requires_grad_(True)
    for call in (lambda: method.after_step(0, 1), lambda: method.end_task(loader, F.cross_entropy)):
        if frozen:
            with pytest.raises(fe.TargetError, match="expected requires_grad=False"):
                call()
    for _, parameter in frozen:
        parameter.requires_grad_(False)
    method.after_step(0, 1)
    method.end_task(loader, F.cross_entropy)


REPLACING = [n for n, (kind, _) in CASES.items() if kind in ("OLoRA", "NLoRA", "IEL", "ITA", "CLLoRA")]


@pytest.mark.parametrize("name", REPLACING)
def test_interrupted_replacement(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt while the end of a task, or a load, replaces parameters changes nothing; both can be
    repeated."""
    torch.manual_seed(0)
    method = made(name, fresh())
    trained(method, range(2), end_last=False)
    twin = copy.deepcopy(method)
    original, left = nn.Module.register_parameter, [0]

    def register(module: nn.Module, key: str, value: nn.Parameter | None) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        original(module, key, value)

    def interrupted(call: Any) -> None:
        before, objects = everything(method), [id(p) for p in method.model.parameters()]
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(nn.Module, "register_parameter", register)
            left[0] = 2
            call()
        assert_same(before, everything(method))
        assert objects == [id(p) for p in method.model.parameters()]

    interrupted(lambda: method.end_task([], F.cross_entropy))
    assert method.tasks == 1
    for each in (method, twin):
        torch.manual_seed(1)
        each.end_task([], F.cross_entropy)
    assert_same(everything(method), everything(twin))
    saved = copy.deepcopy(method.state_dict())
    trained(method, range(2, 3))
    interrupted(lambda: method.load_state_dict(saved))
    method.load_state_dict(saved)
    assert method.tasks == 2


@every_method
def test_transforms(name: str) -> None:
    """functional_call, vmap and gradients per sample see all parameters of a layer, and no others."""
    method = made(name, fresh())
    trained(method, range(2), end_last=False)
    model = method.model.eval()
    parameters = {key: p.detach() * 1.1 for key, p in model.named_parameters()}
    x, y = data(4)

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, parameters, (x[None],)), y[None])

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, x, y)
    before = snapshot(model)
    twin = copy.deepcopy(model)
    twin.load_state_dict(parameters, strict=False)
    assert torch.equal(torch.func.functional_call(model, parameters, (x,)), twin(x))
    torch.testing.assert_close(torch.func.vmap(twin)(x[:, None])[:, 0], twin(x), rtol=1e-12, atol=1e-12)
    trainable = {key: p for key, p in twin.named_parameters() if p.requires_grad}
    for sample in range(2):
        part = slice(sample, sample + 1)
        expected = torch.autograd.grad(
            F.cross_entropy(twin(x[part]), y[part]), list(trainable.values()), allow_unused=True
        )
        for key, gradient in zip(trainable, expected, strict=True):
            found = gradients[key][sample]
            torch.testing.assert_close(
                found, torch.zeros_like(found) if gradient is None else gradient, rtol=1e-10, atol=1e-12
            )
    assert_same(before, snapshot(model))


def test_disabled_features() -> None:
    """KeepLoRA does not take the features of a model without its adapters for those of the task."""
    method = made("KeepLoRA", fresh())
    trained(method, range(1), end_last=False)
    loader = batches(*data(8), 4)
    with fe.disabled(method.model), pytest.raises(fe.TargetError, match="qkv: its adapter is disabled"):
        method.end_task(loader)
    method.end_task(loader)
    assert isinstance(method, KeepLoRA) and min(used.rank for used in method.subspaces.values()) > 0


def test_nested_pretrained() -> None:
    """A task that begins where the model computes with W0 trains as any other."""
    method = made("IEL", fresh())
    trained(method, range(1))
    assert isinstance(method, Composed)
    with method.pretrained():
        base = evaluated(method.model)
        method.begin_task(1)
        prepared(method, 1)
        assert torch.equal(evaluated(method.model), base)
    randomise(method.model)
    assert not torch.equal(evaluated(method.model), base)
    with method.pretrained():
        torch.testing.assert_close(evaluated(method.model), base, rtol=0.0, atol=0.0)
    assert method.fishers.keys() == {"qkv.k", "qkv.v", "fc"}


def test_official_teacher_and_checkpoints() -> None:
    """Reentrant checkpoints, which would compute the teacher again as the student, are refused where
    gradients pass through the teacher, and elsewhere change nothing."""
    found = {}
    for variant in ("paper", "official"):
        for reentrant in (None, True):
            torch.manual_seed(0)
            model = adapted(reentrant=reentrant)
            randomise(model, 0.0)
            method = CLLoRA(model, shared=["qkv"], variant=variant)
            trained(method, range(1))
            method.begin_task(1)
            randomise(model)
            x = data(4)[0].requires_grad_()
            if variant == "official" and reentrant:
                with pytest.raises(fe.ArgumentError, match=r"early_exit: variant 'official' .*reentrant"):
                    method.distillation(x, model)
                continue
            method.distillation(x, model).backward()
            found[variant, reentrant] = model.qkv.lora_B_k.grad
    torch.testing.assert_close(found["paper", True], found["paper", None], rtol=1e-12, atol=1e-12)
    assert len(found) == 3 and found["paper", None].any()


def test_reassigned_twice() -> None:
    """Gradients that were multiplied are not multiplied again in the same step."""
    method = made("CL-LoRA", fresh())
    trained(method, range(1))
    method.begin_task(1)
    assert isinstance(method, CLLoRA)
    x, lora_b = data(4)[0], method.model.qkv.lora_B_k
    for _ in range(2):
        method.distillation(x, lambda x: early(method.model, x)).backward()
        method.reassign_()
        method.after_step(0, 2)
    method.distillation(x, lambda x: early(method.model, x)).backward()
    method.reassign_()
    method.distillation(x, lambda x: early(method.model, x)).backward()
    gradient = lora_b.grad.clone()
    with pytest.raises(fe.ArgumentError, match="expected one call per step"):
        method.reassign_()
    assert torch.equal(gradient, lora_b.grad) and gradient.any()


def test_unperturbed_steps() -> None:
    """P&M tells that steps were not perturbed: no after_step, or a model in eval mode."""
    for eval_mode, call, words in (
        (False, False, "never called"),
        (True, True, "eval mode"),
        (False, True, None),
    ):
        method = made("P&M", fresh())
        method.begin_task(0)
        optimizer = optimizer_of(method)
        method.model.train(not eval_mode)
        step_of(method, optimizer, *data(8))
        if call:
            method.after_step(0, 1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            method.end_task(batches(*data(8), 4), F.cross_entropy)
        texts = [str(entry.message) for entry in caught]
        assert any(words in text for text in texts) if words else not texts, texts


def test_coefficients_under_autocast() -> None:
    """What P&M keeps of a task has full precision wherever its end is called."""
    kept = []
    for enabled in (False, True):
        torch.manual_seed(0)
        method = made("P&M", fresh(dtype=torch.float32))
        trained(method, range(1), end_last=False)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            method._curvature = method._curvature.after(
                {}, {key: torch.ones(6, 6) for key in method._curvature.names()}, 1, dict.fromkeys(KEYS, 0.5)
            )
        kept.append(method._curvature.gradients)
    assert_same(*kept)
