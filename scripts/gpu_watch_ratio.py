"""Shows what it costs to watch a GPU while a server is measured on it.

Asks one server the same again and again, with the watch on and off in the order of a coin flip, and
prints the median ratio of its speeds::

    python scripts/gpu_watch_ratio.py FOLDER_OF_LLAMA_CPP --config synth-1b
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import tempfile
from pathlib import Path
from statistics import fmean, median, stdev

from pytest_llmperf.cli.subject import subject
from pytest_llmperf.gpu.cards import gpus
from pytest_llmperf.gpu.watch import GpuWatch
from pytest_llmperf.measure.host import is_ours
from pytest_llmperf.measure.launch import Session, text_tokens
from pytest_llmperf.serve.launch import ServePlan, start
from pytest_llmperf.settings import DEFAULT_SUITE

METRICS = ("decode_tps", "prefill_tps", "ttft_ms")


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("build", help="a build spec")
    parser.add_argument("--suite", type=Path, default=Path(DEFAULT_SUITE))
    parser.add_argument("--config", required=True)
    parser.add_argument("--workload", default="answer")
    parser.add_argument("--models", type=Path, action="append", default=[])
    parser.add_argument("--pairs", type=int, default=20)
    arguments = parser.parse_args()
    chosen = subject(
        arguments.suite,
        arguments.build,
        arguments.config,
        [arguments.workload],
        arguments.models,
        progress=lambda _text: None,
    )
    [workload] = chosen.workloads
    ratios: dict[str, list[float]] = {metric: [] for metric in METRICS}
    rates = []
    with (
        tempfile.TemporaryDirectory() as folder,
        start(chosen.build, chosen.config, chosen.files, ServePlan(folder=Path(folder))) as server,
    ):
        session = Session(server, text_tokens(server))
        session.settle()
        for _ in range(3):
            session.warm_up(workload)
        for _ in range(arguments.pairs):
            taken: dict[bool, dict[str, float]] = {}
            for watched in random.sample((True, False), 2):
                with GpuWatch(gpus() if watched else (), is_ours) as watch:
                    session.sample(workload)
                rates += [use.rate_hz for use in watch.uses()]
                samples = session.launch.samples[workload.name]
                taken[watched] = {metric: samples[metric][-1] for metric in METRICS}
            for metric in METRICS:
                ratios[metric].append(taken[True][metric] / taken[False][metric])
    for metric, found in ratios.items():
        logs = [math.log(one) for one in found]
        error = stdev(logs) / math.sqrt(len(logs))
        sys.stdout.write(
            f"{metric}: watched / unwatched = {median(found):.4f}, mean "
            f"{math.exp(fmean(logs)):.4f} ± {error:.4f}, {len(found)} pairs\n"
        )
    if rates:
        sys.stdout.write(f"sampled at {median(rates):.1f} Hz\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
