"""All passes of a run: references, sides, and what is made once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from support.nvml import Card, Driver, forget
from support.streams import CHUNKS, SCORED, Lab, made_up

from pytest_llmperf.build.build import Build
from pytest_llmperf.errors import (
    BaselineError,
    BuildError,
    CheckError,
    LeakError,
    ModelError,
    PartialPassError,
    RunError,
)
from pytest_llmperf.gpu.cards import Gpu, gpus
from pytest_llmperf.gpu.memory import Release
from pytest_llmperf.leases import Leases
from pytest_llmperf.passes import Passes
from pytest_llmperf.plan.config import REFERENCE_SUFFIX, Case, Config, CorpusPass
from pytest_llmperf.quality.reference import Reference
from pytest_llmperf.serve.launch import ServePlan

ONE = CorpusPass("p", "text.txt", context=16, batch=16, ubatch=16, chunks=CHUNKS)
PLAIN = Config("f16", "m")
QUANTIZED = Config("q4", "m", {"cache-type-k": "q4_0"}, against="f16")


@dataclass
class Run:
    """A folder with streams, a text and a model, and the passes over them."""

    lab: Lab
    said: list[str]

    @property
    def folder(self) -> Path:
        """The folder."""
        return self.lab.folder

    def passes(self, new: Build, base: Build | None = None, **changes: object) -> Passes:
        """Return the passes of a run of these builds."""
        configs: Mapping[str, Config] = {"f16": PLAIN, "q4": QUANTIZED}
        made = Passes(
            new=new,
            base=base,
            configs=configs,
            model=lambda _config: self.folder / "model.gguf",
            corpus=lambda _one: self.folder / "text.txt",
            serve=ServePlan(self.folder / "run", progress=self.said.append),
            cache=self.folder / "cache",
            leases=Leases(self.folder / "cache" / "locks", (), (), self.said.append),
            suite_folder=self.folder,
            limit=3600.0,
        )
        return replace(made, **changes)  # type: ignore[arg-type]  # names of fields

    def passed(self) -> int:
        """Return how often a tool was run."""
        return len(list((self.folder / "run").glob("perplexity-*.log")))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A folder for passes."""
    (tmp_path / "model.gguf").write_bytes(b"GGUF of sorts")
    (tmp_path / "text.txt").write_text("words " * 100, "utf-8")
    return Run(Lab(tmp_path), [])


def means(values: list[list[float]]) -> float:
    """Return the mean over chunks of one value each."""
    return float(np.mean([one for [one] in values]))


def test_two_builds_are_compared_as_they_write(run: Run) -> None:
    """The baseline diverges from itself by nothing; nothing of the streams is kept."""
    base = run.lab.build("b1", run.lab.stream("a", made_up()))
    new = run.lab.build("b2", run.lab.stream("b", made_up(noise=1.0)))
    first, second = run.passes(new, base).side_by_side(Case(PLAIN, corpus_pass=ONE))
    assert means(first.values["kld_mean"]) == 0
    assert means(first.values["same_top"]) == 100
    assert means(second.values["kld_mean"]) > 0.01
    assert means(second.values["same_top"]) < 100
    assert [len(values) for values in second.values.values()] == [CHUNKS] * 4
    assert second.tokens == SCORED
    assert second.reference is None
    assert not list(run.folder.rglob(f"*{REFERENCE_SUFFIX}"))


def test_two_that_do_not_fit_at_once_go_one_after_the_other(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a reference of the first; what comes out is the same."""
    base = run.lab.build("b1", run.lab.stream("a", made_up()))
    new = run.lab.build("b2", run.lab.stream("b", made_up(noise=1.0)))
    case = Case(PLAIN, corpus_pass=ONE)
    _, exact = run.passes(new, base).side_by_side(case)
    monkeypatch.setattr(Passes, "_fits", lambda _self, _config, times: times == 1)
    first, second = run.passes(new, base).side_by_side(case)
    assert first.reference is not None
    assert second.reference == first.reference
    assert means(second.values["kld_mean"]) == pytest.approx(
        means(exact.values["kld_mean"]), rel=0.05
    )
    assert second.values["ppl"] == exact.values["ppl"]
    assert second.values["same_top"] == exact.values["same_top"]
    assert second.doubt["kld_least"] <= means(second.values["kld_mean"]) <= second.doubt["kld_most"]


def test_both_builds_diverge_from_another_config(run: Run) -> None:
    """A config's cost is that against its reference on the baseline's build, on either build."""
    plain, worse = run.lab.stream("a", made_up()), run.lab.stream("b", made_up(noise=1.0))
    base = run.lab.build("b1", plain, q4_0=worse)
    new = run.lab.build("b2", plain, q4_0=run.lab.stream("c", made_up(noise=2.0)))
    passes = run.passes(new, base)
    first, second = passes.side_by_side(Case(QUANTIZED, corpus_pass=ONE))
    assert 0.01 < means(first.values["kld_mean"]) < 0.5 * means(second.values["kld_mean"])
    assert first.reference == second.reference
    # The reference, and each build once, however often it is asked.
    assert run.passed() == 3
    passes.side_by_side(Case(QUANTIZED, corpus_pass=ONE))
    assert run.passed() == 3


def test_a_kept_reference_serves_the_next_run(run: Run) -> None:
    """It depends on build, model, options, text and sizes, and on nothing else."""
    plain = run.lab.stream("a", made_up())
    build = run.lab.build("b1", plain, q4_0=run.lab.stream("b", made_up(noise=1.0)))
    case = Case(QUANTIZED, corpus_pass=ONE)
    first = run.passes(build).alone(case)
    again = run.passes(build).alone(case)
    assert run.passed() == 3
    assert first.reference == again.reference
    shorter = replace(ONE, ubatch=8)
    run.passes(build).alone(Case(QUANTIZED, corpus_pass=shorter))
    assert run.passed() == 5


def test_a_build_alone_leaves_its_own_answers(run: Run) -> None:
    """As a reference that names model and text; the next build is compared with it."""
    build = run.lab.build("b1", run.lab.stream("a", made_up()))
    case = Case(PLAIN, corpus_pass=ONE)
    passes = run.passes(build)
    passed = passes.alone(case)
    assert passed.reference is not None
    assert means(passed.values["kld_mean"]) == 0
    facts = Reference.load(passed.reference).facts
    assert facts.model_sha256 == passes._model_sha(PLAIN)
    assert passes.fingerprint(case, passed)["reference"] == passes.digest(passed.reference)
    worse = run.lab.build("b2", run.lab.stream("b", made_up(noise=1.0)))
    later = run.passes(worse).against(case, passed.reference)
    assert means(later.values["kld_mean"]) > 0.01
    same = run.passes(build).against(case, passed.reference)
    assert means(same.values["kld_mean"]) == pytest.approx(0, abs=1e-6)
    assert same.values["ppl"] == passed.values["ppl"]


@pytest.mark.parametrize("kind", ["compact", "full"])
def test_a_file_is_the_reference_of_a_config_that_names_it(run: Run, kind: str) -> None:
    """Compact, or as llama-perplexity writes it."""
    stream = run.lab.stream("old.kld", made_up())
    worse = run.lab.build("b2", run.lab.stream("b", made_up(noise=1.0)))
    name = "old.kld"
    if kind == "compact":
        made = run.passes(run.lab.build("b1", stream)).alone(Case(PLAIN, corpus_pass=ONE))
        assert made.reference is not None
        name = str(made.reference.relative_to(run.folder))
    config = Config("c", "m", against=name)
    passed = run.passes(worse).alone(Case(config, corpus_pass=ONE))
    assert means(passed.values["kld_mean"]) > 0.01
    assert passed.reference == run.folder / name
    assert bool(passed.doubt) == (kind == "compact")


def test_a_file_that_is_not_there_is_named(run: Run) -> None:
    """With the config, and where it was looked for."""
    build = run.lab.build("b1", run.lab.stream("a", made_up()))
    case = Case(Config("c", "m", against="gone.kldref"), corpus_pass=ONE)
    with pytest.raises(ModelError, match=r"config c: against = 'gone.kldref': no such file"):
        run.passes(build).alone(case)


def test_a_reference_of_another_text_is_refused(run: Run) -> None:
    """Tokens are compared, not names."""
    other = run.lab.build("b1", run.lab.stream("a", made_up(), seed=3))
    case = Case(PLAIN, corpus_pass=ONE)
    made = run.passes(other).alone(case)
    assert made.reference is not None
    build = run.lab.build("b2", run.lab.stream("b", made_up()))
    with pytest.raises(BaselineError, match="differ in the text"):
        run.passes(build).against(case, made.reference)


def test_a_pass_that_breaks_off_is_partial_and_not_tried_again(run: Run) -> None:
    """What it found is kept with the error."""
    build = run.lab.build("b1", run.lab.stream("a", made_up()), fault="killed")
    passes = run.passes(build)
    for _ in range(2):
        with pytest.raises(PartialPassError, match=r"after 2 of 4 chunks") as caught:
            passes.alone(Case(PLAIN, corpus_pass=ONE))
        assert (caught.value.planned, len(caught.value.running)) == (4, 2)
    assert run.passed() == 1
    assert not list(run.folder.rglob(f"*{REFERENCE_SUFFIX}"))


def test_without_a_tool_a_server_is_asked(run: Run) -> None:
    """If the pass leaves it open; if it names the tool, the build is at fault."""
    stream = run.lab.stream("a", made_up())
    with_tool, without = run.lab.build("b1", stream), run.lab.build("b2", stream)
    (run.folder / "b2" / "llama-perplexity").unlink()
    assert run.passes(with_tool)._way(ONE) == "tool"
    assert run.passes(without)._way(ONE) == "server"
    assert run.passes(with_tool, without)._way(ONE) == "server"
    case = Case(PLAIN, corpus_pass=replace(ONE, path="tool"))
    with pytest.raises(BuildError, match="b2 has no llama-perplexity"):
        run.passes(without).alone(case)


def test_what_cannot_fit_is_refused_with_figures(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory and disk, before anything runs."""
    build = run.lab.build("b1", run.lab.stream("a", made_up()))
    case = Case(PLAIN, corpus_pass=ONE)
    with monkeypatch.context() as patch:
        patch.setattr("pytest_llmperf.passes._READER_MIB", 1e9)
        with pytest.raises(RunError, match=r"needs about 1000000000 MiB of memory, \d+ MiB are"):
            run.passes(build).alone(case)
    monkeypatch.setattr("pytest_llmperf.passes._SPARE_DISK_MIB", 1e12)
    with pytest.raises(RunError, match=r"its reference may take \d+ MiB in .*, \d+ MiB are free"):
        run.passes(build).alone(case)
    assert run.passed() == 0


def test_a_pass_that_would_take_too_long_is_refused_with_figures(run: Run) -> None:
    """As soon as its first chunks show how long it takes."""
    build = run.lab.build("b1", run.lab.stream("a", made_up()), fault="slow")
    with pytest.raises(RunError, match=r"4 chunks would take \d+ s.*the limit is 3 s"):
        run.passes(build, limit=3.0).alone(Case(PLAIN, corpus_pass=ONE))


def test_fingerprints_differ_in_what_changes_answers(run: Run) -> None:
    """Options, sizes, path, reference; not in the machine, which names the file."""
    build = run.lab.build("b1", run.lab.stream("a", made_up()))
    passes = run.passes(build)
    case = Case(PLAIN, corpus_pass=ONE)
    passed = passes.alone(case)
    plain = passes.fingerprint(case, passed)
    others = (
        (Case(replace(PLAIN, options={"threads": 2}), corpus_pass=ONE), passed, "options"),
        (Case(PLAIN, corpus_pass=replace(ONE, ubatch=1)), passed, "pass"),
        (Case(PLAIN, corpus_pass=replace(ONE, path="server")), passed, "path"),
        (Case(replace(PLAIN, against="q4"), corpus_pass=ONE), passed, "against"),
        (case, replace(passed, reference=run.folder / "text.txt"), "reference"),
    )
    for other, its_pass, name in others:
        found = passes.fingerprint(other, its_pass)
        assert {key for key in plain if plain[key] != found[key]} == {name}


def test_a_running_server_has_no_other_config(run: Run) -> None:
    """Asked for the reference, it would be compared with itself."""
    server = replace(run.lab.build("b1", run.lab.stream("a", made_up())), url="http://127.0.0.1:9")
    with pytest.raises(RunError, match="b1 is a running server and has one config, so f16 cannot"):
        run.passes(server).alone(Case(QUANTIZED, corpus_pass=ONE))


def test_equal_builds_are_both_passed(run: Run) -> None:
    """What differs between them is noise, and it is to be seen."""
    stream = run.lab.stream("a", made_up())
    build = run.lab.build("b1", stream, q4_0=run.lab.stream("b", made_up(noise=1.0)))
    first, second = run.passes(build, replace(build)).side_by_side(Case(QUANTIZED, corpus_pass=ONE))
    assert first.values == second.values
    assert run.passed() == 3


def test_a_damaged_reference_is_made_anew(run: Run) -> None:
    """Nobody would know where it lies."""
    stream = run.lab.stream("a", made_up())
    build = run.lab.build("b1", stream, q4_0=run.lab.stream("b", made_up(noise=1.0)))
    case = Case(QUANTIZED, corpus_pass=ONE)
    first = run.passes(build).alone(case)
    assert first.reference is not None
    whole = first.reference.read_bytes()
    first.reference.write_bytes(whole[:-1])
    again = run.passes(build).alone(case)
    assert again.values == first.values
    assert first.reference.read_bytes() == whole


def test_options_that_a_pass_sets_do_not_count(run: Run) -> None:
    """A config's context and batches are those of its server."""
    build = run.lab.build("b1", run.lab.stream("a", made_up()))
    passes = run.passes(build)
    wide = replace(PLAIN, options={"ctx-size": 65536, "batch-size": 4096, "parallel": 4})
    one, other = (passes.conditions(Case(c, corpus_pass=ONE)) for c in (PLAIN, wide))
    assert one == other


def test_progress_says_whose_it_is(run: Run) -> None:
    """Two passes run at once."""
    build = run.lab.build("b1", run.lab.stream("a", made_up()), fault="slow")
    run.passes(build).alone(Case(PLAIN, corpus_pass=ONE))
    assert any(text.startswith("f16: b1: perplexity: ") for text in run.said)


def test_a_text_of_few_chunks_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """They tell nothing of how chunks differ, so nothing is recorded of them."""
    monkeypatch.setattr("pytest_llmperf.passes.FEWEST_CHUNKS", 5)
    build = run.lab.build("b1", run.lab.stream("a", made_up()))
    with pytest.raises(RunError, match="the text makes 4 chunks, and fewer than 5 tell nothing"):
        run.passes(build).alone(Case(PLAIN, corpus_pass=ONE))


def test_a_pass_of_a_gpu_config_has_its_cards(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it is made, no longer; the command says which."""
    cards = tuple(Gpu(index, f"GPU-{index}", "card", 16000, "1") for index in range(2))
    monkeypatch.setattr("pytest_llmperf.serve.launch.gpus", lambda: cards)
    leases = Leases(run.folder / "locks", cards, cards, run.said.append, first=1)
    passes = run.passes(run.lab.build("b1", run.lab.stream("a", made_up())), leases=leases)
    case = Case(replace(PLAIN, gpu=True), corpus_pass=ONE)
    assert passes.alone(case).command.startswith("CUDA_VISIBLE_DEVICES=GPU-1 /")
    assert passes.serve.cards == ()
    assert not leases.held


@pytest.mark.parametrize(
    ("config", "reference", "needs"),
    [
        (PLAIN, PLAIN, (0, True)),
        (replace(PLAIN, gpu=True), PLAIN, (1, False)),
        (QUANTIZED, replace(PLAIN, gpu=True, gpus=2), (2, True)),
        (replace(QUANTIZED, gpu=True), replace(PLAIN, gpu=True, gpus=2), (2, False)),
        (replace(QUANTIZED, gpu=True), PLAIN, (1, False)),
        (replace(QUANTIZED, gpu=True), replace(PLAIN, exclusive=True), (1, True)),
    ],
)
def test_a_case_needs_what_its_reference_needs(
    run: Run, config: Config, reference: Config, needs: tuple[int, bool]
) -> None:
    """Its lease covers both."""
    build = run.lab.build("b1", run.lab.stream("a", made_up()))
    passes = run.passes(build, configs={"f16": reference, "q4": config})
    assert passes.needs(Case(config, corpus_pass=ONE)) == needs


def test_cards_are_a_condition_where_there_are_several(run: Run) -> None:
    """One is what was meant before there was a choice."""
    passes = run.passes(run.lab.build("b1", run.lab.stream("a", made_up())))
    for count in (1, 2):
        config = replace(PLAIN, gpu=True, gpus=count)
        told = passes.conditions(Case(config, corpus_pass=ONE)).get("gpus")
        assert told == (2 if count == 2 else None)


ON_GPU = replace(PLAIN, gpu=True)


@pytest.mark.parametrize(
    ("says", "told"),
    [
        ({"DEVICE": "CPU"}, r"all its buffers are the CPU's \(CPU_Mapped, CPU, CUDA_Host\)"),
        ({"DEVICE": "CPU_REPACK", "LAYERS": "0"}, "its log says that 0 of 4 layers are on a GPU"),
    ],
)
@pytest.mark.parametrize("both", [False, True])
def test_a_pass_that_fell_back_to_the_cpu_is_refused(
    run: Run, says: Mapping[str, str], told: str, *, both: bool
) -> None:
    """By what its log says: a GPU config's answers are those of the GPU's kernels."""
    stream = run.lab.stream("a", made_up())
    base = run.lab.build("b1", stream, says={"DEVICE": "CUDA0"})
    new = run.lab.build("b2", stream, says=says)
    passes = run.passes(new, base if both else None)
    case = Case(ON_GPU, corpus_pass=ONE)
    with pytest.raises(
        CheckError, match=rf"^config f16: b2 fell back to the CPU: {told}; .*\.log$"
    ):
        _ = passes.side_by_side(case) if both else passes.alone(case)


@pytest.mark.parametrize(
    "config",
    [PLAIN, replace(ON_GPU, options={"gpu-layers": 0}), replace(ON_GPU, options={"n": "1"})],
)
def test_a_pass_that_is_where_it_should_be_is_not_refused(run: Run, config: Config) -> None:
    """On the CPU where that was asked for, and on the GPU where the log says so."""
    on_gpu = "n" in config.options
    says = {"DEVICE": "CUDA0" if on_gpu else "CPU", "LAYERS": "4" if on_gpu else "0"}
    build = run.lab.build("b1", run.lab.stream("a", made_up()), says=says)
    config = replace(config, options={k: v for k, v in config.options.items() if k != "n"})
    found = run.passes(build).alone(Case(config, corpus_pass=ONE))
    assert found.tokens == SCORED


def test_a_pass_on_the_cpu_does_not_serve_a_test_of_the_gpu(run: Run) -> None:
    """A test's mark makes a GPU config of one that others gate on the CPU."""
    build = run.lab.build("b1", run.lab.stream("a", made_up()), says={"DEVICE": "CPU"})
    passes = run.passes(build)
    passes.alone(Case(PLAIN, corpus_pass=ONE))
    with pytest.raises(CheckError, match="fell back to the CPU"):
        passes.alone(Case(ON_GPU, corpus_pass=ONE))


def test_a_long_pass_on_the_cpu_is_ended_early(run: Run) -> None:
    """Hours on the CPU would tell nothing of the GPU."""
    stream = run.lab.stream("a", made_up())
    build = run.lab.build("b1", stream, fault="slow", says={"DEVICE": "CPU"})
    with pytest.raises(CheckError, match="fell back to the CPU"):
        run.passes(build).alone(Case(ON_GPU, corpus_pass=ONE))
    [log] = (run.folder / "run").glob("perplexity-*.log")
    text = log.read_text("utf-8")
    assert "calculating perplexity over 4 chunks" in text
    assert "Final estimate" not in text


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Card]:
    """The one GPU of this machine; nobody waits long for its memory."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    wait = Release.wait

    def short(self: Release, pids: set[int], **words: object) -> str:
        return wait(self, pids, **{**words, "timeout": 0.05})  # type: ignore[arg-type]  # as given

    monkeypatch.setattr(Release, "wait", short)
    made = Card(used=100.0)
    Driver(made).install(monkeypatch)
    yield made
    forget()


def on_this_gpu(run: Run, build: Build, said: list[str] | None = None) -> Passes:
    """Return passes on the GPU of this machine."""
    leases = Leases(run.folder / "locks", gpus(), gpus(), run.said.append)
    progress = run.said.append if said is None else said.append
    return run.passes(build, leases=leases, serve=ServePlan(run.folder / "run", progress=progress))


def leave_memory_taken(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every pass leave 512 MiB of the card in use."""
    made = Passes._side

    def leaking(self: Passes, *arguments: object) -> object:
        card.used = 612.0
        return made(self, *arguments)  # type: ignore[arg-type]  # passed on as they are

    monkeypatch.setattr(Passes, "_side", leaking)


def test_memory_that_a_pass_leaves_taken_is_an_error(
    run: Run, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes next would have less; the pass is not made again, and its lease is given back."""
    build = run.lab.build("b1", run.lab.stream("a", made_up()))
    passes = on_this_gpu(run, build)
    leave_memory_taken(card, monkeypatch)
    text = (
        "^config f16: b1 p, recording a reference ended, and its GPU memory is not free: GPU 0: "
        "512 MiB more in use"
    )
    for _ in range(2):
        with pytest.raises(LeakError, match=text):
            passes.alone(Case(ON_GPU, corpus_pass=ONE))
    assert run.passed() == 1
    assert not passes.leases.held


def test_a_pass_that_fails_says_why_rather_than_what_it_leaves(
    run: Run, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory is waited for all the same."""
    build = run.lab.build("b1", run.lab.stream("a", made_up()), fault="killed")
    passes = on_this_gpu(run, build)
    leave_memory_taken(card, monkeypatch)
    with pytest.raises(PartialPassError, match="after 2 of 4 chunks"):
        passes.alone(Case(ON_GPU, corpus_pass=ONE))


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("gpu", [True, False])
def test_a_pass_tells_what_its_gpu_did(run: Run, *, gpu: bool) -> None:
    """And nothing of GPUs that it does not use."""
    build = run.lab.build("b1", run.lab.stream("a", made_up()))
    passes = on_this_gpu(run, build)
    facts = passes.alone(Case(replace(PLAIN, gpu=gpu), corpus_pass=ONE)).gpu
    assert bool(facts) == gpu
    assert ("NVIDIA H200" in str(facts)) == gpu
