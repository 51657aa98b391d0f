"""The baseline file, schema 1: from JSON text to checked values and back.

Knows nothing of files beyond the name that an error gives.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from pytest_llmperf.errors import BaselineError
from pytest_llmperf.metrics import METRICS, Better

SCHEMA = 1

Scalar = str | int | float | bool
Launch = tuple[float, ...]

BUILD_KEYS = ("label", "number", "commit", "source", "sha256")
MACHINE_KEYS = ("key", "gpu", "driver", "cpu", "os")
RECORDED_KEYS = ("at", "by", "source")

FAILURES = {"oom": "runs out of memory", "too-slow": "is too slow"}
"""Kinds of failures that can be recorded, in words."""

_DIGITS = 6
_LABEL = re.compile(r"[A-Za-z0-9_+][A-Za-z0-9._+-]{0,63}")
_CASE = re.compile(r"[^/\s][^/\x00-\x1f]*(/[^/\x00-\x1f]+)+")
_PLAIN_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# Whole numbers up to here are exact in a float, so they are written out in full.
_EXACT = 2.0**53


@dataclass(frozen=True, slots=True)
class Recorded:
    """What a baseline holds for one metric of one case.

    Attributes:
        unit: Unit of the metric.
        better: Its better direction.
        launches: Samples of each launch in ``unit``, oldest first; None for a published figure. Of
            a quality metric the values of each chunk of one pass, in the order of the text.
        value: Median of the launch medians, value of the whole pass, or the published figure, in
            ``unit``.
    """

    unit: str
    better: Better
    launches: tuple[Launch, ...] | None
    value: float


@dataclass(frozen=True, slots=True)
class Failure:
    """That a case cannot be measured, and why: recorded in the place of its results.

    Attributes:
        kind: One of :data:`FAILURES`.
        what: What ran out, or how slow it is, in a few words: ``CUDA0 model buffer of 8984 MiB``.
    """

    kind: str
    what: str

    @property
    def words(self) -> str:
        """The failure for people: ``runs out of memory (CUDA0 model buffer of 8984 MiB)``."""
        return f"{FAILURES[self.kind]} ({self.what})"


@dataclass(frozen=True, slots=True)
class Baseline:
    """Recorded launches of one build on one machine.

    Attributes:
        build: ``label`` and, where known, ``number``, ``commit``, ``source``, ``sha256``.
        machine: ``key`` and, where known, ``gpu``, ``driver``, ``cpu``, ``os``.
        recorded: ``at`` (ISO date), ``by`` (``measured`` or ``published``), ``source``.
        results: For each case ``CONFIG/WORKLOAD`` what is recorded of each metric.
        fingerprints: For each case what must be equal for two results to be comparable.
        failures: Cases ``CONFIG/WORKLOAD`` that cannot be measured; `results` have none of them.
    """

    build: Mapping[str, object]
    machine: Mapping[str, object]
    recorded: Mapping[str, object]
    results: Mapping[str, Mapping[str, Recorded]]
    fingerprints: Mapping[str, Mapping[str, Scalar]]
    failures: Mapping[str, Failure] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The name of the build, which is the name of the folder."""
        return str(self.build["label"])

    @property
    def number(self) -> int | None:
        """The build's number, None if it is not known."""
        number = self.build.get("number")
        return number if isinstance(number, int) else None

    @property
    def machine_key(self) -> str:
        """The name of the machine, which is the name of the file."""
        return str(self.machine["key"])

    @property
    def published(self) -> bool:
        """Whether the numbers were taken from a report, without samples."""
        return self.recorded["by"] == "published"


def validate_label(name: str) -> str:
    """``name`` if it may name a folder or file of a baseline.

    Raises:
        BaselineError: Other than 1 to 64 letters, digits, ``.``, ``_``, ``+`` and ``-``, or
            one that starts with ``.`` or ``-``.
    """
    if not _LABEL.fullmatch(name):
        raise BaselineError(
            f"baseline name {name!r}: use 1 to 64 letters, digits, '.', '_', '+' and '-', "
            "and start with none of '.' and '-'"
        )
    return name


def rounded(value: float) -> float:
    """``value`` as the file keeps it: six significant digits, whole numbers in full."""
    if isinstance(value, int) or (value.is_integer() and abs(value) < _EXACT):
        return value
    return float(f"{value:.{_DIGITS}g}")


def dump(baseline: Baseline) -> str:
    """The text of a baseline file: sorted keys, one launch a line, fixed float format."""
    results: dict[str, object] = {
        case: {
            name: {
                "unit": entry.unit,
                "better": entry.better,
                "launches": None
                if entry.launches is None
                else [[rounded(v) for v in launch] for launch in entry.launches],
                "value": rounded(entry.value),
            }
            for name, entry in metrics.items()
        }
        for case, metrics in baseline.results.items()
    }
    document: dict[str, object] = {
        "schema": SCHEMA,
        "build": baseline.build,
        "machine": baseline.machine,
        "recorded": baseline.recorded,
        "results": results,
        "fingerprints": baseline.fingerprints,
    }
    if baseline.failures:
        document["failures"] = {
            case: {"kind": one.kind, "what": one.what} for case, one in baseline.failures.items()
        }
    return _text(document, 0) + "\n"


def _text(value: object, depth: int) -> str:
    pad, end = "  " * (depth + 1), "\n" + "  " * depth
    if isinstance(value, Mapping) and value:
        lines = (f"{pad}{_scalar(key)}: {_text(value[key], depth + 1)}" for key in sorted(value))
        return "{\n" + ",\n".join(lines) + end + "}"
    if isinstance(value, list | tuple) and any(
        isinstance(v, list | tuple | Mapping) for v in value
    ):
        return "[\n" + ",\n".join(pad + _text(item, depth + 1) for item in value) + end + "]"
    return _scalar(value)


def _scalar(value: object) -> str:
    # Escaped to ASCII: a lone surrogate in a name could not be written otherwise.
    return json.dumps(value, allow_nan=False)


# --- Reading ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Place:
    """A value's place, for error messages: the file and the path inside it."""

    file: Path
    path: str = "$"

    def at(self, key: str | int) -> Place:
        """The place of an entry of the object or list at this place."""
        if isinstance(key, str) and _PLAIN_KEY.fullmatch(key):
            return Place(self.file, f"{self.path}.{key}")
        return Place(self.file, f"{self.path}[{key!r}]")

    def error(self, message: str) -> BaselineError:
        """The error to raise about the value at this place."""
        return BaselineError(f"{self.file}: {self.path}: {message}")


def parse(text: str, file: Path) -> Baseline:
    """The baseline in ``text``.

    Args:
        text: Content of a baseline file.
        file: Its path, for error messages.

    Raises:
        BaselineError: Anything that schema 1 does not allow, with file and JSON path.
    """
    place = Place(file)
    try:
        document = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise BaselineError(f"{file}: no valid JSON: {error}") from None
    top = _mapping(document, place)
    # The schema first: under another one the keys below mean nothing.
    schema = top.get("schema")
    if isinstance(schema, bool) or schema != SCHEMA:
        raise place.at("schema").error(
            f"{schema!r} is not known, this version reads schema {SCHEMA}: "
            "update pytest-llmperf or record the baseline again"
        )
    needed = ("schema", "build", "machine", "recorded", "results")
    _keys(top, place, (*needed, "fingerprints", "failures"), needed)
    recorded = check_recorded(top["recorded"], place.at("recorded"))
    results = _results(top["results"], place.at("results"), str(recorded["by"]))
    failures = _failures(top.get("failures", {}), place.at("failures"), results)
    return Baseline(
        build=check_build(top["build"], place.at("build")),
        machine=check_machine(top["machine"], place.at("machine")),
        recorded=recorded,
        results=results,
        fingerprints=_fingerprints(
            top.get("fingerprints", {}), place.at("fingerprints"), {**results, **failures}
        ),
        failures=failures,
    )


def check_build(value: object, place: Place) -> dict[str, object]:
    """A checked ``build`` object; ``BaselineError`` otherwise."""
    data = _mapping(value, place)
    _keys(data, place, BUILD_KEYS, ("label",))
    validate_at(data["label"], place.at("label"))
    number = data.get("number")
    if number is not None and (isinstance(number, bool) or not isinstance(number, int)):
        raise place.at("number").error(f"expected a whole number or null, got {number!r}")
    _strings(data, place, ("commit", "source", "sha256"))
    return dict(data)


def check_machine(value: object, place: Place) -> dict[str, object]:
    """A checked ``machine`` object; ``BaselineError`` otherwise."""
    data = _mapping(value, place)
    _keys(data, place, MACHINE_KEYS, ("key",))
    validate_at(data["key"], place.at("key"))
    _strings(data, place, ("driver", "cpu", "os"))
    gpus = data.get("gpu", [])
    if not isinstance(gpus, list | tuple):
        raise place.at("gpu").error(f"expected a list, got {gpus!r}")
    for index, gpu in enumerate(gpus):
        where = place.at("gpu").at(index)
        if isinstance(gpu, Mapping):
            for key, item in _mapping(gpu, where).items():
                if item is not None:
                    _check_scalar(item, where.at(key))
        elif not isinstance(gpu, str):
            raise where.error(f"expected a string or an object, got {gpu!r}")
    return {**data, "gpu": list(gpus)} if "gpu" in data else dict(data)


def check_recorded(value: object, place: Place) -> dict[str, object]:
    """A checked ``recorded`` object; ``BaselineError`` otherwise."""
    data = _mapping(value, place)
    _keys(data, place, RECORDED_KEYS, ("at", "by"))
    at = data["at"]
    if not isinstance(at, str) or not _is_date(at):
        raise place.at("at").error(f"expected an ISO date like 2026-02-27, got {at!r}")
    if data["by"] not in ("measured", "published"):
        raise place.at("by").error(f"expected 'measured' or 'published', got {data['by']!r}")
    _strings(data, place, ("source",))
    return dict(data)


def check_case(case: str, place: Place) -> None:
    """Raise ``BaselineError`` unless ``case`` is like ``CONFIG/WORKLOAD``."""
    if not _CASE.fullmatch(case):
        raise place.error(f"case {case!r}: expected CONFIG/WORKLOAD")


def check_metric(name: str, place: Place) -> None:
    """Raise ``BaselineError`` unless ``name`` is a metric."""
    if name not in METRICS:
        raise place.error(f"no metric has this name: known are {', '.join(sorted(METRICS))}")


def check_fingerprint(value: object, place: Place) -> dict[str, Scalar]:
    """A checked fingerprint, flat; ``BaselineError`` otherwise."""
    return {key: _check_scalar(item, place.at(key)) for key, item in _mapping(value, place).items()}


def check_launches(value: object, place: Place) -> tuple[Launch, ...]:
    """Checked launches, none of them empty; ``BaselineError`` otherwise."""
    return tuple(
        tuple(_number(sample, at) for sample, at in _items(launch, where))
        for launch, where in _items(value, place)
    )


def validate_at(value: object, place: Place) -> None:
    """``validate_label`` that says where the name stands."""
    if not isinstance(value, str):
        raise place.error(f"expected a string, got {value!r}")
    try:
        validate_label(value)
    except BaselineError as error:
        raise place.error(str(error)) from None


def _results(value: object, place: Place, by: str) -> dict[str, dict[str, Recorded]]:
    results: dict[str, dict[str, Recorded]] = {}
    for case, metrics in _mapping(value, place).items():
        where = place.at(case)
        check_case(case, where)
        results[case] = {
            name: _entry(name, entry, where.at(name), by)
            for name, entry in _mapping(metrics, where).items()
        }
    return results


def _entry(name: str, value: object, place: Place, by: str) -> Recorded:
    check_metric(name, place)
    metric = METRICS[name]
    data = _mapping(value, place)
    keys = ("unit", "better", "launches", "value")
    _keys(data, place, keys, keys)
    for key, expected in (("unit", metric.unit), ("better", metric.better)):
        if data[key] != expected:
            raise place.at(key).error(f"{name} has {expected!r}, got {data[key]!r}")
    launches = data["launches"]
    if (launches is None) != (by == "published"):
        rule = "a published figure has null" if by == "published" else "measured needs launches"
        raise place.at("launches").error(f"{rule} here (recorded.by is {by!r})")
    return Recorded(
        unit=metric.unit,
        better=metric.better,
        launches=None if launches is None else check_launches(launches, place.at("launches")),
        value=_number(data["value"], place.at("value")),
    )


def _failures(value: object, place: Place, results: Mapping[str, object]) -> dict[str, Failure]:
    checked: dict[str, Failure] = {}
    for case, failure in _mapping(value, place).items():
        where = place.at(case)
        check_case(case, where)
        if case in results:
            raise where.error("results have this case too: it was measured, or it failed")
        checked[case] = check_failure(failure, where)
    return checked


def check_failure(value: object, place: Place) -> Failure:
    """A checked failure of a case; ``BaselineError`` otherwise."""
    data = _mapping(value, place)
    _keys(data, place, ("kind", "what"), ("kind", "what"))
    if data["kind"] not in FAILURES:
        expected = ", ".join(map(repr, FAILURES))
        raise place.at("kind").error(f"expected one of {expected}, got {data['kind']!r}")
    if not isinstance(data["what"], str) or not data["what"].strip():
        raise place.at("what").error(f"expected what ran out, in words, got {data['what']!r}")
    return Failure(kind=str(data["kind"]), what=data["what"])


def _fingerprints(
    value: object, place: Place, results: Mapping[str, object]
) -> dict[str, dict[str, Scalar]]:
    checked: dict[str, dict[str, Scalar]] = {}
    for case, fingerprint in _mapping(value, place).items():
        if case not in results:
            raise place.at(case).error("results have no such case")
        checked[case] = check_fingerprint(fingerprint, place.at(case))
    return checked


def _mapping(value: object, place: Place) -> Mapping[str, object]:
    if not isinstance(value, Mapping):
        raise place.error(f"expected an object, got {type(value).__name__}")
    if bad := [key for key in value if not isinstance(key, str)]:
        raise place.error(f"keys must be strings, got {bad[0]!r}")
    return value


def _items(value: object, place: Place) -> list[tuple[object, Place]]:
    if not isinstance(value, list | tuple):
        raise place.error(f"expected a list, got {type(value).__name__}")
    if not value:
        raise place.error("expected at least one entry")
    return [(item, place.at(index)) for index, item in enumerate(value)]


def _keys(
    data: Mapping[str, object], place: Place, known: Iterable[str], needed: Iterable[str]
) -> None:
    if unknown := sorted(data.keys() - set(known)):
        raise place.at(unknown[0]).error(f"unknown key: known are {', '.join(known)}")
    if missing := [key for key in needed if key not in data]:
        raise place.error(f"key {missing[0]!r} is missing")


def _strings(data: Mapping[str, object], place: Place, names: Iterable[str]) -> None:
    for name in names:
        value = data.get(name)
        if value is not None and not isinstance(value, str):
            raise place.at(name).error(f"expected a string or null, got {value!r}")


def _number(value: object, place: Place) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise place.error(f"expected a number, got {value!r}")
    try:
        finite = math.isfinite(value)
    except OverflowError:  # an integer too large for a float
        finite = False
    if not finite:
        raise place.error("expected a finite number")
    return value


def _is_date(text: str) -> bool:
    try:
        datetime.fromisoformat(text)
    except ValueError:
        return False
    return True


def _check_scalar(value: object, place: Place) -> Scalar:
    if isinstance(value, str | bool):
        return value
    if isinstance(value, int | float):
        return _number(value, place)
    raise place.error(f"expected a string, number or true/false, got {value!r}")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a finite number")


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    data = dict(pairs)
    if len(data) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {twice!r} occurs twice")
    return data
