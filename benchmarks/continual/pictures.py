# SPDX-License-Identifier: Apache-2.0
"""Pictures of runs and of costs: accuracy matrices, accuracy over tasks, lambda, costs over tasks."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .. import collection
from ..collection import Record, Unusable
from ..plot import MISSING, Picture, slug
from . import tradeoff
from .groups import by_suite, families, group, newest_costs
from .targets import CIL, TIL, lines_of_lambda

PREFIX = "continual"
PROTOCOLS = {CIL: "class-incremental", TIL: "task-aware"}
PER_PAGE = 12  # methods of one picture of matrices
COLOURS = 7  # methods of one picture of lines, beside plain LoRA


def planned(records: Iterable[Record]) -> list[Picture]:
    """The pictures of records, not drawn yet, without matplotlib. `op` is the suite, "" for costs."""
    records = list(records)
    pictures: list[Picture] = []
    for suite, groups in by_suite(group(records)).items():
        pages = [groups[i : i + PER_PAGE] for i in range(0, len(groups), PER_PAGE)]
        for number, page in enumerate(pages, 1):
            which = f"-{number}" if len(pages) > 1 else ""
            of = f" ({number} of {len(pages)})" if which else ""
            for protocol, words in PROTOCOLS.items():
                title = f"{suite}: {words} accuracy in percent{of}"
                pictures.append(_picture(f"{suite}-{words}{which}", title, "matrices", suite, page, protocol))
        split = families(groups, COLOURS)
        for number, (family, some) in enumerate(split, 1):
            which = f"-{number}" if len(split) > 1 else ""
            title = f"{suite}: accuracy on all tasks so far{f', {family}' if family else ''}"
            pictures.append(_picture(f"{suite}-accuracy{which}", title, "accuracy", suite, some))
        lines = [line for line in lines_of_lambda(groups) if len(line) > 2]
        for number, line in enumerate(lines, 1):
            which = f"-{number}" if len(lines) > 1 else ""
            title = f"{suite}: EWC-LoRA over lambda"
            pictures.append(_picture(f"{suite}-lambda{which}", title, "over_lambda", suite, line))
        for number, some in enumerate(compared := tradeoff.measured(groups), 1):
            which = f"-{number}" if len(compared) > 1 else ""
            title = f"{suite}: stability against plasticity"
            pictures.append(_picture(f"{suite}-tradeoff{which}", title, "tradeoff", suite, some))
    for comparable in newest_costs(records):
        first = comparable[0]
        machine, sizes = next(iter(collection.by_machine(comparable))), first["model"]
        sizes_text = ", ".join(f"{name} {value}" for name, value in sizes.items())
        name = f"costs-{machine}-{'-'.join(map(str, sizes.values()))}-{first['tasks']}-tasks"
        pictures.append(_picture(name, f"Costs over tasks: {sizes_text}", "costs", "", comparable))
    return pictures


def draw(records: Iterable[Record], out: Path, formats: Sequence[str] = ("png",)) -> list[Path]:
    """Writes all pictures to the folder; the paths. Raises `Unusable` without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        raise Unusable(MISSING)
    from ..plots import style

    return [
        path
        for picture in planned(records)
        for path in style.save(picture.draw(), out, picture.name, formats)
    ]


def _picture(name: str, title: str, kind: str, suite: str, *arguments: Any) -> Picture:
    """The figure is drawn by the function of figures.py with the name of its kind."""
    return Picture(
        f"{PREFIX}-{slug(name)}", title, kind, suite, functools.partial(_figure, kind, title, *arguments)
    )


def _figure(kind: str, *arguments: Any) -> Any:
    from . import figures  # needs matplotlib

    return getattr(figures, kind)(*arguments)
