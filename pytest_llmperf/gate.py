"""One metric of one case to its verdict: measures as much as the decision needs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from statistics import median
from typing import Protocol, TypeVar

from pytest_llmperf.budget import Budget
from pytest_llmperf.build.tools import BENCH
from pytest_llmperf.campaign.base import Campaign, PairedLaunches
from pytest_llmperf.errors import (
    CheckError,
    LlmperfError,
    OutOfMemoryError,
    ServerError,
    TooSlowError,
    UnmeasuredError,
)
from pytest_llmperf.gpu.nvml import status
from pytest_llmperf.judge._common import finding
from pytest_llmperf.judge.decide import (
    compare_exact,
    compare_published,
    disturbed,
    failed,
    incomparable,
    missing,
    out_of_memory,
    recorded,
    recorded_failure,
    still_fails,
    works_now,
)
from pytest_llmperf.judge.priors import Priors, pooled_prior
from pytest_llmperf.judge.sequential import Decision, Plan
from pytest_llmperf.judge.side_by_side import DEFAULT_PLAN, Block, decide_side_by_side
from pytest_llmperf.judge.store import Baseline, Failure, beforehand
from pytest_llmperf.judge.stored import decide_stored, stored_plan
from pytest_llmperf.judge.verdict import Outcome, Verdict
from pytest_llmperf.measure.launch import Launch
from pytest_llmperf.metrics import Metric
from pytest_llmperf.plan.config import LAUNCH, Case

Fingerprint = Mapping[str, str | int | float | bool]

U = TypeVar("U")


_NoRoomError = (OutOfMemoryError, TooSlowError)
"""What can be recorded of a case that cannot be measured."""


_OWED_BLOCKS = 6
"""Blocks that a suspicion by launches gets whatever the budget: a slowdown of 15 % shows in four.
Without them a gate that can start both builds would find less than one that cannot."""


class _DisturbedError(Exception):
    """The machine was not fit to measure on; the text says why."""


class Decide(Protocol[U]):
    """A rule that says from the units so far what is wanted next."""

    def __call__(self, screen: list[U], confirm: list[U], *, last: bool) -> Decision:
        """Judge; with ``last`` the decision is final."""


@dataclass(frozen=True, slots=True)
class Record:
    """Compare with nothing: record."""


@dataclass(frozen=True, slots=True)
class Absent:
    """There is nothing to compare with; ``reason`` names the command that mends it."""

    reason: str


@dataclass(frozen=True, slots=True)
class Stored:
    """Compare with a recorded baseline.

    Attributes:
        baseline: What was recorded.
        label: Its label.
        path: Its file.
        build_option: The option that makes its build the build under test.
        oldest: The oldest baseline of this machine and its label, where it is another one: against
            it a drift shows that stays within the tolerance from one baseline to the next.
    """

    baseline: Baseline
    label: str
    path: str
    build_option: str
    oldest: tuple[str, Baseline] | None = None


@dataclass(frozen=True, slots=True)
class SideBySide:
    """Compare with the campaign's second build, in this run."""


Comparison = Record | Absent | Stored | SideBySide


def samples_of(launch: Launch, case: Case, metric: Metric) -> list[float]:
    """Return the samples of a metric in a launch.

    Raises:
        UnmeasuredError: If the launch has none; the text says why that may be.
    """
    name = LAUNCH if metric.scope == "launch" else case.where
    if metric.scope == "request" and case.workload is None:
        raise UnmeasuredError(
            f"{metric.name} needs a workload: name some in the marker llmperf(workloads=[...])"
        )
    values = launch.samples.get(name, {}).get(metric.name)
    if not values:
        nvml = f" ({reason})" if (reason := status().reason) else ""
        hints = {
            "vram_mib": f"neither NVML nor the log tells of GPU memory of the server{nvml}",
            "vram_peak_mib": f"NVML does not tell of GPU memory of the server{nvml}",
            "tokens_per_joule": f"NVML tells no energy of its GPUs{nvml}; MIG instances and old "
            "cards have no counter",
            "offloaded_layers": "the log does not say; a build for the CPU offloads none",
            "load_ms": "a running server was not started by us",
            "rss_mib": "a running server's processes are not ours to look at",
            "draft_acceptance": "the server drafted nothing: does the config set spec-type, and "
            "does the text repeat itself?",
        }
        why = hints.get(metric.name, "the server's log or answers do not tell it")
        if case.tool == BENCH:
            why = (
                f"{BENCH} tells prefill_tps and decode_tps; gate others on a workload of "
                "llama-server"
            )
        raise UnmeasuredError(f"{metric.name} was not measured on {launch.build}: {why}")
    return values


@dataclass(frozen=True, slots=True)
class Question:
    """One metric of one case, and what may be spent on answering.

    Attributes:
        campaign: Makes launches of the case's config, or has made them.
        case: Config and workload.
        metric: The metric.
        tolerance: Relative change for the worse that is allowed.
        budget: What the test may spend on measuring again.
        launches: Fresh starts measured for and against a recorded baseline.
        fingerprint: Gives the fingerprint of a launch under this case.
        priors: What calibration found of this machine's noise.
        rematch: Gives a campaign of the build under test against the recorded baseline's build,
            for what recorded launches leave open or suspect; raises LlmperfError where that build
            cannot be had.
        begun: Gives that campaign if it was asked for before, without making it.
    """

    campaign: Campaign
    case: Case
    metric: Metric
    tolerance: float
    budget: Budget
    launches: int
    fingerprint: Callable[[Launch], Fingerprint]
    priors: Priors
    rematch: Callable[[], Campaign]
    begun: Callable[[], Campaign | None] = lambda: None

    def answer(self, comparison: Comparison) -> Verdict:
        """Measure until the verdict is clear or the budget is spent."""
        verdict = self._answer(comparison)
        # Where nothing was compared, the tolerance that would have counted is shown all the same.
        if verdict.mode == "none":
            return replace(verdict, tolerance=self.tolerance)
        decided = {Outcome.PASS, Outcome.IMPROVED, Outcome.REGRESSION}
        timed = verdict.mode in {"stored", "side-by-side"} and verdict.outcome in decided
        return one_start(verdict) if timed and self.campaign.endpoint else verdict

    def _answer(self, comparison: Comparison) -> Verdict:
        metric = self.metric
        if isinstance(comparison, Absent):
            return missing(metric, comparison.reason)
        try:
            return self._measured(comparison)
        except _DisturbedError as error:
            return disturbed(metric, str(error))
        except LlmperfError as error:
            return unmeasured(metric, error)

    def _measured(self, comparison: Record | Stored | SideBySide) -> Verdict:
        if isinstance(comparison, SideBySide):
            try:
                return self._side_by_side(self.campaign)
            except _NoRoomError as error:
                return self._one_by_one(error)
        if isinstance(comparison, Stored):
            was = comparison.baseline.failures.get(self.case.key)
            return self._stored(comparison) if was is None else self._since(comparison, was)
        try:
            return recorded(self.metric, self._launches(0, self.launches))
        except _NoRoomError as error:
            # A launch that worked shows that it can be measured: nothing to be recorded then.
            if self._worked():
                raise
            return recorded_failure(self.metric, failure_of(error))

    def _worked(self) -> bool:
        """Return whether any launch has samples of this case."""
        taken = [self.campaign.launch(index) for index in range(self.campaign.measured[1])]
        return any(launch.samples.get(self.case.where) for launch in taken)

    def _one_by_one(self, error: LlmperfError) -> Verdict:
        """Judge builds of which one, or both, could not be measured side by side.

        Args:
            error: What went wrong there.
        """
        ends: list[list[float] | LlmperfError] = []
        for base in (True, False):
            alone = replace(self, campaign=self.campaign.alone(base=base))
            try:
                ends.append(alone.samples(0))
            except _NoRoomError as again:
                ends.append(again)
        before, now = ends
        label = "the baseline's build"
        if isinstance(now, LlmperfError):
            verdict = unmeasured(self.metric, now)
            if isinstance(before, LlmperfError):
                reason = f"both builds fail; {label} too {failure_of(before).words}; {now}"
                return replace(verdict, reason=reason)
            value = median(before)
            told = f"{label} does not, {self.metric.name} is {value:.4g} {self.metric.unit}"
            return replace(verdict, base=value, reason=f"{told}; {now}")
        if isinstance(before, LlmperfError):
            return works_now(self.metric, failure_of(before), [now], label)
        raise error

    def _check_workload(self, campaign: Campaign) -> None:
        workload = self.case.workload
        if workload is not None and (error := campaign.failures.get(workload.name)):
            raise error

    def _check_steady(self, unit: Launch | PairedLaunches) -> None:
        # Sizes do not depend on who else is busy.
        if self.metric.kind == "timing" and unit.disturbed:
            raise _DisturbedError(unit.disturbed)

    def _check_prompts(self, pair: PairedLaunches) -> None:
        """Refuse to compare builds that were not asked the same."""
        name = self.case.where
        base, new = (one.digests.get(name) for one in (pair.base, pair.new))
        if base != new:
            raise CheckError(
                f"{pair.base.build} and {pair.new.build} were not asked the same by {name}: their "
                "chat templates make different prompts of it, or one does not show what it makes; "
                "pin the template with the option chat-template-file"
            )

    def samples(self, index: int) -> list[float]:
        """Return the samples of a launch of the build under test.

        Raises:
            LlmperfError: If it cannot be measured.
        """
        launch = self.campaign.launch(index)
        self._check_workload(self.campaign)
        self._check_steady(launch)
        return samples_of(launch, self.case, self.metric)

    def _launches(self, begin: int, end: int) -> list[list[float]]:
        """Return the samples of launches that any verdict needs."""
        with self.budget.paused():
            return [self.samples(index) for index in range(begin, end)]

    def _block(self, campaign: Campaign, index: int) -> Block:
        pair = campaign.block(index)
        self._check_workload(campaign)
        self._check_prompts(pair)
        self._check_steady(pair)
        return to_block(pair, self.case, self.metric)

    def _exact(self, base: Sequence[Sequence[float]], new: Sequence[float]) -> Verdict:
        """Compare what should be one value: samples of launches of the baseline, and of one now.

        Where samples differ all the same, their medians are compared. The verdict stands if
        every sample says the same of every other, or if samples of the same number are equal:
        a server that remembers earlier requests answers the same one differently, but in the
        same order.
        """

        def compare(before: float, after: float) -> Verdict:
            return compare_exact(
                self.metric, before, after, tolerance=self.tolerance, slack=self.metric.slack
            )

        if self.metric.scope == "launch":
            # What a start shows it shows once.
            base, new = [base[0][:1]], new[:1]
        known = [value for launch in base for value in launch]
        verdict = compare(median(known), median(new))
        if len({*known}) == len({*new}) == 1:
            return verdict
        ends = [f(side) for side in (known, new) for f in (min, max)]
        told = (
            f"the samples of one launch are not all equal, {ends[0]:.4g} to {ends[1]:.4g} in the "
            f"baseline and {ends[2]:.4g} to {ends[3]:.4g} in the build under test"
        )
        outcomes = {compare(one, other).outcome for one in ends[:2] for other in ends[2:]}
        in_step = all(
            len(launch) == len(new)
            and all(
                compare(*pair).outcome is Outcome.PASS for pair in zip(launch, new, strict=True)
            )
            for launch in base
        )
        if in_step or outcomes == {verdict.outcome}:
            return replace(verdict, reason=f"{verdict.reason} ({told}; medians are compared)")
        unclear = missing(self.metric, f"{self.metric.name} is not deterministic here: {told}")
        return replace(
            unclear,
            outcome=Outcome.INCONCLUSIVE,
            base=verdict.base,
            new=verdict.new,
            change=verdict.change,
        )

    def _side_by_side(self, campaign: Campaign, owed: int = 0) -> Verdict:
        """Judge by blocks; so many of them are measured whatever the budget."""
        if self.metric.kind == "exact":
            with self.budget.paused():
                first = self._block(campaign, 0)
            return self._exact([first.base], first.new)

        def decide(screen: list[Block], confirm: list[Block], *, last: bool) -> Decision:
            # Sizes are the same, whoever came first.
            paired = self.metric.kind != "timing" or all(b.paired for b in (*screen, *confirm))
            return decide_side_by_side(
                self.metric,
                screen,
                confirm,
                tolerance=self.tolerance,
                prior=self.priors.block(self.metric.name, paired=paired),
                last=last,
            )

        return self._until_clear(
            decide,
            lambda index: self._block(campaign, index),
            lambda: campaign.measured[0],
            DEFAULT_PLAN,
            owed,
        )

    def _until_clear(
        self,
        decide: Decide[U],
        unit: Callable[[int], U],
        measured: Callable[[], int],
        plan: Plan,
        owed: int = 0,
    ) -> Verdict:
        """Measure the units that the rule wants until it ends or the budget is spent.

        The budget is for measuring again. The first look and the fewest units of a confirmation
        come whatever it is: a gross slowdown must not pass because time was short.

        Args:
            decide: The rule.
            unit: Measures the unit of this number, or returns it where it was measured before.
            measured: How many units there are that cost nothing any more.
            plan: The rule's plan.
            owed: Screening units that are measured whatever the budget.
        """
        screen: list[U] = []
        confirm: list[U] = []
        last = False
        while True:
            decision = decide(screen, confirm, last=last)
            if decision.wants is None:
                verdict = decision.verdict
                told = {**verdict.evidence, "cut_short": True}
                return replace(verdict, evidence=told) if last and self.budget.closed else verdict
            taken = len(screen) + len(confirm)
            must = not self.budget.closed and (
                taken < max(plan.first_screen, owed)
                if decision.wants == "screen"
                else len(confirm) < plan.first_confirm
            )
            if not must and taken >= measured() and self.budget.spent:
                last = True
                continue
            with self.budget.paused() if must else nullcontext():
                (screen if decision.wants == "screen" else confirm).append(unit(taken))

    def _stored(self, stored: Stored) -> Verdict:
        case, metric = self.case, self.metric
        entries = stored.baseline.results.get(case.key)
        known = (entries or {}).get(metric.name)
        if known is None:
            if entries is not None and stored.baseline.published:
                # Measured all the same: a build that cannot run this case must not pass it.
                self._launches(0, 1)
            return missing_from(stored, case, metric)
        self._check_begun()
        first = self._launches(0, 1)
        if known.launches is None:
            taken = first + self._launches(1, self.launches)
            return compare_published(metric, known.value, taken, tolerance=self.tolerance)
        fingerprint = self.fingerprint(self.campaign.launch(0))
        differing = differences(stored.baseline.fingerprints.get(case.key, {}), fingerprint)
        if differing:
            return incomparable(metric, differing)
        if metric.kind == "exact":
            several = metric.scope == "request"
            return self._exact(known.launches if several else [[known.value]], first[0])
        base = known.launches
        plan = stored_plan(self.launches)
        prior = pooled_prior(stored.baseline, case.key, metric.name)
        prior = self.priors.launch(metric.name) if prior is None else prior

        def decide(
            screen: list[list[float]], confirm: list[list[float]], *, last: bool
        ) -> Decision:
            return decide_stored(
                metric,
                base,
                screen,
                confirm,
                tolerance=self.tolerance,
                prior=prior,
                plan=plan,
                last=last,
            )

        def against_record() -> Verdict:
            return self._until_clear(decide, self.samples, lambda: self.campaign.measured[1], plan)

        screen: list[list[float]] = []
        few = self.campaign.measured[1] if self.budget.closed else plan.first_screen
        while (look := decide(screen, [], last=False)).wants and len(screen) < few:
            screen += self._launches(len(screen), len(screen) + 1)
        clear = look.verdict.outcome is not Outcome.INCONCLUSIVE
        verdict = against_record() if clear else self._today(look.verdict, against_record)
        if stored.oldest is None:
            return verdict
        # Blocks tell what the builds differ by. Today's own speed is the machine's as well.
        settled_at = known.value * (1 + (verdict.change or 0.0))
        now = replace(verdict, new=settled_at) if verdict.settled else verdict
        told = since(now, *stored.oldest, case.key, fingerprint)
        return replace(verdict, evidence=told.evidence)

    def _since(self, stored: Stored, was: Failure) -> Verdict:
        """Compare with a baseline that says that the case cannot be measured."""
        metric = self.metric
        now: Failure | None = None
        taken: list[list[float]] = []
        try:
            taken = self._launches(0, 1)
            launch = self.campaign.launch(0)
        except _NoRoomError as error:
            now = failure_of(error)
            if now.kind != was.kind:
                raise
            # It has no samples of this case, but may know what the server said of itself.
            launch = self.campaign.launch(0) if self.campaign.measured[1] else no_launch()
        known = beforehand(stored.baseline.fingerprints.get(self.case.key, {}))
        fingerprint = self.fingerprint(launch)
        found = beforehand(failed_with(fingerprint, was, self.case))
        # A report has no conditions.
        if not stored.baseline.published and (differing := differences(known, found)):
            return incomparable(metric, differing)
        if now is not None:
            return still_fails(metric, was, now, stored.label)
        verdict = works_now(metric, was, taken, stored.label)
        if stored.oldest is None:
            return verdict
        return since(verdict, *stored.oldest, self.case.key, fingerprint)

    def _today(self, first: Verdict, against_record: Callable[[], Verdict]) -> Verdict:
        """Let today's blocks decide what recorded launches leave open or suspect, if they can.

        The machine may have been faster on the day of the record, and starts differ by more than
        the blocks that cancel it. More launches against the same few recorded ones help neither.

        Args:
            first: The verdict of the first look at launches.
            against_record: Goes on with launches alone.
        """
        if self.campaign.endpoint or self.budget.closed:
            return against_record()
        suspicion = suspected(first)
        rematch = self.begun()
        try:
            free = rematch is not None and rematch.measured[0] > 0
            if self.budget.spent and not free and not suspicion:
                return against_record()
            if rematch is None:
                # It may have to be installed first.
                with self.budget.paused():
                    rematch = self.rematch()
            owed = _OWED_BLOCKS if suspicion else 0
            return settled(first, self._side_by_side(rematch, owed))
        except _DisturbedError as error:
            return unsettled(against_record(), f"the blocks were disturbed: {error}", begun=True)
        except LlmperfError as error:
            if rematch is None:
                return unsettled(against_record(), str(error), begun=False)
            self._check_blame(rematch, error)
            return unsettled(against_record(), f"the blocks failed: {error}", begun=True)

    def _check_blame(self, rematch: Campaign, error: LlmperfError) -> None:
        """Raise what went wrong in blocks, if it is the build under test that it is wrong with.

        A crash is its own, whoever ran beside it. What else fails beside another server, such as
        memory that does not suffice for two, has to fail alone as well.
        """
        if not rematch.blames(error):
            return
        if _is_crash(error):
            raise error
        replace(self, campaign=rematch.alone(base=False)).samples(0)

    def _check_begun(self) -> None:
        """Raise a crash of the build under test in blocks that others asked for."""
        if (rematch := self.begun()) is None:
            return
        for name in (LAUNCH, self.case.where):
            error = rematch.failures.get(name)
            if error is not None and _is_crash(error) and rematch.blames(error):
                raise error


def _is_crash(error: LlmperfError) -> bool:
    return isinstance(error, ServerError) and error.kind == "crashed"


def failure_of(error: LlmperfError) -> Failure:
    """Return a failure as a baseline holds it."""
    if isinstance(error, OutOfMemoryError):
        return Failure("oom", error.what)
    return Failure("too-slow", str(error).partition("\n")[0])


def failure_in(verdicts: Sequence[Verdict]) -> Failure | None:
    """Return the failure of a case that is to be recorded, None if there is none."""
    for verdict in verdicts:
        told = verdict.evidence.get("failed")
        if verdict.outcome is Outcome.RECORDED and isinstance(told, Mapping):
            return Failure(str(told["kind"]), str(told["what"]))
    return None


def failed_with(fingerprint: Fingerprint, failure: Failure, case: Case) -> Fingerprint:
    """Return the fingerprint of a case that fails: what is too slow is so by the limit it had."""
    if failure.kind != "too-slow" or case.workload is None or not case.workload.limit:
        return fingerprint
    return {**fingerprint, "limit": case.workload.limit}


def unmeasured(metric: Metric, error: LlmperfError) -> Verdict:
    """Return the verdict on a metric that could not be measured."""
    if isinstance(error, OutOfMemoryError):
        return out_of_memory(metric, str(error))
    return failed(metric, str(error))


def no_launch() -> Launch:
    """Return what stands for the launch of a case that could not be measured: it holds nothing."""
    return Launch("", "", command="", log="")


def to_block(pair: PairedLaunches, case: Case, metric: Metric) -> Block:
    """Return what a metric sees of a block."""
    base, new = samples_of(pair.base, case, metric), samples_of(pair.new, case, metric)
    return Block(
        base=tuple(base),
        new=tuple(new),
        paired=pair.together and len(base) == len(new),
        order=pair.orders.get(case.where, ""),
    )


def one_start(verdict: Verdict) -> Verdict:
    """Return what a verdict on a running server is worth: requests of one start prove little."""
    return replace(
        verdict,
        outcome=Outcome.INCONCLUSIVE,
        evidence={**verdict.evidence, "one_start": True},
        reason=f"{verdict.outcome.value} by the requests of one start of a running server, and "
        "starts of equal builds differ: let the harness start it to know",
    )


def missing_from(stored: Stored, case: Case, metric: Metric) -> Verdict:
    """Return the verdict where a baseline holds nothing of this metric of a case.

    Where a report gives other figures of the case, but not this one, nothing was shown either
    way: a warning, and a failure under ``--llmperf-strict``.
    """
    if stored.baseline.published and case.key in stored.baseline.results:
        told = (
            f"the report behind {stored.label} gives no {metric.name} for {case.key}: record a "
            "baseline of your own to gate it, with --update-baselines"
        )
        return replace(missing(metric, told), outcome=Outcome.INCONCLUSIVE)
    return missing(
        metric,
        f"{stored.path} has no {metric.name} for {case.key}: record it with "
        f"`pytest -k {case.config.name} {stored.build_option} --update-baselines`",
    )


def since(  # noqa: PLR0917 - a verdict, and what it is compared with
    verdict: Verdict,
    label: str,
    oldest: Baseline,
    key: str,
    fingerprint: Fingerprint,
    ignored: Collection[str] = (),
) -> Verdict:
    """Return the verdict with the change since an older baseline in its evidence.

    As it is where the older one has no such figure, or made it under other conditions, but for
    the ``ignored`` ones.
    """
    known = oldest.results.get(key, {}).get(verdict.metric)
    if known is None or verdict.new is None or known.value <= 0:
        return verdict
    before, now = (
        {name: value for name, value in one.items() if name not in ignored}
        for one in (oldest.fingerprints.get(key, {}), fingerprint)
    )
    if differences(before, now):
        return verdict
    told = {"label": label, "value": known.value, "change": verdict.new / known.value - 1}
    return replace(verdict, evidence={**verdict.evidence, "oldest": told})


def suspected(verdict: Verdict) -> bool:
    """Return whether the last look behind a verdict showed a slowdown beyond the tolerance."""
    looks = verdict.evidence.get("looks")
    return isinstance(looks, list) and bool(looks) and looks[-1]["claim"] == "slower"


def unsettled(verdict: Verdict, why: str, *, begun: bool) -> Verdict:
    """Return a verdict against recorded launches that no blocks could settle, saying why.

    Args:
        verdict: The one by launches alone.
        why: What kept blocks from it.
        begun: Whether blocks were measured at all: then a verdict that passes says it too.
    """
    if verdict.outcome is Outcome.REGRESSION:
        told = "Not confirmed side by side, so the machine itself may be slower than on the day of"
        told = f"{told} the record: {why}"
    elif verdict.outcome is Outcome.INCONCLUSIVE:
        told = f"Side by side would tell more, but {why}"
    elif begun:
        told = f"That is by launches alone: {why}"
    else:
        return verdict
    return replace(verdict, reason=f"{verdict.reason}. {told}")


def settled(verdict: Verdict, rematch: Verdict) -> Verdict:
    """Return the verdict on what recorded launches left open or suspected, as blocks settled it.

    What counts is side by side, where the machine is the same for both builds.

    Args:
        verdict: The one against recorded launches.
        rematch: The one side by side.
    """
    told = finding(verdict.metric, verdict.change, None, 0)
    passed = rematch.outcome in {Outcome.PASS, Outcome.IMPROVED}
    if verdict.change is None:
        reason = f"{rematch.reason} (the recorded launches are too few to tell)"
    elif passed and suspected(verdict):
        reason = (
            f"{rematch.reason}; against the recorded launches {told}, so the machine is not as "
            "fast as on the day of the record: record the baseline anew"
        )
    elif passed or rematch.outcome is Outcome.REGRESSION:
        reason = f"{rematch.reason} (against the recorded launches: {told})"
    else:
        reason = f"against the recorded launches {told}, but side by side: {rematch.reason}"
    evidence = {"stored": verdict.to_json(), "suspected": suspected(verdict)}
    return replace(rematch, reason=reason, evidence={**rematch.evidence, **evidence})


def differences(recorded_with: Fingerprint, measured_with: Fingerprint) -> list[str]:
    """Return what differs between two fingerprints, in words."""
    return [
        f"{name}: {recorded_with.get(name, 'unknown')} -> {measured_with.get(name, 'unknown')}"
        for name in sorted({*recorded_with, *measured_with})
        if recorded_with.get(name) != measured_with.get(name)
    ]
