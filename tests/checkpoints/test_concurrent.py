# SPDX-License-Identifier: Apache-2.0
"""Several writers and readers of one folder, in threads and processes: nobody sees half of a checkpoint, and
nobody writes where a link points."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tiny_models import adapted, assert_same, controller, two_tasks, whole

import fused_ewclora as fe
from fused_ewclora.checkpoints import files, lock
from fused_ewclora.errors import CheckpointError

CONTENTS = ({files.ADAPTER: b"a" * 70000, files.ADAPTER_CONFIG: b"b"},
            {files.ADAPTER: b"c" * 90000, files.ADAPTER_CONFIG: b"d", files.STATE: b"e" * 50000})  # fmt: skip

WRITER = """
import random, sys
from pathlib import Path
from fused_ewclora.checkpoints import files
names = (files.ADAPTER, files.ADAPTER_CONFIG, files.STATE)
folder, seed, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
draw = random.Random(seed)
print("ready", flush=True)
sys.stdin.readline()
for i in range(count):
    token = f"{seed}.{i}.".encode()
    used = names[: draw.randint(1, 3)]
    contents = {name: token * draw.randint(1, 9000) for name in used}
    files.write_files(folder, contents, {"token": token.decode()})
"""


def writer(folder: Path, seed: int, count: int) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(fe.__file__).parents[1])}
    command = [sys.executable, "-c", WRITER, str(folder), str(seed), str(count)]
    return subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def assert_one_set(found: tuple[dict[str, bytes], dict[str, object]]) -> str:
    """All files are of the same save."""
    contents, config = found
    token = str(config["token"])
    assert contents and all(not c.replace(token.encode(), b"") for c in contents.values())
    return token


@pytest.mark.parametrize("killed", [False, True])
def test_processes(tmp_path, killed):
    """Two processes save while others read; one of them is killed, or none."""
    files.write_files(tmp_path, {files.ADAPTER: b"9.9."}, {"token": "9.9."})
    writers = [writer(tmp_path, seed, 10**6 if killed and seed else 15) for seed in (0, 1)]
    try:
        for process in writers:
            assert process.stdout is not None and process.stdin is not None
            process.stdout.readline()
        for process in writers:
            process.stdin.write("go\n")
            process.stdin.flush()
        tokens, reads = set(), 0
        while writers[0].poll() is None or reads < 20:
            tokens.add(assert_one_set(files.read_files(tmp_path)))
            reads += 1
            if killed and reads == 10:
                writers[1].send_signal(signal.SIGKILL)
        assert writers[0].wait() == 0 and writers[1].wait() == (-signal.SIGKILL if killed else 0)
    finally:
        for process in writers:
            process.kill()
            process.communicate()
    token = assert_one_set(files.read_files(tmp_path))
    assert len(tokens) > 1 and (killed or token in ("0.14.", "1.14."))
    files.write_files(tmp_path, CONTENTS[1], {})
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([files.MANIFEST, *CONTENTS[1]])


def test_models_in_threads(tmp_path):
    """Two threads save equal models into one folder in turn, and whatever is loaded meanwhile is whole."""
    runs = [two_tasks(), two_tasks()]
    expected = whole(*runs[0])
    errors: list[BaseException] = []

    def save(run: tuple[object, fe.EWC]) -> None:
        try:
            for _ in range(6):
                fe.save_pretrained(tmp_path, *run)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=save, args=(run,)) for run in runs]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if (tmp_path / files.MANIFEST).exists():
            other = adapted()
            again = controller(other)
            fe.load_pretrained(tmp_path, other, again)
            assert_same(whole(other, again), expected)
    for thread in threads:
        thread.join()
    assert not errors
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([files.MANIFEST, *files.NAMES])


@pytest.mark.parametrize("moment", range(4))
def test_replaced_while_reading(tmp_path, monkeypatch, moment):
    """A reader whose checkpoint is replaced between two of its files reads the new one."""
    files.write_files(tmp_path, CONTENTS[0], {"token": 0})
    read, calls = files._read_verified, []

    def replaced(*args):
        calls.append(1)
        if len(calls) == moment + 1 or (moment == 3 and len(calls) in (1, 2)):
            files.write_files(tmp_path, CONTENTS[len(calls) % 2], {"token": len(calls)})
        return read(*args)

    monkeypatch.setattr(files, "_read_verified", replaced)
    contents, config = files.read_files(tmp_path)
    assert contents == CONTENTS[config["token"] % 2] if config["token"] else contents == CONTENTS[0]


def test_damage_is_no_replacement(tmp_path):
    """A damaged checkpoint that nobody replaces is refused."""
    files.write_files(tmp_path, CONTENTS[0], {})
    (tmp_path / files.ADAPTER).write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="its hash is not"):
        files.read_files(tmp_path)


@pytest.fixture(params=["flock", "existence"])
def kind(request, monkeypatch) -> str:
    """Both kinds of locks."""
    if request.param == "existence":
        monkeypatch.setattr(lock, "fcntl", None)
    return request.param


def test_lock_excludes(tmp_path, kind, monkeypatch):
    """One at a time, in threads as well; who waits too long is told which file is the lock."""
    inside, most = [], []

    def work() -> None:
        for _ in range(10):
            with lock.locked(tmp_path):
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1 and len(most) == 30 and not list(tmp_path.iterdir())
    monkeypatch.setattr(lock, "LOCK_SECONDS", 0.05)
    with lock.locked(tmp_path):
        for write in (lambda: files.write_files(tmp_path, CONTENTS[0], {}),
                      lambda: files.write_plain(tmp_path, CONTENTS[0])):  # fmt: skip
            with pytest.raises(CheckpointError, match=rf"{lock.LOCK}.*waited.*Nothing was written"):
                write()
    assert not list(tmp_path.iterdir())
    files.write_files(tmp_path, CONTENTS[0], {})


def test_lock_released_on_errors(tmp_path, kind):
    """An exception releases the lock, and so does the end of its holder where the system has `flock`."""
    with pytest.raises(KeyError), lock.locked(tmp_path):
        raise KeyError
    assert not list(tmp_path.iterdir())
    if kind == "flock":
        (tmp_path / lock.LOCK).touch()  # of a process that died
    with lock.locked(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_no_flock_on_this_disk(tmp_path, monkeypatch):
    """A file system without `flock` is served by the other lock."""
    import errno

    def refused(*args: object) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(lock.fcntl, "flock", refused)
    with lock.locked(tmp_path):
        assert [p.name for p in tmp_path.iterdir()] == [lock.HELD]
    files.write_files(tmp_path, CONTENTS[0], {})
    assert files.read_files(tmp_path)[0] == CONTENTS[0]


def test_links_not_followed(tmp_path, monkeypatch):
    """Links in the place of a file, of a new one and of the lock never get contents written through them."""
    victim, folder = tmp_path / "victim", tmp_path / "checkpoint"
    folder.mkdir()
    victim.write_bytes(b"precious")
    monkeypatch.setattr(files.secrets, "token_hex", lambda size: "0" * (2 * size))
    listed = files._listing(CONTENTS[1], {})["files"]
    planted = [*CONTENTS[1], files.MANIFEST, *(name + ".new" for name in CONTENTS[1])]
    planted += [files._pending(name, digest) for name, digest in listed.items()]
    for name in planted:
        (folder / name).symlink_to(victim)
    files.write_files(folder, CONTENTS[1], {})
    assert victim.read_bytes() == b"precious" and not any(p.is_symlink() for p in folder.iterdir())
    assert files.read_files(folder)[0] == CONTENTS[1]
    before = sorted(p.name for p in folder.iterdir())
    (folder / f"{files.MANIFEST}.{'0' * 16}.tmp").symlink_to(victim)
    files.write_files(folder, CONTENTS[0], {})  # it is removed, as what a writer that died has left
    assert victim.read_bytes() == b"precious" and len(list(folder.iterdir())) == len(before) - 1
    (folder / lock.LOCK).symlink_to(victim)
    with pytest.raises(CheckpointError, match="symbolic link"):
        files.write_files(folder, CONTENTS[1], {})
    assert victim.read_bytes() == b"precious" and files.read_files(folder)[0] == CONTENTS[0]


def test_checkpoints_not_exported_over(tmp_path):
    """An export into the folder of a checkpoint, which would no longer load, is refused."""
    model = two_tasks()[0]
    fe.save_pretrained(tmp_path, model)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(CheckpointError, match="without a checkpoint"):
        fe.export_peft(adapted(), tmp_path)
    assert before == {p.name: p.read_bytes() for p in tmp_path.iterdir()}
