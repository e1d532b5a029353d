# SPDX-License-Identifier: Apache-2.0
"""What structures of the Fisher cost and preserve: `python -m benchmarks.continual.fishers` writes the
measured part of docs/fishers.md, and its picture, from committed records. `--check` writes nothing, as for
`benchmarks.continual.page`.

`--run` makes the runs of the configurations fishers-vision and fishers-language that have no record. Those
with a lambda in their name come first; what they choose is written into the configurations. `--costs` times
steps; `python -m benchmarks.continual.codes` compares codes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fused_ewclora.demo.files import replace_text
from fused_ewclora.demo.spread import Spread

from ..collection import Record, Unusable
from ..plot import MISSING
from ..report import IMAGES, difference, table
from . import codes, configuration, costs, recorded, suite
from .page import ROOT, machine_table
from .targets import CIL, text

RESULTS, OUTPUT = codes.OUTPUT.parent, ROOT / "docs" / "fishers.md"
COMMAND = "python -m benchmarks.continual.fishers"
BEGIN, END = f"<!-- measured: written by `{COMMAND}` from records; do not edit -->", "<!-- end -->"
PICTURE = "fishers"
DENSE = "dense"
OPTIONS: dict[str, dict[str, Any]] = {
    DENSE: {}, "8-bit": {"fisher_dtype": "8bit"}, "factored": {"fisher": "factored"},
    "Kronecker": {"fisher": "kronecker"}, "uniform": {"fisher": "uniform"},
}  # fmt: skip
SEEDS = 5  # reported ones, at least
DEVELOPMENT = (100, 101)  # seeds on which lambda is chosen, and which are not reported
A_LAST, A_AVG, BWT = "A_last_sample_weighted", "A_avg_sample_weighted", "bwt"
SINGLE, ADDED = 5e-3, 2e-2  # targets of 8-bit codes: one rounding, 100 additions
TASKS = 2  # of the costs: without a penalty, and with one
SAME = 1.0  # points of A_last below the dense Fisher that are no loss, for the recommendation


class Kept(NamedTuple):
    """The reported runs of a structure on a stream, each seed once, in the order of seeds."""

    ewc_lambda: float
    records: tuple[Record, ...]

    def spread(self, name: str) -> Spread:
        """A class-incremental metric over the seeds."""
        return Spread.of([record["metrics"][CIL][name] for record in self.records])

    @property
    def fisher_bytes(self) -> int:
        """Of all adapters after the last task: what the method keeps beside the adapters."""
        last = self.records[0]["tasks"][-1]
        return int(last["state_bytes"] - 4 * last["adapter_parameters"])


def structure(record: Record) -> str | None:
    """The structure of the Fisher of a run, None without one."""
    if record["kind"] != "EWCLoRA":
        return None
    options = record["run"]["options"]
    kept = {name: options[name] for name in ("fisher", "fisher_dtype") if name in options}
    return next(name for name, given in OPTIONS.items() if given == kept)


def chosen(records: Iterable[Record]) -> dict[str, float]:
    """The lambda of every structure on one stream: of those that ran on all development seeds the one with
    the highest mean A_avg, the smaller of equal ones."""
    tried: dict[str, dict[float, dict[int, float]]] = {}
    for record in records:
        if (name := structure(record)) is not None and record["seed"] in DEVELOPMENT:
            of_lambda = tried.setdefault(name, {}).setdefault(record["run"]["options"]["ewc_lambda"], {})
            of_lambda[record["seed"]] = record["metrics"][CIL][A_AVG]
    found = {}
    for name, grid in tried.items():
        means = {
            k: statistics.fmean(v.values()) for k, v in sorted(grid.items()) if len(v) == len(DEVELOPMENT)
        }
        if means:
            found[name] = max(means, key=lambda value: means[value])
    return found


def reported(records: Sequence[Record]) -> dict[str, Kept]:
    """The runs of the table of one stream, "LoRA" first; a structure without any is left out."""
    runs = [record for record in records if record["seed"] not in DEVELOPMENT]
    found = {}
    for name in ("LoRA", *OPTIONS):
        own = {r["seed"]: r for r in runs if (structure(r) or r["kind"]) == name}
        if own:
            first = next(iter(own.values()))
            found[name] = Kept(
                first["run"]["options"].get("ewc_lambda", 0.0), tuple(own[seed] for seed in sorted(own))
            )
    return found


def complete(kept: Mapping[str, Kept]) -> bool:
    """Whether every structure ran on the same seeds, as many as are asked for."""
    seeds = {tuple(r["seed"] for r in kept[name].records) for name in OPTIONS if name in kept}
    return set(OPTIONS) <= set(kept) and len(seeds) == 1 and len(seeds.pop()) >= SEEDS


def paired(one: Kept, other: Kept, name: str) -> Spread | None:
    """The differences of a metric, seed by seed, where both ran."""
    values = [{r["seed"]: r["metrics"][CIL][name] for r in kept.records} for kept in (one, other)]
    common = sorted(set(values[0]) & set(values[1]))
    return Spread.of([values[0][seed] - values[1][seed] for seed in common]) if common else None


def signed(spread: Spread | None) -> str:
    """Mean with its sign, and deviation."""
    if spread is None:
        return "–"
    plus = "+" if spread.mean >= 0.0 else ""
    return f"{plus}{text(spread, 1)}"


def kibibytes(count: int) -> str:
    """With at most one digit after the point."""
    return f"{count / 1024:.1f}"


def of_stream(records: Sequence[Record], ratios: Mapping[str, float]) -> list[str]:
    """The table of one stream. ratios: of the time of a step with a penalty over one without."""
    rows, kept = [], reported(records)
    if not kept:
        return ["Not measured: there are only runs on which lambda is chosen.", ""]
    dense = kept.get(DENSE)
    for name, own in kept.items():
        against = [paired(own, dense, m) for m in (A_LAST, BWT)] if dense and name != DENSE else [None, None]
        size = own.fisher_bytes
        rows.append([
            name, f"{own.ewc_lambda:g}" if own.ewc_lambda else "–", str(len(own.records)),
            *(text(own.spread(m)) for m in (A_LAST, A_AVG, BWT)), *map(signed, against),
            kibibytes(size) if size else "–",
            f"{size / dense.fisher_bytes:.3f}" if dense and size else "–",
            f"{ratios[name]:.3f}" if name in ratios else "–",
        ])  # fmt: skip
    heads = [
        "Fisher", "lambda", "seeds", "A_last", "A_avg", "BWT", "A_last minus dense", "BWT minus dense",
        "KiB of F", "x dense", "step with penalty / without",
    ]  # fmt: skip
    return table(heads, rows)


def grid_table(records: Sequence[Record]) -> list[str]:
    """A_avg on the development seeds, by structure and lambda."""
    values: dict[str, dict[float, list[float]]] = {}
    for record in records:
        if (name := structure(record)) is not None and record["seed"] in DEVELOPMENT:
            of_lambda = values.setdefault(name, {}).setdefault(record["run"]["options"]["ewc_lambda"], [])
            of_lambda.append(record["metrics"][CIL][A_AVG])
    lambdas = sorted({value for grid in values.values() for value in grid})
    picked = chosen(records)
    rows = []
    for name in (name for name in OPTIONS if name in values):
        means = {value: statistics.fmean(of) for value, of in values[name].items()}
        cells = [
            f"{means[v]:.1f}{' *' if picked.get(name) == v else ''}" if v in means else "–" for v in lambdas
        ]
        rows.append([name, *cells])
    return table(["A_avg at lambda", *(f"{value:g}" for value in lambdas)], rows)


def code_tables(found: Sequence[Record]) -> list[str]:
    """Errors of 8-bit codes, with the targets."""
    rows = []
    for record in found:
        for name, own in record["codes"].items():
            rows.append([
                record["suite"].removeprefix("fishers-"), name,
                *(f"{own['once'][key]:.1e}" for key in ("penalty", "dA", "dB")),
                *(f"{own['unbiased'][key]:.1e}" for key in ("penalty", "dA", "dB")),
                f"{own['bias']:+.1e} ± {own['bias_error']:.0e}", f"{own['nearest_bias']:+.1e}",
            ])  # fmt: skip
    heads = ["stream", "code", "P", "dA", "dB", f"P after {codes.ADDITIONS}", "dA", "dB", "bias of the sum",
             "rounded to nearest"]  # fmt: skip
    return [*table(heads, rows), *(part for line in verdicts(found) for part in (line, ""))]


def verdicts(found: Sequence[Record]) -> list[str]:
    """Whether the code of this library reaches its targets."""
    ours = [record["codes"]["square root"] for record in found]
    lines = []
    for key, what, limit in (("once", "one rounding", SINGLE), ("unbiased", "many additions", ADDED)):
        worst = max((value for own in ours for value in own[key].values()), default=0.0)
        verdict = "reached" if worst <= limit else "not reached"
        lines.append(
            f"Target of {what}: errors of P, dA and dB of at most {limit:g}; largest {worst:.1e}, {verdict}."
        )
    apart = max((abs(own["bias"]) / max(own["bias_error"], 1e-12) for own in ours), default=0.0)
    lines.append(
        f"Target: no bias; the largest bias of the sum is {apart:.1f} standard errors from 0, "
        f"{'reached' if apart <= 3.0 else 'not reached'}."
    )
    return lines


def recommendation(streams: Mapping[str, Sequence[Record]]) -> list[str]:
    """What follows from the tables: the structure with the smallest F that loses nothing on any stream."""
    kept = {name: of for name, records in streams.items() if complete(of := reported(records))}
    missing = [f"Some runs of {name} are not made yet." for name in codes.SUITES if name not in kept]
    lines, equal = [], []
    for name in OPTIONS:
        if name == DENSE or not kept:
            continue
        losses = {s: paired(of[name], of[DENSE], A_LAST) for s, of in kept.items()}
        shares = [of[name].fisher_bytes / of[DENSE].fisher_bytes for of in kept.values()]
        worst = min(spread.mean for spread in losses.values() if spread)
        words = ", ".join(f"{s.removeprefix('fishers-')} {signed(spread)}" for s, spread in losses.items())
        lines.append(f"- {name}: {max(shares):.3f} of the memory of a dense F; A_last minus dense: {words}.")
        if worst >= -SAME and max(shares) < 1.0:
            equal.append((max(shares), name))
    if not lines:
        return [*missing, "Nothing can be recommended yet.", ""]
    for name, of in kept.items():
        lines += [*without_penalty(name, of), *edges(name, streams[name])]
    return [*lines, "", *missing, advice(equal), ""]


def advice(equal: Sequence[tuple[float, str]]) -> str:
    """The structure to use. equal: shares of the memory, and names, of structures that lose nothing."""
    if not equal:
        return (
            f"No smaller structure stays within {SAME:g} point of the A_last of a dense F on every stream: "
            "**dense**."
        )
    best = min(equal, key=lambda one: one[0])[1]  # of equal ones the one that knows more, which comes first
    text = (
        f"Of the structures smaller than a dense F and within {SAME:g} point of its A_last on every stream, "
        f"{best} is the smallest: **{best}** where memory counts, **dense** otherwise."
    )
    if "uniform" in [name for _, name in equal]:
        text += (
            f" Uniform is within {SAME:g} point as well: on these streams it cannot be measured that a "
            "penalty gains from knowing which weights of an adapter matter."
        )
    return text


def without_penalty(stream: str, kept: Mapping[str, Kept]) -> list[str]:
    """LoRA against the dense Fisher on one stream."""
    if "LoRA" not in kept:
        return []
    last, transfer = (signed(paired(kept["LoRA"], kept[DENSE], metric)) for metric in (A_LAST, BWT))
    name = stream.removeprefix("fishers-")
    return [f"- LoRA, without a penalty, on {name}: A_last minus dense {last}, BWT minus dense {transfer}."]


def edges(stream: str, records: Sequence[Record]) -> list[str]:
    """Says so where a lambda was chosen at an end of what was tried."""
    development = [r for r in records if structure(r) and r["seed"] in DEVELOPMENT]
    tried = [r["run"]["options"]["ewc_lambda"] for r in development]
    ends = [name for name, value in chosen(records).items() if value in (min(tried), max(tried))]
    if not ends:
        return []
    return [
        f"- On {stream.removeprefix('fishers-')} lambda is at an end of those tried for {', '.join(ends)}: "
        "a better one may lie beyond."
    ]


def by_stream(results: Path) -> dict[str, list[Record]]:
    """The records of runs by the name of their configuration."""
    streams: dict[str, list[Record]] = {}
    for record in recorded.runs(recorded.load(results)):
        streams.setdefault(record["suite"], []).append(record)
    return streams


def measured(results: Path) -> str:
    """The measured part of the page."""
    records = recorded.load(results)
    of_codes = (
        json.loads((results / codes.OUTPUT.name).read_text())
        if (results / codes.OUTPUT.name).exists()
        else []
    )
    timed = {r["method"]: r for r in recorded.costs(records)}
    ratios = {name: record["ratio_to_first"][-1] for name, record in timed.items()}
    streams = by_stream(results)
    lines = [BEGIN, "", "### Recommendation", "", *recommendation(streams)]
    drawn = [of for of in streams.values() if complete(reported(of))]
    lines += [f"![Differences to the dense Fisher]({IMAGES}/{PICTURE}.png)", ""] if drawn else []
    for name, of in streams.items():
        lines += [f"### Stream {name.removeprefix('fishers-')}", "", *_about(name), *of_stream(of, ratios)]
        lines += [f"Seeds {' and '.join(map(str, DEVELOPMENT))}, on which lambda was chosen (*):", ""]
        lines += [*grid_table(of), *machine_table(of)]
    if timed:
        lines += ["### Steps", "", _steps(list(timed.values())), "", *machine_table(list(timed.values()))]
    if of_codes:
        lines += ["### Codes of 8 bits", "", CODES, "", *code_tables(of_codes)]
    return "\n".join([*lines, END])


CODES = (
    "Errors relative to the fp32 F of the same stream, in norm, for the adapters of its last task: after one "
    f"rounding to the nearest level, and after {codes.ADDITIONS} additions of the Fishers of its tasks, each "
    f"rounded without bias (largest of {codes.REPEATS} runs). Both codes have 8 bits per value and a bf16 "
    "scale for 32 values. The last columns: the error of the sum of all values, with its sign."
)


def _steps(timed: Sequence[Record]) -> str:
    model = ", ".join(f"{name} {value}" for name, value in timed[0]["model"].items())
    return (
        "The column of steps is the median over rounds of a whole training step with the penalty over one "
        f"without, taken in turns ({model}; {timed[0]['rounds']} rounds)."
    )


def _about(name: str) -> list[str]:
    return [configuration.load(configuration.find(name)).about, ""]


def page(results: Path, before: str) -> str:
    """The text of the page with its measured part written anew; raises `Unusable` without its marks."""
    head, begin, rest = before.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise Unusable(f"{OUTPUT.name}: expected the lines {BEGIN!r} and {END!r}")
    return f"{head}{measured(results)}{tail}"


def picture(streams: Mapping[str, Sequence[Record]]) -> Any:
    """A_last and BWT minus those of the dense Fisher: seeds, means, standard deviations."""
    from ..plots import style

    records = [record for of in streams.values() for record in of]
    note = (
        "Small: single seeds; large: means, with standard deviations. Above 0: better than the dense Fisher."
    )
    figure = style.figure(1.4 + 2.5 * len(streams), "Structures of the Fisher, minus dense", records, note)
    axes = figure.subplots(len(streams), 2, squeeze=False)
    for row, (stream, of) in zip(axes, streams.items(), strict=True):
        kept = reported(of)
        names = [name for name in kept if name != DENSE]
        for axis, (metric, label) in zip(row, ((A_LAST, "A_last"), (BWT, "BWT")), strict=True):
            for place, name in enumerate(names):
                spread = paired(kept[name], kept[DENSE], metric)
                if spread is None:
                    continue
                colour = style.COLOURS[place % len(style.COLOURS)]
                axis.plot(
                    [place] * len(spread.values), spread.values, "o", color=colour, alpha=0.4, markersize=4
                )
                axis.errorbar([place], [spread.mean], yerr=[spread.deviation or 0.0], fmt="o", color=colour,
                              markersize=8, capsize=4, gid=name)  # fmt: skip
            axis.axhline(0.0, color="black", linewidth=0.8, zorder=0)
            axis.set_xticks(range(len(names)), names)
            axis.set(ylabel=f"{label} minus dense (points)", title=stream.removeprefix("fishers-"))
            axis.grid(alpha=0.25, axis="y")
    return figure


def write(results: Path, output: Path) -> None:
    """Writes the measured part of the page, and the picture beside it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise Unusable(MISSING)
    from ..plots import style

    replace_text(output, page(results, output.read_text(encoding="utf-8")))
    streams = {name: of for name, of in by_stream(results).items() if complete(reported(of))}
    if streams:
        style.save(picture(streams), output.parent / IMAGES, PICTURE, ("png",))


def check(results: Path, output: Path) -> str | None:
    """Why the page is out of date, or None."""
    return difference(
        page(results, output.read_text(encoding="utf-8")).rstrip("\n"), results, output, COMMAND
    )


def run_streams(results: Path, root: Path) -> list[str]:
    """Makes all runs of both streams that have no record, in this process: those on which lambda is chosen,
    then, with the chosen lambdas in the configurations, the others. Returns what failed."""
    failures: list[str] = []
    place = suite.Place(results, root)
    results.mkdir(parents=True, exist_ok=True)
    for name in codes.SUITES:
        for development in (True, False):
            planned = configuration.load(configuration.find(name)).runs
            wanted = [run for run in planned if (run.seed in DEVELOPMENT) == development]
            left = suite.outstanding(wanted, place)
            failures += suite.run_all(
                left, place, lambda line: print(line, file=sys.stderr, flush=True), f"{COMMAND} --run"
            )
            if development:
                choose(results)
    return failures


def choose(results: Path, folder: Path = configuration.FOLDER) -> None:
    """Writes the lambdas that the development runs chose into the configurations of the streams."""
    for suite_name in codes.SUITES:
        picked = chosen(r for r in recorded.runs(recorded.load(results)) if r["suite"] == suite_name)
        file = folder / f"{suite_name}.json"
        data = json.loads(file.read_text())
        for entry in data["methods"]:
            if entry["name"] in picked:
                entry["options"]["ewc_lambda"] = picked[entry["name"]]
        replace_text(file, json.dumps(data, indent=2) + "\n")


def time_steps(results: Path) -> None:
    """Appends a record of costs for every structure: a step with the penalty and one without, in turns."""
    torch.set_num_threads(1)
    for name, options in OPTIONS.items():
        record = costs.measure(name, "EWCLoRA", {"ewc_lambda": 1.0, **options}, tasks=TASKS)
        suite.append(results / "costs.jsonl", {**record, "command": f"{COMMAND} --costs"})


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; exit status 1 when the page is out of date, 2 when records cannot be used."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if the text is out of date")
    parser.add_argument("--run", action="store_true", help="make the runs without a record, choose lambdas")
    parser.add_argument("--data-root", type=Path, default=Path("data"), help="data; fetched where possible")
    parser.add_argument("--costs", action="store_true", help="time steps, and append the records")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="the page; its picture goes to images/")
    args = parser.parse_args(argv)
    try:
        if args.run:
            for failure in (failures := run_streams(args.results, args.data_root)):
                print(f"fishers: FAILED: {failure}", file=sys.stderr)
            return int(bool(failures))
        if args.costs:
            time_steps(args.results)
        elif args.check:
            if wrong := check(args.results, args.output):
                print(f"fishers: {wrong}", file=sys.stderr)
                return 1
        else:
            write(args.results, args.output)
    except Unusable as reason:
        print(f"fishers: {reason}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
