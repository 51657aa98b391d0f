"""Speed of the server as a client sees it. Read it, copy it, add configs of your own.

Each test runs once per config and workload; both are described in ``llmperf.toml``.
"""

import pytest

# Runs anywhere: a model the project makes itself, on the CPU.
ANYWHERE = ["cpu"]
# The same with a quantized KV cache, whose cost shows with a long prompt.
ANYWHERE_KV = ["cpu-kv-q8"]

# The same with a slot for each of four users.
PARALLEL = ["cpu-parallel"]

# Speculative decoding without a draft model, and with one.
DRAFTING = ["cpu-ngram", "cpu-draft"]

# The seed reports' machine, an RTX 5080 with 16 GB. These configs carry the mark `gpu`; the
# figures the reports publish for them are in baselines/b8149.
RTX_5080 = ["c4r", "c5", "c7", "fit-default", "fit-256", "fit-nobatch"]
QUANTS = ["mxfp4-fit-nobatch", "q4kl-fit-nobatch", "dense27b-fit"]

WORKLOADS = ["short", "medium", "long", "multi_turn"]

# An M5 Max with 128 GB: KV types, and the depths at which they pay.
M5_MAX = ["m5-f16", "m5-q8", "m5-q8-turbo4", "m5-q8-turbo3"]
DEPTHS = ["depth_0", "depth_4k", "depth_8k", "depth_16k", "depth_32k"]
DEEPER = ["depth_64k", "depth_128k", "depth_256k", "depth_512k"]


@pytest.mark.llmperf(configs=[*ANYWHERE, *RTX_5080, *QUANTS], workloads=WORKLOADS)
def test_decode(speed):
    """Decode speed and latency between tokens stay within tolerance of the baseline."""
    speed.gate("decode_tps", "itl_ms")


@pytest.mark.llmperf(configs=ANYWHERE_KV, workloads=["long"])
def test_decode_quantized_kv(speed):
    """Decode with a quantized KV cache does not fall back to a slow path."""
    speed.gate("decode_tps", "itl_ms")


@pytest.mark.llmperf(configs=[*ANYWHERE, *ANYWHERE_KV, *RTX_5080], workloads=["long"])
def test_prefill(speed):
    """Prompt processing and the time to the first token stay within tolerance."""
    speed.gate("prefill_tps", "ttft_ms")


@pytest.mark.llmperf(configs=DRAFTING, workloads=["repeat"])
def test_drafting(speed):
    """As many drafted tokens are accepted as before, whatever that does to the speed."""
    speed.gate("draft_acceptance")


@pytest.mark.long_running
@pytest.mark.llmperf(configs=PARALLEL, workloads=["parallel_4"])
def test_parallel(speed):
    """Four users at once get as many tokens together, and each as soon, as before."""
    speed.gate("aggregate_tps", "decode_tps", "ttft_ms")


@pytest.mark.llmperf(configs=ANYWHERE, workloads=["depth_1k"])
def test_decode_at_depth(speed):
    """Decode and prompts stay as fast with a full cache as they were."""
    speed.gate("decode_tps", "prefill_tps")


@pytest.mark.gpu
@pytest.mark.long_running
@pytest.mark.llmperf(configs=[*M5_MAX, "fit-nobatch"], workloads=DEPTHS)
def test_depths(speed):
    """Speed falls with depth as it did."""
    speed.gate("decode_tps", "prefill_tps")


@pytest.mark.gpu
@pytest.mark.long_running
@pytest.mark.llmperf(configs=M5_MAX, workloads=DEEPER)
def test_great_depths(speed):
    """The same where the cache is larger than the weights."""
    speed.gate("decode_tps", "prefill_tps")
