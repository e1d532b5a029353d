"""Single samples of batches and of model outputs, which nest tensors, sequences and mappings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor


def take_sample(value: Any, index: int, samples: int) -> Any:
    """A batch, or the output of a model, of `samples` samples, cut down to the sample `index`.

    Tensors whose leading size is `samples` are cut to one row; so are lists and tuples of `samples` entries,
    unless they hold parts of the batch themselves, as (x, y) of two samples does. Everything else stays.
    The outermost tuple or list holds parts of the batch.
    """
    return _taken(value, lambda part: _copy(part[index : index + 1]), samples)


def take_ends(value: Any, samples: int) -> Any:
    """The same cut down to the first and the last of at least 2 samples."""
    return _taken(value, lambda part: _copy(part[0 : samples : samples - 1]), samples)


def reverse_samples(value: Any, samples: int) -> Any:
    """The same with all samples in reverse."""
    return _taken(value, lambda part: part.flip(0) if isinstance(part, Tensor) else part[::-1], samples)


def tensors(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    """(keys and indices that lead to it, tensor) of every tensor in nested sequences and mappings."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from tensors(part, (*path, key))
    elif isinstance(value, (tuple, list)):
        for place, part in enumerate(value):
            yield from tensors(part, (*path, place))


def described(value: Any) -> Any:
    """The shapes and lengths in nested tensors, sequences and mappings."""
    if isinstance(value, Tensor):
        return value.shape
    if isinstance(value, Mapping):
        return [described(part) for part in value.values()]
    if isinstance(value, (tuple, list)):
        return [described(part) for part in value]
    return None


def _taken(value: Any, which: Callable[[Any], Any], samples: int) -> Any:
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        return type(value)(_take(part, which, samples) for part in value)
    return _take(value, which, samples)


def _take(value: Any, which: Callable[[Any], Any], samples: int) -> Any:
    if isinstance(value, Tensor):
        return which(value) if _per_sample(value, samples) else value
    if isinstance(value, Mapping):
        parts = {key: _take(part, which, samples) for key, part in value.items()}
        # Outputs of transformers are mappings with attributes; their class takes the entries by name.
        return type(value)(**parts) if hasattr(value, "to_tuple") else parts
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_take(part, which, samples) for part in value))
    if isinstance(value, (tuple, list)):
        if len(value) == samples and not all(_per_sample(part, samples) for part in value):
            return which(value)
        return type(value)(_take(part, which, samples) for part in value)
    return value


def _copy(part: Any) -> Any:
    """A tensor of its own, which a model may write to or take views of."""
    return part.clone() if isinstance(part, Tensor) else part


def _per_sample(value: Any, samples: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == samples
