"""DDP and FSDP2 with gloo on the CPU: every check of distributed_checks.py, by two and by four processes."""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import distributed_checks
import pytest
import torch
import torch.nn.functional as F
from tiny_models import adapted, data, randomise

import fused_ewclora as fe
from fused_ewclora.errors import FisherError
from fused_ewclora.ewc import EWC

Results = list[dict[str, str | None]]
WORLDS = (2, 4)
CASES = [(world, name) for world in WORLDS for name in distributed_checks.names(world)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@functools.cache
def folder_of(world: int) -> Path:
    return Path(tempfile.mkdtemp(prefix=f"fused_ewclora-{world}-"))


@functools.cache
def results_of(world: int) -> Results:
    """What every process said about every check; those of four load what two have saved."""
    if world == 4:
        results_of(2)
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(world),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(fe.__file__).parents[1]), str(Path(__file__).parent)]),
    }
    command = [
        sys.executable,
        str(Path(distributed_checks.__file__)),
        str(folder_of(world)),
        str(folder_of(2)),
    ]
    workers = [subprocess.Popen(command, env={**environment, "RANK": str(rank)}) for rank in range(world)]
    try:
        codes = [worker.wait(timeout=240) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    results = [json.loads((folder_of(world) / f"{rank}.json").read_text()) for rank in range(world)]
    assert any(any(told.values()) for told in results) or codes == [0] * world, codes
    return results


@pytest.mark.parametrize(("world", "name"), CASES, ids=[f"{world}-{name}" for world, name in CASES])
def test_processes_agree(world: int, name: str):
    for rank, told in enumerate(results_of(world)):
        assert name in told, f"process {rank} stopped before: {[n for n, failure in told.items() if failure]}"
        assert told[name] is None, f"process {rank}: {told[name]}"


def test_one_process_loads_what_several_saved():
    results_of(2)
    model = adapted()
    randomise(model)
    ewc = EWC(model, **distributed_checks.OPTIONS)
    fe.load_pretrained(folder_of(2) / "checkpoint", model, ewc)
    distributed_checks.compare(distributed_checks.values(model, ewc), folder_of(2))


def test_reducing_without_a_fisher_or_a_process_group_says_so():
    ewc = EWC(adapted())
    with pytest.raises(FisherError, match="estimate_fisher"):
        ewc.reduce_fisher_()
    ewc.estimate_fisher([data(4)], F.cross_entropy)
    before = {key: value.clone() for key, value in ewc.state_dict()["tensors"].items()}
    with pytest.raises(FisherError, match="init_process_group"):
        ewc.reduce_fisher_()
    assert all(torch.equal(value, before[key]) for key, value in ewc.state_dict()["tensors"].items())
