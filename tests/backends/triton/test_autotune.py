"""Measured configurations: the search, what it discards, the file they are kept in, and when they count."""

from __future__ import annotations

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


def test_neighbours_are_one_step_away_and_within_limits():
    found = autotune.neighbours(config(BLOCK_M=16, num_stages=1, num_warps=16))
    assert all(
        sum(c[k] != v for k, v in config(BLOCK_M=16, num_stages=1, num_warps=16).items()) == 1 for c in found
    )
    steps = {name: {c[name] for c in found} - {start} for name, start in found[0].items() for start in [None]}
    assert steps["BLOCK_M"] == {16, 32} and steps["BLOCK_N"] == {32, 64, 128}
    assert steps["num_warps"] == {8, 16} and steps["num_stages"] == {1, 2}
    assert steps["TMA"] == {True, False}
    assert not any(c["TMA"] for c in autotune.neighbours(config(TMA=False))), "TMA is never switched on"


def test_the_search_walks_to_the_fastest_configuration():
    best = config(BLOCK_M=128, BLOCK_N=32, num_warps=8)
    trials = autotune.search(START, lambda c: Trial(c, distance(best)(c)))
    assert trials[0].config == best
    assert START in [trial.config for trial in trials]
    assert len({json.dumps(t.config, sort_keys=True) for t in trials}) == len(trials), (
        "nothing is tried twice"
    )


def test_the_search_stays_where_nothing_is_clearly_faster():
    trials = autotune.search(START, lambda c: Trial(c, 1.0 if c == START else 0.99))
    assert trials[0].config == START


def test_the_search_stops_at_its_limit():
    tried: list[dict[str, Any]] = []

    def attempt(c: dict[str, Any]) -> Trial:
        tried.append(c)
        return Trial(c, 1.0 / len(tried))

    assert len(autotune.search(START, attempt, limit=7)) == len(tried) == 7


def test_tuning_takes_the_fastest_and_says_what_it_measured(toy: Path):
    best = config(BLOCK_M=128, num_stages=4)
    tuned = tune(lambda c: 1e-3, distance(best))
    assert tuned.entry["config"] == best
    assert (tuned.entry["kernel"], tuned.entry["dtypes"], tuned.entry["rank"]) == (
        "toy_kernel",
        ["bfloat16"],
        16,
    )
    assert "1000000.0 us" in tuned.entry["source"], "the best takes one second"


def test_a_configuration_with_wrong_results_is_discarded_whatever_its_speed(toy: Path):
    def error(c: dict[str, Any]) -> float:
        return {128: 3e-3, 32: math.nan}.get(c["BLOCK_M"], 1e-3)

    tuned = tune(error, lambda c: 1.0 if c["BLOCK_M"] == 64 else 0.1)
    assert tuned.entry["config"]["BLOCK_M"] == 64
    reasons = {t.config["BLOCK_M"]: t.reason for t in tuned.trials if t.reason is not None}
    assert set(reasons) == {32, 128}
    assert "relative error 3.0e-03 > 2.0e-03" in reasons[128] and "nan" in reasons[32]


def test_a_configuration_that_does_not_compile_is_discarded_with_the_reason(toy: Path):
    def error(c: dict[str, Any]) -> float:
        if c["num_warps"] == 8:
            raise RuntimeError("out of resource: shared memory")
        return 1e-3

    tuned = tune(error, lambda c: 1.0)
    failed = [t for t in tuned.trials if t.config["num_warps"] == 8]
    assert failed and all(t.reason == "RuntimeError: out of resource: shared memory" for t in failed)


@pytest.mark.parametrize("broken", [0.5, math.nan])
def test_nothing_is_tuned_against_a_broken_shipped_configuration(toy: Path, broken: float):
    with pytest.raises(RuntimeError, match="shipped configuration of toy_kernel"):
        tune(lambda c: broken, lambda c: 1.0)


def test_what_is_written_is_read_back_and_replaces_the_same_key_only(toy: Path):
    for one in (entry(64), entry(16), entry(16, "float16"), entry(16, BLOCK_M=256)):
        measured.add(toy, one)
    found = measured.read(toy)
    assert found == [entry(16, BLOCK_M=256), entry(64), entry(16, "float16")]
    assert [path.name for path in toy.parent.iterdir()] == [toy.name], "no temporary file is left"


def test_a_measured_file_serves_as_a_shipped_table(toy: Path):
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
def test_foreign_content_is_ignored_with_a_warning_that_names_the_file_and_is_replaced(
    toy: Path, content: str
):
    toy.parent.mkdir()
    toy.write_text(content, encoding="latin-1")
    with pytest.warns(RuntimeWarning, match="sm_90.json: ignored"):
        assert measured.read(toy) == []
    with pytest.warns(RuntimeWarning):
        measured.add(toy, entry())
    assert measured.read(toy) == [entry()]


def test_the_folder_follows_its_variables(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    monkeypatch.delenv(measured.CACHE, raising=False)
    assert measured.path("sm_90") == Path("/elsewhere/fused_ewclora/sm_90.json")
    monkeypatch.setenv(measured.CACHE, "/here")
    assert measured.path("gfx942") == Path("/here/gfx942.json")


def test_nothing_is_read_or_measured_unless_asked_for(toy: Path, monkeypatch: pytest.MonkeyPatch):
    measured.add(toy, entry(BLOCK_M=256))
    monkeypatch.setattr(measured, "read", lambda file: pytest.fail("read"))
    monkeypatch.setattr(autotune, "measure", lambda key: pytest.fail("measured"))
    assert looked_up() == START


def test_lookups_prefer_what_was_measured_for_exactly_their_rank(toy: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(tables.AUTOTUNE, "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # nothing can be measured now
    measured.add(toy, entry(32, BLOCK_M=256))
    assert looked_up(32) == config(BLOCK_M=256)
    assert looked_up(16) == START


def test_an_entry_with_the_blocks_of_another_version_is_not_used(toy: Path, monkeypatch: pytest.MonkeyPatch):
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


def test_the_first_lookup_measures_and_later_ones_and_processes_do_not(
    gpu: Path, monkeypatch: pytest.MonkeyPatch
):
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


def test_after_an_error_of_tuning_the_shipped_configuration_serves(
    gpu: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(autotune, "runs", fail)
    with pytest.warns(RuntimeWarning, match="toy_kernel, rank 16: not tuned: CUDA out of memory"):
        assert looked_up() == START
    assert not gpu.exists()


def test_nothing_is_measured_inside_the_capture_of_a_graph(gpu: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(autotune, "measure", lambda key: pytest.fail("measured"))
    assert looked_up() == START


def test_overrides_and_watching_are_of_one_thread(toy: Path):
    seen: list[dict[str, Any]] = []
    with tables.override(entry(BLOCK_M=256)), tables.watching() as keys:
        other = threading.Thread(target=lambda: seen.append(looked_up()))
        other.start()
        other.join()
        assert looked_up() == config(BLOCK_M=256) and looked_up(64) == START
    assert seen == [START] and keys == [KEY, KEY._replace(rank=64)]
    assert looked_up() == START


def test_what_a_thread_notes_no_other_thread_notes():
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


def test_the_command_says_why_it_cannot_measure(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError, match=r"no GPU|not installed"):
        tuning.run()


@pytest.mark.parametrize(
    ("kernel", "dtype", "rank"),
    [("fisher_square_kernel", "float32", 0), ("lowrank_rows_kernel", "float32", 16)],
)
def test_kernels_run_and_are_checked_under_other_configurations(
    monkeypatch: pytest.MonkeyPatch, kernel: str, dtype: str, rank: int
):
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


def test_every_configuration_that_can_be_looked_up_can_be_measured():
    """Also those of matmul precisions other than the current one, and of odd strides."""
    pytest.importorskip("triton")
    keys = autotune.keys("sm_90", (torch.float32,), (16,))
    assert {key.rank for key in keys} >= {0, 16} and any(":" in key.kernel for key in keys)
    meta = torch.device("meta")
    missing = [key for key in keys if not autotune.runs(key, meta, TINY)]
    assert not missing
