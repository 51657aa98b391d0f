"""The ``llmperf`` command on real results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.project import SUITE, Project

from pytest_llmperf.cli.main import main


def test_verdict_agrees_with_a_real_run(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a run decided follows from the evidence it wrote."""
    project.run("--baseline=embedded", "--llmperf-report=kept", report=False)
    results = project.path / "kept" / "results.json"
    capsys.readouterr()
    assert main(["verdict", str(results)]) == 0
    assert capsys.readouterr().out.count("agrees") == 3


def test_verdict_that_was_tampered_with_differs(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    """A changed word is found out."""
    project.run("--baseline=embedded", "--llmperf-report=kept", "-k", "buffers", report=False)
    results = project.path / "kept" / "results.json"
    data = json.loads(results.read_text("utf-8"))
    data["results"][0]["verdicts"][0]["outcome"] = "REGRESSION"
    results.write_text(json.dumps(data), "utf-8")
    assert main(["verdict", str(results)]) == 1
    assert "DIFFERS: recomputed PASS" in capsys.readouterr().out


def test_verdict_of_no_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that is none is a user's mistake: exit 4, one line."""
    assert main(["verdict", str(tmp_path / "gone.json")]) == 4
    assert "cannot read it" in capsys.readouterr().err


def test_calibrate_measures_and_replays(
    tmp_path: Path,
    shared_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Blocks of two slowdowns are measured, kept, and judged again without measuring."""
    monkeypatch.setenv("LLMPERF_CACHE", str(shared_cache))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "suite.toml").write_text(SUITE, "utf-8")
    common = ["calibrate", "--suite=suite.toml", "--config=one", "--workload=w", "--build=embedded"]
    asked = [*common, "--blocks=2", "--pairs=2", "--slowdowns=0,0.5", "--tolerance=0.05"]
    assert main(asked) == 0
    measured = capsys.readouterr().out
    kept = (tmp_path / ".llmperf" / "calibration.jsonl").read_text("utf-8").splitlines()
    assert len(kept) == 2 * 2 * 4, "two slowdowns, two blocks, four metrics"
    assert main([*asked, "--replay-only"]) == 0
    assert capsys.readouterr().out == measured
    assert "tolerance 5 %" in measured
