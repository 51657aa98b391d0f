"""Memory of GPUs, and whether it is free again after a server."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from support.nvml import Card, Driver, Task

from pytest_llmperf.gpu.cards import Gpu, gpus
from pytest_llmperf.gpu.memory import Held, Release, free_mib, holders, read_used, vram_mib
from pytest_llmperf.gpu.nvml import handle

Pretend = Callable[..., Driver]
OURS = [7, 8]
FOREIGN = 9


def test_memory_is_summed_over_the_processes_asked_for(pretend: Pretend) -> None:
    """Other processes and GPUs without any of ours do not count."""
    pretend(
        Card("GPU-1", tasks=[Task(7, 100), Task(8, 50), Task(9, 999)]),
        Card("GPU-2", tasks=[Task(9, 999)]),
        Card("GPU-3", tasks=[Task(8, 25)]),
    )
    assert vram_mib({7, 8}) == {0: 150.0, 2: 25.0}
    assert vram_mib({1}) == {}


def test_one_that_computes_and_draws_counts_once(pretend: Pretend) -> None:
    """It is in both lists, with all of its memory in each."""
    pretend(Card(tasks=[Task(7, 100, compute=True, draws=True)]))
    assert vram_mib([7]) == {0: 100.0}
    assert holders() == [Held(0, 7, 100.0)]


def test_one_that_only_draws_holds_memory(pretend: Pretend) -> None:
    """As a server by Vulkan does."""
    pretend(Card(tasks=[Task(7, 100, compute=False, draws=True)]))
    assert vram_mib([7]) == {0: 100.0}


def test_what_the_driver_does_not_tell_is_not_known(pretend: Pretend) -> None:
    """A GPU that names no processes, or no memory of theirs, is left out."""
    names = ("nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetGraphicsRunningProcesses")
    pretend(
        Card("GPU-1", tasks=[Task(7, None)]),
        Card("GPU-2", tasks=[Task(7, 100)], failing=dict.fromkeys(names, 4)),
    )
    assert vram_mib([7]) == {}
    assert holders() == [Held(0, 7, 0.0)]


def test_free_memory_is_that_of_visible_gpus(
    pretend: Pretend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By index; one that shares the CPU's has none to tell."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,2")
    pretend(Card("GPU-1"), Card("GPU-2", used=300, reserved=100), Card("GPU-3", total=None))
    assert free_mib() == {1: 600.0}


@pytest.mark.parametrize(("newest", "used"), [(True, 300.0), (False, 400.0)])
def test_memory_in_use_is_without_the_drivers_own(
    pretend: Pretend, *, newest: bool, used: float
) -> None:
    """None where it is untold; older drivers count their own in."""
    pretend(Card("GPU-1", used=300, reserved=100), Card("GPU-2", total=None), newest=newest)
    assert [read_used(handle(card.uuid)) for card in gpus()] == [used, None]


def test_gpus_that_went_away_tell_nothing(pretend: Pretend) -> None:
    """They were found before; that is no error."""
    driver = pretend(Card(tasks=[Task(7, 100)]))
    assert gpus()
    driver.cards[0].lost = 15
    assert (vram_mib([7]), free_mib(), holders()) == ({}, {}, [])
    driver.cards.clear()
    assert (vram_mib([7]), free_mib(), holders()) == ({}, {}, [])


def test_memory_that_is_free_at_once_is_released(pretend: Pretend) -> None:
    """Up to a little that the driver keeps."""
    driver = pretend(Card())
    driver.cards[0].hold(beside=10)
    release = Release(gpus())
    driver.cards[0].hold(Task(7, 500), beside=20)
    driver.cards[0].hold(beside=74)
    assert release.wait(OURS) == ""


def test_memory_is_waited_for(pretend: Pretend) -> None:
    """The name goes first, the memory after it; what is waited for is told."""
    driver = pretend(Card())
    release = Release(gpus())
    card = driver.cards[0]
    card.hold(Task(7, 500), beside=20)
    # At each look: the name is gone, nothing changes, the memory is free.
    steps = iter([520.0, 520.0, 3.0])

    def next_step(_card: Card) -> None:
        card.hold(beside=next(steps, 3.0))

    card.on_memory = next_step
    said: list[str] = []
    assert release.wait(OURS, timeout=60, progress=said.append) == ""
    assert said[0].startswith("waiting for GPU memory to be free: GPU 0: ")


def test_a_process_that_still_holds_memory_is_named(pretend: Pretend) -> None:
    """With its pid, its name and what it holds, GPU by GPU."""
    driver = pretend(Card("GPU-1"), Card("GPU-2"))
    release = Release(gpus())
    driver.cards[0].hold(Task(os.getpid(), 500))
    driver.cards[1].hold(Task(2**30, None))
    told = release.wait([os.getpid(), 2**30], timeout=0)
    assert "GPU 0: " in told
    assert f"(pid {os.getpid()}) still holds 500 MiB; GPU 1: a process that cannot be seen" in told
    assert told.endswith(f"(pid {2**30}) still holds memory")


def test_memory_that_nobody_is_named_for_is_a_leak(pretend: Pretend) -> None:
    """As where a driver does not end a context; who else is there is told."""
    driver = pretend(Card())
    release = Release(gpus())
    driver.cards[0].hold(beside=512)
    assert release.wait(OURS, timeout=0) == (
        "GPU 0: 512 MiB more in use than before, by no process that NVML names"
    )
    driver.cards[0].hold(Task(2**30, 100), beside=512)
    told = release.wait(OURS, timeout=0)
    assert told.startswith("GPU 0: 512 MiB more in use")
    assert f"beside what a process that cannot be seen from here (pid {2**30}) may hold" in told


@pytest.mark.parametrize("before", [0, 100, 3000])
def test_others_that_come_grow_or_go_are_no_leak(pretend: Pretend, before: float) -> None:
    """What they are named for is subtracted, before and after."""
    driver = pretend(Card(total=9000))
    card = driver.cards[0]
    card.hold(*([Task(FOREIGN, before)] if before else []), beside=10)
    release = Release(gpus())
    card.hold(Task(FOREIGN, 2000), beside=10)
    assert release.wait(OURS, timeout=0) == ""
    card.hold(beside=10)
    assert release.wait(OURS, timeout=0) == ""


def test_others_of_unknown_size_prove_no_leak(pretend: Pretend) -> None:
    """What grew may be theirs, whether they were there before or not."""
    driver = pretend(Card())
    card = driver.cards[0]
    for before, after in (((), (Task(FOREIGN, None),)), ((Task(FOREIGN, None),), ())):
        card.hold(*before)
        release = Release(gpus())
        card.hold(*after, beside=500)
        assert release.wait(OURS, timeout=0) == ""


def test_without_sizes_the_total_counts(pretend: Pretend) -> None:
    """The server's own is not told either, and nobody else is there."""
    driver = pretend(Card())
    card = driver.cards[0]
    release = Release(gpus())
    card.hold(Task(7, None), beside=500)
    assert "still holds memory" in release.wait(OURS, timeout=0)
    card.hold(beside=500)
    assert "500 MiB more in use" in release.wait(OURS, timeout=0)
    card.hold()
    assert release.wait(OURS, timeout=0) == ""


def test_one_that_comes_while_the_start_is_noted_is_no_leak(pretend: Pretend) -> None:
    """The names and the sum are of one moment, though they are asked for one by one."""
    driver = pretend(Card())
    card = driver.cards[0]
    card.hold(Task(FOREIGN, 300))

    def leaves(it: Card) -> None:
        it.on_memory = None
        it.hold()

    card.on_memory = leaves
    release = Release(gpus())
    card.hold(beside=300)
    assert "300 MiB more" in release.wait(OURS, timeout=0)


def test_without_nvml_nothing_is_waited_for(pretend: Pretend) -> None:
    """Nor where a GPU was made up, nor without any."""
    pretend(start=9)
    assert Release([Gpu(0, "GPU-x", "made up", 1, "1")]).wait(OURS) == ""
    assert Release([]).wait(OURS) == ""


def test_a_gpu_that_is_lost_meanwhile_is_no_leak(pretend: Pretend) -> None:
    """Nothing is known of it any more."""
    driver = pretend(Card())
    release = Release(gpus())
    driver.cards[0].lost = 15
    assert release.wait(OURS) == ""


def test_beside_another_server_only_names_count(pretend: Pretend) -> None:
    """Where NVML names none, what that one takes is no leak; what is named still is."""
    driver = pretend(Card())
    release = Release(gpus())
    driver.cards[0].used = 500
    assert release.wait(OURS, timeout=0, alone=False) == ""
    assert "500 MiB more" in release.wait(OURS, timeout=0)
    driver.cards[0].hold(Task(7, 100))
    assert "pid 7" in release.wait(OURS, timeout=0, alone=False)


def test_what_is_waited_for_is_said_once(pretend: Pretend) -> None:
    """Not at every look: a log would be full of it."""
    driver = pretend(Card())
    release = Release(gpus())
    driver.cards[0].used = 500
    said: list[str] = []
    assert release.wait(OURS, 0.1, said.append)
    assert len(said) == 1


def test_old_drivers_are_asked_in_their_own_words(pretend: Pretend) -> None:
    """Before 510 they have the second version of the functions that list processes only."""
    driver = pretend(Card(tasks=[Task(7, 100)]), newest=False)
    assert vram_mib(OURS) == {0: 100.0}
    driver.cards[0].failing["nvmlDeviceGetComputeRunningProcesses_v2"] = 3
    assert vram_mib(OURS) == {}
