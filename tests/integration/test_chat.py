"""Chats to the real server of the installed wheel: templates, thinking, pictures, endpoints."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.endpoints import Mask, serving
from support.project import SUITE, Project

from pytest_llmperf.build.resolve import resolve
from pytest_llmperf.build.spec import parse_spec
from pytest_llmperf.measure.launch import Session, text_tokens
from pytest_llmperf.models.locate import files_of, locate
from pytest_llmperf.models.synth import make_model
from pytest_llmperf.plan.config import Config, ModelFiles, Turn, Workload
from pytest_llmperf.plan.model import Model, PresetSpec, SynthSpec
from pytest_llmperf.serve.launch import ServePlan, start

pytest.importorskip("xllamacpp")

OPTIONS = {"threads": 1, "ctx-size": 1024, "parallel": 2, "jinja": True}
TALK = Workload("talk", (Turn(48, 8), Turn(24, 8)), api="chat")
MUTE = Workload("mute", (Turn(48, 8),), api="chat", thinking=False)
LOUD = Workload("loud", (Turn(48, 8),), api="chat", thinking=True)
CROWD = Workload("crowd", (Turn(48, 8), Turn(24, 8)), api="chat", parallel=2)
SEEN = Workload("seen", (Turn(48, 8), Turn(24, 8)), api="chat", image=96, parallel=2)

MORE = """
[configs.templated]
extends = "one"
options = { jinja = true, chat-template-file = "mine.jinja" }

[workloads.chat]
api = "chat"
turns = [{ prompt = 16, generate = 8 }]
"""
QUICK = ("-o", "llmperf_launches=1", "-o", "llmperf_pairs=1", "--llmperf-budget=0")
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
TEST = """
import pytest

@pytest.mark.llmperf(configs=["templated"], workloads=["chat"])
def test_chat(speed):
    speed.gate("decode_tps", "ttft_ms")
"""


def measured(server_files: ModelFiles, folder: Path, cache: Path, *workloads: Workload) -> Session:
    """Take two samples of each workload from a server of the embedded build."""
    build = resolve(parse_spec("embedded", {}, folder), cache, print)
    with start(build, Config("any", "tiny", OPTIONS), server_files, ServePlan(folder)) as server:
        session = Session(server, text_tokens(server))
        session.settle()
        for workload in workloads:
            session.warm_up(workload)
            session.sample(workload)
            session.sample(workload)
    return session


def test_chats_are_measured(tmp_path: Path, shared_cache: Path) -> None:
    """What the server evaluates is what its template was seen to make, alone and in parallel."""
    files = ModelFiles(make_model(SynthSpec(), shared_cache))
    session = measured(files, tmp_path, shared_cache, TALK, MUTE, LOUD, CROWD)
    for workload in (TALK, MUTE, LOUD, CROWD):
        taken = session.launch.samples[workload.name]
        assert {len(values) for values in taken.values()} == {2}
    assert len(set(session.launch.digests.values())) == 4
    mute, loud = (session.script(one).requests[0].prompt for one in (MUTE, LOUD))
    assert len(mute) > len(loud) > 48


def test_pictures_are_measured(tmp_path: Path, shared_cache: Path) -> None:
    """A picture makes as many tokens every time, and is encoded for every request."""
    models = {
        "sees": Model("sees", synth=PresetSpec("llama-10m"), projector="eye"),
        "eye": Model("eye", synth=PresetSpec("vision-tiny", embedding=512)),
    }
    files = files_of(
        Config("any", "sees"), models, lambda name: locate(models[name], [], shared_cache, models)
    )
    session = measured(files, tmp_path, shared_cache, SEEN)
    taken = session.launch.samples["seen"]
    assert {len(values) for values in taken.values()} == {2}
    prompts = [len(request.prompt) for request in session.script(SEEN).requests]
    counts = [session._counts["seen", number] for number in range(4)]
    assert [count - prompt for count, prompt in zip(counts, prompts, strict=True)] == [16] * 4
    log = Path(session.launch.log).read_text("utf-8", errors="replace")
    # Three times two turns of two conversations.
    assert log.count("image decoded") == 12


def test_a_template_is_pinned(project: Project) -> None:
    """A file beside the suite file; with another content nothing recorded compares."""
    project.write("suites/llmperf.toml", SUITE + MORE)
    project.write("suites/mine.jinja", TEMPLATE)
    project.write("test_suite.py", TEST)
    recorded = project.run("--update-baselines", *QUICK)
    assert set(recorded.verdicts().values()) == {"RECORDED"}, recorded.text
    project.write("suites/mine.jinja", TEMPLATE + "<assistant>")
    changed = project.run(*QUICK)
    assert set(changed.verdicts().values()) == {"INCOMPARABLE"}, changed.text
    assert "prompt: " in changed.text


def test_builds_that_render_otherwise_are_not_compared(project: Project) -> None:
    """Side by side it is an ERROR that names both, and no verdict on speed."""
    other = project.write("other.jinja", TEMPLATE + "<assistant>")
    builds = (
        f'[builds.changed]\nsource = "embedded"\noptions = {{ chat-template-file = "{other}" }}\n'
    )
    project.write("suites/llmperf.toml", SUITE + MORE + builds)
    project.write("suites/mine.jinja", TEMPLATE)
    project.write("test_suite.py", TEST)
    done = project.run("--llmperf-build=changed", "--baseline=embedded", *QUICK)
    assert set(done.verdicts().values()) == {"ERROR"}, done.text
    assert "b11549 and b11549+changed were not asked the same by chat" in done.text


def test_an_openai_endpoint_is_a_build(
    project: Project, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A real server that shows nothing but OpenAI's API: measured, and INCONCLUSIVE at most."""
    monkeypatch.delenv("LLMPERF_ENDPOINT_MODEL", raising=False)
    project.write("suites/llmperf.toml", SUITE + MORE)
    project.write("suites/mine.jinja", TEMPLATE)
    vram = TEST.replace("test_chat", "test_vram").replace('"decode_tps", "ttft_ms"', '"vram_mib"')
    project.write("test_suite.py", TEST + vram)
    cache = Path(os.environ["LLMPERF_CACHE"])
    build = resolve(parse_spec("embedded", {}, tmp_path), cache, print)
    files = ModelFiles(make_model(SynthSpec(), cache))
    config = Config("any", "tiny", OPTIONS)
    with start(build, config, files, ServePlan(tmp_path / "run")) as server:
        key = next((tmp_path / "run").glob("*.key")).read_text("utf-8").strip()
        with serving(Mask(server.url, key)) as url:
            done = project.run(f"--llmperf-build={url}", f"--baseline={url}", *QUICK)
            assert done.verdicts() == {
                "templated/chat decode_tps": "INCONCLUSIVE",
                "templated/chat ttft_ms": "INCONCLUSIVE",
                "templated/chat vram_mib": "ERROR",
            }, done.text
            assert "is an OpenAI-compatible endpoint, model org/tiny" in done.text
            assert "vram_mib was not measured on tiny" in done.text
