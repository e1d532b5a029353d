# SPDX-License-Identifier: Apache-2.0
"""The scripts of pages: their Python as a reader sees it, with what is hidden in comments."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Hidden Python defines what a fragment takes for granted: `<!-- python`, lines of code, `-->`.
BLOCK = re.compile(r"^(?:```python\n(.*?)^```|<!-- python\n(.*?)^-->)", re.MULTILINE | re.DOTALL)
LIBRARIES = ("accelerate", "avalanche", "bitsandbytes", "open_clip", "peft", "timm", "torchao", "torchvision",
             "transformers")  # fmt: skip
IMPORT = re.compile(rf"^\s*(?:import|from) (?:{'|'.join(LIBRARIES)})\b", re.MULTILINE)


def with_scripts() -> list[Path]:
    """Pages with Python in them."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [page for page in pages if page.exists() and script(page).strip()]


def needing_libraries() -> list[Path]:
    """Those whose script imports a model library."""
    return [page for page in with_scripts() if IMPORT.search(script(page))]


def script(page: Path) -> str:
    """All Python of a page, at the lines where it stands."""
    text = page.read_text()
    lines = [""] * text.count("\n")
    for match in BLOCK.finditer(text):
        which = 1 if match[1] is not None else 2
        first = text.count("\n", 0, match.start(which))
        block = match[which].splitlines()
        lines[first : first + len(block)] = block
    return "\n".join(lines) + "\n"


def run(page: Path) -> None:
    """Runs the script of a page in the current folder; tracebacks name its lines."""
    exec(compile(script(page), str(page), "exec"), {"__name__": "__main__"})
