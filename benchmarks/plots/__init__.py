# SPDX-License-Identifier: Apache-2.0
"""Pictures of records: rooflines, speed-ups, scaling curves. Needs matplotlib."""
