# SPDX-License-Identifier: Apache-2.0
"""`nn.MultiheadAttention` with an adapted output projection."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from dense_fisher import dense_fisher
from hypothesis import given, settings
from hypothesis import strategies as st
from models import randomize_adapters_
from torch import Tensor, nn

import fused_ewclora as fe
from fused_ewclora.layers.attention import CallingMultiheadAttention, LoRAOutProjection

D, HEADS, N, LENGTH, KEYS = 8, 2, 3, 5, 4
OUT = fe.LoRAConfig(r=2, target_modules=["out_proj"])


def attention(**options: object) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    made = nn.MultiheadAttention(D, HEADS, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.4)
    return made


def inputs(draw: st.DrawFn, module: nn.MultiheadAttention) -> tuple[list[Tensor], int]:
    """query, key, value, which may be the same tensor, and the number of keys."""
    batched = draw(st.booleans())
    sharing = draw(st.sampled_from(["self", "memory", "none"] if module._qkv_same_embed_dim else ["none"]))
    keys = LENGTH if sharing == "self" else KEYS

    def tensor(length: int, width: int) -> Tensor:
        shape = (N, length, width) if module.batch_first else (length, N, width)
        return torch.randn(shape if batched else (length, width), dtype=torch.float64, requires_grad=True)

    query, key = tensor(LENGTH, D), tensor(keys, module.kdim)
    if sharing == "self":
        return [query, query, query], keys
    return [query, key, key if sharing == "memory" else tensor(keys, module.vdim)], keys


def mask(draw: st.DrawFn, shapes: list[tuple[int, ...]]) -> Tensor | None:
    """None, or True where keys are hidden, or numbers to add; every query sees the first key."""
    kind = draw(st.sampled_from(["none", "bool", "float"]))
    shape = draw(st.sampled_from(shapes))
    if kind == "none":
        return None
    if kind == "float":
        return torch.randn(shape, dtype=torch.float64)
    hidden = torch.rand(shape) < 0.4
    hidden[..., 0] = False
    return hidden


@settings(max_examples=40)
@given(st.data())
def test_same_function(data: st.DataObject):
    """Outputs, weights and gradients are those of `nn.MultiheadAttention`, whatever the arguments."""
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**16)))
    widths = draw(st.sampled_from([{}, {"kdim": 6, "vdim": 10}]))
    flags = {name: draw(st.booleans()) for name in ("batch_first", "bias", "add_bias_kv", "add_zero_attn")}
    module = attention(**widths, **flags, dropout=draw(st.sampled_from([0.0, 0.3])))
    module.train(draw(st.booleans()))
    tensors, keys = inputs(draw, module)
    batched = tensors[0].dim() == 3
    rows = N * HEADS if batched else HEADS
    arguments = {
        "key_padding_mask": mask(draw, [(N, keys) if batched else (keys,)]),
        "attn_mask": mask(draw, [(LENGTH, keys), (rows, LENGTH, keys)]),
        "need_weights": draw(st.booleans()),
        "average_attn_weights": draw(st.booleans()),
    }
    if keys == LENGTH and draw(st.booleans()):
        causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
        arguments |= {"is_causal": True, "attn_mask": causal}

    def run() -> list[Tensor]:
        torch.manual_seed(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # masks of different types
            output, weights = module(*tensors, **arguments)
        assert output.is_contiguous() or module.batch_first
        wanted = [*dict.fromkeys(tensors), *module.parameters()]
        return [
            output,
            *([] if weights is None else [weights]),
            *torch.autograd.grad(output.square().sum(), wanted),
        ]

    expected = run()
    module.__class__ = CallingMultiheadAttention
    for actual, value in zip(run(), expected, strict=True):
        torch.testing.assert_close(actual, value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batch_first", [True, False])
def test_fast_path(batch_first: bool):
    """In eval mode without gradients the adapter applies, and the base output is that of the fast path."""
    model = nn.ModuleDict({"attn": attention(batch_first=batch_first)}).eval()
    x = torch.randn(N, LENGTH, D, dtype=torch.float64)
    with torch.no_grad():
        base = model["attn"](x, x, x)
        fe.inject(model, OUT)
        assert isinstance(model["attn"].out_proj, LoRAOutProjection)
        for actual, value in zip(model["attn"](x, x, x), base, strict=True):
            torch.testing.assert_close(actual, value, rtol=1e-12, atol=1e-12)
        randomize_adapters_(model)
        output = model["attn"](x, x, x)[0]
        assert (output - base[0]).abs().max() > 1e-3
        fe.merge(model)
        torch.testing.assert_close(model["attn"](x, x, x)[0], output, rtol=1e-10, atol=1e-10)
        fe.unmerge(model)
    fe.eject(model)
    assert type(model["attn"]) is nn.MultiheadAttention
    assert type(model["attn"].out_proj) is nn.modules.linear.NonDynamicallyQuantizableLinear
    torch.testing.assert_close(model["attn"](x, x, x)[0], output, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(copied: Callable[[nn.Module], nn.Module]):
    """Copies compute the same and can be ejected; keys stay."""
    model = nn.ModuleDict({"attn": attention()}).eval()
    keys = set(model.state_dict())
    fe.inject(model, OUT)
    randomize_adapters_(model)
    assert set(model.state_dict()) - keys == {"attn.out_proj.lora_A", "attn.out_proj.lora_B"}
    other, x = copied(model), torch.randn(LENGTH, N, D, dtype=torch.float64)
    assert torch.equal(other["attn"](x, x, x)[0], model["attn"](x, x, x)[0])
    fe.eject(other, merge=False)
    assert type(other["attn"]) is nn.MultiheadAttention and set(other.state_dict()) == keys
    assert type(model["attn"]) is CallingMultiheadAttention


class Classifier(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.attn, self.head = attention(batch_first=batch_first), nn.Linear(D, 3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        """x `[N, T, D]`."""
        if self.attn.batch_first:
            return self.head(self.attn(x, x, x)[0].mean(1))
        x = x.transpose(0, 1)
        return self.head(self.attn(x, x, x, need_weights=False)[0].mean(0))


def cross_entropy(model: nn.Module, sample: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(sample[0]), sample[1])


@pytest.mark.parametrize("batch_first", [True, False])
def test_fisher_exact(batch_first: bool):
    """The Fisher per sample is exact in both layouts."""
    model = Classifier(batch_first)
    plain = copy.deepcopy(model)
    x, y = torch.randn(4, 4, D, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    fe.inject(model, OUT)
    ewc = fe.EWC(model, ewc_lambda=1.0, fisher_mode="sample")
    ewc.end_task([(x, y)], F.cross_entropy)
    samples = [(x[i : i + 1], y[i : i + 1]) for i in range(4)]
    expected = dense_fisher(plain, ["attn.out_proj"], samples, cross_entropy)["attn.out_proj"]
    assert float((ewc.fishers["attn.out_proj"] - expected).norm() / expected.norm()) < 1e-5


class Subclass(nn.MultiheadAttention):
    pass


def replaced(module: nn.MultiheadAttention) -> None:
    module.forward = module.forward  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("prepare", "word"),
    [
        (
            lambda module: setattr(module, "__class__", Subclass),
            "Subclass is a subclass of nn.MultiheadAttention",
        ),
        (replaced, "forward of its nn.MultiheadAttention has been replaced"),
    ],
)
def test_refused(prepare: Callable[[nn.MultiheadAttention], None], word: str):
    """Attentions with another forward are refused by name, and skipped by "all-linear"."""
    model = nn.ModuleDict({"attn": attention(), "fc": nn.Linear(D, D)})
    prepare(model["attn"])
    kind = type(model["attn"])
    with pytest.raises(fe.TargetError, match=rf"attn\.out_proj: .*{word}.*Nothing was changed"):
        fe.inject(model, OUT)
    assert type(model["attn"]) is kind and not fe.adapters(model)
    report = fe.inject(model, fe.LoRAConfig(r=2, target_modules="all-linear"))
    assert [row["name"] for row in report.rows] == ["fc"] and word in report.summary["skipped"][
        "attn.out_proj"
    ]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"is_causal": True}, "attn_mask: expected the mask"),
        ({"attn_mask": torch.zeros(LENGTH, KEYS)}, r"attn_mask: expected shape \[5, 5\], got \[5, 4\]"),
        ({"key_padding_mask": torch.zeros(N, KEYS)}, r"key_padding_mask: expected shape \[3, 5\]"),
        ({"key_padding_mask": torch.zeros(KEYS)}, "key_padding_mask: expected 2 dimensions, got 1"),
        ({"attn_mask": torch.zeros(LENGTH)}, "attn_mask: expected 2 or 3 dimensions, got 1"),
        ({"attn_mask": torch.zeros(2, LENGTH, LENGTH)}, r"attn_mask: expected shape \[6, 5, 5\]"),
    ],
)
def test_wrong_arguments(arguments: dict[str, object], word: str):
    """Wrong masks are named."""
    module = attention(batch_first=True)
    fe.inject(module, OUT)
    x = torch.randn(N, LENGTH, D, dtype=torch.float64)
    with pytest.raises(fe.ArgumentError, match=word):
        module(x, x, x, **arguments)


def test_wrong_tensors():
    """Keys of another length than the values, and mixed batches, are named."""
    module = attention(batch_first=True).eval()
    fe.inject(module, OUT)
    x = torch.randn(N, LENGTH, D, dtype=torch.float64)
    with pytest.raises(fe.ArgumentError, match="value: expected the length and batch of key"):
        module(x, x, x[:, :2])
    with pytest.raises(fe.ArgumentError, match="expected three batches or three sequences"):
        module(x, x[0], x[0])


def test_autocast():
    """Under autocast the result has the dtype and, to rounding, the values of `nn.MultiheadAttention`."""
    module = attention(batch_first=True).float()
    x = torch.randn(N, LENGTH, D)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = module(x, x, x)
        fe.inject(module, OUT)
        for actual, value in zip(module(x, x, x), expected, strict=True):
            assert actual.dtype == value.dtype
            torch.testing.assert_close(actual, value, rtol=2**-5, atol=2**-5)


def test_compiled_whole():
    """torch.compile sees one graph."""
    model = nn.ModuleDict({"attn": attention(batch_first=True)})
    fe.inject(model, OUT)
    randomize_adapters_(model)
    x = torch.randn(N, LENGTH, D, dtype=torch.float64)
    padding = torch.zeros(N, LENGTH, dtype=torch.bool)
    for options in ({}, {"need_weights": False, "key_padding_mask": padding}):
        compiled = torch.compile(model["attn"], fullgraph=True, backend="eager")
        assert torch.equal(compiled(x, x, x, **options)[0], model["attn"](x, x, x, **options)[0])


def test_files(tmp_path: Path):
    """Checkpoints hold the adapter; PEFT, which would never run it, gets no file."""
    models = [nn.ModuleDict({"attn": attention()}) for _ in range(2)]
    for model in models:
        fe.inject(model, OUT)
    randomize_adapters_(models[0])
    with pytest.raises(
        fe.NotExactlyRepresentable, match=r"attn\.out_proj: MultiheadAttention uses its weight"
    ):
        fe.export_peft(models[0], tmp_path / "peft")
    fe.save_pretrained(tmp_path / "own", models[0])
    fe.load_pretrained(tmp_path / "own", models[1])
    x = torch.randn(LENGTH, N, D, dtype=torch.float64)
    assert torch.equal(models[0]["attn"](x, x, x)[0], models[1]["attn"](x, x, x)[0])
