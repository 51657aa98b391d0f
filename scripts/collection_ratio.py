"""Measures what the plugin costs a project that does not use it.

Collects a generated project with and without the plugin, in coin-flipped pairs, and prints the
median of the paired ratios of wall time with its spread::

    python scripts/collection_ratio.py --pairs 20 --tests 2000
"""

from __future__ import annotations

import argparse
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def collect(folder: Path, *, plugin: bool) -> float:
    """Return the seconds that one collection takes."""
    switch = [] if plugin else ["-p", "no:llmperf"]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *switch]
    began = time.perf_counter()
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)  # noqa: S603 - ours
    return time.perf_counter() - began


def main() -> None:
    """Print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--tests", type=int, default=2000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "pytest.ini").write_text("[pytest]\n", "utf-8")
        for module in range(20):
            tests = "\n\n".join(
                f"def test_{number}():\n    pass" for number in range(arguments.tests // 20)
            )
            (folder / f"test_{module}.py").write_text(tests + "\n", "utf-8")
        for plugin in (True, False):
            collect(folder, plugin=plugin)
        ratios = []
        for pair in range(arguments.pairs):
            order = random.sample([True, False], 2)
            seconds = {plugin: collect(folder, plugin=plugin) for plugin in order}
            ratios.append(seconds[True] / seconds[False])
            sys.stdout.write(f"pair {pair + 1}: {seconds[False]:.3f} s -> {seconds[True]:.3f} s\n")
    low, _, high = statistics.quantiles(ratios, n=4)
    middle = statistics.median(ratios)
    sys.stdout.write(f"ratio with/without: median {middle:.3f}, quartiles {low:.3f} {high:.3f}\n")


if __name__ == "__main__":
    main()
