# SPDX-License-Identifier: Apache-2.0
"""cvt between every pair of types, against exact arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from ptx import small

pytestmark = small.needed
COUNT = 160
INTEGERS = [f"{sign}{bits}" for sign in "su" for bits in (8, 16, 32, 64)]
FLOATS = ["f16", "bf16", "f32", "f64"]


def bits_of(kind: str) -> int:
    return int(kind.lstrip("bfsu"))


def letter(kind: str) -> str:
    return {8: "H", 16: "H", 32: "W", 64: "X"}[bits_of(kind)]


def whole(pattern: int, kind: str) -> int:
    bits = bits_of(kind)
    value = pattern & (1 << bits) - 1
    return value - (1 << bits) if kind[0] == "s" and value >> bits - 1 else value


@pytest.mark.parametrize("source", INTEGERS)
def test_from_integers(source: str) -> None:
    """Integers are cut or extended by the sign of their own type, and rounded to nearest in floats."""
    inputs = small.patterns(source, COUNT)
    values = [whole(p, source) for p in inputs]
    lines = [f"cvt.{to}.{source} %{letter(to)}, %{letter(source)}0;" for to in INTEGERS]
    lines += [f"cvt.rn.{to}.{source} %{letter(to)}, %{letter(source)}0;" for to in FLOATS]
    got = small.evaluate(lines, inputs)
    for to, row in zip([*INTEGERS, *FLOATS], got, strict=True):
        for value, result in zip(values, row, strict=True):
            if to in FLOATS:
                assert small.same(to)(result, small.rounded(Fraction(value), to) if value else 0.0), (
                    to,
                    value,
                )
            else:
                wide = max(bits_of(to), 16)  # of the register
                right = whole(value & (1 << bits_of(to)) - 1, to) & (1 << wide) - 1
                assert result == right, (to, value)


@pytest.mark.parametrize("source", FLOATS)
def test_to_integers(source: str) -> None:
    """Each rounding, clamped to the range of the result;
    NaN is zero, or the middle of 64 bits or of doubles."""
    inputs = small.patterns(source, COUNT)
    values = [small.number(p, source) for p in inputs]
    roundings = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}
    cases = [(to, mode) for to in INTEGERS for mode in roundings]
    lines = [f"cvt.{mode}.{to}.{source} %{letter(to)}, %{letter(source)}0;" for to, mode in cases]
    for (to, mode), row in zip(cases, small.evaluate(lines, inputs), strict=True):
        bits = bits_of(to)
        low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if to[0] == "s" else (0, (1 << bits) - 1)
        for value, result in zip(values, row, strict=True):
            if math.isnan(value):
                right = 1 << bits - 1 if source == "f64" or bits == 64 else 0
                right = whole(right, to)
            elif math.isinf(value):
                right = high if value > 0 else low
            else:
                right = min(max(roundings[mode](value), low), high)
            assert result == right & (1 << max(bits, 16)) - 1, (to, mode, value)


@pytest.mark.parametrize("source", FLOATS)
def test_between_floats(source: str) -> None:
    """Narrowing rounds to nearest, ties to even; widening is exact; integral roundings keep the type."""
    inputs = small.patterns(source, COUNT)
    for n in range(0, COUNT, 3):  # next to the middle between numbers of a narrower type
        if source in ("f32", "f64"):
            one = Fraction(1 + n % 7, 8) + 1
            spacing = Fraction(1, 2 ** (8 if n % 2 else 11))
            inputs[n] = small.pattern(
                small.rounded(
                    one + spacing * (n % 5) / 2 + Fraction((n % 3 - 1), 2 ** (23 if n % 4 else 40)), source
                ),
                source,
            )
    values = [small.number(p, source) for p in inputs]
    lines, kinds = [], []
    for to in FLOATS:
        if to != source:
            narrow = "rn." if small.BITS[to] <= small.BITS[source] else ""
            lines.append(f"cvt.{narrow}{to}.{source} %{letter(to)}, %{letter(source)}0;")
            kinds.append(to)
    for (to, line), row in zip(zip(kinds, lines, strict=True), small.evaluate(lines, inputs), strict=True):
        for value, result in zip(values, row, strict=True):
            assert small.same(to)(result, small.rounded(value, to)), (line, value)
    if source == "f32":
        for mode, function in {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}.items():
            row = small.evaluate([f"cvt.{mode}.f32.f32 %W, %W0;"], inputs)[0]
            for value, result in zip(values, row, strict=True):
                right = math.copysign(function(value), value) if math.isfinite(value) else value
                assert small.same("f32")(result, float(right)), (mode, value)


def test_to_matrix_types() -> None:
    """tf32 is rounded away from zero at ties; pairs take their upper half from the first operand."""
    inputs, second = small.patterns("f32", COUNT), small.patterns("f32", COUNT, 1)
    inputs[:4] = [0x3F801000, 0x3F800FFF, 0xBF803000, 0x7F7FFFFF]
    rows = small.evaluate(
        ["cvt.rna.tf32.f32 %W, %W0;", "cvt.rn.bf16x2.f32 %W, %W0, %W1;", "cvt.rn.f16x2.f32 %W, %W0, %W1;"],
        inputs,
        second,
    )
    for pattern, result in zip(inputs, rows[0], strict=True):
        value = small.number(pattern, "f32")
        if math.isnan(value):
            assert math.isnan(small.number(result, "f32"))
        else:
            assert result == (pattern + 0x1000 & 0xFFFFE000 if math.isfinite(value) else pattern), hex(
                pattern
            )
    for kind, row in (("bf16", rows[1]), ("f16", rows[2])):
        for high, low, result in zip(inputs, second, row, strict=True):
            for pattern, half in ((high, result >> 16), (low, result)):
                assert small.same(kind)(half, small.rounded(small.number(pattern, "f32"), kind)), hex(pattern)
