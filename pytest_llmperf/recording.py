"""From results to the baseline files that they are kept in."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pytest_llmperf.gate import failure_in
from pytest_llmperf.judge import store
from pytest_llmperf.judge.references import Kept
from pytest_llmperf.measure.machine import machine
from pytest_llmperf.plan.config import LAUNCH
from pytest_llmperf.plan.suite import Suite
from pytest_llmperf.report.result import Result
from pytest_llmperf.settings import Settings


@dataclass(frozen=True, slots=True)
class Written:
    """One baseline file that was written: where, and what changed in it."""

    path: Path
    changes: Sequence[store.Change]


def write_baselines(settings: Settings, results: Sequence[Result]) -> list[Written]:
    """Write the results of one passed test to the baseline file of their build and machine.

    Args:
        settings: Where baselines are kept.
        results: What the test measured, in any process of this run.

    Raises:
        BaselineError: If the file cannot be read or written.
    """
    facts = machine(settings.machine)
    written = []
    for result in results:
        label = store.validate_label(result.new.label)
        path = settings.baselines / label / f"{facts['key']}.json"
        digest = str(result.fingerprint.get("reference", ""))
        kept = {result.case: Kept(Path(result.reference), digest)} if result.reference else {}
        changes = store.update(
            path,
            build=result.new.build,
            machine=facts,
            recorded={
                "at": time.strftime("%Y-%m-%d"),
                "by": "measured",
                "source": "pytest --update-baselines",
            },
            measured={
                result.case: store.Measured(
                    fingerprint=result.fingerprint,
                    metrics=result.measured,
                    failed=failure_in(result.verdicts),
                )
            },
            references=kept,
        )
        # A test that measured nothing makes no file.
        if path.is_file():
            written.append(Written(path, changes))
    return written


def stale_entries(suite: Suite, written: Sequence[Written]) -> dict[Path, list[str]]:
    """Return, by file, the entries that no case of the suite file makes any more."""
    makes = {
        f"{config}/{workload}"
        for config in suite.configs
        for workload in (LAUNCH, *suite.workloads, *suite.passes)
    }
    found = {path: store.stale(store.load(path), makes) for path in {one.path for one in written}}
    return {path: entries for path, entries in found.items() if entries}
