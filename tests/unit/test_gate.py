"""From a metric of a case to its verdict, on launches that were made up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_llmperf.budget import Budget
from pytest_llmperf.campaign.base import Campaign, PairedLaunches
from pytest_llmperf.errors import (
    BuildError,
    CheckError,
    LlmperfError,
    OutOfMemoryError,
    PlanError,
    ServerError,
    TooSlowError,
)
from pytest_llmperf.gate import (
    Absent,
    Comparison,
    Question,
    Record,
    SideBySide,
    Stored,
    differences,
    samples_of,
    to_block,
)
from pytest_llmperf.judge.priors import Priors, pooled_prior
from pytest_llmperf.judge.side_by_side import (
    DEFAULT_BLOCK_PRIOR,
    DEFAULT_PLAN,
    UNPAIRED_BLOCK_PRIOR,
)
from pytest_llmperf.judge.statistics import Prior
from pytest_llmperf.judge.store import Baseline, Failure, Recorded
from pytest_llmperf.judge.verdict import Outcome, Verdict
from pytest_llmperf.measure.launch import Launch
from pytest_llmperf.metrics import METRICS
from pytest_llmperf.plan.config import LAUNCH, Case, Config, Turn, Workload

CONFIG = Config("c7", "model")
CASE = Case(CONFIG, Workload("short", (Turn(64, 64),)))
ALONE = Case(CONFIG, None)
FINGERPRINT = {"machine": "lab", "options": "threads=1"}
BUDGET = 3600.0
NO_PRIORS = Priors()

Values = Callable[[int], list[float]]
"""Index of a launch or block to the samples of one side."""


def around(value: float, spread: float = 0.002) -> Values:
    """Two samples a launch that differ a little from launch to launch."""

    def values(index: int) -> list[float]:
        wobble = spread * (-1, 0, 1)[index % 3]
        return [value * (1 + wobble), value * (1 + wobble) * 1.001]

    return values


HUNDRED = around(100.0)


def then(first: Values, count: int, second: Values) -> Values:
    """The first so many launches like this, the others like that."""
    return lambda index: first(index) if index < count else second(index)


def launch_of(build: str, workload: str, metric: str, values: Sequence[float]) -> Launch:
    """A launch with samples of one metric."""
    samples = {workload: {metric: list(values)}} if values else {}
    return Launch(build, "c7", "llama-server", "", samples=samples)


@dataclass
class Canned:
    """In place of a campaign: launches and blocks of made-up samples of one metric."""

    metric: str
    new: Values
    base: Values = HUNDRED
    workload: str = "short"
    together: bool = True
    error: LlmperfError | None = None
    failures: dict[str, LlmperfError] = field(default_factory=dict)
    launches: int = 0
    blocks: int = 0
    endpoint: bool = False
    disturbed: str = ""
    digest: str = ""
    """Of what the baseline was asked, where that is not what the other was."""
    each: tuple[Canned, Canned] | None = None
    """The baseline's build and the one under test, by themselves."""

    def blames(self, error: LlmperfError) -> bool:
        """Return whether the build under test failed."""
        return error.build == "b2"

    def alone(self, *, base: bool) -> Canned:
        """Return a campaign of one of the builds by itself."""
        assert self.each is not None
        return self.each[0 if base else 1]

    @property
    def measured(self) -> tuple[int, int]:
        """How many blocks and launches were measured."""
        return self.blocks, self.launches

    def launch(self, index: int) -> Launch:
        """Return a launch of the build under test."""
        if self.error is not None:
            raise self.error
        self.launches = max(self.launches, index + 1)
        launch = launch_of("b2", self.workload, self.metric, self.new(index))
        launch.disturbed = self.disturbed
        return launch

    def block(self, index: int) -> PairedLaunches:
        """Return a block."""
        if self.error is not None:
            raise self.error
        self.blocks = max(self.blocks, index + 1)
        new = launch_of("b2", self.workload, self.metric, self.new(index))
        new.disturbed = self.disturbed
        base = launch_of("b1", self.workload, self.metric, self.base(index))
        if self.digest:
            base.digests[self.workload] = self.digest
        return PairedLaunches(
            base=base,
            new=new,
            together=self.together,
            orders={self.workload: "bn"},
        )


def ask(
    canned: Canned,
    comparison: Comparison,
    *,
    case: Case = CASE,
    budget: float | Budget = BUDGET,
    launches: int = 3,
    fingerprint: Mapping[str, str] | None = None,
    rematch: Canned | None = None,
    priors: Priors = NO_PRIORS,
) -> Verdict:
    """Ask about the canned metric, with its own tolerance."""
    metric = METRICS[canned.metric]
    begun = cast("Campaign", rematch) if rematch is not None and rematch.blocks else None

    def again() -> Campaign:
        if rematch is None:
            raise BuildError("the build of b1 is not to be had")
        return cast("Campaign", rematch)

    return Question(
        campaign=cast("Campaign", canned),
        case=case,
        metric=metric,
        tolerance=metric.tolerance,
        budget=budget if isinstance(budget, Budget) else Budget(budget),
        launches=launches,
        fingerprint=lambda _launch: FINGERPRINT if fingerprint is None else fingerprint,
        priors=priors,
        rematch=again,
        begun=lambda: begun,
    ).answer(comparison)


def entry(metric: str, values: Values | None, value: float, count: int = 5) -> Recorded:
    """What a baseline holds of a metric; without values a published figure."""
    launches = None if values is None else tuple(tuple(values(i)) for i in range(count))
    return Recorded(METRICS[metric].unit, METRICS[metric].better, launches, value)


def stored(
    results: Mapping[str, Mapping[str, Recorded]],
    *,
    by: str = "measured",
    fingerprints: Mapping[str, Mapping[str, str]] | None = None,
) -> Stored:
    """A recorded baseline."""
    known = dict.fromkeys(results, FINGERPRINT) if fingerprints is None else fingerprints
    baseline = Baseline(
        build={"label": "b1"},
        machine={"key": "lab"},
        recorded={"at": "2026-02-27", "by": by, "source": "a report"},
        results=results,
        fingerprints=known,
    )
    return Stored(baseline, "b1", "baselines/b1/lab.json", "--llmperf-build=b1")


SPEED = stored({CASE.key: {"decode_tps": entry("decode_tps", around(100.0), 100.0)}})


# -- without a comparison ---------------------------------------------------------------------


def test_recording_takes_the_launches_that_are_asked_for() -> None:
    """Nothing is compared; as many launches as the ini says."""
    canned = Canned("decode_tps", around(80.0))
    verdict = ask(canned, Record(), launches=4)
    assert verdict.outcome is Outcome.RECORDED
    assert (verdict.launches_new, verdict.samples_new, canned.launches) == (4, 8, 4)
    assert verdict.new == pytest.approx(80.0, rel=0.01)


def test_nothing_to_compare_with_measures_nothing() -> None:
    """A missing baseline fails at once, with the command that mends it."""
    canned = Canned("decode_tps", around(80.0))
    verdict = ask(canned, Absent("record it with `pytest --update-baselines`"))
    assert verdict.outcome is Outcome.MISSING
    assert "--update-baselines" in verdict.reason
    assert canned.measured == (0, 0)


# -- recorded launches ------------------------------------------------------------------------


def test_the_same_speed_passes() -> None:
    """Shown to be within tolerance on the launches asked for, without one more."""
    canned = Canned("decode_tps", around(100.0))
    verdict = ask(canned, SPEED)
    assert (verdict.outcome, verdict.mode) == (Outcome.PASS, "stored")
    assert canned.launches == 3


@pytest.mark.parametrize(("metric", "worse"), [("decode_tps", 65.0), ("ttft_ms", 150.0)])
def test_a_regression_is_confirmed_on_fresh_launches(metric: str, worse: float) -> None:
    """What raised the suspicion has no part in its confirmation."""
    canned = Canned(metric, around(worse))
    verdict = ask(canned, stored({CASE.key: {metric: entry(metric, around(100.0), 100.0)}}))
    assert verdict.outcome is Outcome.REGRESSION
    assert canned.launches == 6
    assert "Not confirmed side by side" in verdict.reason
    assert "the build of b1 is not to be had" in verdict.reason


def test_a_stored_regression_is_confirmed_side_by_side() -> None:
    """Where the baseline's build can be started, today's blocks have the last word."""
    canned = Canned("decode_tps", around(65.0))
    verdict = ask(canned, SPEED, rematch=Canned("decode_tps", around(65.0)))
    assert (verdict.outcome, verdict.mode) == (Outcome.REGRESSION, "side-by-side")
    assert "against the recorded launches: decode_tps is 35.0 % lower" in verdict.reason
    stored_too = verdict.evidence["stored"]
    assert isinstance(stored_too, dict)
    assert "waits for its confirmation" in stored_too["reason"]
    assert canned.launches == 3, "more launches against the same record prove less than blocks"


@pytest.mark.parametrize(
    ("base", "outcome"),
    [(around(95.0), Outcome.PASS), (around(130.0), Outcome.REGRESSION)],
)
def test_what_recorded_launches_leave_open_is_settled_side_by_side(
    base: Values, outcome: Outcome
) -> None:
    """Starts differ by more than blocks do: where both builds are at hand, blocks decide."""
    canned = Canned("decode_tps", around(95.3, spread=0.02))
    verdict = ask(canned, SPEED, rematch=Canned("decode_tps", around(95.3), base=base))
    assert (verdict.outcome, verdict.mode) == (outcome, "side-by-side")
    assert "(against the recorded launches: decode_tps is" in verdict.reason
    assert "day of the record" not in verdict.reason
    assert canned.launches == 3


def test_too_few_recorded_launches_are_made_up_for_side_by_side() -> None:
    """One launch of the build under test is enough to see that the record cannot tell."""
    canned = Canned("decode_tps", around(100.0))
    thin = stored({CASE.key: {"decode_tps": entry("decode_tps", around(100.0), 100.0, count=2)}})
    verdict = ask(canned, thin, rematch=Canned("decode_tps", around(100.0)))
    assert (verdict.outcome, verdict.mode) == (Outcome.PASS, "side-by-side")
    assert "the recorded launches are too few to tell" in verdict.reason
    assert canned.launches == 1


@pytest.mark.parametrize(("blocks", "mode"), [(0, "stored"), (2, "side-by-side")])
def test_an_open_verdict_starts_no_blocks_once_the_budget_is_spent(blocks: int, mode: str) -> None:
    """But those that other metrics asked for are used."""
    canned = Canned("decode_tps", around(95.3, spread=0.02))
    today = Canned("decode_tps", around(95.3), blocks=blocks)
    verdict = ask(canned, SPEED, rematch=today, budget=-1.0)
    assert (verdict.mode, today.blocks) == (mode, blocks)


@pytest.mark.parametrize("speed", [65.0, 80.0, 85.0])
@pytest.mark.parametrize("at_hand", [True, False])
def test_a_suspicion_is_settled_whatever_the_budget(
    speed: float,
    at_hand: bool,  # noqa: FBT001 - a parameter
) -> None:
    """A gate that can start both builds finds no less than one that cannot."""
    today = Canned("decode_tps", around(speed)) if at_hand else None
    verdict = ask(Canned("decode_tps", around(speed)), SPEED, rematch=today, budget=-1.0)
    assert verdict.outcome is Outcome.REGRESSION
    assert verdict.mode == ("side-by-side" if at_hand else "stored")


def of_b2(error: LlmperfError) -> LlmperfError:
    """Return an error of the build under test."""
    error.build = "b2"
    return error


CRASH = of_b2(ServerError("b2 crashed", kind="crashed"))
OPEN_THEN_FIT = then(around(100.0, spread=0.05), 3, around(103.0))


def test_blocks_in_which_the_build_under_test_crashes_are_no_pass() -> None:
    """That other launches worked does not mend it."""
    canned = Canned("decode_tps", OPEN_THEN_FIT)
    verdict = ask(canned, SPEED, rematch=Canned("decode_tps", HUNDRED, error=CRASH))
    assert verdict.outcome is Outcome.ERROR
    assert "b2 crashed" in verdict.reason


@pytest.mark.parametrize("alone", [True, False])
def test_what_fails_beside_another_server_has_to_fail_alone_too(*, alone: bool) -> None:
    """Two servers need more memory than one, and disturb each other: that is no build's fault."""
    crowded = Canned("decode_tps", HUNDRED, error=of_b2(CheckError("a smaller context")))
    same = crowded if alone else Canned("decode_tps", around(99.0))
    crowded.each = (same, same)
    verdict = ask(Canned("decode_tps", OPEN_THEN_FIT), SPEED, rematch=crowded)
    assert verdict.outcome is (Outcome.ERROR if alone else Outcome.PASS)
    if not alone:
        assert "by launches alone: the blocks failed: a smaller context" in verdict.reason


@pytest.mark.parametrize("name", [LAUNCH, "short", "other"])
def test_a_crash_in_blocks_that_others_asked_for_counts(name: str) -> None:
    """They ask all workloads of the config; that of the question, or the start, is its own."""
    today = Canned("decode_tps", HUNDRED, blocks=1, failures={name: CRASH})
    verdict = ask(Canned("decode_tps", HUNDRED), SPEED, rematch=today)
    assert verdict.outcome is (Outcome.PASS if name == "other" else Outcome.ERROR)


@pytest.mark.parametrize(
    ("speed", "outcome"), [(95.3, Outcome.INCONCLUSIVE), (65.0, Outcome.REGRESSION)]
)
def test_disturbed_blocks_leave_it_to_the_launches(speed: float, outcome: Outcome) -> None:
    """Those were measured in quiet; the reason names what disturbed the blocks."""
    today = Canned("decode_tps", around(speed), disturbed="make kept 2 cores busy")
    verdict = ask(Canned("decode_tps", around(speed, spread=0.02)), SPEED, rematch=today)
    assert (verdict.outcome, verdict.mode) == (outcome, "stored")
    assert "the blocks were disturbed: make kept 2 cores busy" in verdict.reason


def test_a_spent_budget_does_not_install_the_baseline_s_build() -> None:
    """Nor does installing it spend the budget."""
    today = Canned("decode_tps", around(95.3))
    asked: list[str] = []
    question = open_question(today, asked, Budget(-1.0))
    assert question.answer(SPEED).outcome is Outcome.INCONCLUSIVE
    assert asked == []
    budget = Budget(BUDGET)
    open_question(today, asked, budget).answer(SPEED)
    assert asked == ["paused"]


def open_question(today: Canned, asked: list[str], budget: Budget) -> Question:
    """A question on an open case that notes when the baseline's build is asked for."""

    def rematch() -> Campaign:
        asked.append("paused" if budget._nested else "running")
        return cast("Campaign", today)

    return Question(
        campaign=cast("Campaign", Canned("decode_tps", around(95.3, spread=0.02))),
        case=CASE,
        metric=METRICS["decode_tps"],
        tolerance=0.05,
        budget=budget,
        launches=3,
        fingerprint=lambda _launch: FINGERPRINT,
        priors=NO_PRIORS,
        rematch=rematch,
    )


def test_a_closed_budget_measures_nothing_more() -> None:
    """Where another metric fails anyway: what is there is judged, and no more."""
    budget = Budget(BUDGET)
    budget.close()
    canned = Canned("decode_tps", around(65.0), launches=1)
    today = Canned("decode_tps", around(65.0))
    verdict = ask(canned, SPEED, rematch=today, budget=budget)
    assert verdict.outcome is Outcome.INCONCLUSIVE
    assert verdict.evidence["cut_short"] is True
    assert (canned.launches, today.blocks) == (1, 0)


def test_the_change_since_the_oldest_is_the_builds_where_blocks_settled_it() -> None:
    """A machine that has become slower is no drift of the builds."""
    old = stored({CASE.key: {"decode_tps": entry("decode_tps", around(110.0), 110.0)}})
    both = replace(SPEED, oldest=("b0", old.baseline))
    today = Canned("decode_tps", around(80.0), base=around(80.0))
    verdict = ask(Canned("decode_tps", around(80.0)), both, rematch=today)
    assert verdict.outcome is Outcome.PASS
    assert verdict.new == pytest.approx(80.0, rel=0.01)
    since = verdict.evidence["oldest"]
    assert isinstance(since, dict)
    assert since["change"] == pytest.approx(100 / 110 - 1, abs=0.005)


def test_an_open_verdict_without_its_build_says_why_blocks_did_not_settle_it() -> None:
    """The mend is in the reason."""
    verdict = ask(Canned("decode_tps", around(95.3, spread=0.02)), SPEED)
    assert verdict.outcome is Outcome.INCONCLUSIVE
    assert "Side by side would tell more, but the build of b1 is not to be had" in verdict.reason


def test_a_machine_that_has_become_slower_is_no_regression() -> None:
    """Both builds are slower than the record: the builds are equal, and the text says so."""
    canned = Canned("decode_tps", around(65.0))
    today = Canned("decode_tps", new=around(65.0), base=around(65.0))
    verdict = ask(canned, SPEED, rematch=today)
    assert verdict.outcome is Outcome.PASS
    assert "the machine is not as fast as on the day of the record" in verdict.reason


def test_a_rematch_that_cannot_be_measured_leaves_the_regression() -> None:
    """A baseline's build that does not start any more takes nothing back."""
    canned = Canned("decode_tps", around(65.0))
    dead = Canned("decode_tps", around(65.0), error=ServerError("b1 died"))
    verdict = ask(canned, SPEED, rematch=dead)
    assert verdict.outcome is Outcome.REGRESSION
    assert "Not confirmed side by side" in verdict.reason
    assert "b1 died" in verdict.reason


def test_an_unclear_rematch_is_inconclusive() -> None:
    """What side by side does not show either way is not claimed."""
    canned = Canned("decode_tps", around(65.0))
    today = Canned("decode_tps", new=around(95.3, spread=0.05))
    verdict = ask(canned, SPEED, rematch=today, budget=0.0)
    assert verdict.outcome is Outcome.INCONCLUSIVE
    assert "but side by side" in verdict.reason


def test_a_faster_build_is_an_improvement() -> None:
    """It passes and says that the baseline is stale."""
    verdict = ask(Canned("decode_tps", around(130.0)), SPEED)
    assert verdict.outcome is Outcome.IMPROVED
    assert "stale" in verdict.reason


def test_a_suspicion_that_is_not_confirmed_is_no_regression() -> None:
    """Three slow launches, then others like the baseline's: nothing was shown."""
    canned = Canned("decode_tps", then(around(65.0), 3, around(100.0)))
    verdict = ask(canned, SPEED)
    assert verdict.outcome is Outcome.INCONCLUSIVE
    assert "suspected but not confirmed on fresh launches" in verdict.reason
    assert 6 <= canned.launches <= 9


@pytest.mark.parametrize("comparison", [Record(), SPEED, SideBySide()])
def test_a_machine_that_is_not_quiet_is_incomparable(comparison: Comparison) -> None:
    """What was measured beside other load never passes; the text names the load."""
    canned = Canned("decode_tps", around(100.0), disturbed="make (pid 7) kept 2 cores busy")
    verdict = ask(canned, comparison)
    assert verdict.outcome is Outcome.INCOMPARABLE
    assert "make (pid 7) kept 2 cores busy" in verdict.reason
    assert "llmperf_foreign_load" in verdict.reason


def test_sizes_do_not_mind_other_load() -> None:
    """Buffers are as large on a busy machine."""
    canned = Canned("kv_mib", around(320.0, spread=0), workload=LAUNCH, disturbed="make")
    baseline = stored({ALONE.key: {"kv_mib": entry("kv_mib", lambda _: [320.0], 320.0)}})
    assert ask(canned, baseline, case=ALONE).outcome is Outcome.PASS


@pytest.mark.parametrize(
    ("fingerprint", "told"), [(FINGERPRINT, True), ({"machine": "another"}, False)]
)
def test_the_change_since_the_oldest_baseline(
    fingerprint: dict[str, str],
    told: bool,  # noqa: FBT001 - a parameter
) -> None:
    """It stands beside the verdict where both were made under the same conditions."""
    old = stored(
        {CASE.key: {"decode_tps": entry("decode_tps", around(110.0), 110.0)}},
        fingerprints={CASE.key: fingerprint},
    )
    both = replace(SPEED, oldest=("b0", old.baseline))
    verdict = ask(Canned("decode_tps", around(100.0)), both)
    assert verdict.outcome is Outcome.PASS
    since = verdict.evidence.get("oldest")
    assert (since is not None) is told
    if isinstance(since, dict):
        assert (since["label"], since["value"]) == ("b0", 110.0)
        assert since["change"] == pytest.approx(100 / 110 - 1, abs=0.005)


def test_blocks_that_do_not_take_turns_have_a_prior_of_their_own() -> None:
    """A slowdown that paired blocks would show is not clear yet where nothing cancels."""
    priors = Priors({"decode_tps": Prior(0.01, 7.0)}, {"decode_tps": Prior(0.03, 5.0)})
    apart = Canned("decode_tps", around(100.0), together=False)
    known = ask(apart, SideBySide(), priors=priors).evidence["prior"]
    assert known == {"s0": pytest.approx(0.03 * 2**0.5), "d0": 5.0}
    unknown = ask(apart, SideBySide()).evidence["prior"]
    assert unknown == {"s0": UNPAIRED_BLOCK_PRIOR.s0, "d0": UNPAIRED_BLOCK_PRIOR.d0}
    size = Canned("rss_mib", around(100.0), workload=LAUNCH, together=False)
    sized = ask(size, SideBySide(), case=ALONE).evidence["prior"]
    assert sized == {"s0": DEFAULT_BLOCK_PRIOR.s0, "d0": DEFAULT_BLOCK_PRIOR.d0}


def test_llama_bench_tells_two_metrics() -> None:
    """The reason names them, and the way to others."""
    case = Case(CONFIG, Workload("d8", (Turn(64, 64, 8),), tool="llama-bench"))
    for metric in ("ttft_ms", "rss_mib"):
        canned = Canned(metric, new=lambda _: [], workload="d8")
        verdict = ask(canned, Record(), case=case)
        assert verdict.outcome is Outcome.ERROR
        assert "llama-bench tells prefill_tps and decode_tps" in verdict.reason


def test_what_calibration_found_is_used() -> None:
    """The priors of this machine stand in the evidence."""
    priors = Priors({"decode_tps": Prior(0.01, 7.0)}, {"decode_tps": Prior(0.03, 5.0)})
    side = ask(Canned("decode_tps", around(100.0)), SideBySide(), priors=priors)
    assert side.evidence["prior"] == {"s0": 0.01, "d0": 7.0}
    kept = ask(Canned("decode_tps", around(100.0)), SPEED, priors=priors)
    assert kept.evidence["prior"] == {"s0": 0.03, "d0": 5.0}


@pytest.mark.parametrize(("budget", "launches"), [(BUDGET, 6), (0.0, 3), (-1.0, 3)])
def test_an_unclear_result_is_measured_again_within_the_budget(
    budget: float, launches: int
) -> None:
    """Up to twice the launches asked for, none beyond them once the budget is spent."""
    canned = Canned("decode_tps", around(95.3, spread=0.02))
    verdict = ask(canned, SPEED, budget=budget)
    assert verdict.outcome is Outcome.INCONCLUSIVE
    assert canned.launches == launches


def test_measuring_again_can_make_it_clear() -> None:
    """It ends with the launch that shows it."""
    canned = Canned("decode_tps", then(around(100.0, spread=0.05), 3, around(103.0)))
    verdict = ask(canned, SPEED)
    assert verdict.outcome is Outcome.PASS
    assert 3 < canned.launches <= 6


def test_other_cases_make_a_few_recorded_launches_count() -> None:
    """Two launches say nothing of their spread; those of the metric's other cases do."""
    few = {"decode_tps": entry("decode_tps", around(100.0), 100.0, count=2)}
    lone = ask(Canned("decode_tps", around(100.0)), stored({CASE.key: few}))
    assert lone.outcome is Outcome.INCONCLUSIVE
    assert "record 1 more" in lone.reason
    others = {
        f"other{i}/short": {"decode_tps": entry("decode_tps", around(50.0 * i), 50.0 * i)}
        for i in (1, 2, 3)
    }
    assert ask(Canned("decode_tps", around(100.0)), stored({CASE.key: few, **others})).outcome is (
        Outcome.PASS
    )


def test_a_deterministic_value_takes_one_launch() -> None:
    """Buffer sizes are compared exactly, with the metric's slack."""
    baseline = stored({ALONE.key: {"kv_mib": entry("kv_mib", lambda _: [320.0], 320.0)}})
    for size, outcome in (
        (320.0, Outcome.PASS),
        (320.9, Outcome.PASS),
        (352.0, Outcome.REGRESSION),
        (288.0, Outcome.IMPROVED),
    ):
        canned = Canned("kv_mib", around(size, spread=0), workload=LAUNCH)
        verdict = ask(canned, baseline, case=ALONE)
        assert (verdict.outcome, verdict.mode, canned.launches) == (outcome, "exact", 1)


@pytest.mark.parametrize(
    ("recorded", "words"),
    [
        ({**FINGERPRINT, "options": "threads=4"}, "options: threads=4 -> threads=1"),
        ({"machine": "lab"}, "options: unknown -> threads=1"),
        ({**FINGERPRINT, "driver": "580"}, "driver: 580 -> unknown"),
    ],
)
def test_another_fingerprint_is_incomparable(recorded: dict[str, str], words: str) -> None:
    """What differs is named, and one launch is enough to see it."""
    canned = Canned("decode_tps", around(100.0))
    results = {CASE.key: {"decode_tps": entry("decode_tps", around(100.0), 100.0)}}
    verdict = ask(canned, stored(results, fingerprints={CASE.key: recorded}))
    assert verdict.outcome is Outcome.INCOMPARABLE
    assert words in verdict.reason
    assert canned.launches == 1


def test_a_baseline_without_fingerprints_is_incomparable() -> None:
    """Measured launches of unknown conditions show nothing."""
    results = {CASE.key: {"decode_tps": entry("decode_tps", around(100.0), 100.0)}}
    verdict = ask(Canned("decode_tps", around(100.0)), stored(results, fingerprints={}))
    assert verdict.outcome is Outcome.INCOMPARABLE


@pytest.mark.parametrize(
    "results",
    [{}, {CASE.key: {"ttft_ms": entry("ttft_ms", around(9.0), 9.0)}}],
)
def test_a_metric_that_was_not_recorded_is_missing(
    results: dict[str, dict[str, Recorded]],
) -> None:
    """The verdict names file, metric and case, and how to record it; nothing is measured."""
    canned = Canned("decode_tps", around(100.0))
    verdict = ask(canned, stored(results))
    assert verdict.outcome is Outcome.MISSING
    assert "baselines/b1/lab.json has no decode_tps for c7/short" in verdict.reason
    assert "--update-baselines" in verdict.reason
    assert canned.launches == 0


# -- published figures ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("speed", "outcome"),
    [(98.0, Outcome.PASS), (80.0, Outcome.REGRESSION), (120.0, Outcome.IMPROVED)],
)
def test_a_published_figure_is_compared_by_tolerance(speed: float, outcome: Outcome) -> None:
    """No samples stand behind it, and it has no fingerprint; the verdict says so."""
    results = {CASE.key: {"decode_tps": entry("decode_tps", None, 100.0)}}
    canned = Canned("decode_tps", around(speed))
    verdict = ask(canned, stored(results, by="published", fingerprints={}))
    assert (verdict.outcome, verdict.mode) == (outcome, "published")
    assert canned.launches == 3
    assert "published figure with no samples" in verdict.reason


def test_a_figure_that_a_report_does_not_give_is_inconclusive() -> None:
    """A report of the case without this figure shows nothing either way: no failure."""
    results = {CASE.key: {"decode_tps": entry("decode_tps", None, 100.0)}}
    canned = Canned("itl_ms", around(9.0))
    verdict = ask(canned, stored(results, by="published", fingerprints={}))
    assert verdict.outcome is Outcome.INCONCLUSIVE
    assert "the report behind b1 gives no itl_ms for c7/short" in verdict.reason
    assert canned.launches == 1, "a build that cannot run the case must not pass it"


def test_a_case_that_a_report_does_not_give_is_missing() -> None:
    """A report of other cases only is no baseline of this one."""
    results = {"other/short": {"decode_tps": entry("decode_tps", None, 100.0)}}
    verdict = ask(Canned("decode_tps", around(100.0)), stored(results, by="published"))
    assert verdict.outcome is Outcome.MISSING


# -- side by side -----------------------------------------------------------------------------


def test_equal_builds_pass_side_by_side() -> None:
    """It takes two blocks at least, and no more than the plan has."""
    canned = Canned("decode_tps", around(100.0))
    verdict = ask(canned, SideBySide())
    assert (verdict.outcome, verdict.mode) == (Outcome.PASS, "side-by-side")
    assert DEFAULT_PLAN.first_pass <= canned.blocks <= DEFAULT_PLAN.max_screen


def test_a_slowdown_is_confirmed_on_fresh_blocks() -> None:
    """One block raises the suspicion, two others confirm it."""
    canned = Canned("decode_tps", around(65.0))
    verdict = ask(canned, SideBySide())
    assert verdict.outcome is Outcome.REGRESSION
    assert "confirmed on fresh blocks" in verdict.reason
    assert canned.blocks == 3
    blocks = verdict.evidence["blocks"]
    assert isinstance(blocks, list)
    assert [block["phase"] for block in blocks] == ["screen", "confirm", "confirm"]


def test_a_slowdown_of_one_block_is_not_confirmed() -> None:
    """A start that ran slow once is no regression."""
    canned = Canned("decode_tps", then(around(65.0), 1, around(100.0)))
    verdict = ask(canned, SideBySide())
    assert verdict.outcome is not Outcome.REGRESSION
    assert canned.blocks >= 3


def test_a_spent_budget_is_inconclusive() -> None:
    """The first block is always measured, no second one once time is up; the reason says why."""
    canned = Canned("decode_tps", around(100.0))
    verdict = ask(canned, SideBySide(), budget=-1.0)
    assert verdict.outcome is Outcome.INCONCLUSIVE
    assert "the budget was spent" in verdict.reason
    assert "--llmperf-budget" in verdict.reason
    assert canned.blocks == 1


def test_a_suspicion_is_confirmed_whatever_the_budget() -> None:
    """A gross slowdown does not pass because time was short."""
    canned = Canned("decode_tps", around(65.0))
    assert ask(canned, SideBySide(), budget=-1.0).outcome is Outcome.REGRESSION
    assert canned.blocks == 3


def test_blocks_that_others_measured_cost_nothing() -> None:
    """A spent budget keeps from measuring, not from using what is there."""
    canned = Canned("decode_tps", around(65.0), blocks=3)
    assert ask(canned, SideBySide(), budget=-1.0).outcome is Outcome.REGRESSION
    assert canned.blocks == 3


def test_a_deterministic_value_takes_one_block() -> None:
    """It is compared exactly, and both builds are of this run, so no fingerprint is asked."""
    canned = Canned(
        "offloaded_layers", new=lambda _: [65.0], base=lambda _: [66.0], workload=LAUNCH
    )
    verdict = ask(canned, SideBySide(), case=ALONE)
    assert (verdict.outcome, verdict.mode) == (Outcome.REGRESSION, "exact")
    assert canned.blocks == 1


DRAFTS = stored({CASE.key: {"draft_acceptance": entry("draft_acceptance", lambda _: [60.0], 60.0)}})


@pytest.mark.parametrize(
    ("share", "outcome"),
    [
        (60.0, Outcome.PASS),
        (59.1, Outcome.PASS),
        (58.0, Outcome.REGRESSION),
        (62.0, Outcome.IMPROVED),
    ],
)
def test_acceptance_of_drafts_takes_one_launch_or_block(share: float, outcome: Outcome) -> None:
    """Of a workload, compared exactly, within one point."""
    now = Canned("draft_acceptance", lambda _: [share, share])
    verdict = ask(now, DRAFTS)
    assert (verdict.outcome, verdict.mode, now.launches) == (outcome, "exact", 1)
    now = Canned("draft_acceptance", lambda _: [share, share], base=lambda _: [60.0, 60.0])
    verdict = ask(now, SideBySide())
    assert (verdict.outcome, verdict.mode, now.blocks) == (outcome, "exact", 1)


@pytest.mark.parametrize(
    ("samples", "outcome"),
    [
        ([60.0, 59.5, 60.5], Outcome.PASS),
        ([40.0, 45.0, 30.0], Outcome.REGRESSION),
        ([80.0, 70.0, 90.0], Outcome.IMPROVED),
        ([60.0, 60.0, 50.0], Outcome.INCONCLUSIVE),
        ([60.0, 50.0, 50.0], Outcome.INCONCLUSIVE),
        ([60.0, 70.0], Outcome.INCONCLUSIVE),
    ],
)
@pytest.mark.parametrize("comparison", [DRAFTS, SideBySide()])
def test_samples_that_should_be_equal_and_are_not(
    comparison: Comparison, samples: list[float], outcome: Outcome
) -> None:
    """The verdict stands where each of them says the same, and tells that they differ."""
    canned = Canned("draft_acceptance", lambda _: samples, base=lambda _: [60.0, 60.0])
    verdict = ask(canned, comparison)
    assert verdict.outcome is outcome
    assert verdict.mode == ("none" if outcome is Outcome.INCONCLUSIVE else "exact")
    assert f"{min(samples):.4g} to {max(samples):.4g} in the build under test" in verdict.reason
    assert (verdict.base, verdict.new) == (60.0, median(samples))


@pytest.mark.parametrize(
    ("samples", "outcome"),
    [
        ([55.0, 45.4, 55.9], Outcome.PASS),
        ([45.0, 55.0, 45.0], Outcome.INCONCLUSIVE),
        ([55.0, 45.0], Outcome.INCONCLUSIVE),
        ([30.0, 31.0, 30.0], Outcome.REGRESSION),
    ],
)
def test_a_server_that_remembers_is_compared_in_step(
    samples: list[float], outcome: Outcome
) -> None:
    """Samples that differ in the same order on both sides are no difference of the builds."""
    canned = Canned("draft_acceptance", lambda _: samples, base=lambda _: [55.0, 45.0, 55.0])
    assert ask(canned, SideBySide()).outcome is outcome
    entries = {"draft_acceptance": entry("draft_acceptance", canned.base, 55.0)}
    assert ask(canned, stored({CASE.key: entries})).outcome is outcome


def test_memory_is_judged_side_by_side() -> None:
    """One value a start; within the metric's slack it passes."""
    canned = Canned("rss_mib", new=lambda _: [102.0], base=lambda _: [100.0], workload=LAUNCH)
    assert ask(canned, SideBySide(), case=ALONE).outcome is Outcome.PASS


# -- what cannot be measured ------------------------------------------------------------------


@pytest.mark.parametrize("comparison", [Record(), SPEED, SideBySide()])
def test_a_server_that_fails_is_an_error(comparison: Comparison) -> None:
    """The verdict is ERROR with the server's text, whatever it is compared with."""
    canned = Canned("decode_tps", around(1.0), error=ServerError("it died\n  log: x.log"))
    verdict = ask(canned, comparison)
    assert verdict.outcome is Outcome.ERROR
    assert "it died\n  log: x.log" in verdict.reason


@pytest.mark.parametrize("comparison", [Record(), SPEED, SideBySide()])
def test_a_workload_that_failed_is_an_error(comparison: Comparison) -> None:
    """A failure of this workload counts, also where the server lived on."""
    canned = Canned("decode_tps", around(1.0), failures={"short": ServerError("HTTP 500")})
    verdict = ask(canned, comparison)
    assert verdict.outcome is Outcome.ERROR
    assert "HTTP 500" in verdict.reason


def test_a_failure_of_another_workload_does_not_count() -> None:
    """Each workload answers for itself."""
    canned = Canned("decode_tps", around(100.0), failures={"long": ServerError("HTTP 500")})
    assert ask(canned, SPEED).outcome is Outcome.PASS


@pytest.mark.parametrize("comparison", [Record(), SideBySide()])
@pytest.mark.parametrize(
    ("metric", "hint"),
    [
        ("vram_mib", "neither NVML nor the log tells"),
        ("offloaded_layers", "a build for the CPU offloads none"),
        ("load_ms", "was not started by us"),
        ("rss_mib", "processes are not ours"),
        ("kv_mib", "log or answers do not tell it"),
    ],
)
def test_a_metric_that_was_not_measured_is_an_error(
    comparison: Comparison, metric: str, hint: str
) -> None:
    """A gate that cannot measure never passes; the reason says why that may be."""
    canned = Canned(metric, new=lambda _: [], base=lambda _: [1.0], workload=LAUNCH)
    verdict = ask(canned, comparison, case=ALONE)
    assert verdict.outcome is Outcome.ERROR
    assert f"{metric} was not measured on b2: " in verdict.reason
    assert hint in verdict.reason


@pytest.mark.parametrize("comparison", [Record(), SideBySide()])
def test_a_server_that_drafts_nothing_is_an_error(comparison: Comparison) -> None:
    """Drafting that was switched off, or never on, does not pass."""
    canned = Canned("draft_acceptance", new=lambda _: [], base=lambda _: [60.0])
    verdict = ask(canned, comparison)
    assert verdict.outcome is Outcome.ERROR
    assert "was not measured on b2: the server drafted nothing: does the config" in verdict.reason


def test_a_timing_without_a_workload_is_an_error() -> None:
    """Requests are measured under a workload; the reason says how to name one."""
    verdict = ask(Canned("decode_tps", around(1.0)), Record(), case=ALONE)
    assert verdict.outcome is Outcome.ERROR
    assert "decode_tps needs a workload: name some in the marker" in verdict.reason


def test_an_error_of_any_kind_of_ours_is_a_verdict() -> None:
    """Mistakes in what was asked, too, fail this metric and no other."""
    canned = Canned("decode_tps", around(1.0), error=PlanError("no such thing"))
    assert ask(canned, SideBySide()).outcome is Outcome.ERROR


# -- the parts --------------------------------------------------------------------------------


def test_what_a_start_shows_is_the_same_under_every_workload() -> None:
    """A metric of the launch is found there, whichever workload the case has."""
    launch = launch_of("b2", LAUNCH, "rss_mib", [7.0])
    assert samples_of(launch, CASE, METRICS["rss_mib"]) == [7.0]
    assert samples_of(launch, ALONE, METRICS["rss_mib"]) == [7.0]


@pytest.mark.parametrize(
    ("together", "new", "paired"),
    [(True, [1.0, 2.0], True), (True, [1.0], False), (False, [1.0, 2.0], False)],
)
def test_samples_are_paired_where_they_were_taken_in_turn(
    new: list[float], *, together: bool, paired: bool
) -> None:
    """Only if both builds were warm together and answered equally often."""
    canned = Canned("decode_tps", lambda _: new, lambda _: [3.0, 4.0], together=together)
    block = to_block(canned.block(0), CASE, METRICS["decode_tps"])
    assert (block.base, block.new) == ((3.0, 4.0), tuple(new))
    assert block.paired is paired
    assert block.order == "bn"


FLAT = st.dictionaries(st.sampled_from("abcd"), st.integers(0, 3))


@given(FLAT, FLAT)
def test_differences_are_those_that_differ(
    recorded: dict[str, int], measured: dict[str, int]
) -> None:
    """One line for each name that is not equal on both sides, none for equal fingerprints."""
    found = differences(recorded, measured)
    names = [line.partition(":")[0] for line in found]
    assert names == sorted(set(names))
    for name in "abcd":
        assert (name in names) == (recorded.get(name) != measured.get(name))
    assert differences(measured, measured) == []


def test_a_prior_needs_two_other_cases() -> None:
    """Published figures, single launches and launches without any spread tell nothing."""
    steady = entry("decode_tps", lambda _: [5.0], 5.0)
    spread = entry("decode_tps", around(5.0), 5.0)
    single = entry("decode_tps", around(5.0), 5.0, count=1)
    published = entry("decode_tps", None, 5.0)

    def prior_of(*entries: Recorded) -> object:
        results = {f"other{i}/short": {"decode_tps": e} for i, e in enumerate(entries)}
        own = {CASE.key: {"decode_tps": spread}}
        return pooled_prior(stored({**results, **own}).baseline, CASE.key, "decode_tps")

    assert prior_of() is None
    assert prior_of(spread) is None
    assert prior_of(spread, single, published) is None
    assert prior_of(spread, steady) is None
    assert prior_of(spread, spread) is not None


def test_a_running_server_is_one_start() -> None:
    """Its requests agree with each other, and so show neither a regression nor its absence."""
    slow = Canned("decode_tps", around(65.0), endpoint=True)
    verdict = ask(slow, SideBySide())
    assert verdict.outcome is Outcome.INCONCLUSIVE
    assert "REGRESSION by the requests of one start" in verdict.reason


def test_the_first_block_does_not_spend_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """The budget is for measuring again, so a slow first block leaves it whole."""
    now = [1000.0]
    monkeypatch.setattr("pytest_llmperf.budget.time.monotonic", lambda: now[0])

    class Slow(Canned):
        def block(self, index: int) -> PairedLaunches:
            now[0] += 100.0 if index >= self.blocks else 0.0
            return super().block(index)

    canned = Slow("decode_tps", around(100.0))
    ask(canned, SideBySide(), budget=50.0)
    assert canned.blocks == 2


@pytest.mark.parametrize("metric", ["decode_tps", "draft_acceptance"])
def test_the_first_launches_do_not_spend_the_budget(
    metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the first look, and of a guard that is judged before: blocks are still started.

    A GPU takes a minute for them, and a test with that budget came to no block.
    """
    now = [1000.0]
    monkeypatch.setattr("pytest_llmperf.budget.time.monotonic", lambda: now[0])

    class Slow(Canned):
        def launch(self, index: int) -> Launch:
            now[0] += 100.0 if index >= self.launches else 0.0
            return super().launch(index)

    canned = Slow(metric, around(95.3, spread=0.0 if metric == "draft_acceptance" else 0.02))
    today = Canned("decode_tps", around(95.3), base=around(95.0))
    budget = Budget(50.0)
    if metric == "draft_acceptance":
        assert ask(canned, DRAFTS, budget=budget).outcome is Outcome.IMPROVED
    else:
        assert ask(canned, SPEED, rematch=today, budget=budget).mode == "side-by-side"
    assert not budget.spent


def test_builds_that_were_asked_different_things_are_not_compared() -> None:
    """As where a chat template makes other prompts; that is no verdict on speed."""
    verdict = ask(Canned("decode_tps", HUNDRED, digest="0a"), SideBySide())
    assert verdict.outcome is Outcome.ERROR
    assert "b1 and b2 were not asked the same by short: their chat templates" in verdict.reason


# -- what cannot be measured ------------------------------------------------------------------

OOM = OutOfMemoryError(
    "out of memory: no room", what="CUDA0 model buffer of 8984 MiB", log=None, kind="start"
)
OTHER_OOM = OutOfMemoryError("no room", what="CUDA0 KV buffer of 10 MiB", log=None, kind="start")
SLOW = TooSlowError("sample 1 of long: too slow: given up after 60 s\nand more")
WAS = Failure("oom", "CUDA0 model buffer of 8984 MiB")
WAS_SLOW = Failure("too-slow", "given up")


def broken(error: LlmperfError) -> Canned:
    """A campaign whose build cannot be measured."""
    return Canned("decode_tps", HUNDRED, error=error)


def failing(was: Failure, *, by: str = "measured", prompt: str = "unknown") -> Stored:
    """A recorded baseline of a case that could not be measured."""
    before = stored({}, by=by)
    known = {} if by == "published" else {CASE.key: {**FINGERPRINT, "prompt": prompt}}
    return replace(
        before, baseline=replace(before.baseline, failures={CASE.key: was}, fingerprints=known)
    )


@pytest.mark.parametrize("comparison", [SPEED, SideBySide()])
def test_no_memory_is_an_outcome_of_its_own(comparison: Comparison) -> None:
    """Of a case that was measured with the baseline; it fails, with what the error says."""
    canned = replace(broken(OOM), each=(Canned("decode_tps", HUNDRED), broken(OOM)))
    verdict = ask(canned, comparison)
    assert verdict.outcome is Outcome.OOM
    assert "out of memory: no room" in verdict.reason
    if isinstance(comparison, SideBySide):
        assert verdict.base == pytest.approx(100.0, rel=0.01)
        assert verdict.reason.startswith("the baseline's build does not, decode_tps is ")


@pytest.mark.parametrize(
    ("error", "outcome"),
    [(ServerError("it crashed", kind="crashed"), Outcome.ERROR), (SLOW, Outcome.ERROR)],
)
def test_another_failure_stays_an_error(error: LlmperfError, outcome: Outcome) -> None:
    """Only memory has an outcome of its own."""
    assert ask(broken(error), SPEED).outcome is outcome


@pytest.mark.parametrize(("error", "kind"), [(OOM, "oom"), (SLOW, "too-slow")])
def test_what_cannot_be_measured_can_be_recorded(error: LlmperfError, kind: str) -> None:
    """With what ran out in a few words, in one line."""
    verdict = ask(broken(error), Record())
    assert verdict.outcome is Outcome.RECORDED
    told = verdict.evidence["failed"]
    assert isinstance(told, dict)
    assert told["kind"] == kind
    assert "\n" not in told["what"]


def test_what_worked_once_is_not_recorded_as_a_failure() -> None:
    """A later launch that finds no memory has another reason than the config."""

    class Later(Canned):
        def launch(self, index: int) -> Launch:
            if index:
                raise OOM
            return super().launch(index)

    assert ask(Later("decode_tps", HUNDRED), Record()).outcome is Outcome.OOM


@pytest.mark.parametrize(
    ("was", "error", "told"),
    [
        (WAS, OOM, "as recorded of b1"),
        (
            WAS,
            OTHER_OOM,
            "CUDA0 KV buffer of 10 MiB), as recorded of b1; with b1 it was CUDA0 model",
        ),
        (WAS_SLOW, SLOW, "it is too slow ("),
    ],
)
def test_a_failure_that_was_recorded_passes(was: Failure, error: LlmperfError, told: str) -> None:
    """As long as it is of the same kind, whichever buffer it is."""
    for comparison in (failing(was), failing(was, by="published")):
        verdict = ask(broken(error), comparison)
        assert verdict.outcome is Outcome.PASS
        assert told in verdict.reason


def test_a_recorded_failure_that_is_gone_is_an_improvement() -> None:
    """With the value; what was not asked then had no prompt to compare."""
    for comparison in (failing(WAS), failing(WAS_SLOW), failing(WAS, by="published")):
        verdict = ask(
            Canned("decode_tps", HUNDRED), comparison, fingerprint={**FINGERPRINT, "prompt": "p"}
        )
        assert verdict.outcome is Outcome.IMPROVED
        assert verdict.new == pytest.approx(100.0, rel=0.01)
        assert "the baseline is stale" in verdict.reason


@pytest.mark.parametrize(
    ("was", "error", "outcome"), [(WAS_SLOW, OOM, Outcome.OOM), (WAS, SLOW, Outcome.ERROR)]
)
def test_a_failure_of_another_kind_fails(
    was: Failure, error: LlmperfError, outcome: Outcome
) -> None:
    """What was too slow must not run out of memory, nor the other way round."""
    assert ask(broken(error), failing(was)).outcome is outcome


@pytest.mark.parametrize("canned", [broken(OOM), Canned("decode_tps", HUNDRED)])
def test_a_failure_under_other_conditions_is_not_comparable(canned: Canned) -> None:
    """A context that was made smaller is no improvement."""
    verdict = ask(canned, failing(WAS), fingerprint={**FINGERPRINT, "options": "threads=2"})
    assert verdict.outcome is Outcome.INCOMPARABLE


def test_where_the_memory_was_read_is_unknown_of_what_failed() -> None:
    """So it makes no difference once the case works."""
    found = {**FINGERPRINT, "prompt": "p", "vram": "by the log"}
    verdict = ask(Canned("decode_tps", HUNDRED), failing(WAS), fingerprint=found)
    assert verdict.outcome is Outcome.IMPROVED


@pytest.mark.parametrize(("limit", "outcome"), [(60.0, Outcome.PASS), (1.0, Outcome.INCOMPARABLE)])
def test_what_was_too_slow_is_compared_by_the_same_limit(limit: float, outcome: Outcome) -> None:
    """A limit that nothing could keep must not make everything pass as recorded."""
    was = failing(WAS_SLOW)
    known: dict[str, str | int | float | bool] = {**FINGERPRINT, "limit": 60.0}
    baseline = replace(was.baseline, fingerprints={CASE.key: known})
    case = replace(CASE, workload=Workload("short", (Turn(64, 64),), limit=limit))
    verdict = ask(broken(SLOW), replace(was, baseline=baseline), case=case)
    assert verdict.outcome is outcome
    # Memory does not run out by a limit.
    assert ask(broken(OOM), failing(WAS), case=case).outcome is Outcome.PASS


def test_what_works_again_is_held_against_the_oldest_baseline() -> None:
    """It may be slower than it was before it failed."""
    old = stored({CASE.key: {"decode_tps": entry("decode_tps", around(200.0), 200.0)}})
    both = replace(failing(WAS), oldest=("b0", old.baseline))
    verdict = ask(Canned("decode_tps", HUNDRED), both)
    assert verdict.outcome is Outcome.IMPROVED
    since = verdict.evidence["oldest"]
    assert isinstance(since, dict)
    assert since["change"] == pytest.approx(-0.5, abs=0.01)


def test_side_by_side_each_build_is_tried_alone() -> None:
    """Both fail; only the baseline does; or neither does by itself, and then the error stands."""
    works = Canned("decode_tps", HUNDRED)
    both = ask(replace(broken(OOM), each=(broken(OTHER_OOM), broken(OOM))), SideBySide())
    assert both.outcome is Outcome.OOM
    assert both.reason.startswith(
        "both builds fail; the baseline's build too runs out of memory (CUDA0 KV"
    )
    better = ask(replace(broken(OOM), each=(broken(OOM), works)), SideBySide())
    assert better.outcome is Outcome.IMPROVED
    assert better.new == pytest.approx(100.0, rel=0.01)
    neither = ask(replace(broken(OOM), each=(works, works)), SideBySide())
    assert neither.outcome is Outcome.OOM
    assert neither.reason == str(OOM)
