# SPDX-License-Identifier: Apache-2.0
"""Every operation in plain PyTorch: the truth that all other implementations are tested against."""
