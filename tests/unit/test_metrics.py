"""The registry of metrics."""

from __future__ import annotations

import dataclasses

import pytest

from pytest_llmperf.metrics import METRICS, Metric


def test_each_metric_is_found_by_its_name() -> None:
    """Baselines, tolerances and gates use the same names."""
    assert all(name == metric.name for name, metric in METRICS.items())


def test_the_metrics_of_the_design_are_there() -> None:
    """Speed, latency, memory and quality."""
    assert {
        "decode_tps",
        "prefill_tps",
        "ttft_ms",
        "load_ms",
        "rss_mib",
        "vram_mib",
        "n_ctx",
        "aggregate_tps",
        "draft_acceptance",
        "ppl",
        "kld_mean",
        "kld_p999",
        "same_top",
    } <= set(METRICS)


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_a_metric_is_consistent(metric: Metric) -> None:
    """Its unit and scope fit its kind, and its defaults are ones a suite file could set."""
    scopes = {
        "timing": {"request", "launch"},
        "memory": {"launch"},
        "exact": {"launch", "request"},
        "quality": {"quality"},
    }
    assert metric.scope in scopes[metric.kind]
    assert metric.better in {"higher", "lower"}
    assert 0 <= metric.tolerance < 1
    assert metric.slack >= 0
    assert metric.unit
    assert metric.help


@pytest.mark.parametrize(
    ("suffix", "unit", "better"),
    [("_tps", "tok/s", "higher"), ("_ms", "ms", "lower"), ("_mib", "MiB", "lower")],
)
def test_a_suffix_stands_for_unit_and_direction(suffix: str, unit: str, better: str) -> None:
    """So that a name can be read without the table."""
    named = [metric for name, metric in METRICS.items() if name.endswith(suffix)]
    assert named
    assert {(metric.unit, metric.better) for metric in named} == {(unit, better)}


def test_exact_metrics_have_no_tolerance() -> None:
    """They are deterministic; at most an absolute slack is allowed."""
    exact = [metric for metric in METRICS.values() if metric.kind == "exact"]
    assert exact
    assert all(metric.tolerance == 0 for metric in exact)


def test_a_metric_is_frozen() -> None:
    """A test cannot change the registry for the next one."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        METRICS["decode_tps"].tolerance = 1.0  # type: ignore[misc]
