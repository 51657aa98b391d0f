"""Measures a config by llama-bench: whole processes, one build after the other."""

from __future__ import annotations

from dataclasses import dataclass

from pytest_llmperf.build.build import Build
from pytest_llmperf.campaign.base import Campaign, PairedLaunches, wandering
from pytest_llmperf.errors import blamed_on
from pytest_llmperf.measure.bench import BenchPlan, run_bench
from pytest_llmperf.measure.launch import Launch


@dataclass(slots=True)
class BenchCampaign(Campaign):
    """The measuring of one config by llama-bench.

    A process times itself from start to end, so two builds cannot take turns within a block: they
    run one after the other, in the order of a coin flip, and a block is not paired.
    """

    def _plan(self, build: Build, what: str) -> BenchPlan:
        return BenchPlan(build, self.config, self.files, self.pairs, self.serve, what)

    def _run_block(self, what: str) -> PairedLaunches:
        base = self._second()
        live = self._live()
        for build in (base, self.new):
            if live:
                # Before the one is measured for minutes: the other may have no such tool.
                self._plan(build, what).command(live[:1])
        return self._run_apart(base, self.new, what)

    def _run_alone(self, build: Build, what: str) -> Launch:
        with blamed_on(build.identity):
            return self._run(build, what)

    def _run(self, build: Build, what: str) -> Launch:
        workloads = self._live()
        self._say(f"{what}: {build.label} by llama-bench")
        watch = self._watch()
        on_gpu = self._on_gpu(build)
        try:
            done = run_bench(self._plan(build, what), workloads)
            launch = done.launch
            launch.disturbed = self._disturbed(watch, on_gpu.disturbed) or wandering(launch)
            launch.gpu = on_gpu.facts()
        except BaseException:
            on_gpu.end((), build.label, check=False)
            raise
        on_gpu.end((), f"llama-bench of {build.label} for config {self.config.name}")
        for error in done.failures.values():
            error.build = build.identity
        self.failures |= done.failures
        return launch
