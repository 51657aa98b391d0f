"""Files that are made once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from filelock import FileLock

from pytest_llmperf.errors import ModelError
from pytest_llmperf.models.once import make_once


def test_a_file_is_made_with_its_folder(tmp_path: Path) -> None:
    """What is written elsewhere ends up under its name, and nothing else with it."""
    target = tmp_path / "new" / "model.gguf"

    def make(path: Path) -> None:
        path.write_bytes(b"made")

    assert make_once(target, make) == target
    assert target.read_bytes() == b"made"
    assert {path.suffix for path in target.parent.iterdir()} <= {".gguf", ".lock"}


def test_a_file_that_is_there_is_returned_at_once(tmp_path: Path) -> None:
    """It is not made again, whatever is in it."""
    target = tmp_path / "model.gguf"
    target.write_bytes(b"made before")

    def make(path: Path) -> None:
        pytest.fail(f"made {path} again")

    assert make_once(target, make) == target
    assert target.read_bytes() == b"made before"


def test_two_that_ask_at_once_get_one_file(tmp_path: Path) -> None:
    """The second waits for the first and does not make it again."""
    target = tmp_path / "model.gguf"
    made: list[Path] = []

    def make(path: Path) -> None:
        made.append(path)
        path.write_bytes(b"made")

    with ThreadPoolExecutor(2) as pool:
        with FileLock(target.with_suffix(".lock")):
            asked = [pool.submit(make_once, target, make) for _ in range(2)]
        assert {future.result() for future in asked} == {target}
    assert len(made) == 1


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    """A full disk is a ModelError, and neither a short model nor a temporary file stays."""

    def full(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(ModelError, match=r"cannot make .*No space left on device; free some"):
        make_once(tmp_path / "model.gguf", full)
    assert [path for path in tmp_path.iterdir() if path.suffix != ".lock"] == []
