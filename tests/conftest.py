"""For all tests: products skip however small they are, and Hypothesis profiles.

`--hypothesis-profile=explore` looks further than the default.
"""

import os

from hypothesis import HealthCheck, settings

# Before sd_plugin is imported, here and in the programs that tests start. What is left to torch because it is small has
# tests of its own.
os.environ["SD_PLUGIN_SKIP_FROM"] = "0"

settings.register_profile(
    "ci",
    # The same examples in every run: a failure is the change's, not the draw's.
    derandomize=True,
    deadline=None,
    max_examples=40,
    # Fixtures here only force a backend or reset counters; that need not be redone for each example.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.register_profile("explore", settings.get_profile("ci"), derandomize=False, max_examples=1000)
settings.load_profile("ci")
