# SPDX-License-Identifier: Apache-2.0
"""Adapters and EWC state in files: the checkpoints of this library, and the adapter files of PEFT."""
