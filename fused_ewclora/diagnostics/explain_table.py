# SPDX-License-Identifier: Apache-2.0
"""What `explain` prints: equal layers in one row, and every reason once, below the table."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..layers.grouping import abbreviated
from ..report import WIDTH

Row = dict[str, Any]
COMMON = ("device", "dtype")  # columns that go into the title where all layers have the same


class Reason(NamedTuple):
    """Why an implementation does not serve a layer; without a backend, why no fused one does."""

    backend: str
    algorithm: str
    text: str

    def __str__(self) -> str:
        return f"{self.backend} {self.algorithm}: {self.text}" if self.backend else self.text


def printed(
    rows: Sequence[Row], reasons: Sequence[Sequence[Reason]], title: str
) -> tuple[str, list[Row], list[str]]:
    """The title, the rows and the notes of layers and their reasons; column `notes` has the numbers of the
    notes that belong to a row."""
    numbers: dict[str, int] = {}
    numbered = []
    for row, own in zip(rows, reasons, strict=True):
        found = [numbers.setdefault(text, len(numbers) + 1) for text in _merged(own)]
        numbered.append({**row, "notes": " ".join(map(str, found)) or None})
    common = [name for name in COMMON if len({row[name] for row in rows}) == 1]
    shared = [rows[0][name] for name in common]
    table = [{key: value for key, value in row.items() if key not in common} for row in numbered]
    heading = f"{title} ({', '.join(shared)})" if shared else title
    notes = [_wrapped(f"{number}  ", text) for text, number in numbers.items()]
    return heading, abbreviated(table, "layers", ("calls",)), notes


def _merged(reasons: Sequence[Reason]) -> list[str]:
    """The reasons as text; one that holds for several algorithms of a backend stands there once."""
    algorithms: dict[tuple[str, str], list[str]] = {}
    for reason in reasons:
        algorithms.setdefault((reason.backend, reason.text), []).append(reason.algorithm)
    return [
        f"{backend}: {text}" if len(names) > 1 else str(Reason(backend, names[0], text))
        for (backend, text), names in algorithms.items()
    ]


def _wrapped(start: str, text: str) -> str:
    return textwrap.fill(
        text,
        WIDTH,
        initial_indent=f"  {start}",
        subsequent_indent=" " * (2 + len(start)),
        break_long_words=False,
        break_on_hyphens=False,
    )
