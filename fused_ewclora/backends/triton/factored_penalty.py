# SPDX-License-Identifier: Apache-2.0
"""The penalty of factored Fishers on Triton: the tables of `ewc_penalty`, with a program for each adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import triton.language as tl
from torch import Tensor

from fused_ewclora.kernels import factored_penalty as kernels

from ...reference import arguments
from . import tables
from .ewc_penalty import Group, Member, Structure, penalty, type_options
from .launch import arch, precision

_FIELDS = {  # column of the table by name
    name: value.value
    for name, value in vars(kernels).items()
    if name.isupper() and name != "FIELDS" and isinstance(value, tl.constexpr)
}


def factored_penalty(
    fishers: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    scale_factors: Sequence[float],
    ewc_lambda: float,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """Loss (0-d) and flat gradients, fp32; see `ops.schemas`."""
    return penalty(_FACTORED, fishers, lora_as, lora_bs, scales, scale_factors, ewc_lambda, needs)


def _group(indices: tuple[int, ...], members: Sequence[Member], place: Callable[[Tensor], Tensor]) -> Group:
    like = members[0].a
    rp = max(16, 1 << (max(member.a.shape[0] for member in members) - 1).bit_length())
    config = tables.lookup(f"factored_penalty_kernel:{precision()}", arch(like), like.dtype, rp)
    options = {**config, **type_options(members[0]), "RP": rp, "PRECISION": precision()}
    del options["FISHER_TYPE"]  # sums are fp32
    options["NEED_S"] = any(member.places[2] >= 0 for member in members)
    table, floats = _layout(members, rp)
    items = torch.arange(len(members), dtype=torch.int32)
    return Group(indices, place(table), place(items), floats, 1, options)


def _layout(members: Sequence[Member], rp: int) -> tuple[Tensor, int]:
    """The table and the size of the workspace, where a partial loss of each adapter comes first."""
    table = torch.zeros(len(members), kernels.FIELDS.value, dtype=torch.int64)
    floats = len(members)
    for row, member in zip(table, members, strict=True):
        fields = _fields(member)
        for name, size in {"PART_A": rp * rp, "PART_B": rp * rp, "PART_S": rp}.items():
            fields[name], floats = floats, floats + size
        for name, value in fields.items():
            row[_FIELDS[name]] = value
    return table, floats


def _fields(member: Member) -> dict[str, int]:
    """Pointers, sizes, strides and the places of the gradients of one adapter."""
    rows, a, b, s, place, columns = member
    assert rows is not None and columns is not None
    return {
        "LORA_A": a.data_ptr(), "LORA_B": b.data_ptr(), "SCALE": 0 if s is None else s.data_ptr(),
        "ROW_SUMS": rows.data_ptr(), "COLUMN_SUMS": columns.data_ptr(),
        "D_OUT": b.shape[0], "D_IN": a.shape[1], "RANK": a.shape[0],
        "A_0": a.stride(0), "A_1": a.stride(1), "B_0": b.stride(0), "B_1": b.stride(1),
        "SCALE_0": 0 if s is None or s.dim() == 0 else s.stride(0),
        "ROW_SUMS_0": rows.stride(0), "COLUMN_SUMS_0": columns.stride(0),
        "GRAD_A": place[0], "GRAD_B": place[1], "GRAD_S": place[2],
        "SCALAR": int(s is not None and s.dim() == 0),
    }  # fmt: skip


_FACTORED = Structure(kernels.factored_penalty_kernel, arguments.kronecker_penalty, _group, fishers=2)
