# SPDX-License-Identifier: Apache-2.0
"""The clock for GPUs on an imitation of torch.cuda: what is captured, replayed, rotated and given up."""

from __future__ import annotations

import contextlib
import types

import pytest
import torch

from benchmarks.clock import CudaClock

KERNEL = 1e-3  # seconds that every imitated launch takes


class Device:
    """Imitates a device: launches take time, or are recorded while a graph is captured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.allocated, self.peak = 0.0, 0, 0
        self.captured: list[str] | None = None
        self.ran: list[str] = []
        device = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = device.now

            def elapsed_time(self, end: Event) -> float:
                return (end.at - self.at) * 1e3

        class Graph:
            def capture_begin(self, pool: object) -> None:
                assert pool is not None and device.captured is None
                device.captured = []

            def capture_end(self) -> None:
                self.launches, device.captured = device.captured, None

            def replay(self) -> None:
                for name in self.launches:
                    device.launch(name)

        fakes = {
            "Stream": lambda: "side stream", "stream": lambda _: contextlib.nullcontext(), "Event": Event,
            "CUDAGraph": Graph, "graph_pool_handle": object, "synchronize": lambda: None,
            "_sleep": lambda cycles: None, "memory_reserved": lambda: 0, "empty_cache": lambda: None,
            "get_device_properties": lambda _: types.SimpleNamespace(total_memory=1),
            "memory_allocated": lambda: device.allocated, "max_memory_allocated": lambda: device.peak,
            "reset_peak_memory_stats": lambda: setattr(device, "peak", device.allocated),
        }  # fmt: skip
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    def launch(self, name: str) -> None:
        if self.captured is not None:
            self.captured.append(name)
            return
        self.ran.append(name)
        self.now += KERNEL


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    return Device(monkeypatch)


def test_graph_whole_rotation(device: Device):
    """A graph runs the whole rotation, and a sample is the time of one run."""
    clock = CudaClock()
    with clock.running():
        prepared = clock.prepare([lambda: device.launch("a"), lambda: device.launch("b")])
        device.ran.clear()
        samples = clock.times([prepared], 0.0)[0]
    assert (prepared.timing, prepared.share, prepared.repeats) == ("graph", 2, 1)
    assert device.ran == ["a", "b"] * clock.min_rounds
    assert samples == pytest.approx([KERNEL] * clock.min_rounds)
    assert prepared.host_seconds is not None


def test_short_graph_repeats(device: Device):
    """Short graphs are replayed until the gaps between them do not count."""
    clock = CudaClock()
    clock.sample_seconds = 10 * KERNEL
    with clock.running():
        prepared = clock.prepare([lambda: device.launch("a")])
        device.ran.clear()
        samples = clock.times([prepared], 0.0)[0]
    assert prepared.repeats == 10 and len(device.ran) == 10 * len(samples)
    assert samples == pytest.approx([KERNEL] * len(samples))


def test_variants_take_turns(device: Device):
    clock = CudaClock()
    with clock.running():
        both = [clock.prepare([lambda n=name: device.launch(n)]) for name in "ab"]
        device.ran.clear()
        clock.times(both, 0.0)
    assert device.ran == ["a", "b"] * clock.min_rounds


def test_eager_fallback(device: Device):
    """What cannot be captured is timed eagerly."""

    def run() -> None:
        if device.captured is not None:
            raise RuntimeError("operation not permitted when stream is capturing")
        device.launch("a")

    clock = CudaClock()
    with clock.running():
        prepared = clock.prepare([run])
        pool = clock.pool
        samples = clock.times([prepared], 0.0)[0]
    assert (prepared.timing, device.captured) == ("events", None)
    assert samples == pytest.approx([KERNEL] * len(samples))
    with clock.running():
        assert clock.pool is not pool


def test_capture_out_of_memory(device: Device):
    """Running out of memory during a capture is a failure."""

    def run() -> None:
        if device.captured is not None:
            raise RuntimeError("CUDA out of memory")
        device.launch("a")

    clock = CudaClock()
    with clock.running(), pytest.raises(RuntimeError, match="out of memory"):
        clock.prepare([run])
    assert device.captured is None


def test_peak_memory(device: Device):
    """The peak is the memory that one warm call adds."""
    held: list[int] = []

    def run() -> str:
        if not held:  # the first call also allocates what later ones reuse
            held.append(1)
            device.allocated += 100
        device.peak = max(device.peak, device.allocated + 7)
        return "result"

    clock = CudaClock()
    with clock.running():
        assert clock.peak(run) == ("result", 7)
