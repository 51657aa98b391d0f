"""Measures how fast logits are compared, and in how much memory.

Streams generated rows through the comparison, once with distributions as a language model has
them and once with flat ones, which are the slowest, and the same bytes through a plain copy::

    python scripts/divergence_throughput.py --vocab 248320 --chunks 2
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

# Set before numpy starts its thread pools: the target is that of one thread.
for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"

import numpy as np  # noqa: E402 - see above
from numpy.typing import NDArray  # noqa: E402

from pytest_llmperf.quality.divergence import compare  # noqa: E402
from pytest_llmperf.quality.logits import MAGIC, LogitsReader, pack_rows  # noqa: E402
from pytest_llmperf.quality.reference import build_reference, compare_reference  # noqa: E402

N_CTX = 512
N_SCORED = 255
POOL = 64  # rows served in turn: more than a processor's cache holds


class Source:
    """A stream of any length, served from a pool of rows as the page cache serves a file."""

    def __init__(self, pool: NDArray[np.uint16], n_vocab: int, n_chunk: int) -> None:
        numbers = np.array([N_CTX, n_vocab, n_chunk], np.int32)
        tokens = np.arange(n_chunk * N_CTX, dtype=np.int32) % n_vocab
        self._head = memoryview(MAGIC + numbers.tobytes() + tokens.tobytes())
        self._pool = pool.data.cast("B")
        self._at = 0
        self._rows = n_chunk * N_SCORED * pool.shape[1] * 2
        self.size = len(self._head) + self._rows

    def readinto(self, buffer: memoryview, /) -> int:
        """Copy what comes next."""
        place = self._at - len(self._head)
        if place < 0:
            part = self._head[self._at : self._at + len(buffer)]
        else:
            start = place % len(self._pool)
            part = self._pool[start : start + min(len(buffer), self._rows - place)]
        buffer[: len(part)] = part
        self._at += len(part)
        return len(part)


def rows(n_vocab: int, seed: int, *, flat: bool) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
    """Rows of a base and of a candidate near it.

    A language model's logits are about normal over the vocabulary, with a few tokens far above.
    """
    random = np.random.default_rng(seed)
    base, candidate = [], []
    for _ in range(POOL):
        if flat:
            logits = random.uniform(0, 3, n_vocab).astype(np.float32)
        else:
            logits = random.normal(0, random.uniform(1.5, 3), n_vocab).astype(np.float32)
            likely = random.integers(0, n_vocab, 50)
            logits[likely] = logits.max() + random.exponential(3, 50) - 2
        base.append(pack_rows(logits)[0])
        candidate.append(pack_rows(logits + random.normal(0, 0.1, n_vocab).astype(np.float32))[0])
    return np.stack(base), np.stack(candidate)


def timed(work: Callable[[], object], repeats: int) -> float:
    """Median seconds."""
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def copy_all(source: Source, buffer: NDArray[np.uint8]) -> None:
    """Read a stream to its end and do nothing with it."""
    while source.readinto(buffer.data):
        pass


def report(name: str, seconds: float, streams: int, size: int, copy: float) -> None:
    """Print one line."""
    sys.stdout.write(
        f"  {name:34} {size / seconds / 1e9:6.2f} GB/s of the candidate, "
        f"{streams * size / seconds / 1e9:6.2f} GB/s in all, "
        f"{streams * copy / seconds:5.3f} of a plain copy's speed\n"
    )


def main() -> None:
    """Print throughput and peak memory."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--vocab", type=int, default=248320)
    parser.add_argument("--chunks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    vocab, chunks, repeats = arguments.vocab, arguments.chunks, arguments.repeats
    buffer = np.empty(8 << 20, np.uint8)
    for kind in ("language model", "flat"):
        base, candidate = rows(vocab, 0, flat=kind == "flat")
        size = Source(base, vocab, chunks).size
        copy = timed(lambda: copy_all(Source(candidate, vocab, chunks), buffer), repeats)  # noqa: B023 - called at once
        sys.stdout.write(
            f"{kind}, vocabulary {vocab}, {chunks} chunks, {size / 1e9:.2f} GB a stream, "
            f"plain copy {size / copy / 1e9:.2f} GB/s\n"
        )
        exact = timed(
            lambda: compare(
                LogitsReader(Source(base, vocab, chunks), "base"),  # noqa: B023
                LogitsReader(Source(candidate, vocab, chunks), "candidate"),  # noqa: B023
            ),
            repeats,
        )
        report("two streams", exact, 2, size, copy)
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            reference = build_reference(
                LogitsReader(Source(base, vocab, 1), "base"),
                Path(folder) / "reference",
                model_sha256="0" * 64,
                corpus_sha256="0" * 64,
            )
            report("building a reference", (time.perf_counter() - began) * chunks, 1, size, copy)
            compact = timed(
                lambda: compare_reference(
                    reference,  # noqa: B023
                    LogitsReader(Source(candidate, vocab, 1), "candidate"),  # noqa: B023
                ),
                repeats,
            )
            report("a stream against a reference", compact * chunks, 1, size, copy)
            share = reference.nbytes / Source(base, vocab, 1).size
            sys.stdout.write(f"  the reference has {share:.2%} of the stream's size\n")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        served = (base.nbytes + candidate.nbytes) / 2**20
        sys.stdout.write(f"  peak memory {peak:.0f} MiB, of it {served:.0f} MiB the rows served\n")


if __name__ == "__main__":
    main()
