"""Microbenchmarks of the operations against their peers; `python -m benchmarks --help`."""
