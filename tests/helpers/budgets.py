# SPDX-License-Identifier: Apache-2.0
"""How much the tests draw and compile: what fits `make test`, or more with `make test-long`."""

from __future__ import annotations

import os

LONG = os.environ.get("FUSED_EWCLORA_TEST_LONG") == "1"
FACTOR = 4 if LONG else 1
EXAMPLES = 25  # of a property, unless it asks for another number; all of them times FACTOR
INTERPRETED_EXAMPLES = 8  # every program of a kernel is a few NumPy calls, some 1e4 times slower than a GPU
