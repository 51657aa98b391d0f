"""Files replaced as a whole, names that start with a tilde, the cache folder, run folders."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import platformdirs

_NAME = "pytest-llmperf"


def expanded(name: str) -> Path:
    """Return a path with ``~`` and ``~user`` replaced; where there is no such user, as it is.

    ``Path.expanduser`` raises there, and not one of our errors.
    """
    return Path(os.path.expanduser(name))  # noqa: PTH111 - see above


def cache_folder() -> Path:
    """Return the cache folder: ``LLMPERF_CACHE``, or the user's."""
    return expanded(os.environ.get("LLMPERF_CACHE") or platformdirs.user_cache_dir(_NAME))


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Write a file beside ``path`` that replaces it, durably, when the block ends well.

    A reader or a crash sees the old file or the new. The folder is made if need be. The file is
    written beside the other, because a rename is atomic only within one file system.

    Raises:
        OSError: The folder or file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        # "x" leaves the mode to the umask, unlike tempfile, whose files only the owner reads.
        with scratch.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # makes the rename itself last
    finally:
        os.close(folder)


def run_name() -> str:
    """Return a name for the folder of this process's run; it tells whether that still goes on."""
    return f"run-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
