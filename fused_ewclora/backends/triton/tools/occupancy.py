# SPDX-License-Identifier: Apache-2.0
"""How many thread blocks share a multiprocessor, from the resources that a compiled kernel states.

Limits are those of the CUDA programming guide (table of compute capabilities) and of AMD's CDNA3 instruction
set; the arithmetic is that of NVIDIA's occupancy calculator.
"""

from __future__ import annotations

from typing import NamedTuple

KIB = 1024
PARTITIONS = 4  # schedulers of a multiprocessor (SIMDs of a compute unit); a warp lives in one of them


class Limits(NamedTuple):
    """What one multiprocessor has, and what one block may take of it."""

    shared_per_block: int  # bytes
    shared: int  # bytes, of one multiprocessor
    reserved: int  # bytes of shared memory that every block costs besides its own
    registers: int  # 32-bit registers of one lane in one partition
    register_unit: int  # registers of a lane are allocated in multiples of it
    warps: int
    blocks: int
    tensor_memory: int = 0  # columns


LIMITS = {
    "sm_80": Limits(163 * KIB, 164 * KIB, KIB, 512, 8, 64, 32),
    "sm_86": Limits(99 * KIB, 100 * KIB, KIB, 512, 8, 48, 16),
    "sm_90": Limits(227 * KIB, 228 * KIB, KIB, 512, 8, 64, 32),
    "sm_100": Limits(227 * KIB, 228 * KIB, KIB, 512, 8, 64, 32, 512),
    # Vector registers, unified with accumulation registers; at most 8 waves a SIMD.
    "gfx942": Limits(64 * KIB, 64 * KIB, 0, 512, 8, 32, 32),
}
SHARED_UNIT = 128  # bytes


class Occupancy(NamedTuple):
    """Blocks and warps that run side by side on one multiprocessor, and which resource says so."""

    blocks: int
    warps: int
    share: float  # of the warps that the multiprocessor can hold
    limited_by: str


def _ceil(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def occupancy(arch: str, registers: int, shared: int, num_warps: int, tensor_memory: int = 0) -> Occupancy:
    """Occupancy of blocks of `num_warps` warps, each lane with `registers`, each block with `shared` bytes
    and `tensor_memory` columns. blocks = 0: a single block asks for more than there is.

    >>> occupancy("sm_90", registers=168, shared=100 * 1024, num_warps=8)
    Occupancy(blocks=1, warps=8, share=0.125, limited_by='registers')
    """
    limits = LIMITS[arch]
    # 256 registers per warp are 8 per lane; a block starts if its warps, evened out over partitions, fit.
    per_lane = max(_ceil(registers, limits.register_unit), limits.register_unit)
    resident = limits.registers // per_lane * PARTITIONS
    room = {
        "registers": resident // num_warps if _ceil(num_warps, PARTITIONS) <= resident else 0,
        "warps": limits.warps // num_warps,
        "blocks": limits.blocks,
    }
    block_shared = _ceil(shared + limits.reserved, SHARED_UNIT)
    if block_shared:
        room["shared memory"] = limits.shared // block_shared if shared <= limits.shared_per_block else 0
    if tensor_memory:
        room["tensor memory"] = limits.tensor_memory // tensor_memory
    limited_by = min(room, key=lambda name: room[name])
    blocks = room[limited_by]
    return Occupancy(blocks, blocks * num_warps, blocks * num_warps / limits.warps, limited_by)
