# SPDX-License-Identifier: Apache-2.0
"""Changes of PTX that break it: instructions dropped, weakened or mistaken."""

from __future__ import annotations

import re
from collections.abc import Callable


def without(pattern: str, which: int | None = None) -> Callable[[str], str]:
    """Drops the `which`-th (None: every) instruction that matches."""

    def change(ptx: str) -> str:
        seen = -1

        def drop(match: re.Match[str]) -> str:
            nonlocal seen
            seen += 1
            return "" if which is None or seen == which else match.group()

        return re.sub(rf"^[^\n/]*\b{pattern}[^\n;]*;", drop, ptx, flags=re.MULTILINE)

    return change


def instead(pattern: str, replacement: str, count: int = 0) -> Callable[[str], str]:
    """Puts `replacement` for what matches."""
    return lambda ptx: re.sub(pattern, replacement, ptx, count=count)


def one_more(pattern: str) -> Callable[[str], str]:
    """The number after `pattern` plus one: one stage too few is waited for."""
    return lambda ptx: re.sub(
        rf"({pattern}\s+(?:0x)?)(\d+)", lambda m: m.group(1) + str(int(m.group(2)) + 1), ptx
    )


def before(pattern: str, dropped: str) -> Callable[[str], str]:
    """Drops the last `dropped` before the first `pattern`."""

    def change(ptx: str) -> str:
        at = re.search(pattern, ptx)
        if at is None:
            return ptx
        *_, last = re.finditer(rf"^[^\n/]*\b{dropped}[^\n;]*;", ptx[: at.start()], re.MULTILINE)
        return ptx[: last.start()] + ptx[last.end() :]

    return change
