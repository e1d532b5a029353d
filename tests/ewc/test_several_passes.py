# SPDX-License-Identifier: Apache-2.0
"""A Fisher gathered in several passes, each for a group of layers, against one pass for all."""

from __future__ import annotations

import copy
import pickle
import random

import pytest
import torch
import torch.nn.functional as F
from tiny_models import WIDTH, adapted, assert_same, batches, data, train, whole
from torch.utils.data import DataLoader, TensorDataset

from fused_ewclora.errors import ArgumentError, FisherError
from fused_ewclora.ewc import several_passes
from fused_ewclora.ewc.controller import EWC
from fused_ewclora.ewc.fisher_pass import FisherPass
from fused_ewclora.reference import eight_bit

KINDS = {
    "dense": {"fisher_dtype": torch.float64},
    "factored": {"fisher": "factored", "fisher_dtype": torch.float64},
    "kronecker": {"fisher": "kronecker", "fisher_dtype": torch.float64},
    "uniform": {"fisher": "uniform", "fisher_dtype": torch.float64},
    "8bit": {"fisher_dtype": "8bit"},
    "bf16": {"fisher_dtype": torch.bfloat16},
}
EXACT = [name for name in KINDS if name not in ("8bit", "bf16")]
SAMPLES = 5


def made(name: str, **options) -> tuple:
    """A model, an EWC, and the bytes of the sums of the layer with the most of them."""
    model = adapted(dtype=torch.float32 if name == "bf16" else torch.float64)
    ewc = EWC(model, 2.0, **KINDS[name], **options)
    placement = ewc._placement
    sizes = [several_passes.bytes_of_sums(placement, ewc.structure, layer) for layer in ewc.layers.values()]
    return model, ewc, max(sizes)


def parts_of(name: str, seed: int = 0) -> list:
    x, y = data(SAMPLES, seed=seed, dtype=torch.float32 if name == "bf16" else torch.float64)
    return batches(x, y, 2)


@pytest.mark.parametrize("mode", ["sample", "batch"])
@pytest.mark.parametrize("name", EXACT)
def test_equals_one_pass(name: str, mode: str):
    """Where sums are kept as they are, bit for bit."""
    if name == "kronecker" and mode == "batch":
        pytest.skip("it has no such mode")
    results = []
    for several in (False, True):
        model, ewc, largest = made(name, fisher_mode=mode)
        torch.manual_seed(0)
        for task in range(2):
            more = {"max_bytes": largest} if several else {}
            ewc.end_task(parts_of(name, task), F.cross_entropy, **more)
            train(model, ewc, task)
        results.append(whole(model, ewc))
    assert_same(*results)


@pytest.mark.parametrize("name", ["8bit", "bf16"])
def test_rounded_once_more(name: str):
    """Sums that wait are what the structure keeps: within the rounding, for two calls as well."""
    _, ewc, largest = made(name)
    _, one, _ = made(name)
    for task in range(2):
        ewc.estimate_fisher(parts_of(name, task), F.cross_entropy, max_bytes=largest)
        one.estimate_fisher(parts_of(name, task), F.cross_entropy)
    assert ewc._state.task.packed and not one._state.task.packed
    for key, exact in one._state.task.buffers.items():
        packed = ewc._state.task.buffers[key]
        assert packed.dtype == (torch.uint8 if name == "8bit" else torch.bfloat16)
        if name == "bf16":
            torch.testing.assert_close(packed.float(), exact, rtol=2 * 2.0**-8, atol=0.0)
            continue
        step = 3 * exact.amax(1, keepdim=True) / 255**0.5  # each of three roundings, between levels
        assert bool(((eight_bit.decode(packed, WIDTH) - exact).abs() <= step).all())
    kept = 0.0 if name == "bf16" else 1.0
    ewc.consolidate()
    one.consolidate()
    for key, fisher in ewc.fishers.items():
        found, expected = (f.dense() if kept else f.float() for f in (fisher, one.fishers[key]))
        bound = 4 * expected.amax(1, keepdim=True) * (255**-0.5 if kept else 2.0**-8)
        assert bool(((found - expected).abs() <= bound).all())


def test_memory(monkeypatch: pytest.MonkeyPatch):
    """Sums of a group take at most max_bytes, and every layer is in one group."""
    gathered: list[tuple[list[str], int]] = []
    start = FisherPass.start

    def noted(running, undo):
        start(running, undo)
        tensors = [t for own in running._parts.values() for parts in own for t in parts.values()]
        gathered.append((list(running._parts), sum(t.nbytes for t in tensors)))

    monkeypatch.setattr(FisherPass, "start", noted)
    _, ewc, largest = made("dense")
    for limit, count in ((largest, 2), (10 * largest, 1)):
        gathered.clear()
        ewc.estimate_fisher(parts_of("dense"), F.cross_entropy, max_bytes=limit)
        assert len(gathered) == count
        assert all(size <= limit for _, size in gathered)
        assert [name for names, _ in gathered for name in names] == list(ewc.layers)


@pytest.mark.parametrize("own", [False, True], ids=["the default generators", "generators of their own"])
def test_same_random_numbers(own: bool):
    """Shuffled batches and sampled labels are the same in every pass; generators end where one pass ends."""
    x, y = data(7)
    results = []
    for several in (False, True):
        torch.manual_seed(5)
        random.seed(5)
        generators = [torch.Generator().manual_seed(s) if own else None for s in (1, 2)]
        loader = DataLoader(TensorDataset(x, y), batch_size=2, shuffle=True, generator=generators[0])
        _, ewc, largest = made("dense", fisher_mode="batch")
        more = {"max_bytes": largest} if several else {}
        torch.manual_seed(6)
        ewc.estimate_fisher(
            loader, F.cross_entropy, labels="sampled", generator=generators[1], max_batches=3, **more
        )
        states = [torch.get_rng_state(), *(g.get_state() for g in generators if g is not None)]
        results.append({**ewc._state.task.buffers, **{str(i): s for i, s in enumerate(states)}})
    assert_same(*results)


@pytest.mark.parametrize("name", KINDS)
def test_state_continues(name: str):
    """Sums that wait are saved as they wait; a state that was loaded, and a pickle, go on alike."""
    model, ewc, largest = made(name)
    ewc.estimate_fisher(parts_of(name), F.cross_entropy, max_bytes=largest)
    saved = copy.deepcopy(ewc.state_dict())
    assert saved["config"]["task"]["packed"] is True
    other = copy.deepcopy(model)
    loaded = EWC(other, 2.0, **KINDS[name])
    loaded.load_state_dict(saved)
    third = pickle.loads(pickle.dumps(ewc))
    for one in (ewc, loaded, third):
        one.estimate_fisher(parts_of(name, 1), F.cross_entropy)
        torch.manual_seed(0)
        one.consolidate()
    assert_same(whole(model, ewc), whole(other, loaded))
    assert_same(ewc._state.fishers, third._state.fishers)


def test_states_refused():
    """Packed sums that do not fit, or are no codes, are refused by name."""
    _, ewc, largest = made("8bit")
    ewc.estimate_fisher(parts_of("8bit"), F.cross_entropy, max_bytes=largest)
    for change, message in (
        ({"packed": False}, "task of .*expected a floating-point"),
        ({"packed": 1}, "expected True or False for packed, got 1"),
    ):
        saved = copy.deepcopy(ewc.state_dict())
        saved["config"]["task"] |= change
        with pytest.raises(FisherError, match=message):
            made("8bit")[1].load_state_dict(saved)


def test_all_or_nothing():
    """An error, an interrupt or other data in a later pass discards what the call has gathered."""
    model, ewc, largest = made("dense")
    ewc.estimate_fisher(parts_of("dense"), F.cross_entropy)
    before = {**whole(model, ewc), **{k: t.clone() for k, t in ewc._state.task.buffers.items()}}

    class Loader:
        """A list that is another, or ends in an error, in its second pass."""

        def __init__(self, second):
            self.passes, self.second = 0, second

        def __iter__(self):
            self.passes += 1
            yield from parts_of("dense", 1)[: None if self.passes == 1 else 2]
            if self.passes > 1 and self.second is not None:
                raise self.second

    cases = (None, FisherError), (KeyboardInterrupt(), KeyboardInterrupt), (OSError("disk"), OSError)
    for second, error in cases:
        loader = Loader(second)
        with pytest.raises(error, match="pass 2 of 2 saw 4 samples" if second is None else None):
            ewc.estimate_fisher(loader, F.cross_entropy, max_bytes=largest)
        assert loader.passes == 2
        assert_same(before, {**whole(model, ewc), **ewc._state.task.buffers})
        assert all(layer.fisher_capture is None for layer in ewc.layers.values())


def test_refused():
    """What cannot be passed over again or cannot fit is refused before anything runs."""
    _, ewc, largest = made("dense")
    with pytest.raises(ArgumentError, match="max_bytes: expected an integer >= 1 or None, got 0"):
        ewc.estimate_fisher(parts_of("dense"), F.cross_entropy, max_bytes=0)
    with pytest.raises(ArgumentError, match=f"expected at least {largest}, which the sums of qkv take"):
        ewc.estimate_fisher(parts_of("dense"), F.cross_entropy, max_bytes=largest - 1)
    with pytest.raises(ArgumentError, match=r"loader: .*got the iterator list_iterator"):
        ewc.end_task(iter(parts_of("dense")), F.cross_entropy, max_bytes=largest)
    assert ewc._state.task is None
