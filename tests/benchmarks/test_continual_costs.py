# SPDX-License-Identifier: Apache-2.0
"""Costs over tasks: states that are what they are to be, times that cancel a machine's drift, and targets."""

from __future__ import annotations

import copy
import gc
import itertools
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fused_ewclora as fe
from benchmarks.continual import costs, histories, looped, recorded
from benchmarks.continual.histories import LOOPED, QUICK, Network, State
from fused_ewclora.errors import ArgumentError, EWCLoRAError
from fused_ewclora.methods import Method, SDLoRA

CPU = torch.device("cpu")
TINY = Network(dim=8, depth=1, num_heads=2, side=8, batch=4, rank=3)
FACTORS = 2 * 2 * QUICK.rank * QUICK.dim  # numbers in A and B of k and v, one block
FISHERS = 2 * QUICK.dim**2
ENTRIES = [pytest.param(*entry, id=entry[0]) for entry in costs.methods(3)]


@pytest.fixture(autouse=True)
def one_thread(known_threads: None) -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def quick() -> dict[str, dict[str, Any]]:
    """The records of a quick run, by method."""
    torch.set_num_threads(1)  # before the fixtures of a single test
    return {record["method"]: record for record in costs.measure_all(quick=True)}


def values(method: Method) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in method.model.state_dict().items()}


def loss_of(method: Method, batch: histories.Batch) -> Tensor:
    return F.cross_entropy(method.model(batch[0]), batch[1]) + method.penalty()


# The states


@pytest.mark.parametrize("name, kind, options", ENTRIES)
def test_state_matches_shorter_sequence(name: str, kind: str, options: Any) -> None:
    """A state is that of a sequence that stopped there."""
    batch = TINY.example(CPU)
    long = histories.histories(kind, options, 3, TINY, CPU, seed=1)
    for tasks in (1, 2, 3):
        last = histories.histories(kind, options, tasks, TINY, CPU, seed=1)[-1]
        assert last.tasks == long[tasks - 1].tasks == tasks - 1
        assert torch.equal(loss_of(last, batch), loss_of(long[tasks - 1], batch))


@pytest.mark.parametrize("name, kind, options", ENTRIES)
def test_step_trains_own_state(name: str, kind: str, options: Any) -> None:
    """A step trains its own state and no other."""
    states, batch = histories.prepared(name, kind, options, 3, TINY, CPU, seed=0)
    for number, state in enumerate(states):
        before = [copy.deepcopy(one.model.state_dict()) for one in states]
        found = state.step(batch)
        assert np.isfinite(found)
        for other, old in enumerate(before):
            changed = {
                n for n, value in states[other].model.state_dict().items() if not torch.equal(value, old[n])
            }
            trained = {n for n, p in state.model.named_parameters() if p.requires_grad}
            assert changed == (trained if other == number else set())


def test_later_state_penalty() -> None:
    """A state in a later task has its penalty."""
    states, batch = histories.prepared("EWC", "EWCLoRA", {"ewc_lambda": 1e6}, 2, TINY, CPU, seed=0)
    for state in states:
        plain = F.cross_entropy(state.model(batch[0]), batch[1])
        assert state.loss(batch).item() - plain.item() == pytest.approx(state.method.penalty().item())
    assert states[0].method.penalty().item() == 0.0 < states[1].method.penalty().item()


def test_proximal_steps_are_on() -> None:
    (state,), batch = histories.prepared("CoDyRA", "CoDyRA", {"kappa_max": 0.1}, 1, TINY, CPU, seed=0)
    gates = [gate.clone() for gate in state.method.gates().values()]
    state.step(batch)
    for old, new in zip(gates, state.method.gates().values(), strict=True):
        assert bool((new < old - 0.09).all())  # Adam moves a gate by about its rate of 1e-3


def test_proximal_earlier_tasks() -> None:
    """Proximal steps are already on in earlier tasks."""
    method = histories.histories("CoDyRA", {"kappa_max": 10.0}, 2, TINY, CPU, seed=0)[1]
    assert method.report().summary["tasks"] == [0]  # ranks left at the end of task 0


# The loop over tasks


@pytest.fixture
def fp64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def moved(ranks: tuple[int, ...], tasks: int) -> SDLoRA:
    """In its last task, with a B that is not 0 any more and magnitudes of their own."""
    options = {"normalization": "factors", "ranks": ranks}
    method = histories.histories("SDLoRA", options, tasks, TINY, CPU, seed=2)[-1]
    assert isinstance(method, SDLoRA)
    for layer in fe.adapters(method.model).values():
        for name, parameter in layer.named_lora_parameters():
            if name.startswith(("lora_B", "lora_magnitudes")):
                parameter.data.add_(0.1 * torch.randn(parameter.shape))
    return method


@pytest.mark.parametrize("ranks, tasks", [((3,), 1), ((3,), 3), ((4, 2, 3), 4)])
@pytest.mark.usefixtures("fp64")
def test_loop_matches_sd_lora(ranks: tuple[int, ...], tasks: int) -> None:
    """The loop over tasks computes what SD-LoRA computes."""
    method = moved(ranks, tasks)
    images, labels = TINY.example(CPU)
    loss = F.cross_entropy(method.model(images), labels)
    loss.backward()
    layer = next(iter(fe.adapters(method.model).values()))
    theirs = {piece.name: looped.Directions.of(layer, piece) for piece in layer.adapter_slices}
    model = looped.unstack_(copy.deepcopy(method))
    model.zero_grad()
    other = F.cross_entropy(model(images), labels)
    other.backward()
    torch.testing.assert_close(other, loss, rtol=1e-12, atol=0.0)
    (linear,) = [module for module in model.modules() if isinstance(module, looped.LoopedLinear)]
    for (name, now), adapter in zip(theirs.items(), linear.adapters, strict=True):
        assert len(adapter.past_a) == tasks - 1, name
        assert not any(p.requires_grad for p in (*adapter.past_a, *adapter.past_b))
        alphas = torch.stack([alpha.grad for alpha in adapter.alphas])
        for found, expected in ((adapter.a, now.lora_A), (adapter.b, now.lora_B)):
            torch.testing.assert_close(found.grad, expected.grad, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(alphas, now.lora_magnitudes.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "options, name",
    [
        ({}, "normalization"),
        ({"ewc_lambda": 1.0}, "ewc_lambda"),
        ({"magnitudes": "shared", "reset_alphas": True}, "magnitudes"),
    ],
)
def test_loop_options_refused(options: dict[str, Any], name: str) -> None:
    """The loop over tasks is made from no other options of SD-LoRA."""
    options = {"normalization": "factors", **options} if options else options
    method = histories.histories("SDLoRA", options, 1, TINY, CPU, seed=0)[0]
    before = dict(method.model.named_modules())
    with pytest.raises(ArgumentError, match=name):
        looped.unstack_(method)
    assert dict(method.model.named_modules()) == before


# What is refused before any time is taken


def test_wrong_loop_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop that computes something else is refused."""
    forward = looped.LoopedAdapter.forward
    monkeypatch.setattr(looped.LoopedAdapter, "forward", lambda self, x: 1.5 * forward(self, x))
    with pytest.raises(EWCLoRAError, match=r"loop: task 1: expected a loss"):
        histories.prepared("loop", LOOPED, {"normalization": "factors"}, 3, QUICK, CPU, seed=0)


def test_dropped_direction_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dropped direction is refused."""
    # Without training B stays 0, and a direction of zero is dropped.
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: None)
    with pytest.raises(EWCLoRAError, match=r"SD: .*: expected 1 directions, got 0"):
        histories.prepared("SD", "SDLoRA", {}, 2, TINY, CPU, seed=0)


@pytest.mark.parametrize("gradient", [None, torch.tensor(float("nan"))])
def test_bad_gradients_refused(gradient: Tensor | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients that are missing or not finite are refused."""
    step = State.step

    def spoiled(self: State, batch: histories.Batch) -> float:
        found = step(self, batch)
        bias = self.model.heads[-1].bias
        bias.grad = None if gradient is None else gradient.expand_as(bias).clone()
        return found

    monkeypatch.setattr(State, "step", spoiled)
    with pytest.raises(EWCLoRAError, match=r"LoRA: task 0: heads.0.bias has no finite gradient"):
        histories.prepared("LoRA", "LoRA", {}, 1, TINY, CPU, seed=0)


def test_nan_loss_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss that is not finite is refused."""
    monkeypatch.setattr(histories.Network, "example", lambda self, device: _nan(self))
    with pytest.raises(EWCLoRAError, match="nan"):
        histories.prepared("LoRA", "LoRA", {}, 1, TINY, CPU, seed=0)


def _nan(network: Network) -> histories.Batch:
    images = torch.full((network.batch, 3, network.side, network.side), float("nan"))
    return images, torch.zeros(network.batch, dtype=torch.int64)


@pytest.mark.parametrize(
    "change, name",
    [
        ({"tasks": 0}, "tasks"),
        ({"tasks": 2.0}, "tasks"),
        ({"rounds": 0}, "rounds"),
        ({"rounds": True}, "rounds"),
    ],
)
def test_bad_counts_refused(change: dict[str, Any], name: str) -> None:
    """Counts must be positive integers."""
    with pytest.raises(ArgumentError, match=f"^{name}: expected an integer >= 1"):
        costs.measure("LoRA", "LoRA", {}, **{"network": TINY, "rounds": 1, "tasks": 1, **change})


def test_kinds_must_be_known() -> None:
    with pytest.raises(ArgumentError, match=r"kind: expected one of .*, LoRA, .*LoopedSDLoRA, got 'Lora'"):
        costs.measure("LoRA", "Lora", {}, network=TINY)


# Times


class FakeClock:
    """A machine that becomes slower all the time."""

    def __init__(self) -> None:
        self.now, self.speed, self.calls = 0.0, 1.0, []

    def step(self, number: int, cost: float) -> None:
        self.calls.append(number)
        self.now += cost * self.speed
        if len(self.calls) % 3 == 0:  # after every round
            self.speed *= 1.05


def test_machine_drift_cancels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drift of the machine cancels out."""
    clock = FakeClock()
    monkeypatch.setattr(costs.time, "perf_counter", lambda: clock.now)
    steps = [lambda n=n, c=c: clock.step(n, c) for n, c in enumerate((2.0, 3.0, 5.0))]
    seconds = costs.rounds_of(steps, 30, seed=0)
    assert costs.ratios_to_first(seconds) == pytest.approx([1.0, 1.5, 2.5])
    assert [len(one) for one in seconds] == [30, 30, 30]
    turns = [tuple(clock.calls[i : i + 3]) for i in range(0, 90, 3)]
    assert all(sorted(turn) == [0, 1, 2] for turn in turns)
    # Some step after every other, and every place for every step.
    assert {pair for turn in turns for pair in itertools.pairwise(turn)} == set(
        itertools.permutations(range(3), 2)
    )
    assert all({turn[place] for turn in turns} == {0, 1, 2} for place in range(3))


def test_no_garbage_collection() -> None:
    """No garbage is collected while steps are timed."""
    seen: list[bool] = []
    costs.rounds_of([lambda: seen.append(gc.isenabled())], 2, seed=0)
    assert seen == [False, False] and gc.isenabled()

    def failing() -> None:
        raise RuntimeError("step")

    with pytest.raises(RuntimeError, match="step"):
        costs.rounds_of([failing], 1, seed=0)
    assert gc.isenabled()


def test_quantiles_match_numpy() -> None:
    """Quantiles and ratios equal those of NumPy."""
    seconds = np.random.default_rng(0).random((3, 9)) + 0.1
    for row in seconds:
        expected = np.quantile(row, [0.2, 0.5, 0.8])
        assert list(costs.quantiles(row.tolist()).values()) == pytest.approx(expected.tolist())
    expected = np.median(seconds / seconds[0], axis=1)
    assert costs.ratios_to_first(seconds.tolist()) == pytest.approx(expected.tolist())


# Records


def test_records_match_schema(quick: dict[str, dict[str, Any]]) -> None:
    """The records of a quick run follow the schema."""
    assert list(quick) == [name for name, _, _ in costs.methods(3)]
    for record in quick.values():
        assert not list(recorded.violations({**json.loads(json.dumps(record)), "command": "a command"}))
        per_task = ("step_seconds", "ratio_to_first", "step_peak_bytes", "state_bytes", "adapter_parameters")
        assert record["tasks"] == 3 and all(len(record[key]) == 3 for key in per_task)
        assert record["ratio_to_first"][0] == 1.0
        for times in record["step_seconds"]:
            assert 0.0 < times["p20"] <= times["p50"] <= times["p80"]
        assert record["model"] == {"dim": 32, "blocks": 1, "tokens": 5, "batch": 4, "rank": 4}


def test_records_state_size(quick: dict[str, dict[str, Any]]) -> None:
    """Records tell what methods keep."""
    held = {name: record["adapter_parameters"] for name, record in quick.items()}
    kept = {name: record["state_bytes"] for name, record in quick.items()}
    assert held["LoRA"] == held["EWC-LoRA"] == [FACTORS] * 3
    assert kept["LoRA"] == [4 * FACTORS] * 3
    assert kept["EWC-LoRA"] == [4 * FACTORS, 4 * (FACTORS + FISHERS), 4 * (FACTORS + FISHERS)]
    assert held["SD-LoRA"] == [k * (FACTORS + 2) for k in (1, 2, 3)]
    loop = quick["SD-LoRA, loop over tasks"]
    assert loop["adapter_parameters"] == held["SD-LoRA"]
    assert loop["state_bytes"] == [4 * number for number in held["SD-LoRA"]]


def test_peak_grows_with_directions(
    quick: dict[str, dict[str, Any]],
) -> None:
    """Where directions are kept, the peak memory of a step grows from task to task."""
    gradients = 4 * FACTORS  # bytes, made by every step
    for name in ("LoRA", "CoDyRA", "InfLoRA"):
        peaks = quick[name]["step_peak_bytes"]
        assert len(set(peaks)) == 1 and peaks[0] > gradients // 2  # InfLoRA trains B alone
    for name in ("SD-LoRA", "SD-LoRA, loop over tasks"):
        first, second, third = quick[name]["step_peak_bytes"]
        assert first < second < third


# Targets


def record_of(method: str, **change: Any) -> dict[str, Any]:
    tasks = 10
    flat = {
        "ratio_to_first": [1.0] * tasks,
        "step_peak_bytes": [100] * tasks,
        "state_bytes": [10] + [100] * (tasks - 1),
    }
    return {"method": method, "tasks": tasks, **flat, **change}


def verdicts(*records: dict[str, Any]) -> list[bool | None]:
    return [goal["met"] for goal in costs.goals(records)]


def test_targets_ten_tasks() -> None:
    """Targets are judged from records of ten tasks."""
    assert verdicts(record_of("SD-LoRA"), record_of("EWC-LoRA")) == [True] * 4
    assert verdicts() == [None] * 4
    assert verdicts(record_of("SD-LoRA")) == [True, None, None, None]
    assert verdicts(record_of("EWC-LoRA", tasks=3), record_of("SD-LoRA", tasks=3)) == [None] * 4
    for goal in costs.goals([]):
        assert set(goal) == {"goal", "target", "value", "met"} and goal["value"] is None


@pytest.mark.parametrize(
    "method, change, number, value",
    [
        ("SD-LoRA", {"ratio_to_first": [1.0] * 9 + [1.36]}, 0, 1.36),
        ("EWC-LoRA", {"ratio_to_first": [1.0 + 0.04 * k / 9 for k in range(10)]}, 1, 1.04),
        ("EWC-LoRA", {"step_peak_bytes": [100] * 5 + [104] * 5}, 2, 1.04),
        ("EWC-LoRA", {"state_bytes": [10] + [100] * 8 + [104]}, 3, 1.04),
    ],
)
def test_targets_missed(method: str, change: dict[str, Any], number: int, value: float) -> None:
    """Each target can be missed."""
    others = [record_of(name) for name in ("SD-LoRA", "EWC-LoRA") if name != method]
    found = costs.goals([*others, record_of(method, **change)])
    assert [goal["met"] for goal in found] == [n != number for n in range(4)]
    assert found[number]["value"] == pytest.approx(value)
    # The last record of a method counts.
    assert verdicts(*others, record_of(method, **change), record_of(method)) == [True] * 4


def test_trend_all_tasks() -> None:
    """A trend is that of all tasks."""
    assert costs.trend([2.0, 2.5, 3.0]) == pytest.approx(1.5)
    one_off = [1.0] * 9 + [1.04]
    slope, first = 0.04 * 4.5 / 82.5, 1.004 - 4.5 * 0.04 * 4.5 / 82.5  # 82.5: squares of 0..9 about 4.5
    assert costs.trend(one_off) == pytest.approx(1.0 + 9 * slope / first)
    assert verdicts(record_of("EWC-LoRA", ratio_to_first=one_off))[1] is True
    assert verdicts(record_of("EWC-LoRA", ratio_to_first=[1.0] + [1.08] * 9))[1] is False


def test_target_limit_inclusive() -> None:
    """A target is met at its limit."""
    assert verdicts(record_of("SD-LoRA", ratio_to_first=[1.0, 2.0] + [1.0] * 7 + [1.35]))[0] is True
