# SPDX-License-Identifier: Apache-2.0
"""Files that readers never see half-written."""

from __future__ import annotations

import os
from pathlib import Path


def temporary_name(path: Path) -> Path:
    """A name beside `path` that no other process uses, to be renamed to `path` once the file is complete."""
    return path.with_name(f"{path.name}.{os.getpid()}.tmp")


def replace_text(path: Path, text: str) -> None:
    """Writes a file anew. An interruption leaves the old content or the new one."""
    temporary = temporary_name(path)
    temporary.write_text(text)
    os.replace(temporary, path)
