# SPDX-License-Identifier: Apache-2.0
"""What type checkers make of the public names: nothing to report in a program, and every mistake found."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

import fused_ewclora as fe
from fused_ewclora import literals
from fused_ewclora.ewc import structures
from fused_ewclora.ewc.controller import EWC
from fused_ewclora.ewc.options import EWCOptions
from fused_ewclora.methods import sd_lora
from fused_ewclora.ops import dispatch

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "tests" / "project" / "typing"
PROGRAM, MISTAKES = FOLDER / "program.py", FOLDER / "mistakes.py"
# The rules by which each checker reports a kind of mistake.
MYPY = {
    "call": {"call-arg"},
    "type": {"arg-type", "assignment"},
    "types": {"arg-type"},
    "attribute": {"attr-defined"},
    "overload": {"call-overload"},
}
PYRIGHT = {
    "call": {"reportCallIssue"},
    "type": {"reportArgumentType", "reportAttributeAccessIssue"},
    "types": {"reportArgumentType"},
    "attribute": {"reportAttributeAccessIssue", "reportUnknownMemberType"},
    "overload": {"reportCallIssue", "reportArgumentType"},
}
Found = dict[tuple[str, int], set[str]]  # (file, line) -> rules


def expected(rules: dict[str, set[str]]) -> dict[int, set[str]]:
    """Line -> the rules of which one has to report it, as the comments of the file say."""
    lines = enumerate(MISTAKES.read_text().splitlines(), 1)
    kinds = {number: found[1] for number, line in lines if (found := re.search("# mistake: (.+)", line))}
    return {number: rules[kind] for number, kind in kinds.items()}


def unlike(found: Found, rules: dict[str, set[str]]) -> list[str]:
    """Reports that are not expected, and mistakes that are not reported."""
    wanted = {(MISTAKES.name, line): allowed for line, allowed in expected(rules).items()}
    problems = [f"{place}: {own}" for place, own in found.items() if not own <= wanted.get(place, set())]
    return problems + [f"{place}: not found" for place in wanted if place not in found]


def test_mypy_strict():
    """Under mypy --strict a program has no errors, and every mistake is one."""
    pytest.importorskip("mypy")
    options = [
        "--strict",
        "--config-file",
        FOLDER / "mypy.ini",
        "--cache-dir",
        ROOT / ".mypy_cache" / "users",
    ]
    options += ["--output", "json"]
    command = [sys.executable, "-m", "mypy", *options, PROGRAM, MISTAKES]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, text=True, capture_output=True)
    found: Found = {}
    for entry in map(json.loads, done.stdout.splitlines()):
        if entry["severity"] == "error":
            found.setdefault((Path(entry["file"]).name, entry["line"]), set()).add(entry["code"])
    assert found, done.stderr
    assert not unlike(found, MYPY)


def test_pyright_strict():
    """Under pyright in strict mode a program has no errors, and every mistake is one."""
    pytest.importorskip("pyright")
    options = ["--outputjson", "--pythonpath", sys.executable]
    command = [sys.executable, "-m", "pyright", *options, str(PROGRAM), str(MISTAKES)]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    if not done.stdout.startswith("{"):
        pytest.skip(f"pyright cannot run here: {done.stderr.strip()[-200:]}")
    found: Found = {}
    for entry in json.loads(done.stdout)["generalDiagnostics"]:
        line = entry["range"]["start"]["line"] + 1
        found.setdefault((Path(entry["file"]).name, line), set()).add(entry.get("rule", "syntax"))
    assert not unlike(found, PYRIGHT)


def test_literals_match():
    """The names in the types are those that are accepted."""
    pairs = {
        literals.StructureName: structures.NAMES,
        literals.Variant: fe.methods.cl_lora.VARIANTS,
        literals.GateInit: fe.methods.codyra.GATE_INITS,
        literals.Threshold: fe.methods.codyra.THRESHOLDS,
        literals.Schedule: fe.methods.codyra.SCHEDULES,
        literals.Normalization: sd_lora.NORMALIZATIONS,
        literals.Magnitudes: sd_lora.MAGNITUDES,
    }
    for kind, names in pairs.items():
        assert get_args(kind) == tuple(names)
    plain = {name for name in get_args(literals.Backend) if ":" not in name}
    assert plain == set(dispatch.BACKENDS)


def test_algorithms_match():
    """The algorithms of backends in the types are those that can be asked for."""
    pytest.importorskip("triton")
    named = {f"{name}:{key}" for name in dispatch.BACKENDS for key in dispatch.algorithms(name)}
    assert named == {name for name in get_args(literals.Backend) if ":" in name}


def test_options_match():
    """EWCOptions has the arguments of EWC."""
    import inspect

    assert set(EWCOptions.__annotations__) == set(inspect.signature(EWC).parameters) - {"model"}


def test_lazy_names():
    """Names that are loaded late are those that checkers see, and misspelt ones raise."""
    source = (ROOT / "fused_ewclora" / "__init__.py").read_text()
    block = source.partition("if TYPE_CHECKING:")[2].partition("\n_moved")[0]
    for name in (*fe._LAZY, *fe._LAZY_MODULES):
        assert re.search(rf"\b{name}\b", block), name
        assert getattr(fe, name) is not None
    with pytest.raises(AttributeError, match="ewc_lora_"):
        fe.ewc_lora_  # noqa: B018


def test_version():
    """The version is that of the project file, whatever is installed."""
    text = (ROOT / "pyproject.toml").read_text()
    assert 'attr = "fused_ewclora._version.__version__"' in text and 'dynamic = ["version"]' in text
    assert re.fullmatch(r"\d+\.\d+\.\d+\w*", fe.__version__)
