# SPDX-License-Identifier: Apache-2.0
"""Small files in the format of MNIST."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np


def idx_bytes(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_idx_set(root: Path, per_class: int = 3, classes: int = 4, compress: bool = True) -> np.ndarray:
    images = np.random.default_rng(0).integers(0, 256, (per_class * classes, 28, 28), dtype=np.uint8)
    labels = np.repeat(np.arange(classes, dtype=np.uint8), per_class)
    for split in ("train", "t10k"):
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            raw = idx_bytes(array)
            path = root / f"{split}-{kind}-ubyte{'.gz' if compress else ''}"
            path.write_bytes(gzip.compress(raw) if compress else raw)
    return images
