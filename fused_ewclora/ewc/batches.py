"""Single samples of batches and of model outputs, which nest tensors, sequences and mappings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def take_sample(value: Any, index: int, samples: int) -> Any:
    """A batch, or the output of a model, of `samples` samples, cut down to the sample `index`.

    Tensors whose leading size is `samples` are cut to one row; so are lists and tuples of `samples` entries,
    unless they hold parts of the batch themselves, as (x, y) of two samples does. Everything else stays.
    The outermost tuple or list holds parts of the batch.
    """
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        return type(value)(_take(part, index, samples) for part in value)
    return _take(value, index, samples)


def _take(value: Any, index: int, samples: int) -> Any:
    if isinstance(value, Tensor):
        return value[index : index + 1] if _per_sample(value, samples) else value
    if isinstance(value, Mapping):
        parts = {key: _take(part, index, samples) for key, part in value.items()}
        # Outputs of transformers are mappings with attributes; their class takes the entries by name.
        return type(value)(**parts) if hasattr(value, "to_tuple") else parts
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_take(part, index, samples) for part in value))
    if isinstance(value, (tuple, list)):
        if len(value) == samples and not all(_per_sample(part, samples) for part in value):
            return value[index : index + 1]
        return type(value)(_take(part, index, samples) for part in value)
    return value


def _per_sample(value: Any, samples: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == samples
