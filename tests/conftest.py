"""Hypothesis profiles for all tests: `--hypothesis-profile=explore` looks further than the default."""

from hypothesis import HealthCheck, settings

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
