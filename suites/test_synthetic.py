"""Any GPU without any weights: synthetic models of real shapes.

The first run writes them into the cache folder: 1.3, 4.5, 17 and three times 20 GB.

Tests of configs that take several GPUs are marked ``multi_gpu`` and fail where there are fewer:
leave them out with ``-m "gpu and not multi_gpu"``.
"""

import pytest

DENSE = ["synth-1b", "synth-8b", "synth-8b-kv-q8"]
# K and V of different types: builds without kernels for the pair leave the GPU for it.
MIXED = ["synth-8b-k-q8"]
MOE = ["synth-moe", "synth-qwen35"]
# One model in the types that people compare.
QUANTS = ["synth-qwen35-q4_k_m", "synth-qwen35-mxfp4"]
# Experts in the CPU's memory, by hand and by --fit.
OFFLOADED = ["synth-moe-cpu16", "synth-moe-exps-cpu", "synth-moe-fit", "synth-qwen35-cpu24"]
DRAFTING = ["gpu-ngram", "gpu-draft"]


@pytest.mark.gpu
@pytest.mark.llmperf(configs=[*DENSE, *MOE], workloads=["answer", "document"])
def test_decode(speed):
    """Decode and prompts on the GPU stay as fast as they were, for no more energy."""
    speed.gate("decode_tps", "prefill_tps", "ttft_ms", "tokens_per_joule")


@pytest.mark.gpu
@pytest.mark.llmperf(configs=MIXED, workloads=["answer"])
def test_decode_with_mixed_kv(speed):
    """The same with short prompts only: where the CPU attends, long ones take minutes."""
    speed.gate("decode_tps", "prefill_tps", "ttft_ms", "tokens_per_joule")


@pytest.mark.gpu
@pytest.mark.long_running
@pytest.mark.llmperf(configs=OFFLOADED, workloads=["short", "long"])
def test_decode_offloaded(speed):
    """The same where the CPU does a part of the work."""
    speed.gate("decode_tps", "prefill_tps", "ttft_ms")


@pytest.mark.gpu
@pytest.mark.long_running
@pytest.mark.llmperf(configs=QUANTS, workloads=["short", "long"])
def test_decode_of_quants(speed):
    """Each type of weights has kernels of its own, and each its own regressions."""
    speed.gate("decode_tps", "prefill_tps", "ttft_ms")


@pytest.mark.gpu
@pytest.mark.llmperf(configs=[*DENSE, *MIXED, *MOE, *OFFLOADED])
def test_memory(memory):
    """GPU memory, fitted context and what runs on the GPU stay."""
    memory.gate("vram_mib", "vram_peak_mib", "offloaded_layers", "n_ctx", "graph_splits")


@pytest.mark.gpu
@pytest.mark.long_running
@pytest.mark.llmperf(
    configs=["synth-8b", "synth-8b-kv-q8"],
    workloads=["depth_0", "depth_4k", "depth_8k", "depth_16k", "depth_32k"],
)
def test_depths(speed):
    """Speed falls with depth as it did."""
    speed.gate("decode_tps", "prefill_tps")


@pytest.mark.gpu
@pytest.mark.long_running
@pytest.mark.llmperf(
    configs=["synth-8b-deep"], workloads=["depth_64k", "depth_128k", "depth_256k", "depth_512k"]
)
def test_great_depths(speed):
    """The same where the cache is larger than the weights; it takes minutes to fill."""
    speed.gate("decode_tps", "prefill_tps")


@pytest.mark.gpu
@pytest.mark.llmperf(
    configs=["synth-8b-parallel"], workloads=["answer", "parallel_4", "parallel_8"]
)
def test_parallel(speed):
    """One, four and eight users get as much together, and each as soon, as before."""
    speed.gate("aggregate_tps", "decode_tps", "ttft_ms")


@pytest.mark.gpu
@pytest.mark.llmperf(configs=["synth-8b-two"], workloads=["answer"])
def test_two_gpus(speed):
    """A model that is spread over two GPUs is as fast as it was."""
    speed.gate("decode_tps", "prefill_tps")


@pytest.mark.gpu
@pytest.mark.llmperf(configs=DRAFTING, workloads=["repeat"])
def test_drafting(speed):
    """As many drafted tokens are accepted as before."""
    speed.gate("draft_acceptance", "decode_tps")
