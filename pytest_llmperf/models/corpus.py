"""Finds the text of a corpus pass."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pytest_llmperf.errors import ModelError
from pytest_llmperf.files import expanded
from pytest_llmperf.plan.config import CorpusPass

DATA = Path(__file__).parents[1] / "data"
"""Files that ship with the package."""


def locate_corpus(one: CorpusPass, folders: Sequence[Path]) -> Path:
    """Return the text file of a pass.

    Args:
        one: Names the file.
        folders: Searched in this order, before what ships with the package.

    Raises:
        ModelError: If there is no such file, or it is empty.
    """
    name = expanded(one.corpus)
    tried = [name] if name.is_absolute() else [folder / name for folder in (*folders, DATA)]
    for path in tried:
        if path.is_file():
            if not path.stat().st_size:
                raise ModelError(f"pass `{one.name}`: {path} is empty: put the text there")
            return path.absolute()
    searched = ", ".join(str(path.parent) for path in tried)
    raise ModelError(
        f"pass `{one.name}`: no {name.name} in {searched}: correct `corpus`, or put it there"
    )
