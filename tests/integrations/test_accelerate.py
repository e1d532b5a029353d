# SPDX-License-Identifier: Apache-2.0
"""Training loops under `accelerate.Accelerator`, compared with equivalent plain loops."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from tiny_models import KEYS, adapted, batches, data, randomise
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import fused_ewclora as fe

ACCUMULATION, LEARNING_RATE, NORM = 2, 0.1, 0.05


@pytest.fixture(autouse=True)
def _fresh_state() -> Iterator[None]:
    """accelerate keeps its settings for the process."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def second_task() -> tuple[nn.Module, fe.EWC]:
    """A model and a controller after one task, adapters away from zero."""
    model = adapted()
    generator = torch.Generator().manual_seed(1)
    ewc = fe.EWC(model, 20.0, fisher_dtype=torch.float64, generator=generator)
    ewc.end_task(batches(*data(8), 4), F.cross_entropy)
    torch.manual_seed(3)
    randomise(model)
    return model, ewc


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], LEARNING_RATE)


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(*data(16, seed=5)), batch_size=2)


def plain_loop(clip: bool) -> dict[str, Tensor]:
    model, ewc = second_task()
    optimizer = optimizer_of(model)
    for x, y in batches(*data(16, seed=5), 2 * ACCUMULATION):
        optimizer.zero_grad()
        (F.cross_entropy(model(x), y) + ewc.penalty()).backward()
        if clip:
            nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], NORM)
        optimizer.step()
    return trained(model)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("way", ["in the loss", "straight into .grad"])
def test_penalty_plain_loop(way, clip):
    """Both ways to add the penalty equal the plain loop."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATION)
    model, ewc = second_task()
    start = trained(model)
    model, optimizer, batched = accelerator.prepare(model, optimizer_of(model), loader())
    for x, y in batched:
        with accelerator.accumulate(model):
            loss = F.cross_entropy(model(x), y)
            if way == "in the loss":
                loss = loss + ewc.penalty()  # divided by the number of micro-batches, and added as often
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                if way != "in the loss":
                    ewc.add_penalty_grad_()
                if clip:
                    accelerator.clip_grad_norm_(model.parameters(), NORM)
            optimizer.step()
            optimizer.zero_grad()
    expected = plain_loop(clip)
    for name, value in trained(accelerator.unwrap_model(model)).items():
        assert not torch.equal(value, start[name]), name
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-14)


def test_bf16_autocast():
    """Autocast to bf16 reaches the adapted layers and their Fisher."""
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    plain = adapted(dtype=torch.float32)
    model = accelerator.prepare(adapted(dtype=torch.float32))
    x, y = data(8, dtype=torch.float32)
    logits, exact = model(x), plain(x)
    assert logits.dtype == torch.float32, "accelerate converts outputs"
    assert 0 < (logits - exact).abs().max() < 0.05 * exact.abs().max(), "rounded to 8 bits inside"
    fishers = []
    for each in (model, plain):
        ewc = fe.EWC(each, 1.0)
        ewc.end_task(batches(x, y, 4), F.cross_entropy)
        fishers.append(ewc.fishers)
    for key, fisher in fishers[0].items():
        assert fisher.dtype == torch.float32
        assert (fisher - fishers[1][key]).abs().max() < 0.2 * fishers[1][key].max()


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_names_ignore_wrapper(one_process, tmp_path):
    """DDP is what `prepare` puts around a model when there are several processes."""
    model = adapted()
    wrapped = DistributedDataParallel(model)
    ewc = fe.EWC(wrapped, 20.0, fisher_dtype=torch.float64)
    ewc.end_task(batches(*data(8), 4), F.cross_entropy)
    assert tuple(ewc.fishers) == KEYS
    fe.save_pretrained(tmp_path / "saved", wrapped, ewc)
    other = adapted()
    again = fe.EWC(other, 20.0, fisher_dtype=torch.float64)
    fe.load_pretrained(tmp_path / "saved", other, again)
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
    assert all(torch.equal(again.fishers[key], fisher) for key, fisher in ewc.fishers.items())


def test_save_state(tmp_path):
    """`save_state` keeps the adapters and the registered controller."""
    accelerator = Accelerator(cpu=True)
    model, ewc = second_task()
    model, _ = accelerator.prepare(model, optimizer_of(model))
    accelerator.register_for_checkpointing(ewc)
    accelerator.save_state(str(tmp_path))
    kept, x = trained(model), data(4)[0]
    weights, y, penalty = model.qkv.weight.detach().clone(), model(x), ewc.penalty()
    ewc.end_task(batches(*data(8, seed=9), 4), F.cross_entropy)  # moves weights, adapters and Fishers
    assert not torch.equal(model.qkv.weight, weights) and ewc.tasks == 2
    accelerator.load_state(str(tmp_path))
    assert ewc.tasks == 1 and torch.equal(ewc.penalty(), penalty)
    assert all(torch.equal(value, kept[name]) for name, value in trained(model).items())
    assert torch.equal(model(x), y)
