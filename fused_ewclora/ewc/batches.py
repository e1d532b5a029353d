# SPDX-License-Identifier: Apache-2.0
"""Batches and model outputs, which nest tensors, sequences and mappings: their samples, and parts of them."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..progress import with_bar

Batch = Any
Forward = Callable[[nn.Module, Batch], tuple[Any, Any]]

# Arguments of models whose leading size is that of the batch, in most models.
INPUTS = ("input_ids", "pixel_values", "inputs_embeds", "input_values", "input_features")
_BATCH_SIZE_FN = "give batch_size_fn=lambda batch: its number of samples"


def mapped(value: Any, convert: Callable[[Tensor], Tensor]) -> Any:
    """`value` with every tensor of its nested tuples, lists and mappings converted; other values as they
    are."""
    if isinstance(value, Tensor):
        return convert(value)
    if isinstance(value, Mapping):
        return _like(value, {key: mapped(part, convert) for key, part in value.items()})
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(part, convert) for part in value))
    if isinstance(value, (tuple, list)):
        return type(value)(mapped(part, convert) for part in value)
    return value


def rebuilt(value: Any) -> bool:
    """Whether `mapped` gives objects of the same classes: a dictionary of a class of its own may have
    attributes that a copy of its entries lacks."""
    if isinstance(value, Mapping):
        return (type(value) is dict or hasattr(type(value), "to_tuple")) and all(map(rebuilt, value.values()))
    if isinstance(value, (tuple, list)):
        plain = type(value) in (tuple, list) or hasattr(value, "_fields")
        return plain and all(map(rebuilt, value))
    return True


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The tensors of nested tuples, lists and mappings, in the order of `mapped`."""
    return (tensor for _, tensor in tensors(value))


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Every tensor of a batch of nested tuples, lists and mappings, moved; other values as they are."""
    return mapped(batch, lambda tensor: tensor.to(device, non_blocking=True))


def take_sample(value: Any, index: int, samples: int) -> Any:
    """A batch, or the output of a model, of `samples` samples, cut down to the sample `index`.

    Tensors whose leading size is `samples` are cut to one row; so are lists and tuples of `samples` entries,
    unless they hold parts of the batch themselves, as (x, y) of two samples does. Everything else stays.
    The outermost tuple or list holds parts of the batch.
    """
    return take_samples(value, slice(index, index + 1), samples)


def take_samples(value: Any, rows: slice, samples: int) -> Any:
    """As `take_sample`, cut down to several samples."""
    return _taken(value, lambda part: _copy(part[rows]), samples)


def take_ends(value: Any, samples: int) -> Any:
    """The same cut down to the first and the last of at least 2 samples."""
    return take_samples(value, slice(0, samples, samples - 1), samples)


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
        return _like(value, {key: _take(part, which, samples) for key, part in value.items()})
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_take(part, which, samples) for part in value))
    if isinstance(value, (tuple, list)):
        if len(value) == samples and not all(_per_sample(part, samples) for part in value):
            return which(value)
        return type(value)(_take(part, which, samples) for part in value)
    return value


def _like(value: Mapping[Any, Any], parts: dict[Any, Any]) -> Any:
    """Outputs of transformers are mappings with attributes; their class takes the entries by name."""
    return type(value)(**parts) if hasattr(type(value), "to_tuple") else parts


def _copy(part: Any) -> Any:
    """A tensor of its own, which a model may write to or take views of."""
    return part.clone() if isinstance(part, Tensor) else part


def _per_sample(value: Any, samples: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == samples


def default_forward(model: nn.Module, batch: Batch) -> tuple[Any, Any]:
    """(output, targets) of a batch: a mapping calls model(**batch) with targets batch["labels"]; (x, y) calls
    model(x)."""
    if isinstance(batch, Mapping):
        return model(**batch), batch.get("labels")
    if isinstance(batch, Tensor):
        return model(batch), None
    if isinstance(batch, (tuple, list)) and len(batch) == 1:
        return model(batch[0]), None
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return model(batch[0]), batch[1]
    raise ArgumentError(
        f"loader: expected batches (x, y), x or a mapping of model arguments, got {type(batch).__name__}"
        + (f" of {len(batch)}" if isinstance(batch, Sequence) else "")
        + "; give forward=lambda model, batch: (output, targets)"
    )


def _counts(part: Any) -> set[int]:
    """The numbers of samples that a part of a batch may have; none for what is not per sample.

    A list of tensors of one leading size holds either that many samples in several parts, or one tensor per
    sample. The other parts of the batch decide.
    """
    if isinstance(part, Tensor):
        return {part.size(0)} if part.dim() else set()
    if isinstance(part, Mapping):
        return _counts_of_mapping(part)
    if not isinstance(part, (tuple, list)):
        return set()
    if hasattr(part, "_fields"):
        return _shared(map(_counts, part))
    if any(isinstance(entry, Mapping) for entry in part):
        return {len(part)}
    return {len(part)} | _shared(map(_counts, part))


def _counts_of_mapping(part: Mapping[Any, Any]) -> set[int]:
    """Of a mapping that is a part of a batch. Lists of plain values are likely meta data, such as a size."""
    inputs = [part[key] for key in INPUTS if isinstance(part.get(key), Tensor)]
    entries = inputs or [v for v in part.values() if isinstance(v, (Tensor, Mapping)) or _nested(v)]
    return _shared(map(_counts, entries))


def _nested(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and any(isinstance(v, (Tensor, Mapping)) for v in value)


def _shared(counts: Iterable[set[int]]) -> set[int]:
    """What all of those that have a count agree on."""
    known = [own for own in counts if own]
    return set.intersection(*known) if known else set()


def leading_size(value: Any) -> int | None:
    """The number of samples of a part of a batch, if it has one and only one is possible."""
    counts = _counts(value)
    return next(iter(counts)) if len(counts) == 1 else None


def batch_size_of(batch: Batch) -> int:
    """Samples in a batch of tensors, nested sequences and mappings.

    A mapping has as many samples as its "labels", which an input of the model must confirm; without labels,
    as its inputs. Of the parts of (x, y, ...) those that are per sample must agree; where there are three or
    more, most of them. A list of mappings (the targets of detection) has one sample per entry. Raises
    `ArgumentError` where parts disagree or nothing tells.
    """
    if isinstance(batch, Mapping):
        return _size_of_mapping(batch)
    parts = batch if isinstance(batch, (tuple, list)) and not hasattr(batch, "_fields") else (batch,)
    names = ("x", "targets") if len(parts) <= 2 else tuple(f"part {i}" for i in range(len(parts)))
    return _most_common({name: _counts(part) for name, part in zip(names, parts, strict=False)})


def _size_of_mapping(batch: Mapping[Any, Any]) -> int:
    inputs = {key: _counts(batch[key]) for key in INPUTS if key in batch}
    inputs = inputs or {str(key): _counts(part) for key, part in batch.items() if key != "labels"}
    inputs = {key: counts for key, counts in inputs.items() if counts}
    labels = _counts(batch.get("labels"))
    if not labels:
        return _most_common(inputs)
    confirmed = labels & set().union(*inputs.values()) if inputs else labels
    if len(confirmed) == 1:
        return confirmed.pop()
    raise _disagreement({"labels": labels, **inputs})


def _most_common(counts: Mapping[str, set[int]]) -> int:
    ranked = Counter(size for own in counts.values() for size in own).most_common(2)
    if not ranked:
        raise ArgumentError(
            "loader: cannot tell the number of samples of a batch that holds no tensor with a sample "
            f"dimension; {_BATCH_SIZE_FN}"
        )
    if len(ranked) > 1 and ranked[0][1] == ranked[1][1]:
        raise _disagreement(counts)
    return ranked[0][0]


def _disagreement(counts: Mapping[str, set[int]]) -> ArgumentError:
    told = [f"{name} has {' or '.join(map(str, sorted(own)))}" for name, own in counts.items() if own]
    return ArgumentError(
        "loader: expected the parts of a batch to have one number of samples, but "
        f"{', '.join(told[:4])}; {_BATCH_SIZE_FN}"
    )


def limited(
    loader: Iterable[Batch], max_batches: int | None, progress: bool | None, title: str = "Fisher"
) -> Iterator[Batch]:
    """At most `max_batches` batches, with a bar as `progress` says (`fused_ewclora.progress`)."""
    yield from with_bar(loader, max_batches, progress, title)


def check_max_batches(max_batches: int | None) -> None:
    """Raises `ArgumentError` unless it is None or at least 1."""
    if max_batches is not None and (not isinstance(max_batches, int) or max_batches < 1):
        raise ArgumentError(f"max_batches: expected an integer >= 1 or None, got {max_batches!r}")


def check_samples_of(samples: Any) -> int:
    """The value of batch_size_fn; raises `ArgumentError` unless it is an integer >= 0."""
    try:
        count = -1 if isinstance(samples, bool) else operator.index(samples)  # also of NumPy and tensors
    except TypeError:
        count = -1
    if count < 0:
        raise ArgumentError(f"batch_size_fn: expected an integer >= 0, got {samples!r}")
    return count
