# SPDX-License-Identifier: Apache-2.0
"""Adapters on the input projections of `nn.MultiheadAttention`, against a dense copy in fp64."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from hypothesis import given, settings
from hypothesis import strategies as st
from models import assert_same, explicit_delta, fingerprint, randomize_adapters_
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fused_ewclora as fe
from fused_ewclora.integrations._packed import packed_projections
from fused_ewclora.layers.attention import CallingMultiheadAttention
from fused_ewclora.layers.in_projection import LoRAInProjection

D, N, LENGTH, KEYS, CLASSES = 8, 3, 5, 4, 3
SHARING = ("self", "memory", "positions", "none")
WIDTHS = ({}, {"kdim": 6, "vdim": 10}, {"kdim": 6, "vdim": 6})
SLICES = (None, ("k", "v"), ("q",), ("v", "q"), ("q", "k", "v"))
KV = fe.LoRAConfig(r=2, target_modules=["attn"], slices=("k", "v"))


class Attend(nn.Module):
    """x `[N, LENGTH, D]` -> logits; query, key and value are made of x in ways that share tensors or do not.

    Keys whose first number is large are hidden by padding, and a mask hides some or adds to the scores.
    """

    def __init__(self, sharing: str = "self", mask: str = "none", heads: int = 2, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attn = nn.MultiheadAttention(D, heads, **options)
        self.head = nn.Linear(D, CLASSES)
        self.sharing, self.mask, self.need_weights = sharing, mask, False
        for name, width in (("to_key", self.attn.kdim), ("to_value", self.attn.vdim)):
            self.register_buffer(name, torch.randn(D, width) / 3, persistent=False)
        self.register_buffer("added", torch.randn(LENGTH, LENGTH), persistent=False)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.4)

    def inputs(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """query, key and value, samples first."""
        key = x.flip(1)[:, :KEYS] @ self.to_key
        if not self.attn._qkv_same_embed_dim:
            shared = self.attn.kdim == self.attn.vdim and self.sharing == "memory"
            return x, key, key if shared else x[:, :KEYS] @ self.to_value
        if self.sharing == "self":
            return x, x, x
        if self.sharing == "memory":
            return x, key, key
        return (x, x, x @ self.to_value) if self.sharing == "positions" else (x, key, x[:, :KEYS].clone())

    def masks(self, key: Tensor) -> dict[str, Any]:
        added = self.added[:, : key.shape[1]].to(key.dtype)
        hidden = added > 0.5
        hidden[:, 0] = False
        padding = key[..., 0] > 1.0
        padding[:, 0] = False
        return {
            "none": {},
            "bool": {"attn_mask": hidden},
            "float": {"attn_mask": added},
            "padding": {"key_padding_mask": padding},
            "both": {"attn_mask": hidden, "key_padding_mask": padding},
        }[self.mask]

    def forward(self, x: Tensor) -> Tensor:
        made = self.inputs(x)
        masks = self.masks(made[1])
        if not self.attn.batch_first:
            turned = {id(tensor): tensor.transpose(0, 1) for tensor in made}
            made = tuple(turned[id(tensor)] for tensor in made)  # type: ignore[assignment]
        y, weights = self.attn(*made, need_weights=self.need_weights, **masks)
        y = y if self.attn.batch_first else y.transpose(0, 1)
        logits = self.head(y).mean(1)
        return logits if weights is None else logits + weights.square().mean((1, 2))[:, None]


def dense(model: nn.Module, plain: nn.Module) -> nn.Module:
    """`plain` with W + B diag(s) A as weights that require gradients."""
    other = copy.deepcopy(plain).requires_grad_(False)
    for name, layer in fe.adapters(model).items():
        weight = other.get_parameter(layer.weight_name(name))
        weight.data += explicit_delta(layer).to(weight.dtype)
        weight.requires_grad_(True)
    return other


def close(actual: Tensor, expected: Tensor, bound: float = 1e-9) -> None:
    scale = max(float(expected.detach().abs().max()), 1e-4)
    assert float((actual - expected).detach().abs().max()) <= bound * scale


@st.composite
def models(draw: st.DrawFn) -> Attend:
    """An attention of any options, in fp64."""
    flags = {name: draw(st.booleans()) for name in ("batch_first", "bias", "add_bias_kv", "add_zero_attn")}
    model = Attend(
        draw(st.sampled_from(SHARING)),
        draw(st.sampled_from(["none", "bool", "float", "padding", "both"])),
        draw(st.sampled_from([1, 2, 4])),
        **draw(st.sampled_from(WIDTHS)),
        **flags,
    )
    model.need_weights = draw(st.booleans())
    return model.double()


@st.composite
def configs(draw: st.DrawFn) -> list[fe.LoRAConfig]:
    """The input projections whole or in slices, with or without the output projection."""
    alpha = draw(st.sampled_from([None, 6.0]))
    slices = draw(st.sampled_from(SLICES))
    made = [fe.LoRAConfig(r=2, lora_alpha=alpha, target_modules=["attn"], slices=slices)]
    if draw(st.booleans()):
        made.append(fe.LoRAConfig(r=3, target_modules=["out_proj"]))
    return made


@settings(max_examples=25)
@given(models(), configs(), st.integers(0, 2**16))
def test_dense_values(model: Attend, made: list[fe.LoRAConfig], seed: int):
    """Outputs and the gradients of x and of all adapters are those of the dense copy."""
    torch.manual_seed(seed)
    plain, x = copy.deepcopy(model), torch.randn(N, LENGTH, D, dtype=torch.float64, requires_grad=True)
    for config in made:
        fe.inject(model, config)
    randomize_adapters_(model)
    other = dense(model, plain)
    output, expected = model(x), other(x)
    close(output, expected)
    grad = torch.randn_like(output)
    pairs = [pair for layer in fe.adapters(model).values() for pair in layer.adapter_parameters()]
    found = torch.autograd.grad(output, [x, *(p for _, a, b in pairs for p in (a, b))], grad)
    weights = [other.get_parameter(layer.weight_name(n)) for n, layer in fe.adapters(model).items()]
    dx, *dweights = torch.autograd.grad(expected, [x, *weights], grad)
    close(found[0], dx)
    gradients = iter(found[1:])
    for layer, dw in zip(fe.adapters(model).values(), dweights, strict=True):
        for piece, lora_a, lora_b in layer.adapter_parameters():
            rows = torch.cat([dw[start:stop] for start, stop in piece.rows]) * piece.scaling
            close(next(gradients), lora_b.detach().T @ rows)
            close(next(gradients), rows @ lora_a.detach().T)


def per_sample_fisher(
    model: nn.Module, plain: nn.Module, data: list[tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """By Fisher key the mean of the squared gradients of single samples."""
    other, totals, count = dense(model, plain), dict[str, Tensor](), 0
    layers = fe.adapters(model)
    weights = {name: other.get_parameter(layer.weight_name(name)) for name, layer in layers.items()}
    for xs, ys in data:
        for x, y in zip(xs, ys, strict=True):
            grads = torch.autograd.grad(F.cross_entropy(other(x[None]), y[None]), [*weights.values()])
            for (name, layer), grad in zip(layers.items(), grads, strict=True):
                for piece in layer.adapter_slices:
                    key = f"{name}.{piece.name}".rstrip(".")
                    square = torch.cat([grad[a:b] for a, b in piece.rows]).square()
                    totals[key] = totals[key] + square if key in totals else square
            count += 1
    return {key: total / count for key, total in totals.items()}


@settings(max_examples=8)
@given(models(), configs(), st.sampled_from([True, False]), st.integers(0, 2**16))
def test_three_tasks(model: Attend, made: list[fe.LoRAConfig], bare: bool, seed: int):
    """Over three tasks with merges the Fisher per sample, the penalty and the weights are those of autograd
    on the dense copy; afterwards the plain attention computes the same."""
    torch.manual_seed(seed)
    plain = copy.deepcopy(model.eval())
    for config in made:
        fe.inject(model, config)
    ewc = fe.EWC(model, ewc_lambda=3.0, fisher_mode="sample", fisher_dtype=torch.float64)
    total: dict[str, Tensor] = {}
    for task in range(3):
        randomize_adapters_(model, seed=task)
        if task:
            deltas = {n: explicit_delta(layer) for n, layer in fe.adapters(model).items()}
            expected = sum(
                float(
                    (
                        total[f"{n}.{s.name}".rstrip(".")]
                        * torch.cat([deltas[n][a:b] for a, b in s.rows]) ** 2
                    ).sum()
                )
                for n, layer in fe.adapters(model).items()
                for s in layer.adapter_slices
            )
            assert float(ewc.penalty()) == pytest.approx(1.5 * expected, rel=1e-9)
        data = [(torch.randn(n, LENGTH, D).double(), torch.randint(CLASSES, (n,))) for n in (4, 3)]
        fresh = per_sample_fisher(model, plain, data)
        total = {key: total.get(key, 0.0) + value for key, value in fresh.items()}
        before = model(data[0][0]).detach()
        merged = dense(model, plain)
        ewc.end_task(data, F.cross_entropy)
        close(model(data[0][0]), before)
        for key, fisher in ewc.fishers.items():
            close(fisher, total[key])
        for name, layer in fe.adapters(model).items():
            close(model.get_parameter(layer.weight_name(name)), merged.get_parameter(layer.weight_name(name)))
        plain = merged
    fe.eject(model)
    assert type(model.attn) is nn.MultiheadAttention and set(model.state_dict()) == set(plain.state_dict())
    with torch.set_grad_enabled(bare):  # without gradients PyTorch may take its fast path
        close(model(data[0][0]), plain(data[0][0]))


def adapted(config: fe.LoRAConfig = KV, **options: Any) -> Attend:
    model = Attend(**options).double()
    fe.inject(model, config)
    randomize_adapters_(model)
    return model


X = torch.randn(N, LENGTH, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.tensor([0, 2, 1])


class Twice(Attend):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.attn(x, x, x)[0])


def test_called_twice():
    """A self-attention and a cross-attention by the same weights in one forward have one gradient per
    sample."""
    model = Twice("memory", batch_first=True).double()
    plain = copy.deepcopy(model)
    fe.inject(model, fe.LoRAConfig(r=2, target_modules=["attn"]))
    randomize_adapters_(model)
    expected = per_sample_fisher(model, plain, [(X, Y)])
    ewc = fe.EWC(model, ewc_lambda=1.0, fisher_dtype=torch.float64)
    ewc.end_task([(X, Y)], F.cross_entropy)
    close(ewc.fishers["attn.in_proj"], expected["attn.in_proj"])


def test_batch_mode():
    """The Fisher of the batch is the square of its mean gradient, times its size."""
    model = Attend("positions", batch_first=True).double()
    plain = copy.deepcopy(model)
    fe.inject(model, KV)
    weight = plain.attn.in_proj_weight
    (grad,) = torch.autograd.grad(F.cross_entropy(plain(X), Y), weight)
    ewc = fe.EWC(model, ewc_lambda=1.0, fisher_mode="batch", fisher_dtype=torch.float64)
    ewc.end_task([(X, Y)], F.cross_entropy)
    for number, name in enumerate("kv", 1):
        close(ewc.fishers[f"attn.in_proj.{name}"], grad[number * D : (number + 1) * D].square())


@pytest.mark.parametrize("target", ["attn", "in_proj", "attn.in_proj", "all-linear"])
def test_targets(target: str):
    """The attention and its projection are names of the part; keys of the base state_dict stay."""
    model = Attend()
    keys = list(model.state_dict())
    names = "all-linear" if target == "all-linear" else [target]
    report = fe.inject(model, fe.LoRAConfig(r=2, target_modules=names))
    assert "attn.in_proj" in [row["name"] for row in report.rows]
    assert isinstance(model.attn.in_proj, LoRAInProjection)
    assert [key for key in model.state_dict() if "lora" not in key] == keys
    fe.eject(model, merge=False)
    assert list(model.state_dict()) == keys and all(p.requires_grad for p in model.parameters())


def test_patterns():
    """Patterns for the attention hold for its parts, and those for a part come first."""
    model = Attend(kdim=6, vdim=6)
    patterns = {"attn": 3, "k_proj": 4}
    fe.inject(model, fe.LoRAConfig(r=2, target_modules=["attn", "head"], rank_pattern=patterns))
    assert {name: layer.r for name, layer in fe.adapters(model).items()} == {
        "attn.q_proj": 3, "attn.k_proj": 4, "attn.v_proj": 3, "head": 2,
    }  # fmt: skip


class Subclass(nn.MultiheadAttention):
    pass


def replace_class(model: Attend) -> None:
    model.attn.__class__ = Subclass


def replace_forward(model: Attend) -> None:
    model.attn.forward = model.attn.forward  # type: ignore[method-assign]


def prune(model: Attend) -> None:
    torch.nn.utils.prune.identity(model.attn, "in_proj_weight")


def script(model: Attend) -> None:
    model.attn = torch.jit.script(model.attn)  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("prepare", "word"),
    [
        (replace_class, r"attn\.in_proj: Subclass is a subclass of nn\.MultiheadAttention"),
        (replace_forward, r"attn\.in_proj: the forward of its MultiheadAttention has been replaced"),
        (prune, r"attn\.in_proj: its in_proj_weight is not a plain parameter"),
        (script, r"attn: RecursiveScriptModule is not nn\.Linear"),
    ],
)
def test_refused(prepare: Callable[[Attend], None], word: str):
    """Attentions whose forward would not call the part are refused by name, before anything changes."""
    model = Attend()
    prepare(model)
    before = fingerprint(model)
    with pytest.raises(fe.TargetError, match=word):
        fe.inject(model, fe.LoRAConfig(r=2, target_modules=["attn"]))
    assert_same(before, fingerprint(model))


@pytest.mark.parametrize("widths", WIDTHS[:2])
def test_unknown_slices(widths: dict[str, int]):
    """Slices that an attention does not have are named."""
    model = Attend(**widths)
    before = fingerprint(model)
    with pytest.raises(fe.LayoutError, match=r"attn.*slices: expected .*'q', 'k', 'v'.*, got 'gate'"):
        fe.inject(model, fe.LoRAConfig(r=2, target_modules=["attn"], slices=("gate",)))
    assert_same(before, fingerprint(model))


def test_other_slices():
    """An attention that is no target does not mind the slices of others."""
    model = Attend(kdim=6, vdim=10)
    layout = fe.QKVLayout(("gate", "up"), (1, 2))
    fe.inject(model, fe.LoRAConfig(r=2, target_modules=["head"], slices=("gate",), layout=layout))
    assert [*fe.adapters(model)] == ["head"]


def test_traced():
    """In a graph of torch.fx, which calls the attention, the adapters apply."""
    model = Attend(batch_first=True).double()
    graph = nn.ModuleDict({"attn": torch.fx.symbolic_trace(Self(model.attn))})
    fe.inject(graph, fe.LoRAConfig(r=2, target_modules=["attention"]))
    randomize_adapters_(graph)
    close(graph["attn"](X), dense(graph, nn.ModuleDict({"attn": Self(copy.deepcopy(model.attn))}))["attn"](X))


class Self(nn.Module):
    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(D, 2, batch_first=True, dtype=torch.float64)
        base = {k: v for k, v in attention.state_dict().items() if "lora" not in k}
        self.attention.load_state_dict(base)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(copied: Callable[[nn.Module], nn.Module]):
    """Copies own their weights, compute the same and can be ejected."""
    model = adapted()
    other = copied(model)
    assert other.attn.in_proj.owner is other.attn and torch.equal(other(X), model(X))
    fe.merge(other)
    assert not torch.equal(other.attn.in_proj_weight, model.attn.in_proj_weight)
    close(other(X), model(X))
    fe.unmerge(other)
    assert torch.equal(other.attn.in_proj_weight, model.attn.in_proj_weight)
    fe.eject(other, merge=False)
    assert type(other.attn) is nn.MultiheadAttention and type(model.attn) is CallingMultiheadAttention


def test_loading():
    """A base checkpoint loads into the adapted attention, and into a merged one not at all."""
    base, model = Attend("memory").double().state_dict(), adapted(sharing="memory")
    base = {key: value + 1.0 for key, value in base.items()}
    model.load_state_dict(base, strict=False)
    assert torch.equal(model.attn.in_proj_weight, base["attn.in_proj_weight"])
    fe.merge(model)
    weight = model.attn.in_proj_weight.clone()
    with pytest.raises(RuntimeError, match=r"attn\.in_proj_weight: the adapters are merged"):
        model.load_state_dict({key: value + 1.0 for key, value in base.items()}, strict=False)
    assert torch.equal(model.attn.in_proj_weight, weight)


@pytest.mark.parametrize("widths", WIDTHS[:2])
def test_files(tmp_path: Path, widths: dict[str, int]):
    """A checkpoint of two tasks gives the weights, the adapters and the Fishers back."""
    made = []
    for _ in range(2):
        model = Attend("memory", **widths).double()
        fe.inject(model, KV)
        made.append((model, fe.EWC(model, ewc_lambda=1.0, fisher_dtype=torch.float64)))
    (model, ewc), (other, loaded) = made
    for seed in range(2):
        randomize_adapters_(model, seed)
        ewc.end_task([(X, Y)], F.cross_entropy)
    randomize_adapters_(model, 2)
    fe.save_pretrained(tmp_path, model, ewc)
    fe.load_pretrained(tmp_path, other, loaded)
    assert torch.equal(other(X), model(X)) and torch.equal(loaded.penalty(), ewc.penalty())


def test_compiled_whole():
    """torch.compile sees one graph, forward and backward, whichever inputs are one tensor."""
    for sharing in ("self", "positions"):
        model = adapted(sharing=sharing, batch_first=True)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        parameters = [p for p in model.parameters() if p.requires_grad]
        found = torch.autograd.grad(compiled(X).square().sum(), parameters)
        for one, other in zip(found, torch.autograd.grad(model(X).square().sum(), parameters), strict=True):
            close(one, other, 1e-12)


class Recomputed(Attend):
    again: bool | None = None  # whether recomputation is reentrant, None for none

    def forward(self, x: Tensor) -> Tensor:
        forward = super().forward
        if self.again is None:
            return forward(x)
        x = (
            x.clone().requires_grad_() if self.again else x
        )  # without an input that requires gradients it has none
        return checkpoint(forward, x, use_reentrant=self.again)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant: bool):
    """A recomputed attention is counted once."""
    fishers = []
    for again in (False, True):
        model = Recomputed("memory", batch_first=True).double()
        model.again = reentrant if again else None
        fe.inject(model, KV)
        randomize_adapters_(model)
        ewc = fe.EWC(model, ewc_lambda=1.0, fisher_dtype=torch.float64)
        ewc.end_task([(X, Y)], F.cross_entropy)
        fishers.append(ewc.fishers)
    for key, fisher in fishers[0].items():
        close(fishers[1][key], fisher, 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype):
    """In half precision, and under autocast, outputs and gradients are those of fp64 to rounding."""
    eps = torch.finfo(dtype).eps
    for sharing in SHARING:
        exact = adapted(sharing=sharing, batch_first=True)
        expected = exact(X)
        expected.square().sum().backward()
        half = copy.deepcopy(exact).to(dtype)
        single = copy.deepcopy(exact).float()
        outputs = [half(X.to(dtype))]
        with torch.autocast("cpu", dtype=dtype):
            outputs.append(single(X.float()))
        for model, output in zip((half, single), outputs, strict=True):
            close(output.double(), expected, 16 * eps)
            model.zero_grad()
            output.float().square().sum().backward()
            for one, other in zip(
                model.attn.in_proj.parameters(), exact.attn.in_proj.parameters(), strict=True
            ):
                close(one.grad.double(), other.grad, 64 * eps)


def nested(sizes: tuple[int, ...] = (5, 3)) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([X[i, :size] for i, size in enumerate(sizes)])


@pytest.mark.parametrize("average", [True, False])
def test_nested(average: bool):
    """Nested sequences give what PyTorch's fast path gives, with gradients of every sequence alone."""
    model = adapted(batch_first=True).eval()
    plain = dense(model, Attend(batch_first=True).double()).attn.requires_grad_(False).eval()
    x = nested()
    found, weights = model.attn(x, x, x, average_attn_weights=average)
    expected, their_weights = plain(x, x, x, average_attn_weights=average)
    close(weights, their_weights)
    for one, other in zip(found.unbind(), expected.unbind(), strict=True):
        close(one, other)
    parameters = [*model.attn.in_proj.parameters()]
    gradients = torch.autograd.grad(sum(y.square().sum() for y in found.unbind()), parameters)
    alone = [model.attn(s[None], s[None], s[None])[0].square().sum() for s in x.unbind()]
    for one, other in zip(gradients, torch.autograd.grad(sum(alone), parameters), strict=True):
        close(one, other)


def test_empty_sequence():
    """A nested sequence without tokens gives none, and no NaN in gradients."""
    model = adapted(batch_first=True)
    x = nested((5, 0))
    output, weights = model.attn(x, x, x)
    assert [len(y) for y in output.unbind()] == [5, 0] and not bool(weights[1].any())
    for gradient in torch.autograd.grad(output.unbind()[0].sum(), [*model.attn.in_proj.parameters()]):
        assert bool(gradient.isfinite().all())


def test_nested_refused():
    """Nested tensors that cannot be served are refused in words."""
    model = adapted(batch_first=True)
    x = nested()
    with pytest.raises(fe.ArgumentError, match="without masks"):
        model.attn(x, x, x, attn_mask=torch.zeros(5, 5))
    with pytest.raises(fe.ArgumentError, match="one nested tensor for all three"):
        model.attn(x, X, X)
    with pytest.raises(fe.ArgumentError, match="batch_first=False"):
        adapted(batch_first=False).attn(x, x, x)


def test_injected_again():
    """After eject the attention can be adapted anew, while the controller of before is still there."""
    model = adapted(sharing="memory")
    ewc = fe.EWC(model, ewc_lambda=1.0)
    fe.eject(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fe.inject(model, KV)
    with pytest.raises(fe.TargetError, match=r"attn\.in_proj"):
        ewc.end_task([(X, Y)], F.cross_entropy)


def test_library_table():
    """The tables of packed projections that integrations give list the input projections."""
    report = packed_projections("a library", Attend(), lambda parent, child: None)
    assert [(row["name"], row["segments"], row["sizes"]) for row in report.rows] == [
        ("attn.in_proj", ("q", "k", "v"), (D, D, D))
    ]


def test_rows_without_adapters():
    """Rows that have no adapter may be read in any way: calls that need them alone pass by the part."""
    model = adapted(sharing="memory")
    fe.verify_forward(model, X)
    report = fe.explain(model, X)
    assert not report.summary["bypassed"]
