# SPDX-License-Identifier: Apache-2.0
"""Configuration of an injection: `LoRAConfig` with PEFT's names, and `QKVLayout`, the row layout of a packed
projection."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, get_args

import torch

from .errors import ArgumentError, DtypeError, LayoutError
from .literals import QuantisedMerge

ALL_LINEAR = "all-linear"
QUANTISED_MERGES: tuple[QuantisedMerge, ...] = get_args(QuantisedMerge)
_LARGEST = torch.finfo(torch.float32).max
Rows = tuple[tuple[int, int], ...]
Targets = str | Sequence[str]


def _names(value: object, name: str) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise DtypeError(f"{name}: expected a sequence of names, got {value!r}")
    names = tuple(value)
    if not names or not all(isinstance(n, str) and n for n in names):
        raise ArgumentError(f"{name}: expected one name or more, got {value!r}")
    if len(set(names)) != len(names):
        raise ArgumentError(f"{name}: expected distinct names, got {list(names)}")
    return names


def segment_names(value: object, name: str) -> tuple[str, ...]:
    """Checks distinct names that can be part of the name of a parameter.

    Args:
        value: what is checked.
        name: the name of the argument, for the message.

    Returns:
        The names, as a tuple.

    Raises:
        ArgumentError: for no names, repeated ones, and other characters than letters, digits and underscores.
        DtypeError: for anything but a sequence.

    Examples:
        >>> from fused_ewclora.config import segment_names
        >>> segment_names(["q", "v"], "slices")
        ('q', 'v')
    """
    names = _names(value, name)
    for n in names:
        if not re.fullmatch(r"\w+", n):
            raise ArgumentError(f"{name}: expected letters, digits and underscores, got {n!r}")
    return names


def positive(value: object, name: str) -> int:
    """Checks an integer >= 1.

    Args:
        value: what is checked.
        name: the name of the argument, for the message.

    Returns:
        The integer.

    Raises:
        ArgumentError: for a smaller one.
        DtypeError: for another type, also a bool.

    Examples:
        >>> from fused_ewclora.config import positive
        >>> positive(8, "r")
        8
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise DtypeError(f"{name}: expected an integer, got {value!r}")
    if value < 1:
        raise ArgumentError(f"{name}: expected an integer >= 1, got {value}")
    return value


def finite(value: object, name: str) -> float:
    """Checks a number that is finite in fp32.

    Args:
        value: what is checked.
        name: the name of the argument, for the message.

    Returns:
        The number.

    Raises:
        ArgumentError: for NaN, infinities, what is infinite in fp32, and integers beyond 64 bits.
        DtypeError: for another type, also a bool.

    Examples:
        >>> from fused_ewclora.config import finite
        >>> finite(0.5, "lora_alpha")
        0.5
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise DtypeError(f"{name}: expected a number, got {value!r}")
    if isinstance(value, int) and abs(value) > 2**63:  # it may be too large for a float
        raise ArgumentError(
            f"{name}: expected an integer of at most 64 bits, got one of {value.bit_length()}"
        )
    # Numbers are used in fp32, beside fp64 models too: what is infinite there would be refused by every call.
    if not -_LARGEST <= value <= _LARGEST:
        raise ArgumentError(
            f"{name}: expected a finite number of at most {_LARGEST:.4g} in size, got {value}"
        )
    return value


def probability(value: object, name: str) -> float:
    """Checks a number in [0, 1].

    Args:
        value: what is checked.
        name: the name of the argument, for the message.

    Returns:
        The number.

    Raises:
        ArgumentError: for a number outside of it.
        DtypeError: for another type.

    Examples:
        >>> from fused_ewclora.config import probability
        >>> probability(0.1, "lora_dropout")
        0.1
    """
    number = finite(value, name)
    if not 0.0 <= number <= 1.0:
        raise ArgumentError(f"{name}: expected a probability in [0, 1], got {number}")
    return number


def checked_merge(value: object) -> None:
    """Checks a value of `quantised_merge` (of `LoRAConfig`).

    Args:
        value: "requantise", "residual" or None.

    Raises:
        ArgumentError: for any other value.

    Examples:
        >>> from fused_ewclora.config import checked_merge
        >>> checked_merge("residual")
    """
    if value is not None and value not in QUANTISED_MERGES:
        raise ArgumentError(f"quantised_merge: expected one of {QUANTISED_MERGES} or None, got {value!r}")


def _brief(config: Any) -> str:
    """The call that makes a configuration, without the fields that have their defaults."""
    given = [(field, getattr(config, field.name)) for field in fields(config)]
    text = ", ".join(f"{field.name}={value!r}" for field, value in given if value != field.default)
    return f"{type(config).__name__}({text})"


@dataclass(frozen=True, repr=False)
class QKVLayout:
    """The segments of a packed projection: which output rows belong to which of them.

    Args:
        segments: the names in the order of the rows.
        sizes: the number of rows of each segment, which differ with grouped queries; None divides the rows of
            any layer equally among the segments.
        interleave: None for contiguous segments (timm ViT); h for rows laid out as
            `[h heads][segments][size / h]` (GPT-NeoX), where a segment consists of h ranges.

    Raises:
        ArgumentError: for a value that is out of range.
        DtypeError: for a value of another type.

    Examples:
        >>> fe.QKVLayout(("q", "k", "v"), (8, 8, 8)).rows("k", 24)
        ((8, 16),)
    """

    segments: tuple[str, ...]
    sizes: tuple[int, ...] | None = None
    interleave: int | None = None

    __repr__ = _brief

    def __post_init__(self) -> None:
        object.__setattr__(self, "segments", segment_names(self.segments, "segments"))
        if self.interleave is not None:
            positive(self.interleave, "interleave")
        if self.sizes is None:
            return
        if isinstance(self.sizes, (str, int)) or len(self.sizes) != len(self.segments):
            raise ArgumentError(
                f"sizes: expected {len(self.segments)} numbers of rows, one per segment, got {self.sizes!r}"
            )
        object.__setattr__(self, "sizes", tuple(positive(s, f"sizes[{i}]") for i, s in enumerate(self.sizes)))
        self._check_heads(self.sizes)

    def _check_heads(self, sizes: Sequence[int]) -> None:
        for segment, size in zip(self.segments, sizes, strict=True):
            if self.interleave is not None and size % self.interleave:
                raise LayoutError(
                    f"interleave: {size} rows of {segment!r} are not a multiple of {self.interleave} heads"
                )

    def sizes_of(self, out_features: int) -> tuple[int, ...]:
        """The number of rows of each segment in a layer.

        Args:
            out_features: the number of rows of the layer.

        Returns:
            The sizes, in the order of the segments.

        Raises:
            LayoutError: when the sizes do not add up to out_features.
        """
        if self.sizes is None:
            share, rest = divmod(out_features, len(self.segments))
            if rest or not share:
                raise LayoutError(
                    f"layout: {len(self.segments)} segments cannot share {out_features} rows; give sizes"
                )
            sizes = (share,) * len(self.segments)
            self._check_heads(sizes)
            return sizes
        if sum(self.sizes) != out_features:
            raise LayoutError(
                f"layout: sizes {list(self.sizes)} are {sum(self.sizes)} rows, the layer has {out_features}"
            )
        return self.sizes

    def rows(self, segment: str, out_features: int) -> Rows:
        """The rows of one segment.

        Args:
            segment: its name.
            out_features: the number of rows of the layer.

        Returns:
            The (start, stop) ranges in ascending order.

        Raises:
            LayoutError: when the layout does not fit the layer.
        """
        if segment not in self.segments:
            raise LayoutError(
                f"slices: expected names among the layout's segments {list(self.segments)}, got {segment!r}"
            )
        heads = self.interleave or 1
        parts = [size // heads for size in self.sizes_of(out_features)]
        position = self.segments.index(segment)
        offset, length, stride = sum(parts[:position]), parts[position], sum(parts)
        return tuple((h * stride + offset, h * stride + offset + length) for h in range(heads))


@dataclass(frozen=True, repr=False)
class LoRAConfig:
    """The layers that get adapters, and the sizes of these; names and matching rules are those of PEFT.

    Args:
        r: the rank, >= 1.
        lora_alpha: None for scale 1 (the EWC-LoRA paper), else the scale is lora_alpha / r.
        lora_dropout: the dropout probability on the input of the low-rank branch.
        target_modules: a string is a regular expression that must match the whole dotted name; a list holds
            names or dotted suffixes; `"all-linear"` selects every `nn.Linear` except the output head, and no
            convolution: these are adapted where a name selects them.
        exclude_modules: what is left out of these, in the same form.
        slices: the segments of a packed projection that get one adapter each.
        layout: the `QKVLayout` of that projection.
        rank_pattern: {regular expression for the end of the dotted name: rank}; one for a module holds for
            its parts, such as the input projections of an attention.
        alpha_pattern: {regular expression for the end of the dotted name: lora_alpha}, likewise.
        modules_to_save: ends of the names of modules that are trained whole beside the adapters, such as a
            new head, and saved with them.
        quantised_merge: what merging and consolidation do to quantised weights: "requantise" adds in fp32 and
            quantises again, "residual" keeps the sum of all updates in bf16 beside the weight; None refuses
            (docs/integrations/quantised.md).

    Raises:
        ArgumentError: for a value that is out of range; the message names the field.
        DtypeError: for a value of another type.

    Examples:
        >>> layout = fe.QKVLayout(("q", "k", "v"))
        >>> fe.LoRAConfig(r=10, target_modules=["qkv"], slices=("k", "v"), layout=layout).r
        10
    """

    r: int = 8
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    target_modules: Targets | None = None
    exclude_modules: Targets | None = None
    slices: Sequence[str] | None = None
    layout: QKVLayout | None = None
    rank_pattern: Mapping[str, int] | None = None
    alpha_pattern: Mapping[str, float] | None = None
    modules_to_save: Sequence[str] | None = None
    quantised_merge: QuantisedMerge | None = None

    __repr__ = _brief

    def __post_init__(self) -> None:
        positive(self.r, "r")
        if self.lora_alpha is not None:
            finite(self.lora_alpha, "lora_alpha")
        probability(self.lora_dropout, "lora_dropout")
        for field in ("target_modules", "exclude_modules"):
            object.__setattr__(self, field, checked_targets(getattr(self, field), field))
        if self.modules_to_save is not None:
            object.__setattr__(self, "modules_to_save", _names(self.modules_to_save, "modules_to_save"))
        checked_merge(self.quantised_merge)
        if self.slices is not None:
            object.__setattr__(self, "slices", segment_names(self.slices, "slices"))
        if self.layout is not None:
            if not isinstance(self.layout, QKVLayout):
                raise DtypeError(f"layout: expected a QKVLayout, got {type(self.layout).__name__}")
            for name in self.slices or ():
                if name not in self.layout.segments:
                    raise LayoutError(
                        f"slices: expected names among {list(self.layout.segments)} (of layout), got {name!r}"
                    )
        object.__setattr__(self, "rank_pattern", _pattern(self.rank_pattern, "rank_pattern", positive))
        object.__setattr__(self, "alpha_pattern", _pattern(self.alpha_pattern, "alpha_pattern", finite))

    def rank_of(self, *names: str) -> int:
        """The rank of the adapters in a module.

        Args:
            names: the name of the module; of a part of one its own and that of the module.

        Returns:
            The rank.
        """
        return _lookup(self.rank_pattern, names, self.r)

    def alpha_of(self, *names: str) -> float | None:
        """lora_alpha of the adapters in a module.

        Args:
            names: as in `rank_of`.

        Returns:
            lora_alpha, or None.
        """
        return _lookup(self.alpha_pattern, names, self.lora_alpha)


def matches(targets: Targets, name: str) -> bool:
    """Whether `targets` select a name, by PEFT's rules.

    Args:
        targets: a string is a regular expression that must match the whole dotted name; a list holds names or
            dotted suffixes of names.
        name: the dotted name of a module.

    Returns:
        Whether the name is selected.

    Examples:
        >>> from fused_ewclora.config import matches
        >>> matches(["attn.qkv"], "blocks.0.attn.qkv"), matches(r"blocks\\.1\\..*", "blocks.0.attn.qkv")
        (True, False)
    """
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def checked_targets(value: Targets | None, name: str) -> Targets | None:
    """Checks names, or a regular expression, as `matches` takes them.

    Args:
        value: what is checked.
        name: the name of the argument, for the message.

    Returns:
        A tuple of the names, the expression, or None for None.

    Raises:
        ArgumentError: for no names, repeated ones, and an expression that does not compile.
        DtypeError: for another type.

    Examples:
        >>> from fused_ewclora.config import checked_targets
        >>> checked_targets(["qkv", "proj"], "target_modules")
        ('qkv', 'proj')
    """
    if value is None:
        return None
    if not isinstance(value, str):
        return _names(value, name)
    _compiled(value, name)
    return value


def _compiled(pattern: str, name: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ArgumentError(f"{name}: expected a regular expression, got {pattern!r}: {error}") from None


def _pattern(value: Any, name: str, check: Any) -> dict[str, Any] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise DtypeError(f"{name}: expected a mapping from a regular expression to a value, got {value!r}")
    for key, entry in value.items():
        _compiled(key, name)
        check(entry, f"{name}[{key!r}]")
    return dict(value)


def _lookup(patterns: Mapping[str, Any] | None, names: Iterable[str], default: Any) -> Any:
    for name in names:
        for key, value in (patterns or {}).items():
            if re.fullmatch(rf"(?:.*\.)?(?:{key})", name):
                return value
    return default
