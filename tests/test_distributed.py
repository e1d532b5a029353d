"""Fishers of several processes, with gloo on the CPU."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_models import KEYS, adapted, batches, data

import fused_ewclora
from fused_ewclora.errors import FisherError
from fused_ewclora.ewc import EWC

WORKER = """
import gc, os, sys
sys.path.insert(0, sys.argv[1])
import torch, torch.distributed as dist, torch.nn.functional as F
from tiny_models import adapted, batches, data
from fused_ewclora.ewc import EWC

dist.init_process_group("gloo")
rank = dist.get_rank()
x, y = data(7)
mine = slice(0, 4) if rank == 0 else slice(4, 7)
model = torch.nn.parallel.DistributedDataParallel(adapted())
ewc = EWC(model, fisher_dtype=torch.float64, fisher_mode=sys.argv[3])
ewc.estimate_fisher(batches(x[mine], y[mine], 4), F.cross_entropy)
ewc.reduce_fisher_()
ewc.consolidate()
assert ewc.history[0].samples == 7 and ewc.history[0].batch_size == 4
torch.save(ewc.fishers, f"{sys.argv[2]}/{rank}.pt")
# DDP's model holds the process group; if it lives on, gloo's threads sometimes abort the process at its exit.
del ewc, model
gc.collect()
dist.destroy_process_group()
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("mode", ["sample", "batch"])
def test_two_processes_agree_with_one_on_all_the_data(tmp_path, mode):
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(fused_ewclora.__file__).parents[1]),
    }
    command = [sys.executable, "-c", WORKER, str(Path(__file__).parent), str(tmp_path), mode]
    workers = [subprocess.Popen(command, env={**environment, "RANK": str(rank)}) for rank in range(2)]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    ewc = EWC(adapted(), fisher_dtype=torch.float64, fisher_mode=mode)
    ewc.end_task(batches(*data(7), 4), F.cross_entropy)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for key in KEYS:
            torch.testing.assert_close(found[key], ewc.fishers[key], rtol=1e-13, atol=0.0)


def test_reducing_without_a_fisher_or_a_process_group_says_so():
    ewc = EWC(adapted())
    with pytest.raises(FisherError, match="estimate_fisher"):
        ewc.reduce_fisher_()
    ewc.estimate_fisher([data(4)], F.cross_entropy)
    before = {key: value.clone() for key, value in ewc.state_dict()["tensors"].items()}
    with pytest.raises(FisherError, match="init_process_group"):
        ewc.reduce_fisher_()
    assert all(torch.equal(value, before[key]) for key, value in ewc.state_dict()["tensors"].items())
