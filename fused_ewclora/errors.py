"""The errors this library raises, all of them `ValueError`s so that existing handlers keep working."""

from __future__ import annotations


class EWCLoRAError(ValueError):
    """Base class of every error that this library raises on purpose."""


class ArgumentError(EWCLoRAError):
    """An argument has a wrong value or shape; the message names it, what was expected and what came."""


class DtypeError(EWCLoRAError, TypeError):
    """An argument has a wrong type or dtype."""


class BackendError(EWCLoRAError):
    """A backend that was asked for by name cannot serve the call; the message says why."""


class TargetError(EWCLoRAError):
    """Adapters do not fit the model: nothing matched, injected twice, or a matched layer never runs."""


class LayoutError(EWCLoRAError):
    """Slices of a packed projection were asked for without a known row layout."""


class FisherError(EWCLoRAError):
    """A Fisher is missing, not finite, or cannot be computed from the batches as given."""


class CheckpointError(EWCLoRAError):
    """A checkpoint is truncated, foreign, or belongs to other base weights; nothing was loaded."""


class NotExactlyRepresentable(EWCLoRAError):
    """An adapter has no exact equivalent in the requested format."""


class IntegrationError(EWCLoRAError, ImportError):
    """An optional library is not installed, or in a version that is not supported."""
