"""What the files of all models with random weights say of themselves."""

from __future__ import annotations

from typing import Any

from pytest_llmperf.errors import ModelError
from pytest_llmperf.models.vocabulary import BOS, EOS, UNK, vocabulary
from pytest_llmperf.plan.model import SynthSpec
from pytest_llmperf.plan.shapes import Shape

_MEND = "pip install 'pytest-llmperf[embedded]'"

# ChatML, with the switch that Qwen3 has: thinking is switched off by an empty thought, and
# switched on by nothing. Newer builds see from the thoughts in the history that it can think.
# Without typed content, so that a server turns images into markers in the text.
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['reasoning_content'] %}"
    "{{ '<think>\\n' + message['reasoning_content'] + '\\n</think>\\n\\n' }}"
    "{% endif %}"
    "{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}"
    "{% endif %}"
    "{% endif %}"
)


def load_gguf() -> Any:  # noqa: ANN401  the package is not typed for mypy --strict
    """Import the package ``gguf``, which is optional.

    Raises:
        ModelError: If it is not installed.
    """
    try:
        import gguf  # noqa: PLC0415  optional, and slow to import
    except ImportError as error:
        raise ModelError(f"making a model needs the package `gguf`: {_MEND}") from error
    return gguf


def describe(writer: Any, name: str, file_type: int, version: int) -> None:  # noqa: ANN401  as above
    """Add what every file has: its name and types."""
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(version)


def describe_shape(writer: Any, shape: SynthSpec | Shape) -> None:  # noqa: ANN401  as above
    """Add what all architectures of text models have."""
    writer.add_embedding_length(shape.embedding)
    writer.add_block_count(shape.layers)
    if shape.feed_forward:
        writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.vocab)


def describe_tokenizer(writer: Any, vocab: int) -> None:  # noqa: ANN401  as above
    """Add the tokens and the chat template."""
    words = vocabulary(vocab)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([token.encode() for token in words.tokens])
    writer.add_token_scores(list(words.scores))
    writer.add_token_types(list(words.types))
    writer.add_unk_token_id(UNK)
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    # Neither is added, so that text to tokens and back is the same text.
    writer.add_add_bos_token(value=False)
    writer.add_add_space_prefix(value=False)
    writer.add_chat_template(_CHAT_TEMPLATE)
