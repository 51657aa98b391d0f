"""Makes a file once, however many processes ask for it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from pytest_llmperf.errors import ModelError
from pytest_llmperf.files import replacing

_log = logging.getLogger(__name__)


def make_once(target: Path, make: Callable[[Path], None]) -> Path:
    """Return a model's file, made if it is not there yet.

    Several processes may ask at once: one makes the file and the others wait for it. Whoever finds
    it finds it whole.

    Args:
        target: The file, named after all that its content depends on; its folder is created.
        make: Writes the content to another path, which has an empty file.

    Returns:
        `target`.

    Raises:
        ModelError: What `make` raises, or if the file cannot be written.
    """
    if target.is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_suffix(".lock")):
            if not target.is_file():
                _log.info("making %s", target)
                with replacing(target) as file:
                    make(Path(file.name))
    except OSError as error:
        raise ModelError(
            f"cannot make the model {target}: {error.strerror or error}; "
            "free some space or choose another cache folder"
        ) from error
    return target
