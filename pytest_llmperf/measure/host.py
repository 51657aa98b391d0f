"""What else the host did while something was measured: foreign load, throttling, unsteady samples.

A neighbour that takes cores, a processor that throttles or a launch whose samples wander make
figures of the machine, not of the build. They are named here; the caller measures again.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from pytest_llmperf.serve.container import boxed_by
from pytest_llmperf.serve.process import server_pids

UNSTEADY = 0.25
"""Relative change within one launch that counts as drift, or as scatter if a third of the samples
lie that far off their median. The noisiest launches seen on a shared two-core machine without a
known cause, a prompt of 64 tokens on both cores, scatter by 0.14."""

_FEWEST = 3


@dataclass(frozen=True, slots=True)
class _Reading:
    """What processors did since they were switched on, in seconds.

    Attributes:
        at: Time of the reading.
        busy: Of all processors, with anything.
        steal: Taken by the host's other guests.
        used: Process id to name and own time.
        family: This run's tree of processes, without its other workers themselves.
        boxed: Processes in containers of this run's servers.
        mine: Of the family, with all of it that has ended, also of the other workers' tools.
        throttled: How often the processor throttled.
    """

    at: float
    busy: float
    steal: float
    used: Mapping[int, tuple[str, float]]
    family: Collection[int]
    boxed: Collection[int]
    mine: float
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
        spent = {
            pid: used - begin.used.get(pid, ("", 0.0))[1] for pid, (_, used) in end.used.items()
        }
        mine = end.mine - begin.mine + sum(spent.get(pid, 0.0) for pid in end.boxed)
        busy = end.busy - begin.busy
        steal = (end.steal - begin.steal) / seconds
        ours = {*end.family, *end.boxed}
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
    used, ended, parents = {}, {}, {}
    for process in psutil.process_iter(["name", "ppid", "cpu_times"]):
        spent = process.info["cpu_times"]
        if spent is not None:
            used[process.pid] = (str(process.info["name"]), spent.user + spent.system)
            ended[process.pid] = _of_children(process.pid, spent)
            parents[process.pid] = process.info["ppid"]
    family, boxed = _ours(parents)
    siblings = _siblings(parents)
    return _Reading(
        at=time.monotonic(),
        busy=sum(times) - idle - twice,
        steal=getattr(times, "steal", 0.0),
        used=used,
        family=family - siblings,
        boxed=boxed,
        # What ended, such as a llama-bench that is done, is counted with whoever started it.
        mine=sum(
            ended[pid] + (0.0 if pid in siblings else used[pid][1]) for pid in family if pid in used
        ),
        throttled=_throttled(),
    )


def _of_children(pid: int, times: Any) -> float:  # noqa: ANN401 - differs from system to system
    """Return the processor time of what a process started and outlived, in seconds."""
    if pid == os.getpid():
        # Told on every system, and of the same moment for all threads.
        own = os.times()
        return own.children_user + own.children_system
    return float(getattr(times, "children_user", 0.0) + getattr(times, "children_system", 0.0))


_family: set[int] = set()
"""Process id of the controller of pytest-xdist, if this is one of its workers on its machine."""


def share(controller: int) -> None:
    """Count the other workers of a run, and their servers, as ours.

    Args:
        controller: Process id of the controller; a worker on another machine has another parent.
    """
    _family.clear()
    if controller == os.getppid():
        _family.add(controller)


def is_ours(pid: int) -> bool:
    """Return whether a process is of this run: of its tree, or of a container of its servers.

    One that has ended, or cannot be seen from here, is not. May be called in any thread.
    """
    line = _line(pid)
    if line & {_root(), *_servers()}:
        return True
    # Its engine may tell which process it is only once the model is loaded, minutes from now.
    owners = {boxed_by(one) for one in line}
    return any(owner is not None and _root() in _line(owner) for owner in owners)


def _line(pid: int) -> set[int]:
    """Return a process with all that it descends from; empty if it has ended."""
    # Not psutil.process_iter(): that is not for several threads.
    try:
        return {pid, *(parent.pid for parent in psutil.Process(pid).parents())}
    except psutil.Error:
        return set()


def _root() -> int:
    return next(iter(_family), os.getpid())


def _servers() -> set[int]:
    while True:
        # Another thread may start one just now.
        with suppress(RuntimeError):
            return server_pids()


def _ours(parents: Mapping[int, int | None]) -> tuple[set[int], set[int]]:
    """Return our processes: those of this run's tree, and those in containers of its servers.

    Args:
        parents: Process id to that of its parent, for all that run.
    """
    family = _tree({_root()}, parents)
    # A container's processes descend from its engine, not from us.
    servers = _servers() - family
    if _family:
        servers |= {pid for pid in parents.keys() - family if boxed_by(pid) in family}
    return family, _tree(servers & parents.keys(), parents) - family


def _siblings(parents: Mapping[int, int | None]) -> set[int]:
    """Return the run's other workers, without what they started.

    Their servers leave ours alone by their leases. But a worker that writes a model, or runs tests
    that measure nothing, holds no lease and takes cores from what is measured.
    """
    return {pid for pid, parent in parents.items() if parent in _family and pid != os.getpid()}


def _tree(roots: set[int], parents: Mapping[int, int | None]) -> set[int]:
    """Return processes with all that descend from them."""
    children: dict[int, list[int]] = {}
    for pid, parent in parents.items():
        if parent is not None:
            children.setdefault(parent, []).append(pid)
    found: set[int] = set()
    left = list(roots)
    while left:
        pid = left.pop()
        if pid not in found:
            found.add(pid)
            left += children.get(pid, [])
    return found


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
