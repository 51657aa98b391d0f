"""``--llmperf-report`` writes the results for machines and for people."""

from __future__ import annotations

import json

from support.project import Project


def test_writes_both_files(project: Project) -> None:
    """The JSON holds verdicts with evidence and samples; the page loads nothing from elsewhere."""
    done = project.run("--update-baselines", "--llmperf-report=out/here", report=False)
    assert done.code == 0, done.text
    folder = project.path / "out" / "here"
    data = json.loads((folder / "results.json").read_text("utf-8"))
    assert data["schema"] == 1
    cases = {result["case"] for result in data["results"]}
    assert cases == {"one/launch", "one/w"}
    page = (folder / "index.html").read_text("utf-8")
    assert "one/w" in page
    assert "src=" not in page
    assert "<link" not in page


def test_folder_that_cannot_be_made(project: Project) -> None:
    """What cannot be written is an error, not silence."""
    project.write("taken", "a file")
    done = project.run("--update-baselines", "--llmperf-report=taken/x", report=False)
    assert done.code == 4
    assert "--llmperf-report=" in done.text


def test_ended_by_failures_as_well(project: Project) -> None:
    """A run that fails leaves a report too."""
    done = project.run("-k", "buffers")
    assert done.code == 1
    assert done.results
