"""All measuring of one config in one run: which servers start when, and who is asked first.

A campaign makes launches on demand and keeps them, so that every test of the config draws on
the same ones: a server starts once a block however many tests and workloads look at it.
"""

from __future__ import annotations

import contextlib
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import psutil

from pytest_llmperf.build.build import Build
from pytest_llmperf.errors import LlmperfError, RunError, ServerError
from pytest_llmperf.measure.gpu import free_mib
from pytest_llmperf.measure.host import Watch, unsteady
from pytest_llmperf.measure.launch import Launch, Session
from pytest_llmperf.measuring import measuring
from pytest_llmperf.models.locate import parts
from pytest_llmperf.models.text import text
from pytest_llmperf.plan.config import LAUNCH, Config, Workload
from pytest_llmperf.serve.launch import ServePlan, start

_MIB = 1024 * 1024
# Weights are not all: KV cache, compute buffers, the runtime. Measured on small models the rest
# is a few tens of MiB; on big ones it is well below a fifth of the weights.
_OVERHEAD = 1.25
_SPARE_MIB = 1024.0

_TRIES = 4
_QUIET_WAIT_S = 30.0
_QUIET_LOOK_S = 0.5


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


@dataclass(slots=True)
class Campaign:
    """The measuring of one config.

    Attributes:
        config: The config.
        workloads: Those that the selected tests ask for, in the order of the suite file.
        new: The build under test.
        base: The build to measure side by side, or None to measure the one alone.
        model: The GGUF file.
        serve: Run folder, limits and progress.
        pairs: Pairs of requests a workload and block; samples a launch when measured alone.
        lock: Lock file that keeps other measuring on this machine away.
        rng: Coin flips.
        failures: Workload name (or :data:`LAUNCH` for all) to what went wrong.
        before: Called before the first server of a block starts.
        foreign_load: Cores that other programs may keep busy while something is measured.
    """

    config: Config
    workloads: Sequence[Workload]
    new: Build
    base: Build | None
    model: Path
    serve: ServePlan
    pairs: int
    lock: Path
    rng: random.Random
    before: Callable[[], None] = lambda: None
    foreign_load: float = math.inf
    failures: dict[str, LlmperfError] = field(default_factory=dict)
    _tokens: list[int] = field(default_factory=list)
    _blocks: list[PairedLaunches] = field(default_factory=list)
    _launches: list[Launch] = field(default_factory=list)

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

    @property
    def endpoint(self) -> bool:
        """Whether a side is a running server, so that its launches are one start in truth."""
        return any(build is not None and build.url is not None for build in (self.new, self.base))

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
            with measuring(self.lock, self.serve.progress):
                yield
        except LlmperfError as error:
            # Not to be tried again by every test of this config.
            self.failures[LAUNCH] = error
            raise

    def _steadily(self, what: str, measure: Callable[[str], Unit]) -> Unit:
        """Measure, and measure again while something disturbs it; the last try is kept as it is.

        A disturbance that lasts is not to be tried again by every test: it stays with the unit.
        """
        unit = measure(what)
        for _ in range(_TRIES - 1):
            if not unit.disturbed:
                break
            self._say(f"{what} is measured again: {unit.disturbed}")
            self._wait_for_quiet(what)
            unit = measure(what)
        return unit

    def _wait_for_quiet(self, what: str) -> None:
        until = time.monotonic() + _QUIET_WAIT_S
        while time.monotonic() < until:
            watch = Watch()
            time.sleep(_QUIET_LOOK_S)
            told = watch.load().told(self.foreign_load)
            if not told:
                return
            self._say(f"{what} waits for a quiet machine: {told}")

    def _say(self, what: str) -> None:
        self.serve.progress(f"{self.config.name}: {what}")

    def _open(self, build: Build, what: str) -> Session:
        self._say(f"{what}: starting {build.label}")
        server = start(build, self.config, self.model, self.serve)
        try:
            if not self._tokens:
                # Tokenized once: both builds are asked the same ids, even if one of them
                # would cut the text differently.
                self._tokens = server.client.tokenize(text())
            session = Session(server, self._tokens)
            session.settle()
        except BaseException:
            server.stop()
            raise
        return session

    def _live(self) -> list[Workload]:
        return [workload for workload in self.workloads if workload.name not in self.failures]

    def _guarded(self, workload: Workload, session: Session, work: Callable[[], None]) -> bool:
        """Do the work; return whether the server is fit for more. A failure is the workload's."""
        try:
            work()
        except RunError as error:
            self.failures[workload.name] = error
            session.launch.samples.pop(workload.name, None)
            # A server that hangs would let every further request hang behind this one.
            hung = isinstance(error, ServerError) and error.kind == "timeout"
            return session.server.alive() and not hung
        return True

    def _run_alone(self, build: Build, what: str) -> Launch:
        session = self._open(build, what)
        watch = self._watch()
        try:
            for workload in self._live():
                self._say(f"{what}: {build.label} {workload.name}")
                if not self._guarded(workload, session, partial(self._ask_one, workload, session)):
                    session = self._reopen(session, what)
            session.launch.disturbed = self._disturbed(watch) or _wandering(session.launch)
        finally:
            session.server.stop()
        return session.launch

    def _watch(self) -> Watch | None:
        return Watch() if math.isfinite(self.foreign_load) else None

    def _disturbed(self, watch: Watch | None) -> str:
        return "" if watch is None else watch.load().told(self.foreign_load)

    def _ask_one(self, workload: Workload, session: Session) -> None:
        session.warm_up(workload)
        for _ in range(self.pairs):
            session.sample(workload)

    def _reopen(self, dead: Session, what: str) -> Session:
        """Start again what died or hangs, and go on with the workloads that did not kill it."""
        dead.server.stop()
        session = self._open(dead.server.build, f"{what}, again after a crash")
        launch = session.launch
        launch.samples = {**dead.launch.samples, LAUNCH: launch.samples[LAUNCH]}
        launch.digests = {**dead.launch.digests, **launch.digests}
        launch.requests += dead.launch.requests
        return session

    def _run_block(self, what: str) -> PairedLaunches:
        if self.base is None:
            raise RunError("there is no second build to measure side by side")
        if not self._fits_twice():
            order = self._flip()
            launches = {
                side: self._run_alone(self.base if side == "b" else self.new, what)
                for side in order
            }
            return PairedLaunches(
                base=launches["b"],
                new=launches["n"],
                together=False,
                orders={w.name: order[0] for w in self._live()},
            )
        return self._run_together(self.base, self.new, what)

    def _run_together(self, base: Build, new: Build, what: str) -> PairedLaunches:
        orders: dict[str, str] = {}
        sides: dict[str, Session] = {}
        try:
            # Who starts first is a coin flip too: the second finds warmer file caches.
            for side in self._flip():
                sides[side] = self._open(base if side == "b" else new, what)
            watch = self._watch()
            for workload in self._live():
                self._say(f"{what}: {workload.name}, {base.label} against {new.label}")
                orders[workload.name] = self._ask_both(workload, sides, what)
            disturbed = self._disturbed(watch)
            for session in sides.values():
                session.launch.disturbed = disturbed
        finally:
            for session in sides.values():
                session.server.stop()
        return PairedLaunches(sides["b"].launch, sides["n"].launch, together=True, orders=orders)

    def _ask_both(self, workload: Workload, sides: dict[str, Session], what: str) -> str:
        """Warm both servers up, then sample pairs; return who went first in each pair."""
        first = ""
        for pair in range(self.pairs + 1):
            order = self._flip()
            for side in order:
                session = sides[side]
                # Pair 0 is the warm-up, right before the timing and of the same shape.
                step = session.sample if pair else session.warm_up
                if not self._guarded(workload, session, partial(step, workload)):
                    sides[side] = self._reopen(session, what)
                if workload.name in self.failures:
                    for either in sides.values():
                        either.launch.samples.pop(workload.name, None)
                    return first
            first += order[0] if pair else ""
        return first

    def _flip(self) -> str:
        return self.rng.choice(("bn", "nb"))

    def _fits_twice(self) -> bool:
        """Return whether both servers have room to be warm at once.

        On a GPU, ``--fit`` shapes a server by the memory it finds free, so there must be far
        more than both need, or the second would be another config than the first.
        """
        if self.new.url is not None or (self.base is not None and self.base.url is not None):
            return True
        weights = sum(part.stat().st_size for part in parts(self.model)) / _MIB
        need = weights * _OVERHEAD * 2 + _SPARE_MIB
        if psutil.virtual_memory().available / _MIB < need:
            return False
        if not self.config.gpu:
            return True
        free = free_mib()
        return bool(free) and min(free.values()) > 2 * need


def _wandering(launch: Launch) -> str:
    """Return which workload's samples drift or scatter beyond use, ``""`` if none does.

    Pairs need no such look: what wanders under both builds cancels in their ratios.
    """
    for workload, samples in launch.samples.items():
        for metric in ("decode_tps", "prefill_tps"):
            if told := unsteady(samples.get(metric, [])):
                return f"{workload} {metric}: {told}"
    return ""
