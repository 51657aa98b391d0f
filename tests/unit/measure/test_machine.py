"""Names of machines, and what must be equal to compare on them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_llmperf.gpu.cards import Gpu
from pytest_llmperf.judge._schema import Place, check_machine
from pytest_llmperf.judge.store import validate_label
from pytest_llmperf.measure import machine as module
from pytest_llmperf.measure.machine import _key, machine, machine_fingerprint

RTX = Gpu(0, "GPU-1", "NVIDIA GeForce RTX 5080", 16303, "580.1")
XEON = "Intel(R) Xeon(R) CPU E5-2673 v4 @ 2.30GHz"

Pretend = Callable[..., None]


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Pretend:
    """Gives this machine other GPUs and another processor; nothing is remembered."""

    def now(*cards: Gpu, cpu: str = XEON, cores: int = 8) -> None:
        monkeypatch.setattr(module, "gpus", lambda: cards)
        monkeypatch.setattr(module, "_cpu", lambda: cpu)
        monkeypatch.setattr(os, "cpu_count", lambda: cores)
        # The original remembers what this machine really is.
        monkeypatch.setattr(module, "machine", machine.__wrapped__)

    return now


@pytest.mark.parametrize(
    ("name", "mib", "number", "key"),
    [
        ("NVIDIA GeForce RTX 5080", 16303, 1, "rtx-5080-16gb"),
        ("NVIDIA H200", 143771, 1, "h200-140gb"),
        ("NVIDIA H200", 143771, 4, "4x-h200-140gb"),
        ("Tesla T4", 15360, 1, "t4-15gb"),
        ("NVIDIA Graphics Device", 8192, 1, "device-8gb"),
        ("NVIDIA GB10", 0, 1, "gb10"),
    ],
)
def test_a_machine_with_gpus_is_named_by_them(
    pretend: Pretend, name: str, mib: int, number: int, key: str
) -> None:
    """The first GPU without its maker, its memory in GB, and how many there are."""
    pretend(*(Gpu(index, f"GPU-{index}", name, mib, "580.1") for index in range(number)))
    assert _key() == key


@pytest.mark.parametrize(
    ("cpu", "cores", "key"),
    [
        (XEON, 8, "intel-xeon-e5-2673-v4-8c"),
        ("AMD EPYC 9B14 96-Core Processor", 192, "amd-epyc-9b14-192c"),
        ("13th Gen Intel(R) Core(TM) i9-13900K", 32, "13th-gen-intel-core-i9-13900k-32c"),
        ("Raspberry Pi 5 Model B Rev 1.0", 4, "raspberry-pi-5-model-b-rev-1-0-4c"),
        ("", 2, "unknown-2c"),
    ],
)
def test_a_machine_without_gpus_is_named_by_its_processor(
    pretend: Pretend, cpu: str, cores: int, key: str
) -> None:
    """The processor without marks and clock rate, and its cores."""
    pretend(cpu=cpu, cores=cores)
    assert _key() == key


@given(st.text("aZ7 (®)-", max_size=120), st.integers(1, 16))
def test_every_key_can_name_a_file(name: str, number: int) -> None:
    """Whatever the hardware is called, its baseline has a valid name."""
    cards = tuple(Gpu(index, f"GPU-{index}", name, 10**6, "1") for index in range(number))
    with pytest.MonkeyPatch.context() as patch:
        for found in (cards, ()):
            patch.setattr(module, "gpus", lambda found=found: found)
            patch.setattr(module, "_cpu", lambda: name)
            assert validate_label(_key()) == _key()


def test_the_machine_block_tells_the_hardware(pretend: Pretend) -> None:
    """GPUs with their memory, driver, processor with its cores, and the key."""
    pretend(RTX)
    facts = machine.__wrapped__()
    assert facts["key"] == "rtx-5080-16gb"
    assert facts["gpu"] == [{"name": RTX.name, "memory_mib": 16303}]
    assert facts["driver"] == "580.1"
    assert facts["cpu"] == f"{XEON}, 8 cores"


def test_what_a_driver_tells_of_its_settings_is_in_the_block(pretend: Pretend) -> None:
    """Power limit and persistence mode; never the UUID, since the file is public."""
    pretend(replace(RTX, uuid="GPU-secret", power_limit_w=360.0, persistence=False))
    facts = machine.__wrapped__()
    assert facts["gpu"] == [
        {"name": RTX.name, "memory_mib": 16303, "power_limit_w": 360, "persistence": False}
    ]
    assert "secret" not in str(facts)
    assert check_machine(facts, Place(Path("file.json")))["gpu"] == facts["gpu"]


@pytest.mark.parametrize(
    ("limits", "told"),
    [
        ((None,), None),
        ((700.0,), "700 W"),
        ((700.0, 700.0), "700 W"),
        ((700.0, 600.4), "700 W, 600 W"),
        ((None, 600.0), "untold, 600 W"),
    ],
)
def test_a_power_limit_is_in_the_fingerprint_where_it_is_told(
    pretend: Pretend, limits: tuple[float | None, ...], told: str | None
) -> None:
    """Records of machines that tell none stay comparable."""
    pretend(*(replace(RTX, power_limit_w=limit) for limit in limits))
    assert machine_fingerprint("lab").get("power_limit") == told


def test_a_name_given_by_the_user_wins(pretend: Pretend) -> None:
    """The key is taken as it is; the hardware is told all the same."""
    pretend(RTX)
    facts = machine.__wrapped__("lab-7")
    assert facts["key"] == "lab-7"
    assert facts["driver"] == "580.1"
    assert machine_fingerprint("lab-7")["machine"] == "lab-7"


def test_a_fingerprint_differs_where_the_hardware_does(pretend: Pretend) -> None:
    """GPU, driver, processor and cores all count; a machine without a GPU says so."""
    pretend(RTX)
    seen = [machine_fingerprint("lab")]
    assert seen[0]["gpu"] == "NVIDIA GeForce RTX 5080 16303 MiB"
    pretend(RTX, RTX)
    seen.append(machine_fingerprint("lab"))
    pretend(replace(RTX, driver="590.2"))
    seen.append(machine_fingerprint("lab"))
    pretend(replace(RTX, power_limit_w=360.0))
    seen.append(machine_fingerprint("lab"))
    pretend(replace(RTX, power_limit_w=300.0))
    seen.append(machine_fingerprint("lab"))
    pretend(RTX, cpu="another")
    seen.append(machine_fingerprint("lab"))
    pretend(RTX, cores=4)
    seen.append(machine_fingerprint("lab"))
    pretend()
    seen.append(machine_fingerprint("lab"))
    assert (seen[-1]["gpu"], seen[-1]["driver"]) == ("none", "none")
    assert len({tuple(sorted(one.items())) for one in seen}) == len(seen)


def test_this_machine_has_a_name() -> None:
    """On the hardware at hand the block is complete, and the same at every call."""
    facts = machine(None)
    assert facts is machine(None)
    assert validate_label(str(facts["key"]))
    assert facts["cpu"]
