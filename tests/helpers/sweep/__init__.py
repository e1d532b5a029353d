# SPDX-License-Identifier: Apache-2.0
"""The library on many architectures, compared with one-sample autograd on dense models: `make sweep`.

`architecture` says what an architecture is, the `*_models` modules list them, `oracle` computes what is
right, `checks` compares, `table` writes docs/architectures.md from the records.
"""
