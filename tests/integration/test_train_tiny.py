"""Models that the training script writes, in a real llama.cpp."""

from __future__ import annotations

import math
import subprocess
import sys
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
import pytest
from support.scripts import FOLDER, load_script

from pytest_llmperf.models.text import text
from pytest_llmperf.models.vocabulary import vocabulary

tiny = load_script("train_tiny")

ODD = (
    "  two spaces, a\ttab, é, \N{SNOWMAN}, \N{PARTY POPPER}, </s> <unk> <0x41> 2026  \n\n    end\n"
)


def check(model: Path, document: Path, tool: str) -> str:
    """Run the script's check on one chunk and return what it printed; it must agree."""
    command = [sys.executable, str(FOLDER / "train_tiny.py"), "--check", tool, "--chunks", "1"]
    command += ["--out", str(model), "--text-out", str(document)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return answer.stdout


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the trained one's shape, with random weights that make it attend and decide."""
    shape = tiny.Shape(layers=2)
    generator = np.random.default_rng(1)
    weights = {
        name: (
            generator.normal(size=sizes) * 1.5 / math.sqrt(sizes[-1])
            if len(sizes) > 1
            else 1 + generator.normal(size=sizes) / 10
        ).astype(np.float32)
        for name, sizes in shape.tensors().items()
    }
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    tiny.export(path, shape, vocabulary(shape.vocab), weights)
    return path


@pytest.fixture
def document(tmp_path: Path) -> Path:
    """A text with all that a tokenizer could get wrong."""
    path = tmp_path / "text.txt"
    path.write_text(ODD * 4 + text()[:4000] + "\n", encoding="utf-8")
    return path


def test_the_wheel_computes_what_was_exported(model: Path, document: Path) -> None:
    """The same tokens, and token by token the same probabilities but for rounding."""
    pytest.importorskip("xllamacpp")
    assert "tokens are the same" in check(model, document, "xllamacpp")


@pytest.mark.tools
def test_llama_perplexity_computes_what_was_exported(
    model: Path, document: Path, real_server: Path
) -> None:
    """The same perplexity, of the same chunk, scored at the same tokens."""
    check(model, document, str(real_server.with_name("llama-perplexity")))


def test_the_shipped_model_is_what_it_should_be() -> None:
    """In llama.cpp it is as good as its training said."""
    pytest.importorskip("xllamacpp")
    data = files("pytest_llmperf") / "data"
    if not (data / "tiny-quality.gguf").is_file():
        pytest.skip("no model has been trained: run scripts/train_tiny.py")
    with as_file(data / "tiny-quality.gguf") as model, as_file(data / "quality.txt") as document:
        check(model, document, "xllamacpp")
