"""The suite needs no fixtures of its own: pytest-llmperf brings them as an installed plugin."""
