# SPDX-License-Identifier: Apache-2.0
"""What several processes must agree on; run by test_distributed.py, once per number of processes."""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import run_checks
from tiny_models import KEYS, Tiny, adapted, batches, data, fresh, layers, randomise
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import fused_ewclora as fe
from fused_ewclora.distributed.gather import gathered
from fused_ewclora.distributed.processes import reshard, whole
from fused_ewclora.ewc.controller import EWC
from fused_ewclora.fishers import Fisher
from fused_ewclora.layers.index import adapter_refs

SAMPLES = 12  # a multiple of every number of processes, so that all see batches of one size
OPTIONS = {"ewc_lambda": 20.0, "fisher_dtype": torch.float64}
STRUCTURES = {
    "8bit": {**OPTIONS, "fisher_dtype": "8bit"},
    **{name: {**OPTIONS, "fisher": name} for name in ("factored", "kronecker", "uniform")},
}
LARGEST = 2 * 6 * 6 * 8  # bytes of the dense sums of k and v


def close(found: Tensor, expected: Tensor, rtol: float = 1e-11) -> None:
    torch.testing.assert_close(whole(found), whole(expected), rtol=rtol, atol=1e-14)


def shard(model: nn.Module, mesh: DeviceMesh | None = None) -> nn.Module:
    """Two groups of FSDP: `fc` on its own, the rest in that of the root, which stays whole after forward."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if mesh is None else mesh
    fully_shard(model.fc, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def mine(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    rank, world = dist.get_rank(), dist.get_world_size()
    return x[rank::world], y[rank::world]


def step(
    model: nn.Module, ewc: EWC, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor], graph: bool
):
    """One step, with the penalty in the loss or added to the gradients; returns the penalty."""
    optimizer.zero_grad()
    loss = F.cross_entropy(model(batch[0]), batch[1])
    penalty = ewc.penalty() if graph else None
    (loss if penalty is None else loss + penalty).backward()
    if penalty is None:
        penalty = ewc.add_penalty_grad_()
    optimizer.step()
    return penalty.detach()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.5)


class Alone:
    """The same training in one process, on all the data, with the A that the others drew."""

    def __init__(self, mode: str, options: Mapping[str, Any]) -> None:
        self.model = adapted()
        self.ewc = EWC(self.model, fisher_mode=mode, **options)

    def take_matrices(self, others: EWC) -> None:
        held = {ref.key: [whole(m).detach() for m in ref.matrices()] for ref in adapter_refs(others.layers)}
        with torch.no_grad():
            for ref in adapter_refs(self.ewc.layers):
                for target, value in zip(ref.matrices(), held[ref.key], strict=True):
                    target.copy_(value)


def agree(model: nn.Module, ewc: EWC, alone: Alone) -> None:
    for (name, found), expected in zip(model.named_parameters(), alone.model.parameters(), strict=True):
        try:
            close(found.detach(), expected.detach())
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
    for key in KEYS if ewc.fishers else ():
        for found, expected in zip(*(parts(e.fishers[key]) for e in (ewc, alone.ewc)), strict=True):
            close(found, expected)


def parts(fisher: Fisher) -> list[Tensor]:
    """The tensors of a Fisher."""
    return [fisher] if isinstance(fisher, Tensor) else [one for one in fisher if isinstance(one, Tensor)]


def two_tasks(
    graph: bool,
    mode: str,
    wrap: Callable[[nn.Module], nn.Module],
    sharded: bool,
    options: Mapping[str, Any] = OPTIONS,
    max_bytes: tuple[int | None, int | None] = (None, None),
) -> None:
    """max_bytes: of the Fisher passes of all processes, and of those of the one."""
    alone = Alone(mode, options)
    inner = adapted()
    model = wrap(inner)
    torch.manual_seed(dist.get_rank())  # what each process draws for itself differs
    ewc = EWC(model, fisher_mode=mode, **options)
    if sharded:
        ewc.shard_()
    for task in range(3):
        optimizers = optimizer_of(model), optimizer_of(alone.model)
        for number in range(2):
            x, y = data(SAMPLES, seed=10 * task + number)
            found = step(model, ewc, optimizers[0], mine(x, y), graph)
            close(found, step(alone.model, alone.ewc, optimizers[1], (x, y), graph), rtol=1e-6)
            with torch.no_grad():  # leaves the root's parameters whole
                close(model(x), alone.model(x))
        agree(inner, ewc, alone)
        if task == 2:
            break
        x, y = data(SAMPLES, seed=50 + task)
        # Under DDP processes may see different numbers of batches; FSDP itself cannot have that.
        own, size = mine(x, y), SAMPLES // dist.get_world_size() if mode == "batch" else 1
        size += dist.get_rank() if not sharded and mode == "sample" else 0
        ewc.estimate_fisher(batches(*own, size), F.cross_entropy, max_bytes=max_bytes[0])
        ewc.reduce_fisher_()
        # Mode "batch" averages over the batches that were seen, so that one process must see the same ones.
        world = dist.get_world_size()
        same = batches(x, y, 5) if mode == "sample" else [(x[r::world], y[r::world]) for r in range(world)]
        alone.ewc.estimate_fisher(same, F.cross_entropy, max_bytes=max_bytes[1])
        with torch.no_grad():
            model(x)  # leaves the root's parameters whole again
        ewc.consolidate()
        alone.ewc.consolidate()
        alone.take_matrices(ewc)
        assert [entry.samples for entry in ewc.history] == [SAMPLES] * (task + 1)
        agree(inner, ewc, alone)


def structures(wrap: Callable[[nn.Module], nn.Module], sharded: bool) -> None:
    """Every structure of the Fisher, some of them gathered in several passes."""
    share = LARGEST // dist.get_world_size() if sharded else LARGEST
    for name, options in STRUCTURES.items():
        mode = "batch" if name == "uniform" else "sample"
        # By DDP, sums in 8 bits are rounded before they are added up.
        limits = {"factored": (192, 192), "8bit": (share, LARGEST) if sharded else (None, None)}
        try:
            two_tasks(name != "factored", mode, wrap, sharded, options, limits.get(name, (None, None)))
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def rounded_sums_are_reduced() -> None:
    """Sums that wait in 8 bits are added over processes, the same in all of them."""
    ewc, alone = (EWC(adapted(), **STRUCTURES["8bit"]) for _ in range(2))
    x, y = data(SAMPLES)
    ewc.estimate_fisher(batches(*mine(x, y), 2), F.cross_entropy, max_bytes=LARGEST)
    ewc.reduce_fisher_()
    ewc.consolidate()
    alone.end_task(batches(x, y, 5), F.cross_entropy)
    assert ewc.history[0].samples == SAMPLES
    for key in KEYS:
        found, exact = ewc.fishers[key].dense(), alone.fishers[key].dense()
        codes: list[Tensor | None] = [None] * dist.get_world_size()
        dist.all_gather_object(codes, ewc.fishers[key].codes)
        assert all(torch.equal(own, codes[0]) for own in codes)
        levels = 2 * (2 + dist.get_world_size())  # roundings, by one of two steps at the largest value
        assert bool(((found - exact).abs() <= levels * exact.amax(1, keepdim=True) / 255).all())
    ewc.estimate_fisher([mine(x, y)], F.cross_entropy, max_bytes=LARGEST if dist.get_rank() else None)
    try:
        ewc.reduce_fisher_()
    except fe.TargetError as error:
        assert "packed" in str(error)
    else:
        raise AssertionError("sums in different forms were added")


def structures_are_dealt_out() -> None:
    """States of every structure, of whole models and of sharded ones, load into each other."""
    for name, options in STRUCTURES.items():
        before = EWC(adapted(), **options)
        before.end_task(batches(*data(SAMPLES), 4), F.cross_entropy)
        before.estimate_fisher(batches(*data(4), 4), F.cross_entropy, max_bytes=1 << 20)
        early = EWC(shard(adapted()), **options)
        early.load_state_dict(before.state_dict())
        early.shard_()
        late = EWC(shard(adapted()), **options)
        late.shard_()
        late.load_state_dict(before.state_dict())
        again = EWC(shard(adapted()), **options)
        again.shard_()
        again.load_state_dict(late.state_dict())
        state = late.state_dict()
        wholes = {part: whole(tensor) for part, tensor in state["tensors"].items()}
        back = EWC(adapted(), **options)
        back.load_state_dict({**state, "tensors": wholes})
        expected = before.state_dict()["tensors"]
        for ewc in (early, late, again, back):
            tensors = ewc.state_dict()["tensors"]
            assert tensors.keys() == expected.keys()
            for part, value in expected.items():
                assert torch.equal(whole(tensors[part]), value), f"{name}: {part}"
        try:
            late.convert_fisher_("uniform")
        except fe.FisherError as error:
            assert "convert before shard_" in str(error)
        else:
            raise AssertionError("Fishers that are sharded were converted")


def priors_are_sharded() -> None:
    """A prior is that of one process, by rows, whatever tasks add to it; trained adapters are refused."""
    for options in (OPTIONS, {**OPTIONS, "update": "fixed"}):
        one, several = EWC(fresh(), **options), EWC(shard(fresh()), **options)
        several.shard_()
        for ewc, share in ((one, lambda *both: both), (several, mine)):
            ewc.estimate_fisher(batches(*share(*data(SAMPLES)), 2), F.cross_entropy)
            ewc.consolidate_prior()
            assert ewc.history[0].prior and ewc.history[0].samples == SAMPLES
            ewc.end_task(batches(*share(*data(SAMPLES, seed=3)), 2), F.cross_entropy)
        for key in KEYS:
            close(several.fishers[key], one.fishers[key])
    trained = EWC(shard(adapted()), **OPTIONS)
    trained.shard_()
    trained.estimate_fisher(batches(*mine(*data(SAMPLES)), 2), F.cross_entropy)
    try:
        trained.consolidate_prior()
    except fe.FisherError as error:
        assert "expected untrained adapters" in str(error)
    else:
        raise AssertionError("no error")


def fisher_memory_is_divided() -> None:
    model = shard(adapted())
    ewc = EWC(model, **OPTIONS)
    ewc.shard_()
    ewc.end_task(batches(*mine(*data(SAMPLES)), 2), F.cross_entropy)
    world = dist.get_world_size()
    for ref in adapter_refs(ewc.layers):
        fisher = ewc.fishers[ref.key]
        share = ref.layer.in_features * -(-ref.piece.row_count // world) * fisher.element_size()
        assert isinstance(fisher, DTensor) and fisher.placements == (Shard(0),)
        held = fisher.to_local()
        assert held.numel() * held.element_size() <= share and held.untyped_storage().nbytes() <= share
        assert tuple(fisher.shape) == (ref.piece.row_count, ref.layer.in_features)


def a_state_made_before_sharding_is_dealt_out() -> None:
    before = EWC(adapted(), **OPTIONS)
    before.estimate_fisher(batches(*data(SAMPLES), 4), F.cross_entropy)
    before.consolidate()
    before.estimate_fisher(batches(*data(4), 4), F.cross_entropy)
    early = EWC(shard(adapted()), **OPTIONS)
    early.load_state_dict(before.state_dict())
    early.shard_()
    early.shard_()  # changes nothing
    late = EWC(shard(adapted()), **OPTIONS)
    late.shard_()
    late.load_state_dict(before.state_dict())
    again = EWC(shard(adapted()), **OPTIONS)
    again.shard_()
    again.load_state_dict(late.state_dict())
    for ewc in (early, late, again):
        tensors = ewc.state_dict()["tensors"]
        for name, value in before.state_dict()["tensors"].items():
            assert isinstance(tensors[name], DTensor) and torch.equal(whole(tensors[name]), value), name


def an_error_in_one_process_is_one_in_all() -> None:
    model = shard(adapted())
    ewc = EWC(model, **OPTIONS)
    ewc.shard_()
    x, y = mine(*data(SAMPLES))
    if dist.get_rank() == 1:
        x = x * float("nan")
    try:
        ewc.estimate_fisher([(x, y)], F.cross_entropy)
    except fe.FisherError as error:
        assert "NaN" in str(error)
    else:
        raise AssertionError("NaN was accepted")
    ewc.estimate_fisher([mine(*data(SAMPLES))], F.cross_entropy)
    before = {name: whole(p.detach()).clone() for name, p in model.named_parameters()}
    if dist.get_rank() == 1:
        with torch.no_grad():
            model.fc.lora_B.to_local().mul_(float("inf"))
    try:
        ewc.consolidate()
    except fe.FisherError:
        pass
    else:
        raise AssertionError("a weight that is not finite was merged")
    for name, p in model.named_parameters():
        if name != "fc.lora_B":
            assert torch.equal(whole(p.detach()), before[name]), name


def fewer_rows_than_processes() -> None:
    """Fisher, penalty and gradients of matrices of which some processes hold no row; by the kernels."""
    with torch_fills_memory_with_nan():
        structured = ({"fisher": "factored"}, {"fisher": "kronecker"}, {"fisher_dtype": "8bit"})
        for rows, options in ((4, {}), (2, {}), *((2, more) for more in structured)):
            found, alone = (few_rows(rows, sharded, **options) for sharded in (True, False))
            assert found.keys() == alone.keys() and len(alone) >= 2 + 1 + 4
            for name, value in alone.items():
                if value.dtype == torch.uint8:  # a sum in another order may round to another level
                    assert int((found[name] != value).sum()) <= 1
                    continue
                told = f"{name}, {rows} rows, {options}"
                tight = 1e-2 if "fisher_dtype" in options else 1e-5
                torch.testing.assert_close(found[name], value, rtol=tight, atol=1e-2 * tight, msg=told)


@contextlib.contextmanager
def torch_fills_memory_with_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def few_rows(rows: int, sharded: bool, **options: Any) -> dict[str, Tensor]:
    """The Fishers, the penalty and its gradients, whole, of two layers with outputs `rows` and 5."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, rows), nn.Linear(rows, 5))
    fe.inject(model, fe.LoRAConfig(r=4, target_modules=["0", "1"]))
    adapters = {name: p for name, p in model.named_parameters() if "lora" in name}
    drawn = {name: torch.randn(p.shape) for name, p in adapters.items()}
    if sharded:
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        adapters = {name: p for name, p in model.named_parameters() if "lora" in name}
    ewc = EWC(model, ewc_lambda=3.0, fisher_mode="sample", **options)
    x, y = torch.randn(SAMPLES, 6), torch.arange(SAMPLES) % 5
    if sharded:
        ewc.shard_()
    ewc.end_task([mine(x, y) if sharded else (x, y)], F.cross_entropy)
    with torch.no_grad():
        for name, p in adapters.items():
            value = distribute_tensor(drawn[name], p.device_mesh, p.placements) if sharded else drawn[name]
            p.copy_(value)
    penalty = ewc.penalty()
    penalty.backward()
    results = {"penalty": penalty.detach()}
    for key, fisher in ewc.fishers.items():
        results |= {f"{key} {i}": whole(part) for i, part in enumerate(parts(fisher))}
    return results | {name: whole(p.grad) for name, p in adapters.items()}


class CrossAttention(nn.Module):
    """x `[N, T, 6]` -> logits `[N, 3]`, by two attentions with weights of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.packed = nn.MultiheadAttention(6, 2, batch_first=True)
        self.separate = nn.MultiheadAttention(6, 2, kdim=4, vdim=6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.packed(x, memory := x[:, :2].tanh(), memory, need_weights=False)[0]
        x = x.transpose(0, 1)
        return self.head(self.separate(x, x[..., :4], x, need_weights=False)[0].mean(0))


def attentions_of_shards() -> None:
    """Fishers, weights and outputs of attentions, of which some calls apply some adapters, over two tasks."""
    torch.manual_seed(0)
    alone = CrossAttention().double()
    fe.inject(alone, fe.LoRAConfig(r=2, target_modules=["packed", "out_proj"]))
    fe.inject(alone, fe.LoRAConfig(r=2, target_modules=["separate"], slices=("k", "v")))
    for name, p in alone.named_parameters():
        if "lora" in name:
            nn.init.normal_(p, std=0.3)
    model = copy.deepcopy(alone)
    for module in (model.packed, model):
        fully_shard(module, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    ewcs = [EWC(one, **OPTIONS) for one in (model, alone)]
    ewcs[0].shard_()
    x, y = torch.randn(SAMPLES, 4, 6, dtype=torch.float64), torch.arange(SAMPLES) % 3
    for _ in range(2):
        ewcs[0].end_task([mine(x, y)], F.cross_entropy)
        ewcs[1].end_task([(x, y)], F.cross_entropy)
        for key, fisher in ewcs[1].fishers.items():
            close(ewcs[0].fishers[key], fisher)
        for (name, p), value in zip(model.named_parameters(), alone.parameters(), strict=True):
            if "lora" not in name:
                close(p.detach(), value.detach())
        close(model(x), alone(x))


class Turned(Tiny):
    """`fc` sees the tokens first, as rows."""

    def block(self, x: Tensor) -> Tensor:
        rows = self.fc(x.transpose(0, 1).flatten(0, 1))
        return x + torch.tanh(rows.unflatten(0, (-1, len(x))).transpose(0, 1))


def samples_are_found_by_all(by_hand: bool) -> None:
    """Batches of one sample in one process, and of several in others; then an error in one of them."""

    def made(wrap: Callable[[nn.Module], nn.Module]) -> EWC:
        model = adapted()
        fe.eject(model)
        model.__class__ = Turned
        fe.inject(model, fe.LoRAConfig(r=2, target_modules=["fc"]))
        return EWC(wrap(model), **OPTIONS)

    rank, world = dist.get_rank(), dist.get_world_size()
    every = [batches(*data(2 * (1 + 4 * r), seed=r), 1 + 4 * r) for r in range(world)]
    alone, ewc = made(lambda model: model.eval()), made(shard)
    ewc.shard_()
    with torch.no_grad():
        for (_, p), (_, q) in zip(alone.model.named_parameters(), ewc.model.named_parameters(), strict=True):
            p.copy_(whole(q.detach()))
    alone.estimate_fisher([batch for part in every for batch in part], F.cross_entropy)
    if by_hand:
        with ewc.accumulate_fisher():
            for x, y in every[rank]:
                F.cross_entropy(ewc.model(x), y).backward()
    else:
        ewc.estimate_fisher(every[rank], F.cross_entropy)
    alone.consolidate()
    ewc.consolidate()
    close(ewc.fishers["fc"], alone.fishers["fc"])
    x, y = data(4)
    try:
        ewc.estimate_fisher([(x, y)], F.cross_entropy, batch_size_fn=lambda _: 4 - (rank == 1))
    except fe.FisherError as error:
        assert "one of 3 samples alone" in str(error)
    else:
        raise AssertionError("batches of no known size were accepted")


def what_is_not_sharded_is_said() -> None:
    def message(call: Callable[[], object]) -> str:
        try:
            call()
        except fe.EWCLoRAError as error:
            return str(error)
        raise AssertionError("no error")

    assert "fully_shard(model)" in message(EWC(adapted()).shard_)
    model = shard(adapted())
    ewc = EWC(model)
    assert "ewc.shard_()" in message(lambda: ewc.estimate_fisher([mine(*data(SAMPLES))], F.cross_entropy))
    assert "merge_mode" in message(EWC(model, merge_mode="factors").shard_)
    assert "sharded" in message(lambda: fe.merge(model))
    assert "sharded" in message(lambda: fe.eject(model))


def saved(folder: Path) -> None:
    """Other numbers of processes load what these save; `values.pt` has what they should find."""
    model = shard(adapted())
    ewc = EWC(model, **OPTIONS)
    ewc.shard_()
    optimizer = optimizer_of(model)
    for task in range(2):
        batch = mine(*data(SAMPLES, seed=task))
        step(model, ewc, optimizer, batch, True)
        ewc.end_task([batch], F.cross_entropy)
    step(model, ewc, optimizer, mine(*data(SAMPLES, seed=9)), True)
    ewc.estimate_fisher([batch], F.cross_entropy)
    with torch.no_grad():
        model(data(2)[0])  # leaves the root's parameters whole
    fe.save_pretrained(folder / "checkpoint", model, ewc)
    found = values(model, ewc)
    if dist.get_rank() == 0:
        torch.save(found, folder / "values.pt")


def values(model: nn.Module, ewc: EWC) -> dict[str, Tensor]:
    """Everything that a checkpoint brings back, whole."""
    reshard(model)
    found = {name: whole(parameter.detach()) for name, parameter in model.named_parameters()}
    found |= {name: whole(tensor) for name, tensor in ewc.state_dict()["tensors"].items()}
    return {**found, "penalty": ewc.penalty().detach()}


def loaded(folder: Path) -> None:
    model = shard(adapted())
    ewc = EWC(model, **OPTIONS)
    ewc.shard_()
    with torch.no_grad():
        model(data(2)[0])
    fe.load_pretrained(folder / "checkpoint", model, ewc)
    compare(values(model, ewc), folder)
    try:
        fe.load_pretrained(folder / ("nothing" if dist.get_rank() == 1 else "checkpoint"), model, ewc)
    except fe.CheckpointError:
        pass
    else:
        raise AssertionError("one process found no checkpoint")
    compare(values(model, ewc), folder)


def compare(found: dict[str, Tensor], folder: Path) -> None:
    expected = torch.load(folder / "values.pt", weights_only=True)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if name == "penalty":  # fp32, summed in another order
            torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=0.0)
        else:
            assert torch.equal(found[name], tensor), name


def what_differs_between_processes_is_said() -> None:
    rank = dist.get_rank()
    other = EWC(adapted(r=2 if rank == 0 else 3), **OPTIONS)
    other.estimate_fisher([mine(*data(SAMPLES))], F.cross_entropy)
    sharded = EWC(shard(adapted(lora_alpha=None if rank == 0 else 6)), **OPTIONS)
    for call in (other.reduce_fisher_, sharded.shard_):
        try:
            call()
        except fe.TargetError as error:
            assert "qkv.k: process 0 has" in str(error) and "process 1" in str(error)
        else:
            raise AssertionError("different adapters were accepted")


def mixed_precision() -> None:
    """Forward in bf16, shards in fp32: gradients and Fishers are fp32 and as good as bf16 allows."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)
    model, alone = adapted(dtype=torch.float32), adapted(dtype=torch.float32)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)), mp_policy=policy)
    pair = EWC(model, ewc_lambda=20.0), EWC(alone, ewc_lambda=20.0)
    pair[0].shard_()
    x, y = data(SAMPLES)
    x = x.float()
    pair[0].end_task([mine(x, y)], F.cross_entropy)
    pair[1].end_task([(x, y)], F.cross_entropy)
    for key, expected in pair[1].fishers.items():
        found = whole(pair[0].fishers[key])
        assert found.dtype == torch.float32
        assert (found - expected).norm() < 16 * 2**-8 * expected.norm()  # squares of sums over 16 products
    (F.cross_entropy(model(mine(x, y)[0]), mine(x, y)[1]) + pair[0].penalty()).backward()
    assert {p.grad.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def new_factors_do_not_depend_on_the_processes() -> None:
    """They are drawn whole, from a seed of the first process, and dealt out."""
    generator = torch.Generator().manual_seed(5)
    seed = int(torch.randint(2**62, (1,), generator=generator))
    common = torch.Generator().manual_seed(seed)
    given = torch.Generator().manual_seed(5 + dist.get_rank())
    ewc = EWC(shard(adapted()), generator=given, **OPTIONS)
    ewc.shard_()
    ewc.end_task([mine(*data(SAMPLES))], F.cross_entropy)
    for ref in adapter_refs(ewc.layers):
        a, b = (whole(matrix).detach() for matrix in ref.matrices())
        bound = ref.layer.initial_bound
        assert torch.equal(a, torch.empty_like(a).uniform_(-bound, bound, generator=common))
        assert not b.any()


def with_scales_and_ranges() -> Tiny:
    """Adapters on k and v, each on the row ranges of two heads, and on `fc`; all have alpha / r != 1 and a
    learned scale per rank."""
    torch.manual_seed(0)
    model = Tiny().double()
    layout = fe.QKVLayout(("q", "k", "v"), None, 2)
    packed = {"target_modules": ["qkv"], "slices": ("k", "v"), "layout": layout}
    for options in (packed, {"target_modules": ["fc"]}):
        fe.inject(model, fe.LoRAConfig(r=2, lora_alpha=5.0, **options))
    randomise(model)
    for layer in layers(model):
        for piece in layer.adapter_slices:
            scale = torch.rand(piece.r, dtype=torch.float64) + 0.5
            layer.register_parameter(piece.scale_name, nn.Parameter(scale))
    return model


def scales_and_ranges_reach_the_shards() -> None:
    alone, model = with_scales_and_ranges(), shard(with_scales_and_ranges())
    whole_ewc, ewc = EWC(alone, **OPTIONS), EWC(model, **OPTIONS)
    ewc.shard_()
    x, y = data(SAMPLES)
    whole_ewc.end_task(batches(x, y, 1), F.cross_entropy)
    ewc.end_task(batches(*mine(x, y), 1), F.cross_entropy)
    for name in ("qkv", "fc"):
        close(model.get_submodule(name).weight.detach(), alone.get_submodule(name).weight.detach())
    # The penalty of adapters that are not zero.
    whole_again, again = (
        EWC(with_scales_and_ranges(), **OPTIONS),
        EWC(shard(with_scales_and_ranges()), **OPTIONS),
    )
    for other in (whole_again, again):
        other.load_state_dict(whole_ewc.state_dict())
    again.shard_()
    assert whole_again.penalty() > 0
    close(again.penalty().detach(), whole_again.penalty().detach(), rtol=1e-6)


def gathers_have_second_derivatives() -> None:
    """Each process has a part of a loss of the whole tensors; rows that do not divide evenly."""
    rank, world = dist.get_rank(), dist.get_world_size()
    common = torch.Generator().manual_seed(5)
    tensors = [torch.randn(size, generator=common, dtype=torch.float64) for size in ((5, 3), (2,))]

    def mine_of(tensor: Tensor) -> Tensor:
        chunk = -(-tensor.shape[0] // world)
        return tensor[rank * chunk : (rank + 1) * chunk]

    def part(a: Tensor, b: Tensor, of: int) -> Tensor:
        return ((a * (of + 1)).sin().sum(1) ** 2).sum() * (b**3).sum()

    def second(loss: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
        grads = torch.autograd.grad(loss, leaves, create_graph=True)
        return torch.autograd.grad(torch.stack([g.square().sum() for g in grads]).sum(), leaves)

    leaves = [mine_of(tensor).clone().requires_grad_() for tensor in tensors]
    found = second(part(*gathered(leaves, [5, 2], dist.group.WORLD), rank), leaves)
    wholes = [tensor.clone().requires_grad_() for tensor in tensors]
    expected = second(torch.stack([part(*wholes, of) for of in range(world)]).sum(), wholes)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, mine_of(other))


def groups_do_not_mix() -> None:
    """Each half of the processes trains a model of its own: sums and draws are those of the half."""
    half, rank = dist.get_world_size() // 2, dist.get_rank()
    group, _ = dist.new_subgroups(half)
    ewc, alone = EWC(adapted(), **OPTIONS), EWC(adapted(), **OPTIONS)
    ewc.estimate_fisher([data(3, seed=rank)], F.cross_entropy)
    first = rank // half * half
    alone.estimate_fisher([data(3, seed=member) for member in range(first, first + half)], F.cross_entropy)
    torch.manual_seed(rank)  # what each process draws for itself differs
    ewc.reduce_fisher_(group)
    ewc.consolidate()
    alone.consolidate()
    assert ewc.history[0].samples == alone.history[0].samples == 3 * half
    for key in KEYS:
        close(ewc.fishers[key], alone.fishers[key])
    drawn: list[Tensor | None] = [None] * dist.get_world_size()
    dist.all_gather_object(drawn, ewc.model.fc.lora_A.detach())
    for other, factor in enumerate(drawn):
        assert torch.equal(factor, drawn[rank]) == (other // half == rank // half), other


def an_empty_share_adds_zero() -> None:
    """All data are in the last process; nothing anywhere is an error in all."""
    last = dist.get_rank() == dist.get_world_size() - 1
    x, y = data(SAMPLES)
    ewc, alone = EWC(adapted(), **OPTIONS), EWC(adapted(), **OPTIONS)
    ewc.estimate_fisher(batches(x, y, 5) if last else [], F.cross_entropy, allow_empty=True)
    ewc.reduce_fisher_()
    ewc.consolidate()
    alone.end_task(batches(x, y, 5), F.cross_entropy)
    assert ewc.history == alone.history
    for key in KEYS:
        close(ewc.fishers[key], alone.fishers[key])
    ewc.estimate_fisher([], F.cross_entropy, allow_empty=True)
    for call in (ewc.reduce_fisher_, ewc.consolidate):
        try:
            call()
        except fe.FisherError as error:
            assert "samples" in str(error)
        else:
            raise AssertionError("a Fisher of nothing was accepted")
    method = fe.methods.EWCLoRA(Tiny().double(), fe.LoRAConfig(r=2, target_modules=["fc"]), **OPTIONS)
    method.begin_task(0)
    method.end_task(batches(x, y, 5) if last else [], F.cross_entropy)
    assert method.ewc.history[0].samples == SAMPLES


def replicated_shards() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    two_tasks(True, "sample", lambda model: shard(model, mesh), True)


DDP = nn.parallel.DistributedDataParallel
# Name -> check, by the number of processes that run it; the folders are those of this run and of that by two.
CHECKS: dict[str, tuple[tuple[int, ...], Callable[[Path, Path], None]]] = {
    "ddp_equals_one_process": ((2, 4), lambda _, __: two_tasks(True, "sample", DDP, False)),
    "ddp_equals_one_process_batch": ((2,), lambda _, __: two_tasks(False, "batch", DDP, False)),
    "fsdp_equals_one_process": ((2, 4), lambda _, __: two_tasks(True, "sample", shard, True)),
    "fsdp_equals_one_process_gradients_added": (
        (2,),
        lambda _, __: two_tasks(False, "sample", shard, True),
    ),
    "fsdp_equals_one_process_batch": ((2,), lambda _, __: two_tasks(True, "batch", shard, True)),
    "structures_by_ddp": ((2,), lambda _, __: structures(DDP, False)),
    "structures_by_fsdp": ((2,), lambda _, __: structures(shard, True)),
    "structures_are_dealt_out": ((2,), lambda _, __: structures_are_dealt_out()),
    "rounded_sums_are_reduced": ((2,), lambda _, __: rounded_sums_are_reduced()),
    "replicated_shards_equal_one_process": ((4,), lambda _, __: replicated_shards()),
    "new_factors_do_not_depend_on_the_processes": (
        (2, 4),
        lambda _, __: new_factors_do_not_depend_on_the_processes(),
    ),
    "scales_and_ranges_reach_the_shards": ((2, 4), lambda _, __: scales_and_ranges_reach_the_shards()),
    "an_empty_share_adds_zero": ((2,), lambda _, __: an_empty_share_adds_zero()),
    "gathers_have_second_derivatives": ((2, 4), lambda _, __: gathers_have_second_derivatives()),
    "groups_do_not_mix": ((2, 4), lambda _, __: groups_do_not_mix()),
    "fewer_rows_than_processes": ((3,), lambda _, __: fewer_rows_than_processes()),
    "attentions_of_shards": ((2, 4), lambda _, __: attentions_of_shards()),
    "priors_are_sharded": ((2,), lambda _, __: priors_are_sharded()),
    "fisher_memory_is_divided": ((2, 4), lambda _, __: fisher_memory_is_divided()),
    "a_state_made_before_sharding_is_dealt_out": (
        (2, 4),
        lambda _, __: a_state_made_before_sharding_is_dealt_out(),
    ),
    "an_error_in_one_process_is_one_in_all": ((2,), lambda _, __: an_error_in_one_process_is_one_in_all()),
    "samples_are_found_by_all": ((2, 4), lambda _, __: samples_are_found_by_all(False)),
    "samples_are_found_by_hand": ((2,), lambda _, __: samples_are_found_by_all(True)),
    "what_is_not_sharded_is_said": ((2,), lambda _, __: what_is_not_sharded_is_said()),
    "what_differs_between_processes_is_said": ((2,), lambda _, __: what_differs_between_processes_is_said()),
    "mixed_precision": ((2,), lambda _, __: mixed_precision()),
    "a_checkpoint_is_saved": ((2,), lambda mine, _: saved(mine)),
    "a_checkpoint_of_two_processes_loads": ((2, 4), lambda _, two: loaded(two)),
}


def names(world: int) -> list[str]:
    return [name for name, (worlds, _) in CHECKS.items() if world in worlds]


def main(folder: Path, two: Path) -> None:
    dist.init_process_group("gloo")
    checks = {name: functools.partial(CHECKS[name][1], folder, two) for name in names(dist.get_world_size())}
    run_checks(checks, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
