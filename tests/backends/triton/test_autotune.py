# SPDX-License-Identifier: Apache-2.0
"""Measured configurations: the search, what it discards, the file they are kept in, and when they count."""

from __future__ import annotations

import functools
import json
import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fused_ewclora.backends.triton import launch, measured, tables
from fused_ewclora.backends.triton.tables import Key
from fused_ewclora.backends.triton.tools import autotune, tuning, workloads
from fused_ewclora.backends.triton.tools.autotune import Trial
from fused_ewclora.errors import BackendError

START = {"BLOCK_M": 64, "BLOCK_N": 64, "TMA": True, "num_warps": 4, "num_stages": 3}
KEY = Key("toy_kernel", "sm_90", "bfloat16", 16)
TINY = workloads.Sizes(samples=2, tokens=5, width=48, hidden=32, layers=2)


def config(**changed: Any) -> dict[str, Any]:
    return {**START, **changed}


def entry(rank: int = 16, dtype: str = "bfloat16", **changed: Any) -> dict[str, Any]:
    return {
        "kernel": "toy_kernel",
        "dtypes": [dtype],
        "rank": rank,
        "config": config(**changed),
        "source": "measured",
    }


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """One shipped kernel, an empty folder of measured configurations, nothing remembered."""
    shipped = ({"kernel": "toy_kernel", "config": START, "source": "modelled"},)
    monkeypatch.setattr(tables, "table", lambda family: shipped)
    monkeypatch.setenv(measured.CACHE, str(tmp_path / "cache"))
    monkeypatch.delenv(tables.AUTOTUNE, raising=False)
    tables.autotuning.cache_clear()
    tables._configuration.cache_clear()
    yield tmp_path / "cache" / "sm_90.json"
    tables.autotuning.cache_clear()
    tables._configuration.cache_clear()


def looked_up(rank: int = 16) -> dict[str, Any]:
    return dict(tables.lookup("toy_kernel", "sm_90", torch.bfloat16, rank))


class FakeRun:
    """A run whose error and time depend on the configuration that it looks up."""

    def __init__(
        self, error: Callable[[dict[str, Any]], float], time: Callable[[dict[str, Any]], float]
    ) -> None:
        self.error, self.time = error, time
        self.workload = workloads.Workload("merge_", "toy", torch.bfloat16, 16, lambda make: ())

    def errors(self) -> list[float]:
        return [self.error(looked_up())]

    def __call__(self) -> float:
        return self.time(looked_up())


def tune(error: Callable[[dict[str, Any]], float], time: Callable[[dict[str, Any]], float]) -> autotune.Tuned:
    return autotune.tune(KEY, [FakeRun(error, time)], timer=lambda run: run())


def distance(to: dict[str, Any]) -> Callable[[dict[str, Any]], float]:
    """Seconds that grow with the number of steps to the configuration `to`."""
    return lambda c: 1.0 + sum(abs(math.log2(c[k] / to[k])) for k in to if k != "TMA")


def test_search_neighbours():
    """Neighbours are one step away and within limits."""
    found = autotune.neighbours(config(BLOCK_M=16, num_stages=1, num_warps=16))
    assert all(
        sum(c[k] != v for k, v in config(BLOCK_M=16, num_stages=1, num_warps=16).items()) == 1 for c in found
    )
    steps = {name: {c[name] for c in found} - {start} for name, start in found[0].items() for start in [None]}
    assert steps["BLOCK_M"] == {16, 32} and steps["BLOCK_N"] == {32, 64, 128}
    assert steps["num_warps"] == {8, 16} and steps["num_stages"] == {1, 2}
    assert steps["TMA"] == {True, False}
    assert not any(c["TMA"] for c in autotune.neighbours(config(TMA=False))), "TMA is never switched on"


def test_search_finds_fastest():
    """The search walks to the fastest configuration."""
    best = config(BLOCK_M=128, BLOCK_N=32, num_warps=8)
    trials = autotune.search(START, lambda c: Trial(c, distance(best)(c)))
    assert trials[0].config == best
    assert START in [trial.config for trial in trials]
    assert len({json.dumps(t.config, sort_keys=True) for t in trials}) == len(trials), (
        "nothing is tried twice"
    )


def test_search_stays():
    """The search stays where nothing is clearly faster."""
    trials = autotune.search(START, lambda c: Trial(c, 1.0 if c == START else 0.99))
    assert trials[0].config == START


def test_search_limit():
    """The search stops at its limit."""
    tried: list[dict[str, Any]] = []

    def attempt(c: dict[str, Any]) -> Trial:
        tried.append(c)
        return Trial(c, 1.0 / len(tried))

    assert len(autotune.search(START, attempt, limit=7)) == len(tried) == 7


def test_tuning_picks_fastest(toy: Path):
    """Tuning takes the fastest configuration and says what it measured."""
    best = config(BLOCK_M=128, num_stages=4)
    tuned = tune(lambda c: 1e-3, distance(best))
    assert tuned.entry["config"] == best
    assert (tuned.entry["kernel"], tuned.entry["dtypes"], tuned.entry["rank"]) == (
        "toy_kernel",
        ["bfloat16"],
        16,
    )
    assert "1000000.0 us" in tuned.entry["source"], "the best takes one second"


def test_wrong_results_discarded(toy: Path):
    """A configuration with wrong results is discarded, whatever its speed."""

    def error(c: dict[str, Any]) -> float:
        return {128: 3e-3, 32: math.nan}.get(c["BLOCK_M"], 1e-3)

    tuned = tune(error, lambda c: 1.0 if c["BLOCK_M"] == 64 else 0.1)
    assert tuned.entry["config"]["BLOCK_M"] == 64
    reasons = {t.config["BLOCK_M"]: t.reason for t in tuned.trials if t.reason is not None}
    assert set(reasons) == {32, 128}
    assert "relative error 3.0e-03 > 2.0e-03" in reasons[128] and "nan" in reasons[32]


def test_compile_error_discarded(toy: Path):
    """A configuration that does not compile is discarded, and the reason is given."""

    def error(c: dict[str, Any]) -> float:
        if c["num_warps"] == 8:
            raise RuntimeError("out of resource: shared memory")
        return 1e-3

    tuned = tune(error, lambda c: 1.0)
    failed = [t for t in tuned.trials if t.config["num_warps"] == 8]
    assert failed and all(t.reason == "RuntimeError: out of resource: shared memory" for t in failed)


@pytest.mark.parametrize("broken", [0.5, math.nan])
def test_broken_shipped_config(toy: Path, broken: float):
    """Nothing is tuned against a broken shipped configuration."""
    with pytest.raises(RuntimeError, match="shipped configuration of toy_kernel"):
        tune(lambda c: broken, lambda c: 1.0)


def test_file_roundtrip(toy: Path):
    """What is written is read back and replaces only the entry of the same key."""
    for one in (entry(64), entry(16), entry(16, "float16"), entry(16, BLOCK_M=256)):
        measured.add(toy, one)
    found = measured.read(toy)
    assert found == [entry(16, BLOCK_M=256), entry(64), entry(16, "float16")]
    assert [path.name for path in toy.parent.iterdir()] == [toy.name], "no temporary file is left"


def test_measured_file_as_table(toy: Path):
    """A measured file can serve as a shipped table."""
    for rank in (64, 16, 32):
        measured.add(toy, entry(rank, BLOCK_M=rank))
    entries = json.loads(toy.read_text())["entries"]
    for rank, expected in ((16, 16), (20, 32), (64, 64)):
        fit = tables.fitting(entries, "toy_kernel", "bfloat16", rank)
        assert fit is not None and fit["config"]["BLOCK_M"] == expected
    assert tables.fitting(entries, "toy_kernel", "bfloat16", 128) is None


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[1, 2]",
        '{"entries": {"kernel": "toy_kernel"}}',
        '{"entries": [{"kernel": "toy_kernel"}]}',
        '{"entries": ["toy_kernel"]}',
        '{"entries": [{"kernel": "toy_kernel", "dtypes": [], "rank": 16, "config": {"BLOCK_M": [1]}}]}',
        '{"entries": [{"kernel": "toy_kernel", "dtypes": [], "rank": 16, "config": {"num_warps": 0}}]}',
        "\x00\xff",
    ],
)
def test_foreign_file_warns(toy: Path, content: str):
    """Foreign content is ignored with a warning that names the file, and is replaced."""
    toy.parent.mkdir()
    toy.write_text(content, encoding="latin-1")
    with pytest.warns(RuntimeWarning, match="sm_90.json: ignored"):
        assert measured.read(toy) == []
    with pytest.warns(RuntimeWarning):
        measured.add(toy, entry())
    assert measured.read(toy) == [entry()]


def test_cache_folder_variables(monkeypatch: pytest.MonkeyPatch):
    """The cache folder follows its environment variables."""
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    monkeypatch.delenv(measured.CACHE, raising=False)
    assert measured.path("sm_90") == Path("/elsewhere/fused_ewclora/sm_90.json")
    monkeypatch.setenv(measured.CACHE, "/here")
    assert measured.path("gfx942") == Path("/here/gfx942.json")


def test_off_by_default(toy: Path, monkeypatch: pytest.MonkeyPatch):
    """Nothing is read or measured unless asked for."""
    measured.add(toy, entry(BLOCK_M=256))
    monkeypatch.setattr(measured, "read", lambda file: pytest.fail("read"))
    monkeypatch.setattr(autotune, "measure", lambda key: pytest.fail("measured"))
    assert looked_up() == START


def test_lookup_exact_rank(toy: Path, monkeypatch: pytest.MonkeyPatch):
    """Lookups prefer what was measured for exactly their rank."""
    monkeypatch.setenv(tables.AUTOTUNE, "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # nothing can be measured now
    measured.add(toy, entry(32, BLOCK_M=256))
    assert looked_up(32) == config(BLOCK_M=256)
    assert looked_up(16) == START


def test_other_version_blocks(toy: Path, monkeypatch: pytest.MonkeyPatch):
    """An entry with the block names of another version is not used."""
    monkeypatch.setenv(tables.AUTOTUNE, "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    measured.add(toy, entry(BLOCK_Q=16))
    assert looked_up() == START


@pytest.fixture
def gpu(toy: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(tables.AUTOTUNE, "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Abacus 9000")
    return toy


def test_measured_once(gpu: Path, monkeypatch: pytest.MonkeyPatch):
    """The first lookup measures; later lookups and other processes do not."""
    best = config(num_warps=8)
    asked: list[Key] = []

    def runs(key: Key, device: torch.device) -> list[Any]:
        asked.append(key)
        return [FakeRun(lambda c: 1e-3, distance(best))]

    monkeypatch.setattr(autotune, "runs", runs)
    monkeypatch.setattr(autotune, "time_on_gpu", lambda run: run())
    assert looked_up() == best and looked_up() == best
    tables._configuration.cache_clear()  # as another process would begin
    assert looked_up() == best
    assert asked == [KEY]
    (written,) = measured.read(gpu)
    assert "Abacus 9000" in written["source"]


def test_tuning_error_fallback(gpu: Path, monkeypatch: pytest.MonkeyPatch):
    """After an error in tuning, the shipped configuration is used."""

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(autotune, "runs", fail)
    with pytest.warns(RuntimeWarning, match="toy_kernel, rank 16: not tuned: CUDA out of memory"):
        assert looked_up() == START
    assert not gpu.exists()


def test_no_tuning_in_capture(gpu: Path, monkeypatch: pytest.MonkeyPatch):
    """Nothing is measured while a graph is being captured."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(autotune, "measure", lambda key: pytest.fail("measured"))
    assert looked_up() == START


def test_overrides_thread_local(toy: Path):
    """Overrides and watching apply to one thread only."""
    seen: list[dict[str, Any]] = []
    with tables.override(entry(BLOCK_M=256)), tables.watching() as keys:
        other = threading.Thread(target=lambda: seen.append(looked_up()))
        other.start()
        other.join()
        assert looked_up() == config(BLOCK_M=256) and looked_up(64) == START
    assert seen == [START] and keys == [KEY, KEY._replace(rank=64)]
    assert looked_up() == START


def test_noting_thread_local():
    """Launches are noted only for the thread that asked for it."""
    ran: list[tuple[int, ...]] = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *arguments, **options: ran.append(grid)

    with launch.noting("sm_90") as launches:
        launch.launch(Kernel(), (3,))
        other = threading.Thread(target=lambda: launch.launch(Kernel(), (5,)))
        other.start()
        other.join()
    assert [noted.grid for noted in launches] == [(3,)] and ran == [(5,)]


def test_command_without_gpu(monkeypatch: pytest.MonkeyPatch):
    """The command says why it cannot measure."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError, match=r"no GPU|not installed"):
        tuning.run()


@pytest.mark.parametrize(
    ("kernel", "dtype", "rank"),
    [("fisher_square_kernel", "float32", 0), ("lowrank_rows_kernel", "float32", 16)],
)
def test_interpreter_end_to_end(monkeypatch: pytest.MonkeyPatch, kernel: str, dtype: str, rank: int):
    """The whole way on Triton's interpreter: workloads that ask, the fp64 truth, overridden launches."""
    pytest.importorskip("triton")
    if not launch.interpreted():
        pytest.skip("needs Triton's interpreter; a GPU measures in the command itself")
    key = Key(kernel, launch.INTERPRETED, dtype, rank)
    asked = autotune.runs(key, torch.device("cpu"), TINY)
    assert asked
    shipped = dict(tables.shipped(key)["config"])
    block = next(name for name in shipped if name.startswith("BLOCK"))
    used: list[int] = []

    def timer(run: autotune.Run) -> float:
        with tables.watching():
            used.append(tables.lookup(kernel, launch.INTERPRETED, getattr(torch, dtype), rank)[block])
        return 0.5 if used[-1] == 2 * shipped[block] else 1.0

    tuned = autotune.tune(key, asked, timer, limit=4)
    assert tuned.entry["config"][block] == 2 * shipped[block], [t.reason for t in tuned.trials]
    assert set(used) >= {shipped[block], 2 * shipped[block]}


def test_all_lookups_measurable(monkeypatch: pytest.MonkeyPatch):
    """Also those of matmul precisions other than the current one, and of odd strides."""
    pytest.importorskip("triton")
    for name in ("workloads", "noted"):  # every key is looked for among the same calls
        monkeypatch.setattr(workloads, name, functools.cache(getattr(workloads, name)))
    keys = autotune.keys("sm_90", (torch.float32,), (16,))
    assert {key.rank for key in keys} >= {0, 16} and any(":" in key.kernel for key in keys)
    meta = torch.device("meta")
    missing = [key for key in keys if not autotune.runs(key, meta, TINY)]
    assert not missing
