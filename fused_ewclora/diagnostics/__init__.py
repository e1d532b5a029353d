# SPDX-License-Identifier: Apache-2.0
"""Reports on the environment, on the layers of a model, and on dry runs of named models."""
