"""The lock that lets one thing at a time be measured on this machine."""

from __future__ import annotations

import os
from pathlib import Path
from threading import Event, Thread

import pytest
from filelock import FileLock
from support.fakes import PATIENCE

from pytest_llmperf.errors import RunError, ServerError
from pytest_llmperf.measuring import measuring


def free(lock: Path) -> bool:
    """Return whether nobody holds a lock."""
    held = FileLock(lock)
    try:
        held.acquire(blocking=False)
    except TimeoutError:
        return False
    held.release()
    return True


def waits_for(lock: Path) -> str:
    """Return what is said of the holder of a lock while it is waited for, then let it go."""
    said: list[str] = []
    waiting, measured = Event(), Event()

    def progress(text: str) -> None:
        said.append(text)
        waiting.set()

    def work() -> None:
        with measuring(lock, progress):
            measured.set()

    thread = Thread(target=work, daemon=True)
    with FileLock(lock):
        thread.start()
        assert waiting.wait(PATIENCE)
        assert not measured.is_set()
    thread.join(PATIENCE)
    assert measured.is_set()
    [told] = said
    return told


def test_the_lock_is_held_while_something_is_measured(tmp_path: Path) -> None:
    """Its folder is made; nobody is waited for, so nothing is said."""
    said: list[str] = []
    lock = tmp_path / "cache" / "locks" / "measuring.lock"
    with measuring(lock, said.append):
        assert not free(lock)
        holder = lock.with_name("measuring.holder").read_text("utf-8")
        assert holder == f"{os.getpid()} {Path.cwd()}"
    assert free(lock)
    assert said == []


def test_another_holder_is_waited_for_and_named(tmp_path: Path) -> None:
    """By the number of its process and its folder, so that it can be found."""
    lock = tmp_path / "measuring.lock"
    lock.with_suffix(".holder").write_text(f"{os.getpid()} /home/some one", "utf-8")
    assert waits_for(lock) == (
        f"waiting for another run on this machine (pid {os.getpid()}, in /home/some one) to finish "
        "measuring"
    )


@pytest.mark.parametrize("left", ["99999999 /gone", "", "nobody /here", None])
def test_a_holder_that_cannot_be_told_has_no_name(tmp_path: Path, left: str | None) -> None:
    """One that has gone did not take the lock; a note that is no note tells nothing."""
    lock = tmp_path / "measuring.lock"
    if left is not None:
        lock.with_suffix(".holder").write_text(left, "utf-8")
    assert waits_for(lock) == "waiting for another run on this machine to finish measuring"


def test_who_waited_signs_in_turn(tmp_path: Path) -> None:
    """The note is of who holds the lock now."""
    lock = tmp_path / "measuring.lock"
    lock.with_suffix(".holder").write_text("99999999 /gone", "utf-8")
    waits_for(lock)
    assert lock.with_suffix(".holder").read_text("utf-8").startswith(f"{os.getpid()} ")


def test_the_lock_is_free_after_a_failure(tmp_path: Path) -> None:
    """Which comes through as it is."""
    lock = tmp_path / "measuring.lock"
    with pytest.raises(ServerError, match="died"), measuring(lock, print):
        raise ServerError("died")
    assert free(lock)


@pytest.mark.parametrize("place", ["file/measuring.lock", "file/locks/measuring.lock", "folder"])
def test_a_lock_that_cannot_be_had_names_the_variable(tmp_path: Path, place: str) -> None:
    """A folder that cannot be written, or something else of that name."""
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    lock = tmp_path / place
    with (
        pytest.raises(RunError, match=f"cannot lock {lock}: .+; set LLMPERF_CACHE$") as caught,
        measuring(lock, print),
    ):
        pass
    assert "None" not in str(caught.value)


def test_a_note_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    """The lock is the kernel's."""
    lock = tmp_path / "measuring.lock"
    lock.with_suffix(".holder").mkdir()
    with measuring(lock, print):
        assert not free(lock)
    assert free(lock)
