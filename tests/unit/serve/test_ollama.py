"""What Ollama takes of a config, and tells of a model in memory."""

from __future__ import annotations

import pytest

from pytest_llmperf.plan.config import Config
from pytest_llmperf.serve.ollama import memory_mib, ollama_options, told_options, with_digest


def test_options_get_ollamas_names() -> None:
    """Those that it has; the others are told, in order."""
    config = Config(
        "c", "m", {"jinja": True, "gpu-layers": 9, "batch-size": 64, "cache-type-k": "q8_0"}
    )
    assert ollama_options(config) == (
        {"num_gpu": 9, "num_batch": 64},
        ["cache-type-k", "jinja"],
    )
    assert told_options(config, "x:1") == (
        "Ollama, model x:1, num_gpu 9, num_batch 64; not passed on, since Ollama has no such "
        "option: cache-type-k, jinja"
    )


def test_a_config_without_options_leaves_ollama_its_own() -> None:
    """Nothing is lost then."""
    assert told_options(Config("c", "m"), "x:1") == "Ollama, model x:1, its own options"


@pytest.mark.parametrize(
    ("running", "mib"),
    [
        ({"models": [{"name": "x:1", "size_vram": 2 * 1024**2}]}, 2.0),
        ({"models": [{"name": "y"}, {"model": "x:1", "size_vram": 1024**2}]}, 1.0),
        ({"models": [{"name": "x:1", "size_vram": 0}]}, None),
        ({"models": [{"name": "x:1"}]}, None),
        ({"models": [{"name": "y", "size_vram": 5}]}, None),
        ({"models": ["x:1"]}, None),
        ({"models": None}, None),
        ([], None),
    ],
)
def test_memory_is_that_of_the_model(running: object, mib: float | None) -> None:
    """None where it is not on a GPU or not loaded, rather than 0."""
    assert memory_mib(running, "x:1") == mib


def test_a_tag_goes_with_what_it_stands_for() -> None:
    """It can be pulled anew, and is another model then."""
    listed = {"models": [{"name": "x:1", "digest": "0a" * 32}]}
    assert with_digest(listed, "x:1") == "x:1@0a0a0a0a0a0a"
    assert with_digest({}, "x:1") == "x:1@unknown"
