"""Two tools that write at once, and one reader that compares."""

from __future__ import annotations

import signal
from pathlib import Path
from threading import Timer

import numpy as np
import pytest
from support.project import command_lines
from support.streams import CHUNKS, Lab, made_up

from pytest_llmperf.errors import BaselineError, ToolError
from pytest_llmperf.plan.config import Config
from pytest_llmperf.quality.compare import Compared, compare_passes
from pytest_llmperf.quality.perplexity import PassPlan
from pytest_llmperf.quality.side import Side
from pytest_llmperf.serve.launch import ServePlan


def side(lab: Lab, name: str, stream: Path, fault: str = "") -> Side:
    """Return a pass whose tool writes this stream and ends in this way."""
    build = lab.build(name, stream, fault)
    return Side(build, Config("c", "m"), Path("model"), "tool", ServePlan(lab.folder / "run"))


def compared(lab: Lab, base: Side, new: Side) -> Compared:
    """Compare two passes."""
    plan = PassPlan(folder=lab.folder / "run", chunks=CHUNKS)
    return compare_passes(base, new, Path("text"), plan)


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    """A folder for streams and tools."""
    return Lab(tmp_path)


@pytest.fixture
def logits() -> np.ndarray:
    """Logits of the scored tokens of four chunks."""
    return made_up()


def test_equal_passes_do_not_diverge(lab: Lab, logits: np.ndarray) -> None:
    """Two builds that compute the same: no divergence, every top the same."""
    stream = lab.stream("a", logits)
    found = compared(lab, side(lab, "b1", stream), side(lab, "b2", stream))
    assert found.tokens.kld.mean() == pytest.approx(0, abs=1e-6)
    assert found.tokens.same_top.all()
    assert found.tokens.n_chunk == CHUNKS
    assert (found.base.value, found.new.value) == (8.5, 8.5)


def test_a_disturbed_pass_diverges(lab: Lab, logits: np.ndarray) -> None:
    """Noise on the logits of the build under test is seen in every chunk."""
    base, new = lab.stream("a", logits), lab.stream("b", made_up(noise=1.0))
    found = compared(lab, side(lab, "b1", base), side(lab, "b2", new))
    assert found.tokens.kld.mean() > 0.01
    assert (found.tokens.kld.reshape(CHUNKS, -1).mean(axis=1) > 0).all()
    assert not found.tokens.same_top.all()


def test_other_tokens_are_refused(lab: Lab, logits: np.ndarray) -> None:
    """A build that cuts the text differently is no candidate, and the error says where."""
    base, new = lab.stream("a", logits), lab.stream("b", logits, seed=5)
    with pytest.raises(BaselineError, match="differ in the text, first at chunk 0"):
        compared(lab, side(lab, "b1", base), side(lab, "b2", new))


@pytest.mark.parametrize("fault", ["killed", "silent", "dies", "short"])
@pytest.mark.parametrize("failing", ["base", "new"])
def test_a_tool_that_fails_is_the_error(
    lab: Lab, logits: np.ndarray, failing: str, fault: str
) -> None:
    """Not the broken stream that it left, nor what became of the other pass; nothing hangs."""
    stream = lab.stream("a", logits)
    sides = {
        name: side(lab, name, stream, fault if name == failing else "") for name in ("base", "new")
    }
    with pytest.raises(ToolError) as caught:
        compared(lab, sides["base"], sides["new"])
    named = f"the pass of {failing}" if fault in {"killed", "silent"} else "llama-perplexity "
    assert named in str(caught.value)
    assert not list((lab.folder / "run").glob("*.fifo"))


@pytest.mark.parametrize("stuck", ["base", "new"])
def test_an_interrupt_ends_both_passes(lab: Lab, logits: np.ndarray, stuck: str) -> None:
    """Whichever of them waits for the other; no tool and no FIFO is left."""
    stream = lab.stream("a", logits)
    sides = {
        name: side(lab, name, stream, "stuck" if name == stuck else "") for name in ("base", "new")
    }
    timer = Timer(1.5, signal.raise_signal, [signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        compared(lab, sides["base"], sides["new"])
    assert not list((lab.folder / "run").glob("*.fifo"))
    left = [line for line in command_lines() if str(lab.folder) in line]
    assert not left
