# SPDX-License-Identifier: Apache-2.0
"""Operators: schemas and fakes (`schemas`), choice of implementation (`dispatch`), argument checks
(`checks`), and one autograd.Function per differentiable op."""
