# SPDX-License-Identifier: Apache-2.0
"""Profiling costs nothing while it is off, counted: the calls and instructions that an eager call of every
operation executes are the same where `profiling` was never imported and where it was enabled and disabled."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

COUNT = """
import json, sys
import torch
from fused_ewclora import functional as FE

a, b, fisher = torch.randn(2, 4, requires_grad=True), torch.randn(3, 2, requires_grad=True), torch.rand(3, 4)
x, weight, bias = torch.randn(5, 4, requires_grad=True), torch.randn(3, 4), torch.randn(3)
frozen = [t.detach() for t in (a, b)]
OPS = {
    "lora_linear": lambda: FE.lora_linear(x, weight, bias, a, b).sum().backward(),
    "ewc_penalty": lambda: FE.ewc_penalty([fisher], [a], [b]).backward(),
    "fisher_accumulate_": lambda: FE.fisher_accumulate_(fisher, x.detach(), torch.ones(5, 3)),
    "merge_": lambda: FE.merge_(weight, *frozen, 1e-3),
    "soft_threshold_": lambda: FE.soft_threshold_(bias, 1e-3),
}

def counted(call):
    functions, instructions = [], 0

    def profile(frame, event, arg):
        if event in ("call", "c_call"):
            functions.append(arg.__name__ if event == "c_call" else frame.f_code.co_name)

    def trace(frame, event, arg):
        nonlocal instructions
        frame.f_trace_opcodes = True
        instructions += event == "opcode"
        return trace

    for _ in range(3):  # what is cached at the first call is not part of a call
        call()
    sys.setprofile(profile)
    call()
    sys.setprofile(None)
    sys.settrace(trace)
    call()
    sys.settrace(None)
    return functions, instructions

def all_counted():
    return {op: counted(call) for op, call in OPS.items()}

never = all_counted()
assert "fused_ewclora.profiling" not in sys.modules
from fused_ewclora import profiling
imported = all_counted()
with profiling.enable():
    on = all_counted()
within = all_counted()
profiling.enable()
profiling.disable()
off = all_counted()
print(json.dumps([never, imported, on, within, off]))
"""


@pytest.fixture(scope="module")
def counts() -> list[dict[str, list]]:
    ran = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, check=True)
    return json.loads(ran.stdout)


def test_off_costs_nothing(counts: list[dict[str, list]]):
    """Calls and instructions are those without profiling."""
    never, imported, _, after, off = counts
    for op, (functions, instructions) in never.items():
        assert len(functions) > 5 and instructions > 50, op
        assert imported[op] == after[op] == off[op] == [functions, instructions], op


def test_on_is_counted(counts: list[dict[str, list]]):
    """The count sees profiling while it is on."""
    never, _, on, *_ = counts
    for op, (functions, instructions) in on.items():
        assert len(functions) > len(never[op][0]) and instructions > never[op][1], op
        assert any("record_function" in name for name in functions), op
