"""What all measuring of one config has in common: which launches exist, and whether to trust them.

A campaign makes launches on demand and keeps them, so that every test of the config draws on
the same ones: a build starts once a block however many tests and workloads look at it.
"""

from __future__ import annotations

import contextlib
import math
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol, TypeVar

from pytest_llmperf.build.build import Build
from pytest_llmperf.errors import LlmperfError, OutOfMemoryError, RunError
from pytest_llmperf.leases import Leases
from pytest_llmperf.measure.host import Watch, unsteady
from pytest_llmperf.measure.launch import Launch
from pytest_llmperf.measure.on_gpu import OnGpu
from pytest_llmperf.plan.config import LAUNCH, Config, ModelFiles, Workload
from pytest_llmperf.preflight import gpu_warnings, require_disk, require_memory
from pytest_llmperf.serve.launch import ServePlan, needs, server_options

_TRIES = 4
_QUIET_WAIT_S = 30.0
# NVML tells a process's use of a GPU once a second.
_QUIET_LOOK_S = 1.5


class _Unit(Protocol):
    @property
    def disturbed(self) -> str: ...


Unit = TypeVar("Unit", bound=_Unit)


@dataclass(frozen=True, slots=True)
class PairedLaunches:
    """One block: both builds started afresh and asked the same things.

    Attributes:
        base: The baseline's launch.
        new: The launch of the build under test.
        together: Whether both were warm together and the pairs interleaved; if not, one ran
            after the other.
        orders: Workload name to the coin flips: ``b`` the baseline went first, ``n`` the other.
    """

    base: Launch
    new: Launch
    together: bool
    orders: Mapping[str, str]

    @property
    def disturbed(self) -> str:
        """What disturbed either launch, ``""`` if nothing did."""
        return self.base.disturbed or self.new.disturbed


@dataclass(frozen=True, slots=True)
class Partial:
    """What a server answered of a workload before it failed; shown, and never judged.

    Attributes:
        build: Label of its build.
        how: How it failed, in a word or two: ``crashed``.
        answered: Requests that it answered, warm-ups included.
        asked: Requests that it would have been asked.
        samples: Metric name to the samples that were taken.
    """

    build: str
    how: str
    answered: int
    asked: int
    samples: Mapping[str, Sequence[float]]


@dataclass(slots=True)
class Campaign(ABC):
    """The measuring of one config; its kinds differ in which program of a build does the work.

    Attributes:
        config: The config.
        workloads: Those that the selected tests ask for, in the order of the suite file.
        new: The build under test.
        base: The build to measure side by side, or None to measure the one alone.
        files: What its servers load; without a meaning where both sides already run.
        serve: Run folder, limits and progress; while something is measured, also the GPUs.
        pairs: Pairs of requests a workload and block; samples a launch when measured alone.
        leases: Keeps other measuring away from its GPUs, or from the whole machine.
        rng: Coin flips.
        failures: Workload name (or :data:`LAUNCH` for all) to what went wrong.
        partial: Workload name to what was answered of it before that.
        before: Called before the first server of a block starts.
        foreign_load: Cores that other programs may keep busy while something is measured.
    """

    config: Config
    workloads: Sequence[Workload]
    new: Build
    base: Build | None
    files: ModelFiles
    serve: ServePlan
    pairs: int
    leases: Leases
    rng: random.Random
    before: Callable[[], None] = lambda: None
    foreign_load: float = math.inf
    failures: dict[str, LlmperfError] = field(default_factory=dict)
    partial: dict[str, Partial] = field(default_factory=dict)
    _blocks: list[PairedLaunches] = field(default_factory=list)
    _launches: list[Launch] = field(default_factory=list)
    _apart: dict[bool, Campaign] = field(default_factory=dict)
    _needs: tuple[int, bool] | None = None

    @abstractmethod
    def _run_alone(self, build: Build, what: str) -> Launch:
        """Measure every workload on one fresh start of a build; ``what`` names it for people."""

    def _run_block(self, what: str) -> PairedLaunches:
        """Measure every workload on one fresh start of each build."""
        return self._run_apart(self._second(), self.new, what)

    def block(self, index: int) -> PairedLaunches:
        """Return the block of this index, measuring until it exists.

        Raises:
            LlmperfError: If a server of the config cannot be started or measured at all.
        """
        while len(self._blocks) <= index:
            self._check()
            with self._measuring():
                what = f"block {len(self._blocks) + 1}"
                self._blocks.append(self._steadily(what, self._run_block))
        return self._blocks[index]

    def launch(self, index: int) -> Launch:
        """Return the launch of this index of the build under test, measuring until it exists.

        Raises:
            LlmperfError: If the server cannot be started or measured at all.
        """
        while len(self._launches) <= index:
            self._check()
            with self._measuring():
                what = f"launch {len(self._launches) + 1}"
                self._launches.append(self._steadily(what, partial(self._run_alone, self.new)))
        return self._launches[index]

    def alone(self, *, base: bool) -> Campaign:
        """Return a campaign of one of both builds alone, to see which of them a failure is of.

        Args:
            base: That of the baseline, not the one under test.
        """
        if base not in self._apart:
            self._apart[base] = replace(
                self,
                new=self._second() if base else self.new,
                base=None,
                failures={},
                partial={},
                _blocks=[],
                _launches=[],
                _apart={},
                # Of a running server alone it would be another lease, in the middle of this one.
                _needs=self.needs,
            )
        return self._apart[base]

    def blames(self, error: LlmperfError) -> bool:
        """Return whether it was a program of the build under test that failed."""
        return error.build == self.new.identity

    @property
    def endpoint(self) -> bool:
        """Whether a side is a running server, so that its launches are one start in truth."""
        return any(build is not None and build.url is not None for build in (self.new, self.base))

    @property
    def needs(self) -> tuple[int, bool]:
        """Cards that it is measured on, and whether nothing else may run on the machine."""
        return self._needs or needs(self.config, (self.base, self.new))

    @property
    def measured(self) -> tuple[int, int]:
        """Return how many blocks and single launches exist so far."""
        return len(self._blocks), len(self._launches)

    def _check(self) -> None:
        if LAUNCH in self.failures:
            raise self.failures[LAUNCH]

    @contextlib.contextmanager
    def _measuring(self) -> Iterator[None]:
        self.before()
        try:
            gpus, exclusive = self.needs
            what = f"config {self.config.name}"
            with self.leases.hold(gpus, exclusive=exclusive, what=what) as cards:
                self.serve = replace(self.serve, cards=cards)
                self._preflight()
                yield
        except LlmperfError as error:
            # Not to be tried again by every test of this config.
            self.failures[LAUNCH] = error
            raise
        finally:
            self.serve = replace(self.serve, cards=())

    def _preflight(self) -> None:
        """Refuse what cannot go well, before anything of a unit is started."""
        builds = [one for one in (self.base, self.new) if one is not None and one.url is None]
        for folder in (self.serve.folder, self.leases.folder):
            require_disk(folder)
        for build in builds:
            options = server_options(build, self.config)
            require_memory(self.config.name, build, self.files, options)
        if builds and self.config.gpu:
            for line in gpu_warnings(self.serve.cards or None):
                self._say(line)

    def _steadily(self, what: str, measure: Callable[[str], Unit]) -> Unit:
        """Measure, and measure again while something disturbs it; the last try is kept as it is.

        A disturbance that lasts is not to be tried again by every test: it stays with the unit.
        So it does where a further try runs out of memory: what fitted does not fit beside others.
        """
        unit = measure(what)
        for _ in range(_TRIES - 1):
            if not unit.disturbed:
                break
            self._say(f"{what} is measured again: {unit.disturbed}")
            self._wait_for_quiet(what)
            try:
                unit = measure(what)
            except OutOfMemoryError as error:
                self._say(f"{what} stays as it was: {str(error).splitlines()[0]}")
                break
        return unit

    def _wait_for_quiet(self, what: str) -> None:
        until = time.monotonic() + _QUIET_WAIT_S
        while time.monotonic() < until:
            watch, on_gpu = Watch(), self._on_gpu()
            try:
                time.sleep(_QUIET_LOOK_S)
                told = self._disturbed(watch, on_gpu.disturbed)
            finally:
                on_gpu.stop()
            if not told:
                return
            self._say(f"{what} waits for a quiet machine: {told}")

    def _say(self, what: str) -> None:
        self.serve.progress(f"{self.config.name}: {what}")

    def _live(self) -> list[Workload]:
        return [workload for workload in self.workloads if workload.name not in self.failures]

    def _on_gpu(self, build: Build | None = None, instead: OnGpu | None = None) -> OnGpu:
        """Return a look at the GPUs of a program that is about to start.

        Args:
            build: Its build: which GPUs a running server has is its own affair. None for a look
                at the GPUs before any program.
            instead: As of :class:`~pytest_llmperf.measure.on_gpu.OnGpu`.
        """
        own = self.config.gpu and (build is None or build.url is None)
        cards = self.serve.cards if own else ()
        return OnGpu(cards, self._say, instead=instead, guests=self.endpoint)

    def _watch(self) -> Watch | None:
        return Watch() if math.isfinite(self.foreign_load) else None

    def _disturbed(self, watch: Watch | None, on_gpu: str) -> str:
        """Return what disturbed the host since the watch began, or else the GPUs."""
        return "" if watch is None else watch.load().told(self.foreign_load) or on_gpu

    def _second(self) -> Build:
        if self.base is None:
            raise RunError("there is no second build to measure side by side")
        return self.base

    def _run_apart(self, base: Build, new: Build, what: str) -> PairedLaunches:
        """Measure one build after the other, in the order of a coin flip."""
        order = self._flip()
        launches = {side: self._run_alone(base if side == "b" else new, what) for side in order}
        return PairedLaunches(
            base=launches["b"],
            new=launches["n"],
            together=False,
            orders={workload.name: order[0] for workload in self._live()},
        )

    def _flip(self) -> str:
        return self.rng.choice(("bn", "nb"))


def wandering(launch: Launch) -> str:
    """Return which workload's samples drift or scatter beyond use, ``""`` if none does.

    Pairs need no such look: what wanders under both builds cancels in their ratios.
    """
    for workload, samples in launch.samples.items():
        for metric in ("decode_tps", "prefill_tps"):
            if told := unsteady(samples.get(metric, [])):
                return f"{workload} {metric}: {told}"
    return ""
