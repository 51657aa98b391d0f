"""How well a build answers: perplexity, and how far its distributions lie from the reference's.

Each test runs once per config and corpus pass; both are described in ``llmperf.toml``. Perplexity
alone is refused: answers can change with the perplexity unchanged.
"""

import pytest

ANSWERS = ("ppl", "kld_mean", "same_top")
# The 99.9 % percentile of the divergence rests on few tokens: it takes a hundred chunks to tell.
TAILS = (*ANSWERS, "kld_p999")

# Run anywhere: a model that ships with the package.
WEIGHTS = ["tiny-q8_0", "tiny-q4_k"]
KV = ["tiny-kv-q8_0", "tiny-k-q4_0"]
# All of them, for when there is more time.
LADDER = ["tiny-q8_0", "tiny-q6_k", "tiny-q5_k", "tiny-q4_k", "tiny-q3_k", "tiny-q2_k"]
KV_TYPES = ["tiny-kv-q8_0", "tiny-kv-q4_0", "tiny-k-q4_0", "tiny-v-q4_0", "tiny-q4_k-kv-q4_0"]

# The same by the kernels of a GPU.
GPU = ["gpu-f16", "gpu-q8_0", "gpu-q4_k", "gpu-kv-q8_0", "gpu-kv-q4_0"]

# The seed reports' matrix: weights against Q8_0, and two weights by three types of KV cache.
QWEN = ["quality-q8", "quality-q4km", "quality-udq4kxl", "quality-q4kl", "quality-mxfp4"]
QWEN_KV = ["q8-kv-f16", "q8-kv-q8", "q8-kv-q4", "q4km-kv-f16", "q4km-kv-q8", "q4km-kv-q4"]


@pytest.mark.llmperf(configs=["tiny-f16"], passes=["tiny"])
def test_answers(quality):
    """The build answers as the baseline's build does."""
    quality.gate(*TAILS)


@pytest.mark.llmperf(configs=[*WEIGHTS, *KV], passes=["tiny"])
def test_quantized(quality):
    """Quantization costs no more than with the baseline's build, and stays within its budget."""
    quality.gate(*ANSWERS)


@pytest.mark.gpu
@pytest.mark.llmperf(configs=GPU, passes=["tiny_512"])
def test_on_gpu(quality):
    """The kernels of the GPU answer as they did: prompts, and with a quantized cache."""
    quality.gate(*ANSWERS)


@pytest.mark.gpu
@pytest.mark.llmperf(configs=["gpu-f16", "gpu-kv-q4_0"], passes=["tiny_decode"])
def test_decode_on_gpu(quality):
    """The same one token at a time."""
    quality.gate(*ANSWERS)


@pytest.mark.long_running
@pytest.mark.llmperf(configs=["tiny-f16", *LADDER, *KV_TYPES], passes=["tiny_512"])
def test_matrix(quality):
    """Weights and KV types."""
    quality.gate(*ANSWERS)


@pytest.mark.long_running
@pytest.mark.llmperf(configs=["tiny-f16", "tiny-q4_k", "tiny-kv-q4_0"], passes=["tiny_4096"])
def test_long_context(quality):
    """What quantization costs at a long context, with prompts longer than a physical batch."""
    quality.gate(*ANSWERS)


@pytest.mark.long_running
@pytest.mark.llmperf(configs=["tiny-f16", "tiny-kv-q4_0"], passes=["tiny_decode", "tiny_server"])
def test_decode_path(quality):
    """The kernels of decoding answer as they did, in the tool and in the server."""
    quality.gate(*ANSWERS)


@pytest.mark.llmperf(configs=QWEN, passes=["wikitext2", "wikitext2_c4096"])
def test_weights(quality):
    """Each quant format against Q8_0, over all of WikiText-2."""
    quality.gate(*TAILS)


@pytest.mark.llmperf(configs=QWEN, passes=["wikitext2_80x512"])
def test_weights_short(quality):
    """The same over its first 80 chunks."""
    quality.gate(*ANSWERS)


@pytest.mark.llmperf(configs=QWEN_KV, passes=["wikitext2_kv_matrix"])
def test_weights_and_kv(quality):
    """Weights by KV types."""
    quality.gate(*ANSWERS)
