"""Speculative decoding without a draft model, by the real server of the installed wheel."""

from __future__ import annotations

import pytest
from support.project import Project

pytest.importorskip("xllamacpp")

SUITE = """
[models.trained]
file = "tiny-quality.gguf"

[builds.long-drafts]
source = "embedded"
options = { spec-ngram-simple-size-m = 48 }

[configs.plain]
model = "trained"
options = { threads = 1, ctx-size = 512 }

[configs.drafting]
extends = "plain"
options = { spec-type = "ngram-simple", spec-ngram-simple-size-n = 4, spec-ngram-simple-size-m = 8 }

[workloads.repeat]
turns = [{ prompt = 64, generate = 256 }]
"""


@pytest.fixture
def drafting(project: Project) -> Project:
    """A project whose model soon repeats itself, and a test of how much of a draft is accepted."""
    project.write("suites/llmperf.toml", SUITE)
    project.write(
        "test_suite.py",
        """
        import pytest

        @pytest.mark.llmperf(configs=["drafting", "plain"], workloads=["repeat"])
        def test_drafts(speed):
            speed.gate("draft_acceptance")
        """,
    )
    return project


def test_acceptance_is_the_same_again(drafting: Project) -> None:
    """Recorded and compared exactly; where nothing is drafted it is an ERROR that says so."""
    recorded = drafting.run("--update-baselines")
    assert recorded.verdicts() == {
        "drafting/repeat draft_acceptance": "RECORDED",
        "plain/repeat draft_acceptance": "ERROR",
    }, recorded.text
    assert "the server drafted nothing: does the config set spec-type" in recorded.text
    again = drafting.run("-k", "drafting")
    assert again.verdicts() == {"drafting/repeat draft_acceptance": "PASS"}, again.text
    (verdict,) = again.results[0]["verdicts"]
    assert verdict["mode"] == "exact"
    assert 0 < verdict["new"] <= 100


def test_worse_drafts_are_a_regression(drafting: Project) -> None:
    """Drafts that reach too far are accepted less often, however fast they are."""
    done = drafting.run("-k", "drafting", "--baseline=embedded", "--llmperf-build=long-drafts")
    assert done.verdicts() == {"drafting/repeat draft_acceptance": "REGRESSION"}, done.text
