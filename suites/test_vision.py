"""Pictures: what makes tokens of them, and the prompt that they are part of.

Each test runs once per config and workload; both are described in ``llmperf.toml``.
"""

import pytest

from pytest_llmperf.measure.picture import base64_picture

# Runs anywhere: a model and a projector the project makes itself, on the CPU.
ANYWHERE = ["cpu-vision"]

TEXT = {"type": "text", "text": "What do you see?"}
TOKENS = 8


@pytest.mark.llmperf(configs=ANYWHERE, workloads=["picture"])
def test_picture(speed):
    """The time to the first token, with the picture's encoding, stays within tolerance."""
    speed.gate("ttft_ms")


@pytest.mark.llmperf(configs=ANYWHERE)
def test_a_picture_becomes_tokens(llama_server):
    """An answer comes, and the picture is part of its prompt."""
    url = {"url": f"data:image/png;base64,{base64_picture(64)}"}
    seen = [TEXT, {"type": "image_url", "image_url": url}]
    plain, pictured = (
        llama_server.client.chat([{"role": "user", "content": content}], TOKENS, "the question")
        for content in ([TEXT], seen)
    )
    assert pictured.predicted_n == TOKENS  # noqa: S101 - a test
    assert pictured.prompt_n > plain.prompt_n  # noqa: S101 - a test
