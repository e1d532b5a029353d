"""The command line: exit statuses, JSON, and what it says when something is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fused_ewclora import __main__ as cli
from fused_ewclora.backends import candidate
from fused_ewclora.diagnostics import info
from fused_ewclora.ops.dispatch import available_backends
from fused_ewclora.ops.schemas import SCHEMAS

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str, code: str | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    start = ["-c", code] if code else ["-m", "fused_ewclora"]
    return subprocess.run(
        [sys.executable, *start, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONWARNINGS": "ignore", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_info_json_is_one_object_that_covers_every_op_and_backend():
    result = run("info", "--json")
    assert result.returncode == 0, result.stderr
    data = json.loads(result.stdout)
    assert set(data["ops"]) == set(SCHEMAS)
    for row in data["ops"].values():
        assert set(row) == set(available_backends()) == set(data["backends"])
        assert row["reference"] is None


def test_info_gives_a_reason_wherever_a_backend_is_missing(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    for name, reason in available_backends().items():
        assert name in text
        assert reason is None or reason in text


def test_info_reports_the_environment_and_an_unusable_default_backend():
    result = run("info", "--json", FUSED_EWCLORA_BACKEND="abacus")
    assert result.returncode == 0, result.stderr
    data = json.loads(result.stdout)
    assert data["environment"]["FUSED_EWCLORA_BACKEND"] == "abacus"
    assert "expected one of" in data["default_backend"] and "abacus" in data["default_backend"]


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["info", "--nonsense"]])
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize("extra", cli.DEMO_EXTRAS)
def test_demo_without_its_extras_says_what_to_install(extra: str, tmp_path: Path):
    blocked = f"import sys; sys.modules[{extra!r}] = None; "
    code = blocked + "from fused_ewclora.__main__ import main; sys.exit(main(sys.argv[1:]))"
    result = run("demo", code=code)
    assert result.returncode == 2, result.stderr
    assert extra in result.stderr and "pip install 'fused-ewclora[demo]'" in result.stderr
    assert "Traceback" not in result.stderr


def test_info_works_without_the_demo_extras():
    code = "import sys; sys.modules.update(sklearn=None, matplotlib=None); "
    code += "from fused_ewclora.__main__ import main; sys.exit(main(sys.argv[1:]))"
    result = run("info", code=code)
    assert result.returncode == 0, result.stderr


def test_errors_of_the_library_end_a_command_with_1_and_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from fused_ewclora import errors
    from fused_ewclora.diagnostics import info

    def fail() -> dict[str, object]:
        raise errors.BackendError("backend 'cpu' is not available: no reason")

    monkeypatch.setattr(info, "collect", fail)
    assert cli.main(["info"]) == 1
    assert capsys.readouterr().err == "fused_ewclora: backend 'cpu' is not available: no reason\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="imitates a GPU")
def test_info_tells_what_serves_the_ops_of_each_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Imitation 7")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    candidate._gpu_arch.cache_clear()
    try:
        data = info.collect()
    finally:
        candidate._gpu_arch.cache_clear()
    assert [(gpu["name"], gpu["architecture"]) for gpu in data["gpus"]] == [("Imitation 7", "sm_75")]
    for row in data["gpus"][0]["ops"].values():
        assert row["reference"] is None and row["cpu"] in (data["backends"]["cpu"], "tensors are on cuda")
        assert row["triton"] is not None
    assert "Ops, bf16 on Imitation 7 (sm_75)" in info.render(data)


def test_bench_and_plot_are_the_commands_of_the_benchmarks(tmp_path: Path):
    records = str(ROOT / "benchmarks" / "results" / "cpu")
    same = run("bench", "compare", records, records)
    assert same.returncode == 0 and "regressions (B / A normalised by the controls): 0" in same.stdout
    missing = run("bench", "compare", records, str(tmp_path / "none"))
    assert missing.returncode == 2 and len(missing.stderr.strip().splitlines()) == 1
    assert "RECORDS" in run("plot", "--help").stdout
    unknown = run("bench", "--suite", "abacus", "--dry")
    assert unknown.returncode == 2 and "lora_linear" in unknown.stderr
    assert {"bench", "plot"} <= set(run("--help").stdout.split())
