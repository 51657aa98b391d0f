"""``llmperf verdict``: recompute the verdicts of a results.json from their evidence alone."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pytest_llmperf.errors import UserError
from pytest_llmperf.judge._common import Draft, without_logs
from pytest_llmperf.judge.decide import (
    compare_exact,
    compare_published,
    incomparable,
)
from pytest_llmperf.judge.quality import BY_CHUNK, compare_chunks, compare_tails, within_budget
from pytest_llmperf.judge.sequential import Plan
from pytest_llmperf.judge.side_by_side import Block, decide_side_by_side
from pytest_llmperf.judge.statistics import Prior
from pytest_llmperf.judge.stored import decide_stored
from pytest_llmperf.judge.verdict import Outcome, Verdict
from pytest_llmperf.metrics import METRICS, Metric

SCHEMA = 1
"""Version of ``results.json`` that can be read."""

Evidence = Mapping[str, Any]


_DECIDED = (Outcome.PASS, Outcome.IMPROVED, Outcome.REGRESSION)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``llmperf verdict``."""
    parser.add_argument("results", type=Path, help="a results.json that --llmperf-report wrote")


def run(arguments: argparse.Namespace) -> int:
    """Print each verdict as recorded and as recomputed; return 1 if any two differ.

    Raises:
        UserError: If the file cannot be read or is no results.json.
    """
    path: Path = arguments.results
    try:
        results = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot read it: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    if not isinstance(results, dict):
        raise UserError(f"{path}: not a results.json: it holds no object")
    differing = 0
    for nodeid, metric, recorded, computed in recompute(results):
        mark = "agrees" if recorded == computed else f"DIFFERS: recomputed {computed}"
        differing += recorded != computed
        sys.stdout.write(f"{nodeid} {metric}: {recorded}, {mark}\n")
    return 1 if differing else 0


def recompute(results: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Judge every verdict again, by the functions that judged it first.

    A verdict without a comparison (MISSING, RECORDED, a metric that could not be measured) has
    nothing to compute, so its outcome is taken as it is.

    Args:
        results: What a JSON parser made of a ``results.json`` of schema 1.

    Returns:
        For each verdict in its order: the test's node id, the metric's name, the recorded
        outcome and the recomputed one.

    Raises:
        UserError: Another schema, or evidence that does not suffice; in one line, with the place.
    """
    if results.get("schema") != SCHEMA:
        raise UserError(
            f"results.json: schema {results.get('schema')!r} is not known, this version reads "
            f"{SCHEMA}: use the version of pytest-llmperf that wrote it"
        )
    lines = []
    for number, result in enumerate(_items(results, "results", "results.json")):
        place = f"results.json: results[{number}]"
        for index, data in enumerate(_items(result, "verdicts", place)):
            where = f"{place}.verdicts[{index}]"
            try:
                nodeid = str(result["nodeid"])
                verdict = Verdict.from_json(data)
                outcome = again(verdict)
            except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
                lacks = f"lacks {error}" if isinstance(error, KeyError) else str(error)
                raise UserError(
                    f"{where}: {lacks}: it was not written by this version of pytest-llmperf"
                ) from error
            lines.append((nodeid, verdict.metric, verdict.outcome.value, outcome.value))
    return lines


def again(verdict: Verdict) -> Outcome:
    """The outcome that a verdict's evidence leads to.

    Raises:
        KeyError: Evidence that is missing.
        ValueError: Evidence that is of no use, or an unknown metric.
        TypeError: Likewise.
    """
    if verdict.metric not in METRICS:
        raise ValueError(f"no metric is called {verdict.metric!r}")
    metric: Metric = replace(METRICS[verdict.metric], slack=verdict.slack)
    evidence: Evidence = verdict.evidence
    if verdict.mode == "none":
        return _without_comparison(metric, verdict, evidence)
    if "unusable" in evidence:
        judged = _unusable(metric, verdict, evidence["unusable"])
    else:
        judged = _JUDGES[verdict.mode](metric, verdict, evidence)
    if verdict.mode == "published":
        judged = _budgeted(metric, judged, evidence)
    outcome = judged.outcome
    # The requests of one start of a running server prove nothing, whatever they say.
    if evidence.get("one_start") and outcome in _DECIDED:
        return Outcome.INCONCLUSIVE
    # Nor does perplexity alone.
    if evidence.get("alone") and outcome in {Outcome.PASS, Outcome.IMPROVED}:
        return Outcome.INCONCLUSIVE
    return outcome


def _items(data: Any, key: str, place: str) -> Sequence[Any]:  # noqa: ANN401 - any JSON value
    items = data.get(key) if isinstance(data, Mapping) else None
    if not isinstance(items, list | tuple):
        raise UserError(f"{place}: expected a list under {key!r}: is it a results.json?")
    return items


def _launches(values: Sequence[Sequence[float | str]]) -> list[list[float]]:
    # Samples that are no JSON number are written as text: "nan", "inf".
    return [[float(value) for value in launch] for launch in values]


def _prior(data: Mapping[str, Any] | None) -> Prior | None:
    return None if data is None else Prior.from_json(data)


def _without_comparison(metric: Metric, verdict: Verdict, evidence: Evidence) -> Outcome:
    if verdict.outcome is Outcome.INCOMPARABLE and "disturbed" not in evidence:
        return incomparable(metric, evidence["differences"]).outcome
    if evidence.get("budget") is not None:
        # A budget and nothing else: a report gives no such figure, or there could be none.
        alone = Outcome.IMPROVED if "was" in evidence else Outcome.INCONCLUSIVE
        unknown = replace(verdict, outcome=alone)
        return _budgeted(metric, unknown, evidence).outcome
    return verdict.outcome


def _budgeted(metric: Metric, judged: Verdict, evidence: Evidence) -> Verdict:
    """The verdict on a pass that no chunks of a baseline were compared with."""
    if evidence.get("budget") is None:
        return judged
    budget, tokens = float(evidence["budget"]), evidence["tokens"]
    return within_budget(judged, metric, evidence["new_chunks"], tokens=tokens, budget=budget)


def _unusable(metric: Metric, verdict: Verdict, launches: Mapping[str, Any]) -> Verdict:
    base, new = _launches(launches["base"]), _launches(launches["new"])
    judged = without_logs(Draft(metric, verdict.mode, verdict.tolerance, base, new))
    if judged is None:
        raise ValueError("its samples can be judged, though it says that they cannot")
    return judged


def _side_by_side(metric: Metric, verdict: Verdict, evidence: Evidence) -> Verdict:
    taken: dict[str, list[Block]] = {"screen": [], "confirm": []}
    for entry in evidence["blocks"]:
        taken[entry["phase"]].append(
            Block(
                base=tuple(entry["base"]),
                new=tuple(entry["new"]),
                paired=entry["paired"],
                order=entry["order"],
            )
        )
    return decide_side_by_side(
        metric,
        taken["screen"],
        taken["confirm"],
        tolerance=verdict.tolerance,
        prior=_prior(evidence["prior"]),
        plan=Plan(**evidence["plan"]),
        last=True,
    ).verdict


def _stored(metric: Metric, verdict: Verdict, evidence: Evidence) -> Verdict:
    return decide_stored(
        metric,
        _launches(evidence["base_samples"]),
        _launches(evidence["screen_samples"]),
        _launches(evidence["confirm_samples"]),
        tolerance=verdict.tolerance,
        prior=_prior(evidence["prior"]),
        plan=Plan(**evidence["plan"]),
        last=True,
    ).verdict


def _exact(metric: Metric, verdict: Verdict, evidence: Evidence) -> Verdict:
    base, new = float(evidence["base"]), float(evidence["new"])
    return compare_exact(
        metric, base, new, tolerance=verdict.tolerance, slack=float(evidence["slack"])
    )


def _chunks(metric: Metric, verdict: Verdict, evidence: Evidence) -> Verdict:
    base, new = evidence["base_chunks"], evidence["new_chunks"]
    budget = None if evidence["budget"] is None else float(evidence["budget"])
    if metric.name in BY_CHUNK:
        return compare_chunks(metric, base, new, tolerance=verdict.tolerance, budget=budget)
    return compare_tails(
        metric, base, new, tokens=evidence["tokens"], tolerance=verdict.tolerance, budget=budget
    )


def _published(metric: Metric, verdict: Verdict, evidence: Evidence) -> Verdict:
    value = float(evidence["value"])
    return compare_published(
        metric,
        value,
        [[launch] for launch in evidence["new_launches"]],
        tolerance=verdict.tolerance,
    )


_JUDGES = {
    "side-by-side": _side_by_side,
    "stored": _stored,
    "exact": _exact,
    "chunks": _chunks,
    "published": _published,
}
