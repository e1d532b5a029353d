# SPDX-License-Identifier: Apache-2.0
"""Continual learning with every method on real data, from configuration files; see __main__."""
