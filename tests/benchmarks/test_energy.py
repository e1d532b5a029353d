# SPDX-License-Identifier: Apache-2.0
"""Energy per call from a counter that moves in steps: on an imitated counter, clock and driver."""

from __future__ import annotations

import ctypes
import types

import pytest
import torch

from benchmarks import energy, harness, records, report
from benchmarks.case import OURS, Case, Provider
from benchmarks.clock import CudaClock, Prepared, WallClock

STEP, WATTS = 0.02, 300.0  # of the imitated counter: seconds between its steps, power of the GPU
CALL = 1.7e-3  # seconds of one imitated call
EXACT = 1e3 * WATTS * CALL  # millijoules of one


class Gpu:
    """An imitated GPU: time passes only while calls run, and the counter shows the energy of its last
    step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step: float = STEP) -> None:
        self.now, self.step = 0.0, step
        monkeypatch.setattr(energy, "time", types.SimpleNamespace(perf_counter=lambda: self.now))

    def counter(self) -> float:
        return 1e3 * WATTS * self.step * int(self.now / self.step)

    def burst(self, calls: int = 1) -> int:
        self.now += CALL * calls
        return calls


def test_between_counter_steps(monkeypatch: pytest.MonkeyPatch):
    """Energy per call is measured between two steps of the counter."""
    gpu = Gpu(monkeypatch)
    for offset in (0.0, 0.3 * STEP, 0.99 * STEP):
        gpu.now += offset
        begin = gpu.now
        found = energy.Meter(gpu.counter, window=0.2).per_call(gpu.burst)
        # The first and the last step are seen up to a call late.
        assert found == pytest.approx(EXACT, rel=2 * CALL / 0.2)
        assert 0.2 <= gpu.now - begin <= 0.2 + 3 * STEP


def test_burst_calls_counted(monkeypatch: pytest.MonkeyPatch):
    """Energy counts every call of a burst."""
    gpu = Gpu(monkeypatch)
    found = energy.Meter(gpu.counter, window=0.2).per_call(lambda: gpu.burst(4))
    assert found == pytest.approx(EXACT, rel=2 * 4 * CALL / 0.2)


def test_stuck_counter(monkeypatch: pytest.MonkeyPatch):
    """A counter that stands still gives no figure."""
    gpu = Gpu(monkeypatch, step=1e9)
    meter = energy.Meter(gpu.counter, limit=0.1)
    assert meter.per_call(gpu.burst) is None
    assert gpu.now == pytest.approx(0.1, abs=2 * CALL)


def test_allowance_spent(monkeypatch: pytest.MonkeyPatch):
    """No more figures come once the time allowance is spent."""
    gpu = Gpu(monkeypatch)
    meter = energy.Meter(gpu.counter, allowance=0.1)
    found = [meter.per_call(gpu.burst) for _ in range(5)]
    assert found[0] is not None and found[-2:] == [None, None]
    assert gpu.now <= 0.1 + 0.04 + 3 * STEP


class Driver:
    """Imitates libnvidia-ml: three functions, a status and a text for errors."""

    def __init__(self, broken: str = "") -> None:
        self.asked: list[bytes] = []
        self.joules = 7000

        def nvmlDeviceGetHandleByUUID(uuid: bytes, handle: object) -> int:
            self.asked.append(uuid)
            return 3 * (broken == "handle")

        def total(handle: object, value: object) -> int:
            ctypes.cast(value, ctypes.POINTER(ctypes.c_ulonglong))[0] = self.joules
            return 3 * (broken == "total")

        self.nvmlInit_v2 = lambda: 0
        self.nvmlDeviceGetHandleByUUID = nvmlDeviceGetHandleByUUID
        self.nvmlDeviceGetTotalEnergyConsumption = total
        self.nvmlErrorString = self.text

    @staticmethod
    def text(status: int) -> bytes:
        return b"Not Supported"


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(uuid="ab-12"))


def test_current_device(cuda: None, monkeypatch: pytest.MonkeyPatch):
    """The counter is that of the current device."""
    driver = Driver()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    read = energy.counter()
    assert driver.asked == [b"GPU-ab-12"] and read() == 7000.0
    driver.joules = 7100
    assert read() == 7100.0
    meter, told = energy.meter()
    assert meter is not None and told == "nvmlDeviceGetTotalEnergyConsumption"


@pytest.mark.parametrize(
    ("broken", "said"), [("handle", "HandleByUUID: Not Supported"), ("total", "Consumption: Not Supported")]
)
def test_driver_without_counter(broken: str, said: str, cuda: None, monkeypatch: pytest.MonkeyPatch):
    """A driver without a counter is given as the reason."""
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver(broken))
    meter, told = energy.meter()
    assert meter is None and told.startswith("not measured: ") and said in told


def test_no_driver(monkeypatch: pytest.MonkeyPatch):
    """A missing driver is given as the reason."""
    monkeypatch.setattr(energy, "LIBRARY", "libnvidia-ml-that-nobody-has.so")
    meter, told = energy.meter()
    assert meter is None and "libnvidia-ml-that-nobody-has.so" in told


def test_whole_rotations(monkeypatch: pytest.MonkeyPatch):
    """The clock of GPUs hands the meter whole rotations."""
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    runs: list[int] = []

    class Meter:
        def per_call(self, burst) -> float:
            return float(burst())

    prepared = Prepared(lambda: runs.append(1), share=3, timing="graph", repeats=2)
    calls = CudaClock(Meter()).energy(prepared)
    assert calls == 3 * len(runs) == 3 * 2 * CudaClock.burst
    runs.clear()
    assert CudaClock(Meter()).energy(Prepared(lambda: runs.append(1), 3, "graph")) == 3 * len(runs) == 3
    assert CudaClock().energy(prepared) is None and WallClock().energy(prepared) is None


def test_lost_counter(monkeypatch: pytest.MonkeyPatch):
    """Losing the counter does not lose any times."""
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)

    class Lost:
        def per_call(self, burst) -> float:
            raise energy.Unmeasurable("GPU is lost")

    clock = CudaClock(Lost())
    assert clock.energy(Prepared(lambda: None, 1, "graph")) is None and clock.meter is None


def test_records_and_tables():
    """Records and tables have energy where it was measured."""

    class Clock(WallClock):
        def energy(self, prepared: Prepared) -> float | None:
            return 12.5

    ones = torch.ones(4)
    case = Case("x", {"n": 4}, "float32", 8.0, 16.0, [Provider(OURS, lambda: [ones], "ours")],
                lambda: [ones.double()], 1e-6)  # fmt: skip
    extra = {"time": "now", "environment": dict.fromkeys(("device", "torch", "python", "commit"), "x")}
    for clock, told in ((Clock(2), True), (WallClock(2), False)):
        (record,) = [{**r, **extra} for r in harness.measure(case, 0.0, {}, clock)]
        assert not list(records.violations(record))
        assert ("millijoules_per_call" in record) is told
        text = "\n".join(report.op_table([{OURS: record}]))
        assert ("energy" in text and "12.5 mJ" in text) is told
