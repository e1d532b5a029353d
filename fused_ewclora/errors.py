# SPDX-License-Identifier: Apache-2.0
"""The errors of this library, all of them `ValueError`s, so that existing handlers catch them, and its
warning."""

from __future__ import annotations

import sys
import warnings
from types import FrameType


class EWCLoRAError(ValueError):
    """Base class of every error that this library raises on purpose.

    Examples:
        >>> try:
        ...     fe.LoRAConfig(r=0)
        ... except fe.EWCLoRAError as error:
        ...     print(error)
        r: expected an integer >= 1, got 0
    """


class ArgumentError(EWCLoRAError):
    """An argument has a wrong value or shape; the message names it, the expected value and the actual one."""


class DtypeError(EWCLoRAError, TypeError):
    """An argument has a wrong type or dtype; a `TypeError` too.

    Examples:
        >>> try:
        ...     fe.LoRAConfig(r="8")
        ... except TypeError as error:
        ...     print(error)
        r: expected an integer, got '8'
    """


class BackendError(EWCLoRAError):
    """A backend that was requested by name cannot serve the call; the message says why."""


class TargetError(EWCLoRAError):
    """Adapters do not fit the model: nothing matched, injected twice, or a matched layer never runs."""


class LayoutError(EWCLoRAError):
    """Slices of a packed projection were requested without a known row layout."""


class FisherError(EWCLoRAError):
    """A Fisher is missing, not finite, or cannot be computed from the given batches."""


class CheckpointError(EWCLoRAError):
    """A checkpoint is truncated, in another format, or made for other base weights; nothing was loaded."""


class NotExactlyRepresentable(EWCLoRAError):
    """An adapter has no exact equivalent in the requested format."""


class IntegrationError(EWCLoRAError, ImportError):
    """An optional library is not installed, or its version is not supported; an `ImportError` too."""


class EWCLoRAWarning(UserWarning):
    """A likely mistake in training that no error would show; told once, with its remedy.

    Examples:
        >>> import warnings
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("error", fe.EWCLoRAWarning)  # it stops a run like an error
    """


# Frames of these packages stand between the user's line and a warning.
_INNER = ("fused_ewclora", "torch", "contextlib", "transformers", "accelerate", "avalanche")


def warn(message: str) -> None:
    """Shows an `EWCLoRAWarning` at the line, outside of this library and of training loops, that led to it.

    Args:
        message: what is likely wrong, and the remedy.

    Examples:
        >>> import warnings
        >>> from fused_ewclora.errors import warn
        >>> with warnings.catch_warnings(record=True) as told:
        ...     warnings.simplefilter("always")
        ...     warn("optimizer: it does not hold the adapters; make it after inject")
        >>> told[0].category is fe.EWCLoRAWarning
        True
    """
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and _is_inner(frame):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, EWCLoRAWarning, stacklevel=level)


def _is_inner(frame: FrameType) -> bool:
    return frame.f_globals.get("__name__", "").partition(".")[0] in _INNER
