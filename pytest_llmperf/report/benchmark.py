"""Replays samples into pytest-benchmark, through its public API only.

What is replayed is seconds per output token, so that its ``min`` is the best sample and its
OPS are tokens per second. ``--benchmark-json``, ``--benchmark-compare`` and
``--benchmark-histogram`` then work on them.
"""

from __future__ import annotations

from itertools import chain

import pytest

from pytest_llmperf.report.result import Result


class _Clock:
    """A clock that moves only when a sample is replayed."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


def replay(request: pytest.FixtureRequest, result: Result) -> None:
    """Hand a result's decode samples to the ``benchmark`` fixture; others have no rounds.

    Args:
        request: Of the test that measured them.
        result: What it measured.
    """
    config = request.config
    samples = list(chain.from_iterable(result.measured.get("decode_tps", ())))
    if not samples or "benchmark" in request.fixturenames:
        return
    # Skipping benchmarks must not skip verdicts.
    if config.getoption("benchmark_skip", default=False):
        return
    clock = _Clock()
    rounds = iter([1.0 / tps for tps in samples])
    request.node.add_marker(
        pytest.mark.benchmark(timer=clock, group=f"s/token {result.case}"), append=False
    )
    benchmark = request.getfixturevalue("benchmark")
    benchmark.extra_info.update(
        {
            "case": result.case,
            "build": result.new.label,
            "baseline": result.base.label if result.base else None,
            "machine": result.machine,
            "verdicts": {v.metric: v.outcome.value for v in result.verdicts},
            **({"roofline": dict(result.roofline)} if result.roofline else {}),
        }
    )
    benchmark.pedantic(lambda: clock.advance(next(rounds)), rounds=len(samples), iterations=1)
