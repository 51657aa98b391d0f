"""Command line, ini file and environment, read once into one frozen value."""

from __future__ import annotations

import math
import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pytest_llmperf.errors import PlanError
from pytest_llmperf.metrics import check_tolerance

DEFAULT_SUITE = "suites/llmperf.toml"
DEFAULT_BASELINES = "baselines"
DEFAULT_BUDGET = 300.0
DEFAULT_LAUNCHES = 3
DEFAULT_PAIRS = 3
DEFAULT_START_TIMEOUT = 600.0
DEFAULT_HANG_TIMEOUT = 300.0
DEFAULT_PASS_LIMIT = 4 * 3600.0
# A build spec that is a path, not a name, a URL or `pypi:…`.
_RELATIVE = re.compile(r"^(?:\.{1,2}$|(?![~/])[^:]*/)")


@dataclass(frozen=True, slots=True)
class Containers:
    """How containers are run on this machine.

    Attributes:
        engine: The engine's command with its own flags; empty for docker, else podman.
        run: Flags that every ``run`` gets on this machine.
    """

    engine: tuple[str, ...] = ()
    run: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything a run was told from outside.

    Attributes:
        baseline: What to compare with, or None for the newest baseline of this machine.
        update: Whether to record instead of compare.
        build: Spec of the build under test, or None for the default order.
        suite: The suite file.
        models: Folders in which GGUF files are looked up.
        strict: Whether INCONCLUSIVE fails.
        report: Folder for ``results.json`` and ``index.html``, or None.
        budget: Most seconds one test may spend on measuring again.
        machine: The machine's key, or None to make one from its hardware.
        baselines: Folder of the committed baselines.
        cache: Cache folder: builds, models, hashes.
        root: pytest's root folder.
        tolerances: Metric name to relative tolerance, from the ini file.
        launches: Fresh starts measured for a recorded baseline and against one.
        pairs: Pairs of requests in a side-by-side block.
        start_timeout: Seconds a server may take to become ready.
        hang_timeout: Seconds without a byte after which a request counts as hung.
        foreign_load: Cores that other programs may keep busy while something is measured.
        pass_limit: Most seconds that a pass over a corpus may be expected to take.
        containers: How containers are run.
        bandwidth: Of the memory that is decoded from, GB/s, or None for what NVML tells.
    """

    baseline: str | None
    update: bool
    build: str | None
    suite: Path
    models: tuple[Path, ...]
    strict: bool
    report: Path | None
    budget: float
    machine: str | None
    baselines: Path
    cache: Path
    root: Path
    tolerances: Mapping[str, float]
    launches: int
    pairs: int
    start_timeout: float = DEFAULT_START_TIMEOUT
    hang_timeout: float = DEFAULT_HANG_TIMEOUT
    foreign_load: float = math.inf
    pass_limit: float = DEFAULT_PASS_LIMIT
    containers: Containers = Containers()
    bandwidth: float | None = None


def read_settings(
    *,
    option: Callable[[str], object],
    ini: Callable[[str], object],
    environment: Mapping[str, str],
    root: Path,
    invoked_from: Path,
    cache: Path,
) -> Settings:
    """Merge the three sources: the command line wins over the ini file over the environment.

    Paths from the command line are relative to where pytest was called, those from the ini file
    to the root folder.

    Args:
        option: Returns a command-line option by its destination.
        ini: Returns an ini value by name.
        environment: Environment variables.
        root: pytest's root folder.
        invoked_from: Folder pytest was called in.
        cache: Default cache folder; ``LLMPERF_CACHE`` wins.

    Raises:
        PlanError: If a value is not what its option takes.
    """

    def text(name: str) -> str | None:
        given = option(f"llmperf_{name}")
        if given and _RELATIVE.match(str(given)):
            return str(invoked_from / str(given))
        value = given or ini(f"llmperf_{name}")
        return str(value) if value else None

    def path(name: str, default: str) -> Path:
        if given := option(f"llmperf_{name}"):
            return invoked_from / _path(given)
        return root / _path(ini(f"llmperf_{name}") or default)

    baseline = text("baseline")
    update = bool(option("llmperf_update"))
    if update and option("llmperf_baseline"):
        raise PlanError(
            "--update-baselines records and --baseline compares: run them one after the other"
        )
    report = option("llmperf_report")
    given_models = _strings(option("llmperf_models"))
    from_ini = [root / _path(folder) for folder in _strings(ini("llmperf_models"))]
    from_env = [
        _path(folder) for folder in environment.get("LLMPERF_MODELS", "").split(":") if folder
    ]
    cache_folder = environment.get("LLMPERF_CACHE")
    return Settings(
        baseline=baseline,
        update=update,
        build=text("build"),
        suite=path("suite", DEFAULT_SUITE),
        models=(
            *(invoked_from / _path(folder) for folder in given_models),
            *from_ini,
            *from_env,
        ),
        strict=bool(option("llmperf_strict")),
        report=invoked_from / _path(report) if report else None,
        budget=_number(
            option("llmperf_budget"), ini("llmperf_budget"), DEFAULT_BUDGET, "budget", 0.0
        ),
        machine=str(ini("llmperf_machine") or "") or environment.get("LLMPERF_MACHINE") or None,
        baselines=root / _path(ini("llmperf_baselines") or DEFAULT_BASELINES),
        cache=_path(cache_folder).absolute() if cache_folder else cache,
        root=root,
        tolerances=_tolerances(_strings(ini("llmperf_tolerances"))),
        launches=_count(ini("llmperf_launches"), DEFAULT_LAUNCHES, "launches"),
        pairs=_count(ini("llmperf_pairs"), DEFAULT_PAIRS, "pairs"),
        start_timeout=_number(
            None, ini("llmperf_start_timeout"), DEFAULT_START_TIMEOUT, "start_timeout", 1.0
        ),
        hang_timeout=_number(
            None, ini("llmperf_hang_timeout"), DEFAULT_HANG_TIMEOUT, "hang_timeout", 1.0
        ),
        foreign_load=_foreign_load(ini("llmperf_foreign_load")),
        pass_limit=_number(None, ini("llmperf_pass_limit"), DEFAULT_PASS_LIMIT, "pass_limit", 1.0),
        containers=read_containers(ini, environment),
        bandwidth=_bandwidth(ini("llmperf_bandwidth")),
    )


def read_containers(ini: Callable[[str], object], environment: Mapping[str, str]) -> Containers:
    """Return how containers are run; the ini file wins over the environment.

    Raises:
        PlanError: If a value is not what a shell would take as words.
    """

    def words(name: str) -> tuple[str, ...]:
        from_ini = str(ini(f"llmperf_{name}") or "")
        place = f"ini llmperf_{name}" if from_ini else f"LLMPERF_{name.upper()}"
        value = from_ini or environment.get(f"LLMPERF_{name.upper()}", "")
        try:
            return tuple(shlex.split(value))
        except ValueError as error:
            raise PlanError(f"{place}: {value!r}: {error}") from None

    return Containers(engine=words("container"), run=words("container_run"))


def _path(value: object) -> Path:
    try:
        return Path(str(value)).expanduser()
    except RuntimeError as error:
        raise PlanError(f"`{value}`: there is no such user: write the path in full") from error


def _strings(value: object) -> Sequence[str]:
    if isinstance(value, list | tuple):
        return [str(item) for item in value]
    return [str(value)] if value else []


def _number(given: object, from_ini: object, default: float, name: str, least: float) -> float:
    raw = given if given is not None else from_ini
    if raw is None or raw == "":
        return float(default)
    place = f"--llmperf-{name}" if given is not None else f"ini llmperf_{name}"
    try:
        value = float(str(raw))
    except ValueError:
        raise PlanError(f"{place}: {raw!r} is no number") from None
    if not least <= value < float("inf"):
        raise PlanError(f"{place}: {raw} must be a finite number of at least {least:g}")
    return value


def _count(from_ini: object, default: int, name: str) -> int:
    value = _number(None, from_ini, default, name, 1.0)
    if not value.is_integer():
        raise PlanError(f"ini llmperf_{name}: {from_ini} must be a whole number")
    return int(value)


def default_foreign_load() -> float:
    """Cores that other programs may keep busy: a tenth of all, half a core at least."""
    return max(0.5, 0.1 * (os.cpu_count() or 1))


def _foreign_load(from_ini: object) -> float:
    if str(from_ini or "") == "off":
        return math.inf
    return _number(None, from_ini, default_foreign_load(), "foreign_load", 0.0)


def _bandwidth(from_ini: object) -> float | None:
    if not from_ini:
        return None
    return _number(None, from_ini, 0.0, "bandwidth", 1.0)


def _tolerances(lines: Sequence[str]) -> dict[str, float]:
    found = {}
    for line in lines:
        name, _, value = (part.strip() for part in line.partition("="))
        try:
            number: object = float(value)
        except ValueError:
            number = value
        try:
            found[name] = check_tolerance(name, number)
        except PlanError as error:
            raise PlanError(f"ini llmperf_tolerances: `{line}`: {error}") from None
    return found
