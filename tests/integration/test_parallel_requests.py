"""Several requests at once to the real server of the installed wheel."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.project import SUITE, Project

from pytest_llmperf.build.resolve import resolve
from pytest_llmperf.build.spec import parse_spec
from pytest_llmperf.measure.launch import Session
from pytest_llmperf.models.synth import make_model
from pytest_llmperf.models.text import text
from pytest_llmperf.plan.config import LAUNCH, Config, ModelFiles, Turn, Workload
from pytest_llmperf.plan.model import SynthSpec
from pytest_llmperf.serve.launch import ServePlan, start

pytest.importorskip("xllamacpp")

CROWD = Workload("crowd", (Turn(32, 12), Turn(8, 12)), parallel=2)
MORE = """
[configs.crowded]
extends = "one"
options = { parallel = 2 }

[workloads.crowd]
turns = [{ prompt = 16, generate = 8 }]
parallel = 2
"""


def test_a_real_server_answers_several_at_once(tmp_path: Path, shared_cache: Path) -> None:
    """Each in a slot of its own, with its share of the context; nothing comes from a cache."""
    build = resolve(parse_spec("embedded", {}, tmp_path), shared_cache, print)
    model = make_model(SynthSpec(), shared_cache)
    config = Config("crowded", "tiny", {"threads": 1, "ctx-size": 1024, "parallel": 2})
    with start(build, config, ModelFiles(model), ServePlan(tmp_path / "run")) as server:
        session = Session(server, server.client.tokenize(text()))
        session.settle()
        assert session.slots() == 2
        assert session.launch.samples[LAUNCH]["n_ctx"] == [512.0]
        session.warm_up(CROWD)
        session.sample(CROWD)
        taken = session.launch.samples["crowd"]
        assert {len(values) for values in taken.values()} == {1}
        assert "draft_acceptance" not in taken
        assert taken["aggregate_tps"][0] > 0
        log = server.log_text()
    # The slots are seen at work, whichever begins.
    assert {number for number in (0, 1) if f"id  {number} |" in log} == {0, 1}


def test_parallel_requests_are_gated(project: Project) -> None:
    """Recorded and compared as any other; a config without the slots is an ERROR that says so."""
    project.write("suites/llmperf.toml", SUITE + MORE)
    project.write(
        "test_suite.py",
        """
        import pytest

        @pytest.mark.llmperf(configs=["crowded", "one"], workloads=["crowd"])
        def test_crowd(speed):
            speed.gate("aggregate_tps")
        """,
    )
    recorded = project.run("--update-baselines")
    assert recorded.verdicts() == {
        "crowded/crowd aggregate_tps": "RECORDED",
        "one/crowd aggregate_tps": "ERROR",
    }, recorded.text
    assert "workload crowd sends 2 requests at once, config one has slots for 1" in recorded.text
    again = project.run("-k", "crowded")
    assert again.verdicts()["crowded/crowd aggregate_tps"] != "ERROR", again.text
