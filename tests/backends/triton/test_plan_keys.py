# SPDX-License-Identifier: Apache-2.0
"""A plan serves the calls that a host would treat alike, and no other call."""

from __future__ import annotations

import json
from typing import Any

import pytest
from launcher import stub
from ptx import separately

from fused_ewclora.backends import native

pytestmark = [
    separately.needed,
    pytest.mark.skipif(stub.missing() is not None, reason=str(stub.missing())),
    pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable())),
]
# Calls that differ in values, in addresses or in numbers that kernels take as they are.
SERVED = {
    "linear, same kind", "linear, x 16 bytes off", "linear, other seed", "linear, adapters shared",
    "linear, copies", "backward, same kind", "fisher, same kind", "fisher, weight", "fisher, other samples",
    "merge, same kind", "threshold, same kind", "threshold, kappa", "threshold, neighbours",
    "penalty, lambda",
}  # fmt: skip


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return dict(json.loads(separately.run("launcher.variations")))


def test_nothing_wrong(found: dict[str, Any]) -> None:
    """Whatever a plan serves is what Triton's launcher would have handed over: sizes, strides, alignment,
    dtypes, tensors that are missing or shared, numbers that hosts decide by, and which gradients are asked
    for."""
    assert {name: one for name, one in found.items() if one["wrong"] or not one["launches"]} == {}
    assert len(found) > 50


def test_served(found: dict[str, Any]) -> None:
    """Values, addresses and numbers that do not decide need no plan of their own."""
    assert {name for name, one in found.items() if one["served"]} == SERVED
