"""The quality gate on the real embedded llama.cpp, by asking its server token by token."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.project import Project

from pytest_llmperf.build.resolve import resolve
from pytest_llmperf.build.spec import parse_spec
from pytest_llmperf.plan.config import Config, ModelFiles
from pytest_llmperf.serve.launch import ServePlan, start

MODEL = Path(__file__).parents[2] / "pytest_llmperf" / "data" / "tiny-quality.gguf"

SUITE = """
[models.tiny]
file = "tiny-quality.gguf"

[builds.worse]
source = "embedded"
options = { cache-type-k = "q4_0" }

[configs.f16]
model = "tiny"
options = { threads = 1, flash-attn = "on" }

[configs.q4]
extends = "f16"
options = { cache-type-k = "q4_0" }
against = "f16"

[configs.tight]
extends = "q4"
budgets = { kld_mean = 0.001 }

[passes.p]
corpus = "quality.txt"
context = 64
chunks = 16
"""

MODULE = """
import pytest

@pytest.mark.llmperf(configs=["f16", "q4", "tight"], passes=["p"])
def test_answers(quality):
    quality.gate("ppl", "kld_mean", "same_top", "kld_p999")
"""

METRICS = ("ppl", "kld_mean", "same_top", "kld_p999")


@pytest.fixture
def answers(project: Project) -> Project:
    """A project with one corpus pass of a few short chunks."""
    project.write("suites/llmperf.toml", SUITE)
    project.write("test_suite.py", MODULE)
    return project


def test_a_recorded_baseline_passes_and_keeps_its_references(answers: Project) -> None:
    """A second run compares with the distributions that the first one recorded."""
    first = answers.run("--update-baselines", "-k", "f16 or q4")
    assert first.code == 0, first.text
    assert set(first.verdicts().values()) == {"RECORDED"}
    [file] = answers.baseline_files()
    recorded = json.loads(file.read_text("utf-8"))
    assert set(recorded["results"]) == {"f16/p", "q4/p"}
    for case in ("f16/p", "q4/p"):
        assert set(recorded["results"][case]) == set(METRICS)
        assert len(recorded["results"][case]["ppl"]["launches"]) == 16
    assert recorded["results"]["f16/p"]["kld_mean"]["value"] == 0
    assert 0.001 < recorded["results"]["q4/p"]["kld_mean"]["value"] < 0.2
    # The config that is diverged from and the one that diverges rest on the same answers.
    [kept] = file.with_suffix("").glob("*.kldref")
    second = answers.run("-k", "f16 or q4", "-rA")
    assert second.code == 0, second.text
    assert set(second.verdicts().values()) == {"PASS"}
    kept.unlink()
    third = answers.run("-k", "q4")
    assert third.code == 1
    assert set(third.verdicts().values()) == {"INCOMPARABLE"}
    assert "which is missing beside" in third.text


def test_a_build_that_answers_otherwise_is_a_regression(answers: Project) -> None:
    """Though its perplexity is within the tolerance: K quantized to four bits behind the scenes."""
    outcome = answers.run("--baseline=embedded", "--llmperf-build=worse", "-k", "f16")
    assert outcome.code == 1
    verdicts = outcome.verdicts()
    assert verdicts["f16/p kld_mean"] == "REGRESSION"
    assert "PASS" not in {verdicts["f16/p same_top"], verdicts["f16/p kld_p999"]}
    assert "kld_mean is" in outcome.text


def test_equal_builds_pass_and_a_budget_counts_whatever_the_baseline(answers: Project) -> None:
    """Equal builds diverge alike from the reference; the tight config does so beyond its budget."""
    outcome = answers.run("--baseline=embedded")
    verdicts = outcome.verdicts()
    assert {verdicts[f"{config}/p {name}"] for config in ("f16", "q4") for name in METRICS} == {
        "PASS"
    }
    assert verdicts["tight/p kld_mean"] == "REGRESSION"
    assert verdicts["tight/p same_top"] == "PASS"
    assert "beyond the budget of 0.001 nat, whatever the baseline" in outcome.text
    assert outcome.code == 1


@pytest.mark.parametrize(
    ("call", "told"),
    [
        ('quality.gate("ppl")', "ppl alone never passes"),
        ('quality.gate("ppl", "decode_tps")', "decode_tps is measured by asking a server"),
        ('quality.gate("kld_max")', "kld_max occurs in published figures only"),
    ],
)
def test_what_a_pass_cannot_show_is_refused(answers: Project, call: str, told: str) -> None:
    """Before anything is measured."""
    answers.write(
        "test_suite.py",
        f"""
        import pytest

        @pytest.mark.llmperf(configs=["f16"], passes=["p"])
        def test_answers(quality):
            {call}
        """,
    )
    outcome = answers.run("--baseline=embedded")
    assert outcome.code == 1
    assert told in outcome.text


def test_quality_needs_a_pass(answers: Project) -> None:
    """A workload shows no answers."""
    answers.write(
        "test_suite.py",
        """
        import pytest

        @pytest.mark.llmperf(configs=["f16"])
        def test_answers(quality):
            quality.gate("kld_mean")
        """,
    )
    outcome = answers.run("--baseline=embedded")
    assert outcome.code == 1
    assert "kld_mean needs a corpus pass" in outcome.text


def test_tests_of_passes_carry_the_mark_quality(answers: Project) -> None:
    """So that they can be left out."""
    outcome = answers.run("--collect-only", "-q", "-m", "not quality", report=False)
    assert "no tests collected" in outcome.text
    outcome = answers.run("--collect-only", "-q", "-m", "quality", report=False)
    assert "test_answers[f16-p]" in outcome.text


def test_a_running_server_is_asked_token_by_token(
    answers: Project, monkeypatch: pytest.MonkeyPatch, shared_cache: Path
) -> None:
    """It has no tool and no file, and its answers can be compared all the same."""
    build = resolve(parse_spec("embedded", {}, answers.path), shared_cache, lambda _text: None)
    config = Config("any", "tiny", {"threads": 1, "flash-attn": "on", "ctx-size": 512})
    with start(build, config, ModelFiles(MODEL), ServePlan(answers.path / "logs")) as server:
        key = next((answers.path / "logs").glob("*.key")).read_text("utf-8").strip()
        monkeypatch.setenv("LLMPERF_API_KEY", key)
        outcome = answers.run(f"--llmperf-build={server.url}", "--baseline=embedded", "-k", "f16")
        assert server.alive()
    assert set(outcome.verdicts().values()) == {"PASS"}, outcome.text
