"""The `llmperf` command: what can be asked outside of a test run."""
