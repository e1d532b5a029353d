# SPDX-License-Identifier: Apache-2.0
"""Files and states that somebody else made, or made worse: what was saved comes back, or a `CheckpointError`
comes and model and controller keep every bit. No other exception, no half of a load.

Damage that leaves the hashes wrong must never load. Damage whose author put the hashes right is a foreign
checkpoint: it may load where it fits, with Fishers that are Fishers.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from models import MLP
from tiny_models import adapted, assert_same, controller, data, snapshot, train, two_tasks, whole
from torch import Tensor, nn

import fused_ewclora as fe
from fused_ewclora.checkpoints import files
from fused_ewclora.errors import CheckpointError, EWCLoRAError, FisherError

NAMES = (files.MANIFEST, files.ADAPTER, files.ADAPTER_CONFIG, files.STATE)


def deep(levels: int, leaf: Any = 0, table: bool = False) -> Any:
    for _ in range(levels):
        leaf = {"a": leaf} if table else [leaf]
    return leaf


ODD: list[Any] = [
    None, True, False, -1, 0, 1, 3, 2**31, 2**63, 10**30, 10**400, -(10**400), 0.5, -0.0, 1e308, math.nan,
    math.inf, -math.inf, "", "fc", "..", "\x00", "\ud800", "(", "x" * 5000, [], {}, [[]], [0, 0], {"": None},
    {"fc": {}},
]  # fmt: skip
DEEP = [functools.partial(deep, 300), functools.partial(deep, 900), functools.partial(deep, 900, table=True)]
KEYS = ("x", "", "module.fc", "fc", "fisher.fc", "fisher.module.fc")


def paths(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in nested tables and lists, the whole included."""
    yield above
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from paths(value[key], (*above, key))


def mutated(draw: Callable[..., Any], value: Any, odd: list[Any]) -> Any:
    """A copy with one to three places replaced, removed, renamed, wrapped or taken from elsewhere."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        places = [path for path in paths(value) if path]
        if not places:
            return value
        *above, key = draw(st.sampled_from(places))
        table = value
        for step in above:
            table = table[step]
        kind = draw(st.sampled_from(["replace", "replace", "remove", "rename", "wrap", "take", "deep"]))
        if kind == "replace":
            table[key] = copy.deepcopy(draw(st.sampled_from(odd)))
        elif kind == "deep":
            table[key] = draw(st.sampled_from(DEEP))()
            return value
        elif kind == "wrap":
            table[key] = [table[key]]
        elif kind == "take":
            other: Any = value
            for step in draw(st.sampled_from(places)):
                other = other[step]
            table[key] = copy.deepcopy(other)
        elif kind == "remove":
            del table[key]
        elif isinstance(table, dict):
            table[draw(st.sampled_from(KEYS))] = table.pop(key)
    return value


def mutated_bytes(draw: Callable[..., Any], content: bytes) -> bytes:
    """Flipped, cut, inserted, removed, or two places of that; often in the header."""
    for _ in range(draw(st.integers(1, 2))):
        if not content:
            return content
        at = draw(st.integers(0, min(len(content) - 1, draw(st.sampled_from([8, 400, len(content)])))))
        extra = draw(st.binary(min_size=1, max_size=9))
        kind = draw(st.sampled_from(["flip", "cut", "insert", "remove", "digit"]))
        content = {
            "flip": content[:at] + bytes([content[at] ^ extra[0]]) + content[at + 1 :],
            "cut": content[:at],
            "insert": content[:at] + extra + content[at:],
            "remove": content[:at] + content[at + len(extra) :],
            "digit": content[:at] + b"%d" % (extra[0] % 10) + content[at + 1 :],
        }[kind]
    return content


class Target:
    """A model and its controller, whose bits are known, and new ones after they were loaded into."""

    def __init__(self, build: Callable[[], tuple[nn.Module, Any]]) -> None:
        self.build = build
        self.renew()

    def renew(self) -> None:
        self.model, self.ewc = self.build()
        self.before = self.bits()

    def bits(self) -> dict[str, Tensor]:
        return snapshot(self.model) if self.ewc is None else whole(self.model, self.ewc)

    def survives(self, load: Callable[[], None], error: type[Exception]) -> bool:
        """Whether `load` succeeded; if not, nothing has changed."""
        try:
            load()
        except error:
            assert_same(self.before, self.bits())
            return False
        return True


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of one run: after the second task, and in the third one."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("one", "two")}
    model, ewc = two_tasks()
    fe.save_pretrained(folders["one"], model, ewc)
    train(model, ewc, 3)
    ewc.estimate_fisher([data(4)], F.cross_entropy)
    fe.save_pretrained(folders["two"], model, ewc)
    return folders


@pytest.fixture(scope="module")
def target() -> Target:
    def build() -> tuple[nn.Module, fe.EWC]:
        model = adapted()
        return model, controller(model)

    return Target(build)


@pytest.fixture(scope="module")
def expected(saved: dict[str, Path]) -> dict[str, dict[str, Tensor]]:
    """What each of them brings back."""
    states = {}
    for name, folder in saved.items():
        model = adapted()
        ewc = controller(model)
        fe.load_pretrained(folder, model, ewc)
        states[name] = whole(model, ewc)
    return states


def assert_fishers(ewc: fe.EWC) -> None:
    for name, tensor in ewc.state_dict()["tensors"].items():
        assert torch.isfinite(tensor).all() and (tensor >= 0).all(), name
    assert all(record.samples > 0 and 0 <= record.gamma <= 1 for record in ewc.history)
    tasks = [layer.consolidated_tasks for layer in ewc.layers.values()]
    assert all(type(count) is int and 0 <= count < 2**63 for count in tasks)


@settings(max_examples=60)
@given(data_=st.data())
def test_damaged_files(saved, target, expected, data_):
    """Bytes changed, and files swapped between two checkpoints, also as contents that wait for their name."""
    draw = data_.draw
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(shutil.copytree(saved["one"], Path(parent) / "c"))
        for name in draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=3, unique=True)):
            kind = draw(st.sampled_from(["bytes", "swap", "pending", "remove"]))
            if kind == "bytes":
                (folder / name).write_bytes(mutated_bytes(draw, (folder / name).read_bytes()))
            elif kind == "remove":
                (folder / name).unlink()
            else:
                shutil.copy(saved["two"] / name, folder / (name + (".new" if kind == "pending" else "")))
        loaded = target.survives(
            lambda: fe.load_pretrained(folder, target.model, target.ewc), CheckpointError
        )
        manifest = (folder / files.MANIFEST).read_bytes() if loaded else b""
    if loaded:  # unharmed, or every file of the other one
        swapped = manifest == (saved["two"] / files.MANIFEST).read_bytes()
        assert_same(expected["two" if swapped else "one"], target.bits())
        target.renew()


def described(config: dict[str, Any]) -> dict[str, Any]:
    """A manifest without what `write_files` adds."""
    return {key: value for key, value in config.items() if key not in ("files", "checksum")}


@settings(max_examples=120)
@given(data_=st.data(), which=st.sampled_from(["one", "two"]))
def test_odd_manifest(saved, target, expected, data_, which):
    """A manifest with odd values and right hashes loads or is refused."""
    config = json.loads((saved[which] / files.MANIFEST).read_text())
    contents = {name: (saved[which] / name).read_bytes() for name in NAMES[1:]}
    config = mutated(data_.draw, described(config), ODD)
    with tempfile.TemporaryDirectory() as folder:
        files.write_files(Path(folder), contents, described(config))
        if target.survives(lambda: fe.load_pretrained(folder, target.model, target.ewc), CheckpointError):
            assert_same(*(
                {k: v for k, v in bits.items() if k.startswith("model.")}
                for bits in (expected[which], target.bits())
            ))  # fmt: skip
            assert_fishers(target.ewc)
            target.ewc.estimate_fisher([data(4)], F.cross_entropy)  # what was loaded can be worked with
            target.ewc.consolidate()
            fe.save_pretrained(folder, target.model, target.ewc)
            target.renew()


@settings(max_examples=80)
@given(data_=st.data(), name=st.sampled_from([files.ADAPTER, files.STATE]))
def test_odd_tensor_bytes(saved, target, data_, name):
    """Tensor files with odd bytes and right hashes load or are refused."""
    config = json.loads((saved["two"] / files.MANIFEST).read_text())
    contents = {n: (saved["two"] / n).read_bytes() for n in NAMES[1:]}
    contents[name] = mutated_bytes(data_.draw, contents[name])
    with tempfile.TemporaryDirectory() as folder:
        files.write_files(Path(folder), contents, described(config))
        if target.survives(lambda: fe.load_pretrained(folder, target.model, target.ewc), CheckpointError):
            assert_fishers(target.ewc)
            target.renew()


ODD_TENSORS: list[Any] = [
    torch.ones(()), torch.ones(6, 6), torch.ones(6, 6).long(), torch.ones(6, 6).bool(), torch.ones(0, 6),
    torch.ones(6, 6, dtype=torch.complex64), torch.ones(6, 6).to(torch.float8_e4m3fn), -torch.ones(6, 6),
    torch.full((6, 6), math.nan), torch.ones(6, 6).to_sparse(), torch.ones(6, 6, device="meta"),
    torch.ones(6, 1).expand(6, 6), torch.ones(6, 6).requires_grad_(),
]  # fmt: skip


@settings(max_examples=150)
@given(data_=st.data(), merge_mode=st.sampled_from(["delta", "factors"]))
def test_odd_states(states, data_, merge_mode):
    """Odd states are taken over whole or refused."""
    state, target = states[merge_mode]
    changed = mutated(data_.draw, state, [*ODD, *ODD_TENSORS])
    if target.survives(lambda: target.ewc.load_state_dict(changed), FisherError):
        assert_fishers_of(target.ewc)
        target.ewc.estimate_fisher([data(4)], F.cross_entropy)
        target.ewc.consolidate()
        target.renew()


def assert_fishers_of(ewc: fe.EWC) -> None:
    assert all(torch.isfinite(f).all() and (f >= 0).all() for f in ewc.fishers.values())


@pytest.fixture(scope="module")
def states() -> dict[str, tuple[Any, Target]]:
    """The state in the third task, by merge_mode, and controllers that could take it over."""

    def build(merge_mode: str) -> Callable[[], tuple[nn.Module, fe.EWC]]:
        def made() -> tuple[nn.Module, fe.EWC]:
            model = adapted()
            return model, controller(model, merge_mode=merge_mode)

        return made

    states = {}
    for merge_mode in ("delta", "factors"):
        _, ewc = two_tasks(merge_mode=merge_mode)
        ewc.estimate_fisher([data(4)], F.cross_entropy)
        states[merge_mode] = (copy.deepcopy(ewc.state_dict()), Target(build(merge_mode)))
    return states


@pytest.mark.parametrize("whole_state", [*ODD[:10], "state", [], torch.ones(3), {"tensors": 3, "config": {}}])
def test_non_state_refused(states, whole_state):
    """What is not a state at all is refused."""
    _, target = states["delta"]
    assert not target.survives(lambda: target.ewc.load_state_dict(whole_state), FisherError)


@pytest.fixture(scope="module")
def peft_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peft")
    torch.manual_seed(0)
    model = MLP()
    fe.inject(
        model, fe.LoRAConfig(r=2, lora_alpha=3.0, target_modules=["fc1", "fc2"], rank_pattern={"fc2": 3})
    )
    model.head.requires_grad_(True)
    fe.export_peft(model, folder)
    return folder


@pytest.fixture(scope="module")
def plain() -> Target:
    return Target(lambda: (torch.manual_seed(1) and MLP(), None))


@settings(max_examples=120)
@given(data_=st.data(), what=st.sampled_from(["config", "config", "config bytes", "tensors", "tensor bytes"]))
def test_odd_peft_folders(peft_folder, plain, data_, what):
    """There are no hashes: values of tensors are what the file says."""
    draw = data_.draw
    config, tensors = (peft_folder / n for n in (files.ADAPTER_CONFIG, files.ADAPTER))
    contents = {config.name: config.read_bytes(), tensors.name: tensors.read_bytes()}
    if what == "config":
        changed = mutated(draw, json.loads(contents[config.name]), ODD)
        contents[config.name] = json.dumps(changed).encode()
    elif what == "tensors":
        table = safetensors.torch.load(contents[tensors.name])
        odd = [t for t in ODD_TENSORS if t.layout == torch.strided and not t.is_meta and t.is_contiguous()]
        table = {k: v for k, v in mutated(draw, table, odd).items() if isinstance(v, Tensor)}
        contents[tensors.name] = safetensors.torch.save({k: v.detach().clone() for k, v in table.items()})
    else:
        name = config.name if what == "config bytes" else tensors.name
        contents[name] = mutated_bytes(draw, contents[name])
    with tempfile.TemporaryDirectory() as folder:
        for name, content in contents.items():
            (Path(folder) / name).write_bytes(content)
        if plain.survives(lambda: fe.import_peft(folder, plain.model), EWCLoRAError):
            model = plain.model
            plain.renew()
            model(torch.randn(2, 6))  # what was accepted can run
        assert not fe.adapters(plain.model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_alpha": 10**400}, "lora_alpha"),
        ({"lora_alpha": 1e308}, "lora_alpha: expected a finite number of at most 3.403e"),
        ({"alpha_pattern": {"fc2": -1e39}}, "lora_alpha: expected a finite number of at most 3.403e"),
        ({"lora_dropout": 10**400}, "lora_dropout"),
        ({"alpha_pattern": {"fc1": 10**400}}, "lora_alpha"),
        ({"rank_pattern": {"(": 3}}, "is no pattern"),
        ({"alpha_pattern": {"(": 3}}, "is no pattern"),
        ({"rank_pattern": [3]}, "expected a table of patterns, got list"),
        (torch.complex64, "fc1.lora_[AB]: expected a floating-point tensor, got torch.complex64"),
        (torch.int64, "fc1.lora_[AB]: expected a floating-point tensor, got torch.int64"),
    ],
)
def test_peft_regressions_refused(peft_folder, plain, tmp_path, changes, message):
    """PEFT folders that were once imported wrongly are refused."""
    shutil.copytree(peft_folder, tmp_path, dirs_exist_ok=True)
    config, tensors = (tmp_path / n for n in (files.ADAPTER_CONFIG, files.ADAPTER))
    if isinstance(changes, dict):
        config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    else:
        table = safetensors.torch.load_file(tensors)
        safetensors.torch.save_file(
            {k: v.to(changes) if "fc1" in k else v for k, v in table.items()}, tensors
        )
    with pytest.raises(CheckpointError, match=message):
        fe.import_peft(tmp_path, plain.model)
    assert_same(plain.before, plain.bits())
