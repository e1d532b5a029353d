# SPDX-License-Identifier: Apache-2.0
"""Reads machine code of NVIDIA GPUs, as `nvdisasm` prints it, into loops with their instructions.

A function becomes a tree of natural loops (a back edge whose target dominates its source, so that code that a
compiler moved out of the line, such as the retry of a wait, makes no loop of its own). A loop holds the
instructions of one iteration, in order, along the longest way through its body: where two ways part, the
longer one counts, and nothing counts twice.
"""

from __future__ import annotations

import functools
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

_LINE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_LABEL = re.compile(r"^\s*(\.L_x?_?\w+|\.text\.\S+|[\w$]+):\s*$")
_TARGET = re.compile(r"`\((\.L\w+)\)")
_WIDTHS = {"64": 2, "128": 4}  # transactions of 128 bytes that 32 lanes make with accesses of so many bits
_MATRICES = {"2": 2, "4": 4}  # 8 x 8 matrices of one ldmatrix
_MMA = {"1684": 16 * 8 * 4, "1688": 16 * 8 * 8, "16816": 16 * 8 * 16, "16832": 16 * 8 * 32}
SPIN = 12  # instructions; a loop that only waits is shorter

# Unit -> the instructions it executes, by the name before the first dot. What is in none is "control":
# branches, barriers, the uniform datapath.
UNITS: Mapping[str, frozenset[str]] = {
    "fma": frozenset({"FFMA", "FADD", "FMUL", "FFMA2", "FADD2", "FMUL2", "HFMA2", "HADD2", "HMUL2"}),
    "imad": frozenset({"IMAD", "IDP", "IMUL"}),
    "alu": frozenset({
        "IADD3", "IADD", "LEA", "LOP3", "LOP", "SHF", "SEL", "ISETP", "FSETP", "FSEL", "FMNMX", "FMNMX3",
        "IMNMX", "PRMT", "VIADD", "VIADDMNMX", "VIMNMX", "VIMNMX3", "MOV", "PLOP3", "P2R", "R2P", "SGXT",
        "IABS", "BMSK", "F2FP", "HSETP2", "FCHK", "CSEL",
    }),
    "tensor": frozenset({"HMMA", "IMMA", "DMMA", "QMMA", "HGMMA", "IGMMA", "QGMMA", "UTCHMMA"}),
    "special": frozenset({"MUFU", "I2F", "F2I", "F2F", "I2I", "I2FP", "FRND", "POPC", "FLO", "BREV"}),
    "double": frozenset({"DADD", "DMUL", "DFMA", "DSETP"}),
    "shared": frozenset({"LDS", "STS", "LDSM", "STSM", "ATOMS", "MOVM"}),
    "shuffle": frozenset({"SHFL", "REDUX", "MATCH"}),
    "global": frozenset({
        "LDG", "STG", "LDGSTS", "LD", "ST", "LDL", "STL", "RED", "REDG", "ATOM", "ATOMG", "UTMALDG",
        "UTMASTG", "UTMAREDG", "UBLKCP",
    }),
}  # fmt: skip
_UNIT = {name: unit for unit, names in UNITS.items() for name in names}


class Product(NamedTuple):
    """What one warp's instruction does on the matrix units."""

    flops: int
    operands: str  # "tf32", "half" (16 bits) or "other"
    asynchronous: bool  # of a warp group, which goes on meanwhile


class Instruction(NamedTuple):
    """One instruction; `opcode` with its modifiers, `guard` the predicate that it depends on or ""."""

    opcode: str
    operands: str = ""
    guard: str = ""

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def unit(self) -> str:
        return _UNIT.get(self.name, "control")

    @property
    def product(self) -> Product | None:
        """None where it is none, or of a shape that the text does not say (tcgen05)."""
        words = self.opcode.split(".")
        operands = "tf32" if "TF32" in words else "half" if {"BF16", "F16", "F32"} & set(words) else "other"
        if words[0] == "HMMA" and words[1] in _MMA:
            return Product(2 * _MMA[words[1]], operands, False)
        if words[0] == "HGMMA" and (shape := re.fullmatch(r"(\d+)x(\d+)x(\d+)", words[1])):
            m, n, k = map(int, shape.groups())
            return Product(2 * m * n * k // 4, operands, True)
        return None

    @property
    def shared_wavefronts(self) -> float:
        """Transactions of 128 bytes with shared memory that a warp's instruction makes at least."""
        words = self.opcode.split(".")
        if words[0] == "HGMMA" and self.product is not None:
            m, n, _ = map(int, words[1].split("x"))
            first_in_shared = "gdesc" in self.operands.split(",")[1]
            # 32 bytes of every row of both operands, for four warps together.
            return (n + (m if first_in_shared else 0)) * 32 / 128 / 4
        if words[0] in ("LDSM", "STSM"):
            return _MATRICES.get(words[-1], 1)
        if words[0] in ("LDS", "STS", "ATOMS", "LDGSTS"):
            return next((_WIDTHS[word] for word in words if word in _WIDTHS), 1)
        return 0

    @property
    def cached_wavefronts(self) -> int:
        """Transactions of 128 bytes with the first-level cache at least."""
        words = self.opcode.split(".")
        if words[0] in ("LDG", "STG", "LD", "ST", "LDL", "STL", "RED", "REDG", "ATOM", "ATOMG"):
            return next((_WIDTHS[word] for word in words if word in _WIDTHS), 1)
        return 0

    @property
    def global_bytes(self) -> int:
        """Bytes that 32 lanes load from memory; what a bulk copy brings is not in the text."""
        if self.name not in ("LDG", "LD", "LDGSTS"):
            return 0
        words = self.opcode.split(".")
        size = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
        return 32 * next((size[word] for word in words[1:] if word in size), 4)

    @property
    def is_barrier(self) -> bool:
        """Whether all warps of the block wait for one another."""
        return self.name == "BAR" and ("SYNC" in self.opcode or "RED" in self.opcode)

    @property
    def drains(self) -> bool:
        """Whether it waits until nothing of the asynchronous products is left."""
        return self.opcode.startswith("WARPGROUP.DEPBAR") and self.operands.endswith("0x0")

    @property
    def is_bulk_copy(self) -> bool:
        return self.name in ("UTMALDG", "UBLKCP")


@dataclass(frozen=True)
class Step:
    """An instruction of one iteration; `certain`: no way through the loop leaves it out."""

    instruction: Instruction
    certain: bool


@dataclass(frozen=True)
class Loop:
    """One iteration: instructions and inner loops in order. `waits`: it does nothing but wait for others."""

    steps: tuple[Step | Loop, ...]
    waits: bool = False

    def own(self) -> Iterator[Step]:
        """The instructions that are in no inner loop."""
        return (step for step in self.steps if isinstance(step, Step))

    @functools.cached_property
    def inner(self) -> tuple[Loop, ...]:
        """The loops directly inside, without those that only wait."""
        return tuple(step for step in self.steps if isinstance(step, Loop) and not step.waits)

    def nest(self) -> Iterator[tuple[Loop, ...]]:
        """Every loop with those around it, outermost first."""
        yield (self,)
        for loop in self.inner:
            for path in loop.nest():
                yield (self, *path)

    def count(self) -> dict[str, int]:
        """Instructions of one iteration by unit, without inner loops."""
        counts: dict[str, int] = {}
        for step in self.own():
            counts[step.instruction.unit] = counts.get(step.instruction.unit, 0) + 1
        return counts

    def total(self) -> int:
        """Instructions of one iteration, without inner loops."""
        return sum(1 for _ in self.own())


@dataclass
class _Block:
    """Instructions that run one after the other."""

    instructions: list[Instruction]
    next: list[int]


def disassemble(cubin: Path, tool: Path | str) -> str:
    """The text of `nvdisasm` for a file of machine code."""
    command = [str(tool), "-c", str(cubin)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def functions(text: str, only: str | None = None) -> dict[str, Loop]:
    """Kernels of a disassembly by symbol, or one of them."""
    return {name: _tree(_blocks(lines)) for name, lines in _sections(text) if only in (None, name)}


def _sections(text: str) -> Iterator[tuple[str, list[str]]]:
    """(symbol, lines) of every kernel; what a kernel calls follows in its lines."""
    name, lines = "", list[str]()
    for line in text.splitlines():
        if line.startswith(".text.") and line.rstrip().endswith(":"):
            if name:
                yield name, lines
            name, lines = line.strip()[len(".text.") : -1], []
        elif name:
            lines.append(line)
    if name:
        yield name, lines


def _blocks(lines: Iterable[str]) -> list[_Block]:
    """Basic blocks, the first one is entered; successors are positions in the list."""
    labels: dict[str, int] = {}
    found: list[Instruction] = []
    for line in lines:
        if (label := _LABEL.match(line)) is not None:
            labels[label.group(1)] = len(found)
        elif (match := _LINE.search(line)) is not None:
            found.append(Instruction(match.group(2), match.group(3), match.group(1) or ""))
    if not found:
        return []
    after, reconverge = list[list[int]](), dict[str, int]()
    for place, instruction in enumerate(found):
        after.append(_next(instruction, place, labels, reconverge))
    ends = [nexts != [p + 1] or found[p].name == "EXIT" for p, nexts in enumerate(after)]
    starts = sorted(
        {0, *labels.values(), *(p + 1 for p, end in enumerate(ends) if end)} & set(range(len(found)))
    )
    at = {start: position for position, start in enumerate(starts)}
    stops = [*starts[1:], len(found)]
    return [
        _Block(found[start:stop], [at[n] for n in after[stop - 1] if n in at])
        for start, stop in zip(starts, stops, strict=True)
    ]


def _next(
    instruction: Instruction, place: int, labels: Mapping[str, int], reconverge: dict[str, int]
) -> list[int]:
    """Where a thread may go on. Calls of functions return."""
    name, target = instruction.name, _TARGET.search(instruction.operands)
    to = labels.get(target.group(1)) if target else None
    if name == "BSSY" and to is not None:
        reconverge[instruction.operands.split(",")[0]] = to
    elif name == "BSYNC":
        return [reconverge.get(instruction.operands, place + 1)]
    elif name in ("EXIT", "RET", "BRX", "JMX", "KILL", "BPT"):
        return [place + 1] if instruction.guard not in ("", "@PT", "@UPT") else []
    elif name == "CALL" and to is not None:
        return [place + 1, to]  # ptxas leaves loops by such calls, too, which never return
    elif name in ("BRA", "JMP") and to is not None:
        # `@P0 BRA P1, target` and `BRA.U UP0, target` have conditions, too.
        plain = not instruction.guard and instruction.operands.startswith("`")
        return [to] if plain else [place + 1, to]
    return [place + 1]


def _order(blocks: list[_Block]) -> list[int]:
    """Blocks that can be reached, each before those that follow it (back edges aside)."""
    done: list[int] = []
    seen = {0}
    stack = [(0, iter(blocks[0].next))]
    while stack:
        node, rest = stack[-1]
        following = next((n for n in rest if n not in seen), None)
        if following is None:
            done.append(node)
            stack.pop()
        else:
            seen.add(following)
            stack.append((following, iter(blocks[following].next)))
    return done[::-1]


def _dominators(blocks: list[_Block], order: list[int]) -> dict[int, set[int]]:
    """For each block those that every way to it passes."""
    before: dict[int, list[int]] = {node: [] for node in order}
    for node in order:
        for following in blocks[node].next:
            before[following].append(node)
    found = {node: set(order) for node in order}
    found[0] = {0}
    changed = True
    while changed:
        changed = False
        for node in order[1:]:
            new = set.intersection(*(found[b] for b in before[node])) | {node}
            if new != found[node]:
                found[node], changed = new, True
    return found


def _bodies(
    blocks: list[_Block], order: list[int], dominators: Mapping[int, set[int]]
) -> dict[int, set[int]]:
    """Header -> blocks of the natural loops."""
    before: dict[int, list[int]] = {node: [] for node in order}
    for node in order:
        for following in blocks[node].next:
            before[following].append(node)
    bodies: dict[int, set[int]] = {}
    for node in order:
        for header in blocks[node].next:
            if header in dominators[node]:
                body = bodies.setdefault(header, {header})
                stack = [node]
                while stack:
                    if (one := stack.pop()) not in body:
                        body.add(one)
                        stack += before[one]
    return bodies


def _tree(blocks: list[_Block]) -> Loop:
    if not blocks:
        return Loop(())
    order = _order(blocks)
    bodies = _bodies(blocks, order, _dominators(blocks, order))
    return _loop(blocks, order, bodies, 0, set(order), whole=True)


def _loop(
    blocks: list[_Block],
    order: list[int],
    bodies: Mapping[int, set[int]],
    header: int,
    body: set[int],
    whole: bool = False,
) -> Loop:
    """The tree of the blocks `body`; `whole`: of the function, whose first block may be a header as well."""
    inside = {h: b for h, b in bodies.items() if b <= body and (whole or h != header)}
    outermost = {h: b for h, b in inside.items() if not any(h in o and h != g for g, o in inside.items())}
    owner = {node: h for h, b in outermost.items() for node in b}
    loops = {h: _loop(blocks, order, bodies, h, b) for h, b in outermost.items()}
    place = {node: i for i, node in enumerate(order)}
    nodes = [node for node in order if node in body and owner.get(node, node) == node]
    nexts: dict[int, list[int]] = {node: [] for node in nodes}
    last = set()  # where an iteration, or the function, ends
    for node in order:
        if node not in body:
            continue
        mine = owner.get(node, node)
        if not blocks[node].next or (not whole and header in blocks[node].next):
            last.add(mine)
        for n in blocks[node].next:
            other = owner.get(n, n)
            if n in body and other != mine and other != header and place[other] > place[mine]:
                nexts[mine].append(other)
    # Threads that have nothing to do leave early; they do not count, unless nothing else ends the function.
    last = last or {owner.get(n, n) for n in body if blocks[n].instructions[-1].name == "EXIT"}
    path = _longest(nodes, nexts, last, {n: _weight(blocks[n], loops.get(n)) for n in nodes})
    steps: list[Step | Loop] = []
    for node in path:
        if node in loops:
            steps.append(loops[node])
        else:
            certain = not _avoidable(node, nodes, nexts, last)
            steps += [Step(i, certain) for i in blocks[node].instructions]
    return Loop(tuple(steps), not whole and _waits(blocks[n] for n in body))


def _weight(block: _Block, loop: Loop | None) -> int:
    if loop is None:
        return len(block.instructions)
    return -SPIN if loop.waits else 1 << 20  # ways lead through loops, but not through retries of waits


def _longest(
    nodes: list[int], nexts: Mapping[int, list[int]], last: set[int], weights: Mapping[int, int]
) -> list[int]:
    """The heaviest way from the first node to one of `last`; nodes come in topological order."""
    best: dict[int, tuple[int, list[int]]] = {}
    for node in reversed(nodes):
        ways = [best[n] for n in nexts[node] if n in best]
        if node in last:
            ways.append((0, []))
        if ways:
            length, way = max(ways, key=lambda found: found[0])
            best[node] = (length + weights[node], [node, *way])
    return best[nodes[0]][1] if nodes[0] in best else nodes[:1]


def _avoidable(node: int, nodes: list[int], nexts: Mapping[int, list[int]], last: set[int]) -> bool:
    """Whether a way from the first node to one of `last` passes by `node`."""
    if node == nodes[0]:
        return False
    seen, stack = {nodes[0]}, [nodes[0]]
    while stack:
        one = stack.pop()
        if one in last:
            return True
        for n in nexts[one]:
            if n not in seen and n != node:
                seen.add(n)
                stack.append(n)
    return False


def _waits(body: Iterable[_Block]) -> bool:
    """A short loop around a wait for a barrier object, or around a strong load or atomic."""
    found = [i for block in body for i in block.instructions]
    polls = any(
        i.name == "SYNCS" or i.name.startswith("ATOM") or (i.name in ("LD", "LDG") and "STRONG" in i.opcode)
        for i in found
    )
    works = any(i.unit in ("tensor", "fma") or i.name in ("STG", "ST", "STS") for i in found)
    return polls and not works and len(found) <= SPIN
