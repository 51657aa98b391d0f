"""The ``llmperf`` command on real results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.project import SUITE, Project

from pytest_llmperf.cli.main import main

pytestmark = pytest.mark.alone


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
    common.append("--foreign-load=off")
    asked = [*common, "--blocks=2", "--pairs=2", "--slowdowns=0,0.5", "--tolerance=0.05"]
    assert main(asked) == 0
    measured = capsys.readouterr().out
    kept = (tmp_path / ".llmperf" / "calibration.jsonl").read_text("utf-8").splitlines()
    assert len(kept) == 2 * 2 * 4, "two slowdowns, two blocks, four metrics"
    assert main([*asked, "--replay-only"]) == 0
    assert capsys.readouterr().out == measured
    assert "tolerance 5 %" in measured


def test_calibration_is_used_by_later_runs(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The noise of equal builds is kept for the machine, and the next run judges with it."""
    monkeypatch.setenv("LLMPERF_MACHINE", "test-machine")
    monkeypatch.chdir(project.path)
    before = project.run("--baseline=embedded", "-k", "decode")
    assert "noise not calibrated" in before.text
    options = ["--config=one", "--workload=w", "--build=embedded", "--foreign-load=off"]
    counts = ["--blocks=10", "--slowdowns=0", "--pairs=1", "--runs=3", "--tolerance=0.5"]
    assert main(["calibrate", *options, *counts]) == 0
    out = capsys.readouterr().out
    [line] = [one for one in out.splitlines() if one.startswith("priors kept")]
    path = Path(line.partition(": ")[2])
    try:
        kept = json.loads(path.read_text("utf-8"))["blocks"]["decode_tps"]
        assert main(["calibrate", "--replay-only", "--runs=3", "--uncalibrated"]) == 0
        assert "noise floor" in out
        assert "noise floor" not in capsys.readouterr().out
        after = project.run("--baseline=embedded", "-k", "decode")
        assert "noise calibrated" in after.text
        [result] = after.results
        assert result["verdicts"][0]["evidence"]["prior"] == kept
    finally:
        path.unlink()


@pytest.mark.parametrize(
    "wrong", ["--foreign-load=-1", "--foreign-load=much", "--slowdowns=1", "--runs=few"]
)
def test_calibrate_refuses_what_it_cannot_do(
    wrong: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A usage error that names the option; nothing is measured."""
    with pytest.raises(SystemExit) as caught:
        main(["calibrate", wrong])
    assert caught.value.code == 2
    assert wrong.partition("=")[0] in capsys.readouterr().err
