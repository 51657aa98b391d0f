"""GPUs and the host, leased to what measures: one thing at a time on each of them.

A lease is a set of lock files, one a card and one for the host, that the kernel frees when their
holder dies. What needs the machine for itself takes them all; what only needs GPUs takes as many
cards, and others may measure on the rest meanwhile.

Nobody waits in a circle. Locks are collected by whoever holds the turnstile, a lock file too, and
kept from the first to the last. So there is one collector at a time, and all that it waits for is
held by leases that are complete: these want nothing more (a lease cannot grow), so they end by
themselves, without the turnstile, and what they free only the collector can take. For the same
reason nobody starves once the turnstile is theirs: what needs two cards gets them as soon as two
leases have ended, since no further one can begin.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import psutil
from filelock import FileLock, Timeout

from pytest_llmperf.errors import RunError
from pytest_llmperf.gpu.cards import Gpu

_POLL_S = 0.05
_TELL_S = 10.0
_HOST, _TURN = "host", "turn"
# On a machine of several users another one's lock file has to be opened for writing.
_MODE = 0o666


@dataclass(frozen=True, slots=True)
class _Lease:
    cards: tuple[Gpu, ...]
    exclusive: bool
    locks: tuple[tuple[str, FileLock], ...]


class Leases:
    """GPUs and the host, leased by lock files that the kernel frees when their holder dies.

    The threads of a process share what it holds.

    Args:
        folder: Where the lock files are: the same one for all that measures on this machine.
        cards: GPUs to lease, in their order. Without any, as where no NVIDIA card is, each lease
            is one of the whole machine.
        machine: Every GPU of the machine, also what ``CUDA_VISIBLE_DEVICES`` hides.
        progress: Is told whom a lease waits for.
        first: Which card to prefer, by its place in ``cards``: the number of a worker.

    Attributes:
        folder: As given.
    """

    def __init__(
        self,
        folder: Path,
        cards: Sequence[Gpu],
        machine: Sequence[Gpu],
        progress: Callable[[str], None],
        first: int = 0,
    ) -> None:
        self.folder = folder
        self._cards = tuple(cards)
        self._all = tuple(dict.fromkeys(_lock_of(card) for card in (*machine, *cards)))
        self._progress = progress
        self._first = first
        self._last: tuple[Gpu, ...] = ()
        self._lease: _Lease | None = None
        self._depth = 0
        self._guard = Lock()

    @property
    def held(self) -> tuple[Gpu, ...]:
        """The cards of the lease that is held now: of one of the whole machine, all there are."""
        return self._lease.cards if self._lease is not None else ()

    def covers(self, gpus: int, *, exclusive: bool) -> bool:
        """Return whether what is held now is enough for such a need.

        Args:
            gpus: Cards.
            exclusive: Whether the host and all other cards are to be idle.
        """
        lease = self._lease
        if lease is None:
            return False
        exclusive = self._is_exclusive(gpus, exclusive=exclusive)
        enough = gpus <= len(lease.cards) or not self._cards
        return enough and (lease.exclusive or not exclusive)

    @contextlib.contextmanager
    def hold(self, gpus: int, *, exclusive: bool, what: str) -> Iterator[tuple[Gpu, ...]]:
        """Hold a lease; within another one that covers it, it is had at once and costs nothing.

        Args:
            gpus: Cards; 0 for what runs on the host, which is always exclusive.
            exclusive: Whether the host and all other cards are to be idle.
            what: What it is for: ``config c7``.

        Yields:
            So many cards; none on a machine without.

        Raises:
            RunError: If the machine has fewer cards, the lock files cannot be had, or the lease
                that is held already is smaller.
        """
        cards = self.acquire(gpus, exclusive=exclusive, what=what)
        try:
            yield cards
        finally:
            self.release()

    def acquire(self, gpus: int, *, exclusive: bool, what: str) -> tuple[Gpu, ...]:
        """Take a lease that outlives the call; :meth:`release` belongs to it.

        Args:
            gpus: Cards; 0 for what runs on the host, which is always exclusive.
            exclusive: Whether the host and all other cards are to be idle.
            what: What it is for: ``config c7``.

        Returns:
            So many cards; none on a machine without.

        Raises:
            RunError: As :meth:`hold`.
        """
        if self._cards and gpus > len(self._cards):
            raise RunError(f"{what} needs {_counted(gpus)}, {self._told()}")
        with self._guard:
            if self._lease is None:
                whole = self._is_exclusive(gpus, exclusive=exclusive)
                self._lease = self._take(gpus, what, exclusive=whole)
                # A config that comes back is measured where it was.
                self._last = self._lease.cards[:gpus] or self._last
            elif not self.covers(gpus, exclusive=exclusive):
                has = "the whole machine" if exclusive else _counted(gpus)
                raise RunError(
                    f"{what} needs {has} within a lease of {_counted(len(self._lease.cards))}: a "
                    "lease cannot grow, release it first"
                )
            self._depth += 1
            return self._lease.cards[:gpus]

    def release(self) -> None:
        """Give back what one :meth:`acquire` took; without one, nothing happens."""
        with self._guard:
            if self._lease is None:
                return
            self._depth -= 1
            if self._depth == 0:
                lease, self._lease = self._lease, None
                self._free(lease.locks)

    # -- inside ----------------------------------------------------------------------------

    def _is_exclusive(self, gpus: int, *, exclusive: bool) -> bool:
        return exclusive or gpus == 0 or not self._cards

    def _told(self) -> str:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        if hidden is None:
            return f"this machine has {len(self._cards)}"
        return f"this machine has {len(self._cards)} with CUDA_VISIBLE_DEVICES={hidden}"

    def _in_order(self) -> tuple[Gpu, ...]:
        """Return the cards, those of the last lease first, then the preferred one."""
        start = self._first % max(len(self._cards), 1)
        turned = (*self._cards[start:], *self._cards[:start])
        return tuple(sorted(turned, key=lambda card: card not in self._last))

    def _take(self, gpus: int, what: str, *, exclusive: bool) -> _Lease:
        cards = self._in_order()
        wanted = (_HOST, *self._all) if exclusive else tuple(map(_lock_of, cards))
        turn = self._collect((_TURN,), 1, wanted)
        try:
            locks = self._collect(wanted, len(wanted) if exclusive else gpus, wanted)
        finally:
            self._free(turn)
        taken = {name for name, _ in locks}
        for name in taken:
            self._sign(name, what)
        return _Lease(tuple(card for card in cards if _lock_of(card) in taken), exclusive, locks)

    def _collect(
        self, names: Sequence[str], count: int, blamed: Sequence[str]
    ) -> tuple[tuple[str, FileLock], ...]:
        """Lock so many of these, keeping each that is had, and telling whom it waits for."""
        locks: dict[str, FileLock] = {}
        tell = time.monotonic() + _POLL_S
        try:
            while True:
                for name in names:
                    if len(locks) < count and name not in locks:
                        lock = self._try(name)
                        if lock is not None:
                            locks[name] = lock
                if len(locks) == count:
                    return tuple(locks.items())
                if time.monotonic() >= tell:
                    tell = time.monotonic() + _TELL_S
                    others = self._holders([name for name in blamed if name not in locks])
                    self._progress(f"waiting for {others} to finish measuring")
                time.sleep(_POLL_S)
        except BaseException:
            self._free(tuple(locks.items()))
            raise

    def _try(self, name: str) -> FileLock | None:
        path = self.folder / f"{name}.lock"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path, mode=_MODE, thread_local=False)
            lock.acquire(blocking=False)
        except Timeout:
            return None
        except OSError as error:
            raise RunError(f"cannot lock {path}: {error.strerror}; set LLMPERF_CACHE") from error
        return lock

    def _free(self, locks: Sequence[tuple[str, FileLock]]) -> None:
        for name, lock in locks:
            # While the lock is still ours: the next holder's note must not be taken away.
            with contextlib.suppress(OSError):
                self._note(name).unlink(missing_ok=True)
            lock.release()

    def _note(self, name: str) -> Path:
        return self.folder / f"{name}.holder"

    def _sign(self, name: str, what: str) -> None:
        """Say beside a lock who holds it; the lock itself is the kernel's."""
        told = {"pid": os.getpid(), "folder": str(Path.cwd()), "what": what}
        with contextlib.suppress(OSError):
            # One that another user left can be removed, but not written.
            self._note(name).unlink(missing_ok=True)
            self._note(name).write_text(json.dumps(told), "utf-8")

    def _holders(self, names: Sequence[str]) -> str:
        """Return who holds these locks, in words."""
        found: dict[str, None] = {}
        for name in names:
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
                told = json.loads(self._note(name).read_text("utf-8"))
                pid, folder, what = int(told["pid"]), told["folder"], told["what"]
                # One that was killed left its note, but not its lock.
                if psutil.pid_exists(pid):
                    found[f"pid {pid} ({what}, in {folder})"] = None
        return " and ".join(found) or "another run on this machine"


def _counted(gpus: int) -> str:
    return f"{gpus} GPU{'' if gpus == 1 else 's'}"


def _lock_of(card: Gpu) -> str:
    """Return the name of a card's lock; an id of a MIG instance may hold slashes."""
    return "gpu-" + re.sub(r"[^\w.-]", "_", card.uuid)
