# SPDX-License-Identifier: Apache-2.0
"""Benchmarks and checks on a GPU: suites, build, small calls, graphs, tuning, kernels compiled beforehand."""
