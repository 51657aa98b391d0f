"""One quality metric of one case to its verdict, from passes over a corpus."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pytest_llmperf.errors import LlmperfError, OutOfMemoryError, PartialPassError
from pytest_llmperf.gate import (
    Absent,
    Comparison,
    Record,
    SideBySide,
    Stored,
    differences,
    failure_of,
    missing_from,
    since,
    unmeasured,
)
from pytest_llmperf.judge.chunks import pooled
from pytest_llmperf.judge.decide import (
    compare_published,
    failed,
    incomparable,
    missing,
    recorded_chunks,
    recorded_failure,
    still_fails,
    works_now,
)
from pytest_llmperf.judge.quality import compare_quality, within_budget
from pytest_llmperf.judge.references import find_reference
from pytest_llmperf.judge.store import Failure
from pytest_llmperf.judge.verdict import Outcome, Verdict
from pytest_llmperf.metrics import Metric
from pytest_llmperf.passes import Passed, Passes
from pytest_llmperf.plan.config import Case

PERPLEXITY = "ppl"
"""The one metric that needs no reference."""

_AGAINST_ITSELF = (
    "{metric} of {case} was published, and it needs what it was measured against: name that in the "
    "suite file, `against`"
)


@dataclass(frozen=True, slots=True)
class QualityQuestion:
    """One quality metric of one case.

    Attributes:
        passes: Makes the passes of the run, or has made them.
        case: Config and corpus pass.
        metric: One of :data:`pytest_llmperf.judge.quality.QUALITY`.
        tolerance: Relative change for the worse that is allowed.
    """

    passes: Passes
    case: Case
    metric: Metric
    tolerance: float

    def answer(self, comparison: Comparison) -> tuple[Verdict, Passed | None, Passed | None]:
        """Return the verdict, and the passes of the baseline's build and the build under test."""
        try:
            verdict, base, new = self._answer(comparison)
            return replace(verdict, tolerance=self.tolerance), base, new
        except PartialPassError as error:
            told = {"planned": error.planned, "running": list(error.running)}
            verdict = failed(self.metric, str(error))
            verdict = replace(verdict, evidence={**verdict.evidence, "partial": told})
        except LlmperfError as error:
            verdict = self._failed(comparison, error)
        return replace(verdict, tolerance=self.tolerance), None, None

    def _answer(self, comparison: Comparison) -> tuple[Verdict, Passed | None, Passed | None]:
        metric = self.metric
        if isinstance(comparison, Absent):
            return missing(metric, comparison.reason), None, None
        if isinstance(comparison, SideBySide):
            base, new = self.passes.side_by_side(self.case)
            return self._compared(base.values[metric.name], new), base, new
        if isinstance(comparison, Record):
            new = self.passes.alone(self.case)
            verdict = recorded_chunks(metric, new.values[metric.name], tokens=new.tokens)
            return verdict, None, new
        was = comparison.baseline.failures.get(self.case.key)
        verdict, passed = self._stored(comparison) if was is None else self._since(comparison, was)
        return verdict, None, passed

    def _failed(self, comparison: Comparison, error: LlmperfError) -> Verdict:
        """Return the verdict on a pass that could not be made."""
        if isinstance(error, OutOfMemoryError):
            now = failure_of(error)
            if isinstance(comparison, Record):
                return recorded_failure(self.metric, now)
            if isinstance(comparison, Stored):
                was = comparison.baseline.failures.get(self.case.key)
                if was is not None and was.kind == now.kind:
                    return still_fails(self.metric, was, now, comparison.label)
        return unmeasured(self.metric, error)

    def _since(self, stored: Stored, was: Failure) -> tuple[Verdict, Passed | None]:
        """Compare with a baseline that says that the pass cannot be made."""
        metric = self.metric
        known = stored.baseline.fingerprints.get(self.case.key, {})
        differing = differences(known, self.passes.conditions(self.case))
        if differing and not stored.baseline.published:
            return incomparable(metric, differing), None
        new = self.passes.alone(self.case)
        value = pooled(metric, new.values[metric.name], new.tokens)
        return self._budgeted(works_now(metric, was, [[value]], stored.label), new), new

    def _compared(self, base: list[list[float]], new: Passed) -> Verdict:
        verdict = compare_quality(
            self.metric,
            base,
            new.values[self.metric.name],
            tokens=new.tokens,
            tolerance=self.tolerance,
            budget=self.case.config.budgets.get(self.metric.name),
        )
        about: dict[str, object] = {"way": new.way, **new.doubt}
        if self.metric.name == "kld_mean":
            # Once is enough; of all four it is the one that is about divergence as a whole.
            about["summary"] = dict(new.summary)
        return replace(verdict, evidence={**verdict.evidence, "pass": about})

    def _stored(self, stored: Stored) -> tuple[Verdict, Passed | None]:
        case, metric = self.case, self.metric
        entries = stored.baseline.results.get(case.key)
        known = (entries or {}).get(metric.name)
        if known is None:
            # Measured all the same: a build that cannot run this case must not pass it.
            verdict = missing_from(stored, case, metric)
            if entries is None or not stored.baseline.published:
                return verdict, None
            measured = self.passes.alone(case)
            return self._budgeted(verdict, measured), measured
        if known.launches is None:
            return self._published(known.value)
        fingerprint = stored.baseline.fingerprints.get(case.key, {})
        # Before hours are spent on what cannot be compared.
        expected = self.passes.conditions(case)
        differing = differences(
            {name: fingerprint.get(name, "unknown") for name in expected}, expected
        )
        reference = self._reference(stored, str(fingerprint.get("reference", "")))
        if isinstance(reference, str):
            differing.append(reference)
        if differing or isinstance(reference, str):
            return incomparable(metric, differing), None
        new = self.passes.against(case, reference)
        measured_with = self.passes.fingerprint(case, new)
        if differing := differences(fingerprint, measured_with):
            return incomparable(metric, differing), new
        verdict = self._compared([list(chunk) for chunk in known.launches], new)
        if stored.oldest is not None:
            # What a model makes of a text does not depend on what it is compared with.
            ignored = ("reference", "against") if metric.name == PERPLEXITY else ()
            verdict = since(verdict, *stored.oldest, case.key, measured_with, ignored)
        return verdict, new

    def _published(self, value: float) -> tuple[Verdict, Passed | None]:
        metric, config = self.metric, self.case.config
        if metric.name != PERPLEXITY and not config.against:
            told = _AGAINST_ITSELF.format(metric=metric.name, case=self.case.key)
            return failed(metric, told), None
        new = self.passes.alone(self.case)
        measured = pooled(metric, new.values[metric.name], new.tokens)
        verdict = compare_published(metric, value, [[measured]], tolerance=self.tolerance)
        return self._budgeted(verdict, new), new

    def _budgeted(self, verdict: Verdict, new: Passed) -> Verdict:
        """Hold a value against its budget, which counts whatever it is compared with."""
        metric = self.metric
        budget = self.case.config.budgets.get(metric.name)
        chunks = new.values[metric.name]
        return within_budget(verdict, metric, chunks, tokens=new.tokens, budget=budget)

    def _reference(self, stored: Stored, digest: str) -> Path | str:
        """Return the reference that was recorded, or what is wrong with it."""
        given = self.passes.given_reference(self.case)
        if given is not None:
            return given
        found = find_reference(Path(stored.path), digest)
        if found is None:
            return f"reference {digest}, which is missing beside {stored.path}"
        if self.passes.digest(found) != digest:
            return f"reference: {found} is not the one that was recorded"
        return found


def not_alone(verdicts: Sequence[Verdict]) -> tuple[Verdict, ...]:
    """Return the verdicts of a case, with a perplexity that would pass alone as INCONCLUSIVE.

    Answers can change with the perplexity unchanged, so it proves nothing where no divergence was
    shown to be small, or large.
    """
    others = [verdict for verdict in verdicts if verdict.metric != PERPLEXITY]
    if any(verdict.outcome is not Outcome.INCONCLUSIVE for verdict in others):
        return tuple(verdicts)
    return tuple(
        replace(
            verdict,
            outcome=Outcome.INCONCLUSIVE,
            reason=f"{verdict.reason}; perplexity alone never passes, and nothing else was shown",
            evidence={**verdict.evidence, "alone": True},
        )
        if verdict.outcome in {Outcome.PASS, Outcome.IMPROVED}
        else verdict
        for verdict in verdicts
    )
