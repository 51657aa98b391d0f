"""The references beside a baseline file: found, kept and dropped by their digests."""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.fakes import eventually

from pytest_llmperf.errors import BaselineError
from pytest_llmperf.judge.references import (
    Kept,
    drop_references,
    find_reference,
    folder_of,
    keep_reference,
)
from pytest_llmperf.plan.config import REFERENCE_SUFFIX

ONE = hashlib.sha256(b"distributions").hexdigest()[:16]
TWO = "fedcba9876543210"
CASE = "f16/wiki"


@pytest.fixture
def baseline(tmp_path: Path) -> Path:
    """Where a baseline file may be."""
    return tmp_path / "baselines" / "b8149" / "rtx-5080.json"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A reference in a run folder."""
    path = tmp_path / "run" / "made.kldref"
    path.parent.mkdir()
    path.write_bytes(b"distributions")
    return path


def kept(baseline: Path) -> list[str]:
    """Return the names of all that lies in the folder of a baseline's references."""
    folder = folder_of(baseline)
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def test_references_lie_in_a_folder_beside_the_file(baseline: Path) -> None:
    """Of the machine's name."""
    assert folder_of(baseline) == baseline.parent / "rtx-5080"


def test_a_machine_with_a_dot_in_its_name_has_its_own_folder(baseline: Path) -> None:
    """Only the ending of the file goes."""
    assert folder_of(baseline.with_name("mac.local.json")) == baseline.parent / "mac.local"


def test_what_was_kept_is_found_by_its_digest(baseline: Path, source: Path) -> None:
    """Its name tells people the case; the file of the run stays."""
    path = keep_reference(baseline, CASE, Kept(source, ONE))
    assert path == folder_of(baseline) / f"f16-wiki-{ONE[:12]}.kldref"
    assert path.read_bytes() == source.read_bytes()
    assert find_reference(baseline, ONE) == path
    assert find_reference(baseline, TWO) is None
    assert find_reference(baseline.with_name("another.json"), ONE) is None
    assert kept(baseline) == [path.name]


def test_the_same_reference_is_kept_once(baseline: Path, source: Path) -> None:
    """Whatever case it was recorded for: it is not even read again."""
    first = keep_reference(baseline, CASE, Kept(source, ONE))
    source.unlink()
    assert keep_reference(baseline, "q4/wiki", Kept(source, ONE)) == first
    assert kept(baseline) == [first.name]


@pytest.mark.parametrize("case", ["c 7/wiki", "a/b/../../x", "k=v*/wiki", "naïve/wiki"])
def test_any_case_makes_one_file_in_the_folder(baseline: Path, source: Path, case: str) -> None:
    """No part of its name leads elsewhere, or stands for other files."""
    path = keep_reference(baseline, case, Kept(source, ONE))
    assert path.parent == folder_of(baseline)
    assert not set(path.name) & set("/* =")
    assert find_reference(baseline, ONE) == path


@pytest.mark.parametrize(
    "digest", ["", "../x", "*", ONE[:11], ONE[:12].upper(), f"{ONE[:11]}*", f"{ONE}/", "g" * 16]
)
def test_what_is_no_digest_finds_nothing(baseline: Path, source: Path, digest: str) -> None:
    """A baseline file may be written by hand, and must not lead to any file."""
    keep_reference(baseline, CASE, Kept(source, ONE))
    (folder_of(baseline) / f"f16-wiki-{REFERENCE_SUFFIX}").touch()
    (baseline.parent / f"x{REFERENCE_SUFFIX}").touch()
    assert find_reference(baseline, digest) is None


ODD = st.text("0123456789abcdefA*?[]./-", max_size=20)


@given(ODD | st.builds(lambda rest: ONE[:12] + rest, ODD))
def test_a_digest_is_hexadecimal_or_finds_nothing(
    tmp_path_factory: pytest.TempPathFactory, digest: str
) -> None:
    """Its first twelve digits are in the name; who found it looks at the whole."""
    baseline = tmp_path_factory.getbasetemp() / "odd" / "m.json"
    reference = folder_of(baseline) / f"f16-wiki-{ONE[:12]}{REFERENCE_SUFFIX}"
    reference.parent.mkdir(parents=True, exist_ok=True)
    reference.touch()
    meant = digest.startswith(ONE[:12]) and set(digest) <= set("0123456789abcdef")
    assert find_reference(baseline, digest) == (reference if meant else None)


def test_a_folder_that_cannot_be_written_is_named(baseline: Path, source: Path) -> None:
    """With the file, in one line."""
    baseline.parent.mkdir(parents=True)
    folder_of(baseline).touch()
    with pytest.raises(BaselineError, match=r"made\.kldref cannot be copied to .*f16-wiki-"):
        keep_reference(baseline, CASE, Kept(source, ONE))


def test_a_copy_that_is_interrupted_leaves_nothing(
    baseline: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a reference nor what was being written."""

    def interrupted(_source: object, copy: BinaryIO) -> None:
        copy.write(b"distri")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pytest_llmperf.judge.references.shutil.copyfileobj", interrupted)
        with pytest.raises(KeyboardInterrupt):
            keep_reference(baseline, CASE, Kept(source, ONE))
    assert kept(baseline) == []
    assert keep_reference(baseline, CASE, Kept(source, ONE)).read_bytes() == b"distributions"


def test_a_copy_that_is_killed_leaves_no_reference(
    baseline: Path, source: Path, tmp_path: Path
) -> None:
    """What it had written is under another name; the next one keeps the whole."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    descriptor = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    code = (
        "import sys; from pathlib import Path; "
        "from pytest_llmperf.judge.references import Kept, keep_reference as keep; "
        "keep(Path(sys.argv[1]), sys.argv[3], Kept(Path(sys.argv[2]), sys.argv[4]))"
    )
    command = [sys.executable, "-c", code, str(baseline), str(pipe), CASE, ONE]

    def half_written() -> bool:
        # The copy waits for more than it is ever given.
        with contextlib.suppress(BlockingIOError):
            os.write(descriptor, bytes(4096))
        return any(path.stat().st_size for path in folder_of(baseline).glob("*"))

    with subprocess.Popen(command) as child:
        assert eventually(half_written)
        child.kill()
    os.close(descriptor)
    assert child.returncode < 0
    assert find_reference(baseline, ONE) is None
    assert not list(folder_of(baseline).glob(f"*{REFERENCE_SUFFIX}"))
    assert len(drop_references(baseline, ())) == 1
    assert kept(baseline) == []
    assert keep_reference(baseline, CASE, Kept(source, ONE)).read_bytes() == b"distributions"


def test_what_is_named_no_more_is_dropped(baseline: Path, source: Path) -> None:
    """What any case still names stays."""
    old = keep_reference(baseline, CASE, Kept(source, ONE))
    new = keep_reference(baseline, CASE, Kept(source, TWO))
    assert drop_references(baseline, {ONE, TWO}) == []
    assert drop_references(baseline, {"", TWO}) == [old]
    assert kept(baseline) == [new.name]
    assert drop_references(baseline, {""}) == [new]
    assert kept(baseline) == []


def test_without_references_nothing_is_dropped(baseline: Path) -> None:
    """A baseline of speeds has no folder of them."""
    assert drop_references(baseline, {""}) == []
    assert not folder_of(baseline).exists()


def test_other_files_and_folders_stay(baseline: Path, source: Path) -> None:
    """The user's, and those of another machine."""
    other = keep_reference(baseline.with_name("another.json"), CASE, Kept(source, ONE))
    keep_reference(baseline, CASE, Kept(source, ONE))
    notes = folder_of(baseline) / "notes.txt"
    notes.touch()
    drop_references(baseline, ())
    assert kept(baseline) == ["notes.txt"]
    assert other.exists()


@pytest.mark.parametrize("digest", ["", "../x", "0123456789AB"])
def test_what_is_no_digest_is_not_kept(baseline: Path, source: Path, digest: str) -> None:
    """It would name a file elsewhere."""
    with pytest.raises(BaselineError, match="is no digest of a reference"):
        keep_reference(baseline, CASE, Kept(source, digest))


def test_what_cannot_be_dropped_stays(baseline: Path) -> None:
    """It does no harm, and the baseline is written already."""
    folder = folder_of(baseline) / f"f16-wiki-0123456789ab{REFERENCE_SUFFIX}"
    folder.mkdir(parents=True)
    assert drop_references(baseline, ()) == []
    assert folder.is_dir()


def test_a_damaged_reference_is_kept_anew(baseline: Path, source: Path) -> None:
    """Its name alone does not make it what it should be."""
    path = keep_reference(baseline, CASE, Kept(source, ONE))
    path.write_bytes(b"distri")
    assert keep_reference(baseline, CASE, Kept(source, ONE)) == path
    assert path.read_bytes() == source.read_bytes()
    assert kept(baseline) == [path.name]
