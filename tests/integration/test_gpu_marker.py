"""Configs that need a GPU carry the mark ``gpu``."""

from __future__ import annotations

import pytest
from support.project import Project

from pytest_llmperf.gpu.cards import gpus

MODULE = """
import pytest

@pytest.mark.llmperf(configs=["one", "card"])
def test_context(memory):
    memory.gate("n_ctx")
"""


@pytest.mark.skipif(bool(gpus()), reason="this machine has a GPU")
def test_fails_without_a_gpu(project: Project) -> None:
    """``-m gpu`` on a machine without a GPU fails; it does not skip."""
    project.write("test_suite.py", MODULE)
    done = project.run("-m", "gpu", "--update-baselines")
    assert done.code == 1
    assert done.verdicts() == {"card/launch n_ctx": "ERROR"}
    assert "no GPU that the build can use" in done.text
    assert project.baseline_files() == []


def test_can_be_left_out(project: Project) -> None:
    """``-m "not gpu"`` runs the rest."""
    project.write("test_suite.py", MODULE)
    done = project.run("-m", "not gpu", "--update-baselines")
    assert done.code == 0, done.text
    assert done.verdicts() == {"one/launch n_ctx": "RECORDED"}


@pytest.mark.skipif(bool(gpus()), reason="this machine has a GPU")
def test_mark_of_the_test_counts_too(project: Project) -> None:
    """A test marked ``gpu`` needs one, also with a config that runs anywhere."""
    project.write(
        "test_suite.py",
        """
        import pytest

        @pytest.mark.gpu
        @pytest.mark.llmperf(configs=["one"])
        def test_context(memory):
            memory.gate("n_ctx")

        @pytest.mark.gpu
        @pytest.mark.llmperf(configs=["one"])
        def test_server(llama_server):
            pass
        """,
    )
    done = project.run("-m", "gpu", "--update-baselines")
    assert done.code == 1
    assert done.verdicts() == {"one/launch n_ctx": "ERROR"}
    assert "1 failed, 1 error" in done.text


def test_configs_of_several_gpus_can_be_left_out(project: Project) -> None:
    """They carry a mark of their own, since many a GPU machine has one."""
    suite = project.path / "suites" / "llmperf.toml"
    pair = '\n[configs.pair]\nextends = "card"\ngpus = 2\n'
    suite.write_text(suite.read_text("utf-8") + pair, "utf-8")
    project.write("test_suite.py", MODULE.replace('"card"', '"card", "pair"'))
    for expression, found in (
        ("gpu", {"card", "pair"}),
        ("gpu and not multi_gpu", {"card"}),
        ("multi_gpu", {"pair"}),
    ):
        done = project.run("--collect-only", "-q", "-m", expression, report=False)
        named = {name for name in ("one", "card", "pair") if f"test_context[{name}]" in done.text}
        assert named == found
