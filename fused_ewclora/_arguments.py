# SPDX-License-Identifier: Apache-2.0
"""What all commands share: a parser that suggests names and loads its options late, and types of options."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

PROG = "fused-ewclora"


def unknown(what: str, value: str, valid: Iterable[str]) -> str:
    """That a name is unknown, the nearest one, and all valid ones."""
    names = list(map(str, valid))
    longer = [name for name in names if value and value.lower() in name.lower()]
    near = longer or difflib.get_close_matches(value, names, 1)
    guess = f"; did you mean {near[0]!r}?" if near else ";"
    return f"unknown {what} {value!r}{guess} expected one of: {'; '.join(names)}"


class Parser(argparse.ArgumentParser):
    """`fill` adds the options, given the arguments, when they are parsed: a command that is not used loads
    nothing. Names that are not among the choices are answered with the nearest one."""

    def __init__(
        self, *args: Any, fill: Callable[[Parser, list[str]], None] | None = None, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self._fill = fill

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._fill is not None:
            fill, self._fill = self._fill, None
            fill(self, list(args or ()))
        return super().parse_known_args(args, namespace)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(action, unknown("name", str(value), action.choices))


def one_of(what: str, valid: Iterable[str]) -> Callable[[str], str]:
    """A type of options: one of these names, in any case."""
    by_name = {name.lower(): name for name in valid}

    def convert(text: str) -> str:
        if text.lower() not in by_name:
            raise argparse.ArgumentTypeError(unknown(what, text, by_name.values()))
        return by_name[text.lower()]

    return convert


def at_least(low: int) -> Callable[[str], int]:
    """A type of options: an integer that is not below `low`."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low:
            raise argparse.ArgumentTypeError(f"expected an integer >= {low}, got {text!r}")
        return value

    return convert


def existing(text: str) -> Path:
    """A type of options: a file or a folder that exists."""
    path = Path(text)
    if not path.exists():
        raise argparse.ArgumentTypeError(f"there is no file or folder {text!r}")
    return path


def existing_file(text: str) -> Path:
    """A type of options: a file that exists."""
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text!r}")
    return path


def new_file(text: str) -> Path:
    """A type of options: a file in a folder that exists."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file in a folder that exists, got {text!r}")
    return path


def device(text: str) -> str:
    """A type of options: "cpu", or "cuda" where there is a GPU."""
    import torch

    if text == "cpu" or (text == "cuda" and torch.cuda.is_available()):
        return text
    if text == "cuda":
        raise argparse.ArgumentTypeError("'cuda' is not available: PyTorch finds no GPU here")
    raise argparse.ArgumentTypeError(unknown("device", text, ("cpu", "cuda")))
