"""Measures a config by its servers: which start when, and who is asked first."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

from pytest_llmperf.build.build import Build
from pytest_llmperf.campaign.base import Campaign, PairedLaunches, Partial, wandering
from pytest_llmperf.errors import OutOfMemoryError, RunError, TooSlowError, blamed_on
from pytest_llmperf.measure.launch import Launch, Session, text_tokens
from pytest_llmperf.measure.on_gpu import OnGpu
from pytest_llmperf.plan.config import LAUNCH, Workload
from pytest_llmperf.preflight import fits_twice, weights_mib
from pytest_llmperf.serve.launch import start

# Weights are not all: KV cache, compute buffers, the runtime. Measured on small models the rest
# is a few tens of MiB; on big ones it is well below a fifth of the weights.
_OVERHEAD = 1.25
_SPARE_MIB = 1024.0


class _CrowdedError(Exception):
    """The second server of a block found too little memory."""


@dataclass(slots=True)
class ServerCampaign(Campaign):
    """The measuring of one config by llama-server; both builds are warm together if they fit."""

    _tokens: list[int] = field(default_factory=list)
    _crowded: bool = False

    def _run_block(self, what: str) -> PairedLaunches:
        base = self._second()
        if not self._crowded and self._fits_twice():
            before = dict(self.failures)
            try:
                pair = self._run_together(base, self.new, what)
            except _CrowdedError:
                self._crowded = True
            else:
                lacked = [self.failures[name] for name in self.failures.keys() - before.keys()]
                self._crowded = any(isinstance(one, OutOfMemoryError) for one in lacked)
            if not self._crowded:
                return pair
            # What lacks memory with another server beside it may have enough by itself.
            self.failures = before
            self._say(f"{what}: both builds at once do not fit, so they take turns")
        return self._run_apart(base, self.new, what)

    def _open(self, build: Build, what: str, instead: OnGpu | None = None) -> Session:
        self._say(f"{what}: starting {build.label}")
        with blamed_on(build.identity), ExitStack() as undo:
            # From before the start: what it takes to load may be the most that it ever takes.
            on_gpu = self._on_gpu(build, instead)
            undo.callback(on_gpu.end, (), build.label, check=False)
            server = start(build, self.config, self.files, self.serve)
            undo.callback(server.stop)
            if not self._tokens:
                # Tokenized once: both builds are asked the same ids, even if one of them
                # would cut the text differently.
                self._tokens = text_tokens(server)
            session = Session(server, self._tokens, on_gpu)
            session.settle()
            undo.pop_all()
        return session

    def _close(self, sessions: Iterable[Session], *, check: bool = True) -> None:
        """Stop servers, and then see whether one left anything: until then others' is there.

        Whatever goes wrong with one, the others are stopped too.
        """
        with ExitStack() as left:
            for session in sessions:
                left.callback(session.close, check=check)
            # What is put there last is done first.
            for session in sessions:
                left.callback(session.stop)

    def _guarded(self, workload: Workload, session: Session, work: Callable[[], None]) -> bool:
        """Do the work; return whether the server is fit for more. A failure is the workload's."""
        launch = session.launch
        begun = session.begun.setdefault(workload.name, launch.requests)
        try:
            with blamed_on(session.server.build.identity):
                work()
        except RunError as error:
            self.failures[workload.name] = error
            self.partial[workload.name] = Partial(
                build=session.server.build.label,
                how=_how(error),
                answered=launch.requests - begun,
                asked=len(workload.turns) * workload.parallel * (self.pairs + session.warm_ups),
                samples=launch.samples.pop(workload.name, {}),
            )
            # A server that hangs would let every further request hang behind this one.
            hung = getattr(error, "kind", "") == "timeout"
            return session.server.alive() and not hung
        return True

    def _run_alone(self, build: Build, what: str) -> Launch:
        session = self._open(build, what)
        try:
            watch = self._watch()
            for workload in self._live():
                self._say(f"{what}: {build.label} {workload.name}")
                work = partial(self._ask_one, workload, session)
                if not self._guarded(workload, session, work) and self._more_after(workload):
                    session = self._reopen(session, what)
            disturbed = self._disturbed(watch, session.disturbed)
            session.launch.disturbed = disturbed or wandering(session.launch)
        except BaseException:
            session.close(check=False)
            raise
        session.close()
        return session.launch

    def _ask_one(self, workload: Workload, session: Session) -> None:
        session.warm_up(workload)
        for _ in range(self.pairs):
            session.sample(workload)

    def _more_after(self, workload: Workload) -> bool:
        """Return whether anything is left to ask once a workload is done."""
        return workload in self.workloads and any(
            one.name not in self.failures
            for one in self.workloads[self.workloads.index(workload) + 1 :]
        )

    def _reopen(self, dead: Session, what: str, *, alone: bool = True) -> Session:
        """Start again what died or hangs, and go on with the workloads that did not kill it.

        Args:
            dead: Its session.
            what: Names the unit for people.
            alone: Whether no other server runs meanwhile.
        """
        dead.close(alone=alone)
        again = f"{what}, again after a crash"
        session = self._open(dead.server.build, again, None if alone else dead.on_gpu)
        launch = session.launch
        launch.samples = {**dead.launch.samples, LAUNCH: launch.samples[LAUNCH]}
        launch.digests = {**dead.launch.digests, **launch.digests}
        launch.requests += dead.launch.requests
        return session

    def _run_together(self, base: Build, new: Build, what: str) -> PairedLaunches:
        orders: dict[str, str] = {}
        sides: dict[str, Session] = {}
        try:
            # Who starts first is a coin flip too: the second finds warmer file caches.
            for side in self._flip():
                for session in sides.values():
                    session.share()
                try:
                    sides[side] = self._open(base if side == "b" else new, what)
                except OutOfMemoryError as error:
                    if sides:
                        raise _CrowdedError from error
                    raise
            for session in sides.values():
                session.share()
            watch = self._watch()
            for workload in self._live():
                self._say(f"{what}: {workload.name}, {base.label} against {new.label}")
                orders[workload.name] = self._ask_both(workload, sides, what)
            on_gpu = next(filter(None, (one.disturbed for one in sides.values())), "")
            disturbed = self._disturbed(watch, on_gpu)
            for session in sides.values():
                session.launch.disturbed = disturbed
        except BaseException:
            self._close(sides.values(), check=False)
            raise
        self._close(sides.values())
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
                fit = self._guarded(workload, session, partial(step, workload))
                if not fit and self._more_after(workload):
                    sides[side] = self._reopen(session, what, alone=False)
                    sides[side].share()
                if workload.name in self.failures:
                    for either in sides.values():
                        either.launch.samples.pop(workload.name, None)
                    return first
            first += order[0] if pair else ""
        return first

    def _fits_twice(self) -> bool:
        """Return whether both servers have room to be warm at once."""
        if self.new.url is not None or (self.base is not None and self.base.url is not None):
            return True
        need = weights_mib(self.files) * _OVERHEAD * 2 + _SPARE_MIB
        return fits_twice(need, gpu=self.config.gpu, cards=self.serve.cards or None)


def _how(error: RunError) -> str:
    """Return how a server failed, in a word or two."""
    if isinstance(error, OutOfMemoryError):
        return "ran out of memory"
    if isinstance(error, TooSlowError):
        return "was given up as too slow"
    kind = getattr(error, "kind", "")
    return {"crashed": "crashed", "timeout": "hung"}.get(kind, "failed")
