"""What one start of the server takes: memory, buffers, layers on the GPU."""

import pytest

ANYWHERE = ["cpu", "cpu-kv-q8"]
GPU = ["c4r", "c5", "c7", "fit-default", "fit-256", "fit-nobatch"]


@pytest.mark.llmperf(configs=ANYWHERE)
def test_memory(memory):
    """Resident memory and the buffers the server allocates do not grow."""
    memory.gate("rss_mib", "model_mib", "kv_mib", "compute_mib", "n_ctx", "graph_splits")


@pytest.mark.llmperf(configs=GPU)
def test_vram(memory):
    """GPU memory and what runs on the GPU stay; a smaller fitted context is a regression too.

    An operation that the GPU no longer does, such as attention with an unusual KV type, cuts the
    graph into more parts.
    """
    memory.gate("vram_mib", "offloaded_layers", "n_ctx", "graph_splits")
