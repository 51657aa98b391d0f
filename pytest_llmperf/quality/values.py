"""What a pass says by chunk, in the metrics' names and units: what is judged and recorded.

Every value is a list with one list a chunk, as ``judge/quality`` takes it: of a mean over tokens
the mean, of a percentile of tokens the largest ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from pytest_llmperf.quality.divergence import Estimate, TokenDivergences, summarize, tails_by_chunk
from pytest_llmperf.quality.perplexity import Perplexity

Chunks = dict[str, list[list[float]]]
"""Metric name to one list a chunk."""

_MOST_LOG = 700.0
_ESTIMATES = (
    *("ppl", "ppl_base", "ln_ppl_ratio", "ppl_ratio", "ppl_difference"),
    *("kld", "delta_p", "delta_p_rms", "same_top"),
)


def chunk_values(found: Perplexity, tokens: TokenDivergences) -> Chunks:
    """Return the candidate's values.

    Args:
        found: What its program said.
        tokens: Its divergences from the reference.
    """
    return {
        "ppl": _perplexities(found, tokens.nll, tokens.at_floor, tokens.n_scored),
        "kld_mean": _means(tokens.kld, tokens.n_scored),
        "same_top": [[100 * one[0]] for one in _means(tokens.same_top, tokens.n_scored)],
        "kld_p999": tails_by_chunk(tokens),
    }


def base_values(found: Perplexity, tokens: TokenDivergences) -> Chunks:
    """Return the values of the base itself: it does not diverge from itself."""
    chunks = tokens.n_chunk
    return {
        "ppl": _perplexities(found, tokens.nll_base, tokens.at_floor_base, tokens.n_scored),
        "kld_mean": [[0.0]] * chunks,
        "same_top": [[100.0]] * chunks,
        "kld_p999": [[0.0]] * chunks,
    }


def all_figures(tokens: TokenDivergences) -> dict[str, object]:
    """Return all that ``llama-perplexity --kl-divergence`` prints, for a verdict's evidence.

    Shares and probabilities are fractions. An estimate has its standard error by tokens, as that
    tool prints it, and by chunks; what is no number, such as an error of a single chunk, is left
    out.
    """
    summary = summarize(tokens)
    found: dict[str, object] = {
        "tokens": summary.tokens,
        "kld_percentiles": _by_percent(summary.kld_percentiles),
        "delta_p_percentiles": _by_percent(summary.delta_p_percentiles),
        "at_floor": summary.at_floor,
        "at_floor_base": summary.at_floor_base,
    }
    if math.isfinite(summary.ppl_correlation):
        found["ppl_correlation"] = summary.ppl_correlation
    for name in _ESTIMATES:
        estimate: Estimate = getattr(summary, name)
        figures = {"value": estimate.value, "se": estimate.error, "se_chunks": estimate.chunk_error}
        found[name] = {key: value for key, value in figures.items() if math.isfinite(value)}
    return found


def _by_percent(percentiles: Mapping[float, float]) -> dict[str, float]:
    return {f"{percent:g}": value for percent, value in percentiles.items()}


def _means(values: NDArray[np.generic], n_scored: int) -> list[list[float]]:
    by_chunk = values.reshape(-1, n_scored).astype(np.float64).mean(axis=1)
    return [[float(value)] for value in by_chunk]


def _perplexities(
    found: Perplexity, nll: NDArray[np.float32], at_floor: NDArray[np.bool_], n_scored: int
) -> list[list[float]]:
    """Perplexity of each chunk.

    The stream clips a token that is less likely than e^-16 of the likeliest, which makes its
    perplexity too small; the program's own running perplexity does not, but has four decimals,
    which are few once many chunks were averaged. So it is taken where a chunk has clipped tokens.
    """
    means = [one[0] for one in _means(nll, n_scored)]
    clipped = [bool(chunk.any()) for chunk in at_floor.reshape(-1, n_scored)]
    told = _from_running(found.running)
    chosen = [
        told[chunk] if clipped[chunk] and chunk < len(told) else mean
        for chunk, mean in enumerate(means)
    ]
    return [[math.exp(min(mean, _MOST_LOG))] for mean in chosen]


def _from_running(running: Sequence[float]) -> list[float]:
    """Return the mean NLL of each chunk from the perplexities after each: nats."""
    totals = [0.0]
    for number, value in enumerate(running, start=1):
        if not value > 0 or not math.isfinite(value):
            break
        totals.append(number * math.log(value))
    return [after - before for before, after in pairwise(totals)]
