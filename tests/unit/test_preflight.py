"""What is refused before a program starts, and what is only warned of."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest

from pytest_llmperf import preflight
from pytest_llmperf.build.build import Build
from pytest_llmperf.build.devices import Device
from pytest_llmperf.errors import BuildError, OutOfMemoryError, RunError
from pytest_llmperf.gpu.cards import Gpu
from pytest_llmperf.gpu.memory import Held
from pytest_llmperf.gpu.nvml import NO_GPU, Kind, Status
from pytest_llmperf.plan.config import ModelFiles
from pytest_llmperf.plan.options import OptionValue
from pytest_llmperf.preflight import (
    disk_warnings,
    fits_twice,
    gpu_warnings,
    is_mapped,
    require_disk,
    require_memory,
    weights_mib,
)
from pytest_llmperf.serve.failure import Kills

MIB = 2**20
BUILD = Build("b1", 1, "abc", "here", "0" * 64, ("llama-server",))


def have_disk(monkeypatch: pytest.MonkeyPatch, *, total: int, free: int) -> None:
    """Pretend that the disk has so many MiB."""
    usage = SimpleNamespace(total=total * MIB, free=free * MIB)
    monkeypatch.setattr("shutil.disk_usage", lambda _folder: usage)


def have(
    monkeypatch: pytest.MonkeyPatch,
    *,
    total: int,
    available: int = 0,
    swap: int = 0,
    limit: int = 0,
    devices: tuple[Device, ...] = (),
) -> None:
    """Pretend that the machine has so many MiB of memory, and these GPUs."""
    memory = SimpleNamespace(total=total * MIB, available=available * MIB)
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    monkeypatch.setattr("psutil.swap_memory", lambda: SimpleNamespace(free=swap * MIB))
    monkeypatch.setattr(preflight, "kills", lambda: Kills(0, 0, 0, limit))
    monkeypatch.setattr(preflight, "devices_of", lambda _build: devices)


def model(folder: Path, *sizes: int) -> ModelFiles:
    """Return files of so many MiB that take no room: a model, and what drafts for it."""
    paths = []
    for number, size in enumerate(sizes):
        path = folder / f"{number}.gguf"
        path.touch()
        os.truncate(path, size * MIB)
        paths.append(path)
    return ModelFiles(*paths)


def test_a_full_disk_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In one line, with the folder, which need not exist, and what to do."""
    have_disk(monkeypatch, total=1000, free=199)
    with pytest.raises(RunError, match=r"may take 200 MiB in .*/new, 199 MiB are free: delete"):
        require_disk(tmp_path / "new")
    require_disk(tmp_path, 199.0)
    with pytest.raises(RunError, match=r"^a thing may take 300 MiB in .*: make room$"):
        require_disk(tmp_path, 300.0, what="a thing", mend="make room")


@pytest.mark.parametrize(("free", "lines"), [(100, 0), (99, 1), (0, 1)])
def test_a_nearly_full_disk_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free: int, lines: int
) -> None:
    """From 90 % on, once a disk however many folders are on it."""
    have_disk(monkeypatch, total=1000, free=free)
    found = disk_warnings([tmp_path, tmp_path / "new"])
    assert len(found) == lines
    assert all(f"% full ({free} MiB are free)" in line for line in found)


def test_weights_are_those_of_all_files(tmp_path: Path) -> None:
    """Also what drafts and every part of a split model counts."""
    assert weights_mib(model(tmp_path, 10, 3)) == 13
    assert weights_mib([model(tmp_path, 10).main]) == 10


CARD = Device("CUDA0", "A card", 500, 400)


@pytest.mark.parametrize(
    ("options", "machine", "refused"),
    [
        # Mapped: all that there is counts.
        ({}, {"total": 1000, "available": 10}, False),
        ({}, {"total": 999, "available": 999}, True),
        ({}, {"total": 999, "swap": 5000}, True),
        ({}, {"total": 500, "devices": (CARD,)}, False),
        ({}, {"total": 499, "devices": (CARD,)}, True),
        ({}, {"total": 5000, "limit": 999}, True),
        # Copied: what is free counts.
        ({"mmap": False}, {"total": 5000, "available": 999}, True),
        ({"mmap": False}, {"total": 5000, "available": 900, "swap": 100}, False),
        ({"mmap": False}, {"total": 5000, "available": 600, "devices": (CARD,)}, False),
        ({"mmap": False}, {"total": 5000, "available": 599, "devices": (CARD,)}, True),
    ],
)
def test_weights_that_cannot_fit_are_refused(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    options: Mapping[str, OptionValue],
    machine: Mapping[str, int],
    *,
    refused: bool,
) -> None:
    """With figures; what fits by its weights is tried, whatever else it needs."""
    have(monkeypatch, **machine)  # type: ignore[arg-type]  # devices are among them
    files = model(tmp_path, 900, 100)
    if refused:
        with pytest.raises(OutOfMemoryError, match=r"^config c7 cannot fit: .* 1000 MiB, ") as told:
            require_memory("c7", BUILD, files, options)
        assert told.value.what == "weights of 1000 MiB"
    else:
        require_memory("c7", BUILD, files, options)


def test_gpus_are_asked_for_only_where_they_matter(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It takes a start of the build's program, before every launch."""
    have(monkeypatch, total=1000)
    asked: list[Build] = []

    def ask(build: Build) -> tuple[Device, ...]:
        asked.append(build)
        return (CARD,)

    monkeypatch.setattr(preflight, "devices_of", ask)
    require_memory("c7", BUILD, model(tmp_path, 1000), {})
    assert not asked
    require_memory("c7", BUILD, model(tmp_path, 1001), {})
    assert asked == [BUILD]


def test_what_cannot_be_asked_is_not_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A build that tells no devices, or a model that is not there, is the start's affair."""
    have(monkeypatch, total=1)
    require_memory("c7", BUILD, ModelFiles(tmp_path / "none.gguf"), {})

    def broken(_build: Build) -> tuple[Device, ...]:
        raise BuildError("it does not run")

    monkeypatch.setattr(preflight, "devices_of", broken)
    require_memory("c7", BUILD, model(tmp_path, 100), {})


@pytest.mark.parametrize(
    ("options", "mapped"),
    [
        ({}, True),
        ({"mmap": True}, True),
        ({"mmap": False}, False),
        ({"no-mmap": True}, False),
        ({"load-mode": "mmap"}, True),
        ({"load-mode": "none"}, False),
    ],
)
def test_a_model_is_mapped_unless_told_otherwise(
    options: Mapping[str, OptionValue], *, mapped: bool
) -> None:
    """By the options of older builds and of newer ones."""
    assert is_mapped(options) is mapped


def card(index: int, *, persistence: bool | None = None) -> Gpu:
    """A GPU of 1000 MiB."""
    return Gpu(index, f"GPU-{index}", "A card", 1000, "1", persistence=persistence)


def have_gpus(
    monkeypatch: pytest.MonkeyPatch,
    *free: float,
    held: tuple[Held, ...] = (),
    status: Status | None = None,
    note: str = "",
    persistence: bool | None = None,
) -> None:
    """Pretend that there are GPUs of 1000 MiB with so much free."""
    cards = tuple(card(index, persistence=persistence) for index in range(len(free)))
    monkeypatch.setattr(preflight, "gpus", lambda: cards)
    monkeypatch.setattr(preflight, "free_mib", lambda: dict(enumerate(free)))
    monkeypatch.setattr(preflight, "holders", lambda: list(held))
    monkeypatch.setattr(preflight, "status", lambda: status or Status(Kind.WORKS))
    monkeypatch.setattr(preflight, "order_note", lambda: note)


@pytest.mark.parametrize("free", [(), (900.0,), (100.0, 950.0)])
def test_a_gpu_that_nobody_uses_is_no_warning(
    monkeypatch: pytest.MonkeyPatch, free: tuple[float, ...]
) -> None:
    """One free GPU suffices: the server takes what is there."""
    have_gpus(monkeypatch, *free)
    assert gpu_warnings() == []


def test_foreign_use_of_all_gpus_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """With who uses how much, as far as it is known."""
    held = (Held(0, os.getpid(), 300.0), Held(0, 2**30, 0.0))
    have_gpus(monkeypatch, 500.0, 899.0, held=held)
    [line] = gpu_warnings()
    for told in (
        "GPU 0: 500 of 1000 MiB free, GPU 1: 899 of 1000 MiB free",
        f"(pid {os.getpid()}) 300 MiB",
        f"a process that cannot be seen from here (pid {2**30})",
    ):
        assert told in line
    have_gpus(monkeypatch, 500.0)
    assert "NVML names no process" in gpu_warnings()[0]


def test_use_of_one_of_the_leased_gpus_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server is spread over all of them; who is on others does not matter."""
    held = (Held(0, 2**30, 300.0), Held(1, 2**30 + 1, 100.0))
    have_gpus(monkeypatch, 500.0, 899.0, 950.0, held=held)
    assert gpu_warnings([card(2)]) == []
    [line] = gpu_warnings([card(1), card(2)])
    assert "GPU 1: 899 of 1000 MiB free, GPU 2: 950" in line
    assert f"(pid {2**30 + 1}) 100 MiB" in line
    assert "GPU 0" not in line
    assert f"(pid {2**30})" not in line


@pytest.mark.parametrize(
    ("status", "told"),
    [
        (Status(Kind.NONE), []),
        (Status(Kind.WORKS), []),
        (Status(Kind.WORKS, NO_GPU), []),
        (Status(Kind.WORKS, "GPU 1 does not answer"), ["warning: GPU 1 does not answer"]),
        (Status(Kind.BROKEN, "reboot"), ["warning: reboot"]),
    ],
)
def test_nvml_that_does_not_work_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, status: Status, told: list[str]
) -> None:
    """A machine without NVIDIA GPUs is no reason for one."""
    have_gpus(monkeypatch, status=status)
    assert gpu_warnings() == told


@pytest.mark.parametrize(("persistence", "lines"), [(False, 1), (True, 0), (None, 0)])
def test_persistence_mode_that_is_off_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, lines: int, *, persistence: bool | None
) -> None:
    """Only where the driver says so, and once however many GPUs there are."""
    have_gpus(monkeypatch, 1000.0, 1000.0, persistence=persistence)
    told = gpu_warnings()
    assert len(told) == lines
    assert all("`nvidia-smi -pm 1`" in line for line in told)


def test_an_order_of_gpus_that_may_be_another_is_a_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is to be noted of it is told as it is."""
    have_gpus(monkeypatch, 1000.0, note="another order")
    assert gpu_warnings() == ["warning: another order"]


def test_two_share_the_leased_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are spread over all of them; the fullest is what counts, and others do not."""
    have(monkeypatch, total=5000, available=5000)
    have_gpus(monkeypatch, 10.0, 501.0, 900.0)
    assert fits_twice(500.0, gpu=True, cards=[card(1), card(2)])
    assert not fits_twice(501.0, gpu=True, cards=[card(1), card(2)])
    assert fits_twice(449.0, gpu=True, cards=[card(2)])
    assert not fits_twice(10.0, gpu=True, cards=[card(0), card(2)])
    assert not fits_twice(10.0, gpu=True, cards=[card(3)])
    assert not fits_twice(10.0, gpu=True, cards=[])
    assert fits_twice(500.0, gpu=False, cards=[card(0)])


def test_two_fit_where_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """In memory, and twice that on every GPU; GPUs that are not known have none."""
    have(monkeypatch, total=5000, available=1000)
    have_gpus(monkeypatch, 2001.0)
    assert fits_twice(1000.0, gpu=True)
    assert not fits_twice(1001.0, gpu=False)
    have_gpus(monkeypatch, 2000.0)
    assert not fits_twice(1000.0, gpu=True)
    have_gpus(monkeypatch)
    assert not fits_twice(10.0, gpu=True)
    assert fits_twice(10.0, gpu=False)
