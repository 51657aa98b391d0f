"""Verdicts to the terminal, JUnit and pytest-benchmark."""
