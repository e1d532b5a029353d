# SPDX-License-Identifier: Apache-2.0
"""Compares two record files or folders: `fused-ewclora bench compare A B`. Exit status 1 when B is slower or
newly fails, 2 when the records cannot be compared.

For every provider of ours the ratio B / A of its medians is given, as measured and normalised by its
controls: the peers and floors of the same case, whose code did not change. A change counts when the
normalised ratio exceeds `noise`. The newest record of every case and provider is compared.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fused_ewclora._arguments import PROG, Parser

from . import collection, records
from .case import OURS
from .collection import CaseRecords, Record, Unusable, measured, role
from .place import AGAIN

SLOWER, FASTER, SAME = "regression", "improvement", "unchanged"
Z = 3.0  # standard errors; two-sided 0.3 % for a normal distribution, of every one of dozens of cases
NORMAL_P80 = 0.8416  # standard deviations from the median to the 80 % quantile of a normal distribution
MEDIAN_EFFICIENCY = 1.2533  # sqrt(pi / 2): standard error of a median, of normal samples, over that of a mean
MAD_TO_SIGMA = 1.4826  # of a normal distribution
LEAST_SCATTER = 0.015  # of medians between two processes on an idle machine: placement of pages and code
FEW_SCATTER = 0.03  # assumed where there are fewer than FEW controls
FEW = 6
VERSIONS = ("torch", "triton", "cuda", "python", "instruction_set", "cores", "fused_ewclora")


def median_error(record: Record) -> float:
    """Standard error of ln p50 within its run: 1.2533 sigma / sqrt(rounds) with sigma from ln(p80 / p20).

    The quantiles are taken over rounds, and the median of n independent samples scatters by
    1 / (2 f sqrt(n)) with f their density at the median; for a normal density that is 1.2533 sigma / sqrt(n)
    (for a uniform one between p20 and p80, 1.1 times this). Logarithms, because times have long right tails
    and ratios are compared; with such a tail p80 overestimates sigma, so that fewer changes count.
    """
    seconds = record["seconds"]
    sigma = math.log(seconds["p80"] / seconds["p20"]) / (2.0 * NORMAL_P80)
    return MEDIAN_EFFICIENCY * sigma / math.sqrt(max(record["rounds"], 1))


def noise(own: float, controls: Sequence[float], scatter: float) -> float:
    """How far ln(normalised ratio) can deviate by chance: Z sqrt(own² + e² + scatter²).

    own: standard error of ln(B / A) of the provider, from `median_error` of both records. e: that of the
    median of its controls. scatter: variation between runs, which the rounds of one run cannot show, since
    all of them share a process, its pages and the load of the machine; it is measured on code that did not
    change (`between_runs`). Rounds that are not independent make `own` too small; the scatter includes that.
    """
    count = len(controls)
    error = MEDIAN_EFFICIENCY if count > 2 else 1.0  # of one or two the median is the mean
    e = error * math.sqrt(sum(c * c for c in controls) / count / count) if count else 0.0
    return Z * math.sqrt(own * own + e * e + scatter * scatter)


@dataclass(frozen=True)
class Change:
    """A provider of a case in A and in B. `ratio` is B / A of the medians, `normalised` the ratio divided by
    that of the controls (None without controls), `bound` the factor that noise alone can explain."""

    op: str
    case: str
    provider: str
    role: str
    before: float
    after: float
    ratio: float
    normalised: float | None
    bound: float
    controls: int
    verdict: str
    clocks: str = ""  # "graph, then events" where the two were not timed in the same way


@dataclass(frozen=True)
class Comparison:
    """The result of `compare`; texts are sentences or names ready to be printed."""

    header: list[str]
    changes: list[Change]
    only_a: list[str]
    only_b: list[str]
    newly_failing: list[tuple[str, str, str]]  # role, what, why
    working_again: list[str] = field(default_factory=list)
    controls: int = 0
    machine: float = 1.0
    scatter: dict[str, float] = field(default_factory=dict)  # by op

    def of(self, verdict: str) -> list[Change]:
        """Changes of ours and its variants, largest first."""
        selected = [c for c in self.changes if c.verdict == verdict and c.role in ("ours", "variant")]
        return sorted(selected, key=lambda c: -abs(math.log(c.normalised or c.ratio)))

    @property
    def regressions(self) -> list[Change]:
        return self.of(SLOWER)

    @property
    def status(self) -> int:
        """Exit status: 1 for a regression, or a provider of ours that newly fails."""
        return int(
            bool(self.regressions) or any(who in ("ours", "variant") for who, *_ in self.newly_failing)
        )


@dataclass(frozen=True)
class _Moved:
    """ln(B / A) of a provider measured in both, and its standard error within the runs."""

    before: Record
    after: Record

    @property
    def log(self) -> float:
        return math.log(self.after["seconds"]["p50"] / self.before["seconds"]["p50"])

    @property
    def error(self) -> float:
        return math.hypot(median_error(self.before), median_error(self.after))

    @property
    def clocks(self) -> str:
        both = [str(record.get("timing", "wall")) for record in (self.before, self.after)]
        return "" if both[0] == both[1] else ", then ".join(both)

    @property
    def control(self) -> bool:
        return role(self.after) in ("peer", "floor")


def chance(moved: dict[str, _Moved], machine: float) -> list[float]:
    """Differences as they arise for code that did not change between A and B: ln(B / A) of every control
    minus that of the other controls of its case (of all cases, where it is the only one), and ours against
    ours measured a second time in the same run."""
    controls = {name: change.log for name, change in moved.items() if change.control}
    differences = []
    for name, log in controls.items():
        others = [other for who, other in controls.items() if who != name]
        differences.append(log - (float(np.median(others)) if others else machine))
    if OURS in moved and AGAIN in moved:
        for which in ("before", "after"):
            pair = [getattr(moved[name], which)["seconds"]["p50"] for name in (OURS, AGAIN)]
            differences.append(math.log(pair[0] / pair[1]))
    return differences


def between_runs(differences: Sequence[float]) -> float:
    """Robust standard deviation of the differences from `chance`; FEW_SCATTER where there are few of them."""
    if len(differences) < FEW:
        return FEW_SCATTER
    return max(LEAST_SCATTER, MAD_TO_SIGMA * float(np.median(np.abs(differences))))


def _normalised(log: float, references: Sequence[float]) -> float:
    """The smallest change relative to a reference; 0 where the references disagree about its sign."""
    left = [log - reference for reference in references]
    if min(left) <= 0.0 <= max(left):
        return 0.0
    return min(left, key=abs)


def _change(
    where: tuple[str, str], name: str, moved: dict[str, _Moved], everywhere: Sequence[float], scatter: float
) -> Change:
    """Judged against the controls of the case and against those of all cases: neither a change of a single
    peer nor a load on the machine during a single case is a regression of ours."""
    own = moved[name]
    controls = [other for who, other in moved.items() if other.control and who != name]
    references = [float(np.median([c.log for c in controls]))] if controls else []
    references += [float(np.median(everywhere))] if everywhere else []
    log = _normalised(own.log, references) if references else own.log
    bound = noise(own.error, [c.error for c in controls], scatter)
    return Change(
        op=where[0], case=where[1], provider=name, role=role(own.after),
        before=own.before["seconds"]["p50"], after=own.after["seconds"]["p50"], ratio=math.exp(own.log),
        normalised=math.exp(log) if references else None, bound=math.exp(bound), controls=len(controls),
        verdict=SLOWER if log > bound else FASTER if log < -bound else SAME, clocks=own.clocks,
    )  # fmt: skip


def _environments(cases: dict[str, CaseRecords]) -> list[dict[str, object]]:
    return [record["environment"] for case in cases.values() for record in case.values()]


def _values(environments: Sequence[dict[str, object]], name: str) -> str:
    values = dict.fromkeys(str(e[name]) for e in environments if e.get(name) is not None)
    return ", ".join(values) or "unknown"


def _single_value(name: str, which: str, environments: Sequence[dict[str, object]]) -> str:
    values = {str(e.get(name, "unknown")) for e in environments}
    if len(values) > 1:
        listed = ", ".join(sorted(values))
        raise Unusable(f"different {name} cannot be compared: {which} alone holds records of {listed}")
    return values.pop()


def _comparable(a: dict[str, CaseRecords], b: dict[str, CaseRecords]) -> None:
    """Raises `Unusable` where ratios would compare different machines or settings."""
    gpu = any(collection.is_gpu(r) for case in b.values() for r in case.values())
    for name in ("device",) if gpu else ("device", "threads"):
        sides = (("A", a), ("B", b))
        before, after = (_single_value(name, which, _environments(cases)) for which, cases in sides)
        if before != after:
            raise Unusable(f"different {name} cannot be compared: A has {before}, B has {after}")
    if set(a) & set(b):
        return
    firsts = [[next(iter(case.values())) for case in side.values()] for side in (a, b)]
    shapes = [{(r["op"], str(sorted(r["shape"].items()))) for r in side} for side in firsts]
    if shapes[0] & shapes[1]:
        dtypes = [", ".join(sorted({r["dtype"] for r in side})) for side in firsts]
        raise Unusable(f"different dtypes cannot be compared: A has {dtypes[0]}, B has {dtypes[1]}")
    raise Unusable("A and B have no case in common")


def _header(a: dict[str, CaseRecords], b: dict[str, CaseRecords]) -> list[str]:
    both = [_environments(a), _environments(b)]
    lines = [f"{_values(both[0], 'device')}, {_values(both[0], 'threads')} threads"]
    for which, cases, environments in zip("AB", (a, b), both, strict=True):
        times = sorted(r["time"] for case in cases.values() for r in case.values())
        lines.append(f"{which}: commit {_values(environments, 'commit')}, {times[0]} to {times[-1]}")
    for name in VERSIONS:
        old, new = (_values(environments, name) for environments in both)
        if old != new:
            lines.append(f"note: {name} {old} in A, {new} in B; controls may have changed with it")
    return lines


def _titles(old: dict[str, CaseRecords], new: dict[str, CaseRecords]) -> dict[str, tuple[str, str]]:
    """Op and a short name of every case."""
    titles = {}
    for op, cases in collection.by_op({**new, **old}.values()).items():
        for case, text in zip(cases, collection.labels(cases), strict=True):
            titles[records.key(next(iter(case.values())))] = (op, text)
    return titles


def _scatters(moved: dict[str, dict[str, _Moved]], machine: float) -> dict[str, float]:
    """Scatter between runs by op: memory-bound operations vary more than compute-bound ones. For an op with
    few controls the scatter of all ops together ("") is used."""
    differences: dict[str, list[float]] = {"": []}
    for key, case in moved.items():
        values = chance(case, machine)
        differences[""] += values
        differences.setdefault(json.loads(key)[0], []).extend(values)
    return {
        op: between_runs(values if len(values) >= FEW else differences[""])
        for op, values in differences.items()
    }


def _failures(case: str, old: CaseRecords, new: CaseRecords) -> list[tuple[str, str, str]]:
    """Providers that fail in `new` and did not fail, or were not there, in `old`."""
    return [
        (role(record), f"{case}: {name}", record["failed"])
        for name, record in new.items()
        if "failed" in record and "failed" not in old.get(name, {})
    ]


def _missing(
    titles: dict[str, tuple[str, str]], here: dict[str, CaseRecords], there: dict[str, CaseRecords]
) -> list[str]:
    """Cases and providers of `here` that `there` lacks."""
    cases = [" ".join(titles[key]) for key in here if key not in there]
    both = [key for key in here if key in there]
    return cases + [
        f"{' '.join(titles[k])}: {name}" for k in both for name in here[k] if name not in there[k]
    ]


def compare(a: Sequence[Record], b: Sequence[Record]) -> Comparison:
    """The newest records of B against those of A; raises Unusable where they cannot be compared."""
    old, new = collection.newest(a), collection.newest(b)
    _comparable(old, new)
    titles = _titles(old, new)
    moved = {
        key: {
            name: _Moved(record, new[key][name])
            for name, record in case.items()
            if measured(record) and measured(new[key].get(name))
        }
        for key, case in old.items()
        if key in new
    }
    everywhere = [item.log for case in moved.values() for item in case.values() if item.control]
    machine = float(np.median(everywhere)) if everywhere else 0.0
    scatter = _scatters(moved, machine)
    names = {key: " ".join(titles[key]) for key in moved}
    return Comparison(
        header=_header(old, new),
        changes=[
            _change(titles[key], name, case, everywhere, scatter[titles[key][0]])
            for key, case in moved.items()
            for name in case
        ],
        only_a=_missing(titles, old, new),
        only_b=_missing(titles, new, old),
        newly_failing=[item for key in moved for item in _failures(names[key], old[key], new[key])],
        working_again=[what for key in moved for _, what, _ in _failures(names[key], new[key], old[key])],
        controls=len(everywhere),
        machine=math.exp(machine),
        scatter=scatter,
    )


def _line(change: Change) -> str:
    normalised = "no control" if change.normalised is None else f"x {change.normalised:.3f}"
    times = f"{collection.time_text(change.before)} -> {collection.time_text(change.after)}"
    clocks = f"  (timing {change.clocks})" if change.clocks else ""
    return (
        f"  {normalised:>10}  as measured x {change.ratio:.3f}, noise x {change.bound:.3f}  {times:24}"
        f"  {change.op} {change.case}: {change.provider}{clocks}"
    )


def _listed(title: str, lines: Sequence[str]) -> list[str]:
    return ["", f"{title}: {len(lines)}", *(f"  {line}" for line in lines)] if lines else []


def _controls(comparison: Comparison) -> str:
    if not comparison.controls:
        return "no controls (peers or floors in both): a slower machine looks like a regression"
    scatter = ", ".join(f"{op} {100 * value:.1f} %" for op, value in comparison.scatter.items() if op)
    moved = f"median B / A x {comparison.machine:.3f}"
    return f"controls (peers and floors): {comparison.controls}, {moved}; scatter between runs: {scatter}"


def render(comparison: Comparison) -> str:
    """Text: regressions, improvements, the number of unchanged cases, and cases that only A or only B has."""
    lines = [*comparison.header, _controls(comparison)]
    for title, verdict in (("regressions", SLOWER), ("improvements", FASTER)):
        changes = comparison.of(verdict)
        lines += ["", f"{title} (B / A normalised by the controls): {len(changes)}", *map(_line, changes)]
    peers = [c for c in comparison.changes if c.role in ("peer", "floor") and c.verdict != SAME]
    lines += ["", f"unchanged: {len(comparison.of(SAME))}; controls that moved by themselves: {len(peers)}"]
    lines += map(_line, peers)
    lines += _listed("failing in B only", [f"{what}: {why}" for _, what, why in comparison.newly_failing])
    lines += _listed("failing in A only", [*comparison.working_again])
    lines += _listed("in A only", comparison.only_a) + _listed("in B only", comparison.only_b)
    if comparison.regressions:
        lines += ["", "One run each: a regression is a reason to measure both again before it is believed."]
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("a", type=Path, metavar="A", help="records before: a file or folder")
    parser.add_argument("b", type=Path, metavar="B", help="records after")


def execute(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Does what the options say; returns the exit status."""
    try:
        comparison = compare(collection.load(args.a), collection.load(args.b))
    except Unusable as reason:
        print(f"compare: {reason}", file=sys.stderr)
        return 2
    print(render(comparison))
    return comparison.status


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = Parser(prog=f"{PROG} bench compare", description=__doc__)
    add_arguments(parser)
    return execute(parser, parser.parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
