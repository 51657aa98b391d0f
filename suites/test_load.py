"""How long a server takes from its start until it answers."""

import pytest


@pytest.mark.llmperf(configs=["cpu", "cpu-kv-q8", "c7", "fit-nobatch"])
def test_load_time(memory):
    """Loading the model takes no longer than with the baseline."""
    memory.gate("load_ms")
