"""The workflow for a GPU runner, and the units for a machine without one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pytest_llmperf import plugin

yaml: Any = pytest.importorskip("yaml", reason="PyYAML, which gguf brings, reads the workflow")

ROOT = Path(__file__).parents[3]
FILE = ROOT / ".github" / "workflows" / "gpu.yml"
UNITS = ROOT / "scripts" / "systemd"
BASH = shutil.which("bash") or "bash"


@pytest.fixture(scope="module")
def workflow() -> dict[Any, Any]:
    """Return the workflow as read."""
    read = yaml.safe_load(FILE.read_text("utf-8"))
    assert isinstance(read, dict)
    # YAML 1.1 reads the bare word `on` as a truth value.
    read["on"] = read.pop(True, None) or read["on"]
    return read


def steps(workflow: dict[Any, Any]) -> Iterator[dict[str, Any]]:
    """Go through the steps of all jobs."""
    for job in workflow["jobs"].values():
        yield from job["steps"]


def script(workflow: dict[Any, Any], name: str) -> str:
    """Return the commands of the step of that name."""
    return next(str(step["run"]) for step in steps(workflow) if step["name"] == name)


class Runner:
    """A runner's workspace, in which a step's commands are run as GitHub runs them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "work"
        self.folder.mkdir()
        self.temp = folder / "temp"
        self.output = folder / "output.txt"
        self.summary = folder / "summary.md"
        self.calls = folder / "calls.txt"
        for path in (self.output, self.summary, self.calls):
            path.touch()

    def program(self, path: Path, text: str) -> None:
        """Write a program that first writes down its arguments, one a line."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            f'#!/bin/sh\nfor one; do printf "%s\\n" "$one" >> "{self.calls}"; done\n{text}\n',
            "utf-8",
        )
        path.chmod(0o755)

    def run(self, commands: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run commands; a failed one ends them, also inside a pipe."""
        return subprocess.run(
            [BASH, "--noprofile", "--norc", "-eo", "pipefail", "-c", commands],
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={
                "PATH": f"{self.temp / 'path'}:{os.environ['PATH']}",
                "GITHUB_OUTPUT": str(self.output),
                "GITHUB_STEP_SUMMARY": str(self.summary),
                "GITHUB_WORKSPACE": str(self.folder),
                "RUNNER_TEMP": str(self.temp),
                **env,
            },
        )

    def called(self) -> list[str]:
        """Return the arguments of all calls."""
        return self.calls.read_text("utf-8").splitlines()


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    """Return an empty workspace with the scripts of the repository's shape."""
    runner = Runner(tmp_path)
    runner.program(
        runner.folder / "scripts" / "build_llama.sh", "echo /cache/llama.cpp/b11434-cuda-90/bin"
    )
    runner.program(runner.temp / "path" / "docker", "")
    runner.program(runner.temp / "path" / "nvidia-smi", "exit 9")
    return runner


# -- what it says -------------------------------------------------------------------------------


def test_nothing_starts_it_from_a_fork(workflow: dict[Any, Any]) -> None:
    """Only what people with write access do, and the clock, start a job on the GPU machine."""
    assert set(workflow["on"]) == {
        "push",
        "repository_dispatch",
        "schedule",
        "workflow_dispatch",
    }
    assert workflow["on"]["push"]["paths"] == ["llama-build.txt"]


def test_the_gpu_job_cannot_write(workflow: dict[Any, Any]) -> None:
    """The job that runs builds may read only; the one that may write runs none and has no GPU."""
    measure, propose = workflow["jobs"]["measure"], workflow["jobs"]["propose"]
    assert workflow["permissions"] == {}
    assert measure["permissions"] == {"contents": "read"}
    assert measure["steps"][0]["with"]["persist-credentials"] is False
    assert propose["permissions"] == {"contents": "write", "pull-requests": "write"}
    assert propose["runs-on"] == "ubuntu-latest"
    assert "secrets." not in FILE.read_text("utf-8")


def test_one_job_has_the_gpus_to_the_end(workflow: dict[Any, Any]) -> None:
    """A second job waits, in a queue, and breaks nothing off; every job has a time limit."""
    measure = workflow["jobs"]["measure"]
    assert measure["runs-on"] == ["self-hosted", "gpu"]
    assert measure["concurrency"]["group"] == "gpu"
    assert measure["concurrency"]["cancel-in-progress"] is False
    assert all(job["timeout-minutes"] > 0 for job in workflow["jobs"].values())


def test_actions_are_pinned(workflow: dict[Any, Any]) -> None:
    """Actions are named by commit, with the version beside it; and by GitHub's own hand."""
    used = [step["uses"] for step in steps(workflow) if "uses" in step]
    assert used
    for action in used:
        assert re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}", action)
        assert re.search(re.escape(action) + r" # v\d+\.\d+\.\d+\n", FILE.read_text("utf-8"))


def test_no_expression_stands_in_a_command(workflow: dict[Any, Any]) -> None:
    """What people type reaches a shell through variables, so that it is never read as commands."""
    commands = [step["run"] for step in steps(workflow) if "run" in step]
    assert commands
    for command in commands:
        assert "${{" not in command
        subprocess.run([BASH, "-n", "-c", command], check=True, timeout=10)


def test_options_and_markers_exist(workflow: dict[Any, Any]) -> None:
    """Every option and marker that pytest is given is one of this plugin's, pytest's or xdist's."""
    known = {"--junitxml"}

    class Parser:
        def getgroup(self, *_: str) -> Parser:
            return self

        def addoption(self, *names: str, **_: object) -> None:
            known.update(names)

        def addini(self, *_: str, **__: object) -> None:
            pass

    plugin.pytest_addoption(Parser())  # type: ignore[arg-type]  # all of a parser that it uses
    used: set[str] = set()
    for text in (script(workflow, "Measure"), (UNITS / "gate.sh").read_text("utf-8")):
        used |= set(re.findall(r"--(?:llmperf|baseline|update|junit)[a-z-]*", text))
        assert set(re.findall(r'^ *marks="?([^"\n]*)', text, re.MULTILINE)) == set(MARKS)
        assert '-m "$marks" -n auto' in text
    assert {"--llmperf-build", "--baseline", "--update-baselines"} <= used <= known
    markers = {marker.partition(":")[0] for marker in plugin.MARKERS}
    assert {"gpu", "multi_gpu"} <= markers


def test_what_it_names_exists(workflow: dict[Any, Any]) -> None:
    """Scripts and pages named in the workflow are there, and scripts can be run."""
    named = set(re.findall(r"(?:scripts|docs)/[\w./]+\.\w+", FILE.read_text("utf-8")))
    assert {"scripts/build_llama.sh", "docs/runner.md"} <= named
    for path in named:
        assert (ROOT / path).is_file()
        assert not path.endswith(".sh") or os.access(ROOT / path, os.X_OK)
    reports = [step["with"] for step in steps(workflow) if "upload" in step.get("uses", "")]
    assert {"report", "baselines"} == {one["name"] for one in reports}


# -- which build --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env", "spec", "name"),
    [
        ({"ASKED": "11434"}, "/cache/llama.cpp/b11434-cuda-90/bin", "b11434-cuda-90"),
        ({"EVENT": "schedule"}, "/cache/llama.cpp/b11434-cuda-90/bin", "b11434-cuda-90"),
        ({"ASKED": "b8156"}, "b8156", "b8156"),
        ({"ASKED": "pypi:xllamacpp==0.2.12"}, "pypi:xllamacpp==0.2.12", "pypi:xllamacpp==0.2.12"),
        ({"EVENT": "push"}, "docker:ghcr.io/o/i:b1@sha256:ab", "docker:ghcr.io/o/i:b1@sha256:ab"),
    ],
)
def test_a_build_is_found(
    workflow: dict[Any, Any], runner: Runner, env: dict[str, str], spec: str, name: str
) -> None:
    """A number is built, a spec is passed on; by night the newest, on a push the file's."""
    (runner.folder / "llama-build.txt").write_text(
        "# the build in production\n\n  docker:ghcr.io/o/i:b1@sha256:ab  # since May\n", "utf-8"
    )
    done = runner.run(
        script(workflow, "Find or make the build"), **{"ASKED": "", "EVENT": "push", **env}
    )
    assert done.returncode == 0, done.stderr
    assert runner.output.read_text("utf-8") == f"spec={spec}\nname={name}\n"
    if spec.startswith("docker:"):
        assert runner.called() == ["pull", spec.removeprefix("docker:")]


@pytest.mark.parametrize(
    "asked",
    [
        "-rf",
        "--update-baselines",
        "11434; touch pwned",
        "$(touch pwned)",
        "`touch pwned`",
        "docker:a --privileged",
        "a\nname=b",
        "'",
        "a|b",
    ],
)
def test_what_is_no_build_is_refused(workflow: dict[Any, Any], runner: Runner, asked: str) -> None:
    """Options, two words, a second line and shell are refused before anything is called."""
    done = runner.run(script(workflow, "Find or make the build"), ASKED=asked, EVENT="push")
    assert done.returncode == 4
    assert runner.called() == []
    assert runner.output.read_text("utf-8") == ""
    assert not (runner.folder / "pwned").exists()


def test_no_build_at_all_is_told(workflow: dict[Any, Any], runner: Runner) -> None:
    """Without an input and without the file it says what is missing."""
    done = runner.run(script(workflow, "Find or make the build"), ASKED="", EVENT="push")
    assert done.returncode == 4
    assert "llama-build.txt" in done.stdout


def test_the_plugin_of_another_repository_is_named(
    workflow: dict[Any, Any], runner: Runner
) -> None:
    """Outside this repository nothing is installed by a name that nobody gave."""
    done = runner.run(script(workflow, "Install the plugin"), PLUGIN="")
    assert done.returncode == 4
    assert "LLMPERF_PLUGIN" in done.stdout


# -- measuring and summing up -------------------------------------------------------------------

MARKS = ("gpu", "gpu and not multi_gpu")
CLOSING = "====== llmperf ======\ncase  metric  verdict\nverdicts: 1 PASS"


@pytest.mark.parametrize(
    ("env", "told"),
    [
        ({"BASELINE": "b8149"}, ["--baseline=b8149"]),
        ({"SELECTION": "c7 and not long_running"}, ["-k", "c7 and not long_running"]),
        ({"MODE": "record", "BASELINE": "b8149"}, ["--update-baselines"]),
        ({}, []),
    ],
)
def test_pytest_is_called_as_asked(
    workflow: dict[Any, Any], runner: Runner, env: dict[str, str], told: list[str]
) -> None:
    """Gating takes the baseline, recording takes none; a selection is one argument."""
    runner.program(runner.temp / "venv/bin/pytest", "echo done")
    done = runner.run(
        script(workflow, "Measure"),
        **{"SPEC": "/b/bin", "MODE": "gate", "BASELINE": "", "SELECTION": "", **env},
    )
    assert done.returncode == 0, done.stderr
    assert runner.called() == [
        "--list-gpus",
        "-m",
        "gpu and not multi_gpu",
        "-n",
        "auto",
        "--llmperf-build=/b/bin",
        "--llmperf-report=report",
        "--junitxml=report/junit.xml",
        *told,
    ]
    assert runner.output.read_text("utf-8") == "status=0\n"


SMI = "echo 'GPU {index}: NVIDIA H200 (UUID: GPU-{index})'"
TWO_LISTED = "\n".join(SMI.format(index=index) for index in range(2))
MIG_LISTED = f"{SMI.format(index=0)}\necho '  MIG 1g.18gb     Device  0: (UUID: MIG-1)'"


@pytest.mark.parametrize(
    ("listed", "env", "several"),
    [
        (TWO_LISTED, {}, True),
        (TWO_LISTED, {"CUDA_VISIBLE_DEVICES": "GPU-0,GPU-1"}, True),
        (TWO_LISTED, {"CUDA_VISIBLE_DEVICES": "GPU-1"}, False),
        (TWO_LISTED, {"CUDA_VISIBLE_DEVICES": ""}, False),
        (SMI.format(index=0), {}, False),
        (MIG_LISTED, {}, False),
        ("exit 9", {}, False),
    ],
)
@pytest.mark.parametrize("by_timer", [False, True])
def test_what_needs_several_gpus_is_left_out_where_there_is_one(
    workflow: dict[Any, Any],
    runner: Runner,
    listed: str,
    env: dict[str, str],
    *,
    several: bool,
    by_timer: bool,
) -> None:
    """Else the gate of every machine with one GPU would be red for ever."""
    runner.program(runner.temp / "path" / "nvidia-smi", listed)
    runner.program(runner.temp / "venv/bin/pytest", "echo done")
    if by_timer:
        runner.program(runner.temp / "python", "echo done")
        copy = runner.folder / "scripts" / "systemd" / "gate.sh"
        copy.parent.mkdir()
        shutil.copy(UNITS / "gate.sh", copy)
        done = runner.run(str(copy), LLMPERF_PYTHON=str(runner.temp / "python"), **env)
    else:
        asked = {"SPEC": "/b/bin", "MODE": "gate", "BASELINE": "", "SELECTION": ""}
        done = runner.run(script(workflow, "Measure"), **asked, **env)
    assert done.returncode == 0, done.stderr
    called = runner.called()
    assert called[called.index("-n") - 1] == MARKS[0 if several else 1]


@pytest.mark.parametrize(
    ("status", "told"),
    [
        (0, "Passed"),
        (1, "Failed"),
        (2, "Interrupted"),
        (3, "Broken"),
        (4, "Not measured"),
        (5, "no test was selected"),
    ],
)
def test_exit_codes_are_told_apart(
    workflow: dict[Any, Any], runner: Runner, status: int, told: str
) -> None:
    """The step ends as pytest did, and the summary says what that means, with the table."""
    runner.program(runner.temp / "venv/bin/pytest", f"echo '{CLOSING}'\nexit {status}")
    env = {"MODE": "gate", "SPEC": "x", "BASELINE": "", "SELECTION": "", "NAME": "b11434"}
    assert runner.run(script(workflow, "Measure"), **env).returncode == status
    written = runner.output.read_text("utf-8").strip().removeprefix("status=")
    logs = runner.folder / ".llmperf" / "run-1" / "gw0"
    logs.mkdir(parents=True)
    (logs / "001-b11434-c7.log").write_text("a server's log", "utf-8")
    (logs / "001-b11434-c7.key").write_text("a key", "utf-8")
    (runner.folder / ".llmperf" / "latest").symlink_to("run-1")
    done = runner.run(script(workflow, "Sum up"), STATUS=written, **env)
    assert done.returncode == 0, done.stderr
    summary = runner.summary.read_text("utf-8")
    assert told in summary
    assert f"(exit {status})" in summary
    assert CLOSING in summary
    assert summary == (runner.folder / "report" / "summary.md").read_text("utf-8")
    kept = [path.name for path in (runner.folder / "report" / "logs").rglob("*.*")]
    assert kept == ([] if status == 0 else ["001-b11434-c7.log"])


def test_a_job_that_never_measured_has_a_summary(workflow: dict[Any, Any], runner: Runner) -> None:
    """A build that failed leaves neither output nor verdict, and the summary says so."""
    done = runner.run(script(workflow, "Sum up"), MODE="gate", NAME="", STATUS="")
    assert done.returncode == 0, done.stderr
    assert "No verdict" in runner.summary.read_text("utf-8")
    assert "(exit none)" in runner.summary.read_text("utf-8")


# -- the proposal -------------------------------------------------------------------------------


def test_recorded_baselines_are_proposed(workflow: dict[Any, Any], runner: Runner) -> None:
    """New files under baselines/ become a branch and a pull request; no change becomes neither."""
    commands = script(workflow, "Open a pull request")
    runner.program(runner.temp / "path" / "gh", "")
    fetched = runner.temp / "baselines" / "b11434"
    fetched.mkdir(parents=True)
    (fetched / "h200.json").write_text("{}\n", "utf-8")
    (runner.temp / "report").mkdir()
    (runner.temp / "report" / "summary.md").write_text("## record\n", "utf-8")
    env = {"NAME": "b11434", "BASE": "main", "BRANCH": "llmperf/baselines-1-1"}
    env |= {"GIT_CONFIG_GLOBAL": os.devnull, "HOME": str(runner.temp)}
    prepare = (
        "git init --quiet --bare ../origin.git && git init --quiet -b main . && "
        "git -c user.name=a -c user.email=a@example.org commit --quiet --allow-empty -m first && "
        "git remote add origin ../origin.git"
    )
    done = runner.run(f"{prepare}\n{commands}", **env)
    assert done.returncode == 0, done.stderr
    body = (runner.temp / "body.md").read_text("utf-8")
    assert body.startswith("## record\n")
    assert "baselines/b11434/h200.json" in body
    assert runner.called()[:6] == ["pr", "create", "--base", "main", "--head", env["BRANCH"]]
    changed = runner.run(f"git --git-dir ../origin.git show --stat {env['BRANCH']}", **env)
    assert "Baselines of b11434" in changed.stdout
    calls = runner.called()
    again = runner.run(commands, **env)
    assert again.returncode == 0, again.stderr
    assert runner.called() == calls
    assert "Nothing in baselines/ changed" in runner.summary.read_text("utf-8")


# -- without GitHub -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "told", "mailed"), [(0, "passed", False), (1, "regressed", True), (4, "not", True)]
)
def test_a_timer_gates_and_reports(runner: Runner, status: int, told: str, *, mailed: bool) -> None:
    """The unit's script builds, gates, leaves a report and mails what did not pass."""
    runner.program(runner.temp / "python", f"echo '{CLOSING}'\nexit {status}")
    runner.program(runner.temp / "path" / "mail", "cat > mailed.txt")
    copy = runner.folder / "scripts" / "systemd" / "gate.sh"
    copy.parent.mkdir()
    shutil.copy(UNITS / "gate.sh", copy)
    done = runner.run(
        str(copy), LLMPERF_PYTHON=str(runner.temp / "python"), LLMPERF_MAIL="a@example.org"
    )
    assert done.returncode == status
    assert f"b11434-cuda-90: {told}" in done.stdout or status == 4
    assert CLOSING in done.stdout
    assert (runner.folder / "mailed.txt").exists() is mailed
    assert (runner.folder / "reports" / "latest" / "pytest.txt").read_text(
        "utf-8"
    ) == f"{CLOSING}\n"
    assert runner.called()[:5] == ["latest", "--list-gpus", "-m", "pytest", "-m"]


def test_a_build_that_fails_by_night_is_reported(runner: Runner) -> None:
    """No build is no pass: exit 4, with what the build script said."""
    runner.program(runner.folder / "scripts/build_llama.sh", "echo no compiler >&2; exit 1")
    copy = runner.folder / "scripts" / "systemd" / "gate.sh"
    copy.parent.mkdir()
    shutil.copy(UNITS / "gate.sh", copy)
    done = runner.run(str(copy))
    assert done.returncode == 4
    assert "latest: could not be built (exit 4)" in done.stdout
    assert "no compiler" in done.stdout


def test_the_page_shows_the_units_as_they_are() -> None:
    """docs/runner.md holds both units in full."""
    page = (ROOT / "docs" / "runner.md").read_text("utf-8")
    for name in ("llmperf-gate.service", "llmperf-gate.timer"):
        assert (UNITS / name).read_text("utf-8").strip() in page
