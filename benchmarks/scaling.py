# SPDX-License-Identifier: Apache-2.0
"""How times grow with a size: exponents of measured curves, and of their model from bytes and FLOPs.

Records of a curve have a shape with `"sweep": "<field>"` and the swept number in `<field>`; all other fields
of the shape, op and dtype are equal within a curve, and every provider has its own. What follows from the
swept field (such as d_in from a width) is left out of the shape.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import collection
from .collection import SWEEP, Record


@dataclass(frozen=True)
class Fit:
    """seconds = factor · size ** exponent; `error` is the exponent's standard error, NaN of two points."""

    exponent: float
    error: float
    factor: float

    def at(self, size: float) -> float:
        return self.factor * size**self.exponent

    def __str__(self) -> str:
        return f"{self.exponent:.2f}" if math.isnan(self.error) else f"{self.exponent:.2f} ± {self.error:.2f}"


def fit(sizes: Sequence[float], seconds: Sequence[float]) -> Fit:
    """Least squares of a line in logarithms with equal weights; the error is estimated from the residuals."""
    if len(set(sizes)) < 2:
        raise ValueError(f"an exponent needs two sizes or more, got {sorted(set(sizes))}")
    x, y = np.log(sizes), np.log(seconds)
    if len(sizes) < 3:
        slope, intercept = np.polyfit(x, y, 1)
        return Fit(float(slope), math.nan, math.exp(intercept))
    (slope, intercept), covariance = np.polyfit(x, y, 1, cov=True)
    return Fit(float(slope), math.sqrt(max(covariance[0, 0], 0.0)), math.exp(intercept))


@dataclass(frozen=True)
class Curve:
    """Records of one provider, sorted by the swept size; `fixed` are the other fields of the shape."""

    op: str
    dtype: str
    field: str
    fixed: dict[str, Any]
    provider: str
    records: tuple[Record, ...]

    @property
    def sizes(self) -> list[float]:
        return [float(record["shape"][self.field]) for record in self.records]

    @property
    def seconds(self) -> list[float]:
        return [record["seconds"]["p50"] for record in self.records]

    @property
    def family(self) -> str:
        """Equal for curves of one picture, which differ only in the provider."""
        return json.dumps([self.op, self.dtype, self.field, self.fixed], sort_keys=True)

    @property
    def title(self) -> str:
        """The swept field, and what is fixed."""
        fixed = [f"{name} {value}" for name, value in self.fixed.items()]
        return f"{self.field.replace('_', ' ')} ({', '.join([*fixed, self.dtype])})"

    def fit(self) -> Fit | None:
        return fit(self.sizes, self.seconds) if len(self.sizes) > 1 else None


def curves(records: Iterable[Record]) -> list[Curve]:
    """All curves in the newest of the records, in order of appearance."""
    groups: dict[str, list[Record]] = {}
    for case in collection.newest(records).values():
        for record in case.values():
            field = record["shape"].get(SWEEP)
            if field is None or "seconds" not in record:
                continue
            if not isinstance(record["shape"].get(field), (int, float)):
                raise collection.Unusable(f"a shape sweeps {field!r} without a number: {record['shape']}")
            key = json.dumps([record["provider"], record["op"], record["dtype"], *_rest(record)])
            groups.setdefault(key, []).append(record)
    return [_curve(group) for group in groups.values()]


def _rest(record: Record) -> list[Any]:
    field = record["shape"][SWEEP]
    return [field, sorted((k, v) for k, v in record["shape"].items() if k not in (field, SWEEP))]


def _curve(group: Sequence[Record]) -> Curve:
    first = group[0]
    field, fixed = _rest(first)
    ordered = tuple(sorted(group, key=lambda record: record["shape"][field]))
    return Curve(first["op"], first["dtype"], field, dict(fixed), first["provider"], ordered)


@dataclass(frozen=True)
class Model:
    """The prediction for a curve: `seconds` at the measured ceilings, their fit, and what `bounds` them:
    "bytes", "flops", or "bytes, flops" where that changes along the curve."""

    seconds: list[float]
    fit: Fit
    bounds: str


def model(curve: Curve) -> Model | None:
    """Counted bytes at the measured copy bandwidth or FLOPs at the measured product rate, whichever takes
    longer, over the sizes of the curve; None where records have no ceilings or only one size."""
    least = [collection.least_seconds(record) for record in curve.records]
    seconds = [value for value in least if value]
    if len(seconds) < len(least) or len(seconds) < 2:
        return None
    bounds = dict.fromkeys(filter(None, map(collection.bound, curve.records)))
    return Model(seconds, fit(curve.sizes, seconds), ", ".join(bounds))


def deviation(measured: Fit, predicted: Fit) -> float:
    """How many standard errors the measured exponent is above the predicted one; NaN without errors."""
    error = math.hypot(measured.error, predicted.error)
    return (measured.exponent - predicted.exponent) / error if error else math.nan
