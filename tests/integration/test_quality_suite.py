"""The suite's own quality tests, run on real llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.project import Project

SUITES = Path(__file__).parents[2] / "suites"
LADDER = ["tiny-q8_0", "tiny-q6_k", "tiny-q5_k", "tiny-q4_k", "tiny-q3_k", "tiny-q2_k"]


@pytest.fixture
def own(project: Project) -> Project:
    """A project with the suite's own test module; its suite file is the repository's."""
    project.write("test_quality.py", (SUITES / "test_quality.py").read_text("utf-8"))
    (project.path / "test_suite.py").unlink()
    ini = project.path / "tox.ini"
    text = ini.read_text("utf-8").rstrip() + f"\nllmperf_suite = {SUITES / 'llmperf.toml'}\n"
    ini.write_text(text, "utf-8")
    return project


def recorded(project: Project, which: str) -> dict[str, dict[str, float]]:
    """Return what the baseline holds of a pass: config to metric to value."""
    [file] = project.baseline_files()
    results = json.loads(file.read_text("utf-8"))["results"]
    return {
        case.partition("/")[0]: {name: entry["value"] for name, entry in metrics.items()}
        for case, metrics in results.items()
        if case.endswith(f"/{which}")
    }


@pytest.mark.tools
def test_quantization_orders_as_it_should(own: Project, real_server: Path) -> None:
    """Fewer bits, more divergence; K hurts more than V; perplexity alone would not tell."""
    outcome = own.run(f"--llmperf-build={real_server}", "--update-baselines", "-k", "test_matrix")
    assert outcome.code == 0, outcome.text
    found = recorded(own, "tiny_512")
    kld = {config: values["kld_mean"] for config, values in found.items()}
    assert kld["tiny-f16"] == 0
    ladder = [kld[config] for config in LADDER]
    assert ladder == sorted(ladder)
    assert ladder[0] < 0.001
    assert ladder[-1] > 0.1
    assert kld["tiny-kv-q8_0"] < kld["tiny-v-q4_0"] < kld["tiny-k-q4_0"] < kld["tiny-kv-q4_0"]
    assert kld["tiny-k-q4_0"] > 2 * kld["tiny-v-q4_0"]
    tops = [found[config]["same_top"] for config in LADDER]
    assert tops == sorted(tops, reverse=True)
    assert abs(found["tiny-q5_k"]["ppl"] / found["tiny-f16"]["ppl"] - 1) < 0.001


@pytest.mark.tools
def test_decoding_and_long_context_are_gated(own: Project, real_server: Path) -> None:
    """One token at a time, by the server too, and prompts of several physical batches."""
    arguments = [f"--llmperf-build={real_server}", f"--baseline={real_server}"]
    outcome = own.run(*arguments, "-k", "(decode_path and f16) or (long_context and f16)")
    assert outcome.code == 0, outcome.text
    assert set(outcome.verdicts().values()) == {"PASS"}
    assert {case.split()[0] for case in outcome.verdicts()} == {
        "tiny-f16/tiny_decode",
        "tiny-f16/tiny_server",
        "tiny-f16/tiny_4096",
    }
    paths = {result["case"]: result["fingerprint"]["path"] for result in outcome.results}
    assert paths["tiny-f16/tiny_server"] == "server"
    assert paths["tiny-f16/tiny_decode"] == "tool"
