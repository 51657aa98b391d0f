"""Builds that answer worse than they should, told by the real llama-perplexity.

A disturbed build is the real one with another model slipped in behind the gate's back: the same
file but for one tensor. Nothing that the gate compares for equality differs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from support.project import Outcome, Project

from pytest_llmperf.models.gguf import read_gguf, write_gguf
from pytest_llmperf.models.quantize import quantize_model

pytestmark = pytest.mark.tools

MODEL = Path(__file__).parents[2] / "pytest_llmperf" / "data" / "tiny-quality.gguf"

SUITE = """
[models.tiny]
file = "tiny-quality.gguf"

[configs.f16]
model = "tiny"
options = { threads = 2, flash-attn = "on" }
budgets = { kld_mean = 0.0001 }

[passes.p]
corpus = "quality.txt"
chunks = 20
"""

MODULE = """
import pytest

@pytest.mark.llmperf(configs=["f16"], passes=["p"])
def test_answers(quality):
    quality.gate("ppl", "kld_mean", "same_top")
"""

Tensor = NDArray[np.float32]


def build_with(real_server: Path, model: Path, folder: Path) -> Path:
    """Return a build folder whose llama-perplexity loads this model whatever it is told."""
    folder.mkdir()
    for name in ("llama-server", "llama-perplexity"):
        real = real_server.with_name(name)
        program = folder / name
        # The option that comes last counts.
        slipped = f' --model "{model}"' if name == "llama-perplexity" else ""
        case = f'case "$1" in --help|--version) exec "{real}" "$@";; esac\n'
        program.write_text(f'#!/bin/sh\n{case}exec "{real}" "$@"{slipped}\n', "utf-8")
        program.chmod(0o755)
    return folder


def disturbed(folder: Path, names: str, change: Callable[[Tensor], Tensor]) -> Path:
    """Return the model with the tensors of this name changed."""
    metadata, tensors = read_gguf(MODEL)
    found = [name for name in tensors if name.endswith(names)]
    assert found
    for name in found:
        tensors[name] = change(tensors[name])
    shaped = {
        name: tensor.astype(np.float16) if tensor.ndim > 1 else tensor
        for name, tensor in tensors.items()
    }
    path = folder / "disturbed.gguf"
    write_gguf(path, metadata, shaped)
    return path


@pytest.fixture
def gate(project: Project, real_server: Path, tmp_path: Path) -> Callable[[Path], Outcome]:
    """Gate a build with another model against the real one."""
    project.write("suites/llmperf.toml", SUITE)
    project.write("test_suite.py", MODULE)

    def run(model: Path) -> Outcome:
        build = build_with(real_server, model, tmp_path / "build")
        return project.run(f"--llmperf-build={build}", f"--baseline={real_server}")

    return run


def value(outcome: Outcome, metric: str, side: str = "new") -> float:
    """Return a side's value of a metric."""
    [result] = outcome.results
    [verdict] = [one for one in result["verdicts"] if one["metric"] == metric]
    return float(verdict[side])


def test_the_same_model_passes(gate: Callable[[Path], Outcome], tmp_path: Path) -> None:
    """Written anew by the same code that disturbs it: what is flagged below is the disturbance."""
    outcome = gate(disturbed(tmp_path, "blk.1.ffn_down.weight", lambda tensor: tensor))
    assert set(outcome.verdicts().values()) == {"PASS"}, outcome.text
    assert value(outcome, "kld_mean") < 1e-5


@pytest.mark.parametrize("name", ["blk.1.ffn_down.weight", "output.weight", "blk.0.attn_v.weight"])
def test_one_tensor_scaled_by_a_twentieth_is_flagged(
    gate: Callable[[Path], Outcome], tmp_path: Path, name: str
) -> None:
    """By the divergence."""
    outcome = gate(disturbed(tmp_path, name, lambda tensor: tensor * np.float32(1.05)))
    assert outcome.verdicts()["f16/p kld_mean"] == "REGRESSION", outcome.text
    assert outcome.code == 1


def test_disturbed_keys_of_one_layer_are_flagged(
    gate: Callable[[Path], Outcome], tmp_path: Path
) -> None:
    """A tenth of noise on the K projection."""
    random = np.random.default_rng(1)

    def noisy(tensor: Tensor) -> Tensor:
        return tensor + random.normal(0, 0.1 * tensor.std(), tensor.shape).astype(np.float32)

    outcome = gate(disturbed(tmp_path, "blk.1.attn_k.weight", noisy))
    assert outcome.verdicts()["f16/p kld_mean"] == "REGRESSION", outcome.text


def test_flipped_answers_are_flagged_though_perplexity_is_unchanged(
    gate: Callable[[Path], Outcome], shared_cache: Path
) -> None:
    """Five bits for sixteen: one answer in twenty is another one, and perplexity does not tell."""
    outcome = gate(quantize_model(MODEL, "Q5_K", shared_cache))
    assert abs(value(outcome, "ppl") / value(outcome, "ppl", "base") - 1) < 0.001
    assert value(outcome, "same_top") < 98
    verdicts = outcome.verdicts()
    assert verdicts["f16/p ppl"] == "PASS"
    assert verdicts["f16/p kld_mean"] == "REGRESSION"
    assert verdicts["f16/p same_top"] != "IMPROVED"
