# SPDX-License-Identifier: Apache-2.0
"""Several processes: collectives, checks that all agree, and changes that happen in all or in none."""

from __future__ import annotations

from .reduce import reduced

__all__ = ["reduced"]
