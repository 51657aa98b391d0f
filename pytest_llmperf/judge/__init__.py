"""Baselines, statistics, verdicts. Knows nothing of servers."""
