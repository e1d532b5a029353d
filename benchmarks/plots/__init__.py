"""Pictures of records: rooflines, speed-ups, scaling curves. Needs matplotlib."""
