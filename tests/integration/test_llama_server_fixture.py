"""``llama_server`` and ``build`` for tests of one's own."""

from __future__ import annotations

import json
import urllib.request

import pytest
from support.project import Project

from pytest_llmperf.build.resolve import resolve
from pytest_llmperf.build.spec import parse_spec
from pytest_llmperf.models.synth import make_model
from pytest_llmperf.plan.config import Config, ModelFiles
from pytest_llmperf.plan.model import SynthSpec
from pytest_llmperf.serve.launch import ServePlan, start


def test_one_server_serves_all_tests_of_a_config(project: Project) -> None:
    """The server is started once a config and answers with its key."""
    project.write(
        "test_suite.py",
        """
        import pytest

        PIDS = set()

        @pytest.mark.llmperf(configs=["one"])
        @pytest.mark.parametrize("n", [1, 2, 3])
        def test_props(llama_server, build, n):
            PIDS.add(llama_server.pid)
            assert llama_server.client.get("/props")
            assert build.number == 11549

        def test_once():
            assert len(PIDS) == 1
        """,
    )
    done = project.run("--baseline=embedded", report=False)
    assert done.code == 0, done.text
    assert "4 passed" in done.text


def test_running_server_is_a_build(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """``http://…`` measures a server that somebody else started."""
    cache = project.path / "cache"
    build = resolve(parse_spec("embedded", {}, project.path), cache, print)
    model = make_model(SynthSpec(), cache)
    config = Config("any", "tiny", {"threads": 1, "ctx-size": 512})
    with start(build, config, ModelFiles(model), ServePlan(project.path / "logs")) as server:
        key = next((project.path / "logs").glob("*.key")).read_text("utf-8").strip()
        request = urllib.request.Request(  # noqa: S310 - loopback
            f"{server.url}/props", headers={"Authorization": f"Bearer {key}"}
        )
        with urllib.request.urlopen(request) as reply:  # noqa: S310 - loopback
            assert json.load(reply)
        monkeypatch.setenv("LLMPERF_API_KEY", key)
        done = project.run(f"--llmperf-build={server.url}", "--update-baselines", "-k", "decode")
        assert done.verdicts() == {"one/w decode_tps": "RECORDED"}, done.text
        assert server.alive()


def test_gate_in_the_same_test_stops_the_server(project: Project) -> None:
    """Measuring stops the shared server; that is no crash."""
    project.write(
        "test_suite.py",
        """
        import pytest

        @pytest.mark.llmperf(configs=["one"])
        def test_both(llama_server, memory):
            assert llama_server.client.post("/tokenize", {"content": "a"})["tokens"]
            memory.gate("n_ctx")
        """,
    )
    done = project.run("--baseline=embedded")
    assert done.code == 0, done.text


def test_build_alone_needs_no_case(project: Project) -> None:
    """A test may ask for nothing but the build."""
    project.write("test_suite.py", "def test_number(build):\n    assert build.number == 11549\n")
    done = project.run("--baseline=embedded", report=False)
    assert done.code == 0, done.text
