# SPDX-License-Identifier: Apache-2.0
"""Hooks of mkdocs: pages that are files elsewhere in the repository, and links that leave docs/."""

from __future__ import annotations

import ast
import json
import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
# Files of the repository by the page of the site that shows them.
PAGES = {
    "index.md": "README.md", "examples.md": "examples/README.md", "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md", "security.md": "SECURITY.md",
}  # fmt: skip
NOTEBOOKS = ("two_tasks.ipynb",)  # of examples/
PACKAGE = "fused_ewclora"
MODULES = (  # beside the package itself, whose names come from elsewhere
    "functional", "methods", "metrics", "profiling", "fishers", "structures", "config", "errors",
    *(f"integrations.{name}" for name in
      ("avalanche", "peft", "timm", "torchvision", "transformers", "open_clip")),
)  # fmt: skip
# Classes of which a page lists some members alone, since others are what the library itself uses of them.
MEMBERS = {
    "AdaptedLinear": [
        "base_weight", "dtype", "dropout_p", "adapter_parameters", "named_lora_parameters", "adapter_scale",
        "composed", "reset_adapters", "consolidated_weight", "merge", "unmerge", "forward",
    ],
    "EWC": [
        "ewc_lambda", "fishers", "tasks", "history", "penalty", "add_penalty_grad_", "accumulate_fisher",
        "abort_fisher", "estimate_fisher", "reduce_fisher_", "shard_", "convert_fisher_", "consolidate",
        "consolidate_prior", "end_task", "state_dict", "load_state_dict",
    ],
    "LoRAPart": ["owner", "weight", "bias", "forward"],
    "Part": [],
}  # fmt: skip
# What methods have from bases that are not public.
OF_BASES = [
    "compose",
    "decoupled_step_",
    "fishers",
    "prepare",
    "pretrained",
    "report",
    "state_dict",
    "load_state_dict",
]
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?\)")


@event_priority(100)  # before mkdocs-jupyter, which renders the notebooks among the files that it is given
def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that are not in docs/."""
    for page, path in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / path).read_text(encoding="utf-8")))
    for page in NOTEBOOKS:
        folder = str(ROOT / "examples")
        files.append(File(page, folder, config.site_dir, use_directory_urls=config.use_directory_urls))
    for name, text in references().items():
        files.append(File.generated(config, f"api/{name}.md", content=text))
    return files


def references() -> dict[str, str]:
    """Pages of the API: a module each, and what the package exports."""
    options = {"methods": {"inherited_members": OF_BASES}}
    pages = {name: f"# {PACKAGE}.{name}\n\n{_entry(name, options.get(name))}" for name in MODULES}
    exported = "".join(
        _entry(name, {"members": MEMBERS[name]} if name in MEMBERS else None)
        for name in _exported(ROOT / PACKAGE / "__init__.py")
    )
    return {PACKAGE: f"# {PACKAGE}\n\nWhat `import fused_ewclora as fe` gives.\n\n{exported}", **pages}


def _entry(name: str, options: dict[str, Any] | None = None) -> str:
    chosen = f"    options: {json.dumps(options)}\n" if options else ""
    return f"::: {PACKAGE}.{name}\n{chosen}\n"


def _exported(path: Path) -> list[str]:
    """The names of `__all__` that are functions or classes."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    listed = next(
        node.value for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__"
    )  # fmt: skip
    return [name for name in ast.literal_eval(listed) if not name.startswith("_") and name != "integrations"]


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links of the repository become links of the site; what it does not show becomes a path."""
    shown = {source: target for target, source in PAGES.items()}
    here = posixpath.dirname(PAGES.get(page.file.src_uri, f"docs/{page.file.src_uri}"))
    start = posixpath.dirname(page.file.src_uri) or "."

    def relinked(match: re.Match[str]) -> str:
        picture, text, link, anchor = match.group(1), match.group(2), match.group(3), match.group(4) or ""
        path = posixpath.normpath(posixpath.join(here, link))
        target = shown.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
        if target is None:
            if not (ROOT / path).exists():
                return match.group(0)  # the check of links names it
            return text if text == f"`{path}`" else f"{text} (`{path}`)"
        return f"{picture}[{text}]({posixpath.relpath(target, start)}{anchor})"

    return LINK.sub(relinked, markdown)


def on_config(config: Any) -> Any:
    """Builds work in any folder: mkdocs resolves paths from where the file is."""
    os.chdir(ROOT)
    return config
