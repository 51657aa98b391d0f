"""What a program of ours does on its GPUs: watched while it runs, its memory waited for after."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from pytest_llmperf.errors import LeakError
from pytest_llmperf.gpu.cards import Gpu
from pytest_llmperf.gpu.memory import Release, vram_mib
from pytest_llmperf.gpu.watch import GpuWatch, energy_j
from pytest_llmperf.measure.host import is_ours

LEAST_GROWTH_MIB = 16.0
"""What the use of a GPU must grow by to be told as a program's memory; less may be the driver's."""


class OnGpu:
    """The GPUs of one program, from before it starts until its memory is free again.

    Make it before the program starts, and call :meth:`end` once it has ended. Without GPUs that
    NVML knows it sees nothing and waits for nothing.

    Args:
        cards: The GPUs that the program may use.
        progress: Is told while memory is waited for.
    """

    def __init__(self, cards: Sequence[Gpu], progress: Callable[[str], None]) -> None:
        self.cards = tuple(cards)
        self._progress = progress
        self._release = Release(self.cards)
        self._watch = GpuWatch(self.cards, is_ours)
        self._ended = False

    def held_mib(self, pids: Collection[int]) -> tuple[dict[int, float], str]:
        """Return what the program holds by GPU index, MiB, and by what that is known.

        ``processes`` where NVML names the program's; ``use`` where it names none of them, as in a
        container, and the memory in use has grown since; ``""`` where neither tells.
        """
        if held := vram_mib(pids):
            return held, "processes"
        grown = self._watch.grown_mib()
        if self.cards and grown > LEAST_GROWTH_MIB:
            return {self.cards[0].index: grown}, "use"
        return {}, ""

    def peak_mib(self, pids: Collection[int]) -> float | None:
        """Return the most that the program held at a time on all its GPUs, MiB; None if untold."""
        if peak := self._watch.peak_mib(pids):
            return peak
        grown = self._watch.grown_peak_mib()
        return grown if self.cards and grown > LEAST_GROWTH_MIB else None

    def energy_j(self) -> float | None:
        """Return what its GPUs have used since they were switched on, J; None if untold."""
        return energy_j(self.cards)

    @property
    def disturbed(self) -> str:
        """What made its timings those of the GPU rather than the build; ``""`` if nothing did."""
        return next((told for use in self._watch.uses() if (told := use.disturbed)), "")

    def facts(self) -> Mapping[str, object]:
        """Return what the GPUs did meanwhile, as JSON values; empty where there are none."""
        uses = self._watch.uses()
        if not uses:
            return {}
        rate = min(use.rate_hz for use in uses)
        return {"rate_hz": round(rate, 1), "cards": [use.to_json() for use in uses]}

    def end(self, pids: Collection[int], name: str, *, check: bool = True) -> None:
        """Stop watching, and wait until the program's memory is free. Safe to call again.

        Args:
            pids: Its processes while it ran.
            name: What it is called in an error.
            check: Whether memory that stays is an error; not where another one is on its way.

        Raises:
            LeakError: If memory of its GPUs is not free in time.
        """
        if self._ended:
            return
        self._ended = True
        self._watch.stop()
        leak = self._release.wait(pids, progress=self._progress)
        if leak and check:
            raise LeakError(
                f"{name} ended, and its GPU memory is not free: {leak}. What is measured next "
                "would have less: end what holds it (`nvidia-smi` names it), or reset the GPU"
            )
