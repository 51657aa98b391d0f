"""Every kind of verdict is recomputed from what results.json keeps of it."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_llmperf.cli.verdict import recompute
from pytest_llmperf.errors import UserError
from pytest_llmperf.judge.decide import (
    compare_exact,
    compare_published,
    failed,
    incomparable,
    missing,
    recorded,
)
from pytest_llmperf.judge.quality import compare_chunks, compare_quality, within_budget
from pytest_llmperf.judge.side_by_side import Block, decide_side_by_side
from pytest_llmperf.judge.statistics import Prior
from pytest_llmperf.judge.stored import decide_stored
from pytest_llmperf.judge.verdict import Outcome, Verdict
from pytest_llmperf.metrics import METRICS
from pytest_llmperf.report.files import write_report
from pytest_llmperf.report.result import Result, Side

DECODE = METRICS["decode_tps"]
VRAM = METRICS["vram_mib"]
CTX = METRICS["n_ctx"]
PRIOR = Prior(0.02, math.inf)
BASE = [[100.0, 101.0, 99.0], [102.0], [99.5, 98.0]]

CHANGES = st.lists(st.floats(-0.5, 0.5), min_size=1, max_size=8)


def launches(changes: Sequence[float]) -> list[list[float]]:
    """Launches whose samples lie this much above 100."""
    return [[100 * (1 + c), 101 * (1 + c), 98 * (1 + c)] for c in changes]


def block(change: float) -> Block:
    """A paired block with this change."""
    base, new = launches([0.0])[0], launches([change])[0]
    return Block(tuple(base), tuple(new), paired=True, order="bn")


def stored(base: Sequence[Sequence[float]], change: float, prior: Prior | None) -> Verdict:
    """The verdict on launches with this change, as many as are wanted."""
    new = launches([change] * 6)
    return decide_stored(DECODE, base, new, new, tolerance=0.05, prior=prior, last=True).verdict


def again(*verdicts: Verdict) -> list[tuple[str, str]]:
    """The recorded and recomputed outcomes after a trip through JSON."""
    results = {
        "schema": 1,
        "results": [{"nodeid": "test_a", "verdicts": [one.to_json() for one in verdicts]}],
    }
    lines = recompute(json.loads(json.dumps(results)))
    assert [line[:2] for line in lines] == [("test_a", one.metric) for one in verdicts]
    return [line[2:] for line in lines]


def agrees(verdict: Verdict) -> None:
    """The recomputed outcome is the recorded one."""
    assert again(verdict) == [(verdict.outcome.value, verdict.outcome.value)]


@given(CHANGES, CHANGES, st.booleans())
def test_side_by_side(
    screen: list[float],
    confirm: list[float],
    last: bool,  # noqa: FBT001 - drawn by Hypothesis
) -> None:
    """Whatever the blocks, whether or not the budget ended it."""
    screening, confirming = [block(c) for c in screen], [block(c) for c in confirm]
    decision = decide_side_by_side(DECODE, screening, confirming, tolerance=0.05, last=last)
    agrees(decision.verdict)


@given(CHANGES, CHANGES, st.booleans(), st.booleans())
def test_stored_with_a_plan(
    screen: list[float],
    confirm: list[float],
    last: bool,  # noqa: FBT001 - drawn by Hypothesis
    known: bool,  # noqa: FBT001 - drawn by Hypothesis
) -> None:
    """Whatever the launches, with and without a prior."""
    decision = decide_stored(
        DECODE,
        BASE,
        launches(screen),
        launches(confirm),
        tolerance=0.05,
        prior=PRIOR if known else None,
        last=last,
    )
    agrees(decision.verdict)


@pytest.mark.parametrize("change", [-0.35, -0.045, 0.0, 0.4])
def test_stored(change: float) -> None:
    """Every outcome, and too few recorded launches."""
    for prior in (None, PRIOR):
        agrees(stored(BASE, change, prior))
        agrees(stored(BASE[:2], change, prior))


@pytest.mark.parametrize("new", [4096.0, 4095.0, 8192.0, math.nan])
def test_exact(new: float) -> None:
    """Exact values, one that is no number included."""
    agrees(compare_exact(CTX, 4096.0, new, tolerance=0.0, slack=0.0))


@pytest.mark.parametrize("change", [-0.35, 0.0, 0.4])
def test_published(change: float) -> None:
    """A published figure by tolerance alone."""
    agrees(compare_published(DECODE, 100.0, launches([change]), tolerance=0.05))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0, 0.0])
def test_unusable_samples(bad: float) -> None:
    """Samples without a logarithm, in every mode that takes some."""
    agrees(compare_published(VRAM, 900.0, [[bad]], tolerance=0.02))
    one = Block((0.0,), (bad,), paired=False, order="bn")
    agrees(decide_side_by_side(VRAM, [one], [], tolerance=0.02).verdict)
    agrees(decide_stored(VRAM, [[0.0]], [[bad]], [], tolerance=0.02).verdict)


def test_slack() -> None:
    """A PASS by slack, stored and side by side."""
    one = Block((1000.0,), (1050.0,), paired=False, order="bn")
    agrees(decide_side_by_side(VRAM, [one, one], [], tolerance=0.02).verdict)
    new = [[1050.0]] * 3
    agrees(decide_stored(VRAM, [[1000.0]] * 3, new, [], tolerance=0.02, prior=PRIOR).verdict)


@pytest.mark.parametrize("budget", [None, 0.05, 0.5])
@pytest.mark.parametrize("more", [0.0, 0.02, 0.005])
def test_quality_by_chunk(more: float, budget: float | None) -> None:
    """Divergence from a reference, with a budget and without."""
    base = [0.1, 0.12, 0.09, 0.11, 0.1]
    new = [v + more * (1 + v) for v in base]
    agrees(compare_chunks(METRICS["kld_mean"], base, new, tolerance=0.1, budget=budget))


@pytest.mark.parametrize("budget", [None, 0.05, 5.0])
@pytest.mark.parametrize("more", [0.0, 0.3, 3.0])
def test_quality_by_tails(more: float, budget: float | None) -> None:
    """The worst tokens of a pass, with a budget and without."""
    base = [[1.0 + 0.1 * n, 0.9] for n in range(6)]
    new = [[v + more * (n % 3) for v in chunk] for n, chunk in enumerate(base)]
    metric = METRICS["kld_p999"]
    agrees(compare_quality(metric, base, new, tokens=256, tolerance=0.25, budget=budget))


MEANS = [[0.1 + 0.01 * (-1) ** n] for n in range(8)]
TAILS = [[1.0 + 0.1 * n, 0.9] for n in range(6)]


@pytest.mark.parametrize("budget", [None, 0.05, 0.101, 0.5, 5.0])
@pytest.mark.parametrize("figure", [0.02, 0.1, 0.5, 5.0])
def test_published_with_a_budget(figure: float, budget: float | None) -> None:
    """A published figure says less than the pass itself does, which is held against the budget."""
    for name, chunks in (("kld_mean", MEANS), ("kld_p999", TAILS)):
        verdict = compare_published(METRICS[name], figure, [[chunks[0][0]]], tolerance=0.1)
        agrees(within_budget(verdict, METRICS[name], chunks, tokens=256, budget=budget))


@pytest.mark.parametrize(("budget", "outcome"), [(1e-4, "REGRESSION"), (0.5, "PASS")])
def test_a_published_zero_with_a_budget(budget: float, outcome: str) -> None:
    """Where no ratio can be told the slack passes it, and the budget counts all the same."""
    chunks = [[0.001 + 1e-5 * (-1) ** n] for n in range(8)]
    verdict = compare_published(METRICS["kld_mean"], 0.0, [[0.001]], tolerance=0.1)
    assert verdict.outcome is Outcome.PASS
    verdict = within_budget(verdict, METRICS["kld_mean"], chunks, tokens=256, budget=budget)
    assert again(verdict) == [(outcome, outcome)]


@pytest.mark.parametrize(("budget", "outcome"), [(0.05, "REGRESSION"), (0.5, "INCONCLUSIVE")])
def test_a_budget_without_a_figure(budget: float, outcome: str) -> None:
    """Where a report gives no such figure the budget is all that is recomputed."""
    metric = METRICS["kld_mean"]
    unknown = replace(missing(metric, "no figure"), outcome=Outcome.INCONCLUSIVE)
    verdict = within_budget(unknown, metric, MEANS, tokens=256, budget=budget)
    assert again(verdict) == [(outcome, outcome)]
    changed = Verdict.from_json(verdict.to_json() | {"outcome": "PASS"})
    assert again(changed) == [("PASS", outcome)]


def test_nothing_compared() -> None:
    """What has nothing to compute is taken as it is."""
    verdicts = [
        incomparable(DECODE, ["driver: 1 -> 2"]),
        missing(DECODE, "record it"),
        failed(DECODE, "the server died"),
        recorded(DECODE, BASE),
    ]
    assert again(*verdicts) == [(one.outcome.value, one.outcome.value) for one in verdicts]


def test_one_start_of_a_running_server() -> None:
    """Evidence that says it comes from one start leads to INCONCLUSIVE, whatever it shows."""
    shown = stored(BASE, 0.0, PRIOR)
    data = shown.to_json()
    data |= {"outcome": "INCONCLUSIVE", "evidence": {**shown.evidence, "one_start": True}}
    agrees(Verdict.from_json(data))


def test_a_changed_word_is_found() -> None:
    """A verdict whose word does not follow from its evidence is told by the other one."""
    slow = decide_side_by_side(DECODE, [block(-0.4)], [block(-0.4)] * 2, tolerance=0.05)
    data = slow.verdict.to_json() | {"outcome": "PASS"}
    assert again(Verdict.from_json(data)) == [("PASS", "REGRESSION")]


def test_what_a_run_writes_can_be_read(tmp_path: Path) -> None:
    """The file that ``--llmperf-report`` writes is the one that is read."""
    verdict = stored(BASE, 0.0, None)
    side = Side("b1", "b1")
    result = Result("test_a", "cpu/short", side, side, "box", (verdict,))
    write_report(tmp_path, [result])
    data = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert recompute(data) == [("test_a", "decode_tps", verdict.outcome, verdict.outcome)]


@pytest.mark.parametrize("key", ["blocks", "prior", "plan"])
def test_evidence_that_lacks_something(key: str) -> None:
    """The error names the place and what is missing."""
    verdict = decide_side_by_side(DECODE, [block(0.0)] * 4, [], tolerance=0.05).verdict
    data = verdict.to_json()
    data["evidence"] = {name: v for name, v in verdict.evidence.items() if name != key}
    results = {"schema": 1, "results": [{"nodeid": "a", "verdicts": [data]}]}
    with pytest.raises(UserError, match=rf"results\[0\].verdicts\[0\]: lacks '{key}'"):
        recompute(results)


def test_other_files_are_refused() -> None:
    """Another schema or no results.json at all is an error in one line."""
    with pytest.raises(UserError, match="schema 2 is not known"):
        recompute({"schema": 2})
    with pytest.raises(UserError, match="expected a list under 'results'"):
        recompute({"schema": 1, "results": 3})
    with pytest.raises(UserError, match="verdict: missing"):
        recompute({"schema": 1, "results": [{"nodeid": "a", "verdicts": [{}]}]})
