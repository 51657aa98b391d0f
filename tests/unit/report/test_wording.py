"""Figures and verdicts in words."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_llmperf.judge.quality import compare_chunks
from pytest_llmperf.judge.verdict import Outcome, Verdict
from pytest_llmperf.metrics import METRICS
from pytest_llmperf.report.result import Result, Side
from pytest_llmperf.report.wording import (
    HEADER,
    allowed,
    bandwidth_told,
    columns,
    failure,
    figure,
    folded,
    interval,
    partial_told,
    percent,
    roofline_told,
    row,
    rows,
    run_bound,
    settled_told,
    since_oldest,
)


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (69.5512, "tok/s", "69.55 tok/s"),
        (65536.0, "tokens", "65536 tokens"),
        (1234.56, "ms", "1235 ms"),
        (5.0, "", "5"),
        (0.0, "MiB", "0 MiB"),
        (0.012345, "nat", "0.01235 nat"),
        (None, "ms", "-"),
    ],
)
def test_a_figure_has_four_digits_and_its_unit(value: float | None, unit: str, shown: str) -> None:
    """Whole numbers are shown whole; nothing is a dash."""
    assert figure(value, unit) == shown


@given(st.floats(-1e9, 1e9))
def test_a_figure_is_right_to_four_digits(value: float) -> None:
    """What is printed differs from what was measured by half a digit at most."""
    assert float(figure(value)) == pytest.approx(value, rel=5.0001e-4, abs=1e-300)


@pytest.mark.parametrize(
    ("value", "shown"), [(-0.12, "-12.0 %"), (0.0512, "+5.1 %"), (0.0, "+0.0 %"), (2.0, "+200.0 %")]
)
def test_a_percentage_is_signed(value: float, shown: str) -> None:
    """A change without a sign could be read either way."""
    assert percent(value) == shown


def test_an_interval_has_two_ends(verdict: Verdict) -> None:
    """Both signed; a dash where there is none."""
    assert interval(verdict) == "-12.5 % … -11.5 %"
    assert interval(replace(verdict, interval=None)) == "-"


@pytest.mark.parametrize(
    ("metric", "tolerance", "slack", "shown"),
    [
        ("decode_tps", 0.05, 0.0, "-5 %"),
        ("ttft_ms", 0.1, 0.0, "+10 %"),
        ("decode_tps", 0.0, 0.0, "-0 %"),
        ("rss_mib", 0.05, 8.0, "+5 % or 8 MiB"),
        ("rss_mib", 0.0, 8.0, "8 MiB"),
        ("n_ctx", 0.0, 0.0, "none"),
        ("compute_mib", 0.0, 4.0, "4 MiB"),
        ("n_ctx", 0.1, 0.0, "-10 %"),
        ("kld_mean", 0.07, 0.0, "+7 %"),
        ("kld_mean", 0.1, 0.0025, "+10 % or 0.0025 nat"),
        ("same_top", 0.005, 4.0, "-0.5 % or 4 points"),
        ("same_top", 0.0, 1.0, "1 point"),
    ],
)
def test_what_is_allowed_points_to_the_worse(
    verdict: Verdict, metric: str, tolerance: float, slack: float, shown: str
) -> None:
    """Less speed, more memory; a tolerance set for an exact metric is shown, too."""
    one = replace(verdict, metric=metric, tolerance=tolerance, slack=slack)
    assert allowed(one) == shown


@pytest.mark.parametrize(
    ("metric", "budget", "shown"),
    [("kld_mean", 0.02, "+7 %, at most 0.02"), ("same_top", 98.5, "-7 %, at least 98.5")],
)
def test_a_budget_is_shown(verdict: Verdict, metric: str, budget: float, shown: str) -> None:
    """It bounds the value itself."""
    one = replace(verdict, metric=metric, tolerance=0.07, slack=0.0, evidence={"budget": budget})
    assert allowed(one) == shown


def test_what_a_quality_verdict_rests_on_is_told_in_chunks(
    result: Result, verdict: Verdict
) -> None:
    """A pass is no launch of a server with samples."""
    one = replace(verdict, metric="kld_mean", mode="chunks", evidence={"new_chunks": [[0.1]] * 20})
    told = failure(replace(result, verdicts=(one,)), strict=False)
    assert "one pass of each build, by chunk; 20 chunks" in told
    assert "samples" not in told


def test_a_row_has_a_cell_for_each_head(result: Result, verdict: Verdict) -> None:
    """In the order of the header."""
    assert dict(zip(HEADER, row(result, verdict), strict=True)) == {
        "case": "c7/short",
        "metric": "decode_tps",
        "baseline": "70 tok/s",
        "measured": "61.6 tok/s",
        "change": "-12.0 %",
        "interval": "-12.5 % … -11.5 %",
        "tolerance": "-5 %",
        "verdict": "REGRESSION",
    }


def test_a_row_of_nothing_has_dashes(result: Result, verdict: Verdict) -> None:
    """A verdict without figures still fills its row."""
    one = replace(verdict, base=None, new=None, change=None, interval=None)
    assert row(result, one)[2:6] == ("-", "-", "-", "-")


def test_columns_are_aligned() -> None:
    """Words to the left, figures to the right, nothing behind the last cell."""
    assert columns([("case", "metric", "new", "verdict"), ("c7/short", "ppl", "6.53", "PASS")]) == [
        "case      metric   new  verdict",
        "c7/short  ppl     6.53  PASS",
    ]


CELLS = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=8)


@given(st.integers(3, 6).flatmap(lambda n: st.lists(st.tuples(*[CELLS] * n), min_size=1)))
def test_aligned_columns_keep_every_cell(rows: list[tuple[str, ...]]) -> None:
    """Splitting a line at the gaps gives its cells back, and all lines are as wide."""
    lines = columns(rows)
    assert [tuple(line.split()) for line in lines] == rows
    last = max(len(cells[-1]) for cells in rows)
    assert len({len(line) - len(cells[-1]) for line, cells in zip(lines, rows, strict=True)}) == 1
    assert max(map(len, lines)) == len(lines[0]) - len(rows[0][-1]) + last


def test_a_failure_tells_all_that_is_needed_to_act(result: Result) -> None:
    """Figures, evidence, both builds with commands and last logs, machine and next step."""
    assert failure(result, strict=False) == (
        """\
c7/short: decode_tps REGRESSION

  decode_tps: REGRESSION: decode_tps fell by 12.0 %
    70 tok/s -> 61.6 tok/s, -12.0 % (-12.5 % … -11.5 %); allowed -5 %; higher is better
    side-by-side; launches 3 + 4, samples 12 + 16

  build under test  b8156 (build 8156, pypi:xllamacpp==0.2.12)
    command         llama-server --threads 2
    log             /run/new-2.log
  baseline          b8149 (build 8149, /opt/llama)
    command         /opt/llama/llama-server --threads 2
    log             /run/base-1.log
  machine           rtx-5080-16gb

  Next: repeat it alone with
    pytest 'suites/test_speed.py::test_decode[c7-short]' --baseline=b8149
  if the change is known and accepted, raise the tolerance in the suite file, or record this \
build with
    pytest --update-baselines."""
    )


def test_a_failure_tells_the_roofline_and_the_gpus(
    result: Result, roofline: dict[str, Any], card: dict[str, Any]
) -> None:
    """Under the figures of the decode speed, and under the build that the GPUs ran."""
    side = replace(result.new, gpu={"rate_hz": 9.8, "cards": [card]})
    text = failure(replace(result, new=side, roofline=roofline), strict=False)
    assert (
        "samples 12 + 16\n"
        "    30 % of the bandwidth (34 % before); a token reads 4.617 GB, the memory 960 GB/s "
        "(NVML: memory clock x bus width)\n"
    ) in text
    assert "    log             /run/new-2.log\n    GPU 0: NVIDIA H200, 61 % busy, " in text
    assert text.count("GPU 0") == 1


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, "30 % of the bandwidth (34 % before)"),
        ({"base": None}, "30 % of the bandwidth"),
        ({"new": None}, ""),
    ],
)
def test_a_share_of_the_bandwidth_is_short(
    result: Result, roofline: dict[str, Any], change: dict[str, Any], told: str
) -> None:
    """The baseline's stands behind it, if it has one."""
    one = replace(result, roofline=roofline | change)
    assert bandwidth_told(one, one.verdicts[0]) == told


def test_what_was_not_counted_is_told(result: Result, roofline: dict[str, Any]) -> None:
    """Behind what the share rests on."""
    told = roofline_told(replace(result, roofline=roofline | {"notes": ["no state", "no index"]}))
    assert told.endswith("960 GB/s (NVML: memory clock x bus width); no state; no index")


def test_a_share_of_the_bandwidth_belongs_to_a_decode_speed(
    result: Result, verdict: Verdict, roofline: dict[str, Any]
) -> None:
    """Not to other metrics, nor to what was not measured or where it means nothing."""
    told = replace(result, roofline=roofline)
    assert bandwidth_told(told, replace(verdict, metric="prefill_tps")) == ""
    assert bandwidth_told(told, replace(verdict, new=None)) == ""
    assert bandwidth_told(result, verdict) == roofline_told(result) == ""


def test_a_failure_without_a_regression_has_no_next_step(result: Result, verdict: Verdict) -> None:
    """The reason of a missing baseline holds its own mend, and there is no other build."""
    missing = replace(
        verdict, outcome=Outcome.MISSING, base=None, change=None, interval=None, reason="record it"
    )
    side = Side(label="b8156", about="b8156")
    alone = replace(result, base=None, new=side, verdicts=(missing,))
    assert failure(alone, strict=False) == (
        """\
c7/short: decode_tps MISSING

  decode_tps: MISSING: record it

  build under test  b8156
  machine           rtx-5080-16gb"""
    )


@pytest.mark.parametrize("strict", [False, True])
def test_only_what_fails_is_explained(result: Result, verdict: Verdict, strict: bool) -> None:  # noqa: FBT001 - a parameter
    """INCONCLUSIVE is one of them only where it fails."""
    open_ = replace(verdict, metric="ttft_ms", outcome=Outcome.INCONCLUSIVE, reason="too few")
    passed = replace(verdict, metric="itl_ms", outcome=Outcome.PASS)
    text = failure(replace(result, verdicts=(verdict, open_, passed)), strict=strict)
    assert ("ttft_ms INCONCLUSIVE" in text) is strict
    assert ("ttft_ms: INCONCLUSIVE: too few" in text) is strict
    assert "itl_ms" not in text


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("outcome", Outcome)
def test_every_verdict_has_words(
    result: Result, verdict: Verdict, name: str, outcome: Outcome
) -> None:
    """No metric or outcome lacks a cell or a line."""
    one = replace(verdict, metric=name, outcome=outcome)
    assert all(row(result, one))
    explained = f"  {name}: {outcome.value}: " in failure(
        replace(result, verdicts=(one,)), strict=True
    )
    assert explained is outcome.fails(strict=True)


def test_the_bound_of_a_run_is_the_sum(result: Result, verdict: Verdict) -> None:
    """Each verdict adds its own, never more than certainty; without statistics there is none."""
    one = replace(verdict, evidence={"false_regression_bound": 0.001})
    two = replace(verdict, evidence={"false_regression_bound": 0.005})
    assert run_bound([replace(result, verdicts=(one, two, verdict))]) == pytest.approx(0.006)
    sure = replace(verdict, evidence={"false_regression_bound": 0.4})
    assert run_bound([replace(result, verdicts=(sure,) * 3)]) == 1.0
    assert run_bound([result]) is None


def test_the_bound_of_a_run_counts_quality(result: Result) -> None:
    """One in a thousand for each metric, and as much again for its budget."""
    chunks = [5.0, 6.0, 7.0, 8.0]
    verdicts = tuple(
        compare_chunks(METRICS["ppl"], chunks, chunks, tolerance=0.01, budget=budget)
        for budget in (None, 10.0)
    )
    assert run_bound([replace(result, verdicts=verdicts)]) == pytest.approx(0.003)


def test_a_drift_since_the_oldest_baseline_is_told(result: Result, verdict: Verdict) -> None:
    """Beside the change against the one compared with; beyond the tolerance it stands out."""
    told = [
        replace(verdict, evidence={"oldest": {"label": "b7000", "value": 80.0, "change": change}})
        for change in (-0.23, -0.01)
    ]
    (drifted, one), (steady, two) = since_oldest([replace(result, verdicts=(*told, verdict))])
    assert (one, two) == (True, False)
    assert drifted == (
        "since b7000, the oldest baseline: c7/short decode_tps -23.0 % (against the one compared "
        "with -12.0 %)"
    )
    assert "-1.0 %" in steady


def test_what_blocks_settled_is_named(result: Result, verdict: Verdict) -> None:
    """Its figures are not the record's; that the machine is slower than then is a warning."""
    assert settled_told([result]) == []
    open_, slow = (
        replace(
            verdict,
            metric=metric,
            outcome=Outcome.PASS,
            reason=f"{metric} is equal; the machine is slower",
            evidence={"stored": {}, "suspected": suspected},
        )
        for metric, suspected in (("decode_tps", False), ("ttft_ms", True))
    )
    bad = replace(slow, metric="itl_ms", outcome=Outcome.REGRESSION)
    (told, plainly), (machine, warning) = settled_told(
        [replace(result, verdicts=(verdict, open_, slow, bad))]
    )
    assert told == (
        "judged by blocks of both builds, since by the record they were open or suspected: "
        "c7/short decode_tps, c7/short ttft_ms, c7/short itl_ms"
    )
    assert machine == "warning: c7/short ttft_ms: ttft_ms is equal; the machine is slower"
    assert (plainly, warning) == (False, True)


PARTIAL = {
    "build": "b9",
    "how": "crashed",
    "answered": 3,
    "asked": 7,
    "samples": {"decode_tps": [44.6, 44.7, 44.5], "ttft_ms": []},
}


def of(verdict: Verdict, metric: str, outcome: Outcome, reason: str) -> Verdict:
    """A verdict of a metric without values."""
    return replace(
        verdict, metric=metric, outcome=outcome, reason=reason, base=None, new=None, change=None
    )


def test_one_cause_has_one_line(result: Result, verdict: Verdict) -> None:
    """Metrics that fail alike are told together, others each by itself."""
    names = ("ttft_ms", "itl_ms", "e2e_ms", "prefill_tps")
    dead = [of(verdict, name, Outcome.ERROR, "it died\n    | its log") for name in names]
    late = of(verdict, "load_ms", Outcome.ERROR, "too late")
    told = replace(result, verdicts=(verdict, *dead[:3], late))
    assert [found for _, found in folded(told.verdicts)] == [
        ["decode_tps"],
        ["ttft_ms", "itl_ms", "e2e_ms"],
        ["load_ms"],
    ]
    assert [cells[1] for cells, _ in rows(told)] == [
        "decode_tps",
        "ttft_ms, itl_ms, e2e_ms",
        "load_ms",
    ]
    text = failure(told, strict=False)
    assert text.startswith(
        "c7/short: decode_tps REGRESSION, ttft_ms, itl_ms, e2e_ms ERROR, load_ms ERROR\n"
    )
    assert text.count("| its log") == 1
    many = replace(result, verdicts=tuple(dead))
    assert [cells[1] for cells, _ in rows(many)] == ["ttft_ms, 3 more"]


def test_what_worked_before_a_crash_is_told(result: Result, verdict: Verdict) -> None:
    """How many requests of how many, and the middle of the samples, in the failure's text."""
    assert partial_told(result) == ""
    crashed = replace(result, partial=PARTIAL)
    told = "b9 crashed after 3 of 7 requests; those that worked, not judged: decode_tps 44.6 tok/s"
    assert partial_told(crashed) == told
    dead = replace(crashed, verdicts=(of(verdict, "decode_tps", Outcome.ERROR, "it died"),))
    assert told in failure(dead, strict=False)
    nothing = replace(result, partial={**PARTIAL, "answered": 1, "samples": {}})
    assert partial_told(nothing) == "b9 crashed after 1 of 7 requests, before a sample was complete"


def test_a_failure_holds_nothing_that_a_terminal_would_obey(
    result: Result, verdict: Verdict
) -> None:
    """Reasons quote logs and names of processes; lines stay lines."""
    spoilt = replace(result, verdicts=(replace(verdict, reason="a\x1b[31m\udc80\n  b"),))
    text = failure(spoilt, strict=False)
    assert "decode_tps: REGRESSION: a?[31m?\n  b\n" in text
    assert text.encode()
