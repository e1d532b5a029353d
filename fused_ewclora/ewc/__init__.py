# SPDX-License-Identifier: Apache-2.0
"""Elastic weight consolidation: the controller, its state, Fisher passes and the end of a task."""

from __future__ import annotations

from .controller import EWC

__all__ = ["EWC"]
