# SPDX-License-Identifier: Apache-2.0
"""Launches without a GPU: what a launcher hands the CUDA driver, noted by a stand-in for the driver.

`stub` builds and controls the stand-in (csrc/driver/stub.h), `triton_launcher` sends launches through
Triton's own launcher to it, `comparison` compares what two launchers handed over, and `check` does so for
the calls of the compile report. These run in processes of their own (`ptx.separately`): Triton reads
TRITON_INTERPRET once.
"""
