# SPDX-License-Identifier: Apache-2.0
"""8-bit codes at equal bytes: levels of both, unbiased rounding, and the comparison on a tiny stream."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.continual import codes, configuration, problems
from fused_ewclora.reference.eight_bit import BLOCK


def fisher(rows: int = 6, columns: int = 70, seed: int = 0) -> torch.Tensor:
    """With a heavy tail, a block of zeros, and values far below the largest of their block."""
    made = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).pow(4)
    made[0, :BLOCK] = 0.0
    made[1, :3] = torch.tensor([1.0, 1e-3, 1e-7])
    return made


@pytest.mark.parametrize("name", codes.CODES)
def test_nearest_and_bracketing(name: str) -> None:
    """Without a seed the nearer level is taken; with one, a level beside the value, right on average."""
    exact = fisher()
    nearest = codes.CODES[name](exact, None)
    assert nearest.shape == exact.shape and not nearest[0, :BLOCK].any()
    drawn = torch.stack([codes.CODES[name](exact, seed) for seed in range(200)])
    distance = (drawn - exact).abs()
    assert bool(((nearest - exact).abs() <= distance.amin(0) * (1 + 1e-5) + 1e-12).all())
    off = drawn.double().sum((1, 2)) / exact.double().sum() - 1.0  # of the total, by draw
    assert bool(off.mean().abs() <= 5.0 * off.std() / len(off) ** 0.5 + 1e-6)


def test_e4m3_levels() -> None:
    """Both ways of rounding end on levels of fp8 e4m3 times the scale of the block."""
    exact = fisher()
    for seed in (None, 3):
        values = codes.e4m3(exact, seed)
        again = codes.e4m3(values, None)  # a level is its own nearest one, unless the scale has changed
        torch.testing.assert_close(again, values, rtol=2.0**-4, atol=1e-6)
        assert bool((values.amax(1) >= exact.amax(1) * (1 - 2.0**-4)).all())


@pytest.fixture(scope="module")
def stream() -> codes.Stream:
    """A tiny stream of digits."""
    pytest.importorskip("sklearn")
    problem = {
        "kind": "vision", "dataset": "digits", "tasks": 3, "train_per_class": 12, "test_per_class": 8,
        "base_steps": 2, "base_per_class": 20, "dim": 8, "depth": 1, "num_heads": 2,
    }  # fmt: skip
    data = {
        "name": "tiny", "about": "", "problem": problem, "seeds": [0],
        "adapters": {"r": 2, "target_modules": ["qkv"], "slices": ["k", "v"], "segments": ["q", "k", "v"]},
        "training": {"lr": 1e-2, "head_lr": 5e-3, "epochs": 2, "batch_size": 8},
        "methods": [{"name": "dense", "kind": "EWCLoRA", "options": {"ewc_lambda": 1.0}}],
    }  # fmt: skip
    (run,) = configuration.parse(data).runs
    return codes.learned(run, problems.load(problem, Path("none"), 0, "cpu"))


def test_stream_of_fishers(stream: codes.Stream) -> None:
    """A stream leaves a Fisher per task and matrix, and adapters that are not zero."""
    assert [len(of_task) for of_task in stream.fishers] == [2, 2, 2]
    assert all(f.shape == (8, 8) and bool((f >= 0).all()) and f.any() for of in stream.fishers for f in of)
    assert all(b.any() for b in stream.lora_bs) and len(stream.lora_as) == 2


def test_measured_errors(stream: codes.Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors are those of the codes: none of exact ones, and nearest rounding is biased when it drifts."""
    monkeypatch.setattr(codes, "ADDITIONS", 7)
    monkeypatch.setattr(codes, "REPEATS", 2)
    monkeypatch.setitem(codes.CODES, "exact", lambda fisher, seed: fisher)
    monkeypatch.setitem(codes.CODES, "halved", lambda fisher, seed: fisher * 0.5)
    found = codes.measured(stream)
    json.dumps(found)
    assert max(*found["exact"]["once"].values(), *found["exact"]["unbiased"].values()) < 1e-6
    assert abs(found["exact"]["bias"]) < 1e-6 and found["exact"]["bias_error"] < 1e-6
    assert found["halved"]["once"] == pytest.approx({"penalty": 0.5, "dA": 0.5, "dB": 0.5})
    assert found["halved"]["bias"] < -0.5 and found["halved"]["nearest_bias"] < -0.5
    assert 0.0 < found["square root"]["once"]["penalty"] < 0.05
    total = codes.exact_sum(stream)[0]
    counts = [3, 2, 2]  # 7 additions of three tasks
    torch.testing.assert_close(total, sum(n * of[0].double() for n, of in zip(counts, stream.fishers)))  # noqa: B905
