# SPDX-License-Identifier: Apache-2.0
"""Fused LoRA and EWC for PyTorch, from the command line."""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from ._arguments import PROG, Parser, at_least, existing_file, one_of
from ._version import __version__
from .errors import ArgumentError, EWCLoRAError

DEMO_EXTRAS = ("sklearn", "matplotlib")
SUITE = "--suite"  # with it, the demo is a command of the benchmarks
DTYPES = ("bfloat16", "float16", "float32")
Fill = Callable[[Parser, list[str]], None]


def _info(args: argparse.Namespace) -> int:
    from .diagnostics import info

    data = info.collect()
    print(json.dumps(data, indent=2) if args.json else info.render(data))
    return 0


def _demo(args: argparse.Namespace) -> int:
    # Checked before minutes of training, not when the picture is drawn.
    missing = [name for name in DEMO_EXTRAS if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"demo: not installed: {', '.join(missing)}; pip install 'fused-ewclora[demo]' brings them",
            file=sys.stderr,
        )
        return 2
    from . import demo

    return int(demo.run(args) or 0)


def _check(args: argparse.Namespace) -> int:
    from .diagnostics import check

    data = check.run(args.model, args.library, args.target, args.slices, args.rank, args.full)
    print(json.dumps(data, indent=1) if args.json else check.render(data))
    return 1 if data["problems"] else 0


def _fill_info(parser: Parser, given: list[str]) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_info)


def _fill_check(parser: Parser, given: list[str]) -> None:
    parser.add_argument(
        "model",
        help="a model of timm or torchvision, or a type, config.json or folder of transformers; the library "
        "may come first, as in torchvision/vit_b_16",
    )
    parser.add_argument(
        "--library", choices=("timm", "transformers", "torchvision"), help="default: the one that knows it"
    )
    parser.add_argument(
        "--target", nargs="+", default=[], metavar="NAME", help="target_modules; default: all linear layers"
    )
    parser.add_argument(
        "--slices", nargs="+", default=[], metavar="NAME", help="segments of packed projections, as k v"
    )
    parser.add_argument(
        "--rank", type=at_least(1), default=8, metavar="R", help="rank of the adapters (default: 8)"
    )
    parser.add_argument("--full", action="store_true", help="native image size, all layers, all words")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_check)


def _compile_report(parser: Parser, args: argparse.Namespace) -> int:
    if not args.targets and (args.markdown or args.cubin or args.write):
        parser.error("--markdown, --cubin and --write need --targets")
    from .backends import predicted_choice
    from .backends.triton.tools import compile_report, targets

    executed = json.loads(args.executed.read_text()) if args.executed else ()
    if args.targets:
        table = targets.collect(args.cubin, executed, args.jobs, compile_report.show_progress)
        print(json.dumps(table, indent=1) if args.json else targets.render(table, args.markdown))
        if args.write:
            predicted_choice.write(table, predicted_choice.TABLE)
        return 0
    data = compile_report.collect(
        args.arch or compile_report.ARCHITECTURES,
        args.kernel,
        args.dtype,
        args.rank,
        args.jobs,
        compile_report.show_progress,
        args.few,
        executed,
    )
    print(json.dumps(data, indent=1) if args.json else compile_report.render(data, args.full))
    return 1 if data["problems"] else 0


def _add_kernels(parser: Parser) -> None:
    """The options that choose kernels, of which names are known without compiling any."""
    from .backends.triton import tables

    parser.add_argument(
        "--kernel", nargs="+", default=[], type=one_of("kernel", tables.kernels()), metavar="NAME",
        help=f"these kernels only, of {', '.join(tables.kernels())}",
    )  # fmt: skip
    parser.add_argument("--dtype", nargs="+", default=[], choices=DTYPES)
    parser.add_argument(
        "--rank", nargs="+", type=at_least(1), default=[], metavar="R", help="ranks of the adapters"
    )


def _fill_compile_report(parser: Parser, given: list[str]) -> None:
    from .backends.triton.tools import occupancy

    archs = tuple(occupancy.LIMITS)
    parser.add_argument(
        "--arch", nargs="+", default=[], type=one_of("architecture", archs), metavar="ARCH",
        help=f"of {', '.join(archs)}; default: all",
    )  # fmt: skip
    _add_kernels(parser)
    parser.add_argument("--few", action="store_true", help="two calls of each kernel and configuration")
    parser.add_argument(
        "--jobs", type=at_least(1), metavar="N", help="compiler processes (default: one per core)"
    )
    parser.add_argument("--full", action="store_true", help="one line per specialisation")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--targets", action="store_true", help="what kernels aim at, and what is predicted")
    parser.add_argument("--markdown", action="store_true", help="with --targets: as in docs/triton.md")
    parser.add_argument(
        "--cubin", nargs="+", default=[], type=existing_file, metavar="FILE",
        help="with --targets: sm_90 machine code of csrc/cuda, by nvcc",
    )  # fmt: skip
    parser.add_argument(
        "--write", action="store_true", help="with --targets: write backends/predicted_choice.json anew"
    )
    parser.add_argument(
        "--executed", type=existing_file, metavar="FILE",
        help="JSON list of executed counts that replace static ones",
    )  # fmt: skip
    parser.set_defaults(run=functools.partial(_compile_report, parser))


def _autotune(args: argparse.Namespace) -> int:
    from .backends.triton.tools import tuning

    def progress(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    data = tuning.run(args.kernel, args.dtype, args.rank or tuning.RANKS, args.again, progress)
    print(json.dumps(data, indent=1) if args.json else tuning.render(data))
    return 1 if any(row["error"] for row in data["rows"]) else 0


def _fill_autotune(parser: Parser, given: list[str]) -> None:
    _add_kernels(parser)
    parser.add_argument("--again", action="store_true", help="measure also what was measured before")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_autotune)


def _fill_demo(parser: Parser, given: list[str]) -> None:
    if any(word.partition("=")[0] == SUITE for word in given):
        _of_benchmarks("continual.__main__")(parser, given)
        return
    from . import demo

    parser.description = demo.__doc__
    demo.add_arguments(parser)
    parser.set_defaults(run=_demo)


def _of_benchmarks(module: str) -> Fill:
    """The options and the work of a module of the benchmarks; nothing else in the package imports them."""

    def fill(parser: Parser, given: list[str]) -> None:
        loaded = importlib.import_module(f"fused_ewclora.benchmarks.{module}")
        parser.description = loaded.__doc__
        loaded.add_arguments(parser)
        parser.set_defaults(run=functools.partial(loaded.execute, parser), arguments=given)

    return fill


COMMANDS: dict[str, tuple[str, Fill]] = {
    "info": ("versions, build, and which backend serves which op", _fill_info),
    "check": ("dry run of adapters in a named model of a model library", _fill_check),
    "demo": ("continual learning on real images, with and without EWC", _fill_demo),
    "plot": ("pictures of benchmark records", _of_benchmarks("plot")),
    "compile-report": ("registers, spills, memory of every Triton kernel", _fill_compile_report),
    "autotune": ("measure configurations of Triton kernels on this GPU", _fill_autotune),
}
RUN = "run"
BENCHMARKS: dict[str, tuple[str, str]] = {  # of `bench`: what it does, and its module
    RUN: ("operations beside their peers, of a preset or at your shapes; the default", "__main__"),
    "host": ("what calls cost on the host", "host.__main__"),
    "large": ("a language model in little memory", "large_model"),
    "compare": ("changes between two sets of records", "compare"),
    "report": ("the page of records", "report"),
    "plot": ("pictures of records", "plot"),
}


def _fill_bench(parser: Parser, given: list[str]) -> None:
    parser.description = f"Benchmarks. Options without a command are those of `{PROG} bench {RUN}`."
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (text, module) in BENCHMARKS.items():
        commands.add_parser(name, help=text, fill=_of_benchmarks(module))


def _parser() -> Parser:
    parser = Parser(prog=PROG, description=__doc__)
    parser.add_argument("--version", action="version", version=f"{PROG} {__version__}")
    commands: Any = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (text, fill) in COMMANDS.items():
        commands.add_parser(name, help=text, fill=fill)
    commands.add_parser("bench", help=f"benchmarks: {', '.join(BENCHMARKS)}", fill=_fill_bench)
    return parser


def _explicit(arguments: Sequence[str]) -> list[str]:
    """The arguments, with the command that `bench` alone stands for."""
    words = list(arguments)
    alone = words[:1] == ["bench"] and (len(words) == 1 or words[1].startswith("-"))
    return [*words[:1], RUN, *words[1:]] if alone and words[1:2] not in (["-h"], ["--help"]) else words


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status (0 done, 1 failed, 2 wrong usage or a missing extra)."""
    args = _parser().parse_args(_explicit(sys.argv[1:] if argv is None else argv))
    try:
        return int(args.run(args))
    except EWCLoRAError as error:
        print(f"{PROG}: {error}", file=sys.stderr)
        return 2 if isinstance(error, ArgumentError) else 1


if __name__ == "__main__":
    sys.exit(main())
