"""Leases of GPUs and of the host."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

import pytest
from filelock import FileLock
from support.fakes import PATIENCE, eventually

from pytest_llmperf import leases
from pytest_llmperf.errors import RunError, ServerError
from pytest_llmperf.gpu.cards import Gpu
from pytest_llmperf.leases import Leases

ONE, TWO, THREE = CARDS = tuple(
    Gpu(index=index, uuid=f"GPU-{index}", name="card", total_mib=1000, driver="1")
    for index in range(3)
)

PROGRAM = """
import sys, time
from pathlib import Path
from pytest_llmperf.gpu.cards import Gpu
from pytest_llmperf.leases import Leases

folder, cards, gpus, exclusive, rounds, name = sys.argv[1:]
made = [Gpu(n, f"GPU-{n}", "card", 1000, "1") for n in range(int(cards))]
here = Path(folder)
def note(text):
    with (here / "journal").open("a") as file:
        file.write(f"{name} {text}\\n")
def progress(text):
    note("waits")
leases = Leases(here / "locks", made, made, progress)
for _ in range(int(rounds)):
    with leases.hold(int(gpus), exclusive=exclusive == "yes", what=name) as held:
        note("has " + ",".join(card.uuid for card in held))
        while not (here / f"go-{name}").exists():
            time.sleep(0.01)
        note("gives")
"""


class Lab:
    """Processes that hold leases in one folder, until they are told to go on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[subprocess.Popen[bytes]] = []

    def start(
        self, name: str, gpus: int, *, cards: int = 2, exclusive: bool = False, rounds: int = 1
    ) -> subprocess.Popen[bytes]:
        """Start a process that takes a lease so many times."""
        words = [cards, gpus, "yes" if exclusive else "no", rounds, name]
        program = [sys.executable, "-c", PROGRAM, str(self.folder), *map(str, words)]
        self.started.append(subprocess.Popen(program))
        return self.started[-1]

    def go(self, *names: str) -> None:
        """Let processes give back what they have, now and later."""
        for name in names:
            (self.folder / f"go-{name}").touch()

    def journal(self) -> list[str]:
        """Return what has happened so far."""
        path = self.folder / "journal"
        return path.read_text("utf-8").splitlines() if path.exists() else []

    def saw(self, *lines: str) -> bool:
        """Return whether each of these comes to happen."""
        return eventually(lambda: all(line in self.journal() for line in lines))

    def end(self) -> None:
        """Wait for all processes to end well."""
        for process in self.started:
            assert process.wait(PATIENCE) == 0


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    """A folder for processes; those that are left are ended."""
    made = Lab(tmp_path)
    yield made
    for process in made.started:
        process.kill()
        process.wait()


def leases_of(
    folder: Path,
    cards: tuple[Gpu, ...] = CARDS,
    *,
    machine: tuple[Gpu, ...] | None = None,
    first: int = 0,
    progress: Callable[[str], None] = lambda _text: None,
) -> Leases:
    """Return leases of these cards."""
    return Leases(folder, cards, cards if machine is None else machine, progress, first)


def listener() -> tuple[list[str], Event, Callable[[str], None]]:
    """Return what is said, an event for when anything is, and the progress that says it."""
    said: list[str] = []
    spoke = Event()

    def progress(text: str) -> None:
        said.append(text)
        spoke.set()

    return said, spoke, progress


def is_free(lock: Path) -> bool:
    """Return whether nobody holds a lock."""
    held = FileLock(lock)
    try:
        held.acquire(blocking=False)
    except TimeoutError:
        return False
    held.release()
    return True


def taken(folder: Path) -> set[str]:
    """Return the locks that somebody holds."""
    return {lock.stem for lock in folder.glob("*.lock") if not is_free(lock)}


@contextmanager
def waiting(one: Leases, gpus: int, *, exclusive: bool, said: Event) -> Iterator[Event]:
    """Wait for a lease in a thread; within, it waits, and it is had once what it waits for ends."""
    had = Event()

    def work() -> None:
        with one.hold(gpus, exclusive=exclusive, what="config b"):
            had.set()

    thread = Thread(target=work, daemon=True)
    thread.start()
    assert said.wait(PATIENCE)
    assert not had.is_set()
    yield had
    thread.join(PATIENCE)


def test_a_card_is_held_by_its_lock(tmp_path: Path) -> None:
    """And by no other; its folder is made, and whoever holds it has signed."""
    folder = tmp_path / "cache" / "locks"
    made = leases_of(folder)
    with made.hold(1, exclusive=False, what="config c7") as held:
        assert held == made.held == (ONE,)
        assert taken(folder) == {"host", "gpu-GPU-0"}
        told = json.loads((folder / "gpu-GPU-0.holder").read_text("utf-8"))
    assert told.pop("started").isdecimal()
    assert told == {"pid": os.getpid(), "folder": str(Path.cwd()), "what": "config c7"}
    assert not made.held
    assert taken(folder) == set()
    assert not list(folder.glob("*.holder"))


def test_the_whole_machine_is_the_host_and_every_card(tmp_path: Path) -> None:
    """Also cards that CUDA_VISIBLE_DEVICES hides; what is had is only what was asked for."""
    made = leases_of(tmp_path, (TWO,), machine=CARDS)
    with made.hold(1, exclusive=True, what="config c7") as held:
        assert held == (TWO,)
        assert taken(tmp_path) == {"host", "gpu-GPU-0", "gpu-GPU-1", "gpu-GPU-2"}


@pytest.mark.parametrize(("cards", "gpus"), [((), 0), ((), 1), ((), 2), (CARDS, 0)])
def test_what_takes_no_card_takes_the_whole_machine(
    tmp_path: Path, cards: tuple[Gpu, ...], gpus: int
) -> None:
    """As does all on a machine whose GPUs NVML does not know."""
    made = leases_of(tmp_path, cards)
    with made.hold(gpus, exclusive=False, what="config cpu") as held:
        assert held == ()
        assert taken(tmp_path) == {"host", *(f"gpu-{card.uuid}" for card in cards)}


@pytest.mark.parametrize(("first", "card"), [(0, ONE), (1, TWO), (2, THREE), (3, ONE)])
def test_a_worker_prefers_the_card_of_its_number(tmp_path: Path, first: int, card: Gpu) -> None:
    """So that workers do not get into each other's way."""
    with leases_of(tmp_path, first=first).hold(1, exclusive=False, what="c") as held:
        assert held == (card,)


def test_what_was_held_last_is_preferred(tmp_path: Path) -> None:
    """A config that comes back is measured where it was, though another card is free again."""
    made = leases_of(tmp_path)
    with (
        leases_of(tmp_path).hold(1, exclusive=False, what="a"),
        made.hold(1, exclusive=False, what="b") as held,
    ):
        assert held == (TWO,)
    with made.hold(0, exclusive=True, what="cpu"):
        pass
    with made.hold(1, exclusive=False, what="b") as held:
        assert held == (TWO,)
    with made.hold(2, exclusive=False, what="d") as held:
        assert held == (TWO, ONE)


@pytest.mark.parametrize(
    ("outer", "inner"),
    [
        ((1, False), (1, False)),
        ((2, False), (1, False)),
        ((2, True), (2, True)),
        ((1, True), (1, False)),
        ((0, True), (2, False)),
        ((0, True), (0, False)),
    ],
)
def test_a_lease_within_another_is_free(
    tmp_path: Path, outer: tuple[int, bool], inner: tuple[int, bool]
) -> None:
    """If it needs no more; it is held until the outer one ends, on the same cards."""
    made = leases_of(tmp_path)
    with made.hold(outer[0], exclusive=outer[1], what="outer") as first:
        assert made.covers(inner[0], exclusive=inner[1])
        before = taken(tmp_path)
        with made.hold(inner[0], exclusive=inner[1], what="inner") as second:
            assert len(second) == inner[0]
            assert second[: len(first)] == first[: len(second)]
        assert taken(tmp_path) == before
    assert taken(tmp_path) == set()


@pytest.mark.parametrize(
    ("outer", "inner", "told"),
    [
        ((1, False), (2, False), "needs 2 GPUs within a lease of 1 GPU: "),
        ((1, False), (1, True), "needs the whole machine within a lease of 1 GPU: "),
        ((2, False), (0, True), "needs the whole machine within a lease of 2 GPUs: "),
    ],
)
def test_a_lease_cannot_grow(
    tmp_path: Path, outer: tuple[int, bool], inner: tuple[int, bool], told: str
) -> None:
    """Two that did would wait for each other; the one that is held stays."""
    made = leases_of(tmp_path)
    with made.hold(outer[0], exclusive=outer[1], what="outer"):
        before = taken(tmp_path)
        assert not made.covers(inner[0], exclusive=inner[1])
        with (
            pytest.raises(RunError, match=f"^config c7 {told}"),
            made.hold(inner[0], exclusive=inner[1], what="config c7"),
        ):
            pass
        assert taken(tmp_path) == before
    assert taken(tmp_path) == set()


def test_without_a_lease_nothing_is_covered(tmp_path: Path) -> None:
    """And giving back what was not taken does nothing."""
    made = leases_of(tmp_path)
    assert not made.covers(0, exclusive=False)
    made.release()
    assert made.acquire(1, exclusive=False, what="c") == (ONE,)
    made.release()
    made.release()
    assert taken(tmp_path) == set()


@pytest.mark.parametrize(("told", "more"), [(None, ""), ("1,0", " with CUDA_VISIBLE_DEVICES=1,0")])
def test_more_cards_than_there_are_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: str | None, more: str
) -> None:
    """In one line, at once, and with what may hide the others."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if told is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", told)
    made = leases_of(tmp_path, (ONE, TWO))
    text = f"^config big needs 3 GPUs, this machine has 2{more}$"
    with pytest.raises(RunError, match=text):
        made.acquire(3, exclusive=True, what="config big")
    assert taken(tmp_path) == set()


def test_another_holder_is_waited_for_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By process, config and folder, at once and then again and again."""
    monkeypatch.setattr(leases, "_TELL_S", 0.05)
    said: list[str] = []
    again = Event()

    def progress(text: str) -> None:
        said.append(text)
        if len(said) > 1:
            again.set()

    holder = leases_of(tmp_path)
    holder.acquire(2, exclusive=False, what="config a")
    other = leases_of(tmp_path, progress=progress)
    with waiting(other, 2, exclusive=False, said=again) as had:
        holder.release()
        assert had.wait(PATIENCE)
    who = f"pid {os.getpid()} (config a, in {Path.cwd()})"
    assert set(said) == {f"waiting for {who} to finish measuring"}


@pytest.mark.parametrize(
    "left",
    [
        "",
        "{}",
        "[]",
        '{"pid": 99999999, "started": "1", "folder": "/gone", "what": "c"}',
        # The number of one that lives, but it is another one by now.
        '{"pid": PID, "started": "1", "folder": "/gone", "what": "c"}',
        '{"pid": 1e99, "started": "1", "folder": "/gone", "what": "c"}',
        f'{{"pid": {10**30}, "started": "1", "folder": "/gone", "what": "c"}}',
        None,
    ],
)
def test_a_holder_that_cannot_be_told_has_no_name(tmp_path: Path, left: str | None) -> None:
    """One that has gone did not take the lock; a note that is no note tells nothing."""
    said, spoke, progress = listener()
    lock = FileLock(tmp_path / "host.lock", thread_local=False)
    lock.acquire()
    if left is not None:
        note = left.replace("PID", str(os.getpid()))
        (tmp_path / "host.holder").write_text(note, "utf-8")
    with waiting(leases_of(tmp_path, progress=progress), 0, exclusive=True, said=spoke) as had:
        lock.release()
        assert had.wait(PATIENCE)
    assert said[0] == "waiting for another run on this machine to finish measuring"


def test_who_gives_up_waiting_leaves_nothing_locked(tmp_path: Path) -> None:
    """Ctrl-C while some of the cards are collected frees them, and the turnstile."""

    def interrupt(_text: str) -> None:
        raise KeyboardInterrupt

    with leases_of(tmp_path).hold(1, exclusive=False, what="a"):
        with pytest.raises(KeyboardInterrupt):
            leases_of(tmp_path, progress=interrupt).acquire(3, exclusive=False, what="b")
        assert taken(tmp_path) == {"host", "gpu-GPU-0"}


def test_locks_are_free_after_a_failure(tmp_path: Path) -> None:
    """Which comes through as it is."""
    made = leases_of(tmp_path)
    with (
        pytest.raises(ServerError, match="died"),
        made.hold(1, exclusive=True, what="c"),
    ):
        raise ServerError("died")
    assert taken(tmp_path) == set()


def test_a_note_cannot_write_to_the_terminal_at_will(tmp_path: Path) -> None:
    """It is another one's text."""
    said, spoke, progress = listener()
    holder = leases_of(tmp_path)
    holder.acquire(0, exclusive=True, what="\x1b[2Jconfig\na")
    with waiting(leases_of(tmp_path, progress=progress), 1, exclusive=False, said=spoke):
        holder.release()
    assert f"pid {os.getpid()} (?[2Jconfig?a, in " in said[0]


def test_one_that_sees_other_cards_keeps_away_all_the_same(tmp_path: Path) -> None:
    """What needs the host waits for who measures on a card that is hidden from it altogether."""
    _, spoke, progress = listener()
    one, two = leases_of(tmp_path, (ONE,)), leases_of(tmp_path, (TWO,))
    with one.hold(1, exclusive=False, what="a"), two.hold(1, exclusive=False, what="b"):
        assert taken(tmp_path) == {"host", "gpu-GPU-0", "gpu-GPU-1"}
    two.acquire(1, exclusive=False, what="b")
    alone = leases_of(tmp_path, (ONE,), progress=progress)
    with waiting(alone, 1, exclusive=True, said=spoke) as had:
        two.release()
        assert had.wait(PATIENCE)
    assert taken(tmp_path) == set()


def test_an_interrupt_while_it_signs_leaves_nothing_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All locks are had by then."""

    def interrupt(_self: Leases, _name: str, _what: str) -> None:
        raise KeyboardInterrupt

    made = leases_of(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Leases, "_sign", interrupt)
        with pytest.raises(KeyboardInterrupt):
            made.acquire(2, exclusive=True, what="c")
    assert taken(tmp_path) == set()
    with made.hold(1, exclusive=False, what="c") as held:
        assert held == (ONE,)


def test_who_stands_in_a_folder_that_is_gone_can_measure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its note says so."""
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with leases_of(tmp_path / "locks").hold(1, exclusive=False, what="c"):
        note = json.loads((tmp_path / "locks" / "gpu-GPU-0.holder").read_text("utf-8"))
    assert note["folder"] == "a folder that is gone"


def test_users_of_one_cache_folder_can_all_lock_and_read(tmp_path: Path) -> None:
    """Whatever the umask of who came first, as far as the folder that it is in lets them."""
    cache = tmp_path / "cache"
    cache.mkdir()
    cache.chmod(0o2775)
    before = os.umask(0o077)
    try:
        with leases_of(cache / "locks").hold(0, exclusive=True, what="c"):
            modes = {one.name: one.stat().st_mode & 0o7777 for one in (cache / "locks").iterdir()}
    finally:
        os.umask(before)
    assert (cache / "locks").stat().st_mode & 0o7777 == 0o2775
    assert modes.pop("turn.lock") == 0o666
    assert modes == {
        f"{name}.{kind}": mode
        for name in ("host", "gpu-GPU-0", "gpu-GPU-1", "gpu-GPU-2")
        for kind, mode in (("lock", 0o666), ("holder", 0o644))
    }


def test_a_lock_that_may_not_be_written_says_who_must_let_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another cache folder would be the wrong mend on a machine that is shared."""

    def refuse(*_arguments: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    text = "Permission denied; let all who measure on this machine write to it and its folder, or "
    with pytest.raises(RunError, match=text):
        leases_of(tmp_path).acquire(1, exclusive=False, what="c")


def test_a_child_of_a_fork_holds_nothing(tmp_path: Path) -> None:
    """It cannot give back what its parent holds, nor keep it when that has ended."""
    made = leases_of(tmp_path)
    made.acquire(1, exclusive=False, what="c")
    ends = os.pipe()
    child = os.fork()
    if child == 0:  # pragma: no cover - in another process
        made.release()
        told = f"{made.held} {made.covers(1, exclusive=False)}"
        os.write(ends[1], told.encode())
        signal.pause()
    assert os.read(ends[0], 100) == b"() False"
    try:
        assert taken(tmp_path) == {"host", "gpu-GPU-0"}
        assert (tmp_path / "gpu-GPU-0.holder").exists()
        made.release()
        assert taken(tmp_path) == set()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for end in ends:
            os.close(end)


def test_a_child_of_a_fork_does_not_keep_what_its_parent_held(lab: Lab) -> None:
    """Though the parent was killed, and had no time to give it back."""
    program = PROGRAM.replace(
        'note("has "',
        "import os, signal\n        if os.fork() == 0:\n            signal.alarm(60)\n"
        '            note(f"child {os.getpid()}")\n            signal.pause()\n'
        '        note("has "',
    )
    words = [sys.executable, "-c", program, str(lab.folder), "1", "1", "no", "1", "a"]
    killed = subprocess.Popen(words)
    lab.started.append(killed)
    assert eventually(lambda: any(line.startswith("a child") for line in lab.journal()))
    assert eventually(lambda: "a has GPU-0" in lab.journal())
    child = next(int(line.split()[2]) for line in lab.journal() if line.startswith("a child"))
    try:
        killed.kill()
        killed.wait()
        lab.started.remove(killed)
        lab.start("b", 1, cards=1)
        assert lab.saw("b has GPU-0")
    finally:
        os.kill(child, signal.SIGKILL)
    lab.go("b")
    lab.end()


@pytest.mark.parametrize("place", ["file", "file/locks", "folder"])
def test_a_lock_that_cannot_be_had_names_the_variable(tmp_path: Path, place: str) -> None:
    """A folder that cannot be made, or something else of a lock's name."""
    (tmp_path / "file").touch()
    (tmp_path / "folder" / "turn.lock").mkdir(parents=True)
    with pytest.raises(RunError, match=r"cannot lock .+: .+; set LLMPERF_CACHE$") as caught:
        leases_of(tmp_path / place).acquire(1, exclusive=False, what="c")
    assert "None" not in str(caught.value)


def test_a_note_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    """The lock is the kernel's."""
    (tmp_path / "gpu-GPU-0.holder").mkdir()
    with leases_of(tmp_path).hold(1, exclusive=False, what="c"):
        assert taken(tmp_path) == {"host", "gpu-GPU-0"}
    assert taken(tmp_path) == set()


def test_a_mig_instance_has_a_lock_of_its_own(tmp_path: Path) -> None:
    """Whatever is in its id."""
    card = Gpu(0, "MIG-GPU-1/2/0", "slice", 1000, "1", mig=True)
    with leases_of(tmp_path, (card,)).hold(1, exclusive=False, what="c"):
        assert taken(tmp_path) == {"host", "gpu-MIG-GPU-1_2_0"}


def test_threads_share_what_their_process_holds(tmp_path: Path) -> None:
    """A lease that one takes covers the others, and ends with the last of them."""
    made = leases_of(tmp_path)
    made.acquire(1, exclusive=False, what="c")
    got: list[tuple[Gpu, ...]] = []
    threads = [
        Thread(target=lambda: got.append(made.acquire(1, exclusive=False, what="c")))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert got == [(ONE,)] * 4
    for _ in range(4):
        made.release()
    assert taken(tmp_path) == {"host", "gpu-GPU-0"}
    made.release()
    assert taken(tmp_path) == set()


def test_two_processes_hold_one_card_each(lab: Lab) -> None:
    """At the same time; a third waits until either ends."""
    lab.start("a", 1)
    assert lab.saw("a has GPU-0")
    lab.start("b", 1)
    assert lab.saw("b has GPU-1")
    lab.start("c", 1)
    assert lab.saw("c waits")
    assert not [line for line in lab.journal() if line.startswith("c has")]
    lab.go("b", "c")
    assert lab.saw("b gives", "c has GPU-1")
    lab.go("a")
    lab.end()


@pytest.mark.parametrize(("gpus", "exclusive"), [(2, False), (1, True), (0, True)])
def test_one_that_needs_all_waits_for_one(lab: Lab, gpus: int, *, exclusive: bool) -> None:
    """And the other way round."""
    lab.start("a", 1)
    assert lab.saw("a has GPU-0")
    lab.start("all", gpus, exclusive=exclusive)
    assert lab.saw("all waits")
    assert not [line for line in lab.journal() if line.startswith("all has")]
    lab.go("a")
    assert lab.saw("all has " + ",".join(f"GPU-{index}" for index in range(gpus)))
    lab.start("b", 1)
    assert lab.saw("b waits")
    lab.go("all", "b")
    lab.end()
    assert [line for line in lab.journal() if not line.endswith("waits")][-2:] == [
        "b has GPU-0",
        "b gives",
    ]


def test_what_needs_two_is_not_starved(lab: Lab) -> None:
    """Once it waits, who has a card ends what was begun, and begins nothing before it."""
    for name in ("a", "b"):
        lab.start(name, 1, rounds=20)
    assert eventually(lambda: sum(" has " in line for line in lab.journal()) == 2)
    lab.start("two", 2)
    assert lab.saw("two waits")
    # From here on both take and give as fast as they can.
    lab.go("a", "b", "two")
    assert eventually(lambda: any(line.startswith("two has") for line in lab.journal()))
    lab.end()
    lines = lab.journal()
    after = lines[lines.index("two waits") :]
    turn = next(index for index, line in enumerate(after) if line.startswith("two has"))
    assert not [line for line in after[:turn] if " has " in line]
    assert sum(" has " in line for line in lines) == 41


@pytest.mark.parametrize("gpus", [1, 0])
def test_a_holder_that_is_killed_holds_nothing(lab: Lab, gpus: int) -> None:
    """The kernel frees its locks; what it left written names nobody."""
    killed = lab.start("a", gpus, cards=1, exclusive=not gpus)
    assert eventually(lambda: any(line.startswith("a has") for line in lab.journal()))
    lab.start("b", gpus, cards=1, exclusive=not gpus)
    assert lab.saw("b waits")
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    lab.started.remove(killed)
    assert eventually(lambda: any(line.startswith("b has") for line in lab.journal()))
    lab.go("b")
    lab.end()


def test_who_is_killed_while_it_collects_holds_up_nobody(lab: Lab) -> None:
    """Neither the turnstile nor the cards that it had got."""
    lab.start("a", 1)
    assert lab.saw("a has GPU-0")
    killed = lab.start("both", 2)
    assert lab.saw("both waits")
    locks = lab.folder / "locks"
    assert eventually(lambda: taken(locks) == {"host", "gpu-GPU-0", "gpu-GPU-1", "turn"})
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    lab.started.remove(killed)
    lab.start("c", 1)
    assert lab.saw("c has GPU-1")
    lab.go("a", "c")
    lab.end()


def test_many_that_need_other_things_all_get_their_turn(lab: Lab) -> None:
    """No two that exclude each other at the same time, and nobody waits for ever."""
    needs = {"a": (1, False), "b": (1, False), "two": (2, False), "x": (1, True), "cpu": (0, True)}
    lab.go(*needs)
    for name, (gpus, exclusive) in needs.items():
        lab.start(name, gpus, exclusive=exclusive, rounds=5)
    lab.end()
    held: dict[str, tuple[str, ...]] = {}
    for line in lab.journal():
        name, _, rest = line.partition(" ")
        if rest == "gives":
            del held[name]
        elif rest.startswith("has"):
            cards = tuple(filter(None, rest.removeprefix("has").strip().split(",")))
            alone = needs[name][1]
            assert not any(alone or needs[other][1] for other in held)
            assert not {card for others in held.values() for card in others} & set(cards)
            held[name] = cards
    assert sum(" has" in line for line in lab.journal()) == 25
