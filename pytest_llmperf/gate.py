"""One metric of one case to its verdict: measures as much as the decision needs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from pytest_llmperf.campaign import Campaign, PairedLaunches
from pytest_llmperf.errors import LlmperfError, UnmeasuredError
from pytest_llmperf.judge.decide import (
    compare_exact,
    compare_published,
    compare_stored,
    failed,
    incomparable,
    missing,
    recorded,
)
from pytest_llmperf.judge.sequential import Block, decide_side_by_side
from pytest_llmperf.judge.statistics import Prior, fit_prior, log_means
from pytest_llmperf.judge.store import Baseline
from pytest_llmperf.judge.verdict import Outcome, Verdict
from pytest_llmperf.measure.launch import Launch
from pytest_llmperf.metrics import Metric
from pytest_llmperf.plan.config import LAUNCH, Case

Fingerprint = Mapping[str, str | int | float | bool]


@dataclass(frozen=True, slots=True)
class Record:
    """Compare with nothing: record."""


@dataclass(frozen=True, slots=True)
class Absent:
    """There is nothing to compare with; ``reason`` names the command that mends it."""

    reason: str


@dataclass(frozen=True, slots=True)
class Stored:
    """Compare with a recorded baseline."""

    baseline: Baseline
    label: str
    path: str
    build_option: str


@dataclass(frozen=True, slots=True)
class SideBySide:
    """Compare with the campaign's second build, in this run."""


Comparison = Record | Absent | Stored | SideBySide


def samples_of(launch: Launch, case: Case, metric: Metric) -> list[float]:
    """Return the samples of a metric in a launch.

    Raises:
        UnmeasuredError: If the launch has none; the text says why that may be.
    """
    name = LAUNCH if metric.scope == "launch" or case.workload is None else case.workload.name
    if metric.scope == "request" and case.workload is None:
        raise UnmeasuredError(
            f"{metric.name} needs a workload: name some in the marker llmperf(workloads=[...])"
        )
    values = launch.samples.get(name, {}).get(metric.name)
    if not values:
        hints = {
            "vram_mib": "NVML tells no GPU memory of the server's processes",
            "offloaded_layers": "the log does not say; a build for the CPU offloads none",
            "load_ms": "a running server was not started by us",
            "rss_mib": "a running server's processes are not ours to look at",
        }
        why = hints.get(metric.name, "the server's log or answers do not tell it")
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
        deadline: ``time.monotonic()`` after which nothing is measured again.
        launches: Fresh starts measured for and against a recorded baseline.
        fingerprint: Gives the fingerprint of a launch under this case.
    """

    campaign: Campaign
    case: Case
    metric: Metric
    tolerance: float
    deadline: float
    launches: int
    fingerprint: Callable[[Launch], Fingerprint]

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
        if metric.scope == "quality":
            return failed(metric, f"{metric.name} is not measured by a speed or memory test")
        if isinstance(comparison, Absent):
            return missing(metric, comparison.reason)
        try:
            return self._measured(comparison)
        except LlmperfError as error:
            return failed(metric, str(error))

    def _measured(self, comparison: Record | Stored | SideBySide) -> Verdict:
        if isinstance(comparison, SideBySide):
            return self._side_by_side()
        if isinstance(comparison, Stored):
            return self._stored(comparison)
        return recorded(self.metric, self._launches(0, self.launches))

    def _after(self, must: Callable[[], object]) -> float:
        """Do what every verdict needs and return the deadline put off by what it took.

        The budget is for measuring again; the first measuring, and waiting for another run to
        finish its own, do not spend it.
        """
        began = time.monotonic()
        must()
        return self.deadline + time.monotonic() - began

    def _check_workload(self) -> None:
        workload = self.case.workload
        if workload is not None and (error := self.campaign.failures.get(workload.name)):
            raise error

    def _launches(self, begin: int, end: int) -> list[list[float]]:
        """Return the samples of launches ``begin`` to ``end`` of the build under test."""
        taken = []
        for index in range(begin, end):
            launch = self.campaign.launch(index)
            self._check_workload()
            taken.append(samples_of(launch, self.case, self.metric))
        return taken

    def _block(self, index: int) -> Block:
        pair = self.campaign.block(index)
        self._check_workload()
        return to_block(pair, self.case, self.metric)

    def _exact(self, base: float, new: float) -> Verdict:
        return compare_exact(
            self.metric, base, new, tolerance=self.tolerance, slack=self.metric.slack
        )

    def _side_by_side(self) -> Verdict:
        if self.metric.kind == "exact":
            first = self._block(0)
            return self._exact(first.base[0], first.new[0])
        screen: list[Block] = []
        confirm: list[Block] = []
        last = False
        deadline = self._after(lambda: self._block(0))
        while True:
            decision = decide_side_by_side(
                self.metric, screen, confirm, tolerance=self.tolerance, last=last
            )
            if decision.wants is None:
                return decision.verdict
            index = len(screen) + len(confirm)
            # Blocks that other tests of the config had measured cost nothing.
            to_measure = index >= self.campaign.measured[0]
            # A suspicion gets its confirmation whatever the budget: a gross slowdown must not
            # pass because time was short.
            screening = decision.wants == "screen"
            if screening and to_measure and index > 0 and time.monotonic() > deadline:
                last = True
            else:
                (screen if screening else confirm).append(self._block(index))

    def _stored(self, stored: Stored) -> Verdict:
        case, metric = self.case, self.metric
        entries = stored.baseline.results.get(case.key)
        known = (entries or {}).get(metric.name)
        if known is None:
            return self._unknown(stored, published=entries is not None)
        first = self._launches(0, 1)
        if known.launches is None:
            taken = first + self._launches(1, self.launches)
            return compare_published(metric, known.value, taken, tolerance=self.tolerance)
        differing = differences(
            stored.baseline.fingerprints.get(case.key, {}),
            self.fingerprint(self.campaign.launch(0)),
        )
        if differing:
            return incomparable(metric, differing)
        if metric.kind == "exact":
            return self._exact(known.value, first[0][0])
        prior = pooled_prior(stored.baseline, case.key, metric.name)
        return self._repeatedly(known.launches, prior)

    def _unknown(self, stored: Stored, *, published: bool) -> Verdict:
        by_report = stored.baseline.recorded.get("by") == "published"
        if published and by_report:
            # Measured all the same: a build that cannot run this case must not pass it.
            self._launches(0, 1)
            return unpublished(self.metric, stored, self.case)
        return missing(
            self.metric,
            f"{stored.path} has no {self.metric.name} for {self.case.key}: record it with "
            f"`pytest -k {self.case.config.name} {stored.build_option} --update-baselines`",
        )

    def _repeatedly(self, base: Sequence[Sequence[float]], prior: Prior | None) -> Verdict:
        """Compare with recorded launches, measuring more while it is not clear."""

        def judge(begin: int, end: int) -> Verdict:
            taken = self._launches(begin, end)
            return compare_stored(self.metric, base, taken, tolerance=self.tolerance, prior=prior)

        end = self.launches
        deadline = self._after(lambda: self._launches(0, end))
        verdict = judge(0, end)
        while (
            verdict.outcome is Outcome.INCONCLUSIVE
            and end < 2 * self.launches
            and time.monotonic() < deadline
        ):
            end += 1
            verdict = judge(0, end)
        if verdict.outcome is not Outcome.REGRESSION:
            return verdict
        # A REGRESSION needs confirmation on launches that had no part in raising the suspicion.
        confirmed = judge(end, end + self.launches)
        if confirmed.outcome is Outcome.REGRESSION:
            return confirmed
        return unconfirmed(verdict, confirmed)


def to_block(pair: PairedLaunches, case: Case, metric: Metric) -> Block:
    """Return what a metric sees of a block."""
    base, new = samples_of(pair.base, case, metric), samples_of(pair.new, case, metric)
    name = case.workload.name if case.workload else LAUNCH
    return Block(
        base=tuple(base),
        new=tuple(new),
        paired=pair.together and len(base) == len(new),
        order=pair.orders.get(name, ""),
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


def unpublished(metric: Metric, stored: Stored, case: Case) -> Verdict:
    """Return the verdict where a report gives other figures of a case, but not this one.

    Nothing was shown either way: a warning, and a failure under ``--llmperf-strict``.
    """
    return replace(
        missing(
            metric,
            f"the report behind {stored.label} gives no {metric.name} for {case.key}: record a "
            "baseline of your own to gate it, with --update-baselines",
        ),
        outcome=Outcome.INCONCLUSIVE,
    )


def unconfirmed(suspicion: Verdict, second: Verdict) -> Verdict:
    """Return the verdict of a suspicion that fresh launches did not confirm."""
    if second.outcome in {Outcome.PASS, Outcome.IMPROVED}:
        return second
    return replace(
        second,
        outcome=Outcome.INCONCLUSIVE,
        reason="a first look showed a regression, fresh launches did not confirm it: "
        "record more launches with --update-baselines, or compare side by side",
        evidence={**second.evidence, "suspicion": suspicion.to_json()},
    )


def pooled_prior(baseline: Baseline, key: str, metric: str) -> Prior | None:
    """Return the variance prior that the other cases of a metric on this machine give.

    None if fewer than two others have enough launches to tell.
    """
    variances, dfs = [], []
    for case, metrics in baseline.results.items():
        entry = metrics.get(metric)
        if case == key or entry is None or entry.launches is None or len(entry.launches) < 2:  # noqa: PLR2004 - a variance needs two
            continue
        means = log_means(entry.launches)
        variances.append(float(means.var(ddof=1)))
        dfs.append(float(len(means) - 1))
    if len(variances) < 2 or not all(v > 0 for v in variances):  # noqa: PLR2004 - so does theirs
        return None
    return fit_prior(variances, dfs)


def differences(recorded_with: Fingerprint, measured_with: Fingerprint) -> list[str]:
    """Return what differs between two fingerprints, in words."""
    return [
        f"{name}: {recorded_with.get(name, 'unknown')} -> {measured_with.get(name, 'unknown')}"
        for name in sorted({*recorded_with, *measured_with})
        if recorded_with.get(name) != measured_with.get(name)
    ]
