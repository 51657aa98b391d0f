"""What can be known before a program starts: room on the disk, in the memory and on the GPUs.

Refused is only what cannot go well. What merely might not, a GPU that others use or a disk that is
nearly full, is a warning.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from pytest_llmperf.build.build import Build
from pytest_llmperf.build.devices import devices_of
from pytest_llmperf.errors import BuildError, OutOfMemoryError, RunError
from pytest_llmperf.gpu.cards import Gpu, gpus, order_note
from pytest_llmperf.gpu.memory import Held, free_mib, holders, process_name
from pytest_llmperf.gpu.nvml import NO_GPU, status
from pytest_llmperf.models.locate import parts
from pytest_llmperf.plan.config import ModelFiles
from pytest_llmperf.plan.options import OptionValue
from pytest_llmperf.serve.failure import kills

LEAST_DISK_MIB = 200.0
"""Logs, lock files and reports of a run: less than this and it would break off half-way."""

NEARLY_FULL = 0.90
"""Share of a disk in use from which daemons are known to end containers to make room."""

FREE_SHARE = 0.90
"""Share of a GPU's memory that is free where nobody else uses it: the driver keeps a little."""

_MIB = 1024 * 1024


def require_disk(
    folder: Path,
    need_mib: float = LEAST_DISK_MIB,
    *,
    what: str = "a run",
    mend: str = "delete old runs, models or baselines' references there",
) -> None:
    """Refuse to begin where the disk has no room.

    Args:
        folder: Where something will be written; need not exist.
        need_mib: What it takes at most, MiB.
        what: What is to be written.
        mend: What to do.

    Raises:
        RunError: In one line, with the folder.
    """
    usage = _usage(folder)
    free = usage[1] / _MIB
    if free < need_mib:
        raise RunError(
            f"{what} may take {need_mib:.0f} MiB in {folder}, {free:.0f} MiB are free: {mend}"
        )


def disk_warnings(folders: Iterable[Path]) -> list[str]:
    """Return a line for each disk that is nearly full."""
    lines: dict[tuple[int, int], str] = {}
    for folder in folders:
        total, free = _usage(folder)
        if total and 1 - free / total > NEARLY_FULL:
            lines[total, free] = (
                f"warning: the disk of {folder} is {100 * (1 - free / total):.0f} % full "
                f"({free / _MIB:.0f} MiB are free): from about 90 % on, daemons that guard the "
                "disk may end containers; make room"
            )
    return list(lines.values())


def _usage(folder: Path) -> tuple[int, int]:
    """Return the bytes of the folder's disk, and the free ones."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    usage = shutil.disk_usage(folder)
    # Not `used`: what is kept for root counts as used here, as it does in df.
    return usage.total, usage.free


def weights_mib(files: ModelFiles | Iterable[Path]) -> float:
    """Return the size of models with all their parts, MiB."""
    paths = files.all if isinstance(files, ModelFiles) else files
    return sum(part.stat().st_size for path in paths for part in parts(path)) / _MIB


def available_mib() -> float:
    """Return the memory of the host that a new program could have, MiB."""
    return float(psutil.virtual_memory().available) / _MIB


def require_memory(
    name: str, build: Build, files: ModelFiles, options: Mapping[str, OptionValue]
) -> None:
    """Refuse a config whose weights alone exceed what this machine has.

    A lower bound: the KV cache and buffers come on top. Weights that are mapped may exceed what is
    free, since they are read from the file again and again; those that are copied may not.

    Args:
        name: The config.
        build: Its server's; its own list of devices tells the GPUs' memory.
        files: What the server loads.
        options: What the server gets.

    Raises:
        OutOfMemoryError: In one line, with all figures.
    """
    with suppress(OSError):
        weights = weights_mib(files)
        memory = psutil.virtual_memory()
        mapped = is_mapped(options)
        host = float(memory.total if mapped else memory.available) / _MIB
        if not mapped:
            host += float(psutil.swap_memory().free) / _MIB
        if limit := kills().limit_mib:
            host = min(host, limit)
        # A program has to start to tell of its GPUs, before every unit: only where it matters.
        if weights <= host:
            return
        try:
            cards = devices_of(build)
        except BuildError:
            # Whoever starts it will be told; nothing is known of its GPUs.
            return
        card = float(sum(one.total_mib if mapped else one.free_mib for one in cards))
        if weights > host + card:
            there = "has" if mapped else "has free"
            raise OutOfMemoryError(
                f"config {name} cannot fit: its weights are {weights:.0f} MiB, this machine "
                f"{there} {host:.0f} MiB of memory and {card:.0f} MiB on its GPUs: take a smaller "
                "model or quantization" + ("" if mapped else ", or let it be mapped (mmap)"),
                what=f"weights of {weights:.0f} MiB",
                log=None,
                kind="start",
            )


def is_mapped(options: Mapping[str, OptionValue]) -> bool:
    """Return whether a server maps its model's file: it does so unless told otherwise."""
    if options.get("no-mmap") or options.get("mmap") is False:
        return False
    return "none" not in str(options.get("load-mode", ""))


def fits_twice(need_mib: float, *, gpu: bool, cards: Sequence[Gpu] | None = None) -> bool:
    """Return whether two servers have room to be warm at once.

    On a GPU, ``--fit`` shapes a server by the memory it finds free, so there must be far more than
    both need, or the second would be another config than the first.

    Args:
        need_mib: What both need together, MiB.
        gpu: Whether they use a GPU.
        cards: The GPUs that they share, both spread over all of them alike; None for every one
            that is visible, any of which may have to hold both.
    """
    if available_mib() < need_mib:
        return False
    if not gpu:
        return True
    free = free_mib()
    if not cards:
        return bool(free) and min(free.values()) > 2 * need_mib
    least = min(free.get(card.index, 0.0) for card in cards)
    return least * len(cards) > 2 * need_mib


def gpu_warnings(cards: Sequence[Gpu] | None = None) -> list[str]:
    """Return a line for each thing about the GPUs that may spoil figures.

    Asked while no server of ours runs.

    Args:
        cards: The GPUs that servers are about to use, of which only the memory may have changed
            since a run began; None for every one that is visible, of which one that nobody else
            uses suffices.
    """
    if cards is not None:
        return _use_warnings(cards, every=True)
    reason = status().reason
    lines = [reason, order_note()] if reason != NO_GPU else [order_note()]
    if any(card.persistence is False for card in gpus()):
        lines.append(
            "persistence mode is off: the driver unloads between servers and every first start "
            "pays; `nvidia-smi -pm 1`"
        )
    return [f"warning: {line}" for line in lines if line] + _use_warnings(gpus(), every=False)


def _use_warnings(cards: Sequence[Gpu], *, every: bool) -> list[str]:
    """Return a line if GPUs are in use, naming the processes that NVML knows of."""
    free = free_mib()
    # Of some the free memory is not told, such as of one that another user may not look at.
    total = {card.index: card.total_mib for card in cards if card.total_mib and card.index in free}
    shares = [free[index] / total[index] for index in total]
    if not shares or (min(shares) if every else max(shares)) >= FREE_SHARE:
        return []
    told = ", ".join(
        f"GPU {index}: {free[index]:.0f} of {total[index]} MiB free" for index in total
    )
    held = (_holder(one) for one in holders() if one.gpu in total)
    who = ", ".join(held) or "NVML names no process"
    return [f"warning: something else uses the GPU memory ({told}; {who}): sizes will differ"]


def _holder(held: Held) -> str:
    size = f" {held.mib:.0f} MiB" if held.mib else ""
    return f"{process_name(held.pid)} (pid {held.pid}){size}"
