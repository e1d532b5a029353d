# SPDX-License-Identifier: Apache-2.0
"""Adapted layers whose weight is quantised: a kind that is exact in fp64 against dense copies of a model."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
import torch.nn.functional as F
from dense_fisher import dense_fisher
from few_bits import HIDDEN, FewBits, FewBitsMLP, LoRAFewBits, batch, quantise
from replicas import Replicated
from torch import nn
from torch.utils.checkpoint import checkpoint

import fused_ewclora as fe
from fused_ewclora.layers.digest import digest

TARGETS = ["fc1", "fc2"]
BF16 = torch.finfo(torch.bfloat16).eps


def adapted(mode: str | None = "residual", seed: int = 3, **options):
    """A model with adapters that are not zero."""
    model = FewBitsMLP()
    fe.inject(
        model, fe.LoRAConfig(r=2, lora_alpha=3, target_modules=TARGETS, quantised_merge=mode, **options)
    )
    trained(model, seed)
    return model


@torch.no_grad()
def trained(model: nn.Module, seed: int, size: float = 0.3) -> None:
    """What training does to lora_B."""
    generator = torch.Generator().manual_seed(seed)
    for layer in fe.adapters(model).values():
        for _, _, b in layer.adapter_parameters():
            b.copy_(size * torch.randn(b.shape, generator=generator, dtype=torch.float64))


@torch.no_grad()
def dense(model: nn.Module) -> nn.Module:
    """An ordinary model with the weights W + s B A, which require gradients."""
    plain = FewBitsMLP(nn.Linear).double()
    plain.head.load_state_dict(model.head.state_dict())
    for name, layer in fe.adapters(model).items():
        target = plain.get_submodule(name)
        target.weight.copy_(layer.base_weight if layer.merged else layer.consolidated_weight())
        if layer.bias is not None:
            target.bias.copy_(layer.bias)
    return plain


def states(model: nn.Module) -> dict[str, str]:
    """The bits of everything that determines the weights, and of the adapters."""
    found = {}
    for name, layer in fe.adapters(model).items():
        tensors = {**layer.weight_state(), **dict(layer.named_lora_parameters())}
        found |= {f"{name}.{key}": digest(tensor) for key, tensor in tensors.items()}
    return found


def test_outputs_and_gradients():
    """Outputs and all gradients are those of the dense model, through B A by the chain rule."""
    model = adapted()
    plain = dense(model)
    x, y = batch(0)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    F.cross_entropy(model(ours), y).backward()
    F.cross_entropy(plain(theirs), y).backward()
    torch.testing.assert_close(model(x), plain(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)
    for name, layer in fe.adapters(model).items():
        g = plain.get_submodule(name).weight.grad
        torch.testing.assert_close(layer.lora_A.grad, 1.5 * layer.lora_B.T @ g, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(layer.lora_B.grad, 1.5 * g @ layer.lora_A.T, rtol=1e-10, atol=1e-12)


def test_base_is_untouched():
    """Injection keeps state_dict keys, outputs and the trainable bias; eject gives the plain class back."""
    model, other = FewBitsMLP(), FewBitsMLP()
    x, _ = batch(0)
    report = fe.inject(model, fe.LoRAConfig(r=2, target_modules=TARGETS, quantised_merge="residual"))
    assert {row["class"] for row in report.rows} == {"LoRAFewBits"}
    assert [key for key in model.state_dict() if ".lora_" not in key] == list(other.state_dict())
    assert torch.equal(model(x), other(x))
    trained(model, 1)
    with fe.disabled(model):
        assert torch.equal(model(x), other(x))
    fe.eject(model, merge=False)
    assert type(model.fc1) is FewBits and torch.equal(model(x), other(x))
    assert list(model.state_dict()) == list(other.state_dict()) and model.fc1.bias.requires_grad
    assert vars(model.fc1).keys() == vars(other.fc1).keys()


@pytest.mark.parametrize("slices", [("q", "v"), ("k",)])
def test_slices_of_rows(slices):
    """Adapters on slices act on their rows, with their Fishers and merges."""

    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.qkv = FewBits(6, 12)

        def forward(self, x):
            return self.qkv(x)

    model = Packed()
    layout = fe.QKVLayout(("q", "k", "v"), (4, 4, 4))
    fe.inject(
        model,
        fe.LoRAConfig(r=2, target_modules=["qkv"], slices=slices, layout=layout, quantised_merge="residual"),
    )
    trained(model, 2)
    x, _ = batch(1)
    layer = model.qkv
    expected = F.linear(x, layer.consolidated_weight(), layer.bias)
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    fe.merge(model)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=4 * BF16)


@pytest.mark.parametrize("samples", [1, 7])
@pytest.mark.parametrize("merged_before", [False, True])
def test_exact_fisher(samples, merged_before):
    """The Fisher is the mean of squared per-sample gradients of the dense model, also beside a residual."""
    model = adapted()
    ewc = fe.EWC(model, 1.0, fisher_dtype=torch.float64)
    if merged_before:
        ewc.end_task([batch(5)], F.cross_entropy, gamma=0.0)
        trained(model, 4)
    x, y = batch(1, samples)
    ewc.estimate_fisher([(x, y)], F.cross_entropy)
    plain = dense(model)
    singles = [(x[i : i + 1], y[i : i + 1]) for i in range(samples)]
    exact = dense_fisher(plain, TARGETS, singles, lambda m, s: F.cross_entropy(m(s[0]), s[1]))
    ewc.consolidate(gamma=0.0)
    for name in TARGETS:
        torch.testing.assert_close(ewc.fishers[name], exact[name], rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("reentrant", [True, False])
def test_fisher_with_checkpointing(reentrant):
    """Recomputed calls count once."""
    fishers = []
    for wrapped in (False, True):
        model = adapted()
        if wrapped:
            first = model.fc1.forward
            model.fc1.forward = lambda x, first=first: checkpoint(first, x, use_reentrant=reentrant)
        ewc = fe.EWC(model, 1.0, fisher_dtype=torch.float64)
        x, y = batch(1)
        with ewc.accumulate_fisher():
            F.cross_entropy(model(x.requires_grad_()), y).backward()
        ewc.consolidate()
        fishers.append(ewc.fishers)
    for name in TARGETS:
        torch.testing.assert_close(fishers[0][name], fishers[1][name], rtol=1e-12, atol=0)


@pytest.mark.parametrize("mode", ["residual", "requantise"])
def test_three_tasks(mode):
    """Penalty, Fisher and weights over three tasks are those of the formulas, written out densely."""
    model = adapted(mode, seed=0)
    ewc = fe.EWC(model, 7.0, gamma=0.5, fisher_dtype=torch.float64)
    fishers = dict.fromkeys(TARGETS, 0.0)
    stored = {name: layer.base_weight for name, layer in fe.adapters(model).items()}
    origin = {name: weight.clone() for name, weight in stored.items()}
    for task in range(3):
        trained(model, task)
        delta = {name: 1.5 * layer.lora_B @ layer.lora_A for name, layer in fe.adapters(model).items()}
        expected = sum(3.5 * (fishers[name] * delta[name] ** 2).sum() for name in TARGETS)
        assert float(ewc.penalty().detach()) == pytest.approx(
            float(torch.as_tensor(expected).detach()), rel=1e-9
        )
        data = [batch(10 * task), batch(10 * task + 1, 5)]
        samples = [(x[i : i + 1], y[i : i + 1]) for x, y in data for i in range(len(y))]
        fresh = dense_fisher(dense(model), TARGETS, samples, lambda m, s: F.cross_entropy(m(s[0]), s[1]))
        ewc.end_task(data, F.cross_entropy)
        for name, layer in fe.adapters(model).items():
            fishers[name] = 0.5 * fishers[name] + fresh[name] if task else fresh[name]
            torch.testing.assert_close(ewc.fishers[name], fishers[name], rtol=1e-9, atol=1e-14)
            total = stored[name] + delta[name]
            if mode == "residual":
                residual = (total - origin[name]).to(torch.bfloat16)
                assert torch.equal(layer.lora_residual, residual)
                stored[name] = origin[name] + residual.double()
            else:
                codes, scales = quantise(total)
                rounded = codes * scales[:, None]
                assert layer.rounding.update == pytest.approx(float(delta[name].norm()), rel=1e-9)
                assert layer.rounding.error == pytest.approx(float((rounded - total).norm()), rel=1e-9)
                stored[name] = rounded
            torch.testing.assert_close(layer.base_weight, stored[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", ["residual", "requantise"])
@pytest.mark.parametrize("tasks", [0, 1])
@pytest.mark.filterwarnings("ignore:.*quantising again")
def test_unmerge_is_exact(mode, tasks):
    """unmerge restores every bit, and merged outputs are those of consolidation."""
    model = adapted(mode)
    ewc = fe.EWC(model, 1.0)
    for task in range(tasks):
        ewc.end_task([batch(task)], F.cross_entropy)
        trained(model, task)
    x, _ = batch(9)
    before, y = states(model), model(x)
    total = dense(model)
    fe.merge(model)
    merged = model(x)
    if mode == "residual":  # exact but for the rounding of the residual
        ours, theirs = (z.clone().requires_grad_() for z in (x, x))
        model(ours).square().sum().backward()
        total(theirs).square().sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=20 * BF16)
    with fe.disabled(model):
        assert states(model) == before
    assert torch.equal(model(x), merged)
    fe.unmerge(model)
    assert states(model) == before and torch.equal(model(x), y)
    ewc.end_task([batch(8)], F.cross_entropy)
    assert torch.equal(model(x), merged)


def test_nothing_chosen():
    """Without a choice, everything that would change a weight is refused before anything is changed."""
    model = adapted(None)
    ewc = fe.EWC(model, 1.0)
    before = states(model)
    for call in (
        lambda: fe.merge(model),
        lambda: fe.eject(model),
        lambda: ewc.end_task([batch(0)], F.cross_entropy),
    ):
        with pytest.raises(fe.TargetError, match=r"fc1: its weight is quantised.*requantise.*residual"):
            call()
        assert states(model) == before and not ewc.fishers
    for layer in fe.adapters(model).values():
        layer.quantised_merge = "residual"
    ewc.consolidate()  # of the Fisher that was estimated
    assert ewc.tasks == 1
    with pytest.raises(fe.ArgumentError, match=r"quantised_merge: expected one of"):
        fe.LoRAConfig(target_modules=TARGETS, quantised_merge="round")
    model.fc1.quantised_merge = "round"
    trained(model, 1)
    with pytest.raises(fe.TargetError, match=r"quantised_merge: expected one of"):
        fe.merge(model)


@pytest.mark.filterwarnings("ignore:.*quantising again")
def test_eject_with_residual():
    """A residual is never lost: eject refuses until it is to be rounded into the weight."""
    model = adapted("residual")
    ewc = fe.EWC(model, 1.0)
    with pytest.raises(fe.TargetError, match=r"FewBits cannot hold the residual"):
        fe.eject(model)
    fe.merge(model)
    fe.eject(copy.deepcopy(model), merge=False)  # only of adapters, which are dropped
    fe.unmerge(model)
    ewc.end_task([batch(0)], F.cross_entropy)
    for merge in (True, False):
        with pytest.raises(fe.TargetError, match=r"cannot hold the residual"):
            fe.eject(model, merge=merge)
    expected = {name: quantise(layer.consolidated_weight()) for name, layer in fe.adapters(model).items()}
    for layer in fe.adapters(model).values():
        layer.quantised_merge = "requantise"
    fe.eject(model)
    for name, (codes, scales) in expected.items():
        layer = model.get_submodule(name)
        assert type(layer) is FewBits and "lora_residual" not in layer._buffers
        assert torch.equal(layer.weight, codes) and torch.equal(layer.scales, scales)


def test_untrained_adapter():
    """A merge of B A = 0 changes no bit, although quantising again might."""
    model = FewBitsMLP()
    fe.inject(model, fe.LoRAConfig(r=2, target_modules=TARGETS, quantised_merge="requantise"))
    before = states(model)
    fe.merge(model)
    assert states(model) == before
    assert [row["update"] for row in fe.rounding(model).rows] == [0.0, 0.0]


@pytest.mark.parametrize("mode", ["residual", "requantise"])
def test_nonfinite_is_refused(mode):
    """NaN and Inf in an update are refused, and nothing is changed; libraries would quantise them."""
    model = adapted(mode)
    ewc = fe.EWC(model, 1.0)
    ewc.estimate_fisher([batch(0)], F.cross_entropy)
    with torch.no_grad():
        model.fc2.lora_B[0, 0] = float("nan")
    x, before = batch(0)[0], states(model)
    with pytest.raises(fe.ArgumentError, match=r"fc2: merge: .*expected finite values"):
        fe.merge(model)
    assert states(model) == before
    with pytest.raises(fe.FisherError, match=r"of fc2"):
        ewc.consolidate()
    weights = {key: value for key, value in states(model).items() if "residual" not in key}
    assert weights == {key: value for key, value in before.items() if "residual" not in key}
    assert torch.isfinite(model.fc1(x)).all()


@pytest.mark.parametrize("mode", ["residual", "requantise"])
@pytest.mark.filterwarnings("ignore:.*quantising again")
def test_checkpoints(mode, tmp_path):
    """A checkpoint restores weights bit for bit, and refuses other weights and parts."""
    model = adapted(mode)
    ewc = fe.EWC(model, 1.0)
    ewc.end_task([batch(0)], F.cross_entropy)
    trained(model, 7)
    fe.save_pretrained(tmp_path, model, ewc)
    fresh = adapted(None)
    other = fe.EWC(fresh, 1.0)
    fe.load_pretrained(tmp_path, fresh, other)
    assert states(fresh) == states(model)
    x, _ = batch(3)
    assert torch.equal(fresh(x), model(x))
    unlike = FewBitsMLP()
    unlike.fc1.scales *= 2  # the codes are the same
    fe.inject(unlike, fe.LoRAConfig(r=2, lora_alpha=3, target_modules=TARGETS))
    before = states(unlike)
    with pytest.raises(fe.CheckpointError, match=r"fc1.weight"):
        fe.load_pretrained(tmp_path, unlike, fe.EWC(unlike, 1.0))
    assert states(unlike) == before


def test_checkpoint_before_tasks(tmp_path):
    """Before the first task a checkpoint has the adapters alone, and loads into no consolidated model."""
    model = adapted()
    fe.save_pretrained(tmp_path, model)
    done = adapted()
    fe.EWC(done, 1.0).end_task([batch(0)], F.cross_entropy)
    with pytest.raises(fe.CheckpointError, match=r"fc1.*consolidated"):
        fe.load_pretrained(tmp_path, done)


def test_copies_and_pickles():
    """Copies and pickles have weights, residual and choice of their own."""
    model = adapted()
    fe.EWC(model, 1.0).end_task([batch(0)], F.cross_entropy)
    x, _ = batch(1)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x)) and other.fc1.quantised_merge == "residual"
        trained(other, 1)
        fe.merge(other)
        assert torch.equal(other.fc1.lora_residual, model.fc1.lora_residual) is False


def test_state_dict_roundtrip():
    """The residual is part of the state_dict, and loads into layers that have none yet."""
    model = adapted()
    fe.EWC(model, 1.0).end_task([batch(0)], F.cross_entropy)
    assert "fc1.lora_residual" in model.state_dict()
    fresh = adapted()
    fresh.load_state_dict(model.state_dict())
    assert states(fresh) == states(model)


def test_rounding_report():
    """The report tells what rounding did to each layer; without quantised layers it says so."""
    model = adapted("requantise")
    assert [row["share"] for row in fe.rounding(model).rows] == [None, None]
    trained(model, 1, size=1e-3)
    with pytest.warns(fe.EWCLoRAWarning, match=r"merge: quantising again.*fe.rounding\(model\)"):
        fe.merge(model)
    for row, layer in zip(fe.rounding(model).rows, fe.adapters(model).values(), strict=True):
        assert row["merge"] == "requantise" and row["weight"] == "few bits"
        assert row["share"] == row["error"] / row["update"] == layer.rounding.share > 0.5
    plain = nn.Sequential(nn.Linear(4, 4))
    fe.inject(plain, fe.LoRAConfig(r=1, target_modules=["0"]))
    assert not fe.rounding(plain).rows and "no adapted layers" in str(fe.rounding(plain))


def test_factors_mode():
    """merge_mode "factors" gives W0 + s (sum B)(sum A), in bf16 beside the weight."""
    model = adapted()
    ewc = fe.EWC(model, 1.0, merge_mode="factors")
    origin = {name: layer.base_weight for name, layer in fe.adapters(model).items()}
    sums = {name: [0.0, 0.0] for name in TARGETS}
    for task in range(2):
        trained(model, task)
        for name, layer in fe.adapters(model).items():
            sums[name] = [sums[name][0] + layer.lora_A.detach(), sums[name][1] + layer.lora_B.detach()]
        ewc.end_task([batch(task)], F.cross_entropy)
    for name, layer in fe.adapters(model).items():
        exact = 1.5 * sums[name][1] @ sums[name][0]
        torch.testing.assert_close(layer.base_weight - origin[name], exact, rtol=BF16, atol=1e-12)


def test_methods_consolidate():
    """Methods fold their adapters into quantised weights as well, CoDyRA and P&M at the end of a task,
    SD-LoRA, O-LoRA and ITA at the end of all."""
    x, y = batch(1)
    ita = functools.partial(fe.methods.ITA, alpha=1.0, labels="sampled")
    merging = functools.partial(fe.methods.PerturbAndMerge, epsilon=0.0)
    for method in (fe.methods.CoDyRA, merging, ita, fe.methods.SDLoRA, fe.methods.OLoRA):
        model = FewBitsMLP()
        running = method(model, fe.LoRAConfig(r=2, target_modules=TARGETS, quantised_merge="residual"))
        running.begin_task(0)
        running.prepare([(x, y)])
        trained(model, 1)
        before = model(x)
        running.end_task([(x, y)], F.cross_entropy)
        torch.testing.assert_close(model(x), before, rtol=0, atol=HIDDEN * BF16)
    for layer in fe.adapters(model).values():
        layer.quantised_merge = "requantise"
    total = {name: layer.consolidated_weight() for name, layer in fe.adapters(model).items()}
    running.export()
    assert all(torch.equal(model.get_submodule(name).weight, quantise(w)[0]) for name, w in total.items())


def test_explained():
    """explain names the library's product, and sharding is refused."""
    model = adapted()
    row = fe.explain(model).rows[0]
    assert "add_low_rank" in row["algorithm"] and row["why_not_faster"] is None
    assert fe.verify_forward(model, batch(0)[0]) == {"fc1": 1, "fc2": 1}
    with pytest.raises(fe.TargetError, match=r"shard_: fc1: its weight is quantised"):
        fe.EWC(model, 1.0).shard_()
    assert isinstance(model.fc1, LoRAFewBits)


def test_data_parallel_refused():
    """Replicas, whose copies of the weight would not be known to be quantised, are refused."""
    model = adapted()
    with pytest.raises(fe.TargetError, match=r"nn\.DataParallel: expected weights that are plain tensors"):
        Replicated(model)(batch(0)[0])
