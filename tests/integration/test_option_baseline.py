"""``--baseline`` names what to compare with."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from support.project import Project

pytestmark = pytest.mark.alone


def test_build_is_measured_side_by_side(project: Project) -> None:
    """A build that is not recorded is started and measured in the same run."""
    done = project.run("--baseline=pypi:xllamacpp==0.2.12", "-k", "buffers")
    assert done.code == 0, done.text
    [result] = done.results
    assert result["base"]["build"]["number"] == 8156
    assert result["new"]["build"]["number"] == 11549
    assert done.verdicts() == {"one/launch kv_mib": "PASS", "one/launch n_ctx": "PASS"}


def test_regression_of_an_exact_metric_fails(project: Project) -> None:
    """A context that shrank is a REGRESSION, and the text says what a person needs."""
    project.write(
        "test_suite.py",
        """
        import pytest

        @pytest.mark.llmperf(configs=["one"])
        def test_context(memory):
            memory.gate("n_ctx")
        """,
    )
    done = project.run("--llmperf-build=other", "--baseline=embedded")
    assert done.code == 1
    assert done.verdicts() == {"one/launch n_ctx": "REGRESSION"}
    for needed in (
        "512 tokens -> 256 tokens",
        "--ctx-size",
        "log ",
        "machine",
        "test-machine",
        "Next:",
    ):
        assert needed in done.text


def test_recorded_set_is_found_by_its_name(project: Project) -> None:
    """The label of a recorded set works as NAME."""
    project.run("--update-baselines", "-k", "buffers")
    done = project.run("--baseline=b11549", "-k", "buffers")
    assert done.code == 0, done.text
    assert "baselines/b11549/test-machine.json" in done.text


def test_unknown_name_is_a_usage_error_that_lists_what_exists(project: Project) -> None:
    """Neither recorded nor a build: exit 4, one line, no traceback."""
    project.run("--update-baselines", "-k", "buffers")
    done = project.run("--baseline=b11545")
    assert done.code == 4
    assert "recorded: b11549" in done.text
    assert "[builds]: other" in done.text
    assert "Traceback" not in done.text


def test_nothing_recorded_fails_and_names_the_command(project: Project) -> None:
    """Without a baseline of any kind a gate never passes."""
    done = project.run("-k", "buffers")
    assert done.code == 1
    assert set(done.verdicts().values()) == {"MISSING"}
    assert "--update-baselines" in done.text


def test_set_of_another_machine_fails_and_names_the_command(project: Project) -> None:
    """A set recorded elsewhere is no baseline here."""
    project.run("--update-baselines", "-k", "buffers")
    [path] = project.baseline_files()
    path.rename(path.with_name("another-machine.json"))
    done = project.run("--baseline=b11549", "-k", "buffers")
    assert done.code == 1
    assert set(done.verdicts().values()) == {"MISSING"}
    assert "was not recorded on this machine (test-machine)" in done.text


def test_metric_that_is_not_recorded_fails(project: Project) -> None:
    """A file without the case is as good as none, for this case."""
    project.run("--update-baselines", "-k", "buffers")
    done = project.run("-k", "decode")
    assert done.code == 1
    assert done.verdicts() == {"one/w decode_tps": "MISSING"}


def test_other_conditions_are_incomparable(project: Project) -> None:
    """A changed config is not compared with the old one's figures."""
    project.run("--update-baselines", "-k", "buffers")
    suite = project.path / "suites" / "llmperf.toml"
    suite.write_text(suite.read_text("utf-8").replace("ctx-size = 512", "ctx-size = 1024"), "utf-8")
    done = project.run("-k", "buffers")
    assert done.code == 1
    assert set(done.verdicts().values()) == {"INCOMPARABLE"}
    assert "ctx-size=512" in done.text
    assert "ctx-size=1024" in done.text


def test_broken_file_is_a_usage_error(project: Project) -> None:
    """A file that is not a baseline is named, not guessed at."""
    project.run("--update-baselines", "-k", "buffers")
    [path] = project.baseline_files()
    data = json.loads(path.read_text("utf-8"))
    data["schema"] = 99
    path.write_text(json.dumps(data), "utf-8")
    done = project.run("-k", "buffers")
    assert done.code == 4
    assert "test-machine.json" in done.text
    assert "schema" in done.text


def _as_if_faster(project: Project, factor: float) -> dict[str, Any]:
    """Change the recorded speeds as a machine so much faster would have made them."""
    [path] = project.baseline_files()
    data: dict[str, Any] = json.loads(path.read_text("utf-8"))
    entry = data["results"]["one/w"]["decode_tps"]
    entry["launches"] = [[factor * value for value in launch] for launch in entry["launches"]]
    entry["value"] *= factor
    path.write_text(json.dumps(data), "utf-8")
    return data


def _record(project: Project) -> None:
    project.run("--update-baselines", "-k", "decode", "-o", "llmperf_launches=4")


def test_machine_that_has_become_slower_is_no_regression(project: Project) -> None:
    """A suspicion is tried side by side with the recorded build, which is as slow today."""
    _record(project)
    _as_if_faster(project, 100)
    done = project.run("--baseline=b11549", "-k", "decode")
    [result] = done.results
    [verdict] = result["verdicts"]
    assert verdict["outcome"] != "REGRESSION", done.text
    assert verdict["mode"] == "side-by-side"
    assert "waits for its confirmation" in verdict["evidence"]["stored"]["reason"]
    assert "against the recorded launches decode_tps is 9" in verdict["reason"]
    assert "judged by blocks of both builds" in done.text
    assert len(result["new"]["logs"]) > 3, "those of the blocks as well"
    assert "started today to settle" in result["base"]["about"]
    assert result["base"]["logs"]
    assert "--port" in result["base"]["command"]


def test_stored_regression_stands_where_its_build_is_gone(project: Project) -> None:
    """Another build than the recorded one proves nothing about it, and the reason says so."""
    _record(project)
    data = _as_if_faster(project, 100)
    data["build"]["sha256"] = "0" * 64
    [path] = project.baseline_files()
    path.write_text(json.dumps(data), "utf-8")
    done = project.run("--baseline=b11549", "-k", "decode")
    assert done.code == 1
    assert done.verdicts() == {"one/w decode_tps": "REGRESSION"}
    assert "Not confirmed side by side" in done.text
    assert "is not the build that was recorded as b11549" in done.text


def test_stored_regression_stands_where_its_build_is_started_otherwise(project: Project) -> None:
    """An entry in [builds] whose options have changed since the record is another build."""
    entry = '\n[builds.b11549]\nsource = "embedded"\n'
    suite = project.path / "suites" / "llmperf.toml"
    plain = suite.read_text("utf-8")
    suite.write_text(plain + entry, "utf-8")
    _record(project)
    _as_if_faster(project, 100)
    suite.write_text(plain + entry + "options = { batch-size = 32 }\n", "utf-8")
    done = project.run("--baseline=b11549", "-k", "decode")
    assert done.verdicts() == {"one/w decode_tps": "REGRESSION"}
    assert "b11549 would not be started as it was recorded (options: " in done.text


def test_oldest_set_is_shown_beside_the_newest(project: Project) -> None:
    """What the newest baseline has already given away shows against the oldest."""
    _record(project)
    data = _as_if_faster(project, 10)
    _as_if_faster(project, 0.1)
    data["build"] |= {"label": "b9000", "number": 9000}
    project.write("baselines/b9000/test-machine.json", json.dumps(data))
    done = project.run("-k", "decode")
    assert "baseline b11549" in done.text
    assert "since b9000, the oldest baseline: one/w decode_tps -" in done.text
    # By launches, or by blocks where those leave it open.
    assert re.search(r"false REGRESSION in this run: 0\.[15] % at most", done.text)
