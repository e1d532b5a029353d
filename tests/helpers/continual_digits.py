# SPDX-License-Identifier: Apache-2.0
"""A small configuration of a suite: handwritten digits on a transformer of one block."""

from __future__ import annotations

from typing import Any

DIGITS: dict[str, Any] = {
    "name": "digits",
    "about": "for tests",
    "problem": {
        "kind": "vision", "dataset": "digits", "tasks": 2, "train_per_class": 12, "test_per_class": 8,
        "base_steps": 2, "base_per_class": 20, "dim": 8, "depth": 1, "num_heads": 2,
    },
    "adapters": {"r": 2, "target_modules": ["qkv"], "slices": ["k", "v"], "segments": ["q", "k", "v"]},
    "training": {"lr": 1e-3, "head_lr": 5e-3, "epochs": 1, "batch_size": 8},
    "seeds": [0, 1],
    "methods": [
        {"name": "LoRA", "kind": "LoRA"},
        {
            "name": "EWC", "kind": "EWCLoRA", "options": {"ewc_lambda": 10.0},
            "training": {"epochs": 2}, "seeds": [3],
        },
    ],
    "quick": {"methods": ["EWC"], "seeds": [7], "training": {"epochs": 1}, "problem": {"train_per_class": 6}},
}  # fmt: skip
