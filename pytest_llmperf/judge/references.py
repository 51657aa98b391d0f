"""The references beside a baseline file: BUILD/MACHINE/CONFIG-PASS-DIGEST.kldref.

A baseline names its references by their digests, in its fingerprints. Whoever updates a baseline
adds files before it is written and removes those that it names no more after, so that a process
that is killed in between leaves a baseline with all its references.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from pytest_llmperf.errors import BaselineError
from pytest_llmperf.files import replacing
from pytest_llmperf.plan.config import REFERENCE_SUFFIX

_SHOWN = 12
_DIGEST = re.compile(r"[0-9a-f]{12,64}")


@dataclass(frozen=True, slots=True)
class Kept:
    """A reference to be kept with a baseline.

    Attributes:
        source: The file.
        digest: The first digits of its SHA-256, as the case's fingerprint has them.
    """

    source: Path
    digest: str


def folder_of(baseline: Path) -> Path:
    """Return the folder of a baseline file's references."""
    return baseline.with_name(baseline.stem)


def find_reference(baseline: Path, digest: str) -> Path | None:
    """Return the reference of this digest beside a baseline file, None if there is none."""
    if not _DIGEST.fullmatch(digest):
        return None
    return next(
        iter(sorted(folder_of(baseline).glob(f"*-{digest[:_SHOWN]}{REFERENCE_SUFFIX}"))), None
    )


def keep_reference(baseline: Path, case: str, kept: Kept) -> Path:
    """Copy a reference beside a baseline file, unless it is there, whole and unaltered.

    Args:
        baseline: The baseline file.
        case: ``CONFIG/PASS``, for people.
        kept: The reference.

    Raises:
        BaselineError: If it cannot be copied, or its digest is none.
    """
    if not _DIGEST.fullmatch(kept.digest):
        raise BaselineError(f"{baseline}: {kept.digest!r} is no digest of a reference")
    if (found := find_reference(baseline, kept.digest)) is not None and _is(found, kept.digest):
        return found
    name = re.sub(r"[^\w.+-]", "-", case)
    path = found or folder_of(baseline) / f"{name}-{kept.digest[:_SHOWN]}{REFERENCE_SUFFIX}"
    try:
        with kept.source.open("rb") as original, replacing(path) as copy:
            shutil.copyfileobj(original, copy)
    except OSError as error:
        raise BaselineError(
            f"{kept.source} cannot be copied to {path}: {error.strerror or error}"
        ) from error
    return path


def _is(path: Path, digest: str) -> bool:
    """Return whether a file is what its name says."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest().startswith(digest)
    except OSError:
        return False


def drop_references(baseline: Path, named: Collection[str]) -> list[Path]:
    """Remove the references that a baseline names no more, and what a killed copy left.

    Args:
        baseline: The baseline file.
        named: Digests that its fingerprints name.

    Returns:
        What was removed. A file that cannot be removed stays: it does no harm.
    """
    short = {digest[:_SHOWN] for digest in named}
    folder = folder_of(baseline)
    unnamed = [
        f for f in folder.glob(f"*{REFERENCE_SUFFIX}") if f.stem.rpartition("-")[2] not in short
    ]
    gone = []
    for file in sorted([*unnamed, *folder.glob(f".*{REFERENCE_SUFFIX}.*.tmp")]):
        with contextlib.suppress(OSError):
            file.unlink()
            gone.append(file)
    return gone
