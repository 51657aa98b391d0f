"""GPUs and the host, leased to what measures: one thing at a time on each of them.

A lease is a set of lock files, one a card and one for the host, that the kernel frees when their
holder dies. What needs the machine for itself locks them all; what only needs GPUs locks as many
cards, and shares the lock of the host with others that measure on the rest meanwhile. So it keeps
away whoever needs the host, also one that cannot see its cards, as in another container.

Nobody waits in a circle. Locks are collected by whoever holds the turnstile, a lock file too, and
kept from the first to the last. So there is one collector at a time, and all that it waits for is
held by leases that are complete: these want nothing more (a lease cannot grow), so they end by
themselves, without the turnstile, and what they free only the collector can take. For the same
reason nobody starves once the turnstile is theirs: what needs two cards gets them as soon as two
leases have ended, since no further one can begin.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from weakref import WeakSet

import psutil

from pytest_llmperf.errors import RunError
from pytest_llmperf.gpu.cards import Gpu
from pytest_llmperf.plain import plain

_POLL_S = 0.05
_TELL_S = 10.0
_HOST, _TURN = "host", "turn"
# On a machine of several users another one's lock file has to be opened for writing.
_LOCK_MODE = 0o666
_NOTE_MODE = 0o644
_START_FIELD = 19
"""Place of a process's start behind its name in ``/proc/PID/stat``."""


@dataclass(frozen=True, slots=True)
class _Lease:
    cards: tuple[Gpu, ...]
    exclusive: bool
    locks: dict[str, int]


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
        _every.add(self)

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
        locks: dict[str, int] = {}
        try:
            self._collect(locks, (_TURN,), 1, wanted)
            if not exclusive:
                self._collect(locks, (_HOST,), 1, (_HOST,), shared=True)
            self._collect(locks, wanted, len(wanted) if exclusive else gpus, wanted)
            for name in wanted:
                if name in locks:
                    self._sign(name, what)
            # Last of all, or whoever comes next would find locks that nobody has signed.
            self._free({_TURN: locks.pop(_TURN)})
        except BaseException:
            self._free(locks)
            raise
        return _Lease(tuple(card for card in cards if _lock_of(card) in locks), exclusive, locks)

    def _collect(
        self,
        locks: dict[str, int],
        names: Sequence[str],
        count: int,
        blamed: Sequence[str],
        *,
        shared: bool = False,
    ) -> None:
        """Lock so many of these, keeping each that is had, and telling whom it waits for.

        Args:
            locks: Gets those that are had.
            names: Of the locks.
            count: How many of them.
            blamed: Names of those whose holders are told.
            shared: Whether others may share them.
        """
        tell = time.monotonic() + _POLL_S
        while True:
            for name in names:
                if name not in locks and len(locks.keys() & set(names)) < count:
                    lock = self._try(name, shared=shared)
                    if lock is not None:
                        locks[name] = lock
            if len(locks.keys() & set(names)) == count:
                return
            if time.monotonic() >= tell:
                tell = time.monotonic() + _TELL_S
                others = self._holders([name for name in blamed if name not in locks])
                self._progress(f"waiting for {others} to finish measuring")
            time.sleep(_POLL_S)

    def _try(self, name: str, *, shared: bool) -> int | None:
        """Return the descriptor of a lock file that is locked now, None if another holds it."""
        path = self.folder / f"{name}.lock"
        try:
            _make_like_its_parent(self.folder)
            return _locked(path, shared=shared)
        except PermissionError as error:
            raise RunError(
                f"cannot lock {path}: {error.strerror}; let all who measure on this machine write "
                "to it and its folder, or set LLMPERF_CACHE"
            ) from error
        except OSError as error:
            raise RunError(f"cannot lock {path}: {error.strerror}; set LLMPERF_CACHE") from error

    def _free(self, locks: dict[str, int]) -> None:
        for name, lock in locks.items():
            # While the lock is still ours: the next holder's note must not be taken away. Of the
            # host's, which several may share, only who has signed it takes the note away.
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
                if self._read(name)["pid"] == os.getpid():
                    self._note(name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                # Closing is not enough where somebody has forked meanwhile.
                fcntl.flock(lock, fcntl.LOCK_UN)
            os.close(lock)

    def _forget(self) -> None:
        """Hold nothing, in a child of the process that does; that one keeps its lease."""
        self._guard = Lock()
        lease, self._lease, self._depth = self._lease, None, 0
        for lock in lease.locks.values() if lease is not None else ():
            with contextlib.suppress(OSError):
                os.close(lock)

    def _note(self, name: str) -> Path:
        return self.folder / f"{name}.holder"

    def _read(self, name: str) -> dict[str, object]:
        told: dict[str, object] = json.loads(self._note(name).read_text("utf-8"))
        return told

    def _sign(self, name: str, what: str) -> None:
        """Say beside a lock who holds it; the lock itself is the kernel's."""
        path, pid = self._note(name), os.getpid()
        # Whatever is wrong with it, as a folder that is gone, measuring goes on.
        with contextlib.suppress(OSError):
            told = {"pid": pid, "started": _started(pid), "folder": _folder(), "what": what}
            # One that another user left can be removed, but not written.
            path.unlink(missing_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            with os.fdopen(os.open(path, flags, _NOTE_MODE), "w", encoding="utf-8") as file:
                # Others read it, whatever the umask.
                os.fchmod(file.fileno(), _NOTE_MODE)
                json.dump(told, file)

    def _holders(self, names: Sequence[str]) -> str:
        """Return who holds these locks, in words."""
        found: dict[str, None] = {}
        for name in names:
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError, OverflowError):
                told = self._read(name)
                pid, what, folder = int(str(told["pid"])), told["what"], told["folder"]
                # One that was killed left its note, but not its lock; its number may be another's.
                if _is(pid, str(told["started"])):
                    found[plain(f"pid {pid} ({what}, in {folder})", kept="")] = None
        return " and ".join(found) or "another run on this machine"


_every: WeakSet[Leases] = WeakSet()


def _forget_all() -> None:
    for leases in list(_every):
        leases._forget()  # noqa: SLF001 - of this module


# A child that lives longer than its parent must not hold what that held.
os.register_at_fork(after_in_child=_forget_all)


def _make_like_its_parent(folder: Path) -> None:
    """Make a folder that those may write to who may write to the folder it is in.

    Whoever comes first makes it, with whatever umask, and all others need it.
    """
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        if not folder.is_dir():
            raise
        return
    with contextlib.suppress(OSError):
        folder.chmod(stat.S_IMODE(folder.parent.stat().st_mode))


def _locked(path: Path, *, shared: bool) -> int | None:
    """Return the descriptor of a file that is locked now, None if it is locked already."""
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        # Not in one step: in a folder like /tmp the kernel refuses to make what another one made.
        try:
            descriptor = os.open(path, flags | os.O_CREAT | os.O_EXCL, _LOCK_MODE)
        except FileExistsError:
            return None  # made this very moment: next time
        os.fchmod(descriptor, _LOCK_MODE)
    try:
        how = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _started(pid: int) -> str:
    """Return when a process started, in the kernel's own count; ``""`` if it cannot be seen."""
    try:
        told = Path(f"/proc/{pid}/stat").read_bytes()
        return told.rpartition(b")")[2].split()[_START_FIELD].decode()
    except (OSError, LookupError, ValueError):
        return ""


def _is(pid: int, started: str) -> bool:
    """Return whether a process is the one that started then, as far as it can be seen."""
    seen = _started(pid)
    return seen == started if seen else psutil.pid_exists(pid)


def _folder() -> str:
    try:
        return str(Path.cwd())
    except OSError:
        return "a folder that is gone"


def _counted(gpus: int) -> str:
    return f"{gpus} GPU{'' if gpus == 1 else 's'}"


def _lock_of(card: Gpu) -> str:
    """Return the name of a card's lock; an id of a MIG instance may hold slashes."""
    return "gpu-" + re.sub(r"[^\w.-]", "_", card.uuid)
