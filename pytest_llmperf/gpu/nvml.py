"""NVML, the library of the NVIDIA driver: loaded once, with why it does not work.

No exception of NVML leaves this room: whoever asks gets None where NVML does not tell.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

NO_GPU = "no GPU"
"""Reason of a status where NVML works and knows no GPU."""

_NO_PERMISSION = 4
_LIBRARY_NOT_FOUND = 12
_GONE = frozenset({1, 15, 16, 28})
"""Not initialized any more, lost, to be reset, not found: the GPU will tell nothing again."""

_MENDS = {
    4: "let this user read and write /dev/nvidia*",
    9: "load the driver (`modprobe nvidia`), or start the container with the GPUs",
    15: "reset the GPU (`nvidia-smi --gpu-reset`) or reboot",
    16: "reset the GPU (`nvidia-smi --gpu-reset`) or reboot",
    18: "driver/library version mismatch: reboot or reload the module",
}
_LOOK = "see what `nvidia-smi` and the kernel's log say of it"


class Kind(Enum):
    """Whether GPUs can be asked about."""

    WORKS = "works"
    NONE = "none"
    BROKEN = "broken"


@dataclass(frozen=True, slots=True)
class Status:
    """State of NVML.

    Attributes:
        kind: ``NONE`` is a machine without an NVIDIA driver; ``BROKEN`` one whose driver or device
            files are there though NVML does not work.
        reason: One line with the mend; ``""`` where all is well. Where NVML works it is
            :data:`NO_GPU`, or names the GPUs that do not answer.
    """

    kind: Kind
    reason: str = ""


class UntoldError(Exception):
    """NVML did not tell what it was asked; stays within this room.

    Args:
        reason: In NVML's words.
        code: NVML's return code; None where there is none.
    """

    def __init__(self, reason: str, code: int | None = None) -> None:
        self.code = code
        super().__init__(reason)

    @property
    def gone(self) -> bool:
        """Whether the GPU will not answer anything else either."""
        return self.code in _GONE


def nvml() -> Any | None:  # noqa: ANN401 - a module without types
    """Return the loaded ``pynvml``, or None where there is no driver to talk to."""
    return _start()[0]


@cache
def status() -> Status:
    """Return whether GPUs can be asked about, and why not; the same all the while."""
    state = _start()[1]
    if state.kind is not Kind.WORKS:
        return state
    found, failed = cards_found()
    return Status(Kind.WORKS, "; ".join(failed) or ("" if found else NO_GPU))


def call(name: str, *args: object) -> Any:  # noqa: ANN401 - as above
    """Return what a function of NVML does.

    Raises:
        UntoldError: If it fails, or does not exist.
    """
    module = nvml()
    if module is None:
        raise UntoldError("NVML does not work")
    return _call(module, name, *args)


def ask(name: str, *args: object) -> Any:  # noqa: ANN401 - as above
    """Return what a function of NVML does, or None if it does not tell."""
    try:
        return call(name, *args)
    except UntoldError:
        return None


def constant(name: str, otherwise: int) -> int:
    """Return a constant of NVML by its name in ``pynvml``."""
    return int(getattr(nvml(), name, otherwise))


def text(value: str | bytes) -> str:
    """Return a text of NVML, which older bindings hand out as bytes."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value


@cache
def cards_found() -> tuple[tuple[tuple[int, str], ...], tuple[str, ...]]:
    """Return index and UUID of each GPU that answers, and a line for each that does not.

    A GPU that this process may not use, as in a container that has another, is none of ours: it
    is told only where no other answers.
    """
    found: list[tuple[int, str]] = []
    failed: list[str] = []
    denied: list[str] = []
    for index in range(ask("nvmlDeviceGetCount") or 0):
        try:
            found.append((index, text(call("nvmlDeviceGetUUID", _handle_at(index)))))
        except UntoldError as error:
            mend = _MENDS.get(error.code or 0, _LOOK)
            line = f"GPU {index} does not answer ({error}): {mend}"
            (denied if error.code == _NO_PERMISSION else failed).append(line)
    return tuple(found), tuple(failed if found else failed + denied)


def handle(uuid: str) -> Any | None:  # noqa: ANN401 - as above
    """Return NVML's handle of a GPU or MIG instance; None if it is gone."""
    return ask("nvmlDeviceGetHandleByUUID", uuid)


def _handle_at(index: int) -> Any:  # noqa: ANN401 - as above
    # Only to learn the UUID: an index changes its meaning once a GPU is lost.
    return call("nvmlDeviceGetHandleByIndex", index)


@cache
def _start() -> tuple[Any | None, Status]:
    try:
        module = _load()
    except ImportError as error:
        return None, Status(
            Kind.BROKEN, f"pynvml cannot be imported ({error}): pip install nvidia-ml-py"
        )
    if hasattr(module, "__path__") or not hasattr(module, "nvmlInit"):
        # nvidia-ml-py is one file; the package of that name is of a distribution long given up.
        where = getattr(module, "__file__", None) or "unknown place"
        return None, Status(
            Kind.BROKEN,
            f"the module pynvml is not that of nvidia-ml-py ({where}): pip uninstall pynvml, then "
            "pip install --force-reinstall nvidia-ml-py",
        )
    try:
        _call(module, "nvmlInit")
        _call(module, "nvmlDeviceGetCount")
    except UntoldError as error:
        return None, _failed(error)
    return module, Status(Kind.WORKS)


def _load() -> ModuleType:
    """Return the module ``pynvml``; tests put another in its place."""
    with warnings.catch_warnings():
        # A distribution that only stands for nvidia-ml-py warns of itself; where warnings are
        # errors that would be a machine without GPUs.
        warnings.simplefilter("ignore")
        # Imported here: most machines have no use for it.
        import pynvml  # noqa: PLC0415
    return pynvml  # type: ignore[no-any-return]


def _call(module: Any, name: str, *args: object) -> Any:  # noqa: ANN401 - as above
    mismatch = getattr(module, "NVMLLibraryMismatchError", module.NVMLError)
    try:
        return getattr(module, name)(*args)
    except (module.NVMLError, mismatch) as error:
        raise UntoldError(str(error), getattr(error, "value", None)) from None
    except (AttributeError, UnicodeError) as error:
        # Bindings older than the function, or a text that is none.
        raise UntoldError(str(error)) from None


def _failed(error: UntoldError) -> Status:
    if error.code == _LIBRARY_NOT_FOUND:
        if not driver_is_here():
            return Status(Kind.NONE)
        return Status(
            Kind.BROKEN,
            "the NVIDIA driver is here, its library libnvidia-ml.so.1 is not: in a container add "
            "the capability `utility`",
        )
    return Status(
        Kind.BROKEN, f"NVML does not work ({error}): {_MENDS.get(error.code or 0, _LOOK)}"
    )


def driver_is_here(root: Path = Path("/")) -> bool:
    """Return whether there are files of the NVIDIA driver's kernel module.

    Args:
        root: Of the file system.
    """
    return (root / "proc/driver/nvidia").exists() or any((root / "dev").glob("nvidia*"))
