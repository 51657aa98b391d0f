"""What a program of ours does on its GPUs: watched while it runs, its memory waited for after."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from pytest_llmperf.build.bench_dialect import computing
from pytest_llmperf.build.build import Build
from pytest_llmperf.errors import CheckError, LeakError
from pytest_llmperf.gpu.cards import Gpu
from pytest_llmperf.gpu.memory import Release, vram_mib
from pytest_llmperf.gpu.watch import GpuWatch, energy_j
from pytest_llmperf.measure.host import is_ours
from pytest_llmperf.measure.logfacts import LogFacts
from pytest_llmperf.plan.config import Config
from pytest_llmperf.plan.options import OptionValue
from pytest_llmperf.serve.launch import server_options

LEAST_GROWTH_MIB = 16.0
"""What the use of a GPU must grow by to be told as a program's memory; less may be the driver's."""


class OnGpu:
    """The GPUs of one program, from before it starts until its memory is free again.

    Make it before the program starts, and call :meth:`end` once it has ended. Without GPUs that
    NVML knows it sees nothing and waits for nothing.

    Args:
        cards: The GPUs that the program may use.
        progress: Is told while memory is waited for.
        instead: The look at a program that ended and that this one takes the place of, while
            another of ours runs there: what must be free again in the end is what that one found.
        guests: Whether servers run there that we did not start and that we are asking, too. Which
            processes are theirs is not known, so that none there counts as foreign.
    """

    def __init__(
        self,
        cards: Sequence[Gpu],
        progress: Callable[[str], None],
        *,
        instead: OnGpu | None = None,
        guests: bool = False,
    ) -> None:
        self.cards = tuple(cards)
        self._progress = progress
        self._guests = guests
        self._named = False
        self._shared: float | None = None
        self._release: Release = (
            Release(self.cards) if instead is None else instead._release  # noqa: SLF001 - of the same class
        )
        self._watch = GpuWatch(self.cards, _anything if guests else is_ours)
        self._ended = False

    def share(self) -> None:
        """Say that another program of ours is there from now on.

        What the use of the GPUs grows by is not this one's any more; memory of its processes still
        is. Safe to call again.
        """
        if self._shared is None:
            self._shared = self._watch.grown_peak_mib()

    def held_mib(self, pids: Collection[int]) -> tuple[dict[int, float], str]:
        """Return what the program holds by GPU index, MiB, and by what that is known.

        ``processes`` where NVML names the program's; ``use`` where it names none of them, as in a
        container, and the memory in use has grown since; ``""`` where neither tells.
        """
        if held := vram_mib(pids):
            self._named = True
            return held, "processes"
        grown = self._watch.grown_mib()
        if self.cards and grown > LEAST_GROWTH_MIB:
            return {self.cards[0].index: grown}, "use"
        return {}, ""

    def peak_mib(self, pids: Collection[int]) -> float | None:
        """Return the most that the program held at a time on all its GPUs, MiB; None if untold.

        Where NVML does not name its processes, what the use grew by at most; beside another program
        of ours, until that one came.
        """
        if peak := self._watch.peak_mib(pids):
            return peak
        if self._named:
            # What the use grew by may be others'.
            return None
        grown = self._watch.grown_peak_mib() if self._shared is None else self._shared
        return grown if self.cards and grown > LEAST_GROWTH_MIB else None

    def energy_j(self) -> float | None:
        """Return what its GPUs have used since their driver was loaded, J; None if untold.

        All of what they used: at rest, and for whatever else is there, such as the other build's
        server that waits for its turn. Of two builds that are asked in turn both have that alike.
        """
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

    def stop(self) -> None:
        """Stop watching, and wait for nothing. Safe to call again."""
        self._watch.stop()

    def end(
        self, pids: Collection[int], name: str, *, check: bool = True, alone: bool = True
    ) -> None:
        """Stop watching, and wait until the program's memory is free. Safe to call again.

        Args:
            pids: Its processes while it ran.
            name: What it is called in an error.
            check: Whether memory that stays is an error; not where another one is on its way.
            alone: Whether no other program of ours runs there any more. If one does, only what
                NVML names the processes for is waited for.

        Raises:
            LeakError: If memory of its GPUs is not free in time.
        """
        if self._ended:
            return
        self._ended = True
        self.stop()
        alone = alone and not self._guests
        leak = self._release.wait(pids, progress=self._progress, alone=alone)
        if leak and check:
            raise LeakError(
                f"{name} ended, and its GPU memory is not free: {leak}. What is measured next "
                "would have less: end what holds it (`nvidia-smi` names it), or reset the GPU"
            )


def fell_back(config: Config, options: Mapping[str, OptionValue], facts: LogFacts) -> str:
    """Return what shows that a program that was to use a GPU computes on the CPU.

    Args:
        config: What it runs; one without a GPU, or that wants no layer on one, cannot fall back.
        options: Of the program, by any of their names.
        facts: What its log tells.

    Returns:
        Evidence and likely causes in words, or ``""``.
    """
    # As people spell them: `n-gpu-layers` is one of the names of `gpu-layers`.
    asked = computing(options)
    if not config.gpu or str(asked.get("gpu-layers")) == "0" or asked.get("device") == "none":
        return ""
    if facts.offloaded_layers == 0:
        told = f"its log says that 0 of {facts.layers} layers are on a GPU"
    elif facts.devices and not facts.gpu_mib:
        # Whatever it holds there, and whatever number of layers it says: b11434 with
        # `--device none` holds 518 MiB of an H200 and says that all layers are offloaded.
        told = f"all its buffers are the CPU's ({', '.join(facts.devices)})"
    else:
        return ""
    return (
        f"{told}; its GPU runtime is missing, the GPU's memory is taken, or `fit` found no room "
        "for a layer"
    )


def require_gpu(build: Build, config: Config, facts: LogFacts, log: Path | None) -> None:
    """Refuse to measure a program that was to use a GPU and computes on the CPU.

    Args:
        build: Whose program.
        config: What it runs.
        facts: What its log tells.
        log: The log, for people.

    Raises:
        CheckError: With what shows it.
    """
    if told := fell_back(config, server_options(build, config), facts):
        raise CheckError(
            f"config {config.name}: {build.label} fell back to the CPU: {told}; see {log}"
        )


def _anything(_pid: int) -> bool:
    return True
