"""Fused LoRA and EWC for PyTorch, from the command line."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .errors import EWCLoRAError

DEMO_EXTRAS = ("sklearn", "matplotlib")
SUITE = "--suite"  # with it, the demo is a command of the benchmarks


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


def _add_check(commands: Any) -> None:
    parser = commands.add_parser("check", help="dry run of adapters in a named model of a model library")
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
    parser.add_argument("--rank", type=int, default=8, metavar="R", help="rank of the adapters (default: 8)")
    parser.add_argument("--full", action="store_true", help="native image size, all layers, all words")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_check)


def _compile_report(args: argparse.Namespace) -> int:
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


def _add_compile_report(commands: Any) -> None:
    parser = commands.add_parser("compile-report", help="registers, spills, memory of every Triton kernel")
    parser.add_argument(
        "--arch", nargs="+", default=[], metavar="ARCH", help="sm_80, ... gfx942; default: all"
    )
    parser.add_argument("--kernel", nargs="+", default=[], metavar="NAME", help="compile these kernels only")
    parser.add_argument("--dtype", nargs="+", default=[], choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--rank", nargs="+", type=int, default=[], metavar="R", help="ranks of the adapters")
    parser.add_argument("--few", action="store_true", help="two calls of each kernel and configuration")
    parser.add_argument("--jobs", type=int, metavar="N", help="compiler processes (default: one per core)")
    parser.add_argument("--full", action="store_true", help="one line per specialisation")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--targets", action="store_true", help="what kernels aim at, and what is predicted")
    parser.add_argument("--markdown", action="store_true", help="with --targets: as in docs/triton.md")
    parser.add_argument(
        "--cubin", nargs="+", default=[], type=Path, metavar="FILE",
        help="with --targets: sm_90 machine code of csrc/cuda, by nvcc",
    )  # fmt: skip
    parser.add_argument(
        "--write", action="store_true", help="with --targets: write backends/predicted_choice.json anew"
    )
    parser.add_argument(
        "--executed", type=Path, metavar="FILE", help="JSON list of executed counts that replace static ones"
    )
    parser.set_defaults(run=_compile_report)


def _autotune(args: argparse.Namespace) -> int:
    from .backends.triton.tools import tuning

    def progress(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    data = tuning.run(args.kernel, args.dtype, args.rank or tuning.RANKS, args.again, progress)
    print(json.dumps(data, indent=1) if args.json else tuning.render(data))
    return 1 if any(row["error"] for row in data["rows"]) else 0


def _add_autotune(commands: Any) -> None:
    parser = commands.add_parser("autotune", help="measure configurations of Triton kernels on this GPU")
    parser.add_argument("--kernel", nargs="+", default=[], metavar="NAME", help="these kernels only")
    parser.add_argument("--dtype", nargs="+", default=[], choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--rank", nargs="+", type=int, default=[], metavar="R", help="ranks of the adapters")
    parser.add_argument("--again", action="store_true", help="measure also what was measured before")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_autotune)


# Commands of the benchmarks, which parse their own arguments: words of the command line -> module. Nothing
# else in the package imports benchmarks/. The first entry whose words match is run.
BENCHMARK_COMMANDS = {
    ("demo", SUITE): "continual.__main__",
    ("bench", "compare"): "compare",
    ("bench", "host"): "host.__main__",
    ("bench", "large"): "large_model",
    ("bench", "report"): "report",
    ("bench",): "__main__",
    ("plot",): "plot",
}


def _benchmark_command(arguments: Sequence[str]) -> Callable[[], int] | None:
    """The command of the benchmarks that the arguments name, or None."""
    words = tuple(arguments)
    for command, module in BENCHMARK_COMMANDS.items():
        option = SUITE in command  # an option may stand anywhere, and its own parser reads it again
        if words[:1] == command[:1] and SUITE in words if option else words[: len(command)] == command:
            rest = words[1:] if option else words[len(command) :]
            return lambda: int(importlib.import_module(f"fused_ewclora.benchmarks.{module}").main(rest))
    return None


def _parser(command: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fused_ewclora", description=__doc__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    info_parser = commands.add_parser("info", help="versions, build, and which backend serves which op")
    info_parser.add_argument("--json", action="store_true", help="print one JSON object")
    info_parser.set_defaults(run=_info)
    _add_check(commands)
    _add_compile_report(commands)
    _add_autotune(commands)
    commands.add_parser(
        "bench",
        help="microbenchmarks; bench host: of the host alone; bench compare A B: changes between records",
    )
    commands.add_parser("plot", help="pictures of benchmark records")
    demo_parser = commands.add_parser("demo", help="continual learning on real images, with and without EWC")
    demo_parser.set_defaults(run=_demo)
    if command == "demo":  # the other commands do not load it
        from . import demo

        demo.add_arguments(demo_parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status (0 done, 1 failed, 2 wrong usage or a missing extra)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if (command := _benchmark_command(arguments)) is not None:
        return command()
    args = _parser(arguments[0] if arguments else None).parse_args(arguments)
    try:
        return int(args.run(args))
    except EWCLoRAError as error:
        print(f"fused_ewclora: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
