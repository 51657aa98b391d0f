"""``--llmperf-models`` names folders of GGUF files."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.project import Project

from pytest_llmperf.models.synth import make_model
from pytest_llmperf.plan.model import SynthSpec

SUITE = """
[models.mine]
file = "mine.gguf"

[configs.one]
model = "mine"
options = { threads = 1, ctx-size = 512 }
"""
MODULE = """
import pytest

@pytest.mark.llmperf(configs=["one"])
def test_context(memory):
    memory.gate("n_ctx")
"""


@pytest.fixture
def folder(project: Project, shared_cache: Path) -> Path:
    """A folder with ``mine.gguf`` that the suite file asks for."""
    project.write("suites/llmperf.toml", SUITE)
    project.write("test_suite.py", MODULE)
    folder = project.path / "gguf"
    folder.mkdir()
    shutil.copy(make_model(SynthSpec(), shared_cache / "models"), folder / "mine.gguf")
    return folder


def test_folder_on_the_command_line(project: Project, folder: Path) -> None:
    """The file is found in the folder given, relative to where pytest was called."""
    done = project.run(f"--llmperf-models={folder.name}", "--update-baselines")
    assert done.code == 0, done.text


def test_folder_in_the_environment(
    project: Project, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``LLMPERF_MODELS`` works as well, and takes several."""
    monkeypatch.setenv("LLMPERF_MODELS", f"/nowhere:{folder}")
    done = project.run("--update-baselines")
    assert done.code == 0, done.text


@pytest.mark.usefixtures("folder")
def test_missing_file_fails_and_names_the_option(project: Project) -> None:
    """A gate without its model does not pass; the text says where it was looked for."""
    done = project.run("--llmperf-models=empty", "--update-baselines")
    assert done.code == 1
    assert set(done.verdicts().values()) == {"ERROR"}
    assert "mine.gguf" in done.text
    assert "--llmperf-models=DIR" in done.text


def test_changed_file_is_incomparable(project: Project, folder: Path) -> None:
    """Another model under the same name is not compared with the old one."""
    where = f"--llmperf-models={folder.name}"
    project.run(where, "--update-baselines")
    (folder / "mine.gguf").unlink()
    shutil.copy(make_model(SynthSpec(seed=2), folder), folder / "mine.gguf")
    done = project.run(where)
    assert done.code == 1
    assert set(done.verdicts().values()) == {"INCOMPARABLE"}
    assert "model: " in done.text
