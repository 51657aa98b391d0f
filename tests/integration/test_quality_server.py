"""Passes through real servers, token by token, beside those of the real llama-perplexity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import pytest

from pytest_llmperf.build.build import Build
from pytest_llmperf.build.resolve import resolve
from pytest_llmperf.build.spec import parse_spec
from pytest_llmperf.plan.config import Config
from pytest_llmperf.plan.options import OptionValue
from pytest_llmperf.quality.divergence import Summary, compare, summarize
from pytest_llmperf.quality.logits import LogitsReader
from pytest_llmperf.quality.perplexity import PassPlan, Perplexity, run_perplexity
from pytest_llmperf.quality.probe import LISTED, run_probes
from pytest_llmperf.serve.launch import ServePlan

DATA = Path(__file__).parents[2] / "pytest_llmperf" / "data"
MODEL, TEXT = DATA / "tiny-quality.gguf", DATA / "quality.txt"
CHUNKS = 2
ALL = 1 << 20
"""More tokens than a vocabulary has."""

OPTIONS: dict[str, OptionValue] = {"threads": 1}
# The same model, but as one that begins every text with a token of its own.
BEGINS: dict[str, OptionValue] = {
    **OPTIONS,
    "override-kv": "tokenizer.ggml.add_bos_token=bool:true",
}


@dataclass(frozen=True)
class Passed:
    """What a pass found, and the stream that it wrote."""

    found: Perplexity
    stream: bytes

    def against(self, base: Passed) -> Summary:
        """Compare it with a base."""
        readers = [LogitsReader(BytesIO(one.stream), "a stream") for one in (base, self)]
        return summarize(compare(*readers))


Pass = Callable[..., Passed]


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Pass:
    """Pass the text through a build's server."""

    def run(
        build: Build,
        listed: int = LISTED,
        options: dict[str, OptionValue] = OPTIONS,
        text: Path = TEXT,
    ) -> Passed:
        folder, taken = tmp_path_factory.mktemp("probe"), list[bytes]()
        found = run_probes(
            build,
            Config("one", "tiny", options),
            MODEL,
            text,
            PassPlan(chunks=CHUNKS, folder=folder),
            ServePlan(folder, timeout=60.0, hang=60.0),
            consume=lambda stream: taken.append(stream.read()),
            listed=listed,
        )
        return Passed(found, taken[0])

    return run


@pytest.fixture(scope="module")
def pass_tool(tmp_path_factory: pytest.TempPathFactory) -> Pass:
    """Pass the text through a build's llama-perplexity."""

    def run(build: Build, options: dict[str, OptionValue] = OPTIONS, text: Path = TEXT) -> Passed:
        plan, taken = (
            PassPlan(chunks=CHUNKS, folder=tmp_path_factory.mktemp("tool")),
            list[bytes](),
        )
        found = run_perplexity(
            build, options, MODEL, text, plan, consume=lambda stream: taken.append(stream.read())
        )
        return Passed(found, taken[-1])

    return run


@pytest.fixture(scope="module")
def embedded(shared_cache: Path) -> Build:
    """The wheel that is installed beside the package."""
    pytest.importorskip("xllamacpp")
    return resolve(parse_spec("embedded", {}, Path.cwd()), shared_cache, print)


@pytest.fixture(scope="module")
def tools(real_server: Path, shared_cache: Path) -> Build:
    """A build that has both programs."""
    return resolve(parse_spec(str(real_server), {}, Path.cwd()), shared_cache, print)


def test_a_pass_through_a_server(embedded: Build, probe: Pass) -> None:
    """It finds what llama-perplexity finds, and finds it again to the last bit."""
    first, again = probe(embedded), probe(embedded)
    assert not first.found.partial
    assert first.found.planned == len(first.found.running) == CHUNKS
    # What llama-perplexity of b11434 says of these chunks.
    assert first.found.running == pytest.approx((12.9328, 8.5463), rel=2e-3)
    summary = again.against(first)
    assert abs(summary.kld.value) < 1e-6
    assert summary.same_top.value == 1


def test_what_is_listed_does_not_change_the_perplexity(embedded: Build, probe: Pass) -> None:
    """It is exact for any number of listed tokens; what a coarse tail adds is divergence."""
    few, many = probe(embedded, 8), probe(embedded)
    assert few.found.value == pytest.approx(many.found.value, rel=1e-5)
    assert few.against(many).kld.value > 1e-2


@pytest.mark.tools
@pytest.mark.parametrize("options", [OPTIONS, BEGINS], ids=["plain", "begins"])
@pytest.mark.parametrize(("listed", "most"), [(ALL, 2e-5), (LISTED, 5e-3)], ids=["all", "listed"])
def test_both_paths_agree(
    tools: Build,
    probe: Pass,
    pass_tool: Pass,
    *,
    options: dict[str, OptionValue],
    listed: int,
    most: float,
) -> None:
    """The same tokens are scored, and one build's kernels for one token and for many agree."""
    tool, server = pass_tool(tools, options), probe(tools, listed, options)
    summary = server.against(tool)
    assert summary.kld.value < most
    assert summary.ppl_ratio.value == pytest.approx(1, abs=1e-3)
    assert summary.same_top.value > 0.99
    # The tool loses its last lines now and then (docs/llama-cpp.md); what it scored is whole.
    told = tool.found.running
    assert server.found.running[: len(told)] == pytest.approx(told, rel=1e-3)
    if tool.found.error is not None:
        assert server.found.value == pytest.approx(tool.found.value, rel=1e-3)
        assert server.found.error == pytest.approx(tool.found.error, rel=1e-2)


@pytest.fixture
def torn(tmp_path: Path) -> Path:
    """A text of characters that are several tokens each."""
    text = tmp_path / "torn.txt"
    text.write_text("Größe, naïve façade, ελληνικά, 日本語のテキスト, Übermut. " * 40, "utf-8")
    return text


def test_tokens_that_are_no_whole_characters(embedded: Build, probe: Pass, torn: Path) -> None:
    """The server does not speak of them when they are sampled; they are scored all the same."""
    found = probe(embedded, text=torn).found
    assert not found.partial
    assert len(found.running) == CHUNKS


@pytest.mark.tools
def test_both_paths_agree_on_such_tokens(
    tools: Build, probe: Pass, pass_tool: Pass, torn: Path
) -> None:
    """Their log-probabilities are the right ones."""
    tool, server = pass_tool(tools, text=torn), probe(tools, ALL, text=torn)
    summary = server.against(tool)
    assert summary.kld.value < 2e-5
    assert summary.same_top.value > 0.99
    told = tool.found.running
    assert server.found.running[: len(told)] == pytest.approx(told, rel=5e-3)
