"""From what a run was told to the run: its builds, what to compare with, its folder."""

from __future__ import annotations

import os
import shlex
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from pytest_llmperf.build.build import Build
from pytest_llmperf.build.resolve import default_spec, resolve
from pytest_llmperf.build.spec import is_spec, parse_spec
from pytest_llmperf.errors import PlanError, nearest
from pytest_llmperf.files import run_name
from pytest_llmperf.gate import Absent, Comparison, Record, SideBySide, Stored
from pytest_llmperf.judge import store
from pytest_llmperf.judge.priors import load as load_priors
from pytest_llmperf.judge.priors import path_of
from pytest_llmperf.judge.store import Baseline
from pytest_llmperf.measure import host
from pytest_llmperf.measure.machine import machine
from pytest_llmperf.plan.config import Case
from pytest_llmperf.plan.suite import Suite
from pytest_llmperf.session import Progress, Run, Worker
from pytest_llmperf.settings import Settings

KEPT_RUNS = 10
"""Run folders that are kept, the newest ones."""


def check_baseline_name(settings: Settings, suite: Suite) -> None:
    """Refuse a ``--baseline`` that is neither recorded nor a build.

    Raises:
        UserError: With all that there is.
    """
    name = settings.baseline
    if name is None or settings.update:
        return
    labels = store.labels(settings.baselines)
    if name in labels or is_spec(name, suite.builds, settings.root):
        return
    # A spec of a kind that is known but not to be had says so itself.
    if ":" in name:
        parse_spec(name, suite.builds, settings.root)
    raise PlanError(
        f"--baseline={name}: neither recorded in {settings.baselines} nor a build"
        f"{nearest(name, [*labels, *suite.builds])}; recorded: {', '.join(labels) or 'none'}; "
        f"[builds]: {', '.join(suite.builds) or 'none'}; or give a build spec, such as "
        "pypi:xllamacpp==0.2.12"
    )


def begin(
    settings: Settings,
    suite: Suite,
    selected: Sequence[Case],
    progress: Progress,
    worker: Worker | None = None,
) -> Run:
    """Resolve the builds and the baseline of a run.

    Args:
        settings: What it was told.
        suite: The suite file.
        selected: Cases of the selected tests.
        progress: Says what goes on.
        worker: Which worker of pytest-xdist this is, or None.

    Raises:
        UserError: If a build or baseline cannot be found or read.
    """
    new = resolve(
        parse_spec(settings.build or default_spec(os.environ), suite.builds, settings.root),
        settings.cache,
        progress,
        settings.containers,
    )
    comparison, base = _comparison(settings, suite, new, progress)
    if worker is not None:
        host.share(worker.controller)
    by_config: dict[str, list[Case]] = {}
    for case in selected:
        by_config.setdefault(case.config.name, []).append(case)
    return Run(
        settings=settings,
        suite=suite,
        new=new,
        base=base,
        comparison=comparison,
        folder=run_folder(settings.root / ".llmperf", worker),
        progress=progress,
        seed=time.time_ns(),
        selected=by_config,
        priors=load_priors(path_of(settings.cache, str(machine(settings.machine)["key"]))),
        worker=worker,
    )


def _comparison(
    settings: Settings, suite: Suite, new: Build, progress: Progress
) -> tuple[Comparison, Build | None]:
    if settings.update:
        store.validate_label(new.label)
        return Record(), None
    key = str(machine(settings.machine)["key"])
    record = f"`pytest --llmperf-build={settings.build or new.source} --update-baselines`"
    name = settings.baseline
    if name is None:
        name = store.newest(settings.baselines, key)
        if name is None:
            return Absent(
                f"nothing is recorded for this machine ({key}) in {settings.baselines}: record it "
                f"with {record}, or measure a second build side by side with --baseline=SPEC"
            ), None
    if (path := store.find(settings.baselines, name, key)) is not None:
        return Stored(
            store.load(path),
            name,
            str(path),
            _spec_of(name, suite, new),
            _oldest(settings.baselines, key, name),
        ), None
    if is_spec(name, suite.builds, settings.root):
        spec = parse_spec(name, suite.builds, settings.root)
        return SideBySide(), resolve(spec, settings.cache, progress, settings.containers)
    return Absent(
        f"baseline {name} was not recorded on this machine ({key}): record it with `pytest "
        f"{_spec_of(name, suite, new)} --update-baselines`, or measure it "
        "side by side with --baseline=SPEC, SPEC being its build"
    ), None


def _oldest(folder: Path, key: str, compared: str) -> tuple[str, Baseline] | None:
    """Return the oldest baseline of this machine, None if it is the one compared with."""
    label = store.oldest(folder, key)
    path = None if label in {None, compared} else store.find(folder, str(label), key)
    return None if path is None else (str(label), store.load(path))


def _spec_of(name: str, suite: Suite, new: Build) -> str:
    """Return the option that makes the build of a baseline the build under test."""
    if name in suite.builds:
        return f"--llmperf-build={name}"
    if name == new.label:
        return f"--llmperf-build={shlex.quote(new.source)}"
    return f"--llmperf-build='<spec of {name}>'"


def run_folder(parent: Path, worker: Worker | None = None) -> Path:
    """Return a new run folder; the oldest ones go, except those of runs that still go on.

    Workers of one run share it, and have a folder inside each.
    """
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PlanError(f"{parent}: cannot keep logs there: {error.strerror}") from error
    (parent / ".gitignore").write_text("*\n", "utf-8")
    runs = sorted(p for p in parent.glob("run-*") if p.is_dir() and not _goes_on(p))
    for old in runs[: max(len(runs) - KEPT_RUNS + 1, 0)]:
        shutil.rmtree(old, ignore_errors=True)
    folder = parent / (run_name() if worker is None else worker.run)
    folder.mkdir(exist_ok=True)
    with suppress(OSError):
        latest = parent / "latest"
        latest.unlink(missing_ok=True)
        latest.symlink_to(folder.name)
    if worker is not None:
        folder /= worker.name
        folder.mkdir(exist_ok=True)
    return folder


def _goes_on(folder: Path) -> bool:
    pid = folder.name.rpartition("-")[2]
    return pid.isdecimal() and psutil.pid_exists(int(pid))
