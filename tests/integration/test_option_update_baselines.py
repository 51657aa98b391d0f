"""``--update-baselines`` records what was measured."""

from __future__ import annotations

import json
import subprocess
import sys

from support.project import Project


def test_records_and_then_compares_with_the_file(project: Project) -> None:
    """A first run writes the file; a plain run then compares with it."""
    first = project.run("--update-baselines")
    assert first.code == 0, first.text
    [path] = project.baseline_files()
    assert path == project.path / "baselines" / "b11549" / "test-machine.json"
    data = json.loads(path.read_text("utf-8"))
    assert data["schema"] == 1
    assert data["recorded"]["by"] == "measured"
    assert set(data["results"]) == {"one/launch", "one/w"}
    assert len(data["results"]["one/w"]["decode_tps"]["launches"]) == 2
    assert "one/w decode_tps recorded: - ->" in first.text

    second = project.run("-k", "buffers")
    assert second.code == 0, second.text
    assert second.verdicts() == {"one/launch kv_mib": "PASS", "one/launch n_ctx": "PASS"}
    assert second.results[0]["base"]["label"] == "b11549"


def test_appends_launches_while_the_conditions_are_the_same(project: Project) -> None:
    """A second record of the same config adds its launches to the first's."""
    project.run("--update-baselines", "-k", "decode")
    project.run("--update-baselines", "-k", "decode")
    data = json.loads(project.baseline_files()[0].read_text("utf-8"))
    assert len(data["results"]["one/w"]["decode_tps"]["launches"]) == 4


def test_replaces_launches_when_the_config_changed(project: Project) -> None:
    """Launches of another fingerprint are not kept beside the new ones."""
    project.run("--update-baselines")
    suite = project.path / "suites" / "llmperf.toml"
    suite.write_text(suite.read_text("utf-8").replace("ctx-size = 512", "ctx-size = 1024"), "utf-8")
    changed = project.run("--update-baselines")
    assert "replaced, its conditions changed" in changed.text
    data = json.loads(project.baseline_files()[0].read_text("utf-8"))
    assert len(data["results"]["one/w"]["decode_tps"]["launches"]) == 2
    assert data["results"]["one/launch"]["n_ctx"]["value"] == 1024


def test_selection_leaves_other_entries_alone(project: Project) -> None:
    """Under ``-k`` only what ran is written, the rest of the file stays."""
    project.run("--update-baselines")
    before = json.loads(project.baseline_files()[0].read_text("utf-8"))
    project.run("--update-baselines", "-k", "decode")
    after = json.loads(project.baseline_files()[0].read_text("utf-8"))
    assert after["results"]["one/launch"] == before["results"]["one/launch"]
    assert after["results"]["one/w"] != before["results"]["one/w"]


def test_what_failed_is_not_recorded(project: Project) -> None:
    """A test that fails for a reason of its own records nothing."""
    project.write(
        "test_suite.py",
        """
        import pytest

        @pytest.mark.llmperf(configs=["one"])
        def test_own_check(memory):
            memory.gate("n_ctx")
            assert False, "the user's own check"
        """,
    )
    done = project.run("--update-baselines")
    assert done.code == 1
    assert project.baseline_files() == []


def test_stale_entries_are_listed(project: Project) -> None:
    """Entries that no config of the suite file makes any more are named."""
    project.run("--update-baselines")
    [path] = project.baseline_files()
    data = json.loads(path.read_text("utf-8"))
    data["results"]["gone/w"] = data["results"]["one/w"]
    data["fingerprints"]["gone/w"] = data["fingerprints"]["one/w"]
    path.write_text(json.dumps(data), "utf-8")
    done = project.run("--update-baselines", "-k", "buffers")
    assert "stale, made by no case of the suite file: gone/w" in done.text
    assert "gone/w" in json.loads(path.read_text("utf-8"))["results"]


def test_two_runs_at_once_lose_nothing(project: Project) -> None:
    """Both runs' launches are in the file, and it is whole."""
    command = [sys.executable, "-m", "pytest", "-q", "--update-baselines", "-k", "decode"]
    runs = [
        subprocess.Popen(command, cwd=project.path, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [run.communicate(timeout=240)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    data = json.loads(project.baseline_files()[0].read_text("utf-8"))
    assert len(data["results"]["one/w"]["decode_tps"]["launches"]) == 4


def test_refuses_to_compare_at_the_same_time(project: Project) -> None:
    """Recording and comparing in one run is a usage error."""
    done = project.run("--update-baselines", "--baseline=b8156")
    assert done.code == 4
    assert "run them one after the other" in done.text


def test_default_baseline_of_the_ini_does_not_keep_from_recording_it(project: Project) -> None:
    """The first set of a name can be recorded while the ini already names it."""
    done = project.run("--update-baselines", "-o", "llmperf_baseline=b11549", "-k", "buffers")
    assert done.code == 0, done.text
    assert len(project.baseline_files()) == 1


def test_gate_in_a_fixture_counts(project: Project) -> None:
    """Results of a user's own fixture are shown and recorded."""
    project.write(
        "test_suite.py",
        """
        import pytest

        @pytest.fixture
        def context(memory):
            return memory.gate("n_ctx")

        @pytest.mark.llmperf(configs=["one"])
        def test_it(context):
            assert context.case == "one/launch"
        """,
    )
    done = project.run("--update-baselines")
    assert done.verdicts() == {"one/launch n_ctx": "RECORDED"}
    assert len(project.baseline_files()) == 1


def test_nothing_measured_writes_nothing(project: Project) -> None:
    """A test that expects its gate to fail leaves no file, and no traceback."""
    project.write(
        "test_suite.py",
        """
        import pytest

        @pytest.mark.llmperf(configs=["one"])
        def test_it(memory):
            with pytest.raises(pytest.fail.Exception):
                memory.gate("kld_mean")
        """,
    )
    done = project.run("--update-baselines")
    assert done.code == 0, done.text
    assert project.baseline_files() == []
    assert "Traceback" not in done.text
