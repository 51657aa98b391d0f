"""From a quality metric of a case to its verdict, on passes of made-up builds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from support.streams import CHUNKS, SCORED, Lab, made_up

from pytest_llmperf.build.build import Build, ServerApi
from pytest_llmperf.cli.verdict import again
from pytest_llmperf.errors import RunError
from pytest_llmperf.gate import Absent, Comparison, Record, SideBySide, Stored
from pytest_llmperf.judge import store
from pytest_llmperf.judge.chunks import QUALITY, pooled
from pytest_llmperf.judge.references import Kept, find_reference, keep_reference
from pytest_llmperf.judge.store import Baseline, Measured, Recorded
from pytest_llmperf.judge.verdict import Outcome, Verdict
from pytest_llmperf.leases import Leases
from pytest_llmperf.metrics import METRICS
from pytest_llmperf.passes import Passed, Passes
from pytest_llmperf.plan.config import Case, Config, CorpusPass
from pytest_llmperf.quality_gate import QualityQuestion, not_alone
from pytest_llmperf.serve.launch import ServePlan

TEXT = CorpusPass("p", "text.txt", context=16, batch=16, ubatch=16, chunks=CHUNKS)
PLAIN = Config("f16", "m")
CASE = Case(PLAIN, corpus_pass=TEXT)
QUANTIZED = Case(Config("q4", "m", {"cache-type-k": "q4_0"}, against="f16"), corpus_pass=TEXT)
ASKED = 0.123
"""A tolerance that is no metric's own."""


@dataclass
class Desk:
    """A folder with streams, builds, baselines, and the passes over them."""

    lab: Lab

    @property
    def folder(self) -> Path:
        """The folder."""
        return self.lab.folder

    def build(self, name: str, noise: float = 0.0, fault: str = "", **by_type: float) -> Build:
        """Return a build whose answers are disturbed by this much noise."""
        streams = {
            kind: self.lab.stream(f"{name}-{kind}", made_up(of_it))
            for kind, of_it in {"f16": noise, **by_type}.items()
        }
        plain = streams.pop("f16")
        return self.lab.build(name, plain, fault, None, **streams)

    def passes(self, new: Build, base: Build | None = None) -> Passes:
        """Return the passes of a run of these builds."""
        return Passes(
            new=new,
            base=base,
            configs={"f16": PLAIN, "q4": QUANTIZED.config},
            model=lambda _config: self.folder / "model.gguf",
            corpus=lambda _one: self.folder / "text.txt",
            serve=ServePlan(self.folder / "run"),
            cache=self.folder / "cache",
            leases=Leases(self.folder / "cache" / "locks", (), (), print),
            suite_folder=self.folder,
            limit=3600.0,
        )

    def passed(self) -> int:
        """Return how often a tool was run."""
        return len(list((self.folder / "run").glob("perplexity-*.log")))

    def record(self, build: Build, case: Case = CASE) -> Stored:
        """Return what a recorded baseline of a build is compared by."""
        passes = self.passes(build)
        passed = passes.alone(case)
        fingerprint = passes.fingerprint(case, passed)
        path = self.folder / "baselines" / build.label / "lab.json"
        assert passed.reference is not None
        keep_reference(path, case.key, Kept(passed.reference, str(fingerprint["reference"])))
        store.update(
            path,
            build={"label": build.label},
            machine={"key": "lab"},
            recorded={"at": "2026-02-27", "by": "measured", "source": "a test"},
            measured={case.key: Measured(fingerprint, passed.values)},
        )
        return Stored(store.load(path), build.label, str(path), "--llmperf-build=old")

    def reference(self, stored: Stored, case: Case = CASE) -> Path:
        """Return the reference beside a baseline."""
        digest = str(stored.baseline.fingerprints[case.key]["reference"])
        found = find_reference(Path(stored.path), digest)
        assert found is not None
        return found


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    """A folder for passes and baselines; locks of baseline files go into it, too."""
    monkeypatch.setenv("LLMPERF_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model.gguf").write_bytes(b"GGUF of sorts")
    (tmp_path / "text.txt").write_text("words " * 100, "utf-8")
    return Desk(Lab(tmp_path))


def answer(
    passes: Passes, comparison: Comparison, metric: str = "kld_mean", case: Case = CASE
) -> tuple[Verdict, Passed | None, Passed | None]:
    """Ask about a metric; whatever comes out shows the tolerance that was asked for."""
    found = QualityQuestion(passes, case, METRICS[metric], ASKED).answer(comparison)
    assert found[0].metric == metric
    assert found[0].tolerance == ASKED
    return found


def ask(
    passes: Passes, comparison: Comparison, metric: str = "kld_mean", case: Case = CASE
) -> Verdict:
    """Ask about a metric."""
    return answer(passes, comparison, metric, case)[0]


def published(value: float, metric: str = "ppl", case: Case = CASE) -> Stored:
    """Return a report's figure of a case."""
    entry = Recorded(METRICS[metric].unit, METRICS[metric].better, None, value)
    recorded = {"at": "2026-02-27", "by": "published", "source": "a report"}
    baseline = Baseline(
        {"label": "report"}, {"key": "lab"}, recorded, {case.key: {metric: entry}}, {}
    )
    return Stored(baseline, "report", "baselines/report/lab.json", "--llmperf-build=report")


def altered(stored: Stored, **prints: str | int) -> Stored:
    """Return the same baseline, recorded under other conditions."""
    old = stored.baseline.fingerprints
    changed = {case: {**entry, **prints} for case, entry in old.items()}
    return replace(stored, baseline=replace(stored.baseline, fingerprints=changed))


# -- nothing is compared ------------------------------------------------------------------------


def test_without_a_baseline_nothing_is_passed(desk: Desk) -> None:
    """The verdict gives the command that mends it."""
    verdict, base, new = answer(desk.passes(desk.build("b1")), Absent("record it with `this`"))
    assert (verdict.outcome, verdict.reason) == (Outcome.MISSING, "record it with `this`")
    assert (base, new) == (None, None)
    assert desk.passed() == 0


@pytest.mark.parametrize("metric", QUALITY)
def test_recording_takes_one_pass_for_all_metrics(desk: Desk, metric: str) -> None:
    """Its value is that of the whole pass, its samples are the chunks."""
    passes = desk.passes(desk.build("b1"))
    verdict, base, new = answer(passes, Record(), metric)
    assert verdict.outcome is Outcome.RECORDED
    assert (base, verdict.base, verdict.mode) == (None, None, "none")
    assert new is not None
    assert new.reference is not None
    assert verdict.new == pooled(METRICS[metric], new.values[metric], SCORED)
    assert verdict.launches_new == CHUNKS
    assert verdict.reason == f"{metric} recorded from {CHUNKS} chunks, nothing compared"
    for other in QUALITY:
        ask(passes, Record(), other)
    assert desk.passed() == 1


# -- side by side -------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", QUALITY)
def test_equal_builds_pass_side_by_side(desk: Desk, metric: str) -> None:
    """The verdict tells how the pass was made, and both passes come with it."""
    passes = desk.passes(desk.build("b2"), desk.build("b1"))
    verdict, base, new = answer(passes, SideBySide(), metric)
    assert (verdict.outcome, verdict.mode) == (Outcome.PASS, "chunks")
    about = verdict.evidence["pass"]
    assert isinstance(about, Mapping)
    assert about["way"] == "tool"
    # What the tool itself would print is told once, with the mean.
    assert ("summary" in about) == (metric == "kld_mean")
    assert base is not None
    assert new is not None
    assert (base.build, new.build) == ("b1", "b2")


FEW = {
    "kld_mean": Outcome.REGRESSION,
    "same_top": Outcome.INCONCLUSIVE,
    "kld_p999": Outcome.INCONCLUSIVE,
}
"""What four chunks of seven tokens show of a great loss."""


@pytest.mark.parametrize("metric", ["kld_mean", "same_top", "kld_p999"])
def test_other_answers_are_a_regression(desk: Desk, metric: str) -> None:
    """By the mean; four chunks of seven tokens are few for the others, yet they do not pass."""
    passes = desk.passes(desk.build("b2", 3.0), desk.build("b1"))
    assert ask(passes, SideBySide(), metric).outcome is FEW[metric]


def test_a_quantized_config_is_judged_by_what_it_loses_on_either_build(desk: Desk) -> None:
    """The same loss passes; what it loses more is a regression, with the doubt of its reference."""
    base = desk.build("b1", q4_0=1.0)
    same = desk.passes(desk.build("b2", q4_0=1.0), base)
    verdict = ask(same, SideBySide(), case=QUANTIZED)
    assert verdict.outcome is Outcome.PASS
    assert verdict.base is not None
    assert verdict.base > 0.01
    about = verdict.evidence["pass"]
    assert isinstance(about, Mapping)
    assert set(about) == {"way", "kld_error", "kld_least", "kld_most", "summary"}
    worse = desk.passes(desk.build("b3", q4_0=2.0), base)
    assert ask(worse, SideBySide(), case=QUANTIZED).outcome is Outcome.REGRESSION


def test_a_budget_counts_whatever_the_baseline(desk: Desk) -> None:
    """Of its own metric, and of no other."""
    build, base = desk.build("b2", q4_0=1.0), desk.build("b1", q4_0=1.0)
    passes = desk.passes(build, base)
    tight = replace(QUANTIZED.config, budgets={"kld_mean": 0.001})
    case = replace(QUANTIZED, config=tight)
    verdict = ask(passes, SideBySide(), case=case)
    assert verdict.outcome is Outcome.REGRESSION
    assert "beyond the budget of 0.001 nat, whatever the baseline" in verdict.reason
    assert ask(passes, SideBySide(), "same_top", case).outcome is Outcome.PASS
    wide = replace(QUANTIZED, config=replace(tight, budgets={"kld_mean": 100.0}))
    assert ask(passes, SideBySide(), case=wide).outcome is Outcome.PASS


# -- against a recorded baseline ----------------------------------------------------------------


@pytest.mark.parametrize("metric", QUALITY)
def test_the_build_that_was_recorded_passes(desk: Desk, metric: str) -> None:
    """By the reference beside the baseline file."""
    build = desk.build("b1")
    stored = desk.record(build)
    verdict, base, new = answer(desk.passes(build), stored, metric)
    assert (verdict.outcome, verdict.mode) == (Outcome.PASS, "chunks")
    assert base is None
    assert new is not None
    assert new.reference == desk.reference(stored)


@pytest.mark.parametrize("metric", ["kld_mean", "same_top", "kld_p999"])
def test_other_answers_than_the_recorded_are_a_regression(desk: Desk, metric: str) -> None:
    """The verdict shows what was recorded and what is."""
    stored = desk.record(desk.build("b1"))
    verdict = ask(desk.passes(desk.build("b2", 3.0)), stored, metric)
    assert verdict.outcome is FEW[metric]
    known = stored.baseline.results[CASE.key][metric]
    assert verdict.base == known.value
    assert verdict.evidence["margin"] == pytest.approx(
        max(ASKED * known.value, METRICS[metric].slack)
    )


def test_a_budget_counts_against_a_recorded_baseline(desk: Desk) -> None:
    """The build that was recorded itself is beyond it."""
    build = desk.build("b1", q4_0=1.0)
    stored = desk.record(build, QUANTIZED)
    assert ask(desk.passes(build), stored, case=QUANTIZED).outcome is Outcome.PASS
    tight = replace(QUANTIZED.config, budgets={"kld_mean": 0.001})
    case = replace(QUANTIZED, config=tight)
    verdict = ask(desk.passes(build), stored, case=case)
    assert verdict.outcome is Outcome.REGRESSION
    assert "beyond the budget of 0.001 nat" in verdict.reason


def test_a_metric_that_was_not_recorded_is_missing(desk: Desk) -> None:
    """It names the file and the command; nothing is passed for it."""
    build = desk.build("b1")
    stored = desk.record(build)
    before = desk.passed()
    entries = dict(stored.baseline.results[CASE.key])
    del entries["kld_mean"]
    results = {CASE.key: entries}
    fewer = replace(stored, baseline=replace(stored.baseline, results=results))
    other = replace(CASE, config=Config("other", "m"))
    for comparison, case in ((fewer, CASE), (stored, other)):
        verdict = ask(desk.passes(build), comparison, case=case)
        assert verdict.outcome is Outcome.MISSING
        assert verdict.reason == (
            f"{stored.path} has no kld_mean for {case.key}: record it with `pytest "
            f"-k {case.config.name} --llmperf-build=old --update-baselines`"
        )
    assert desk.passed() == before


@pytest.mark.parametrize(
    ("prints", "told"),
    [
        ({"options": "threads=9"}, "options: threads=9 -> "),
        ({"pass": "0" * 16}, "pass: 0000000000000000 -> "),
        ({"model": "another"}, "model: another -> "),
        ({"path": "server"}, "path: server -> tool"),
        ({"tokens": 255}, f"tokens: 255 -> {SCORED}"),
        ({"protocol": "quality 0"}, "protocol: quality 0 -> quality "),
    ],
)
def test_other_conditions_are_incomparable(
    desk: Desk, prints: dict[str, str | int], told: str
) -> None:
    """What differs is named, before a pass is made but for what only a pass shows."""
    build = desk.build("b1")
    stored = altered(desk.record(build), **prints)
    verdict, _, new = answer(desk.passes(build), stored)
    assert verdict.outcome is Outcome.INCOMPARABLE
    assert f"the conditions differ: {told}" in verdict.reason
    differences = verdict.evidence["differences"]
    assert isinstance(differences, list)
    assert len(differences) == 1
    assert (new is not None) == ("tokens" in prints)


def test_a_recorded_pass_of_fewer_chunks_is_an_error(desk: Desk) -> None:
    """The chunks are the same tokens, or nothing can be said."""
    build = desk.build("b1")
    stored = desk.record(build)
    known = stored.baseline.results[CASE.key]["kld_mean"]
    assert known.launches is not None
    fewer = replace(known, launches=known.launches[:-1])
    results = {CASE.key: {"kld_mean": fewer}}
    stored = replace(stored, baseline=replace(stored.baseline, results=results))
    verdict, _, new = answer(desk.passes(build), stored)
    assert verdict.outcome is Outcome.ERROR
    assert "3 chunks of the baseline, 4 of the build under test" in verdict.reason
    assert new is not None


def test_a_missing_reference_is_incomparable(desk: Desk) -> None:
    """It is named before anything is passed."""
    build = desk.build("b1")
    stored = desk.record(build)
    desk.reference(stored).unlink()
    before = desk.passed()
    verdict = ask(desk.passes(build), stored)
    assert verdict.outcome is Outcome.INCOMPARABLE
    assert f"which is missing beside {stored.path}" in verdict.reason
    assert desk.passed() == before


@pytest.mark.parametrize("digest", ["", "../../x", "*"])
def test_a_reference_of_no_digest_is_missing(desk: Desk, digest: str) -> None:
    """A file written by hand leads nowhere."""
    build = desk.build("b1")
    stored = altered(desk.record(build), reference=digest)
    verdict = ask(desk.passes(build), stored)
    assert verdict.outcome is Outcome.INCOMPARABLE
    assert f"reference {digest}, which is missing beside" in verdict.reason


def test_an_altered_reference_is_incomparable(desk: Desk) -> None:
    """Its name says which one it should be, its hash which one it is."""
    build = desk.build("b1")
    stored = desk.record(build)
    reference = desk.reference(stored)
    reference.write_bytes(reference.read_bytes() + b"\0")
    before = desk.passed()
    verdict = ask(desk.passes(build), stored)
    assert verdict.outcome is Outcome.INCOMPARABLE
    assert f"{reference} is not the one that was recorded" in verdict.reason
    assert desk.passed() == before


def test_a_file_that_the_config_names_is_the_reference(desk: Desk) -> None:
    """None is looked for beside the baseline; another file of that name is incomparable."""
    build = desk.build("b1", 1.0)
    desk.lab.stream("old.kld", made_up())
    case = replace(CASE, config=replace(PLAIN, against="old.kld"))
    stored = desk.record(build, case)
    desk.reference(stored, case).unlink()
    assert ask(desk.passes(build), stored, case=case).outcome is Outcome.PASS
    desk.lab.stream("old.kld", made_up(0.5, seed=9))
    verdict = ask(desk.passes(build), stored, case=case)
    assert verdict.outcome is Outcome.INCOMPARABLE
    assert "the conditions differ: reference: " in verdict.reason
    (desk.folder / "old.kld").unlink()
    verdict = ask(desk.passes(build), stored, case=case)
    assert verdict.outcome is Outcome.ERROR
    assert "config f16: against = 'old.kld': no such file" in verdict.reason


def test_a_drift_since_the_oldest_baseline_is_told(desk: Desk) -> None:
    """Where it was recorded against the same reference."""
    desk.lab.stream("old.kld", made_up())
    case = replace(CASE, config=replace(PLAIN, against="old.kld"))
    first = desk.record(desk.build("b1", 0.5), case)
    build = desk.build("b2", 0.6)
    stored = replace(desk.record(build, case), oldest=("b1", first.baseline))
    verdict = ask(desk.passes(build), stored, case=case)
    assert verdict.outcome is Outcome.PASS
    oldest = verdict.evidence["oldest"]
    assert isinstance(oldest, Mapping)
    known = first.baseline.results[case.key]["kld_mean"].value
    assert (oldest["label"], oldest["value"]) == ("b1", known)
    assert verdict.new is not None
    assert oldest["change"] == pytest.approx(verdict.new / known - 1)
    assert oldest["change"] > 0.1


@pytest.mark.parametrize(("metric", "told"), [("ppl", True), ("same_top", False)])
def test_only_perplexity_drifts_since_another_reference(
    desk: Desk, metric: str, *, told: bool
) -> None:
    """Divergences from two references cannot be set against each other; perplexity has none."""
    first = desk.record(desk.build("b1", 1.0))
    build = desk.build("b2")
    stored = replace(desk.record(build), oldest=("b1", first.baseline))
    verdict = ask(desk.passes(build), stored, metric)
    assert verdict.outcome is Outcome.PASS
    assert ("oldest" in verdict.evidence) == told


def test_a_published_divergence_needs_what_it_was_measured_against(desk: Desk) -> None:
    """Or the build would be compared with itself, and always pass."""
    verdict = ask(desk.passes(desk.build("b1", 50.0)), published(98.0, "same_top"), "same_top")
    assert verdict.outcome is Outcome.ERROR
    assert "name that in the suite file, `against`" in verdict.reason


# -- against a published figure -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("factor", "outcome"),
    [(1.0, Outcome.PASS), (0.5, Outcome.REGRESSION), (2.0, Outcome.IMPROVED)],
)
def test_a_published_figure_is_compared_by_tolerance(
    desk: Desk, factor: float, outcome: Outcome
) -> None:
    """With the value of the whole pass."""
    passes = desk.passes(desk.build("b1"))
    recorded = ask(passes, Record(), "ppl").new
    assert recorded is not None
    verdict, base, new = answer(passes, published(factor * recorded), "ppl")
    assert (verdict.outcome, verdict.mode) == (outcome, "published")
    assert verdict.new == pytest.approx(recorded)
    assert base is None
    assert new is not None


def test_a_report_without_this_metric_shows_nothing(desk: Desk) -> None:
    """The build is tried all the same, so that one that cannot run the case does not pass it."""
    verdict, _, new = answer(desk.passes(desk.build("b1")), published(8.0), "kld_mean")
    assert verdict.outcome is Outcome.INCONCLUSIVE
    assert "the report behind report gives no kld_mean for f16/p" in verdict.reason
    assert new is not None
    assert desk.passed() == 1
    broken = desk.passes(desk.build("b2", fault="dies"))
    assert ask(broken, published(8.0), "kld_mean").outcome is Outcome.ERROR


def test_a_budget_counts_where_a_report_says_nothing(desk: Desk) -> None:
    """And where it gives a figure that the build meets."""
    build = desk.build("b1", q4_0=1.0)
    case = replace(QUANTIZED, config=replace(QUANTIZED.config, budgets={"kld_mean": 0.001}))
    for report in (published(8.0, case=case), published(50.0, "kld_mean", case)):
        verdict = ask(desk.passes(build), report, "kld_mean", case=case)
        assert verdict.outcome is Outcome.REGRESSION
        assert "beyond the budget of 0.001 nat" in verdict.reason
        assert again(verdict) is Outcome.REGRESSION


def test_a_report_without_this_case_is_missing(desk: Desk) -> None:
    """Nothing is tried: the report says nothing of it."""
    case = replace(CASE, config=Config("other", "m"))
    verdict = ask(desk.passes(desk.build("b1")), published(8.0), case=case)
    assert verdict.outcome is Outcome.MISSING
    assert desk.passed() == 0


# -- what goes wrong ----------------------------------------------------------------------------


def test_a_pass_that_breaks_off_never_passes(desk: Desk) -> None:
    """What it found until then is evidence, whatever it was to be compared with."""
    stored = desk.record(desk.build("b1"))
    broken = desk.build("b2", fault="killed")
    runs: list[tuple[Passes, Comparison]] = [
        (desk.passes(broken), Record()),
        (desk.passes(broken), stored),
        (desk.passes(broken), published(8.0)),
        (desk.passes(broken, desk.build("b3")), SideBySide()),
        (desk.passes(desk.build("b3"), broken), SideBySide()),
    ]
    for passes, comparison in runs:
        verdict, base, new = answer(passes, comparison, "ppl")
        assert verdict.outcome is Outcome.ERROR
        assert verdict.evidence["partial"] == {"planned": 4, "running": [8.125, 8.25]}
        assert "the pass of b2 ended with" in verdict.reason
        assert "after 2 of 4 chunks" in verdict.reason
        assert (base, new) == (None, None)


def test_a_build_that_cannot_pass_at_all_is_an_error(desk: Desk) -> None:
    """Without any part to show; each metric tells the same, and it is tried once."""
    passes = desk.passes(desk.build("b1", fault="dies"))
    first, second = (ask(passes, Record(), metric) for metric in ("ppl", "kld_mean"))
    assert first.outcome is second.outcome is Outcome.ERROR
    assert first.reason == second.reason
    assert "partial" not in first.evidence
    assert desk.passed() == 1


# -- perplexity alone ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ppl", "others", "said"),
    [
        (Outcome.PASS, [Outcome.INCONCLUSIVE], Outcome.INCONCLUSIVE),
        (Outcome.IMPROVED, [Outcome.INCONCLUSIVE] * 2, Outcome.INCONCLUSIVE),
        (Outcome.PASS, [Outcome.INCONCLUSIVE, Outcome.PASS], Outcome.PASS),
        (Outcome.PASS, [Outcome.REGRESSION], Outcome.PASS),
        (Outcome.REGRESSION, [Outcome.INCONCLUSIVE], Outcome.REGRESSION),
    ],
)
def test_perplexity_alone_never_passes(
    desk: Desk, ppl: Outcome, others: list[Outcome], said: Outcome
) -> None:
    """Where no divergence was shown to be small or large, it proves nothing."""
    some = ask(desk.passes(desk.build("b2"), desk.build("b1")), SideBySide(), "ppl")
    verdicts = [replace(some, outcome=ppl)]
    verdicts += [replace(some, metric="kld_mean", outcome=outcome) for outcome in others]
    found = not_alone(verdicts)
    assert found[0].outcome is said
    assert ("alone" in found[0].evidence) == (said is not ppl)
    assert again(found[0]) is (said if ppl is Outcome.PASS else again(found[0]))
    assert [verdict.outcome for verdict in found[1:]] == others


# -- no memory ----------------------------------------------------------------------------------


def failing(desk: Desk, build: Build) -> Stored:
    """Record that a build has no memory for the case, as a run does."""
    passes = desk.passes(build)
    verdict = ask(passes, Record())
    assert verdict.outcome is Outcome.RECORDED
    told = verdict.evidence["failed"]
    assert isinstance(told, dict)
    path = desk.folder / "baselines" / build.label / "lab.json"
    store.update(
        path,
        build={"label": build.label},
        machine={"key": "lab"},
        recorded={"at": "2026-02-27", "by": "measured", "source": "a test"},
        measured={CASE.key: Measured(passes.conditions(CASE), {}, store.Failure(**told))},
    )
    return Stored(store.load(path), build.label, str(path), "--llmperf-build=old")


def test_a_pass_without_memory_is_an_outcome_that_can_be_recorded(desk: Desk) -> None:
    """OOM where nothing says so; PASS as recorded; IMPROVED once it fits."""
    broken, works = desk.build("b2", fault="memory"), desk.build("b3")
    assert ask(desk.passes(broken), desk.record(desk.build("b1"))).outcome is Outcome.OOM
    stored = failing(desk, broken)
    same = ask(desk.passes(broken), stored)
    assert same.outcome is Outcome.PASS
    assert "runs out of memory (CPU KV buffer of 19532 MiB), as recorded of b2" in same.reason
    better = ask(desk.passes(works), stored)
    assert better.outcome is Outcome.IMPROVED
    assert again(better) is Outcome.IMPROVED
    for budget, outcome in ((1.0, Outcome.IMPROVED), (-1.0, Outcome.REGRESSION)):
        case = replace(CASE, config=replace(PLAIN, budgets={"kld_mean": budget}))
        held = ask(desk.passes(works), stored, case=case)
        assert (held.outcome, again(held)) == (outcome, outcome)


def test_a_pass_without_memory_of_another_corpus_is_not_comparable(desk: Desk) -> None:
    """A shorter text is no improvement."""
    broken = desk.build("b2", fault="memory")
    stored = altered(failing(desk, broken), corpus="another")
    assert ask(desk.passes(broken), stored).outcome is Outcome.INCOMPARABLE


@pytest.mark.parametrize("api", ["openai", "ollama"])
def test_what_is_no_llama_server_is_an_error_in_one_line(desk: Desk, api: ServerApi) -> None:
    """Alone and side by side, whichever of both it is."""
    other = Build("other", 0, "unknown", "http://h", "", url="http://h", api=api, model="m")
    own = desk.build("b1")
    for passes, comparison in (
        (desk.passes(other), Record()),
        (desk.passes(own, other), SideBySide()),
        (desk.passes(other, own), SideBySide()),
    ):
        verdict = ask(passes, comparison)
        assert verdict.outcome is Outcome.ERROR
        assert "does not tell its tokens and how likely each is" in verdict.reason
        assert "\n" not in verdict.reason


@pytest.mark.parametrize("gpu", [True, False])
def test_what_is_compared_with_gets_the_gpu_too(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, *, gpu: bool
) -> None:
    """A container has one only where its config says so."""
    asked: list[Config] = []

    def keep(_self: Passes, _build: Build, config: Config, _one: CorpusPass) -> Path:
        asked.append(config)
        raise RunError("enough")

    monkeypatch.setattr(Passes, "_kept_reference", keep)
    case = replace(QUANTIZED, config=replace(QUANTIZED.config, gpu=gpu))
    assert "enough" in ask(desk.passes(desk.build("b1")), Record(), case=case).reason
    assert [(config.name, config.gpu) for config in asked] == [("f16", gpu)]
