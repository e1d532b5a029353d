"""Builds the documentation into a folder: the API reference from docstrings, and the pages of docs/.

python docs/build.py build/docs
"""

from __future__ import annotations

import html
import re
import shutil
import sys
from pathlib import Path

import markdown2
import pdoc

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
MODULES = (
    "fused_ewclora",
    *(f"fused_ewclora.{name}" for name in ("functional", "methods", "metrics", "profiling")),
    *(
        f"fused_ewclora.integrations.{name}"
        for name in ("avalanche", "peft", "timm", "torchvision", "transformers")
    ),
)
STYLE = (
    "body{font:16px/1.5 system-ui;max-width:60em;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse}td,th{border:1px solid #ccc;padding:.2em .6em;text-align:left}"
    "pre{background:#f6f6f6;padding:.6em;overflow:auto}img{max-width:100%}"
)


def reference(out: Path) -> None:
    """A page per public module."""
    pdoc.render.configure(docformat="google", show_source=False, template_directory=None)
    pdoc.pdoc(*MODULES, output_directory=out)


def title(text: str, path: Path) -> str:
    found = re.search(r"^# (.+)$", text, re.MULTILINE)
    return found[1] if found else path.stem


def page(path: Path, target: Path) -> str:
    """One page of Markdown as HTML, with links to other pages as HTML; returns its title."""
    text = path.read_text()
    linked = re.sub(r"(\]\((?![a-z]+:)[^)#\s]+)\.md(?=[)#])", r"\1.html", text)
    body = markdown2.markdown(linked, extras=["tables", "fenced-code-blocks", "header-ids", "code-friendly"])
    name = html.escape(title(text, path))
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(
        f'<!doctype html><meta charset="utf-8"><title>{name}</title><style>{STYLE}</style>\n{body}'
    )
    return name


def main(out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    reference(out / "reference")
    if (DOCS / "images").is_dir():
        shutil.copytree(DOCS / "images", out / "docs" / "images")
    page(ROOT / "README.md", out / "README.html")
    entries = ['<li><a href="README.html">README</a>', '<li><a href="reference/index.html">API reference</a>']
    for path in sorted(DOCS.rglob("*.md")):
        target = (out / path.relative_to(ROOT)).with_suffix(".html")
        entries.append(f'<li><a href="{target.relative_to(out)}">{page(path, target)}</a>')
    head = f'<!doctype html><meta charset="utf-8"><title>fused_ewclora</title><style>{STYLE}</style>'
    (out / "index.html").write_text(f"{head}<h1>fused_ewclora</h1><ul>{''.join(entries)}</ul>\n")
    print(f"{out / 'index.html'}")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from benchmarks.extras import prepare_torchvision

    prepare_torchvision()
    main(Path(sys.argv[1]))
