"""Finds or makes the file of a model, and says whether it is the one the suite means."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.resources import files as package_files
from pathlib import Path
from types import MappingProxyType

from filelock import FileLock

from pytest_llmperf.errors import ModelError
from pytest_llmperf.files import expanded
from pytest_llmperf.plan.config import Config, ModelFiles
from pytest_llmperf.plan.model import Model

_log = logging.getLogger(__name__)

_MAGIC = b"GGUF"
_LFS = b"version https://git-lfs"
_PART = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<parts>\d{5})\.gguf")
_CHUNK = 4 << 20
_WHERE = "add its folder with --llmperf-models=DIR or LLMPERF_MODELS"
_NO_MODELS: Mapping[str, Model] = MappingProxyType({})


def locate(
    model: Model, folders: Sequence[Path], cache: Path, models: Mapping[str, Model] = _NO_MODELS
) -> Path:
    """Return the GGUF file of `model`; of a split one, its first part.

    Args:
        model: A file to be found, a shape to be made, or another model to be quantized.
        folders: Searched in this order: each itself, then the folders in it by name. After them
            come the models that this package ships.
        cache: Models that the project makes are kept in ``cache/models``.
        models: Those of the suite file by name, to quantize from.

    Returns:
        An absolute path.

    Raises:
        ModelError: If there is no such file, a part of it is missing, it is no GGUF, what is to
            be quantized has another hash than the suite says, or it cannot be made.
    """
    if model.source is not None:
        return _quantized(model, folders, cache, models)
    if model.synth is not None:
        # numpy is slow to import, and most runs make no model.
        from pytest_llmperf.models.synth import make_model  # noqa: PLC0415

        return make_model(model.synth, cache.absolute() / "models")
    path = _find(model, folders)
    try:
        for part in parts(path):
            _check_magic(part)
    except ModelError as error:
        raise ModelError(f"model `{model.name}`: {error}") from error
    return path


def parts(path: Path) -> tuple[Path, ...]:
    """Return the files of a GGUF in order: itself, or every part of a split one.

    Args:
        path: A GGUF file; of a split one, ``NAME-00001-of-0000N.gguf``.

    Raises:
        ModelError: If a part is missing, or `path` is not the first one.
    """
    match = _PART.fullmatch(path.name)
    if match is None:
        return (path,)
    count = int(match["parts"])
    if int(match["part"]) != 1:
        first = f"{match['stem']}-00001-of-{match['parts']}.gguf"
        raise ModelError(f"{path.name} is one part of a split GGUF: name the first, {first}")
    found = tuple(
        path.with_name(f"{match['stem']}-{number:05d}-of-{match['parts']}.gguf")
        for number in range(1, count + 1)
    )
    missing = [part.name for part in found if not part.is_file()]
    if missing:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")  # noqa: PLR2004  a line has room for three
        raise ModelError(
            f"{len(missing)} of {count} parts are missing from {path.parent}: {shown}; "
            "put all parts in one folder"
        )
    return found


def sha256(path: Path, cache: Path, progress: Callable[[float], None] | None = None) -> str:
    """Return the SHA-256 of a model's content, computed once and kept in ``cache/hashes.json``.

    A kept hash holds as long as path, sizes and modification times are the same. Of a split GGUF
    it is the hash of all parts, one after the other: ``cat PARTS | sha256sum``.

    Args:
        path: A GGUF file; of a split one, its first part.
        cache: Folder of the store, created if missing; several processes may share it.
        progress: Called with the fraction read, from 0 to 1, if the content has to be read.

    Returns:
        64 hexadecimal digits, lower case.

    Raises:
        ModelError: If a part is missing or cannot be read.
    """
    files = parts(path.absolute())  # not resolved: in a hub cache, parts are links to blobs
    try:
        # Before reading: if the file changes meanwhile, what is kept matches nothing.
        stamp = [[stat.st_size, stat.st_mtime_ns] for stat in (file.stat() for file in files)]
        store = cache / "hashes.json"
        kept = _load(store).get(str(files[0]))
        if kept is not None and kept["stamp"] == stamp and isinstance(kept["sha256"], str):
            return kept["sha256"]
        total = sum(size for size, _ in stamp)
        digest = hashlib.sha256()
        done = 0
        for chunk in _chunks(files):
            digest.update(chunk)
            done += len(chunk)
            if progress is not None:
                progress(min(done / max(total, 1), 1.0))
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
    found = digest.hexdigest()
    try:
        _keep(store, str(files[0]), {"stamp": stamp, "sha256": found})
    except OSError as error:
        _log.warning("the hash of %s is not kept and will be computed again: %s", path, error)
    return found


def check_sha256(
    model: Model, path: Path, cache: Path, progress: Callable[[float], None] | None = None
) -> None:
    """Check that the content of `path` is what `model` names; nothing if it names no hash.

    Args:
        model: With the expected hash, or none.
        path: Its file, as :func:`locate` gave it.
        cache: As for :func:`sha256`.
        progress: As for :func:`sha256`.

    Raises:
        ModelError: If the hashes differ; it names both.
    """
    if model.sha256 is None:
        return
    found = sha256(path, cache, progress)
    if found != model.sha256:
        raise ModelError(
            f"model `{model.name}`: {path} has sha256 {found}, the suite file says "
            f"{model.sha256}: fetch the file again, or correct `sha256`"
        )


def files_of(
    config: Config, models: Mapping[str, Model], find: Callable[[str], Path]
) -> ModelFiles:
    """Return all files that a server of a config loads.

    Args:
        config: Names the model, and the one that drafts for it.
        models: Those of the suite file by name; a model names its projector.
        find: Finds or makes the file of a model by name.

    Raises:
        ModelError: What ``find`` raises.
    """
    projector = models[config.model].projector
    return ModelFiles(
        main=find(config.model),
        draft=find(config.draft) if config.draft else None,
        projector=find(projector) if projector else None,
    )


def _quantized(
    model: Model, folders: Sequence[Path], cache: Path, models: Mapping[str, Model]
) -> Path:
    """Return the file of a model that is made from another one."""
    source = models.get(model.source or "")
    if source is None:
        raise ModelError(f"model `{model.name}`: no model `{model.source}` to quantize from")
    path = locate(source, folders, cache)
    # Here, because nobody checks the hash of a model that no test uses itself.
    check_sha256(source, path, cache)
    # It starts processes, and most runs make no model.
    from pytest_llmperf.models.quantize import quantize_model  # noqa: PLC0415

    try:
        return quantize_model(path, model.quantize or "", cache)
    except ModelError as error:
        raise ModelError(f"model `{model.name}`: {error}") from error


def _find(model: Model, folders: Sequence[Path]) -> Path:
    """Return the first file that the name of `model` fits."""
    name = expanded(model.file or "")
    if name.is_absolute():
        if name.is_file():
            return name
        raise ModelError(f"model `{model.name}`: no file {name}: correct `file`, or put it there")
    for folder in folders:
        for candidate in _candidates(folder, name):
            if candidate.is_file():
                return candidate.absolute()
    if len(name.parts) == 1:
        shipped = Path(str(package_files("pytest_llmperf"))) / "data" / name
        if shipped.is_file():
            return shipped.absolute()
    if not folders:
        raise ModelError(
            f"model `{model.name}`: no folder is named in which {name} could be: {_WHERE}"
        )
    searched = ", ".join(
        str(folder) if folder.is_dir() else f"{folder} (no such folder)" for folder in folders
    )
    raise ModelError(f"model `{model.name}`: no {name} in {searched}: {_WHERE}")


def _candidates(folder: Path, name: Path) -> Iterator[Path]:
    yield folder / name
    try:
        inner = sorted(entry for entry in folder.iterdir() if entry.is_dir())
    except OSError:  # missing or not to be read: the error at the end lists it
        return
    for entry in inner:
        yield entry / name


def _check_magic(path: Path) -> None:
    """Check the first bytes, which catch the usual mix-ups of a download."""
    try:
        with path.open("rb") as file:
            head = file.read(len(_LFS))
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
    if head.startswith(_LFS):
        raise ModelError(f"{path} is a Git LFS pointer, not the file: run git lfs pull")
    if not head.startswith(_MAGIC):
        raise ModelError(f"{path} is no GGUF file, it starts with {head[:4]!r}: fetch it again")


def _chunks(files: Sequence[Path]) -> Iterator[bytes]:
    for path in files:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                yield chunk


def _load(store: Path) -> dict[str, dict[str, object]]:
    """Return the kept hashes by path; what is damaged counts as nothing kept."""
    try:
        content = json.loads(store.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict):
        return {}
    return {
        path: entry
        for path, entry in content.items()
        if isinstance(entry, dict) and entry.keys() == {"stamp", "sha256"}
    }


def _keep(store: Path, path: str, entry: dict[str, object]) -> None:
    """Add one hash to the store, whoever else is adding theirs."""
    store.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(store.with_suffix(".lock")):
        content = {**_load(store), path: entry}
        part = store.with_suffix(".part")
        part.write_text(json.dumps(content, sort_keys=True, indent=1) + "\n", encoding="utf-8")
        part.replace(store)
