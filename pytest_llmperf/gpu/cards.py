"""GPUs by NVML: which this machine has, and which of them CUDA would use."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from pytest_llmperf.gpu.nvml import ask, cards_found, constant, handle, text

_MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU, or MIG instance of one, as NVML tells it.

    Attributes:
        index: Of the GPU in NVML's order; a MIG instance has its GPU's.
        uuid: ``GPU-…`` or ``MIG-…``.
        name: As NVML tells it.
        total_mib: Its memory, MiB; 0 for one that shares the CPU's.
        driver: Version of the driver; ``""`` if untold.
        power_limit_w: Most power that it may draw, W; None if untold. A MIG instance has its GPU's,
            which all instances share.
        persistence: Whether the driver stays loaded while nobody uses it; None if untold.
        bandwidth_gbs: Peak bandwidth of its memory, GB/s; None if untold, and for MIG instances.
        mig: Whether it is a MIG instance.
        parent: UUID of the GPU that a MIG instance is of; else ``""``.
        slices: Numbers of the GPU instance and compute instance of a MIG instance; else None.
    """

    index: int
    uuid: str
    name: str
    total_mib: int
    driver: str
    power_limit_w: float | None = None
    persistence: bool | None = None
    bandwidth_gbs: float | None = None
    mig: bool = False
    parent: str = ""
    slices: tuple[int, int] | None = None

    @property
    def board(self) -> str:
        """UUID of the whole GPU: what has the power, the clocks and the temperature."""
        return self.parent or self.uuid


@cache
def gpus() -> tuple[Gpu, ...]:
    """Return the GPUs that CUDA would use here, by CUDA_VISIBLE_DEVICES; empty if there are none.

    The variable is read once: a run does not change its GPUs.
    """
    return visible(all_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES"))


@cache
def all_gpus() -> tuple[Gpu, ...]:
    """Return the GPUs that NVML knows, in its order; MIG instances in place of their GPU."""
    driver = text(ask("nvmlSystemGetDriverVersion") or "")
    return tuple(card for index, uuid in cards_found()[0] for card in _cards(index, uuid, driver))


def visible(cards: Sequence[Gpu], told: str | None) -> tuple[Gpu, ...]:
    """Return the GPUs that CUDA would use.

    The rules are those of CUDA's programming guide and MIG guide: the first entry that names
    nothing ends the list, a GPU named twice leaves none, and a process gets one MIG instance
    and then no other GPU.

    Args:
        cards: All of the machine, MIG instances in place of their GPU.
        told: Value of CUDA_VISIBLE_DEVICES; None if it is not set.
    """
    chosen: list[Gpu] = []
    if told is None:
        chosen += cards
    else:
        for entry in told.split(","):
            named = _named(cards, entry.strip())
            if not named:
                break
            if any(card in chosen for card in named):
                return ()
            chosen += named
    instances = [card for card in chosen if card.mig]
    return tuple(instances[:1] or chosen)


def order_note() -> str:
    """Return why the GPUs that CUDA_VISIBLE_DEVICES numbers may be others than those shown here.

    ``""`` if they are the same.
    """
    told = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    by_number = any(_is_number(entry.strip()) for entry in told.split(","))
    in_order = os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
    if not by_number or in_order or len({card.name for card in all_gpus()}) < 2:  # noqa: PLR2004 - two names
        return ""
    return (
        f"CUDA_VISIBLE_DEVICES={told} numbers GPUs that differ: CUDA counts the fastest first, "
        "NVML by PCI bus; set CUDA_DEVICE_ORDER=PCI_BUS_ID, or name them by UUID"
    )


def _is_number(entry: str) -> bool:
    return entry.isascii() and entry.isdigit()


def _named(cards: Sequence[Gpu], entry: str) -> list[Gpu]:
    """Return the GPU that an entry names, a GPU with MIG by its instances; empty if none."""
    boards = list(dict.fromkeys(card.board for card in cards))
    if _is_number(entry):
        # CUDA counts what it can use, so a lost GPU has no number.
        # A number of thousands of digits is none, and Python refuses to read it.
        number = int(entry[:9])
        chosen = boards[number : number + 1]
        return [card for card in cards if card.board in chosen]
    if entry.startswith("GPU-"):
        fitting = [board for board in boards if board.startswith(entry)]
        return [card for card in cards if card.board in fitting] if len(fitting) == 1 else []
    if entry.startswith("MIG-"):
        exact = [card for card in cards if card.mig and entry in _names(card)]
        found = exact or [card for card in cards if card.mig and card.uuid.startswith(entry)]
        return found if len(found) == 1 else []
    return []


def _names(card: Gpu) -> tuple[str, ...]:
    """Return the names of a MIG instance: its own, and the one of drivers before 470."""
    if card.slices is None:
        return (card.uuid,)
    return (card.uuid, f"MIG-{card.parent}/{card.slices[0]}/{card.slices[1]}")


def _cards(index: int, uuid: str, driver: str) -> Iterator[Gpu]:
    """Yield a GPU, or its MIG instances if it is split."""
    board = handle(uuid)
    if board is None:
        return
    limit = ask("nvmlDeviceGetPowerManagementLimit", board)
    persistence = ask("nvmlDeviceGetPersistenceMode", board)
    whole = Gpu(
        index=index,
        uuid=uuid,
        name=_name(board),
        total_mib=_total_mib(board),
        driver=driver,
        power_limit_w=limit / 1000 if limit else None,
        persistence=None if persistence is None else bool(persistence),
        bandwidth_gbs=_bandwidth_gbs(board),
    )
    if not _is_split(board):
        yield whole
        return
    for place in range(ask("nvmlDeviceGetMaxMigDeviceCount", board) or 0):
        instance = ask("nvmlDeviceGetMigDeviceHandleByIndex", board, place)
        name = None if instance is None else ask("nvmlDeviceGetUUID", instance)
        if name is None:
            # Places may be free between those taken.
            continue
        major = ask("nvmlDeviceGetGpuInstanceId", instance)
        minor = ask("nvmlDeviceGetComputeInstanceId", instance)
        yield replace(
            whole,
            uuid=text(name),
            name=_name(instance),
            total_mib=_total_mib(instance),
            bandwidth_gbs=None,
            mig=True,
            parent=uuid,
            slices=None if major is None or minor is None else (major, minor),
        )


def _is_split(board: Any) -> bool:  # noqa: ANN401 - a handle of NVML
    modes = ask("nvmlDeviceGetMigMode", board)
    return bool(modes) and modes[0] == constant("NVML_DEVICE_MIG_ENABLE", 1)


def _name(device: Any) -> str:  # noqa: ANN401 - as above
    return text(ask("nvmlDeviceGetName", device) or "unknown GPU")


def _total_mib(device: Any) -> int:  # noqa: ANN401 - as above
    memory = ask("nvmlDeviceGetMemoryInfo", device)
    return 0 if memory is None else int(memory.total) // _MIB


def _bandwidth_gbs(board: Any) -> float | None:  # noqa: ANN401 - as above
    """Return clock x bus width x 2: memory of GPUs moves data at both edges of its clock.

    An H200 tells 3201 MHz and 6144 bit, which makes 4917 GB/s; its data sheet says 4.8 TB/s.
    """
    clock = ask("nvmlDeviceGetMaxClockInfo", board, constant("NVML_CLOCK_MEM", 2))
    width = ask("nvmlDeviceGetMemoryBusWidth", board)
    return clock * width / 8 * 2 / 1000 if clock and width else None
