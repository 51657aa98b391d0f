"""What all made models say of themselves."""

from __future__ import annotations

from typing import Any

import jinja2
import pytest

from pytest_llmperf.models.metadata import _CHAT_TEMPLATE

QUESTION = {"role": "user", "content": "Why?"}
ASKED = "<|im_start|>user\nWhy?<|im_end|>\n"


def rendered(*messages: dict[str, str], **fields: Any) -> str:  # noqa: ANN401  as templates take them
    """Return the prompt that a server makes of a conversation, trimming as it does."""
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, autoescape=False)  # noqa: S701  no HTML
    return environment.from_string(_CHAT_TEMPLATE).render(messages=messages, **fields)


@pytest.mark.parametrize("switch", [{}, {"enable_thinking": True}])
def test_a_model_may_think_unless_told(switch: dict[str, bool]) -> None:
    """Nothing is put before its answer, as with Qwen3."""
    prompt = rendered(QUESTION, add_generation_prompt=True, **switch)
    assert prompt == f"{ASKED}<|im_start|>assistant\n"


def test_thinking_is_switched_off_by_an_empty_thought() -> None:
    """So the two ways of asking differ in what the server has to read."""
    prompt = rendered(QUESTION, add_generation_prompt=True, enable_thinking=False)
    assert prompt == f"{ASKED}<|im_start|>assistant\n<think>\n\n</think>\n\n"


def test_a_thought_in_the_history_is_shown() -> None:
    """From this newer servers see that the model can think."""
    answer = {"role": "assistant", "content": "So.", "reasoning_content": "Hm."}
    prompt = rendered(QUESTION, answer)
    assert prompt == f"{ASKED}<|im_start|>assistant\n<think>\nHm.\n</think>\n\nSo.<|im_end|>\n"
