# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin: property tests draw few examples, where every new shape has to be compiled.

pytest -p benchmarks.few_examples --hypothesis-profile few
"""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "few", max_examples=6, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
