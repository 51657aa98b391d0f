"""Chats: messages in, and a template between them and the model.

Each test runs once per config and workload; both are described in ``llmperf.toml``.
"""

import pytest

# Runs anywhere: a model the project makes itself, on the CPU.
ANYWHERE = ["cpu-chat"]


@pytest.mark.llmperf(configs=ANYWHERE, workloads=["chat", "chat_turns"])
def test_chat(speed):
    """Decode speed and the time to the first token of a chat stay within tolerance."""
    speed.gate("decode_tps", "ttft_ms")


@pytest.mark.long_running
@pytest.mark.llmperf(configs=ANYWHERE, workloads=["chat_thinking", "chat_direct"])
def test_thinking(speed):
    """The same with thinking switched on and off by the template."""
    speed.gate("decode_tps", "ttft_ms")


@pytest.mark.llmperf(configs=ANYWHERE)
def test_template_switches_thinking(llama_server):
    """The prompt that is made without thinking is another one."""
    asked = [{"role": "user", "content": "Why is the sea salt?"}]
    on, off = (llama_server.client.render(asked, thinking=way) for way in (True, False))
    assert on != off  # noqa: S101 - a test
