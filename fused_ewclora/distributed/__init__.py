"""What several processes share: collectives, agreement, all-or-nothing changes."""

from __future__ import annotations

from .reduce import reduced

__all__ = ["reduced"]
