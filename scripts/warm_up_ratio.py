"""Shows how much slower the first requests of a workload are on a fresh server.

Starts a build's server several times, asks each workload again and again without any warm-up, and
prints the time of the first, second, third … request over the median of the last ones. What a gate
counts begins after ``GPU_WARM_UPS`` of them on a GPU, after one elsewhere::

    python scripts/warm_up_ratio.py FOLDER_OF_LLAMA_CPP --config synth-1b --config synth-8b
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from pytest_llmperf.cli.subject import subject
from pytest_llmperf.measure.launch import Session, text_tokens
from pytest_llmperf.report.wording import columns
from pytest_llmperf.serve.launch import ServePlan, start
from pytest_llmperf.settings import DEFAULT_SUITE

METRICS = ("decode_tps", "prefill_tps", "ttft_ms")
LATE = 4
"""Requests from the end that count as warm."""


def ratios(samples: Sequence[float]) -> list[float]:
    """Return each sample over the median of the last ones."""
    warm = median(samples[-LATE:])
    return [sample / warm for sample in samples]


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("build", help="a build spec")
    parser.add_argument("--suite", type=Path, default=Path(DEFAULT_SUITE))
    parser.add_argument("--config", action="append", required=True)
    parser.add_argument("--workload", action="append", default=None)
    parser.add_argument("--models", type=Path, action="append", default=[])
    parser.add_argument("--starts", type=int, default=5)
    parser.add_argument("--requests", type=int, default=8)
    arguments = parser.parse_args()
    names = [str(number) for number in range(1, arguments.requests + 1)]
    rows: list[Sequence[str]] = [("config", "workload", "metric", *names)]
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.config:
            chosen = subject(
                arguments.suite,
                arguments.build,
                name,
                arguments.workload or ["answer", "document"],
                arguments.models,
                progress=lambda _text: None,
            )
            workloads = chosen.workloads
            found: dict[tuple[str, str], list[list[float]]] = {}
            for number in range(arguments.starts):
                sys.stderr.write(f"{name}: start {number + 1} of {arguments.starts}\n")
                plan = ServePlan(folder=Path(folder))
                with start(chosen.build, chosen.config, chosen.files, plan) as server:
                    session = Session(server, text_tokens(server))
                    session.settle()
                    # Each workload is the first to be asked in turn.
                    shift = number % len(workloads)
                    for workload in workloads[shift:] + workloads[:shift]:
                        for _ in range(arguments.requests):
                            session.sample(workload)
                        taken = session.launch.samples[workload.name]
                        for metric in METRICS:
                            found.setdefault((workload.name, metric), []).append(
                                ratios(taken[metric])
                            )
            for (workload_name, metric), starts in sorted(found.items()):
                middle = [median(one) for one in zip(*starts, strict=True)]
                rows.append((name, workload_name, metric, *(f"{value:.3f}" for value in middle)))
    sys.stdout.write("\n".join(columns(rows)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
