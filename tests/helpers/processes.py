# SPDX-License-Identifier: Apache-2.0
"""Checks that run in several processes with gloo, each of which writes FOLDER/RANK.json: name of the check ->
None, or why it failed."""

from __future__ import annotations

import gc
import json
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import torch.distributed as dist

import fused_ewclora as fe

Results = list[dict[str, str | None]]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launched(script: str | None, world: int, folder: Path, *arguments: Path) -> Results:
    """What every process of `python script folder *arguments` said about every check."""
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(world),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(fe.__file__).parents[1]), str(Path(__file__).parent)]),
    }
    command = [sys.executable, str(script), str(folder), *map(str, arguments)]
    workers = [subprocess.Popen(command, env={**environment, "RANK": str(rank)}) for rank in range(world)]
    try:
        codes = [worker.wait(timeout=240) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    results = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]
    assert any(any(told.values()) for told in results) or codes == [0] * world, codes
    return results


def assert_agreed(results: Results, name: str) -> None:
    for rank, told in enumerate(results):
        assert name in told, f"process {rank} stopped before: {[n for n, failure in told.items() if failure]}"
        assert told[name] is None, f"process {rank}: {told[name]}"


def run_checks(checks: Mapping[str, Callable[[], None]], folder: Path) -> None:
    """In each of the processes, until one check fails; the process group is there already."""
    results: dict[str, str | None] = {}
    for name, check in checks.items():
        try:
            check()
            results[name] = None
        except Exception:
            results[name] = traceback.format_exc()
            break  # the others may wait for this one in a collective
        finally:
            (folder / f"{dist.get_rank()}.json").write_text(json.dumps(results))
        gc.collect()  # DDP's model holds the process group; if it lives on, gloo's threads may abort at exit
    dist.barrier()
    dist.destroy_process_group()
