"""What is measured without pytest: one config of a suite file on one build."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pytest_llmperf.build.build import Build
from pytest_llmperf.build.resolve import default_spec, resolve
from pytest_llmperf.build.spec import parse_spec
from pytest_llmperf.files import cache_folder
from pytest_llmperf.models.locate import files_of, locate
from pytest_llmperf.plan.config import Case, Config, ModelFiles, Workload
from pytest_llmperf.plan.suite import load_suite


@dataclass(frozen=True, slots=True)
class Subject:
    """A build, a config with the files that it loads, and workloads.

    Attributes:
        build: The build.
        files: What servers of the config load.
        cases: The config under each workload, in the order in which they were named.
    """

    build: Build
    files: ModelFiles
    cases: tuple[Case, ...]

    @property
    def config(self) -> Config:
        """The config."""
        return self.cases[0].config

    @property
    def workloads(self) -> list[Workload]:
        """The workloads."""
        return [case.workload for case in self.cases if case.workload is not None]


def subject(
    suite_file: Path,
    spec: str | None,
    config: str,
    workloads: Sequence[str],
    models: Sequence[Path],
    *,
    progress: Callable[[str], None],
) -> Subject:
    """Find what is to be measured; a build may be installed and a model made for it.

    Args:
        suite_file: The suite file.
        spec: Of the build, or None for the default order.
        config: Its name.
        workloads: Their names, one at least.
        models: Folders in which GGUF files are looked up.
        progress: Is told what takes its time.

    Raises:
        UserError: If suite, build, config, workload or model cannot be had.
    """
    suite, cache = load_suite(suite_file), cache_folder()
    cases = suite.cases([config], workloads)
    parsed = parse_spec(spec or default_spec(os.environ), suite.builds, Path.cwd())
    build = resolve(parsed, cache, progress)
    files = files_of(
        cases[0].config,
        suite.models,
        lambda name: locate(suite.models[name], models, cache, suite.models),
    )
    return Subject(build, files, tuple(cases))
