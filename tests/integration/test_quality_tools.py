"""Passes of the real llama-perplexity: what it says, and what is read from its stream."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from pytest_llmperf.build.resolve import resolve
from pytest_llmperf.build.spec import parse_spec
from pytest_llmperf.errors import ToolError
from pytest_llmperf.models.locate import locate
from pytest_llmperf.plan.config import Config
from pytest_llmperf.plan.model import Model, SynthSpec
from pytest_llmperf.plan.options import OptionValue
from pytest_llmperf.quality.compare import Compared, compare_passes
from pytest_llmperf.quality.divergence import summarize
from pytest_llmperf.quality.perplexity import PassPlan, run_perplexity
from pytest_llmperf.quality.side import Side
from pytest_llmperf.serve.launch import ServePlan

pytestmark = pytest.mark.tools

CHUNKS, CONTEXT = 6, 128
LINES = ("Mean +KLD", "Maximum +KLD", "Same top p", r"Mean PPL\(Q\)")
TEXT = Path(__file__).parents[2] / "pytest_llmperf" / "data" / "text.txt"
OPTIONS: dict[str, OptionValue] = {"threads": 2, "flash-attn": "on"}
QUANTIZED: dict[str, OptionValue] = {**OPTIONS, "cache-type-k": "q4_0", "cache-type-v": "q4_0"}


@pytest.fixture(scope="module")
def model(shared_cache: Path) -> Path:
    """A small model with random weights: poor answers, but answers."""
    spec = SynthSpec(layers=4, embedding=256, heads=4, kv_heads=2, feed_forward=512, vocab=2048)
    return locate(Model("m", synth=spec), [], shared_cache)


@pytest.fixture(scope="module")
def side(real_server: Path, model: Path, shared_cache: Path) -> Side:
    """The real tools with f16 KV."""
    build = resolve(parse_spec(str(real_server), {}, Path.cwd()), shared_cache, lambda _text: None)
    return Side(build, Config("f16", "m", OPTIONS), model, "tool", ServePlan(shared_cache))


def plan(folder: Path) -> PassPlan:
    """A few short chunks."""
    return PassPlan(context=CONTEXT, batch=CONTEXT, ubatch=CONTEXT, chunks=CHUNKS, folder=folder)


@pytest.fixture(scope="module")
def compared(side: Side, tmp_path_factory: pytest.TempPathFactory) -> Compared:
    """A quantized KV cache against f16, by streaming."""
    quantized = replace(side, config=Config("q4_0", "m", QUANTIZED))
    return compare_passes(side, quantized, TEXT, plan(tmp_path_factory.mktemp("passes")))


def own_figures(side: Side, folder: Path) -> str:
    """What the tool itself says in two steps, over a file."""
    file, program = folder / "base.kld", Path(side.build.command[0]).with_name("llama-perplexity")
    common = [str(program), "-m", str(side.model), "-c", str(CONTEXT), "-b", str(CONTEXT)]
    common += ["-ub", str(CONTEXT), "-t", "2", "-fa", "on", "--kl-divergence-base", str(file)]
    first = [*common, "-f", str(TEXT), "--chunks", str(CHUNKS)]
    subprocess.run(first, check=True, capture_output=True)
    second = [*common, "--kl-divergence", "-ctk", "q4_0", "-ctv", "q4_0"]
    for _ in range(10):
        said = subprocess.run(second, check=True, capture_output=True, text=True).stdout
        if all(re.search(f"^{line}", said, re.MULTILINE) for line in LINES):
            return said
    pytest.fail("the tool lost its last lines ten times")


def test_a_real_pass(side: Side, tmp_path: Path) -> None:
    """The final estimate is that of the last chunk, and every chunk has one."""
    found = run_perplexity(side.build, OPTIONS, side.model, TEXT, plan(tmp_path))
    assert not found.partial
    assert len(found.running) == found.planned == CHUNKS
    assert found.value == pytest.approx(found.running[-1], rel=1e-3)


def test_too_little_text_is_an_error(side: Side, tmp_path: Path) -> None:
    """The tool ends with exit code 0; we do not."""
    short = tmp_path / "short.txt"
    short.write_text("Not much.", "utf-8")
    with pytest.raises(ToolError, match=r"need at least|is the text at least twice the context"):
        run_perplexity(side.build, OPTIONS, side.model, short, plan(tmp_path))


def test_streamed_figures_are_the_tools_own(compared: Compared, side: Side, tmp_path: Path) -> None:
    """Mean divergence within a thousandth, the same tops exactly."""
    text = own_figures(side, tmp_path)
    found = re.findall(r"^(Mean|Maximum|Same) +(?:KLD|top p):\s+(\S+)", text, re.MULTILINE)
    said = {name: float(value) for name, value in found}
    summary = summarize(compared.tokens)
    assert summary.kld.value == pytest.approx(said["Mean"], rel=1e-3)
    assert 100 * summary.same_top.value == pytest.approx(said["Same"], abs=5e-4)
    assert summary.kld_percentiles[100.0] == pytest.approx(said["Maximum"], rel=5e-3)
    [ppl] = re.findall(r"^Mean PPL\(Q\) +: +(\S+)", text, re.MULTILINE)
    # The stream is clipped 16 nats below the likeliest token, and random weights are often wrong.
    assert summary.ppl.value == pytest.approx(float(ppl), rel=2e-2)


def test_a_build_does_not_diverge_from_itself(side: Side, tmp_path: Path) -> None:
    """Two passes of one build with one config agree to the format's rounding."""
    found = compare_passes(side, side, TEXT, plan(tmp_path))
    assert abs(found.tokens.kld.mean()) < 1e-5
    assert found.tokens.same_top.mean() > 0.999
