# SPDX-License-Identifier: Apache-2.0
"""The checks of graphs, streams and compiled steps, without a GPU: wrong results do not pass."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from benchmarks.gpu import graphs, tune
from fused_ewclora.backends.triton import measured, tables
from fused_ewclora.backends.triton.tools import autotune

WORKS = {work.name: i for i, work in enumerate(graphs.works("cpu"))}


def work_of(name: str) -> graphs.Work:
    torch.manual_seed(0)
    return graphs.works("cpu")[WORKS[name]]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch):
    """Without calls in between, which take the most time and are made in the rehearsal of the check."""
    monkeypatch.setattr(graphs, "evict", lambda *_: None)


@pytest.mark.parametrize("name", WORKS)
def test_replay_of_old_values(name: str, monkeypatch: pytest.MonkeyPatch):
    """A replay that reads what was there at the capture is wrong; one that reads new values is right."""
    assert graphs.replayed(work_of(name), "reference", "cpu") is None
    work = work_of(name)
    first = [t.detach().clone() for t in work("reference")]
    monkeypatch.setattr(graphs.Graph, "replay", lambda self: first)
    assert "error" in str(graphs.replayed(work, "reference", "cpu"))


def test_replay_that_writes_nothing():
    """Results that a replay leaves as they were are not numbers."""
    work = work_of("merge_")
    graph = graphs.Graph(lambda: work("reference"), "cpu")
    graph.step = list
    with pytest.raises(ValueError, match="zip"):
        graph.replay()
    assert all(t.isnan().all() for t in graph.results)


def test_training_step_without_penalty(monkeypatch: pytest.MonkeyPatch):
    """Steps replayed without the penalty differ from those with it."""
    assert graphs.trained("reference", "cpu", torch.float32) is None
    real, calls = graphs.Training.__call__, []

    def step(self: graphs.Training) -> list[Tensor]:
        calls.append(1)
        if len(calls) > graphs.STEPS:
            self.ewc.penalty = lambda: torch.zeros(())
        return real(self)

    monkeypatch.setattr(graphs.Training, "__call__", step)
    assert "error" in str(graphs.trained("reference", "cpu", torch.float32))


def test_compiled_step_old_parameters(monkeypatch: pytest.MonkeyPatch):
    """A compiled step that keeps the parameters of its first call is wrong."""

    def stale(module: torch.nn.Module, **_: object) -> object:
        held: list[Tensor] = []

        def step(x: Tensor, dy: Tensor) -> Tensor:
            now = [p.detach().clone() for p in module.parameters()]
            held[:] = held or now
            with torch.no_grad():
                torch._foreach_copy_(list(module.parameters()), held)
            grads = torch.autograd.grad(module(x, dy), list(module.parameters()))
            with torch.no_grad():
                torch._foreach_copy_(list(module.parameters()), now)
            return sum((p * g).sum() for p, g in zip(module.parameters(), grads, strict=True))

        return step

    monkeypatch.setattr(torch, "compile", stale)
    assert "call 1" in str(graphs.compiled("reference", "cpu"))


def test_checks_told_apart(capsys, monkeypatch: pytest.MonkeyPatch):
    """Every check is right, wrong with its reason, or not reached; a lost device ends the run."""
    outcomes = {"good": lambda: None, "bad": lambda: "error 1", "worse": lambda: 1 / 0}
    monkeypatch.setattr(graphs, "checks", lambda *_: iter(outcomes.items()))
    assert graphs.run_checks(["triton"], "cpu", time.monotonic() + 60.0) == 1
    told = capsys.readouterr().out
    assert "right: good" in told and "wrong: bad: error 1" in told and "wrong: worse: ZeroDivision" in told
    assert told.splitlines()[-2].startswith("triton: wrong: worse")
    assert told.splitlines()[-1] == "triton: 2 of 3 checks are wrong"
    monkeypatch.setattr(graphs, "lost", lambda _: True)
    graphs.run_checks(["triton"], "cpu", time.monotonic() + 60.0)
    assert capsys.readouterr().out.splitlines()[-1] == "triton: 2 of 2 checks are wrong, 1 were not reached"
    assert graphs.run_checks(["triton"], "cpu", 0.0) == 0
    assert "3 were not reached" in capsys.readouterr().out


# Tuning


def test_tuning_stops_in_time():
    """A search begins no trial after its end, and keeps what it has found."""
    start = {"BLOCK_M": 64, "num_warps": 4}
    done = autotune.search(start, lambda config: autotune.Trial(config, 1.0), 48, 0.0)
    assert [trial.config for trial in done] == [start]


def test_tuning_stays_near():
    """Only what can be compiled beforehand is tried: configurations one step from the shipped one."""
    start = {"BLOCK_M": 64, "num_warps": 4}
    near = [start, *autotune.neighbours(start)]
    fast = autotune.search(start, lambda c: autotune.Trial(c, 1.0 / c["BLOCK_M"]), len(near))
    assert {str(t.config) for t in fast} == {str(c) for c in near} and fast[0].config["BLOCK_M"] == 128


def test_tuned_table(tmp_path, monkeypatch: pytest.MonkeyPatch, capsys):
    """Results are a table in the format of those that ship; a key that fails or is not reached is told."""
    (first, second, *_) = keys = tune.keys("sm_90")

    def tuned(key, device, end, timer):
        if key == second:
            raise RuntimeError("the shipped configuration fails")
        best = tune.candidates(key)[1]
        entry = autotune._entry(key, best, "measured: 1.0 us, shipped 2.0 us")
        return autotune.Tuned(entry, [autotune.Trial(best, 1e-6), autotune.Trial({}, reason="slow")])

    monkeypatch.setattr(tune, "tuned", tuned)
    monkeypatch.setattr(tune, "keys", lambda _: [first, second])
    assert tune.run("sm_90", torch.device("cpu"), tmp_path, 60.0, lambda run: 0.0) == 1
    text = (tmp_path / "tuned.sm_90.json").read_text()
    (entry,) = measured.read(tmp_path / "tuned.sm_90.json")
    assert tables.fitting([entry], first.kernel, first.dtype, first.rank) == entry and text.endswith("]}\n")
    told = capsys.readouterr().out
    assert (
        "-> " in told and "2 of" in told and "1 refused" in told and "the shipped configuration fails" in told
    )
    assert tune.run("sm_90", torch.device("cpu"), tmp_path, -1.0, lambda run: 0.0) == 0
    assert "not reached" in capsys.readouterr().out
    assert len(keys) <= tune.MOST
