# SPDX-License-Identifier: Apache-2.0
"""The division of records among pictures; does not need matplotlib."""

from __future__ import annotations

from collections.abc import Sequence

from .. import collection, scaling
from ..collection import CaseRecords, Record

ROWS = 44  # bars of one picture
PANELS = 4  # of one picture


def others(case: CaseRecords) -> list[Record]:
    """Peers and floors of a case that have a time, floors last."""
    records = [r for r in case.values() if "seconds" in r and collection.role(r) in ("peer", "floor")]
    return sorted(records, key=lambda record: collection.role(record) == "floor")


def with_ours(cases: Sequence[CaseRecords]) -> list[CaseRecords]:
    """The cases that have a measurement of ours."""
    return [case for case in cases if collection.measured(collection.ours(case))]


def rooflines(cases: Sequence[CaseRecords]) -> list[list[list[CaseRecords]]]:
    """Pages of panels, each the cases of an operation."""
    ops = [with_ours(of_op) for of_op in collection.by_op(cases).values()]
    ops = [of_op for of_op in ops if of_op]
    return [ops[start : start + PANELS] for start in range(0, len(ops), PANELS)]


def speedups(cases: Sequence[CaseRecords]) -> list[list[CaseRecords]]:
    """Pages of the cases of one operation."""
    pages: list[list[CaseRecords]] = []
    rows = 0
    for case in with_ours(cases):
        count = len(others(case))
        if not pages or rows + count > ROWS:
            pages.append([])
            rows = 0
        pages[-1] += [case] if count else []
        rows += count
    return [page for page in pages if page]


def families(records: Sequence[Record]) -> list[list[scaling.Curve]]:
    """Curves of at least two sizes, grouped so that only the provider differs within a group."""
    groups: dict[str, list[scaling.Curve]] = {}
    for curve in scaling.curves(records):
        if len(curve.records) > 1:
            groups.setdefault(curve.family, []).append(curve)
    return list(groups.values())
