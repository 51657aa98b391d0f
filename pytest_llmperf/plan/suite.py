"""Reads a suite file: models, builds, configs, workloads, passes and tolerances.

Every mistake is one line with file and line number, and says what would be right.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from pytest_llmperf.errors import PlanError, nearest
from pytest_llmperf.plan.config import BuildEntry, Case, Config, CorpusPass, Workload
from pytest_llmperf.plan.model import Model
from pytest_llmperf.plan.read_configs import read_build, read_configs
from pytest_llmperf.plan.read_models import check_sources, read_model
from pytest_llmperf.plan.read_workloads import read_pass, read_workload
from pytest_llmperf.plan.reader import Reader

_T = TypeVar("_T")
_SECTIONS = ("models", "builds", "configs", "workloads", "passes", "tolerances")


@dataclass(frozen=True, slots=True)
class Suite:
    """A suite file, read and checked.

    Attributes:
        path: The file.
        models: By name.
        builds: By name.
        configs: By name, in the order of the file.
        workloads: By name, in the order of the file.
        passes: By name, in the order of the file.
        tolerances: Metric name to relative tolerance.
    """

    path: Path
    models: Mapping[str, Model]
    builds: Mapping[str, BuildEntry]
    configs: Mapping[str, Config]
    workloads: Mapping[str, Workload]
    passes: Mapping[str, CorpusPass]
    tolerances: Mapping[str, float]

    def cases(
        self,
        configs: Sequence[str] | None = None,
        workloads: Sequence[str] | None = None,
        passes: Sequence[str] | None = None,
    ) -> list[Case]:
        """Return the cases of the named configs with workloads or passes, configs outermost.

        Args:
            configs: Names, or None for every config of the file.
            workloads: Names.
            passes: Names. Without workloads and passes there is one case a config.

        Raises:
            PlanError: If a name is not in the file.
        """
        names = list(self.configs) if configs is None else configs
        chosen = [self._named(name, self.configs, "config") for name in names]
        asked = [self._named(name, self.workloads, "workload") for name in workloads or ()]
        passed = [self._named(name, self.passes, "pass") for name in passes or ()]
        if not asked and not passed:
            return [Case(config) for config in chosen]
        return [
            case
            for config in chosen
            for case in (
                *(Case(config, workload=workload) for workload in asked),
                *(Case(config, corpus_pass=one) for one in passed),
            )
        ]

    def _named(self, name: str, table: Mapping[str, _T], what: str) -> _T:
        if name not in table:
            plural = "es" if what == "pass" else "s"
            raise PlanError(
                f"no {what} `{name}`{nearest(name, table)}: "
                f"there are {', '.join(table) or f'no {what}' + plural}",
                self.path,
            )
        return table[name]


def load_suite(path: Path) -> Suite:
    """Read and check a suite file.

    Args:
        path: A TOML file as described in ``docs/suite-file.md``.

    Raises:
        PlanError: On the first mistake, with file and line.
    """
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError as error:
        raise PlanError(
            "there is no such suite file: give another with --llmperf-suite=FILE", path
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"cannot read the suite file: {error}", path) from error
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        position = re.search(r"\(at line (\d+), column \d+\)", str(error))
        line = int(position.group(1)) if position else len(text.splitlines())
        reason = re.sub(r"\s*\(at .*\)$", "", str(error))
        raise PlanError(f"not valid TOML: {reason}", path, line) from error
    reader = Reader(path, text)
    reader.keys(document, _SECTIONS)
    models = reader.each(document, "models", partial(read_model, reader))
    check_sources(reader, models)
    tables = reader.each(document, "configs", lambda _name, table: table)
    workloads = reader.each(document, "workloads", partial(read_workload, reader))
    passes = reader.each(document, "passes", partial(read_pass, reader))
    for name in passes:
        if name in workloads:
            raise reader.fail(
                f"`{name}` is a workload already: choose another name", "passes", name
            )
    return Suite(
        path=path,
        models=models,
        builds=reader.each(document, "builds", partial(read_build, reader)),
        configs=read_configs(reader, tables, models),
        workloads=workloads,
        passes=passes,
        tolerances=reader.tolerances(document.get("tolerances", {}), "tolerances"),
    )
