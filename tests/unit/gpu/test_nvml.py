"""Whether GPUs can be asked about, with a stand-in for the driver."""

from __future__ import annotations

import builtins
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

import pytest
from support.nvml import Card, Driver, NVMLLibraryMismatchError

from pytest_llmperf.gpu import nvml as module
from pytest_llmperf.gpu.cards import all_gpus, gpus
from pytest_llmperf.gpu.memory import free_mib, holders, vram_mib
from pytest_llmperf.gpu.nvml import Kind, Status, ask, driver_is_here, nvml, status

Pretend = Callable[..., Driver]


@pytest.mark.parametrize(
    ("code", "told"),
    [
        (9, "Driver Not Loaded): load the driver"),
        (18, "version mismatch.): driver/library version mismatch: reboot or reload the module"),
        (4, "Insufficient Permissions): let this user read and write /dev/nvidia*"),
        (15, "GPU is lost): reset the GPU"),
        (999, "Unknown Error): see what `nvidia-smi`"),
    ],
)
def test_a_driver_that_does_not_work_is_told_with_the_mend(
    pretend: Pretend, code: int, told: str
) -> None:
    """In NVML's words; there is no GPU and no memory, and nothing is raised."""
    pretend(Card(), start=code)
    assert status().kind is Kind.BROKEN
    assert told in status().reason
    assert "\n" not in status().reason
    assert nvml() is None
    assert (gpus(), vram_mib([1]), free_mib(), holders()) == ((), {}, {}, [])


@pytest.mark.parametrize("here", [False, True])
def test_without_the_library_the_drivers_files_tell(
    pretend: Pretend, monkeypatch: pytest.MonkeyPatch, *, here: bool
) -> None:
    """None of them is a machine without an NVIDIA GPU; any is a library that is missing."""
    monkeypatch.setattr(module, "driver_is_here", lambda: here)
    pretend(start=12)
    if here:
        assert status().kind is Kind.BROKEN
        assert "in a container add the capability `utility`" in status().reason
    else:
        assert status() == Status(Kind.NONE, "")


@pytest.mark.parametrize(
    ("path", "here"),
    [
        ("dev/null", False),
        ("proc/driver/rtc", False),
        ("dev/nvidia0", True),
        ("dev/nvidiactl", True),
        ("proc/driver/nvidia/version", True),
    ],
)
def test_the_driver_is_known_by_its_files(tmp_path: Path, path: str, *, here: bool) -> None:
    """Any device file, or its folder in /proc."""
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.touch()
    assert driver_is_here(tmp_path) is here


def test_nvml_without_gpus_works(pretend: Pretend) -> None:
    """A driver is loaded, and there is nothing for it to drive."""
    pretend()
    assert status() == Status(Kind.WORKS, "no GPU")
    assert nvml() is not None
    assert gpus() == ()


def test_all_well_needs_no_reason(pretend: Pretend) -> None:
    """Every GPU answers; what is known is asked for once."""
    driver = pretend(Card())
    assert status() == Status(Kind.WORKS)
    driver.start = 999
    assert status() is status()


@pytest.mark.parametrize("code", [15, 999])
def test_a_lost_gpu_hides_no_other(pretend: Pretend, code: int) -> None:
    """The others keep their indices; the status names the lost one."""
    pretend(Card("GPU-1"), Card("GPU-2", lost=code), Card("GPU-3"))
    assert [(card.index, card.uuid) for card in all_gpus()] == [(0, "GPU-1"), (2, "GPU-3")]
    assert status().kind is Kind.WORKS
    assert status().reason.startswith("GPU 1 does not answer (")


def test_a_gpu_of_others_is_told_only_where_there_is_no_other(pretend: Pretend) -> None:
    """A container that was given one GPU need not hear of the rest."""
    pretend(Card("GPU-1", lost=4), Card("GPU-2"))
    assert status() == Status(Kind.WORKS)
    assert [card.uuid for card in gpus()] == ["GPU-2"]
    pretend(Card("GPU-1", lost=4))
    assert "GPU 0 does not answer (Insufficient Permissions): let this user" in status().reason
    assert gpus() == ()


def test_a_count_that_fails_is_no_driver(pretend: Pretend, monkeypatch: pytest.MonkeyPatch) -> None:
    """NVML starts, and does nothing after that."""

    def fail() -> None:
        raise NVMLLibraryMismatchError("too old")

    pretend(Card())
    loaded = module._load()
    monkeypatch.setattr(loaded, "nvmlDeviceGetCount", fail)
    assert status().kind is Kind.BROKEN
    assert "too old" in status().reason


@pytest.mark.parametrize(
    ("contents", "told"),
    [
        ({"__path__": [], "nvmlInit": print, "__file__": "/x/pynvml/__init__.py"}, "/x/pynvml"),
        ({}, "unknown place"),
    ],
)
def test_another_module_of_that_name_is_told(
    monkeypatch: pytest.MonkeyPatch, contents: Mapping[str, object], told: str
) -> None:
    """The package of the distribution long given up, or anybody's file."""
    other = ModuleType("pynvml")
    vars(other).update(contents)
    monkeypatch.setitem(sys.modules, "pynvml", other)
    assert status().kind is Kind.BROKEN
    assert "pip uninstall pynvml" in status().reason
    assert told in status().reason


def test_bindings_that_cannot_be_imported_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """That is an installation to be mended, not a machine without GPUs."""
    real = builtins.__import__

    def refuse(name: str, *args: object, **keywords: object) -> object:
        if name == "pynvml":
            raise ImportError("it is broken")
        return real(name, *args, **keywords)  # type: ignore[arg-type]

    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    monkeypatch.setattr(builtins, "__import__", refuse)
    assert status().kind is Kind.BROKEN
    assert "(it is broken): pip install nvidia-ml-py" in status().reason


def test_bindings_that_warn_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here every warning is an error; one at the import would look like no GPU."""
    real = builtins.__import__
    driver = Driver(Card())

    def warn(name: str, *args: object, **keywords: object) -> object:
        if name == "pynvml":
            warnings.warn("deprecated", FutureWarning, stacklevel=2)
            return driver.module()
        return real(name, *args, **keywords)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", warn)
    assert status() == Status(Kind.WORKS)


def test_what_the_bindings_do_not_know_is_untold(pretend: Pretend) -> None:
    """A function that older bindings lack is like one the driver does not support."""
    pretend(Card())
    assert ask("nvmlDeviceGetNothing") is None
