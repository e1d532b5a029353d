# SPDX-License-Identifier: Apache-2.0
"""Tools around the Triton kernels: ahead-of-time compilation, autotuning, reports. No op
needs them to run."""
