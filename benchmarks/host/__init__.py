# SPDX-License-Identifier: Apache-2.0
"""What calls cost on the host, in Python and in C++, before a GPU has anything to do."""
