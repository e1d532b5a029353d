# SPDX-License-Identifier: Apache-2.0
"""Damaged bytes, dying processes and full disks never destroy an existing checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import adapted, assert_same, controller, data, two_tasks, whole

import fused_ewclora as fe
from fused_ewclora.checkpoints import files
from fused_ewclora.checkpoints.checkpoint import load_pretrained, save_pretrained
from fused_ewclora.errors import CheckpointError

NAMES = (files.MANIFEST, files.ADAPTER, files.ADAPTER_CONFIG, files.STATE)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    save_pretrained(folder, *two_tasks())
    return folder


@settings(max_examples=80)
@given(name=st.sampled_from(NAMES), data_=st.data())
def test_changed_bytes(saved, name, data_):
    """Any change of bytes is refused or harmless."""
    content = (saved / name).read_bytes()
    kind = data_.draw(st.sampled_from(["flip", "cut", "append", "insert"]))
    at = data_.draw(st.integers(0, len(content) - 1))
    extra = data_.draw(st.binary(min_size=1, max_size=8))
    changed = {
        "flip": content[:at] + bytes([content[at] ^ extra[0]]) + content[at + 1 :],
        "cut": content[:at],
        "append": content + extra,
        "insert": content[:at] + extra + content[at:],
    }[kind]
    model = adapted()
    ewc = controller(model)
    before = whole(model, ewc)
    with tempfile.TemporaryDirectory() as copied:
        folder = Path(shutil.copytree(saved, Path(copied) / "c"))
        (folder / name).write_bytes(changed)
        try:
            load_pretrained(folder, model, ewc)
        except CheckpointError as error:
            assert "othing was loaded" in str(error)
            assert_same(before, whole(model, ewc))
        else:  # only white space of the manifest can change without changing what it says
            assert changed == content or (
                name == files.MANIFEST and json.loads(changed) == json.loads(content)
            )


KILLED = """
import os, shutil, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import torch, torch.nn.functional as F
torch.set_num_threads(1)
import fused_ewclora.checkpoints.files as files
from tiny_models import adapted, data
from fused_ewclora.checkpoints.checkpoint import save_pretrained
from fused_ewclora.ewc.controller import EWC

root = Path(sys.argv[1])
model = adapted()
ewc = EWC(model, fisher_dtype=torch.float64)
for seed in range(2):
    ewc.end_task([data(4, seed=seed)], F.cross_entropy)
write, left = files._write, 0

def dying(original):
    def call(*args, **kwargs):
        global left
        left -= 1
        if left == 0:
            if original is write:  # half of the bytes reach the disk
                args[0].write_bytes(args[1][: len(args[1]) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    return call

for moment in range(1, 60):
    folder = shutil.copytree(root / "old", root / str(moment))
    child = os.fork()
    if child == 0:
        left = moment
        files._write, os.fsync, os.replace = dying(write), dying(os.fsync), dying(os.replace)
        Path.unlink = dying(Path.unlink)
        save_pretrained(folder, model, ewc)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(moment, code, flush=True)
    if code == 0:
        break
"""


def test_kill_during_save(tmp_path):
    """SIGKILL before every write, fsync, rename and removal of a save over an older checkpoint, each in
    turn."""
    old_model = adapted()
    old_ewc = controller(old_model)
    old_ewc.end_task([data(4)], F.cross_entropy)
    save_pretrained(tmp_path / "old", old_model, old_ewc)
    environment = {**os.environ, "PYTHONPATH": str(Path(fe.__file__).parents[1])}
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(Path(__file__).parents[1] / "helpers")]
    run = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    moments = [[int(number) for number in line.split()] for line in run.stdout.splitlines()]
    assert len(moments) > 15 and [code for _, code in moments] == [-9] * (len(moments) - 1) + [0]
    tasks = []
    model, ewc = two_tasks()
    expected = whole(model, ewc)
    for moment, _ in moments:
        folder = tmp_path / str(moment)
        resumed = controller(adapted())
        load_pretrained(folder, resumed.model, resumed)
        tasks.append(resumed.tasks)
        save_pretrained(folder, model, ewc)  # and the next save finds its way
        assert sorted(p.name for p in folder.iterdir()) == sorted(NAMES)
        load_pretrained(folder, resumed.model, resumed)
        assert_same(expected, whole(resumed.model, resumed))
    assert tasks == sorted(tasks) and set(tasks) == {1, 2}


@pytest.mark.parametrize("name", ["_write", "_sync_folder"])
def test_failed_save(tmp_path, monkeypatch, name):
    """A save that fails leaves the old checkpoint and no litter."""
    model, ewc = two_tasks()
    save_pretrained(tmp_path, model, ewc)
    before = {n: (tmp_path / n).read_bytes() for n in NAMES}
    ewc.end_task([data(4)], F.cross_entropy)
    calls = []

    def full(*args):
        calls.append(1)
        if len(calls) == 2:
            raise OSError("no space left on device")
        return original(*args)

    original = getattr(files, name)
    monkeypatch.setattr(files, name, full)
    with pytest.raises(OSError, match="no space"):
        save_pretrained(tmp_path, model, ewc)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_leftovers_of_a_dead_writer(tmp_path, monkeypatch):
    """What a writer that died had not yet made the checkpoint never becomes it, whatever befalls the next
    writer."""
    model, ewc = two_tasks()
    save_pretrained(tmp_path, model, ewc)
    before = {n: (tmp_path / n).read_bytes() for n in NAMES}
    for name in (files.ADAPTER, files.STATE):
        (tmp_path / (name + files.PENDING)).write_bytes(b"of a checkpoint that was never finished")

    def full(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(files, "_write", full)
    with pytest.raises(OSError, match="no space"):
        save_pretrained(tmp_path, model, ewc)
    assert {n: (tmp_path / n).read_bytes() for n in NAMES} == before
