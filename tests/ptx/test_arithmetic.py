# SPDX-License-Identifier: Apache-2.0
"""Instructions on numbers, against exact arithmetic of Python, with every special number among them."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from ptx import small

pytestmark = small.needed
COUNT = 160


def whole(pattern: int, kind: str) -> int:
    """The integer of a pattern."""
    bits = int(kind[1:])
    value = pattern & (1 << bits) - 1
    return value - (1 << bits) if kind[0] == "s" and value >> bits - 1 else value


def quotient(a: int, b: int) -> int:
    """Division towards zero; all ones by zero."""
    return -1 if b == 0 else abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


INTEGER: dict[str, Callable[..., int]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul.lo": lambda a, b: a * b,
    "div": quotient,
    "rem": lambda a, b: a - b * quotient(a, b) if b else a,
    "min": min,
    "max": max,
    "mad.lo": lambda a, b, c: a * b + c,
    "neg": lambda a: -a,
    "abs": abs,
}


@pytest.mark.parametrize("kind", ["s16", "u16", "s32", "u32", "s64", "u64"])
def test_integers(kind: str) -> None:
    """Sums, products, quotients and shifts of every width, also beyond the width and by zero."""
    bits = int(kind[1:])
    letter, wide = {16: ("H", "W"), 32: ("W", "X"), 64: ("X", "")}[bits]
    inputs = [small.patterns(kind, COUNT, seed) for seed in range(3)]
    for n in range(1, COUNT, 5):
        inputs[1][n] = inputs[0][n]
    values = [[whole(p, kind) for p in i] for i in inputs]
    lines, wanted = [], []

    def case(name: str, result: str, operands: int, function: Callable[..., int], form: str = "") -> None:
        lines.append(form or f"{name} %{result}, {', '.join(f'%{letter}{n}' for n in range(operands))};")
        mask = (1 << {"H": 16, "W": 32, "X": 64}[result]) - 1
        wanted.append([function(*v) & mask for v in zip(*values[:operands], strict=True)])

    for name, function in INTEGER.items():
        if name in ("neg", "abs") and kind[0] == "u":
            continue
        operands = {"neg": 1, "abs": 1, "mad.lo": 3}.get(name, 2)
        case(f"{name}.{kind}", letter, operands, function)
    case(f"mul.hi.{kind}", letter, 2, lambda a, b: a * b >> bits)
    case(f"mad.hi.{kind}", letter, 3, lambda a, b, c: (a * b >> bits) + c)
    if wide:
        case(f"mul.wide.{kind}", wide, 2, lambda a, b: a * b)
        case(
            "", wide, 2, lambda a, b: a * b + (1 << bits) + 5,
            f"mad.wide.{kind} %{wide}, %{letter}0, %{letter}1, {(1 << bits) + 5};",
        )  # fmt: skip
    got = small.evaluate(lines, *inputs)
    for line, result, right in zip(lines, got, wanted, strict=True):
        assert result == right, line


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_bits(bits: int) -> None:
    """Logic, shifts, counts, fields, permutations and funnels."""
    letter = {16: "H", 32: "W", 64: "X"}[bits]
    full = (1 << bits) - 1
    a, b = (small.patterns(f"u{bits}", COUNT, seed) for seed in range(2))
    draw = np.random.default_rng(3)
    by, length = (
        [int(v) for v in draw.choice([0, 1, 5, 16, 31, 32, 33, 63, 64, 65, 255], COUNT)] for _ in "ab"
    )
    cases: list[tuple[str, Callable[[int, int, int, int], int]]] = []
    for name, function in (
        ("and", lambda x, y, s, n: x & y),
        ("or", lambda x, y, s, n: x | y),
        ("xor", lambda x, y, s, n: x ^ y),
    ):
        cases.append((f"{name}.b{bits} %{letter}, %{letter}0, %{letter}1;", function))
    cases.append((f"not.b{bits} %{letter}, %{letter}0;", lambda x, y, s, n: ~x))
    cases.append((f"shl.b{bits} %{letter}, %{letter}0, %W2;", lambda x, y, s, n: x << s))
    cases.append((f"shr.u{bits} %{letter}, %{letter}0, %W2;", lambda x, y, s, n: x >> s))
    cases.append((f"shr.b{bits} %{letter}, %{letter}0, %W2;", lambda x, y, s, n: x >> s))
    cases.append((f"shr.s{bits} %{letter}, %{letter}0, %W2;", lambda x, y, s, n: whole(x, f"s{bits}") >> s))
    if bits > 16:
        cases.append((f"clz.b{bits} %W, %{letter}0;", lambda x, y, s, n: bits - x.bit_length()))
        cases.append((f"popc.b{bits} %W, %{letter}0;", lambda x, y, s, n: x.bit_count()))

        def field(x: int, y: int, s: int, n: int, signed: bool) -> int:
            sign = signed and n > 0 and x >> min(s + n - 1, bits - 1) & 1
            return sum((x >> s + i & 1 if i < n and s + i < bits else sign) << i for i in range(bits))

        cases.append((f"bfe.u{bits} %{letter}, %{letter}0, %W2, %W3;", lambda *v: field(*v, False)))
        cases.append((f"bfe.s{bits} %{letter}, %{letter}0, %W2, %W3;", lambda *v: field(*v, True)))

        def put(x: int, y: int, s: int, n: int) -> int:
            place = (1 << n) - 1 << s
            return y & ~place | x << s & place

        cases.append((f"bfi.b{bits} %{letter}, %{letter}0, %{letter}1, %W2, %W3;", put))
    if bits == 32:
        both = lambda x, y: y << 32 | x  # noqa: E731
        cases.append(("shf.l.wrap.b32 %W, %W0, %W1, %W2;", lambda x, y, s, n: both(x, y) << (s & 31) >> 32))
        cases.append(("shf.r.wrap.b32 %W, %W0, %W1, %W2;", lambda x, y, s, n: both(x, y) >> (s & 31)))
        cases.append(
            ("shf.l.clamp.b32 %W, %W0, %W1, %W2;", lambda x, y, s, n: both(x, y) << min(s, 32) >> 32)
        )
        cases.append(("shf.r.clamp.b32 %W, %W0, %W1, %W2;", lambda x, y, s, n: both(x, y) >> min(s, 32)))

        def permuted(x: int, y: int, s: int, n: int) -> int:
            out = 0
            for i in range(4):
                byte = both(x, y) >> 8 * (y >> 4 * i & 7) & 255
                out |= ((byte >> 7) * 255 if y >> 4 * i & 8 else byte) << 8 * i
            return out

        cases.append(("prmt.b32 %W, %W0, %W1, %W1;", permuted))
        table = lambda x, y, s: x & y | ~x & s  # noqa: E731
        cases.append(
            (
                f"lop3.b32 %W, %W0, %W1, %W2, {table(0xF0, 0xCC, 0xAA) & 255};",
                lambda x, y, s, n: table(x, y, s),
            )
        )
    lines = [c[0] for c in cases]
    got = small.evaluate(lines, a, b, by, length)
    for (line, function), result in zip(cases, got, strict=True):
        mask = 0xFFFFFFFF if " %W," in line else full
        assert result == [function(*v) & mask for v in zip(a, b, by, length, strict=True)], line


def plain(name: str, a: Any, b: Any = 0.0, c: Any = 0.0) -> Any:
    """Of floats or fractions."""
    return {"add": lambda: a + b, "sub": lambda: a - b, "mul": lambda: a * b, "fma": lambda: a * b + c}[
        name
    ]()


def exact(name: str, kind: str, *values: float) -> float:
    """The result rounded once; what is not finite, and the sign of zero, are as in double precision."""
    with np.errstate(all="ignore"):
        loose = float(plain(name, *map(np.float64, values)))
    if not all(map(math.isfinite, values)):
        return loose
    result = plain(name, *map(Fraction, values))
    return small.rounded(result, kind) if result else math.copysign(0.0, loose)


def extreme(largest: bool, propagates: bool, a: float, b: float) -> float:
    if math.isnan(a) or math.isnan(b):
        return math.nan if propagates else b if math.isnan(a) else a
    ordered = sorted((a, b), key=lambda v: (v, math.copysign(1, v)))
    return ordered[-1] if largest else ordered[0]


@pytest.mark.parametrize("kind", ["f16", "bf16", "f32", "f64"])
def test_floats(kind: str) -> None:
    """Sums, products, fused products and extremes are rounded once, also subnormal ones."""
    letter = {16: "H", 32: "W", 64: "X"}[small.BITS[kind]]
    inputs = [small.patterns(kind, COUNT, seed) for seed in range(3)]
    for n in range(2, COUNT, 3):  # of sizes at which sums are rounded
        low = 1.0 + n / 128
        inputs[0][n], inputs[1][n] = (small.pattern(small.rounded(v, kind), kind) for v in (low, -1.5 * low))
        inputs[2][n] = small.pattern(small.rounded(low * 2.0 ** -(n % 24), kind), kind)
    values = [[small.number(p, kind) for p in i] for i in inputs]
    cases: list[tuple[str, int, Callable[..., float]]] = [
        (f"{name}.rn.{kind} %{letter}, {', '.join(f'%{letter}{n}' for n in range(operands))};", operands,
         lambda *v, name=name: exact(name, kind, *v))
        for name, operands in (("add", 2), ("sub", 2), ("mul", 2), ("fma", 3))
    ]  # fmt: skip
    for name in ("min", "max"):
        for mode in ("", ".NaN") if kind != "f64" else ("",):
            cases.append(
                (f"{name}{mode}.{kind} %{letter}, %{letter}0, %{letter}1;", 2,
                 lambda a, b, largest=name == "max", mode=mode: extreme(largest, bool(mode), a, b))
            )  # fmt: skip
    cases.append((f"neg.{kind} %{letter}, %{letter}0;", 1, lambda a: -a))
    cases.append((f"abs.{kind} %{letter}, %{letter}0;", 1, abs))
    equal = small.same(kind)
    for (line, operands, function), got in zip(
        cases, small.evaluate([c[0] for c in cases], *inputs), strict=True
    ):
        for result, *v in zip(got, *values[:operands], strict=True):
            assert equal(result, function(*v)), (line, v, small.number(result, kind))


def test_pairs() -> None:
    """Instructions on pairs of 16-bit numbers are those on each half."""
    for kind in ("f16", "bf16"):
        halves = [small.patterns(kind, COUNT, seed) for seed in range(6)]
        inputs = [
            [high << 16 | low for low, high in zip(halves[n], halves[n + 3], strict=True)] for n in range(3)
        ]
        lines = [
            f"fma.rn.{kind}x2 %W, %W0, %W1, %W2;",
            f"add.{kind}x2 %W, %W0, %W1;",
            f"max.{kind}x2 %W, %W0, %W1;",
        ]
        single = [
            f"fma.rn.{kind} %H, %H0, %H1, %H2;",
            f"add.{kind} %H, %H0, %H1;",
            f"max.{kind} %H, %H0, %H1;",
        ]
        low, high = small.evaluate(single, *halves[:3]), small.evaluate(single, *halves[3:])
        for row, low_row, high_row in zip(small.evaluate(lines, *inputs), low, high, strict=True):
            assert row == [a | b << 16 for a, b in zip(low_row, high_row, strict=True)]


def test_roots() -> None:
    """Quotients, roots, powers and logarithms: rounded ones exactly, approximate ones within three units."""
    a, b = small.patterns("f32", COUNT), small.patterns("f32", COUNT, 1)
    x, y = (np.array([small.number(p, "f32") for p in v]) for v in (a, b))
    with np.errstate(all="ignore"):
        exactly = {
            "div.rn.f32 %W, %W0, %W1;": np.float32(x) / np.float32(y),
            "sqrt.rn.f32 %W, %W0;": np.sqrt(np.float32(x)),
            "rcp.rn.f32 %W, %W0;": np.float32(1) / np.float32(x),
        }
        nearly = {
            "ex2.approx.f32 %W, %W0;": np.exp2(x),
            "lg2.approx.f32 %W, %W0;": np.log2(x),
            "rsqrt.approx.f32 %W, %W0;": 1 / np.sqrt(x),
            "sqrt.approx.f32 %W, %W0;": np.sqrt(x),
            "div.full.f32 %W, %W0, %W1;": x / y,
        }
        nearly = {line: np.float32(v) for line, v in nearly.items()}
    rows = small.evaluate([*exactly, *nearly], a, b)
    equal = small.same("f32")
    for row, (line, wanted) in zip(rows, exactly.items(), strict=False):
        assert all(equal(g, float(w)) for g, w in zip(row, wanted, strict=True)), line
    for row, (line, wanted) in zip(rows[len(exactly) :], nearly.items(), strict=True):
        got = np.array(row, dtype=np.uint64).astype(np.uint32).view(np.float32)
        np.testing.assert_allclose(got, wanted, rtol=4e-7, atol=1e-44, err_msg=line)


def test_flushing() -> None:
    """With .ftz, subnormal operands and results are zeros with their signs; without, they stay."""
    tiny, small_one = 0x00000001, 0x00800000  # the least number, and the least normal one
    half = 0x3F000000
    inputs = [[tiny, tiny | 1 << 31, small_one, small_one | 1 << 31, 0x3F800000], [half] * 5]
    got = small.evaluate(
        ["mul.ftz.f32 %W, %W0, %W1;", "mul.f32 %W, %W0, %W1;", "abs.ftz.f32 %W, %W0;",
         "setp.gt.ftz.f32 %P, %W0, 0f00000000;",
         "setp.gt.f32 %P, %W0, 0f00000000;", "fma.rn.ftz.f32 %W, %W0, %W1, %W0;"],
        *inputs,
    )  # fmt: skip
    assert got[0] == [0, 1 << 31, 0, 1 << 31, half]
    assert got[1] == [0, 1 << 31, 0x00400000, 0x80400000, half]
    assert got[2] == [0, 0, small_one, small_one, 0x3F800000]
    assert got[3] == [0, 0, 1, 0, 1]
    assert got[4] == [1, 0, 1, 0, 1]
    assert got[5] == [0, 1 << 31, 0x00C00000, 0x80C00000, 0x3FC00000]


RELATIONS: dict[str, Callable[[Any, Any], bool]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a < b or a > b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}


@pytest.mark.parametrize("kind", ["s16", "u16", "s32", "u32", "s64", "u64", "f16", "bf16", "f32", "f64"])
def test_comparisons(kind: str) -> None:
    """Every relation, ordered and unordered, its complement in the second result, and selections by it."""
    letter = {16: "H", 32: "W", 64: "X"}[int(kind.lstrip("bfsu"))]
    inputs = [small.patterns(kind, COUNT, seed) for seed in range(2)]
    for n in range(1, COUNT, 4):
        inputs[1][n] = inputs[0][n]
    float_kind = kind in small.BITS
    a, b = ([small.number(p, kind) if float_kind else whole(p, kind) for p in i] for i in inputs)
    relations = dict(RELATIONS)
    unordered = (
        [math.isnan(x) or math.isnan(y) for x, y in zip(a, b, strict=True)] if float_kind else [False] * COUNT
    )
    lines, wanted = [], []
    for name, function in relations.items():
        right = [function(x, y) for x, y in zip(a, b, strict=True)]
        lines += [
            f"setp.{name}.{kind} %P, %{letter}0, %{letter}1;",
            f"setp.{name}.{kind} _|%P, %{letter}0, %{letter}1;",
        ]
        wanted += [right, [not r for r in right]]
        if float_kind:
            lines.append(f"setp.{name}u.{kind} %P, %{letter}0, %{letter}1;")
            wanted.append([r or u for r, u in zip(right, unordered, strict=True)])
    if float_kind:
        lines += [
            f"setp.num.{kind} %P, %{letter}0, %{letter}1;",
            f"setp.nan.{kind} %P, %{letter}0, %{letter}1;",
        ]
        wanted += [[not u for u in unordered], unordered]
    elif kind[0] == "u":
        for name, like in (("lo", "lt"), ("ls", "le"), ("hi", "gt"), ("hs", "ge")):
            lines.append(f"setp.{name}.{kind} %P, %{letter}0, %{letter}1;")
            wanted.append([relations[like](x, y) for x, y in zip(a, b, strict=True)])
    for line, got, right in zip(lines, small.evaluate(lines, *inputs), wanted, strict=True):
        assert got == [int(r) for r in right], line


def test_selections() -> None:
    """selp, and logic on predicates with negated operands."""
    a, b = small.patterns("u64", COUNT), small.patterns("u64", COUNT, 1)
    got = small.evaluate(
        ["selp.b64 %X, %X0, %X1, %P0;", "selp.f32 %W, %W0, %W1, %P1;", "and.pred %P, %P0, %P1;",
         "or.pred %P, %P0, !%P1;",
         "xor.pred %P, %P0, %P1;", "not.pred %P, %P0;", "mov.pred %P, %P1;"],
        a, b,
    )  # fmt: skip
    pairs = list(zip(a, b, strict=True))
    assert got[0] == [x if x & 1 else y for x, y in pairs]
    assert got[1] == [(x if y & 1 else y) & 0xFFFFFFFF for x, y in pairs]
    assert got[2:] == [
        [x & y & 1 for x, y in pairs],
        [x & 1 | 1 - (y & 1) for x, y in pairs],
        [(x ^ y) & 1 for x, y in pairs],
        [1 - (x & 1) for x in a],
        [y & 1 for y in b],
    ]
