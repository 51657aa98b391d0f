"""Where the text of a corpus pass is looked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_llmperf.errors import ModelError
from pytest_llmperf.models.corpus import DATA, locate_corpus
from pytest_llmperf.plan.config import CorpusPass


def named(corpus: str) -> CorpusPass:
    """Return a pass over this text."""
    return CorpusPass("wiki", corpus)


def folders(root: Path, *with_text: str, name: str = "a.txt") -> list[Path]:
    """Return three folders; those named hold a text that says where it lies."""
    made = [root / folder for folder in ("one", "two", "three")]
    for folder in made:
        folder.mkdir()
        if folder.name in with_text:
            (folder / name).write_text(folder.name, "utf-8")
    return made


def test_the_first_folder_that_has_it_wins(tmp_path: Path) -> None:
    """In the order given; a folder of that name is no text."""
    searched = folders(tmp_path, "two", "three")
    (tmp_path / "one" / "a.txt").mkdir()
    assert locate_corpus(named("a.txt"), searched) == tmp_path / "two" / "a.txt"


def test_a_text_of_the_package_is_found_last(tmp_path: Path) -> None:
    """It needs no folder, and one of the user's by the same name wins."""
    assert locate_corpus(named("quality.txt"), ()) == DATA / "quality.txt"
    searched = folders(tmp_path, "three", name="quality.txt")
    assert locate_corpus(named("quality.txt"), searched) == tmp_path / "three" / "quality.txt"


def test_an_absolute_path_is_taken_as_it_is(tmp_path: Path) -> None:
    """Or not at all: the folders are not searched for it."""
    searched = folders(tmp_path, "one", "two")
    text = tmp_path / "two" / "a.txt"
    assert locate_corpus(named(str(text)), searched) == text
    with pytest.raises(ModelError, match=f"no a.txt in {tmp_path}: correct"):
        locate_corpus(named(str(tmp_path / "a.txt")), searched)


def test_a_path_may_begin_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is absolute, too."""
    monkeypatch.setenv("HOME", str(tmp_path))
    folders(tmp_path, "one")
    assert locate_corpus(named("~/one/a.txt"), ()) == tmp_path / "one" / "a.txt"


def test_what_is_found_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tools are started in other folders."""
    folders(tmp_path, "one")
    monkeypatch.chdir(tmp_path)
    assert locate_corpus(named("one/a.txt"), [Path()]) == tmp_path / "one" / "a.txt"


def test_a_missing_text_names_the_pass_and_where_it_was_looked_for(tmp_path: Path) -> None:
    """In one line, with the mend."""
    one, two, three = folders(tmp_path)
    with pytest.raises(ModelError) as caught:
        locate_corpus(named("sub/gone.txt"), [one, two, three])
    searched = ", ".join(str(folder / "sub") for folder in (one, two, three, DATA))
    assert str(caught.value) == (
        f"pass `wiki`: no gone.txt in {searched}: correct `corpus`, or put it there"
    )


def test_an_empty_text_is_refused(tmp_path: Path) -> None:
    """Though another folder has one: what is passed must not change by an accident."""
    searched = folders(tmp_path, "two")
    (tmp_path / "one" / "a.txt").touch()
    with pytest.raises(ModelError, match=r"pass `wiki`: .*one/a\.txt is empty: put the text there"):
        locate_corpus(named("a.txt"), searched)


def test_the_home_of_nobody_is_named(tmp_path: Path) -> None:
    """A user's mistake, not a traceback."""
    with pytest.raises(ModelError, match=r"no a\.txt in .*~no-such-user-here"):
        locate_corpus(CorpusPass("p", "~no-such-user-here/a.txt"), [tmp_path])
