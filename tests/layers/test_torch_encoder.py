# SPDX-License-Identifier: Apache-2.0
"""`nn.TransformerEncoder` in eval mode: adapters are not passed by on PyTorch's fast path."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from models import randomize_adapters_
from torch import Tensor, nn

import fused_ewclora as fe

D, HEADS, HIDDEN = 8, 2, 12
X = torch.randn(3, 5, D, generator=torch.Generator().manual_seed(0))
PADDED = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 0, 1], [0, 0, 1, 1, 1]], dtype=torch.bool)
TARGETS = ["linear1", "linear2", "out_proj", "in_proj"]


def layer(**options: object) -> nn.TransformerEncoderLayer:
    torch.manual_seed(0)
    options = {"dropout": 0.0, "batch_first": True, "activation": "gelu", **options}
    return nn.TransformerEncoderLayer(D, HEADS, HIDDEN, **options)


def encoder(**options: object) -> nn.TransformerEncoder:
    return nn.TransformerEncoder(layer(**options), 2, norm=nn.LayerNorm(D))


def adapted(model: nn.Module, targets: list[str]) -> nn.Module:
    fe.inject(model, fe.LoRAConfig(r=2, target_modules=targets))
    randomize_adapters_(model)
    return model


def in_training(model: nn.Module, *args: Tensor, **kwargs: Tensor) -> Tensor:
    """What the model computes without the fast path; its dropout is 0."""
    model.train()
    output = model(*args, **kwargs).detach()
    model.eval()
    return output


@pytest.mark.parametrize("targets", [[t] for t in TARGETS] + [TARGETS])
@pytest.mark.parametrize(
    "options", [{}, {"norm_first": True}, {"activation": "relu"}, {"activation": nn.GELU()}]
)
@pytest.mark.parametrize("gradients", [True, False])
def test_eval_as_training(targets: list[str], options: dict[str, object], gradients: bool):
    """The adapters apply in eval mode, with and without gradients."""
    model = adapted(encoder(**options).eval(), targets)
    expected = in_training(model, X)
    with torch.set_grad_enabled(gradients):
        torch.testing.assert_close(model(X).detach(), expected)
        with fe.disabled(model):
            assert not torch.allclose(model(X), expected, atol=1e-3)
        assert min(fe.verify_forward(model, X).values()) == 1


def test_padded_inputs():
    """Inputs with padding are right where they are not padded, as alone."""
    model = adapted(encoder().eval(), TARGETS)
    with torch.no_grad():
        output = model(X, src_key_padding_mask=PADDED)
        for n in range(3):
            kept = ~PADDED[n]
            torch.testing.assert_close(output[n, kept], model(X[n : n + 1, kept])[0])
    expected = in_training(model, X, src_key_padding_mask=PADDED)
    torch.testing.assert_close(output, expected)


def test_base_output_kept():
    """Without adapters the output is that of the fast path, which eject restores."""
    model = encoder().eval()
    attributes = [dict(vars(module)) for module in model.modules()]
    with torch.no_grad():
        base = model(X)
        report = fe.inject(model, fe.LoRAConfig(r=2, target_modules=TARGETS))
        torch.testing.assert_close(model(X), base)
        randomize_adapters_(model)
        applied = model(X)
    fixes = report.summary["bypass_fixes"]
    assert fixes[""] == {"use_nested_tensor": False}
    assert fixes["layers.1"] == {"activation_relu_or_gelu": 0}
    assert fixes["layers.1.self_attn"] == {"__class__": "CallingMultiheadAttention"}
    fe.eject(model)
    for module, before in zip(model.modules(), attributes, strict=True):
        assert {k: v for k, v in vars(module).items() if not k.startswith("_")} == {
            k: v for k, v in before.items() if not k.startswith("_")
        }
    with torch.no_grad():
        torch.testing.assert_close(model(X), applied)


def test_other_layers_untouched():
    """Layers of an encoder without adapters stay on the fast path."""
    model = encoder().eval()
    fe.inject(model, fe.LoRAConfig(r=2, target_modules=["layers.1.linear1"]))
    assert [one.activation_relu_or_gelu for one in model.layers] == [2, 0]
    assert not model.use_nested_tensor  # the packed tensors would reach the second layer
    fe.inject(model, fe.LoRAConfig(r=2, target_modules=["layers.0.linear1"]))
    assert [one.activation_relu_or_gelu for one in model.layers] == [0, 0]
    fe.eject(model)
    assert [one.activation_relu_or_gelu for one in model.layers] == [2, 2] and model.use_nested_tensor


class Subclass(nn.TransformerEncoderLayer):
    """Inherits the forward, and with it the fast path."""


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(copied: Callable[[nn.Module], nn.Module]):
    """Copies, inside `nn.Transformer`, whose decoder attends to the encoder, and of subclasses too, stay off
    the fast path."""
    model = nn.Transformer(D, HEADS, 1, 1, HIDDEN, dropout=0.0, batch_first=True)
    model.encoder.layers[0].__class__ = Subclass
    adapted(model.eval(), [*TARGETS])
    other = copied(model)
    expected = in_training(model, X, X)
    with torch.no_grad():
        torch.testing.assert_close(other(X, X), expected)
        fe.verify_forward(other, (X, X))
    fe.eject(other)
    assert other.encoder.layers[0].activation_relu_or_gelu == 1
    assert model.encoder.layers[0].activation_relu_or_gelu == 0


def test_nested_inputs():
    """Nested tensors pass through attentions with adapters, as alone."""
    model = adapted(layer().eval(), ["self_attn"])
    with torch.no_grad():
        output = model(torch.nested.nested_tensor([X[0], X[1, :2]]))
        for found, x in zip(output.unbind(), (X[0], X[1, :2]), strict=True):
            torch.testing.assert_close(found, model(x[None])[0])


def test_nested_refused():
    """Linear layers with adapters refuse nested tensors in words."""
    model = adapted(layer().eval(), ["linear1"])
    with torch.no_grad(), pytest.raises(fe.ArgumentError, match="x: expected a padded tensor, got a nested"):
        model(torch.nested.nested_tensor([X[0], X[1, :2]]))


def test_mode_kept_by_verification():
    """`verify_forward` and `explain` find a layer that only the fast path passes by."""
    model = adapted(encoder().eval(), ["linear1"])
    for one in model.layers:
        one.activation_relu_or_gelu = 2
    with pytest.raises(fe.TargetError, match=r"layers\.0\.linear1, layers\.1\.linear1"):
        fe.verify_forward(model, X)
    report = fe.explain(model, X)
    assert report.summary["bypassed"] == ["layers.0.linear1", "layers.1.linear1"]
