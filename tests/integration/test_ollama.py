"""A run of pytest on an Ollama, here a fake one that speaks as its documentation says."""

from __future__ import annotations

import pytest
from support.endpoints import FakeOllama, serving
from support.project import SUITE, Project


def test_an_ollama_is_a_build(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorded under its version, by its own durations; what a config loses is told."""
    monkeypatch.setenv("LLMPERF_ENDPOINT_MODEL", "qwen3.5:35b")
    project.write("suites/llmperf.toml", SUITE)
    project.write(
        "test_suite.py",
        """
        import pytest

        @pytest.mark.llmperf(configs=["two"], workloads=["talk"])
        def test_ollama(speed):
            speed.gate("decode_tps", "prefill_tps", "vram_mib", "kv_mib")
        """,
    )
    ollama = FakeOllama(models=("other:1b", "qwen3.5:35b"))
    with serving(ollama) as url:
        done = project.run(f"--llmperf-build=ollama:{url}", "--update-baselines")
    assert done.verdicts() == {
        "two/talk decode_tps": "RECORDED",
        "two/talk prefill_tps": "RECORDED",
        "two/talk vram_mib": "RECORDED",
        "two/talk kv_mib": "ERROR",
    }, done.text
    assert "is Ollama 0.40.12, model qwen3.5:35b (5a5a5a5a5a5a)" in done.text
    assert "num_ctx 512, num_thread 1; not passed on" in done.text
    assert "no such option: cache-type-k" in done.text
    assert {body["model"] for body in ollama.asked} == {"qwen3.5:35b"}
