# SPDX-License-Identifier: Apache-2.0
"""Small programs: a kernel around a few lines of PTX, and numbers as the bit patterns of its registers."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from . import machine, text

needed = pytest.mark.skipif(machine.missing() is not None, reason=str(machine.missing()))

_REGISTERS = """
.reg .pred %p<16>; .reg .b16 %h<32>; .reg .b32 %r<600>; .reg .b64 %d<64>;
.reg .b32 %tid, %cta, %lane, %warp; .reg .b64 %thread;
mov.u32 %tid, %tid.x; mov.u32 %cta, %ctaid.x; mov.u32 %lane, %laneid; shr.u32 %warp, %tid, 5;
"""


def kernel(body: str, parameters: int = 0, maps: int = 0) -> text.Kernel:
    """A kernel of `body`. Pointers come as %a, %b, ..., tensor maps as parameters m0, m1, ..., shared
    memory as `memory`."""
    names = "abcefg"[:parameters]
    listed = [f".param .u64 .ptr .global .align 4 p_{name}" for name in names]
    listed += [f".param .align 64 .b8 m{n}[128]" for n in range(maps)]
    loads = "".join(f".reg .b64 %{name}; ld.param.u64 %{name}, [p_{name}];\n" for name in names)
    return text.kernel(
        ".version 8.7\n.target sm_90a\n.address_size 64\n.extern .shared .align 1024 .b8 memory[];\n"
        f".visible .entry small({', '.join(listed)})\n{{{_REGISTERS}{loads}{body}\nret;\n}}\n"
    )


def run(
    body: str,
    *arguments: Any,
    grid: int = 1,
    threads: int = 32,
    shared: int = 0,
    fresh: Sequence[int] = (),
    limit: int = 200_000,
    **options: Any,
) -> machine.Report:
    """Execute `body` with tensors and tensor maps as `arguments`;
        the tensors numbered in `fresh` count as never
    written."""
    tensors = [a for a in arguments if isinstance(a, Tensor)]
    maps = [a for a in arguments if isinstance(a, machine.TensorMap)]
    built = machine.Machine()
    for n, tensor in enumerate(tensors):
        built.add(tensor, f"tensor {n}", initialised=n not in fresh)
    for one in maps:
        built.add(one.tensor, "source")
    code = kernel(body, len(tensors), len(maps))
    return built.run(code, (grid,), [*tensors, *maps], threads, shared, limit=limit, **options)


def kinds(body: str, *arguments: Any, seeds: Sequence[int] = (0, 1, 2), **options: Any) -> set[str]:
    """The kinds of findings in any of a few orders of execution."""
    found: set[str] = set()
    for seed in seeds:
        found |= run(body, *arguments, seed=seed, **options).kinds()
    return found


def evaluate(lines: Sequence[str], *inputs: Sequence[int]) -> list[list[int]]:
    """What each line leaves in its result for every element of `inputs`, patterns of 64 bits. A line names
    input n as %Xn (64 bits), %Wn (32), %Hn (16) or %Pn (predicate), and its result %X, %W, %H or %P."""
    count = len(inputs[0])
    padded = -(-count // 32) * 32
    given = [torch.from_numpy(np.resize(np.array(i, dtype=np.uint64), padded).view(np.int64)) for i in inputs]
    out = torch.zeros(len(lines), padded, dtype=torch.int64)
    body = [".reg .b64 %X<8>, %X, %at; .reg .b32 %W<8>, %W; .reg .b16 %H<8>, %H; .reg .pred %P<8>, %P;"]
    body.append("mad.lo.u32 %r0, %cta, 32, %tid; mul.wide.u32 %at, %r0, 8;")
    for n, name in enumerate("bcefg"[: len(inputs)]):
        body.append(f"add.u64 %d{n}, %{name}, %at; ld.global.u64 %X{n}, [%d{n}];")
        body.append(
            f"""mov.b64 {{%W{n}, %r1}}, %X{n}; mov.b32 {{%H{n}, %h1}}, %W{n}; and.b32 %r2, %W{n}, 1;
                setp.ne.u32 %P{n}, %r2, 0;"""
        )
    body.append("add.u64 %d9, %a, %at;")
    for line in lines:
        kind = line.replace("|", " ").split("%")[1][0]
        body.append(line)
        body.append(
            {
                "X": "",
                "W": "mov.b64 %X, {%W, 0};",
                "H": "mov.b64 %X, {%H, 0, 0, 0};",
                "P": "selp.b64 %X, 1, 0, %P;",
            }[kind]
        )
        body.append(f"st.global.b64 [%d9], %X; add.u64 %d9, %d9, {8 * padded};")
    report = run("\n".join(body), out, *given, grid=padded // 32)
    assert not report.findings, list(map(str, report.findings))
    return [[int(v) for v in row[:count]] for row in out.numpy().view(np.uint64)]


# ---- numbers

BITS = {"f16": 16, "bf16": 16, "f32": 32, "f64": 64}
_PRECISION = {"f16": (11, -14, 15), "bf16": (8, -126, 127), "f32": (24, -126, 127), "f64": (53, -1022, 1023)}


def number(pattern: int, kind: str) -> float:
    """The value of a pattern, exactly."""
    if kind == "bf16":
        pattern, kind = (pattern & 0xFFFF) << 16, "f32"
    code = {"f16": "<e", "f32": "<f", "f64": "<d"}[kind]
    size = BITS[kind] // 8
    return float(struct.unpack(code, (pattern & (1 << BITS[kind]) - 1).to_bytes(size, "little"))[0])


def rounded(value: Fraction | float, kind: str) -> float:
    """The nearest number of `kind`, of two as near the even one; exact numbers stay as they are."""
    if isinstance(value, float):
        if not math.isfinite(value) or value == 0:
            return value
        value = Fraction(value)
    precision, lowest, highest = _PRECISION[kind]
    exponent = abs(value.numerator).bit_length() - value.denominator.bit_length()
    exponent -= abs(value) < Fraction(2) ** exponent
    unit = Fraction(2) ** (max(exponent, lowest) - precision + 1)
    nearest = round(value / unit) * unit
    if abs(nearest) >= Fraction(2) ** (highest + 1):
        return math.inf if value > 0 else -math.inf
    return float(nearest) if nearest else math.copysign(0.0, value)


def pattern(value: float, kind: str) -> int:
    """The pattern of a number that `kind` has."""
    if kind == "bf16":
        return pattern(value, "f32") >> 16
    code = {"f16": "<e", "f32": "<f", "f64": "<d"}[kind]
    return int.from_bytes(struct.pack(code, value), "little")


def same(kind: str) -> Callable[[int, float], bool]:
    """Whether a pattern is that of a value; any NaN is like any other."""

    def equal(got: int, wanted: float) -> bool:
        if math.isnan(wanted):
            return math.isnan(number(got, kind))
        return got & (1 << BITS[kind]) - 1 == pattern(wanted, kind)

    return equal


def patterns(kind: str, count: int, seed: int = 0) -> list[int]:
    """Random patterns, with zeros, infinities, NaN, subnormal and extreme numbers and integers among them."""
    bits = BITS.get(kind) or int(kind[1:])
    draw = np.random.default_rng([seed, torch.initial_seed() % (1 << 32)])
    top = 1 << bits - 1
    special = [0, 1, 2, top - 1, top, top + 1, 2 * top - 1, 2 * top - 2, 7, bits, bits - 1, bits + 1]
    if kind in BITS:
        precision = _PRECISION[kind][0]
        field = (1 << bits - precision) - 1 << precision - 1  # of the exponent
        special = [0, 1, (1 << precision - 1) - 1, 1 << precision - 1, field - 1, field, field | 1]
        special += [pattern(v, kind) for v in (1.0, 0.5, 1.5, 2.5, 0.75, 3.0)]
        special += [s | top for s in special]
    values = [int(v) & 2 * top - 1 for v in draw.integers(0, 1 << 63, count * 2, dtype=np.uint64) * 2 + 1]
    near = [(v & 0xFF) if n % 3 else v for n, v in enumerate(values)] if kind not in BITS else values
    chosen = [special[int(draw.integers(len(special)))] if n % 2 else v for n, v in enumerate(near)]
    return (special + chosen)[:count] if seed == 0 else chosen[:count]
