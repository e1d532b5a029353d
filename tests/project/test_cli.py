# SPDX-License-Identifier: Apache-2.0
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


def test_info_json():
    """The JSON of `info` is one object that covers every op and backend."""
    result = run("info", "--json")
    assert result.returncode == 0, result.stderr
    data = json.loads(result.stdout)
    assert set(data["ops"]) == set(SCHEMAS)
    for row in data["ops"].values():
        assert set(row) == set(available_backends()) == set(data["backends"])
        assert row["reference"] is None


def test_info_reasons(capsys: pytest.CaptureFixture[str]):
    """`info` gives a reason wherever a backend is missing."""
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    for name, reason in available_backends().items():
        assert name in text
        assert reason is None or reason in text


def test_info_environment():
    """`info` reports the environment and an unusable default backend."""
    result = run("info", "--json", FUSED_EWCLORA_BACKEND="abacus")
    assert result.returncode == 0, result.stderr
    data = json.loads(result.stdout)
    assert data["environment"]["FUSED_EWCLORA_BACKEND"] == "abacus"
    assert "expected one of" in data["default_backend"] and "abacus" in data["default_backend"]


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["info", "--nonsense"]])
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    """Wrong usage exits with status 2."""
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize("extra", cli.DEMO_EXTRAS)
def test_demo_missing_extras(extra: str, tmp_path: Path):
    """Demo without its extras says what to install."""
    blocked = f"import sys; sys.modules[{extra!r}] = None; "
    code = blocked + "from fused_ewclora.__main__ import main; sys.exit(main(sys.argv[1:]))"
    result = run("demo", code=code)
    assert result.returncode == 2, result.stderr
    assert extra in result.stderr and "pip install 'fused-ewclora[demo]'" in result.stderr
    assert "Traceback" not in result.stderr


def test_info_without_extras():
    """`info` works without the extras of the demo."""
    code = "import sys; sys.modules.update(sklearn=None, matplotlib=None); "
    code += "from fused_ewclora.__main__ import main; sys.exit(main(sys.argv[1:]))"
    result = run("info", code=code)
    assert result.returncode == 0, result.stderr


def test_library_errors(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Errors of the library end a command with status 1 and one line."""
    from fused_ewclora import errors
    from fused_ewclora.diagnostics import info

    def fail() -> dict[str, object]:
        raise errors.BackendError("backend 'cpu' is not available: no reason")

    monkeypatch.setattr(info, "collect", fail)
    assert cli.main(["info"]) == 1
    assert capsys.readouterr().err == "fused-ewclora: backend 'cpu' is not available: no reason\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="imitates a GPU")
def test_info_gpus(monkeypatch: pytest.MonkeyPatch):
    """`info` says what serves the ops on each GPU."""
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


def test_bench_and_plot(tmp_path: Path):
    """`bench` and `plot` are the commands of the benchmarks."""
    records = str(ROOT / "benchmarks" / "results" / "cpu")
    same = run("bench", "compare", records, records)
    assert same.returncode == 0 and "regressions (B / A normalised by the controls): 0" in same.stdout
    missing = run("bench", "compare", records, str(tmp_path / "none"))
    assert missing.returncode == 2 and len(missing.stderr.strip().splitlines()) == 1
    assert "RECORDS" in run("plot", "--help").stdout
    unknown = run("bench", "--suite", "abacus", "--dry")
    assert unknown.returncode == 2 and "lora_linear" in unknown.stderr
    assert {"bench", "plot"} <= set(run("--help").stdout.split())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["ben"], "did you mean 'bench'?"),
        (["bench", "comapre", "a", "b"], "did you mean 'compare'?"),
        (["compile-report", "--kernel", "merge"], "did you mean 'merge_kernel'?"),
        (["compile-report", "--arch", "sm_95"], "did you mean 'sm_90'?"),
        (["compile-report", "--rank", "0"], "expected an integer >= 1, got '0'"),
        (["compile-report", "--executed", "none.json"], "there is no file 'none.json'"),
        (["compile-report", "--write"], "need --targets"),
        (["autotune", "--dtype", "bfloat61"], "did you mean 'bfloat16'?"),
        (["demo", "--dataset", "mnits"], "did you mean 'mnist'?"),
        (["bench", "--op", "mrege"], "did you mean 'merge'?"),
    ],
)
def test_names_checked(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]):
    """A wrong name ends a command at once, with status 2, the valid names and the nearest one."""
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2 and told in capsys.readouterr().err


def test_version_and_prog(capsys: pytest.CaptureFixture[str]):
    """The version and the help of every command name the console script."""
    for arguments, told in [(["--version"], "fused-ewclora "), (["bench", "host", "--help"], "bench host")]:
        with pytest.raises(SystemExit) as exit_:
            cli.main(arguments)
        out = capsys.readouterr().out
        assert exit_.value.code == 0 and "fused-ewclora" in out and told in out
