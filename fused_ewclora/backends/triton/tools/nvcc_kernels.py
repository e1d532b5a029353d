# SPDX-License-Identifier: Apache-2.0
"""The CUDA twins of the kernels that targets name: their machine code by nvcc, and what they have to do.

nvcc is not needed to read it: the files come from a build (`cuobjdump -xelf all` takes them out of the
extension) or from the tests, which keep them in build/nvcc. Sizes of blocks are those of csrc/cuda; a kernel
whose main loop loads much more or less than its description says is refused, so that the two cannot drift
apart unseen.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ....errors import BackendError
from ..launch import _MULTIPROCESSORS, cdiv
from . import aot, occupancy, sass
from .kernel_counts import main_nest
from .work import COPY, READ_F, READ_X, WGRAD, Work

ARCH = "sm_90"
SAMPLES, TOKENS, WIDTH, HIDDEN = 64, 197, 1024, 4096  # of ViT-L
LAYERS = 48  # k and v of each block
ROWS = SAMPLES * TOKENS
MULTIPROCESSORS = _MULTIPROCESSORS[ARCH]


class Twin(NamedTuple):
    """`symbol` is looked for in mangled names, `shared` are bytes asked for at the launch, `loaded` those
    that a block loads in one iteration of its main loop (0: it has none)."""

    symbol: str
    warps: int
    shared: int
    loaded: int
    work: Callable[[int], Work]


@dataclass(frozen=True)
class Kernel:
    """Machine code of one instantiation, and how many of its blocks a multiprocessor holds."""

    symbol: str
    code: sass.Loop
    blocks: int


def _penalty(size: int) -> Callable[[int], Work]:
    """Strips of 16 rows and 256 columns (PENALTY_ROWS, PENALTY_COLUMNS); PenaltyTable::lay_out."""
    rows, columns, items = 16, 256, 4 * MULTIPROCESSORS

    def work(rank: int) -> Work:
        elements = LAYERS * WIDTH * WIDTH
        most = max(cdiv(elements, columns * items), rows)
        height = cdiv(cdiv(WIDTH, cdiv(WIDTH, most)), rows) * rows
        regions, across = cdiv(WIDTH, height), cdiv(WIDTH, columns)
        blocks, trips = LAYERS * regions * across, cdiv(height, rows)
        parts = 4 * LAYERS * rank * WIDTH * (regions + across)
        per_trip = rows * columns * size + rows * rank * 8
        return Work(
            blocks, (1, trips), elements * size + 2 * parts, trips * per_trip + 8 * rank * columns,
            rows * columns * size, floor_bytes=elements * size, floor_name=READ_F,
            rare=max(1 / regions, 1 / across),
        )  # fmt: skip

    return work


def _fisher(rank: int) -> Work:
    """128 x 128 of F (FISHER_TILE), 32 tokens a step, four stages, one split: the tiles fill the machine."""
    tile, step = 128, 32
    blocks, steps = (HIDDEN // tile) * (WIDTH // tile), cdiv(TOKENS, step)
    per_step = 2 * tile * step * 2
    return Work(
        blocks, (SAMPLES, steps), ROWS * (HIDDEN + WIDTH) * 2 + 8 * HIDDEN * WIDTH,
        SAMPLES * steps * per_step + 8 * tile * tile, 3 * per_step,
        floor_flops=2.0 * ROWS * HIDDEN * WIDTH, floor_name=WGRAD,
    )  # fmt: skip


def _walk(rank: int) -> Work:
    """Strips of 32 rows and 256 columns (WALK_COLUMNS), two blocks for every multiprocessor (the bindings'
    Plan)."""
    strip, columns, ranks = 32, 256, 16
    across = cdiv(HIDDEN, columns)
    most = max(1, 2 * MULTIPROCESSORS // across)
    region = cdiv(cdiv(ROWS, most), strip) * strip
    regions = cdiv(ROWS, region)
    parts = 4 * ranks * (across * ROWS + regions * HIDDEN)
    trips = region // strip
    return Work(
        regions * across, (1, trips), 2 * ROWS * HIDDEN + parts,
        trips * strip * (2 * columns + 8 * ranks) + 4 * ranks * columns, strip * columns * 2,
        floor_bytes=2 * ROWS * HIDDEN, floor_name=READ_X,
    )  # fmt: skip


def _square(rank: int) -> Work:
    """256 threads with four accesses of 16 bytes each (SQUARE_EACH)."""
    moved, each = 12 * HIDDEN * WIDTH, 256 * 4 * 4
    return Work(
        cdiv(HIDDEN * WIDTH, each), (), moved, 12 * each, 8 * each, floor_bytes=moved, floor_name=COPY
    )


def _symbol(precision: int, loads: int) -> str:
    return rf"ewc_penalty_kernelILNS0_9PrecisionE{precision}ELi16ELNS0_11FisherLoadsE{loads}ELb0E"


_PENALTY_SHARED = 68 << 10  # PenaltyLayout<P, 16>::BYTES with the ring of F, and at "medium"
_PENALTY_SHARED_MEDIUM = 52 << 10
TWINS = {
    "penalty fp32 highest": Twin(_symbol(0, 0), 8, _PENALTY_SHARED, 16384, _penalty(4)),
    "penalty fp32 high": Twin(_symbol(1, 0), 8, _PENALTY_SHARED, 16384, _penalty(4)),
    "penalty bf16 high": Twin(_symbol(1, 1), 8, _PENALTY_SHARED, 8192, _penalty(2)),
    "penalty bf16 medium": Twin(_symbol(2, 1), 8, _PENALTY_SHARED_MEDIUM, 8192, _penalty(2)),
    "u, dB": Twin(
        r"walk_kernelILNS0_9PrecisionE2ELi16ELb1ELb1ELb1E", 8, 4 * (8 * (256 + 512) + 256), 16384, _walk
    ),
    "Fisher per sample": Twin(
        r"fisher_kernelINS0_4bf16ELNS0_9PrecisionE2ELb0ELb1E", 8, 4 * 128 * 136 + 20, 16384, _fisher
    ),
    "square-add": Twin(r"fisher_square_kernelIfE", 8, 0, 0, _square),
}  # fmt: skip


def read(cubins: Iterable[Path]) -> dict[str, Kernel]:
    """The twins that the files hold, by name; files of other architectures are left out."""
    found: dict[str, Kernel] = {}
    for path in cubins:
        tool, disassembler = aot.cuobjdump(), aot.nvdisasm()
        assert tool is not None and disassembler is not None, "asked before"
        text = sass.disassemble(path, disassembler)
        if re.search(r"EF_CUDA_SM90\b|^\s*\.target\s+sm_90", text, re.MULTILINE) is None:
            continue
        printed = subprocess.run(
            [tool, "-res-usage", path], capture_output=True, text=True, check=True
        ).stdout
        usage = {
            symbol: (int(registers), int(shared))
            for symbol, registers, shared in re.findall(
                r"Function (\S+):\s+REG:(\d+) STACK:\d+ SHARED:(\d+)", printed
            )
        }
        for name, twin in TWINS.items():
            for symbol in usage:
                if re.search(twin.symbol, symbol):
                    code = sass.functions(text, symbol)[symbol]
                    _check(name, twin, code)
                    registers, shared = usage[symbol]
                    # cuobjdump counts the 1 KiB that the driver reserves.
                    fits = occupancy.occupancy(
                        ARCH, registers, twin.shared + max(shared - 1024, 0), twin.warps
                    )
                    found[name] = Kernel(symbol, code, fits.blocks)
    return found


def _check(name: str, twin: Twin, code: sass.Loop) -> None:
    own = main_nest(code)[-1].own()
    loaded = twin.warps * sum(step.instruction.global_bytes for step in own)
    if twin.loaded and not twin.loaded <= loaded < 2.5 * twin.loaded:
        raise BackendError(
            f"{name}: expected about {twin.loaded} bytes loaded by an iteration of its main loop, found "
            f"{loaded}: the description in nvcc_kernels.py is of another version of csrc/cuda"
        )
