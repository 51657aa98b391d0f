"""Which GPUs there are, and which CUDA would use."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.nvml import Card, Driver

from pytest_llmperf.gpu.cards import Gpu, all_gpus, gpus, order_note, visible

Pretend = Callable[..., Driver]

A = Gpu(0, "GPU-aa11", "A card", 1000, "1")
B = Gpu(1, "GPU-aa22", "A card", 1000, "1")
C = Gpu(2, "GPU-bb33", "A card", 1000, "1")
PLAIN = (A, B, C)
M0 = Gpu(1, "MIG-cc44", "MIG", 100, "1", mig=True, parent="GPU-dd55", slices=(7, 0))
M1 = Gpu(1, "MIG-cc66", "MIG", 100, "1", mig=True, parent="GPU-dd55", slices=(8, 0))
MIXED = (A, M0, M1, C)


@pytest.mark.parametrize(
    ("told", "chosen"),
    [
        (None, PLAIN),
        ("", ()),
        ("-1", ()),
        ("NoDevFiles", ()),
        ("0", (A,)),
        ("2,0", (C, A)),
        (" 1 , 2", (B, C)),
        ("0,-1,2", (A,)),
        ("0,,2", (A,)),
        ("0,3,2", (A,)),
        ("0,x,2", (A,)),
        ("1,1", ()),
        ("0,GPU-aa11", ()),
        ("GPU-aa22", (B,)),
        ("GPU-b", (C,)),
        ("GPU-b,GPU-aa11", (C, A)),
        ("GPU-aa", ()),
        ("0,GPU-a,2", (A,)),
        ("GPU-zz", ()),
        ("MIG-cc44", ()),
        ("9" * 5000, ()),
        ("²", ()),
    ],
)
def test_cuda_would_use_what_the_variable_names(told: str | None, chosen: tuple[Gpu, ...]) -> None:
    """Numbers and beginnings of UUIDs, in their order, up to the first that names none."""
    assert visible(PLAIN, told) == chosen


@pytest.mark.parametrize(
    ("told", "chosen"),
    [
        (None, (M0,)),
        ("0", (A,)),
        ("0,2", (A, C)),
        ("1", (M0,)),
        ("0,1", (M0,)),
        ("GPU-dd55", (M0,)),
        ("MIG-cc66", (M1,)),
        ("MIG-cc6", (M1,)),
        ("MIG-cc66,MIG-cc44", (M1,)),
        ("MIG-cc", ()),
        ("MIG-GPU-dd55/8/0", (M1,)),
        ("MIG-GPU-dd55/9/0", ()),
    ],
)
def test_a_process_gets_one_mig_instance(told: str | None, chosen: tuple[Gpu, ...]) -> None:
    """By its UUID, by the name of older drivers or by its GPU; then no other GPU."""
    assert visible(MIXED, told) == chosen


def test_an_instance_of_an_older_driver_is_found_by_its_uuid() -> None:
    """Before 470 the UUID itself had the numbers in it."""
    old = Gpu(0, "MIG-GPU-ee77/3/0", "MIG", 100, "1", mig=True, parent="GPU-ee77", slices=(3, 0))
    other = Gpu(0, "MIG-GPU-ee77/13/0", "MIG", 1, "1", mig=True, parent="GPU-ee77", slices=(13, 0))
    assert visible((old, other), old.uuid) == (old,)


ENTRIES = st.sampled_from(
    ["0", "1", "2", "3", "-1", "", "x", "GPU-aa11", "GPU-aa", "GPU-b", "MIG-cc44", "MIG-c", " 0"]
)
TOLD = st.one_of(st.none(), st.text(max_size=30), st.lists(ENTRIES, max_size=5).map(",".join))
MACHINES = st.sampled_from([(), (A,), (M0, M1), PLAIN, MIXED])


@given(MACHINES, TOLD)
def test_whatever_is_told_chooses_of_what_is_there(
    machine: tuple[Gpu, ...], told: str | None
) -> None:
    """Each at most once, one alone if it is a MIG instance, and never an error."""
    chosen = visible(machine, told)
    assert set(chosen) <= set(machine)
    assert len(set(chosen)) == len(chosen)
    assert len(chosen) == 1 or not any(card.mig for card in chosen)


@given(MACHINES, st.lists(ENTRIES, max_size=4))
def test_nothing_counts_after_an_entry_that_names_nothing(
    machine: tuple[Gpu, ...], entries: list[str]
) -> None:
    """The list ends there."""
    before = ",".join(["x", *entries])
    assert visible(machine, before) == ()
    assert visible(machine, ",".join(["0", "x", *entries])) == visible(machine, "0")


@given(st.permutations(PLAIN))
def test_uuids_choose_in_their_order(order: list[Gpu]) -> None:
    """Named by their UUIDs, all are there, first named first."""
    assert visible(PLAIN, ",".join(card.uuid for card in order)) == tuple(order)


@pytest.mark.parametrize("as_bytes", [False, True])
def test_gpus_are_told_in_order(pretend: Pretend, *, as_bytes: bool) -> None:
    """Name, whole MiB and driver, whether the driver's texts are bytes or not."""
    name: str | bytes = "NVIDIA GeForce RTX 5080"
    version: str | bytes = "580.1"
    if as_bytes:
        name, version = b"NVIDIA GeForce RTX 5080", b"580.1"
    pretend(Card("GPU-1", name, 16303.5), Card("GPU-2", total=143771), version=version)
    assert gpus() == (
        Gpu(0, "GPU-1", "NVIDIA GeForce RTX 5080", 16303, "580.1"),
        Gpu(1, "GPU-2", "NVIDIA H200", 143771, "580.1"),
    )


def test_power_persistence_and_bandwidth_are_told(pretend: Pretend) -> None:
    """The clock in MHz at both edges times the bus in bytes, in GB/s; watts from milliwatts."""
    pretend(Card(limit_mw=700_000, persistence=0, memory_clock=3201, bus_width=6144))
    [card] = gpus()
    assert card.power_limit_w == 700
    assert card.persistence is False
    assert card.bandwidth_gbs == pytest.approx(4916.736)


def test_what_the_driver_does_not_tell_is_none(pretend: Pretend) -> None:
    """Not off, not 0 W, not 0 GB/s."""
    pretend(Card(bus_width=0, memory_clock=1), version="1")
    [card] = gpus()
    assert (card.power_limit_w, card.persistence, card.bandwidth_gbs) == (None, None, None)


def test_a_gpu_that_shares_the_cpus_memory_is_a_gpu(pretend: Pretend) -> None:
    """Where NVML has no memory to tell, the size is 0."""
    pretend(Card("GPU-1", "NVIDIA GB10", None))
    assert gpus() == (Gpu(0, "GPU-1", "NVIDIA GB10", 0, "580.1"),)


def test_cuda_visible_devices_hides_gpus(pretend: Pretend, monkeypatch: pytest.MonkeyPatch) -> None:
    """From those used, not from those of the machine; each keeps its index."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    pretend(Card("GPU-1"), Card("GPU-2"))
    assert [card.uuid for card in all_gpus()] == ["GPU-1", "GPU-2"]
    assert [(card.index, card.uuid) for card in gpus()] == [(1, "GPU-2")]


def test_a_lost_gpu_has_no_number_in_cuda(
    pretend: Pretend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that are left are counted."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    pretend(Card("GPU-1", lost=15), Card("GPU-2"))
    assert [card.uuid for card in gpus()] == ["GPU-2"]


def split(*instances: Card | None) -> Card:
    """A GPU in MIG mode."""
    return Card(
        "GPU-2", total=8000, limit_mw=700_000, memory_clock=1, bus_width=8, instances=[*instances]
    )


def test_mig_instances_take_their_gpus_place(pretend: Pretend) -> None:
    """With their own memory and name, their GPU's index and power limit, and no bandwidth."""
    one = Card("MIG-1", "NVIDIA H200 MIG 1g.18gb", 1000, slices=(9, 0))
    two = Card("MIG-2", "NVIDIA H200 MIG 2g.35gb", 2000, slices=(5, 0))
    pretend(Card("GPU-1"), split(None, one, None, two))
    first, second, third = all_gpus()
    assert (first.uuid, first.mig, first.board) == ("GPU-1", False, "GPU-1")
    assert second == Gpu(
        1,
        "MIG-1",
        "NVIDIA H200 MIG 1g.18gb",
        1000,
        "580.1",
        power_limit_w=700,
        mig=True,
        parent="GPU-2",
        slices=(9, 0),
    )
    assert (third.uuid, third.total_mib, third.board) == ("MIG-2", 2000, "GPU-2")
    assert gpus() == (second,)


def test_a_split_gpu_without_instances_is_none(pretend: Pretend) -> None:
    """CUDA can use nothing of it; MIG mode that is off changes nothing."""
    pretend(split())
    assert all_gpus() == ()
    driver = pretend(Card())
    driver.cards[0].failing["nvmlDeviceGetMigMode"] = 999
    assert len(all_gpus()) == 1


@pytest.mark.parametrize(
    ("told", "order", "second", "noted"),
    [
        ("0", None, "NVIDIA T4", True),
        ("GPU-1,0", None, "NVIDIA T4", True),
        ("0", "PCI_BUS_ID", "NVIDIA T4", False),
        ("0", "FASTEST_FIRST", "NVIDIA T4", True),
        ("0", None, "NVIDIA H200", False),
        ("GPU-1", None, "NVIDIA T4", False),
        ("", None, "NVIDIA T4", False),
        (None, None, "NVIDIA T4", False),
    ],
)
def test_numbers_of_unlike_gpus_are_noted(
    pretend: Pretend,
    monkeypatch: pytest.MonkeyPatch,
    told: str | None,
    order: str | None,
    second: str,
    *,
    noted: bool,
) -> None:
    """CUDA counts the fastest first unless told to go by the bus."""
    for name, value in (("CUDA_VISIBLE_DEVICES", told), ("CUDA_DEVICE_ORDER", order)):
        if value is not None:
            monkeypatch.setenv(name, value)
    pretend(Card("GPU-1"), Card("GPU-2", second))
    assert bool(order_note()) is noted
    if noted:
        assert "set CUDA_DEVICE_ORDER=PCI_BUS_ID" in order_note()
