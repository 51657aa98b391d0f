"""Beside pytest-benchmark, JUnit and pytest-xdist."""

from __future__ import annotations

import importlib.util
import json
from xml.etree import ElementTree as ET

import pytest
from support.project import Project

# pytest-benchmark switches itself off in a worker of xdist.
pytestmark = pytest.mark.alone


def test_benchmark_json_holds_the_samples(project: Project) -> None:
    """Samples are rounds in seconds a token, with case, build and verdict beside them."""
    done = project.run("--update-baselines", "--benchmark-json=b.json", "-k", "decode")
    assert done.code == 0, done.text
    [entry] = json.loads((project.path / "b.json").read_text("utf-8"))["benchmarks"]
    measured = done.results[0]["measured"]["decode_tps"]
    assert entry["stats"]["rounds"] == sum(len(launch) for launch in measured) == 4
    best = max(tps for launch in measured for tps in launch)
    assert entry["stats"]["min"] == pytest.approx(1 / best)
    assert entry["extra_info"]["case"] == "one/w"


def test_benchmark_compare_works(project: Project) -> None:
    """A saved run can be compared with a later one."""
    project.run("--update-baselines", "--benchmark-save=first", "-k", "decode")
    done = project.run("--update-baselines", "--benchmark-compare", "-k", "decode")
    assert done.code == 0, done.text
    assert "0001_first" in done.text


def test_benchmark_histogram_works(project: Project) -> None:
    """The histogram is drawn from the same samples."""
    # Importing it here would bring a backport that hides plugins from later pytest runs in process.
    if importlib.util.find_spec("pygal") is None:
        pytest.skip("pygal, which draws it, is not installed")
    done = project.run("--update-baselines", "--benchmark-histogram=hist", "-k", "decode")
    assert done.code == 0, done.text
    assert list(project.path.glob("hist*.svg"))


@pytest.mark.parametrize("option", ["--benchmark-disable", "-pno:benchmark", "--benchmark-skip"])
def test_verdicts_do_not_need_it(project: Project, option: str) -> None:
    """Disabled, skipped or absent, the gate works unchanged."""
    done = project.run("--update-baselines", option, "-k", "decode")
    assert done.code == 0, done.text
    assert done.verdicts() == {"one/w decode_tps": "RECORDED"}


def test_junit_carries_verdicts_and_figures(project: Project) -> None:
    """A failing gate is a failure in JUnit, with the figures as a property."""
    done = project.run("--junitxml=j.xml", "-k", "buffers")
    assert done.code == 1
    root = ET.parse(project.path / "j.xml").getroot()  # noqa: S314 - our own file
    [suite] = root.iter("testsuite")
    assert suite.get("failures") == "1"
    [found] = [p for p in root.iter("property") if p.get("name") == "llmperf"]
    verdicts = json.loads(str(found.get("value")))["verdicts"]
    assert [v["outcome"] for v in verdicts] == ["MISSING", "MISSING"]
    [failure] = root.iter("failure")
    assert "--update-baselines" in str(failure.get("message")) + str(failure.text)


def test_xdist_merges_results_on_the_controller(project: Project) -> None:
    """Workers measure, one after the other; the controller writes and shows the table."""
    done = project.run("-n2", "--update-baselines")
    assert done.code == 0, done.text
    assert done.verdicts() == {
        "one/launch kv_mib": "RECORDED",
        "one/launch n_ctx": "RECORDED",
        "one/w decode_tps": "RECORDED",
    }
    assert len(project.baseline_files()) == 1


def test_tests_of_one_config_run_together(project: Project) -> None:
    """Order follows the config, so that its servers start once."""
    project.write(
        "test_suite.py",
        """
        import pytest

        @pytest.mark.llmperf(configs=["one", "two"], workloads=["w", "talk"])
        def test_a(speed): pass

        def test_plain(): pass

        @pytest.mark.llmperf(configs=["two", "one"])
        def test_b(memory): pass
        """,
    )
    done = project.run("--collect-only", "-q")
    names = [line.partition("::")[2] for line in done.text.splitlines() if "::" in line]
    assert names == [
        "test_a[one-w]",
        "test_a[one-talk]",
        "test_b[one]",
        "test_a[two-w]",
        "test_plain",
        "test_a[two-talk]",
        "test_b[two]",
    ] or [n for n in names if n != "test_plain"] == [
        "test_a[one-w]",
        "test_a[one-talk]",
        "test_b[one]",
        "test_a[two-w]",
        "test_a[two-talk]",
        "test_b[two]",
    ]


def test_xdist_reports_usage_errors_on_the_controller(project: Project) -> None:
    """A mistake that only workers see is still one line and exit 4."""
    done = project.run("-n2", "--baseline=b11545")
    assert done.code == 4, done.text
    assert "neither recorded in" in done.text
    assert "INTERNALERROR" not in done.text
