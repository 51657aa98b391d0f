"""Every metric there is: its unit, the better direction and how it is compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pytest_llmperf.errors import PlanError, nearest

Better = Literal["higher", "lower"]
Kind = Literal["timing", "memory", "exact", "quality"]


@dataclass(frozen=True, slots=True)
class Metric:
    """A named quantity.

    Attributes:
        name: The name used in baselines, tolerances and ``gate()``.
        unit: Unit as printed.
        better: The direction in which a change is an improvement.
        kind: ``timing`` (noisy, judged on log ratios of launches), ``memory`` (nearly
            deterministic, judged the same way), ``exact`` (no statistics at all) or
            ``quality`` (divergence and perplexity of a model's answers).
        scope: ``request`` for one value a request, ``launch`` for one value a server start,
            ``quality`` for one value a pass over a corpus.
        tolerance: Default relative tolerance; for ``exact`` metrics the relative slack.
        slack: Absolute difference, in ``unit``, that never counts.
        help: One line for people.
    """

    name: str
    unit: str
    better: Better
    kind: Kind
    scope: Literal["request", "launch", "quality"]
    tolerance: float
    slack: float
    help: str


def _timing(name: str, unit: str, better: Better, tolerance: float, text: str) -> Metric:
    return Metric(name, unit, better, "timing", "request", tolerance, 0.0, text)


def _exact(name: str, unit: str, better: Better, slack: float, text: str) -> Metric:
    return Metric(name, unit, better, "exact", "launch", 0.0, slack, text)


def _quality(  # noqa: PLR0917 - one line a metric
    name: str, unit: str, better: Better, tolerance: float, slack: float, text: str
) -> Metric:
    return Metric(name, unit, better, "quality", "quality", tolerance, slack, text)


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        _timing("decode_tps", "tok/s", "higher", 0.05, "(predicted_n - 1) / predicted time"),
        _timing("prefill_tps", "tok/s", "higher", 0.05, "prompt_n / prompt time"),
        _timing("ttft_ms", "ms", "lower", 0.10, "request sent to first token, seen by the client"),
        _timing("itl_ms", "ms", "lower", 0.05, "mean time between tokens, seen by the client"),
        _timing("e2e_ms", "ms", "lower", 0.05, "request sent to last byte, seen by the client"),
        _timing(
            "aggregate_tps",
            "tok/s",
            "higher",
            0.05,
            "tokens of all parallel requests / first one sent to last byte of the last",
        ),
        # The same text drafts the same: the slack is for builds whose rounding makes other text.
        Metric(
            "draft_acceptance",
            "%",
            "higher",
            "exact",
            "request",
            0.0,
            1.0,
            "drafted tokens that were accepted",
        ),
        # The counter moves in steps of a tenth of a second, and the card's temperature counts too.
        _timing(
            "tokens_per_joule",
            "tok/J",
            "higher",
            0.10,
            "generated tokens / energy of the GPUs while they were asked for, prompts and whoever "
            "waits on them included",
        ),
        Metric("load_ms", "ms", "lower", "timing", "launch", 0.25, 50.0, "process start to ready"),
        Metric(
            "rss_mib",
            "MiB",
            "lower",
            "memory",
            "launch",
            0.05,
            8.0,
            "resident memory of all its processes",
        ),
        Metric(
            "vram_mib",
            "MiB",
            "lower",
            "memory",
            "launch",
            0.02,
            64.0,
            "GPU memory of the server once it is warm, all GPUs",
        ),
        Metric(
            "vram_peak_mib",
            "MiB",
            "lower",
            "memory",
            "launch",
            0.02,
            64.0,
            "most GPU memory of the server at a time, sampled from its start to its end",
        ),
        _exact("model_mib", "MiB", "lower", 1.0, "model buffers, from the log"),
        _exact("kv_mib", "MiB", "lower", 1.0, "KV and recurrent-state buffers, from the log"),
        _exact("compute_mib", "MiB", "lower", 4.0, "compute and output buffers, from the log"),
        _exact("offloaded_layers", "layers", "higher", 0.0, "layers on the GPU, from the log"),
        _exact("graph_splits", "splits", "lower", 0.0, "parts of the graph, from the log"),
        _quality("ppl", "ppl", "lower", 0.01, 0.0, "perplexity of the corpus"),
        # A baseline that is its own reference has no value to take a share of: there the slack
        # decides. Other kernels for the same quantized model, on one machine, were measured up to
        # 0.0017 nat, 2.7 % of the likeliest tokens and a percentile of 0.06 nat apart, by rounding
        # alone (docs/measurements.md); Q6_K costs 0.002. A model in floats is a thousand times
        # closer to itself: give that a budget.
        _quality("kld_mean", "nat", "lower", 0.10, 0.0025, "mean KL divergence from the reference"),
        _quality("kld_p999", "nat", "lower", 0.25, 0.1, "99.9 % percentile of the KL divergence"),
        _quality("kld_max", "nat", "lower", 0.50, 0.0, "largest KL divergence of one token"),
        _quality("same_top", "%", "higher", 0.005, 4.0, "tokens with the same likeliest successor"),
        _exact("n_ctx", "tokens", "higher", 0.0, "context of one slot, as the server reports it"),
    )
}

FEWEST_CHUNKS = 4
"""Fewest chunks of a text that say anything of how chunks differ."""

PUBLISHED_ONLY = ("kld_max",)
"""Metrics that nothing here measures: one token decides them."""


def check_tolerance(metric: str, value: object) -> float:
    """Return a relative tolerance, checked.

    Raises:
        PlanError: If there is no such metric, or the value is no fraction.
    """
    if metric not in METRICS:
        raise PlanError(
            f"no metric `{metric}`{nearest(metric, METRICS)}: there are {', '.join(METRICS)}"
        )
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise PlanError(
            f"`{metric}` must be a fraction from 0 to below 1 (0.05 is 5 %), not {value!r}"
        )
    return float(value)
