"""A pass over a corpus as one list a chunk, and a metric's value over the whole pass.

Of a mean over tokens (``BY_CHUNK``) a chunk's list holds the chunk's mean and nothing else.

Of ``kld_p999`` it holds the divergences of those of its tokens that are among the largest
hundredth of the whole pass, and of a chunk that has none of these its largest alone. Every chunk
has the same number of tokens, which is told apart from the lists. The percentile of the pass rests
on its largest thousandth, so the lists give it exactly, and leave room for passes drawn from the
same chunks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pytest_llmperf.judge._common import bounded_exp, plural
from pytest_llmperf.judge.statistics import Array
from pytest_llmperf.metrics import Metric

Chunks = Sequence[Sequence[float]]
"""The values of each chunk, in a metric's unit."""

BY_CHUNK = ("ppl", "kld_mean", "same_top")
"""Metrics that are means over chunks; a maximum or a percentile of tokens is none."""

QUALITY = (*BY_CHUNK, "kld_p999")
"""Metrics that are judged by chunk and recorded in a baseline."""

BEYOND_P999 = 1000
"""One token in so many lies beyond the 99.9 % percentile."""

ROUNDING = 1e-3
"""How far below its least possible value a value may lie.

The 16-bit format rounds each log-probability and clips what is below e^-16 of the likeliest, so the
probabilities of a row sum to 1 only nearly, and a divergence of nothing falls below 0.
"""

_MOST = 1e100  # its square is finite


class Tail:
    """The largest divergences of a pass, sorted once for any number of percentiles."""

    def __init__(self, chunks: Chunks, tokens: int) -> None:
        """Sort them.

        Args:
            chunks: The listed values of each chunk.
            tokens: Scored tokens of one chunk.
        """
        values = np.array([value for chunk in chunks for value in chunk], np.float64)
        owners = np.repeat(np.arange(len(chunks)), [len(chunk) for chunk in chunks])
        order = np.argsort(-values, kind="stable")
        self._values: Array = values[order]
        self._owners: NDArray[np.intp] = owners[order]
        # np.percentile interpolates at 0.999 (n - 1) from below, which is this far from above.
        self._rank, rest = divmod(len(chunks) * tokens - 1, BEYOND_P999)
        self._share = rest / BEYOND_P999

    def __len__(self) -> int:
        return len(self._values)

    def percentiles(self, counts: NDArray[np.int64]) -> Array:
        """The 99.9 % percentile of passes made of these chunks.

        Where such a pass has fewer listed tokens than lie beyond the percentile, its smallest
        listed value is taken: those not listed are no larger.

        Args:
            counts: How often each chunk is in each pass, shape ``(passes, chunks)``; as many chunks
                in all as there are.

        Returns:
            Shape ``(passes,)``, with linear interpolation as ``np.percentile`` has it.
        """
        upto = counts[:, self._owners].cumsum(axis=1)

        def ranked(rank: int) -> Array:
            wanted = np.minimum(rank, upto[:, -1:] - 1)
            found: Array = self._values[(upto <= wanted).sum(axis=1)]
            return found

        upper, lower = ranked(self._rank), ranked(self._rank + 1)
        between: Array = upper + (lower - upper) * self._share
        return between


def pooled(metric: Metric, chunks: Chunks, tokens: int) -> float:
    """A metric's value over a whole pass, in its unit.

    ``ppl`` is exp of the mean of the chunks' logarithms, since all have as many tokens;
    ``kld_mean`` and ``same_top`` are means; ``kld_p999`` is the percentile of all tokens.

    Args:
        metric: One of ``QUALITY``.
        chunks: The values of each chunk, without ``complaint``.
        tokens: Scored tokens of one chunk; of no matter to means.

    Raises:
        ValueError: Another metric.
    """
    check_quality(metric)
    if metric.name == "kld_p999":
        return float(Tail(chunks, tokens).percentiles(np.ones((1, len(chunks)), np.int64))[0])
    means = [chunk[0] for chunk in chunks]
    if metric.name == "ppl":
        return bounded_exp(float(logs(means).mean()))
    return float(np.mean(means))


def logs(perplexities: Sequence[float]) -> Array:
    """Mean negative log-likelihoods, nats, shape ``(chunks,)``."""
    result: Array = np.log(np.maximum(np.asarray(perplexities, dtype=np.float64), 1.0))
    return result


def complaint(metric: Metric, chunks: Chunks, tokens: int) -> str:
    """Why the values of a pass are of no use, for the middle of a sentence; "" if they are.

    Args:
        metric: One of ``QUALITY``.
        chunks: The values of each chunk.
        tokens: Scored tokens of one chunk; of no matter to means.

    Raises:
        ValueError: Another metric.
    """
    check_quality(metric)
    tail = metric.name == "kld_p999"
    if tail and (isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1):
        return f"chunks of {tokens!r} scored tokens"
    least = (1.0 if metric.name == "ppl" else 0.0) - ROUNDING
    most = tokens if tail else 1
    for number, chunk in enumerate(chunks, start=1):
        if not 1 <= len(chunk) <= most:
            return f"chunk {number} with {plural(len(chunk), 'value')}, not {'1 to ' * tail}{most}"
        for value in chunk:
            if not least <= value <= _MOST:
                return f"chunk {number} with a value of {value}"
    if tail and chunks:
        total, listed = len(chunks) * tokens, sum(map(len, chunks))
        needed = min(total, (total - 1) // BEYOND_P999 + 2)
        # Nothing is smaller than a divergence of 0, so such a list tells of all other tokens too.
        if listed < needed and min(map(min, chunks)) > ROUNDING:
            return f"{plural(listed, 'value')} listed of {total} tokens, {needed} at least needed"
    return ""


def check_quality(metric: Metric) -> None:
    """Raise ``ValueError`` unless a metric is one of ``QUALITY``."""
    if metric.name not in QUALITY:
        raise ValueError(f"{metric.name} is not judged by chunk: {', '.join(QUALITY)} are")
