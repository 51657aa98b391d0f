"""Two tools that write at once, and one reader that compares."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from support.fakes import write_program

from pytest_llmperf.build.build import Build
from pytest_llmperf.errors import BaselineError, ToolError
from pytest_llmperf.quality.compare import Compared, Side, compare_passes
from pytest_llmperf.quality.logits import write_stream
from pytest_llmperf.quality.perplexity import PassPlan

FAKE = Path(__file__).parents[2] / "fake_perplexity.py"
CHUNKS, CONTEXT, VOCAB = 4, 16, 300
SCORED = CONTEXT - 1 - CONTEXT // 2


@dataclass
class Lab:
    """Streams of made-up models, and tools that write them."""

    folder: Path

    def stream(self, name: str, logits: np.ndarray, seed: int = 0) -> Path:
        """Write a stream of these logits about a text."""
        tokens = np.random.default_rng(seed).integers(0, VOCAB, (CHUNKS, CONTEXT))
        path = self.folder / name
        with path.open("wb") as file:
            write_stream(file, tokens, logits, n_vocab=VOCAB)
        return path

    def side(self, name: str, stream: Path, fault: str = "") -> Side:
        """Return a pass whose tool writes this stream and ends in this way."""
        command = (sys.executable, str(FAKE))
        write_program(self.folder / name / "llama-perplexity", command)
        server = write_program(self.folder / name / "llama-server", command)
        env = {"FAULT": fault, "STREAM": str(stream)}
        build = Build(name, 1, "abc", str(server), "00", (str(server),), env=env)
        return Side(build, {}, Path("model"))

    def compare(self, base: Side, new: Side) -> Compared:
        """Compare two passes."""
        plan = PassPlan(folder=self.folder / "run", chunks=CHUNKS)
        return compare_passes(base, new, Path("text"), plan)


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    """A folder for streams and tools."""
    return Lab(tmp_path)


@pytest.fixture
def logits() -> np.ndarray:
    """Logits of the scored tokens of four chunks."""
    return np.random.default_rng(1).normal(0, 3, (CHUNKS, SCORED, VOCAB)).astype(np.float32)


def test_equal_passes_do_not_diverge(lab: Lab, logits: np.ndarray) -> None:
    """Two builds that compute the same: no divergence, every top the same."""
    stream = lab.stream("a", logits)
    found = lab.compare(lab.side("b1", stream), lab.side("b2", stream))
    assert found.summary.kld.value == pytest.approx(0, abs=1e-6)
    assert found.summary.same_top.value == 1
    assert found.summary.chunks == CHUNKS
    assert (found.base.value, found.new.value) == (8.5, 8.5)


def test_a_disturbed_pass_diverges(lab: Lab, logits: np.ndarray) -> None:
    """Noise on the logits of the build under test is seen in every chunk."""
    noise = np.random.default_rng(2).normal(0, 0.5, logits.shape).astype(np.float32)
    base, new = lab.stream("a", logits), lab.stream("b", logits + noise)
    found = lab.compare(lab.side("b1", base), lab.side("b2", new))
    assert found.summary.kld.value > 0.01
    assert (found.summary.by_chunk.kld > 0).all()
    assert found.summary.same_top.value < 1


def test_other_tokens_are_refused(lab: Lab, logits: np.ndarray) -> None:
    """A build that cuts the text differently is no candidate, and the error says where."""
    base, new = lab.stream("a", logits), lab.stream("b", logits, seed=5)
    with pytest.raises(BaselineError, match="differ in the text, first at chunk 0"):
        lab.compare(lab.side("b1", base), lab.side("b2", new))


@pytest.mark.parametrize("fault", ["killed", "silent", "dies", "short"])
@pytest.mark.parametrize("failing", ["base", "new"])
def test_a_tool_that_fails_is_the_error(
    lab: Lab, logits: np.ndarray, failing: str, fault: str
) -> None:
    """Not the broken stream that it left, nor what became of the other pass; nothing hangs."""
    stream = lab.stream("a", logits)
    sides = {
        name: lab.side(name, stream, fault if name == failing else "") for name in ("base", "new")
    }
    with pytest.raises(ToolError) as caught:
        lab.compare(sides["base"], sides["new"])
    assert "llama-perplexity " in str(caught.value)
    assert not list((lab.folder / "run").glob("*.fifo"))
