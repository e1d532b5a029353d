# SPDX-License-Identifier: Apache-2.0
"""Layers with quantised weights of real libraries: adapters beside the library's product, EWC, merging."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from dense_fisher import dense_fisher
from quantised_models import KINDS, TARGETS, adapted, batch, dense, model_of, trained
from torch import nn
from torch.utils.checkpoint import checkpoint

import fused_ewclora as fe
from fused_ewclora.layers.digest import digest

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*quantising again"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
EPS = torch.finfo(torch.float32).eps
BF16 = torch.finfo(torch.bfloat16).eps
every_kind = pytest.mark.parametrize("kind", KINDS)
SOME = ("nf4 nested", "int8", "Int8Tensor", "Float8Tensor")
some_kinds = pytest.mark.parametrize("kind", SOME)
# A residual depends on the library in the numbers of the weight alone.
MODES = [*((kind, "requantise") for kind in KINDS), *((kind, "residual") for kind in SOME)]
both_modes = pytest.mark.parametrize(("kind", "mode"), MODES)


def states(model: nn.Module) -> dict[str, str]:
    """The bits of everything that determines the weights, and of the adapters."""
    found = {}
    for name, layer in fe.adapters(model).items():
        tensors = {**layer.weight_state(), **dict(layer.named_lora_parameters())}
        found |= {f"{name}.{key}": digest(tensor) for key, tensor in tensors.items()}
    return found


@every_kind
def test_product_is_the_librarys(kind):
    """With B = 0 outputs and gradients of x are the library's bit for bit, and keys stay."""
    model, plain = model_of(kind), model_of(kind)
    fe.inject(model, fe.LoRAConfig(r=4, target_modules=TARGETS))
    assert [key for key in model.state_dict() if ".lora_" not in key] == list(plain.state_dict())
    results = []
    for tested in (model, plain):
        x = batch(0)[0].requires_grad_()
        y = tested.fc1(x)
        y.square().sum().backward()
        results.append((y, x.grad))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-5, atol=1e-6)


@every_kind
def test_outputs_and_gradients(kind):
    """Outputs and gradients are those of a dense fp64 model with the dequantised weights, to fp32."""
    model = adapted(kind)
    plain = dense(model)
    x, y = batch(0)
    ours, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
    out, exact = model(ours), plain(theirs)
    F.cross_entropy(out, y).backward()
    F.cross_entropy(exact, y).backward()
    close = {"rtol": 100 * EPS, "atol": 100 * EPS}
    torch.testing.assert_close(out.double(), exact, **close)
    torch.testing.assert_close(ours.grad.double(), theirs.grad, **close)
    for name, layer in fe.adapters(model).items():
        g, a, b = plain.get_submodule(name).weight.grad, layer.lora_A.double(), layer.lora_B.double()
        torch.testing.assert_close(layer.lora_A.grad.double(), 1.5 * b.T @ g, **close)
        torch.testing.assert_close(layer.lora_B.grad.double(), 1.5 * g @ a.T, **close)


@some_kinds
def test_second_derivatives(kind):
    """A gradient penalty has the derivatives of the dense model."""
    model = adapted(kind)
    plain = dense(model)
    x, y = batch(0)
    found = []
    for tested, inputs in ((model, x), (plain, x.double())):
        inputs = inputs.clone().requires_grad_()
        (first,) = torch.autograd.grad(F.cross_entropy(tested(inputs), y), inputs, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), inputs)[0])
    torch.testing.assert_close(
        found[0].double(), found[1], rtol=1e-4, atol=1e-4 * float(found[1].abs().max())
    )


@both_modes
def test_three_tasks(kind, mode):
    """Over three tasks Fisher, penalty and weights follow the formulas; a residual is exact to bf16, and what
    rounding did is what the report tells."""
    model = adapted(kind, mode, seed=0)
    ewc = fe.EWC(model, 7.0)
    fishers = {name: torch.zeros(()) for name in TARGETS}
    origin = {name: layer.base_weight for name, layer in fe.adapters(model).items()}
    before = dict(origin)
    for task in range(3):
        trained(model, task)
        delta = {
            name: 1.5 * layer.lora_B.double() @ layer.lora_A.double()
            for name, layer in fe.adapters(model).items()
        }
        exact = sum(float((3.5 * fishers[name] * delta[name].detach() ** 2).sum()) for name in TARGETS)
        assert float(ewc.penalty().detach()) == pytest.approx(exact, rel=1e-4)
        x, y = batch(task)
        samples = [(x[i : i + 1].double(), y[i : i + 1]) for i in range(len(y))]
        fresh = dense_fisher(dense(model), TARGETS, samples, lambda m, s: F.cross_entropy(m(s[0]), s[1]))
        with ewc.accumulate_fisher():  # in train mode, in which no kind quantises inputs
            F.cross_entropy(model(x), y).backward()
        old = model(x)
        ewc.consolidate()
        changed = float((model(x) - old).detach().abs().max())
        for name, layer in fe.adapters(model).items():
            fishers[name] = fishers[name] + fresh[name]
            bound = 1e-4 * float(fishers[name].max())
            torch.testing.assert_close(ewc.fishers[name].double(), fishers[name], rtol=1e-3, atol=bound)
            update, now = before[name].double() + delta[name].detach(), layer.base_weight.double()
            error = float((now - update).norm())
            if mode == "residual":
                total = update - origin[name].double()
                torch.testing.assert_close(now, update, rtol=0, atol=BF16 * float(total.abs().max()))
                assert error < BF16 * float(total.norm()) and changed < 0.02
            else:
                assert layer.rounding.error == pytest.approx(error, rel=1e-3)
                assert layer.rounding.update == pytest.approx(float(delta[name].detach().norm()), rel=1e-3)
            before[name] = layer.base_weight
        assert changed > 0.0 or mode == "residual"


@both_modes
def test_unmerge_and_checkpoints(kind, mode, tmp_path):
    """unmerge restores every bit; a checkpoint, loaded into a fresh model, has every bit; copies compute the
    same."""
    model = adapted(kind, mode)
    ewc = fe.EWC(model, 1.0)
    ewc.end_task([batch(0)], F.cross_entropy)
    trained(model, 5)
    x, _ = batch(1)
    bits, y = states(model), model(x)
    fe.merge(model)
    assert states(model) != bits
    fe.unmerge(model)
    assert states(model) == bits and torch.equal(model(x), y)
    fe.save_pretrained(tmp_path, model, ewc)
    fresh = adapted(kind, mode)
    fe.load_pretrained(tmp_path, fresh, fe.EWC(fresh, 1.0))
    assert states(fresh) == bits and torch.equal(fresh(x), y)
    other = copy.deepcopy(model)
    assert states(other) == bits and torch.equal(other(x), y)
    other.fc1.quantised_merge = other.fc2.quantised_merge = "requantise"
    fe.merge(other)
    assert states(model) == bits and torch.equal(model(x), y)
    with fe.disabled(model):
        assert not torch.equal(model(x), y)


@every_kind
def test_ejects_into_the_librarys_layers(kind):
    """Requantised weights are what the library makes of the sum, in its own classes and keys."""
    model, plain = adapted(kind, "requantise"), model_of(kind)
    sums = {name: layer.consolidated_weight() for name, layer in fe.adapters(model).items()}
    expected = {
        name: layer.quantisation.numbers(
            layer, torch.float32, layer.quantisation.quantised(layer, sums[name])
        )
        for name, layer in fe.adapters(model).items()
    }
    fe.eject(model)
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    assert list(model.state_dict()) == list(plain.state_dict())
    x = torch.eye(model.fc2.in_features)
    model.train()
    torch.testing.assert_close(model.fc2(x).T, expected["fc2"], rtol=1e-5, atol=1e-6)


@some_kinds
def test_compile_and_checkpointing(kind):
    """One graph, and activation checkpointing, with the results of eager calls."""
    model = adapted(kind, lora_dropout=0.3).eval()
    x, y = batch(0)

    def gradients(run):
        inputs = x.clone().requires_grad_()
        model.zero_grad()
        F.cross_entropy(run(inputs), y).backward()
        return [inputs.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    expected = gradients(model)
    torch.compiler.reset()  # kinds of weights count as versions of one function
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for run in (compiled, lambda z: checkpoint(model, z, use_reentrant=False)):
        for one, other in zip(gradients(run), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@some_kinds
def test_autocast(kind):
    """Under autocast adapters stay in fp32 beside what the library computes."""
    model = adapted(kind)
    x, _ = batch(0)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    torch.testing.assert_close(y.float(), expected, rtol=0, atol=0.05)
    y.float().sum().backward()
    assert model.fc1.lora_A.grad.dtype == torch.float32


@some_kinds
def test_refused_without_choice(kind):
    """Without quantised_merge nothing changes a weight, and the error names the layer and both choices."""
    model = adapted(kind, None)
    before = states(model)
    ewc = fe.EWC(model, 1.0)
    for call in (lambda: fe.merge(model), lambda: ewc.end_task([batch(0)], F.cross_entropy)):
        with pytest.raises(fe.TargetError, match=r'fc1: .*"requantise".*"residual"'):
            call()
    assert states(model) == before and ewc.tasks == 0


def test_residual_keeps_more():
    """What the page says of 4 bits: an update of training size is lost by rounding, and kept beside it."""
    kept, lost = adapted("nf4"), adapted("nf4", "requantise")
    for model in (kept, lost):
        trained(model, 1, size=0.01)
    x, _ = batch(0)
    exact = kept(x)
    fe.merge(kept)
    with pytest.warns(fe.EWCLoRAWarning, match=r"the error is .* of the update"):
        fe.merge(lost)
    assert float((kept(x) - exact).norm()) < 0.05 * float((lost(x) - exact).norm())
