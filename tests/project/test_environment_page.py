# SPDX-License-Identifier: Apache-2.0
"""docs/environment.md names every environment variable that is read, and no other."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from fused_ewclora.diagnostics.info import ENVIRONMENT

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "environment.md").read_text()
FOLDERS = ("fused_ewclora", "kernels", "benchmarks", "tests")
READS = ("get", "setdefault", "pop")


def is_environment(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "environ"


def read_by(source: str) -> set[str]:
    """Variables that Python code reads by a literal name, or by a constant of the module."""
    tree = ast.parse(source)
    constants = {
        target.id: statement.value.value
        for statement in tree.body
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Constant)
        for target in statement.targets
        if isinstance(target, ast.Name) and isinstance(statement.value.value, str)
    }
    keys: list[ast.AST] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and is_environment(node.value):
            keys.append(node.slice)
        elif isinstance(node, ast.Compare) and any(map(is_environment, node.comparators)):
            keys.append(node.left)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
            of_table = node.func.attr in READS and is_environment(node.func.value)
            if of_table or node.func.attr == "getenv":
                keys.append(node.args[0])
    variables = {key.value for key in keys if isinstance(key, ast.Constant)}
    return variables | {
        constants[key.id] for key in keys if isinstance(key, ast.Name) and key.id in constants
    }


def read_by_cpp(source: str) -> set[str]:
    constants = dict(re.findall(r'(\w+) = "([A-Z][A-Z0-9_]+)"', source))
    return {
        literal or constants[name] for name, literal in re.findall(r'getenv\((?:(\w+)|"(\w+)")\)', source)
    }


def read_by_make() -> set[str]:
    (line,) = re.findall(r"^# Variables: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return set(line.split(", "))


def variables() -> set[str]:
    files = [ROOT / "setup.py", *(p for folder in FOLDERS for p in sorted((ROOT / folder).rglob("*.py")))]
    in_python = set().union(*(read_by(path.read_text()) for path in files if path != Path(__file__)))
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".h", ".inl", ".cu", ".cuh")]
    return in_python.union(*(read_by_cpp(path.read_text()) for path in sources), read_by_make())


def named(page: str) -> set[str]:
    """What stands in the first column of a table."""
    cells = re.findall(r"^\| (`[^|]*) \|", page, re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}


def test_page_complete():
    """The page names what is read and nothing else."""
    assert named(PAGE) == variables()


def test_page_names_info():
    """The page names what `info` prints."""
    assert set(ENVIRONMENT) <= named(PAGE)


@pytest.mark.parametrize(
    "line",
    [
        "os.environ.get('FUSED_X')", "os.environ['FUSED_X']", "'FUSED_X' in os.environ",
        "os.getenv('FUSED_X')", "os.environ.setdefault('FUSED_X', '1')",
        "NAME = 'FUSED_X'\nos.environ.get(NAME)",
    ],
)  # fmt: skip
def test_reading_noticed(line):
    """Every way of reading is noticed."""
    assert read_by(line) == {"FUSED_X"}


def test_reading_noticed_cpp():
    """Reading from C++ is noticed."""
    assert read_by_cpp('constexpr const char* V = "FUSED_X"; std::getenv(V); getenv("FUSED_Y");') == {
        "FUSED_X",
        "FUSED_Y",
    }
