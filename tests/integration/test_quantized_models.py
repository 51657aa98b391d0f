"""Models that the project quantizes, in the real server of the installed wheel."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_llmperf.build.resolve import resolve
from pytest_llmperf.build.spec import parse_spec
from pytest_llmperf.models.locate import locate
from pytest_llmperf.plan.config import ModelFiles
from pytest_llmperf.plan.suite import load_suite
from pytest_llmperf.serve.launch import ServePlan, start

pytest.importorskip("xllamacpp")

SUITE = """
[models.tiny]
file = "tiny-quality.gguf"

[models.tiny-q4_k]
from = "tiny"
quantize = "Q4_K"

[models.tiny-q2_k]
from = "tiny"
quantize = "Q2_K"

[configs.f16]
model = "tiny"
options = { threads = 1, ctx-size = 256, verbosity = 4 }

[configs.q4_K]
extends = "f16"
model = "tiny-q4_k"

[configs.q2_K]
extends = "f16"
model = "tiny-q2_k"
"""

PROMPT = 'import os\n\n\ndef read(path):\n    """Return the content of a file."""\n    with open('


def answer(name: str, folder: Path, cache: Path) -> tuple[str, str]:
    """Start the server of a config, and return what it generates and its log."""
    (folder / "llmperf.toml").write_text(SUITE, "utf-8")
    suite = load_suite(folder / "llmperf.toml")
    config = suite.configs[name]
    model = locate(suite.models[config.model], [], cache, suite.models)
    build = resolve(parse_spec("embedded", {}, folder), cache, lambda _text: None)
    with start(build, config, ModelFiles(model), ServePlan(folder=folder)) as server:
        reply = server.client.complete(server.client.tokenize(PROMPT), 16, "a test")
        return reply.text, server.log_text()


@pytest.mark.parametrize(("name", "shown"), [("q4_K", "Q4_K - Small"), ("q2_K", "Q2_K - Medium")])
def test_a_quantized_model_is_loaded_and_answers(
    name: str, shown: str, tmp_path: Path, shared_cache: Path
) -> None:
    """The server counts matrices of the one type, and still writes Python."""
    text, log = answer(name, tmp_path, shared_cache)
    assert "as f:" in text
    assert f"type {name}:   30 tensors" in log
    assert f"file type   = {shown}" in log
