# SPDX-License-Identifier: Apache-2.0
"""Microbenchmarks of the operations against their peers; `python -m benchmarks --help`."""
