# SPDX-License-Identifier: Apache-2.0
"""Base dtypes, adapter dtypes, autocast and loss scaling in every step of a task, against fp64.

One layer with a loss that is linear in its output: dy is a multiple of a power of two, exact in every dtype.
So every value has few roundings, and bounds follow from their number: operands enter products in the compute
dtype (one rounding where that is not their own), sums are fp32, and results are rounded once or twice (the
CPU kernels round the low-rank term before BLAS adds the base product) to the dtype they are stored in.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from strategies import BACKENDS
from tiny_models import assert_same, snapshot
from tolerance import EPS, assert_within, operand_bound, rounding_bound, sum_bound
from torch import Tensor, nn

import fused_ewclora as fe
from fused_ewclora.errors import FisherError

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
SAMPLES, TOKENS, D_IN, D_OUT, RANK = 4, 3, 24, 18, 3
BACKEND = [name for name in ("cpu", "reference") if name in BACKENDS]
LAMBDA = 64.0


@dataclass(frozen=True)
class Mix:
    """dtypes of the base weight and of the adapters, how these came by theirs, and whether autocast is on."""

    base: torch.dtype
    adapter: torch.dtype
    how: str
    autocast: bool

    def __str__(self) -> str:
        names = {F32: "fp32", BF16: "bf16", F16: "fp16"}
        suffix = " autocast" if self.autocast else ""
        return f"{names[self.base]} base, {names[self.adapter]} adapters by {self.how}{suffix}"

    @property
    def compute(self) -> torch.dtype:
        return BF16 if self.autocast else self.base

    @contextlib.contextmanager
    def cast(self) -> Iterator[None]:
        with torch.autocast("cpu", BF16, enabled=self.autocast):
            yield


MIXES = [
    Mix(base, adapter, how, autocast)
    for base, adapter, how in [
        (F32, F32, "inject"),
        (BF16, F32, "inject"),
        (F16, F32, "inject"),
        (BF16, BF16, "to"),
        (F16, F16, "to"),
        (BF16, BF16, "data"),
        (F16, F16, "data"),
    ]
    for autocast in (False, True)
]
each_mix = pytest.mark.parametrize("mix", MIXES, ids=str)


@pytest.fixture(autouse=True, params=BACKEND)
def backend(request) -> Iterator[None]:
    with fe.use_backend(request.param):
        yield


def model_of(mix: Mix) -> nn.Module:
    """One adapted layer with lora_alpha / r = 1/2, B not zero."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D_IN, D_OUT))
    if mix.how != "to":
        model.to(mix.base)
    fe.inject(model, fe.LoRAConfig(r=RANK, lora_alpha=RANK / 2, target_modules=["0"]))
    layer = model[0]
    with torch.no_grad():
        layer.lora_B.normal_(0, 0.3)
    if mix.how == "to":
        model.to(mix.base)
    if mix.how == "data":
        for parameter in (layer.lora_A, layer.lora_B):
            parameter.data = parameter.data.to(mix.adapter)
    assert (layer.weight.dtype, layer.lora_A.dtype, layer.lora_B.dtype) == (mix.base, *[mix.adapter] * 2)
    return model


def data_of(mix: Mix, size: float = 1.0) -> tuple[Tensor, Tensor]:
    """x in the dtype of the model and dy, small multiples of `size` / 4."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SAMPLES, TOKENS, D_IN, generator=generator).to(mix.base)
    dy = torch.randint(-3, 4, (SAMPLES, TOKENS, D_OUT), generator=generator) * (size / 4)
    return x, dy


def loss_of(mix: Mix, model: nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and a loss whose gradient with respect to it is dy."""
    with mix.cast():
        y = model(x)
    return y, (y * dy.to(y.dtype)).float().sum()


def wide(model: nn.Module) -> tuple[Tensor, ...]:
    """W, b, A, B in fp64, as they are stored."""
    layer = model[0]
    return tuple(t.detach().to(F64) for t in (layer.weight, layer.bias, layer.lora_A, layer.lora_B))


@each_mix
def test_outputs_gradients_fp64(mix):
    """Outputs and gradients equal fp64 up to the rounding error of the dtype."""
    model = model_of(mix)
    x, dy = data_of(mix)
    y, loss = loss_of(mix, model, x, dy)
    loss.backward()
    w, bias, a, b = wide(model)
    x, dy, s = x.to(F64).flatten(0, 1), dy.to(F64).flatten(0, 1), 0.5
    exact = x @ w.T + bias + s * (x @ a.T) @ b.T
    magnitude = x.abs() @ w.abs().T + bias.abs() + s * (x.abs() @ a.abs().T) @ b.abs().T
    bound = operand_bound(magnitude, 2, mix.compute) + sum_bound(magnitude, D_IN + RANK, mix.compute)
    assert y.dtype == mix.compute
    bound += 2 * rounding_bound(magnitude, mix.compute)
    assert_within(y.flatten(0, 1), exact, bound, "y")
    layer = model[0]
    u = (dy @ b) * s
    rows = len(x)
    expected = {
        "lora_A": (u.T @ x, s * (dy.abs() @ b.abs()).T @ x.abs(), rows + D_OUT),
        "lora_B": (s * dy.T @ (x @ a.T), s * dy.abs().T @ (x.abs() @ a.abs().T), rows + D_IN),
    }
    for name, (exact, magnitude, length) in expected.items():
        grad = getattr(layer, name).grad
        assert grad.dtype == mix.adapter
        bound = operand_bound(magnitude, 1, mix.compute) + sum_bound(magnitude, length, mix.compute)
        assert_within(grad, exact, bound + rounding_bound(exact, mix.adapter) + EPS[F32] * magnitude, name)
    assert layer.weight.grad is None and layer.bias.grad is None


def controller(model: nn.Module, mix: Mix, **options) -> fe.EWC:
    """After one task, with B of the second one not zero."""
    ewc = fe.EWC(model, ewc_lambda=LAMBDA, generator=torch.Generator().manual_seed(3), **options)
    x, dy = data_of(mix)
    with ewc.accumulate_fisher(reduction="sum"):
        loss_of(mix, model, x, dy)[1].backward()
    ewc.consolidate()
    model.zero_grad()
    with torch.no_grad():
        model[0].lora_B.normal_(0, 0.3, generator=torch.Generator().manual_seed(4))
    return ewc


@each_mix
@pytest.mark.parametrize("form", ["autograd", "in place"])
def test_penalty_dtypes(mix, form):
    """The penalty is fp32 and its gradients have the dtype of the parameters."""
    model = model_of(mix)
    ewc = controller(model, mix)
    with mix.cast():
        value = ewc.penalty() if form == "autograd" else ewc.add_penalty_grad_()
    if form == "autograd":
        value.backward()
    _, _, a, b = wide(model)
    fisher, s = ewc.fishers["0"].to(F64), 0.5
    delta, size = s * b @ a, s * b.abs() @ a.abs()
    roundoff = (2 * RANK + 4) * EPS[F32]
    assert value.dtype == F32
    exact = LAMBDA / 2 * (fisher * delta.square()).sum()
    bound = roundoff * LAMBDA / 2 * (fisher * size.square()).sum()
    assert_within(value, exact, sum_bound(exact, D_IN * D_OUT, F32) + bound, "penalty")
    h, h_size = LAMBDA * fisher * delta, LAMBDA * fisher * size
    expected = {
        "lora_A": (s * b.T @ h, s * b.abs().T @ h_size),
        "lora_B": (s * h @ a.T, s * h_size @ a.abs().T),
    }
    for name, (exact, magnitude) in expected.items():
        grad = getattr(model[0], name).grad
        assert grad.dtype == mix.adapter
        bound = sum_bound(magnitude, max(D_IN, D_OUT), F32) + roundoff * magnitude
        assert_within(grad, exact, bound + rounding_bound(exact, mix.adapter), name)


def exact_fisher(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """(sum of squares of the gradients of samples, the same of magnitudes)."""
    x, dy = x.to(F64), dy.to(F64)
    gradients = torch.einsum("nto,nti->noi", dy, x)
    return gradients.square().sum(0), torch.einsum("nto,nti->noi", dy.abs(), x.abs()).square().sum(0)


@each_mix
@pytest.mark.parametrize("scale", [1.0, 4096.0])
def test_fisher_loss_scale(mix, scale):
    """The Fisher does not depend on the loss scale."""
    model = model_of(mix)
    ewc = fe.EWC(model)
    x, dy = data_of(mix)
    with ewc.accumulate_fisher(reduction="sum", loss_scale=scale):
        (loss_of(mix, model, x, dy)[1] * scale).backward()
    found = ewc.state_dict()["tensors"]["task.0"]
    exact, magnitude = exact_fisher(x, dy)
    bound = operand_bound(magnitude, 2, mix.compute) + 2 * sum_bound(magnitude, SAMPLES * TOKENS, F32)
    assert found.dtype == F32
    assert_within(found, exact, bound, "Fisher")


@pytest.mark.parametrize("autocast", [False, True])
def test_fp16_underflow(autocast):
    """dy = 2^-30 is zero in fp16, so the Fisher would be; times 2^20 it is exact."""
    mix = Mix(F16, F32, "inject", False)
    model = model_of(mix)
    x, dy = data_of(mix)
    found = {}
    for scale in (1.0, 2.0**20):
        ewc = fe.EWC(model)
        with ewc.accumulate_fisher(reduction="sum", loss_scale=scale):
            (model(x).float() * dy * (2.0**-30 * scale)).sum().backward()
        found[scale] = ewc.state_dict()["tensors"]["task.0"]
    exact, magnitude = exact_fisher(x, dy * 2.0**-30)
    assert not found[1.0].any()
    assert_within(found[2.0**20], exact, 2 * sum_bound(magnitude, SAMPLES * TOKENS, F32), "Fisher")


@pytest.mark.parametrize("base", [F16, BF16])
def test_loss_scale_overflow(base):
    """A loss scale that overflows is refused and leaves what was gathered before."""
    mix = Mix(base, F32, "inject", False)
    model = model_of(mix)
    ewc = controller(model, mix)
    x, dy = data_of(mix)
    with ewc.accumulate_fisher(reduction="sum"):
        loss_of(mix, model, x, dy)[1].backward()
    before = snapshot(model, ewc.state_dict()["tensors"])
    with (
        pytest.raises(FisherError, match="overflow of the loss scale"),
        ewc.accumulate_fisher(reduction="sum", loss_scale=3e38),
    ):
        (loss_of(mix, model, x, dy)[1] * 3e38).backward()
    assert_same(before, snapshot(model, ewc.state_dict()["tensors"]))


@each_mix
def test_consolidation_dtypes(mix):
    """Consolidation rounds the weight once and keeps every dtype."""
    model = model_of(mix)
    w, _, a, b = wide(model)
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    ewc = controller(model, mix, fisher_dtype=F32)
    exact, magnitude = w + 0.5 * b @ a, w.abs() + 0.5 * b.abs() @ a.abs()
    bound = sum_bound(magnitude, RANK + 1, F32) + rounding_bound(magnitude, mix.base)
    assert_within(model[0].weight, exact, bound, "weight")
    assert {name: tensor.dtype for name, tensor in model.state_dict().items()} == dtypes
    assert ewc.fishers["0"].dtype == F32
    controller_again = ewc.state_dict()
    with ewc.accumulate_fisher(reduction="sum"):  # and a second task
        loss_of(mix, model, *data_of(mix))[1].backward()
    ewc.consolidate()
    assert ewc.tasks == 2 and ewc.fishers["0"] is controller_again["tensors"]["fisher.0"]


SCALABLE = [mix for mix in MIXES if mix.adapter != F16]  # PyTorch refuses to unscale fp16 gradients


def gradients(mix: Mix, form: str, scaled: bool) -> tuple[dict[str, Tensor], nn.Module]:
    """Gradients of loss + penalty as the optimizer would see them."""
    model = model_of(mix)
    ewc = controller(model, mix)
    x, dy = data_of(mix)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=scaled)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loss = loss_of(mix, model, x, dy)[1]
    if form == "autograd":
        scaler.scale(loss + ewc.penalty()).backward()
    else:
        scaler.scale(loss).backward()
        if form == "in place before unscaling":
            ewc.add_penalty_grad_(scaler.get_scale())
    scaler.unscale_(optimizer)
    if form == "in place after unscaling":
        ewc.add_penalty_grad_()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    scaler.step(optimizer)
    scaler.update()
    return found, model


@pytest.mark.parametrize("mix", SCALABLE, ids=str)
@pytest.mark.parametrize("form", ["autograd", "in place before unscaling", "in place after unscaling"])
def test_grad_scaler_bitwise(mix, form):
    """Bitwise: its scale is a power of two, and nothing here is subnormal."""
    plain, scaled = gradients(mix, form, scaled=False), gradients(mix, form, scaled=True)
    assert plain[0].keys() == {"0.lora_A", "0.lora_B"}
    for name, grad in plain[0].items():
        assert torch.equal(grad, scaled[0][name]), name
    assert_same(snapshot(plain[1]), snapshot(scaled[1]))


@pytest.mark.parametrize("mix", [MIXES[0], MIXES[1], MIXES[4]], ids=str)
@pytest.mark.parametrize("form", ["autograd", "in place"])
def test_overflow_step_skipped(mix, form):
    """A step that overflows is skipped without damage."""
    model = model_of(mix)
    ewc = controller(model, mix)
    x, dy = data_of(mix)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    before = snapshot(model, ewc.state_dict()["tensors"])

    def step() -> None:
        optimizer.zero_grad()
        loss = loss_of(mix, model, x, dy)[1]
        if form == "autograd":
            scaler.scale(loss + ewc.penalty()).backward()
        else:
            scaler.scale(loss).backward()
            ewc.add_penalty_grad_(scaler.get_scale())
        scaler.step(optimizer)
        scaler.update()

    step()
    assert scaler.get_scale() == 2.0**126 and not optimizer.state
    assert_same(before, snapshot(model, ewc.state_dict()["tensors"]))
    scaler.update(2.0**8)
    step()
    after = snapshot(model, ewc.state_dict()["tensors"])
    assert all(bool(torch.isfinite(tensor).all()) for tensor in after.values())
    assert [n for n in before if not torch.equal(before[n], after[n])] == ["model.0.lora_A", "model.0.lora_B"]


def test_fp16_adapters_refused():
    """GradScaler does not unscale fp16 gradients; keep fp32 adapters (docs/integrations/precision.md)."""
    with pytest.raises(ValueError, match="unscale FP16 gradients"):
        gradients(Mix(F16, F16, "to", False), "autograd", scaled=True)
