# SPDX-License-Identifier: Apache-2.0
"""Implementations of the ops, each with the reasons for which it cannot serve a call."""
