"""pytest-xdist: one worker a GPU, each config on one of them, one run."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from support.cards import UUIDS, give_cards
from support.project import Project

# A worker cannot have workers.
pytestmark = pytest.mark.alone

TWO_CONFIGS = """
import pytest

@pytest.mark.llmperf(configs=["one", "two"])
def test_buffers(memory):
    memory.gate("kv_mib", "n_ctx")

@pytest.mark.llmperf(configs=["one", "two"], workloads=["w", "talk"])
def test_decode(speed):
    speed.gate("decode_tps")

def test_plain():
    pass
"""

MEETING = """
import os, time
from pathlib import Path
import pytest

HERE = Path(__file__).parent

@pytest.mark.llmperf(configs={configs})
def test_meet(llama_server, llmperf_case):
    # Ends only if the other config's server runs at the same time.
    environment = Path(f"/proc/{{llama_server.pid}}/environ").read_bytes().split(b"\\0")
    told = [line.decode() for line in environment if line.startswith(b"CUDA_VISIBLE_DEVICES=")]
    (HERE / f"up-{{llmperf_case.config.name}}").write_text("".join(told))
    until = time.monotonic() + 60
    while len(list(HERE.glob("up-*"))) < 2:
        assert time.monotonic() < until, "the other config's server never came"
        time.sleep(0.05)
"""

IN_TURN = """
from pathlib import Path
import pytest

@pytest.mark.llmperf(configs={configs})
@pytest.mark.parametrize("number", range(3))
def test_in_turn(llama_server, llmperf_case, number):
    with (Path(__file__).parent / "journal").open("a") as journal:
        journal.write(llmperf_case.config.name + "\\n")
"""


def logs(project: Project, config: str) -> list[Path]:
    """Return the logs of a config's servers, of the latest run."""
    return sorted((project.path / ".llmperf" / "latest").resolve().rglob(f"*-{config}.log"))


def test_each_config_starts_once_in_a_run(project: Project) -> None:
    """All its tests fall to one worker, whatever else there is to do."""
    project.write("test_suite.py", TWO_CONFIGS)
    done = project.run("-n2", "--update-baselines")
    assert done.code == 0, done.text
    assert "7 passed" in done.text
    assert len(done.verdicts()) == 8
    assert set(done.verdicts().values()) == {"RECORDED"}
    for config in ("one", "two"):
        # Two launches are two starts, for three tests.
        assert len(logs(project, config)) == 2
    workers = {logs(project, config)[0].parent.name for config in ("one", "two")}
    assert workers == {"gw0", "gw1"}


def test_a_run_is_one_run(project: Project) -> None:
    """One folder, one baseline file, one report, one headline; progress says whose it is."""
    project.write("test_suite.py", TWO_CONFIGS)
    done = project.run("-n2", "--update-baselines")
    assert done.code == 0, done.text
    [path] = project.baseline_files()
    text = path.read_text("utf-8")
    assert '"one/w"' in text
    assert '"two/w"' in text
    [folder] = (project.path / ".llmperf").glob("run-*")
    assert (project.path / ".llmperf" / "latest").resolve() == folder
    assert {one.name for one in folder.iterdir()} == {"gw0", "gw1"}
    assert {result["case"] for result in done.results} == {
        f"{config}/{what}" for config in ("one", "two") for what in ("launch", "w", "talk")
    }
    assert done.text.count("llmperf: build under test") == 1
    assert f"logs in {folder}\n" in done.text
    assert re.search(r"^\[gw[01]\] llmperf: ", done.text, re.MULTILINE)


def test_failures_are_those_of_a_run_without_workers(project: Project) -> None:
    """Exit code, JUnit and table."""
    project.write("test_suite.py", TWO_CONFIGS)
    done = project.run("-n2", "--junitxml=j.xml", "-k", "buffers")
    assert done.code == 1
    root = ET.parse(project.path / "j.xml").getroot()  # noqa: S314 - our own file
    [suite] = root.iter("testsuite")
    assert suite.get("failures") == "2"
    assert len([p for p in root.iter("property") if p.get("name") == "llmperf"]) == 2
    assert set(done.verdicts().values()) == {"MISSING"}


def test_what_runs_on_the_cpu_takes_turns(project: Project) -> None:
    """Whatever the number of workers: a config has the host until its tests are done."""
    project.write("test_suite.py", IN_TURN.format(configs=["one", "two"]))
    done = project.run("-n2", report=False)
    assert done.code == 0, done.text
    journal = (project.path / "journal").read_text("utf-8").split()
    assert journal in ([*["one"] * 3, *["two"] * 3], [*["two"] * 3, *["one"] * 3])


def test_each_worker_has_a_gpu_of_its_own(project: Project) -> None:
    """Configs run at the same time, and their servers see one card each."""
    give_cards(project)
    project.write("test_suite.py", MEETING.format(configs=["left", "right"]))
    done = project.run("-n", "auto", report=False)
    assert done.code == 0, done.text
    assert "2 workers" in done.text
    told = {path.read_text("utf-8") for path in project.path.glob("up-*")}
    assert told == {f"CUDA_VISIBLE_DEVICES={uuid}" for uuid in UUIDS}


def test_gpu_configs_are_measured_side_by_side_in_time(project: Project) -> None:
    """Their verdicts are the same as without workers; commands say on which card they were."""
    give_cards(project)
    project.write(
        "test_suite.py", TWO_CONFIGS.replace('["one", "two"]', '["left", "right", "both"]')
    )
    done = project.run("-n2", "--update-baselines", "-k", "buffers")
    assert done.code == 0, done.text
    assert set(done.verdicts().values()) == {"RECORDED"}
    commands = {result["case"]: result["new"]["command"] for result in done.results}
    for config in ("left", "right"):
        chosen = commands[f"{config}/launch"].split(" ")[0]
        assert chosen in {f"CUDA_VISIBLE_DEVICES={uuid}" for uuid in UUIDS}
    # All that there are need not be told.
    assert not commands["both/launch"].startswith("CUDA")
    prints = {result["case"]: result["fingerprint"].get("gpus") for result in done.results}
    assert prints == {"left/launch": None, "right/launch": None, "both/launch": 2}


@pytest.mark.parametrize("config", ["both", "one"])
def test_what_needs_all_waits_for_the_others(project: Project, config: str) -> None:
    """Two cards, or the CPU: nothing else is measured meanwhile."""
    give_cards(project)
    project.write("test_suite.py", IN_TURN.format(configs=["left", config]))
    done = project.run("-n2", report=False)
    assert done.code == 0, done.text
    journal = (project.path / "journal").read_text("utf-8").split()
    assert journal in ([*["left"] * 3, *[config] * 3], [*[config] * 3, *["left"] * 3])


def test_more_gpus_than_there_are_fail_the_test(project: Project) -> None:
    """In one line; the others go on."""
    give_cards(project)
    project.write("test_suite.py", TWO_CONFIGS.replace('["one", "two"]', '["left", "many"]'))
    done = project.run("--update-baselines", "-k", "buffers")
    assert done.code == 1
    assert "config many needs 3 GPUs, this machine has 2" in done.text
    assert {outcome for case, outcome in done.verdicts().items() if "left" in case} == {"RECORDED"}


def test_a_worker_that_is_killed_leaves_its_gpu_to_others(project: Project) -> None:
    """Its server goes with it; the test that it died of fails once, the others run."""
    project.write(
        "test_suite.py",
        """
        import os, signal
        from pathlib import Path
        import pytest

        @pytest.mark.llmperf(configs=["one"])
        def test_dies(llama_server):
            with (Path(__file__).parent / "journal").open("a") as journal:
                journal.write("dies\\n")
            os.kill(os.getpid(), signal.SIGKILL)

        @pytest.mark.llmperf(configs=["one", "two"])
        def test_buffers(memory):
            memory.gate("n_ctx")
        """,
    )
    done = project.run("-n2", "--update-baselines")
    assert done.code == 1
    assert "1 failed, 2 passed" in done.text
    assert (project.path / "journal").read_text("utf-8") == "dies\n"
    assert done.verdicts() == {"one/launch n_ctx": "RECORDED", "two/launch n_ctx": "RECORDED"}


def test_another_way_of_sharing_out_is_left_alone(project: Project) -> None:
    """``--dist`` is the user's to choose; all is measured all the same."""
    project.write("test_suite.py", TWO_CONFIGS)
    done = project.run("-n2", "--dist=worksteal", "--update-baselines", "-k", "buffers")
    assert done.code == 0, done.text
    assert set(done.verdicts().values()) == {"RECORDED"}


def test_a_broken_suite_file_is_told_once(project: Project) -> None:
    """However many workers read it: one line, and the exit code of a mistake in what was asked."""
    project.write("test_suite.py", TWO_CONFIGS)
    path = project.path / "suites" / "llmperf.toml"
    path.write_text(path.read_text("utf-8") + "\n[broken\n", "utf-8")
    done = project.run("-n2", report=False)
    assert done.code == 4
    assert done.text.count("not valid TOML") == 1
    assert "Traceback" not in done.text
    assert "INTERNALERROR" not in done.text


@pytest.mark.parametrize("suite", [None, "[broken"])
def test_tests_of_others_are_shared_out_as_ever(project: Project, suite: str | None) -> None:
    """Without a suite file, and with one that is broken but not used."""
    path = project.path / "suites" / "llmperf.toml"
    path.unlink()
    if suite is not None:
        path.write_text(suite, "utf-8")
    project.write(
        "test_suite.py",
        """
        import sys
        import pytest

        @pytest.mark.parametrize("number", range(8))
        def test_plain(number):
            assert "pytest_llmperf.session" not in sys.modules
        """,
    )
    done = project.run("-n2", report=False)
    assert done.code == 0, done.text
    assert "8 passed" in done.text
    assert not (project.path / ".llmperf").exists()
