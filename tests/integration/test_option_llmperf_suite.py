"""``--llmperf-suite`` names the suite file."""

from __future__ import annotations

import pytest
from support.project import SUITE, Project


def test_another_file(project: Project) -> None:
    """The file given is read instead of the default one."""
    project.write("elsewhere/mine.toml", SUITE.replace("ctx-size = 512", "ctx-size = 768"))
    done = project.run("--llmperf-suite=elsewhere/mine.toml", "--update-baselines", "-k", "buffers")
    assert done.code == 0, done.text
    assert done.results[0]["measured"]["n_ctx"][0] == [768.0]


def test_missing_file(project: Project) -> None:
    """A file that is not there is a usage error that names the option."""
    done = project.run("--llmperf-suite=nowhere.toml")
    assert done.code == 4
    assert "nowhere.toml: there is no such suite file" in done.text
    assert "--llmperf-suite=FILE" in done.text


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("[configs.bad]\nmodel = 'huge'", "no model `huge`"),
        ("[configs.bad]\nmodle = 'tiny'", "unknown key `modle`"),
        ("[configs.one]\nmodel = 'tiny'", "Cannot declare"),
        ("[configs.bad]\nmodel = 3", "`model` must be a string"),
        ("[tolerances]\ndecode = 0.1", "no metric `decode`"),
        ("[configs.bad", "not valid TOML"),
    ],
)
def test_mistake_in_the_file(project: Project, wrong: str, said: str) -> None:
    """A mistake is one line with file and line number, exit 4, no traceback."""
    path = project.write("suites/llmperf.toml", SUITE)
    path.write_text(f"{SUITE}\n{wrong}\n", "utf-8")
    first_new_line = SUITE.count("\n") + 2
    done = project.run()
    assert done.code == 4, done.text
    assert done.text.count(said) == 1, "said once"
    assert any(
        f"llmperf.toml:{line}: " in done.text for line in (first_new_line, first_new_line + 1)
    ), done.text
    assert "Traceback" not in done.text


def test_marker_naming_no_config(project: Project) -> None:
    """A test that asks for what the file does not have is a usage error too."""
    project.write(
        "test_suite.py",
        """
        import pytest

        @pytest.mark.llmperf(configs=["onee"])
        def test_context(memory):
            memory.gate("n_ctx")
        """,
    )
    done = project.run()
    assert done.code == 4
    assert "no config `onee` (nearest: one)" in done.text


def test_fixture_without_marker(project: Project) -> None:
    """A test that uses a fixture of ours must say what it runs over."""
    project.write("test_suite.py", "def test_context(memory):\n    memory.gate('n_ctx')\n")
    done = project.run()
    assert done.code == 4
    assert "@pytest.mark.llmperf" in done.text


def test_env_file_of_a_config(project: Project) -> None:
    """Options come from an ``.env`` file beside the suite file as well."""
    project.write("suites/c.env", "LLAMA_ARG_CTX_SIZE=1024\nEXTRA_ARGS='-t 1 -ctk q8_0'\n")
    project.write(
        "suites/llmperf.toml",
        "[models.tiny]\nsynth = {}\n[configs.one]\nmodel = 'tiny'\nenv-file = 'c.env'\n",
    )
    project.write(
        "test_suite.py",
        """
        import pytest

        @pytest.mark.llmperf(configs=["one"])
        def test_context(memory):
            memory.gate("n_ctx")
        """,
    )
    done = project.run("--update-baselines")
    assert done.code == 0, done.text
    assert done.results[0]["measured"]["n_ctx"][0] == [1024.0]
    assert "--cache-type-k q8_0" in done.results[0]["new"]["command"]


def test_marker_naming_nothing(project: Project) -> None:
    """An empty list would skip the test, and so pass a gate that measures nothing."""
    project.write(
        "test_suite.py",
        """
        import pytest

        @pytest.mark.llmperf(configs=[])
        def test_context(memory):
            memory.gate("n_ctx")
        """,
    )
    done = project.run()
    assert done.code == 4
    assert "names no config" in done.text


def test_unregistered_mark_of_a_config(project: Project) -> None:
    """A mark that pytest does not know is named with its config."""
    path = project.path / "suites" / "llmperf.toml"
    path.write_text(SUITE.replace("gpu = true", "gpu = true\nmarks = ['slwo']"), "utf-8")
    project.write(
        "test_suite.py",
        """
        import pytest

        @pytest.mark.llmperf(configs=["card"])
        def test_context(memory):
            memory.gate("n_ctx")
        """,
    )
    done = project.run()
    assert done.code == 4
    assert "card/launch: not all of the marks ['gpu', 'slwo'] are registered" in done.text


def test_tolerance_of_a_marker_is_checked(project: Project) -> None:
    """A marker's tolerances obey the rules of the suite file's."""
    project.write(
        "test_suite.py",
        """
        import pytest

        @pytest.mark.llmperf(configs=["one"], tolerances={"n_ctxx": 5})
        def test_context(memory):
            memory.gate("n_ctx")
        """,
    )
    done = project.run()
    assert done.code == 4
    assert "no metric `n_ctxx` (nearest: n_ctx)" in done.text


def test_missing_env_file_is_named_with_its_line(project: Project) -> None:
    """The error points at the line of the suite file that asks for it."""
    path = project.path / "suites" / "llmperf.toml"
    path.write_text(SUITE + "\n[configs.more]\nextends = 'one'\nenv-file = 'gone.env'\n", "utf-8")
    done = project.run()
    assert done.code == 4
    assert f"llmperf.toml:{SUITE.count(chr(10)) + 4}: no env-file" in done.text
