# SPDX-License-Identifier: Apache-2.0
"""Colours of all figures: the Okabe-Ito palette, which colour-blind readers can tell apart."""

from __future__ import annotations

BLUE, ORANGE = "#0072B2", "#D55E00"
# Without yellow, which is hard to see on white. Figures vary the markers as well.
OTHERS = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F3C8D")
