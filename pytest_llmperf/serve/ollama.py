"""What Ollama takes of a config, and what it tells of a model in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pytest_llmperf.plan.config import Config
from pytest_llmperf.plan.options import OptionValue

_MIB = 1024 * 1024
_DIGITS = 12
_NAMES = {
    "ctx-size": "num_ctx",
    "threads": "num_thread",
    "gpu-layers": "num_gpu",
    "batch-size": "num_batch",
}
"""llama-server's options that a request can set, in Ollama's words."""


def ollama_options(config: Config) -> tuple[dict[str, OptionValue], list[str]]:
    """Return Ollama's ``options`` for a config, and the config's options that it cannot have."""
    known = {own: config.options[ours] for ours, own in _NAMES.items() if ours in config.options}
    return known, sorted(config.options.keys() - _NAMES.keys())


def told_options(config: Config, model: str) -> str:
    """Return how an Ollama server runs a config, for people."""
    known, left = ollama_options(config)
    options = ", ".join(f"{name} {value}" for name, value in known.items()) or "its own options"
    lost = f"; not passed on, since Ollama has no such option: {', '.join(left)}" if left else ""
    return f"Ollama, model {model}, {options}{lost}"


def memory_mib(running: object, model: str) -> float | None:
    """Return the GPU memory of a model in MiB, from what ``/api/ps`` answers; None if not there."""
    size = _entry(running, model).get("size_vram")
    return size / _MIB if isinstance(size, int) and size > 0 else None


def with_digest(listed: object, model: str) -> str:
    """Return a tag with the digest of what it stands for now, from what ``/api/tags`` answers."""
    return f"{model}@{str(_entry(listed, model).get('digest', 'unknown'))[:_DIGITS]}"


def _entry(answer: object, model: str) -> Mapping[str, Any]:
    models = answer.get("models") if isinstance(answer, dict) else None
    for one in models if isinstance(models, list) else []:
        if isinstance(one, dict) and model in {one.get("name"), one.get("model")}:
            return one
    return {}
