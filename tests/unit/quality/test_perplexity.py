"""What becomes of every way in which llama-perplexity ends."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import pytest
from support.fakes import write_program

from pytest_llmperf.build.build import Build
from pytest_llmperf.errors import BuildError, CheckError, OutOfMemoryError, ToolError
from pytest_llmperf.quality.perplexity import PassPlan, Perplexity, compose, run_perplexity

FAKE = Path(__file__).parents[2] / "fake_perplexity.py"


@dataclass
class Lab:
    """A build with a fake tool, and passes of a corpus by it."""

    folder: Path
    said: list[str] = field(default_factory=list)

    def build(self, fault: str = "") -> Build:
        """Return a build whose tool ends in this way; its server knows one option more."""
        command = (sys.executable, str(FAKE))
        write_program(self.folder / "bin" / "llama-perplexity", command)
        server = write_program(self.folder / "bin" / "llama-server", command)
        return Build("b1", 1, "abc", str(server), "00", (str(server),), env={"FAULT": fault})

    def run(self, fault: str = "", **options: int) -> Perplexity:
        """Pass a corpus."""
        return run_perplexity(self.build(fault), options, Path("m"), Path("t"), self.plan)

    @property
    def plan(self) -> PassPlan:
        """Where it runs."""
        return PassPlan(folder=self.folder / "run", chunks=4, progress=self.said.append)


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    """A folder with a build."""
    return Lab(tmp_path)


def test_a_whole_pass(lab: Lab) -> None:
    """The final estimate with its error, and the perplexity after each chunk."""
    found = lab.run()
    assert (found.value, found.error, found.planned) == (8.5, 0.25, 4)
    assert found.running == (8.125, 8.25, 8.375, 8.5)
    assert not found.partial
    assert Path(found.log).exists()
    assert "--ctx-size 512 --batch-size 512 --ubatch-size 512 --chunks 4" in found.command


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("killed", "ended with killed by SIGKILL (exit 137: "),
        ("decode", "gave up after 2 of 4 chunks: decode: failed to decode, ret = -3"),
        ("silent", "ended with exit code 0 without its last lines"),
        ("nan", "found a perplexity that is no number"),
        ("final", "ended after 4 of 4 chunks with an estimate that is no number"),
    ],
)
def test_a_pass_that_breaks_off_is_partial(lab: Lab, fault: str, why: str) -> None:
    """The finished chunks are kept, the reason is told, and it is never taken for a whole one."""
    found = lab.run(fault)
    assert found.partial
    assert found.failure.startswith(why)
    assert found.running[:2] == (8.125, 8.25)
    assert found.value == found.running[-1]
    assert found.error is None


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("short", "gave up before the first chunk: perplexity: you need at least 1024 tokens"),
        ("dies", "ended with exit code 3 before the first chunk"),
    ],
)
def test_a_pass_without_a_chunk_is_an_error(lab: Lab, fault: str, why: str) -> None:
    """With the tool's last lines and the log."""
    with pytest.raises(ToolError) as caught:
        lab.run(fault)
    assert f"llama-perplexity {why}" in str(caught.value)
    assert "log: " in str(caught.value)


def test_a_pass_without_memory_is_told_as_such(lab: Lab) -> None:
    """With the buffer, as of a server."""
    with pytest.raises(OutOfMemoryError, match="out of memory: CPU KV buffer of 19532 MiB") as told:
        lab.run("memory")
    assert told.value.what == "CPU KV buffer of 19532 MiB"
    assert "llama-perplexity ended with exit code 3 before the first chunk" in str(told.value)


def test_a_final_estimate_that_was_lost(lab: Lab) -> None:
    """The last chunk's running estimate is the same figure; only its error is not known."""
    found = lab.run("unsaid")
    assert not found.partial
    assert (found.value, found.error) == (8.5, None)


def test_lost_lines_are_asked_for_again(lab: Lab) -> None:
    """A pass without its last lines is made again before it is called partial."""
    lab.run("silent")
    assert sum("last lines are lost, again" in said for said in lab.said) == 3
    assert len(list(lab.plan.folder.glob("perplexity-*.log"))) == 4


def test_lost_lines_do_not_matter_where_every_row_was_read(lab: Lab) -> None:
    """The reader knows that nothing is missing; it is asked once."""
    calls: list[int] = []

    def consume(stream: BinaryIO) -> None:
        calls.append(len(stream.read()))

    found = run_perplexity(lab.build("silent"), {}, Path("m"), Path("t"), lab.plan, consume=consume)
    assert not found.partial
    assert math.isnan(found.value)
    assert len(calls) == 1


def test_what_is_written_is_read_while_it_is_written(lab: Lab) -> None:
    """Every byte arrives, and no file is left."""
    taken: list[int] = []

    def consume(stream: BinaryIO) -> None:
        while data := stream.read(70_001):
            taken.append(len(data))

    found = run_perplexity(lab.build(), {}, Path("m"), Path("t"), lab.plan, consume=consume)
    assert sum(taken) == 4 * 5 * 50_000
    assert not found.partial
    assert not list(lab.plan.folder.glob("*.fifo"))


@pytest.mark.parametrize("fault", ["dies", "short"])
def test_a_tool_that_never_writes_does_not_hang_the_reader(lab: Lab, fault: str) -> None:
    """The reader gives up with it, and the error is the tool's."""
    with pytest.raises(ToolError):
        run_perplexity(lab.build(fault), {}, Path("m"), Path("t"), lab.plan, consume=BinaryIO.read)


def test_a_reader_that_gives_up_ends_the_tool(lab: Lab) -> None:
    """Its error is raised, and the tool does not wait for ever on a full pipe."""

    def consume(stream: BinaryIO) -> None:
        stream.read(10)
        raise CheckError("row 3 is damaged")

    with pytest.raises(CheckError, match="row 3 is damaged"):
        run_perplexity(lab.build("slow"), {}, Path("m"), Path("t"), lab.plan, consume=consume)


def test_progress_tells_chunks_and_time_left(lab: Lab) -> None:
    """A pass of more than two seconds says how far it is."""
    lab.run("slow")
    assert any("of 4 chunks" in said for said in lab.said)
    assert any("s left" in said for said in lab.said)


def test_options_of_the_server_alone_are_left_out(lab: Lab) -> None:
    """What the tool knows is passed on; what neither knows is an error that names it."""
    build = lab.build()
    command = compose(build, {"cache-type-k": "q8_0"}, Path("m"), Path("t"), lab.plan)
    assert "--cache-type-k q8_0" in " ".join(command)
    with pytest.raises(BuildError, match="has no option --cache-typ"):
        compose(build, {"cache-typ": "q8_0"}, Path("m"), Path("t"), lab.plan)


def test_a_config_file_of_the_users_is_not_taken(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would change the options without a word; one that is read all the same is an error."""
    monkeypatch.setenv("XDG_CONFIG_HOME", "/home/somebody")
    found = lab.run("config")
    assert found.partial
    assert "no-config/llama.cpp/config.ini: move it away" in found.failure
    assert "somebody" not in found.failure


def test_a_tool_that_writes_nothing_is_no_whole_pass(lab: Lab) -> None:
    """Though it says that it went through."""
    with pytest.raises(ToolError, match="it wrote no log-probabilities"):
        run_perplexity(
            lab.build("unwritten"), {}, Path("m"), Path("t"), lab.plan, consume=BinaryIO.read
        )


def test_a_tool_that_never_begins_is_given_up(lab: Lab) -> None:
    """With the setting that allows it more."""
    plan = replace(lab.plan, start=1.0)
    with pytest.raises(ToolError, match=r"did not begin its first chunk in 1 s: raise `llmperf_st"):
        run_perplexity(lab.build("stuck"), {}, Path("m"), Path("t"), plan)


def test_a_pass_longer_than_its_limit_is_given_up(lab: Lab) -> None:
    """Though nothing shows how long it would take."""
    plan = replace(lab.plan, limit=1.0)
    with pytest.raises(ToolError, match=r"0 chunks would take \d s, reckoned from 0"):
        run_perplexity(lab.build("stuck"), {}, Path("m"), Path("t"), plan)
