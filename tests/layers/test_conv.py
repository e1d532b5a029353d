# SPDX-License-Identifier: Apache-2.0
"""Adapted convolutions equal plain ones with dense weights, in everything that linear layers can do."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from conv_models import CLASSES, NAMES, Convs, adapted, dense, dense_squares, images, plain
from models import randomize_adapters_
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fused_ewclora as fe
from fused_ewclora.layers.conv import LoRAConv1d, LoRAConv2d

WIDE = torch.float64
TIGHT = {"rtol": 1e-10, "atol": 1e-12}
FORMATS = [torch.contiguous_format, torch.channels_last]


def gradients(model: nn.Module, x: Tensor, wanted) -> tuple[Tensor, ...]:
    return torch.autograd.grad(model(x).square().sum(), wanted)


@pytest.mark.parametrize("padding_mode", ["zeros", "circular", "reflect", "replicate"])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("lora_alpha", [None, 3.0])
def test_outputs_and_gradients(padding_mode, memory_format, lora_alpha):
    """Those of the dense model: dA = diag(s) B^T G and dB = G A^T diag(s) from its gradients G."""
    model = adapted(plain(padding_mode).to(memory_format=memory_format), lora_alpha=lora_alpha)
    other = dense(model).requires_grad_(True)
    x = images()[0].to(memory_format=memory_format).requires_grad_()
    torch.testing.assert_close(model(x), other(x), **TIGHT)
    layers = fe.adapters(model)
    assert list(layers) == list(NAMES)
    pairs = [layer.adapter_parameters()[0] for layer in layers.values()]
    found = iter(gradients(model, x, [x, *(p for _, a, b in pairs for p in (a, b))]))
    expected = iter(gradients(other, x, [x, *(other.get_submodule(name).weight for name in layers)]))
    torch.testing.assert_close(next(found), next(expected), **TIGHT)
    for piece, a, b in pairs:
        g = next(expected).flatten(1) * piece.scaling
        torch.testing.assert_close(next(found), b.T @ g, **TIGHT)
        torch.testing.assert_close(next(found), g @ a.T, **TIGHT)


@pytest.mark.parametrize("mode", ["sample", "batch"])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_three_tasks(mode, memory_format):
    """Fishers, penalty, its gradients and the merged weights over three tasks."""
    model = adapted(plain("circular").to(memory_format=memory_format))
    model.head.requires_grad_(True)
    ewc = fe.EWC(model, 10.0, fisher_mode=mode, fisher_dtype=WIDE)
    total = dict.fromkeys(NAMES, 0.0)
    for task in range(3):
        x, y = images(6, seed=task)
        batches = [(x[:4].to(memory_format=memory_format), y[:4]), (x[4:], y[4:])]
        fishers = dense_squares(model, batches, mode)
        other = dense(model)
        before = model(x).detach()
        ewc.end_task(batches, F.cross_entropy)
        torch.testing.assert_close(model(x), before, **TIGHT)
        randomize_adapters_(model, seed=task)
        value = 0.0
        for name, layer in fe.adapters(model).items():
            weight = other.get_submodule(name).weight
            torch.testing.assert_close(layer.weight, weight.detach().requires_grad_(False), **TIGHT)
            assert layer.weight.is_contiguous(memory_format=memory_format) or layer.weight.dim() == 3
            total[name] = total[name] + fishers[name]
            torch.testing.assert_close(ewc.fishers[name], total[name], rtol=1e-9, atol=1e-14)
            ((_, a, b),) = layer.adapter_parameters()
            value = value + 5.0 * (total[name] * (b @ a).square()).sum()
        parameters = [p for layer in fe.adapters(model).values() for _, p in layer.named_lora_parameters()]
        penalty = ewc.penalty()
        torch.testing.assert_close(penalty, value, rtol=1e-9, atol=0)
        theirs, ours = (torch.autograd.grad(v, parameters) for v in (value, penalty))
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_keys_merge_eject():
    """Base keys stay; merge, unmerge, disabled and eject do what they do with linear layers."""
    base = plain()
    model = adapted(copy.deepcopy(base).to(memory_format=torch.channels_last))
    keys = set(base.state_dict())
    assert {key for key in model.state_dict() if ".lora_" not in key} == keys
    assert isinstance(model.point, LoRAConv2d) and isinstance(model.line, LoRAConv1d)
    assert tuple(model.strided.lora_A.shape) == (2, 8 * 3 * 2)
    x, _ = images()
    y, expected = model(x), dense(model)(x)
    with fe.disabled(model):
        torch.testing.assert_close(model(x), base(x), **TIGHT)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fe.merge(model)
    torch.testing.assert_close(model(x), expected, **TIGHT)
    assert model.shared.weight.is_contiguous(memory_format=torch.channels_last)
    fe.unmerge(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model.load_state_dict(base.state_dict(), strict=False)
    fe.eject(model)
    assert type(model.point) is nn.Conv2d and type(model.line) is nn.Conv1d
    assert list(model.state_dict()) == list(base.state_dict())
    assert all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(model(x), y, **TIGHT)


def test_copies():
    """deepcopy and pickle give models of their own."""
    model = adapted()
    x, _ = images()
    y = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), y)
        fe.merge(other)
        assert torch.equal(model(x), y)
    assert "lora(r=2" in repr(model.point) and "kernel_size=(1, 1)" in repr(model.point)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_checkpoints(tmp_path, memory_format):
    """Consolidated weights, adapters and Fishers come back, whatever the memory format of the new model."""
    model = adapted(lora_dropout=0.1)
    ewc = fe.EWC(model, 1.0)
    ewc.end_task([images()], F.cross_entropy)
    randomize_adapters_(model)
    fe.save_pretrained(tmp_path, model, ewc)
    other = adapted(plain().to(memory_format=memory_format), lora_dropout=0.1)
    new = fe.EWC(other, 1.0)
    fe.load_pretrained(tmp_path, other, new)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in other.state_dict().items())
    assert all(torch.equal(fisher, ewc.fishers[key]) for key, fisher in new.fishers.items())


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (nn.Conv2d(6, 6, 3, groups=6), r"depthwise convolution \(groups=6, channels=6\)"),
        (nn.Conv1d(6, 4, 1, groups=2), r"grouped convolution \(groups=2, channels=6\)"),
        (nn.ConvTranspose2d(3, 4, 2), "ConvTranspose2d is not nn.Conv1d or nn.Conv2d"),
        (nn.Conv3d(3, 4, 2), "Conv3d is not nn.Conv1d or nn.Conv2d"),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1)), "ParametrizedConv2d is a subclass"),
        (type("Standardised", (nn.Conv2d,), {})(3, 4, 1), "Standardised is a subclass of Conv2d"),
    ],
)
def test_refused(module, why):
    """Convolutions that cannot be adapted are refused by name, before anything changes."""
    model = nn.ModuleDict({"good": nn.Conv2d(3, 3, 1), "bad": module})
    with pytest.raises(fe.TargetError, match=f"bad: .*{why}.*exclude_modules"):
        fe.inject(model, fe.LoRAConfig(target_modules=["good", "bad"]))
    assert type(model["good"]) is nn.Conv2d
    fe.inject(model, fe.LoRAConfig(target_modules=["good", "bad"], exclude_modules=["bad"]))
    assert list(fe.adapters(model)) == ["good"]


@pytest.mark.parametrize("lazy", [nn.LazyConv2d, nn.LazyLinear])
def test_lazy_refused(lazy):
    """A model with a lazy module is refused until it has run."""
    model = nn.Sequential(nn.Linear(4, 3), lazy(4, 1))
    with pytest.raises(fe.TargetError, match=r"1\.weight: has no shape yet; run the model once"):
        fe.inject(model, fe.LoRAConfig(target_modules=["0"]))
    assert type(model[0]) is nn.Linear
    model(torch.zeros(3, 2, 4))
    fe.inject(model, fe.LoRAConfig(target_modules=["0", "1"]))
    assert list(fe.adapters(model)) == ["0", "1"]


def test_all_linear():
    """`"all-linear"` selects linear layers only; names and patterns select convolutions."""
    model = plain()
    fe.inject(model, fe.LoRAConfig(target_modules="all-linear"))
    assert list(fe.adapters(model)) == ["head"]
    fe.inject(model, fe.LoRAConfig(target_modules="s.*"))
    assert list(fe.adapters(model)) == ["stem", "shared", "strided", "same", "head"]
    with pytest.raises(fe.TargetError, match="point: has adapters"):
        fe.inject(adapted(), fe.LoRAConfig(target_modules=["point"]))


def test_misspelt_name():
    """What can be adapted, and names like the one that matches nothing, are said."""
    with pytest.raises(fe.TargetError, match=r"did you mean 'shared'.*which names select: stem, shared"):
        fe.inject(plain(), fe.LoRAConfig(target_modules=["shard"]))


def test_changed_settings():
    """Strides, padding and dilation are those that the module has when it runs."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1)).double()
    adapted(model, names=["0"])
    other = dense(model)
    for setting in ({"stride": (2, 1)}, {"padding": (0, 2), "dilation": (1, 2)}, {"padding": 2, "stride": 2}):
        for each in (model[0], other[0]):
            vars(each).update(setting)
        x = images(2)[0]
        torch.testing.assert_close(model(x), other(x), **TIGHT)


def test_slices():
    """An adapter on the key rows of a packed projection changes these channels alone."""
    model = nn.Sequential(nn.Conv2d(3, 12, 1)).double()
    base = copy.deepcopy(model)
    layout = fe.QKVLayout(("q", "k", "v"))
    fe.inject(model, fe.LoRAConfig(r=2, target_modules=["0"], slices=("k",), layout=layout))
    randomize_adapters_(model)
    x = images(2)[0]
    changed = (model(x) - base(x)).abs().amax((0, 2, 3)) > 0
    assert changed.tolist() == [False] * 4 + [True] * 4 + [False] * 4
    expected = (model[0].lora_B_k @ model[0].lora_A_k)[:, :, None, None]
    torch.testing.assert_close((model(x) - base(x))[:, 4:8], F.conv2d(x, expected), **TIGHT)


class Blocks(nn.Module):
    """Two convolutions under activation checkpointing."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.head, self.reentrant = nn.Linear(4, CLASSES), reentrant

    def block(self, x: Tensor) -> Tensor:
        return torch.tanh(self.second(torch.tanh(self.first(x))))

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is not None:
            x = checkpoint(self.block, x.requires_grad_(self.reentrant), use_reentrant=self.reentrant)
        else:
            x = self.block(x)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_activation_checkpointing(reentrant):
    """The Fisher counts every sample once, also where the forward is computed again."""
    torch.manual_seed(0)
    model = adapted(Blocks(reentrant).double(), names=["first", "second"])
    batches = [images(4)]
    ewc = fe.EWC(model, 1.0, fisher_dtype=WIDE)
    model.reentrant = None  # autograd.grad cannot go through a reentrant checkpoint
    expected = dense_squares(model, batches)
    model.reentrant = reentrant
    ewc.end_task(batches, F.cross_entropy)
    for name, fisher in ewc.fishers.items():
        torch.testing.assert_close(fisher, expected[name], rtol=1e-9, atol=1e-14)


class Video(nn.Module):
    """x `[N, 3 frames, 3, 12, 12]`, frames folded into the batch, samples or times first."""

    def __init__(self, times_first: bool) -> None:
        super().__init__()
        self.inner, self.times_first = Convs(), times_first

    def forward(self, x: Tensor) -> Tensor:
        count, frames = x.shape[:2]
        folded = x.transpose(0, 1).flatten(0, 1) if self.times_first else x.flatten(0, 1)
        y = self.inner(folded).unflatten(0, (frames, count) if self.times_first else (count, frames))
        return y.mean(0 if self.times_first else 1)


@pytest.mark.parametrize("times_first", [False, True])
def test_videos(times_first):
    """The pass finds which frames belong to which sample."""
    torch.manual_seed(0)
    model = adapted(Video(times_first).double(), names=NAMES)
    x = torch.randn(4, 3, 3, 12, 12, dtype=WIDE)
    batches = [(x, images(4)[1])]
    expected = dense_squares(model, batches)
    ewc = fe.EWC(model, 1.0, fisher_dtype=WIDE)
    ewc.end_task(batches, F.cross_entropy)
    for name, fisher in ewc.fishers.items():
        torch.testing.assert_close(fisher, expected[name], rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    """Adapters are fp32, the output has the dtype of the model, merging rounds once."""
    model = adapted(plain(dtype=dtype))
    assert model.stem.lora_A.dtype == torch.float32
    x, y = images(dtype=dtype)
    wide = dense(copy.deepcopy(model).double())
    out = model(x)
    assert out.dtype == dtype
    eps = torch.finfo(dtype).eps
    exact = wide(x.double())
    assert bool(((out.double() - exact).abs() < 40 * eps * exact.abs().max()).all())
    F.cross_entropy(out.float(), y).backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    consolidated = {name: layer.consolidated_weight() for name, layer in fe.adapters(model).items()}
    for name, weight in consolidated.items():
        layer = model.get_submodule(name)
        exact = layer.base_weight.double() + layer.lora_B.double() @ layer.lora_A.double()
        assert float((weight.double() - exact).abs().max()) <= 0.51 * eps * float(exact.abs().max())


def test_compiled_model():
    """One graph with the same output and gradients."""
    torch._dynamo.reset()
    model = adapted(plain("circular"))
    x, _ = images(2)
    parameters = [p for p in model.parameters() if p.requires_grad]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), **TIGHT)
    torch.testing.assert_close(gradients(compiled, x, parameters), gradients(model, x, parameters), **TIGHT)
    torch._dynamo.reset()


def test_diagnostics():
    """verify_forward and explain know convolutions."""
    model = adapted()
    x, _ = images(2)
    assert fe.verify_forward(model, x)["shared"] == 2
    rows = {row["name"]: row for row in fe.explain(model, x).rows}
    assert "overlap" in rows["shared"]["why_not_faster"] and rows["point"]["backend"] != "torch"
    assert model.same.row_count(torch.zeros(2, 7, 4, 5)) == 40
    assert model.stem.row_count(torch.zeros(3, 12, 12)) == 36


def test_base_parameters():
    """A bias, or a base weight, that the user lets train gets its gradient; a frozen layer gives dx."""
    model = adapted()
    other = dense(model).requires_grad_(True)
    x = images()[0].requires_grad_()
    for each in (model.point, model.strided, model.line):
        each.weight.requires_grad_(True)
        each.bias.requires_grad_(True)
    names = [f"{layer}.{leaf}" for layer in ("point", "strided", "line") for leaf in ("weight", "bias")]
    wanted = [[x, *(each.get_parameter(name) for name in names)] for each in (model, other)]
    torch.testing.assert_close(gradients(model, x, wanted[0]), gradients(other, x, wanted[1]), **TIGHT)
    model.requires_grad_(False)
    torch.testing.assert_close(gradients(model, x, [x]), gradients(other, x, [x]), **TIGHT)
