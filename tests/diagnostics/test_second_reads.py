# SPDX-License-Identifier: Apache-2.0
"""`verify_forward` finds weights that are read beside the calls of their layers, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from models import X, injected, randomize_adapters_
from torch import Tensor, nn

import fused_ewclora as fe

INPUT = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


class Tied(nn.Module):
    """A decoder that uses the weight of the encoder, in the way that `read` does."""

    def __init__(self, read: Callable[[Tensor, Tensor], Tensor] | None = None, dim: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enc, self.mid, self.out = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, 3)
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.mid(torch.tanh(self.enc(x))))
        return self.out(h if self.read is None else self.read(h, self.enc.weight))


READS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "transposed": lambda h, w: F.linear(h, w.t()),
    "product with itself": lambda h, w: h @ (w @ w.t()),
    "product of columns": lambda h, w: h @ (w.t() @ w),
    "normalised": lambda h, w: F.linear(h, F.normalize(w, dim=-1)),
    "one entry": lambda h, w: h + w[3, 4],
    "norm": lambda h, w: h * w.detach().float().norm().to(h.dtype),
    "numbers": lambda h, w: h * sum(w.flatten().tolist()),
}


def adapted(read: Callable[[Tensor, Tensor], Tensor] | None, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = Tied(read).to(dtype)
    fe.inject(model, fe.LoRAConfig(r=2, target_modules=["enc", "mid", "out"]))
    return model


def snapshot(model: nn.Module) -> list[object]:
    """Every bit, version and attribute that a test of the model could change."""
    values = [(k, v.clone(), v.data_ptr(), v._version) for k, v in model.state_dict().items()]
    layers = [(dict(vars(layer)), layer.training) for layer in model.modules()]
    return [
        [(k, v.view(torch.uint8).tolist(), p, n) for k, v, p, n in values],
        torch.get_rng_state().tolist(),
        layers,
    ]


def same(model: nn.Module, before: list[object]) -> bool:
    values, state, attributes = snapshot(model)
    kept = all(
        now.keys() == then.keys()
        and now.get("forward_calls", 0) >= then.get("forward_calls", 0)
        and training == trained
        for (now, training), (then, trained) in zip(attributes, before[2], strict=True)
    )
    return kept and values == before[0] and state == before[1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("read", READS)
def test_second_read_named(read: str, dtype: torch.dtype):
    """A second read is found in every precision, before training (B = 0) too, and nothing changes."""
    model = adapted(READS[read], dtype)
    before = snapshot(model)
    with pytest.raises(fe.TargetError, match=r"weight of enc a second time.*exclude_modules=\['enc'\]"):
        fe.verify_forward(model, INPUT.to(dtype))
    assert same(model, before)


def harmless(h: Tensor, w: Tensor) -> Tensor:
    w.detach().abs().sum()  # computed, and not used
    return h.to(w.device, w.dtype) + w.shape[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("read", [None, harmless])
@pytest.mark.parametrize("state", ["new", "trained", "merged", "disabled"])
def test_no_false_alarm(read: Callable[[Tensor, Tensor], Tensor] | None, dtype: torch.dtype, state: str):
    """Models without a second read pass in every precision and state, and nothing changes."""
    model = adapted(read, dtype)
    if state != "new":
        randomize_adapters_(model)
    if state == "merged":
        fe.merge(model)
    x = INPUT.to(dtype)
    before = snapshot(model)
    if state == "disabled":
        with fe.disabled(model):
            assert fe.verify_forward(model, x) == dict.fromkeys(["enc", "mid", "out"], 1)
    else:
        assert fe.verify_forward(model, x) == dict.fromkeys(["enc", "mid", "out"], 1)
    assert same(model, before)


def test_odd_weights():
    """Zeros of both signs, infinities, NaN, and the largest and smallest numbers come back bit for bit."""
    model = adapted(None)
    odd = [0.0, -0.0, float("inf"), float("-inf"), float("nan"), 3.4e38, -1e-45, 1e-38]
    with torch.no_grad():
        model.mid.weight.copy_(torch.tensor([odd] * 8).t())
    before = snapshot(model)
    fe.verify_forward(model, INPUT)
    assert same(model, before)


class Stopped(BaseException):
    """As KeyboardInterrupt."""


@pytest.mark.parametrize("moment", range(4))
def test_interrupted(moment: int):
    """An interrupt at any call leaves the model as it was."""
    calls = []

    def interrupt(h: Tensor, w: Tensor) -> Tensor:
        calls.append(None)
        if len(calls) > moment:
            raise Stopped
        return F.linear(h, w.t())

    model = adapted(interrupt).train()
    before = snapshot(model)
    with pytest.raises(Stopped):
        fe.verify_forward(model, INPUT)
    assert same(model, before)


@pytest.mark.parametrize("moment", range(1, 12))
def test_interrupted_layer(moment: int, monkeypatch: pytest.MonkeyPatch):
    """An interrupt while a weight is being changed, or restored, leaves the model as it was."""
    model = adapted(READS["transposed"])
    before, flips = snapshot(model), []
    flip = Tensor.bitwise_xor_

    def stopping(tensor: Tensor, mask: int) -> Tensor:
        flips.append(None)
        result = flip(tensor, mask)
        if len(flips) == moment:
            raise Stopped
        return result

    monkeypatch.setattr(Tensor, "bitwise_xor_", stopping)
    with pytest.raises(Stopped):
        fe.verify_forward(model, INPUT)
    assert same(model, before)


def test_shared_storage():
    """A second parameter with the storage of the weight counts as a second read."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight.data = model[0].weight.data
    fe.inject(model, fe.LoRAConfig(r=2, target_modules=["0"]))
    with pytest.raises(fe.TargetError, match="weight of 0 a second time"):
        fe.verify_forward(model, torch.randn(2, 4))


class Noisy(Tied):
    """Draws numbers in eval mode, and has a last bit that differs from run to run."""

    count = 0

    def forward(self, x: Tensor) -> Tensor:
        Noisy.count += 1
        return super().forward(F.dropout(x, 0.5)) * (1.0 + 1e-6 * (Noisy.count % 3))


@pytest.mark.parametrize("read", [None, READS["transposed"]])
def test_noisy_models(read: Callable[[Tensor, Tensor], Tensor] | None):
    """Models that differ from run to run pass, and a second read in them is found."""
    model = Noisy(read)
    fe.inject(model, fe.LoRAConfig(r=2, target_modules=["enc", "mid"]))
    if read is None:
        fe.verify_forward(model, INPUT)
    else:
        with pytest.raises(fe.TargetError, match="weight of enc a second"):
            fe.verify_forward(model, INPUT)


def test_outputs_of_any_kind():
    """Outputs inside mappings and sequences are compared."""

    class Nested(Tied):
        def forward(self, x: Tensor) -> dict[str, object]:
            return {"loss": None, "parts": [super().forward(x), "text", {"n": 3}]}

    model = Nested(READS["transposed"])
    fe.inject(model, fe.LoRAConfig(r=2, target_modules=["enc"]))
    with pytest.raises(fe.TargetError, match="weight of enc"):
        fe.verify_forward(model, INPUT)


def test_known_models_pass():
    """The tiny transformer passes."""
    assert set(fe.verify_forward(injected(), X).values()) == {1}
