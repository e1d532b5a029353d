# SPDX-License-Identifier: Apache-2.0
"""Updates of tensors that are undone when the block that makes them raises."""

from __future__ import annotations

import pytest
import torch

from fused_ewclora.distributed.transaction import Transaction


def test_changed_twice():
    """A tensor that was changed several times has its first value again."""
    tensor = torch.tensor([1.0])
    with pytest.raises(RuntimeError, match="stop"), Transaction() as change:
        change.copy_(tensor, torch.tensor([2.0]))
        change.copy_(tensor, torch.tensor([3.0]))
        assert tensor.item() == 3.0
        raise RuntimeError("stop")
    assert tensor.item() == 1.0
