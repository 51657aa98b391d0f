"""Programs that stand for a llama.cpp build."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

MakeProgram = Callable[..., Path]


@pytest.fixture
def make_program(tmp_path: Path) -> MakeProgram:
    """Return a function that writes an executable shell script.

    It takes the lines of the script and, by keyword, its path below the test's folder.
    """

    def make(*lines: str, at: str = "llama-server") -> Path:
        path = tmp_path / at
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(("#!/bin/sh", *lines, "")), "utf-8")
        path.chmod(0o755)
        return path

    return make
