# SPDX-License-Identifier: Apache-2.0
"""Every source names its licence in its first lines."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("fused_ewclora", "kernels", "csrc", "benchmarks", "tests", "examples", "docs")
MARKS = {".py": "#", ".cpp": "//", ".h": "//", ".inl": "//", ".cu": "//", ".cuh": "//"}
LINE = "SPDX-License-Identifier: Apache-2.0"


def test_named():
    """The first line, or the one after a shebang, is the identifier of the licence."""
    sources = [ROOT / "setup.py"]
    for folder in FOLDERS:
        sources += [path for path in (ROOT / folder).rglob("*") if path.suffix in MARKS and path.is_file()]
    missing = []
    for path in sources:
        lines = [line for line in path.read_text().splitlines()[:2] if not line.startswith("#!")]
        if not lines or lines[0] != f"{MARKS[path.suffix]} {LINE}":
            missing.append(str(path.relative_to(ROOT)))
    assert len(sources) > 500 and missing == []
