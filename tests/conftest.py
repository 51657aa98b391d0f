"""What all tests share."""

from hypothesis import HealthCheck, settings

pytest_plugins = ["pytester"]

# A deadline would be an assertion on timing, on machines that are shared and noisy.
settings.register_profile("llmperf", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("llmperf")
