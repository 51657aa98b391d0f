"""``--llmperf-budget`` bounds measuring again."""

from __future__ import annotations

import pytest
from support.project import Project

pytestmark = pytest.mark.alone


def test_no_budget_decides_on_one_block(project: Project) -> None:
    """With nothing to spend a verdict rests on the one block that a gate needs at least."""
    done = project.run("--baseline=embedded", "-k", "decode", "--llmperf-budget=0")
    [verdict] = done.results[0]["verdicts"]
    assert verdict["launches_new"] == 1, done.text


def test_budget_allows_more_blocks(project: Project) -> None:
    """With the default budget no verdict on speed rests on one block alone."""
    done = project.run("--baseline=embedded", "-k", "decode")
    [verdict] = done.results[0]["verdicts"]
    assert verdict["launches_new"] >= 2, done.text


@pytest.mark.parametrize("value", ["soon", "-1", "nan", "inf"])
def test_what_is_no_time_is_a_usage_error(project: Project, value: str) -> None:
    """Seconds are a number from 0."""
    done = project.run(f"--llmperf-budget={value}")
    assert done.code == 4, done.text
    assert "--llmperf-budget" in done.text
