"""What else the host did while something was measured: foreign load, throttling, unsteady samples.

A neighbour that takes cores, a processor that throttles or a launch whose samples wander make
figures of the machine, not of the build. They are named here; the caller measures again.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import psutil

from pytest_llmperf.serve.process import server_pids

UNSTEADY = 0.25
"""Relative change within one launch that counts as drift, or as scatter if a third of the samples
lie that far off their median. The noisiest launches seen on a shared two-core machine without a
known cause, a prompt of 64 tokens on both cores, scatter by 0.14."""

_FEWEST = 3


@dataclass(frozen=True, slots=True)
class _Reading:
    at: float
    busy: float
    steal: float
    used: Mapping[int, tuple[str, float]]
    ended: float
    throttled: int


@dataclass(frozen=True, slots=True)
class Load:
    """Foreign load over a while.

    Attributes:
        cores: Cores that were busy with something else than this process and its children.
        worst: The process that used most of it, for people; ``""`` if none stands out.
        throttled: How often the processor throttled.
    """

    cores: float
    worst: str
    throttled: int

    def told(self, limit: float) -> str:
        """Return what disturbed, in words; ``""`` if nothing did.

        Args:
            limit: Cores of foreign load that do not count.
        """
        if self.cores > limit:
            who = f", {self.worst}" if self.worst else ""
            return f"other programs kept {self.cores:.1f} of {os.cpu_count() or 1} cores busy{who}"
        if self.throttled:
            return f"the processor throttled {self.throttled} times: it is too hot"
        return ""


class Watch:
    """Sees what else the host does from now on."""

    def __init__(self) -> None:
        self._begin = _read()

    def load(self) -> Load:
        """Return the foreign load since the watch began."""
        begin, end = self._begin, _read()
        seconds = max(end.at - begin.at, 1e-3)
        ours = _ours()
        spent = {
            pid: used - begin.used.get(pid, ("", 0.0))[1] for pid, (_, used) in end.used.items()
        }
        # What ended meanwhile, such as a llama-bench that is done, was ours too.
        mine = sum(used for pid, used in spent.items() if pid in ours) + end.ended - begin.ended
        busy = end.busy - begin.busy
        steal = (end.steal - begin.steal) / seconds
        others = {pid: used for pid, used in spent.items() if pid not in ours and used > 0}
        worst = ""
        if others:
            pid = max(others, key=lambda one: others[one])
            worst = f"{end.used[pid][0]} (pid {pid}) {others[pid] / seconds:.1f} of them"
        if steal * 2 > (busy - mine) / seconds:
            worst = f"the host's other guests {steal:.1f} of them"
        return Load(
            cores=max((busy - mine) / seconds, 0.0),
            worst=worst,
            throttled=end.throttled - begin.throttled,
        )


def _read() -> _Reading:
    times = psutil.cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    # Linux counts a guest's time in `user` as well.
    twice = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)
    used = {}
    for process in psutil.process_iter(["name", "cpu_times"]):
        spent = process.info["cpu_times"]
        if spent is not None:
            used[process.pid] = (str(process.info["name"]), spent.user + spent.system)
    return _Reading(
        at=time.monotonic(),
        busy=sum(times) - idle - twice,
        steal=getattr(times, "steal", 0.0),
        used=used,
        ended=os.times().children_user + os.times().children_system,
        throttled=_throttled(),
    )


def _ours() -> set[int]:
    me = psutil.Process()
    ours = {me.pid, *(child.pid for child in me.children(recursive=True))}
    # A container's processes descend from its engine, not from us.
    for pid in server_pids() - ours:
        with suppress(psutil.Error):
            server = psutil.Process(pid)
            ours |= {pid, *(child.pid for child in server.children(recursive=True))}
    return ours


def _throttled() -> int:
    """Return how often the processor throttled since it was switched on; 0 where not told."""
    total = 0
    for counter in Path("/sys/devices/system/cpu").glob(
        "cpu[0-9]*/thermal_throttle/core_throttle_count"
    ):
        try:
            total += int(counter.read_text("ascii"))
        except (OSError, ValueError):
            continue
    return total


def unsteady(samples: Sequence[float]) -> str:
    """Return how the samples of one launch wander, in words; ``""`` if they do not.

    Args:
        samples: Positive values in the order of time.
    """
    if len(samples) < _FEWEST or min(samples) <= 0:
        return ""
    logs = [math.log(value) for value in samples]
    middle = statistics.median(logs)
    far = sum(abs(value - middle) > UNSTEADY for value in logs)
    shown = ", ".join(f"{value:.4g}" for value in samples)
    steps = [after - before for before, after in pairwise(logs)]
    one_way = all(step > 0 for step in steps) or all(step < 0 for step in steps)
    if one_way and abs(logs[-1] - logs[0]) > UNSTEADY:
        return f"the samples of one launch drift: {shown}"
    if 3 * far > len(logs):
        return f"the samples of one launch scatter: {shown}"
    return ""
