"""The baselines folder: BUILD/MACHINE.json, read, found and updated.

Two processes may update a file at once: each reads, changes and replaces it under a lock, so
neither loses what the other wrote. A file is replaced as a whole, so a process that is killed
leaves the old file or the new one, never a part.

Launches of speed and memory gather: each update adds its own, and the oldest go. Quality has no
launches: its metrics hold the chunks of one pass over a corpus, in the order of the text
(:mod:`pytest_llmperf.judge.chunks`), and the next pass takes their place as a whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType

from filelock import FileLock, Timeout

from pytest_llmperf.errors import BaselineError
from pytest_llmperf.files import cache_folder, replacing
from pytest_llmperf.judge._schema import (
    Baseline,
    Failure,
    Launch,
    Place,
    Recorded,
    Scalar,
    check_build,
    check_case,
    check_failure,
    check_fingerprint,
    check_launches,
    check_machine,
    check_metric,
    check_recorded,
    dump,
    parse,
    rounded,
    validate_label,
)
from pytest_llmperf.judge.chunks import QUALITY, complaint, pooled
from pytest_llmperf.judge.references import Kept, drop_references, keep_reference
from pytest_llmperf.metrics import METRICS

__all__ = [
    "Baseline",
    "Change",
    "Failure",
    "Measured",
    "Recorded",
    "beforehand",
    "dump",
    "find",
    "labels",
    "load",
    "lock_path",
    "newest",
    "oldest",
    "parse",
    "stale",
    "update",
    "validate_label",
    "write_atomic",
]

MOST_LAUNCHES = 20
"""Launches kept for a metric of a case; the oldest go first."""

LOCK_TIMEOUT_S = 60.0
"""Longest wait for another process that updates the same file: an update takes well under 1 s."""


_FROM_ANSWERS = frozenset({"prompt", "vram", "reference", "tokens"})
"""Parts of a fingerprint that only what was measured tells."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured of one case.

    Attributes:
        fingerprint: What must be equal for two results to be comparable; flat. With quality metrics
            ``tokens``: the scored tokens of one chunk.
        metrics: Samples of each launch, for each metric, in the metric's unit. Metrics with as
            many launches as each other come from the same launches, in the same order. Of a
            quality metric the values of each chunk of one pass, all of them.
        failed: Why it could not be measured; then `metrics` do not count.
    """

    fingerprint: Mapping[str, Scalar]
    metrics: Mapping[str, Sequence[Sequence[float]]]
    failed: Failure | None = None


@dataclass(frozen=True, slots=True)
class Change:
    """What an update did to one metric of one case.

    Attributes:
        case: ``CONFIG/WORKLOAD``.
        metric: Name of the metric, ``""`` for a failure of the case.
        old: Value before, None if there was none.
        new: Value after, None if the metric was dropped with its outdated fingerprint.
        launches_before: Launches before, chunks of a quality metric.
        launches_after: Launches after, likewise.
        replaced: The fingerprint differed, so older launches were discarded.
        failed: The failure that was recorded, in words; ``""`` for none.
    """

    case: str
    metric: str
    old: float | None
    new: float | None
    launches_before: int
    launches_after: int
    replaced: bool
    failed: str = ""


def load(path: Path) -> Baseline:
    """Read and check a baseline file.

    Raises:
        BaselineError: The file cannot be read, or holds what schema 1 does not allow; the
            message gives file and JSON path.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BaselineError(f"{path}: no such file: record it with --update-baselines") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BaselineError(f"{path}: cannot be read: {error}") from None
    return parse(text, path)


def beforehand(fingerprint: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """The part of a fingerprint that is known of a case which could not be measured, too."""
    return {name: value for name, value in fingerprint.items() if name not in _FROM_ANSWERS}


def write_atomic(path: Path, text: str) -> None:
    """Replace a file as a whole, durably: a reader or a crash sees the old file or the new.

    Raises:
        OSError: The folder or file cannot be written.
    """
    with replacing(path) as file:
        file.write(text.encode())


def lock_path(path: Path) -> Path:
    """The lock that guards a baseline file; in the cache, not in the committed folder.

    It holds among the processes of one user on one host.
    """
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()
    return cache_folder() / "locks" / f"{name}.lock"


def update(
    path: Path,
    *,
    build: Mapping[str, object],
    machine: Mapping[str, object],
    recorded: Mapping[str, object],
    measured: Mapping[str, Measured],
    references: Mapping[str, Kept] = MappingProxyType({}),
    most_launches: int = MOST_LAUNCHES,
) -> list[Change]:
    """Add measured launches to a baseline file, which is made if there is none.

    Launches that the file already holds are not added again, so that an update made twice is
    made once. A case whose fingerprint differs is replaced; all else in the file stays.

    The chunks of a quality metric are those of one pass: they replace the ones that the file holds,
    and the value is that of the whole pass.

    A failure takes the place of a case's results, and results that of its failure. But results
    that were measured under the same conditions stay: memory was short for another reason then.

    Args:
        path: ``BUILD/MACHINE.json``.
        build: As in the file; ``label`` at least.
        machine: As in the file; ``key`` at least.
        recorded: As in the file, with ``by`` ``measured``.
        measured: What was measured, for each case ``CONFIG/WORKLOAD``.
        references: What answers were compared with, for cases of ``measured`` that need it later.
        most_launches: Launches kept for a metric of a case; chunks are all kept.

    Returns:
        What changed; empty if nothing did, and then the file is not touched.

    Raises:
        BaselineError: A value that the file cannot hold, a file that holds published figures,
            another build or another machine, a failure of what was measured under the same
            conditions, or a file or lock that cannot be had.
    """
    place = Place(path)
    build = check_build(build, place.at("build"))
    machine = check_machine(machine, place.at("machine"))
    recorded = check_recorded(recorded, place.at("recorded"))
    if recorded["by"] != "measured":
        raise place.at("recorded").at("by").error("an update holds measured launches only")
    checked = {
        case: _checked(case, entry, place.at("results").at(case), most_launches)
        for case, entry in measured.items()
    }
    try:
        with _locked(path):
            for leftover in path.parent.glob(f".{path.name}.*.tmp"):
                leftover.unlink(missing_ok=True)  # of a process that was killed
            old = load(path) if path.exists() else Baseline(build, machine, recorded, {}, {})
            _check_same(old, build, machine, place)
            results = {case: dict(metrics) for case, metrics in old.results.items()}
            fingerprints = {case: dict(entry) for case, entry in old.fingerprints.items()}
            failures = dict(old.failures)
            new = Baseline(build, machine, recorded, results, fingerprints, failures)
            changes = []
            for case in sorted(checked):
                if checked[case].failed is not None:
                    where = place.at("results").at(case)
                    changes += _fail(case, checked[case], results, fingerprints, failures, where)
                elif merged := _merge(case, checked[case], results, fingerprints, most_launches):
                    failures.pop(case, None)
                    changes += merged
            # Also where nothing else changed: one may be lost or damaged.
            for case, kept in references.items():
                keep_reference(path, case, kept)
            if changes:
                write_atomic(path, dump(new))
                named = {str(entry.get("reference", "")) for entry in fingerprints.values()}
                drop_references(path, named)
            return changes
    except OSError as error:
        raise BaselineError(f"{path}: cannot be updated: {error}") from error


def stale(baseline: Baseline, cases: Collection[str]) -> list[str]:
    """The cases in a baseline that the suite file no longer makes, sorted."""
    return sorted({*baseline.results, *baseline.failures} - set(cases))


def find(folder: Path, name: str, machine_key: str) -> Path | None:
    """The baseline file ``NAME/MACHINE.json`` below ``folder``, None if there is none.

    A name that cannot be a label, such as a build spec, has no file.

    Raises:
        BaselineError: ``machine_key`` cannot be the name of a file.
    """
    validate_label(machine_key)
    try:
        validate_label(name)
    except BaselineError:
        return None
    path = folder / name / f"{machine_key}.json"
    return path if path.is_file() else None


def labels(folder: Path) -> list[str]:
    """The labels below ``folder`` that have a baseline for some machine, sorted."""
    return sorted({path.parent.name for path in _files(folder)})


def newest(folder: Path, machine_key: str) -> str | None:
    """The label recorded for a machine with the highest build number, then the latest date.

    Raises:
        BaselineError: ``machine_key`` or one of the machine's files is not valid.
    """
    ranked = _ranked(folder, machine_key)
    return max(ranked)[2] if ranked else None


def oldest(folder: Path, machine_key: str) -> str | None:
    """The label recorded for a machine with the lowest known build number, then the earliest date.

    Raises:
        BaselineError: ``machine_key`` or one of the machine's files is not valid.
    """
    ranked = _ranked(folder, machine_key)
    # A number that nobody knows is no sign of age.
    return min([one for one in ranked if one[0] >= 0] or ranked)[2] if ranked else None


def _ranked(folder: Path, machine_key: str) -> list[tuple[int, str, str]]:
    """Build number (-1 where not known), date and label of all that was recorded for a machine."""
    validate_label(machine_key)
    ranked = []
    for path in _files(folder):
        if path.stem == machine_key:
            baseline = load(path)
            number = -1 if baseline.number is None else baseline.number
            ranked.append((number, str(baseline.recorded["at"]), path.parent.name))
    return ranked


def _files(folder: Path) -> Iterator[Path]:
    for path in folder.glob("*/*.json"):
        with contextlib.suppress(BaselineError):
            validate_label(path.parent.name)
            validate_label(path.stem)
            if path.is_file():
                yield path


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of a baseline file; the kernel frees it when its holder dies."""
    lock = lock_path(path)
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(lock, timeout=LOCK_TIMEOUT_S):
            yield
    except Timeout:
        raise BaselineError(
            f"{path}: another process has been updating it for {LOCK_TIMEOUT_S:.0f} s: "
            f"end it, then try again (lock {lock})"
        ) from None


def _checked(case: str, entry: Measured, place: Place, most: int) -> Measured:
    """``entry`` as the file would hold it, so that it can be compared with what is there."""
    check_case(case, place)
    fingerprint = check_fingerprint(entry.fingerprint, place.at("fingerprint"))
    metrics: dict[str, tuple[Launch, ...]] = {}
    for name, launches in entry.metrics.items():
        check_metric(name, place.at(name))
        checked = check_launches(launches, place.at(name))
        if _is_pass(name):
            _check_pass(name, checked, fingerprint, place)
        else:
            checked = checked[-most:]
        metrics[name] = tuple(tuple(rounded(v) for v in one) for one in checked)
    if entry.failed is not None:
        check_failure(asdict(entry.failed), place.at("failed"))
    return Measured(fingerprint, metrics, entry.failed)


def _is_pass(name: str) -> bool:
    """Whether a metric's lists are the chunks of one pass, not launches."""
    return METRICS[name].scope == "quality"


def _check_pass(
    name: str, chunks: tuple[Launch, ...], fingerprint: Mapping[str, Scalar], place: Place
) -> None:
    """Refuse a pass that could not be judged."""
    if name not in QUALITY:
        raise place.at(name).error(f"is only published, record one of {', '.join(QUALITY)}")
    tokens = fingerprint.get("tokens")
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        where = place.at("fingerprint").at("tokens")
        raise where.error(f"{name} needs the number of scored tokens of a chunk, got {tokens!r}")
    if wrong := complaint(METRICS[name], chunks, tokens):
        raise place.at(name).error(f"cannot be recorded: {wrong}")


def _check_same(
    old: Baseline, build: Mapping[str, object], machine: Mapping[str, object], place: Place
) -> None:
    """Refuse to mix launches that do not belong together."""
    if old.published:
        raise (
            place.at("recorded")
            .at("by")
            .error(
                "these figures are published, not measured: choose another label or delete the file"
            )
        )
    pairs = [(old.build, build, "build", key) for key in ("label", "number", "commit", "sha256")]
    pairs.append((old.machine, machine, "machine", "key"))
    for before, now, part, key in pairs:
        was, is_ = before.get(key), now.get(key)
        if was is not None and is_ is not None and was != is_:
            raise (
                place.at(part)
                .at(key)
                .error(
                    f"the file holds {was!r}, measured was {is_!r}: "
                    "choose another label or delete the file"
                )
            )


def _merge(
    case: str,
    entry: Measured,
    results: dict[str, dict[str, Recorded]],
    fingerprints: dict[str, dict[str, Scalar]],
    most: int,
) -> list[Change]:
    """Merge one case into ``results`` and ``fingerprints``; returns what changed."""
    if not entry.metrics:
        return []
    before = results.get(case, {})
    # As text, because True == 1 in Python but not in the file.
    same = json.dumps(fingerprints.get(case, {}), sort_keys=True) == json.dumps(
        dict(entry.fingerprint), sort_keys=True
    )
    replaced = bool(before) and not same
    kept = {} if replaced else before
    held = {name: recorded.launches or () for name, recorded in kept.items()}
    after = dict(kept)
    for name, launches in _unseen(entry.metrics, held).items():
        metric = METRICS[name]
        if _is_pass(name):
            together = tuple(launches)
            value = pooled(metric, together, int(entry.fingerprint["tokens"]))
        else:
            together = (*held.get(name, ()), *launches)[-most:]
            value = _median([_median(launch) for launch in together])
        after[name] = Recorded(metric.unit, metric.better, together, rounded(value))
    changes = [
        _change(case, name, before.get(name), after.get(name), replaced=replaced)
        for name in sorted({*before, *after})
        if replaced or before.get(name) != after.get(name)
    ]
    if changes:
        results[case] = after
        fingerprints[case] = dict(entry.fingerprint)
    return changes


def _fail(  # noqa: PLR0917 - one case, and the parts of a file it changes
    case: str,
    entry: Measured,
    results: dict[str, dict[str, Recorded]],
    fingerprints: dict[str, dict[str, Scalar]],
    failures: dict[str, Failure],
    place: Place,
) -> list[Change]:
    """Put a failure in the place of a case's results; returns what changed.

    Raises:
        BaselineError: They were measured under the same conditions.
    """
    failed = entry.failed
    kept, now = beforehand(fingerprints.get(case, {})), beforehand(entry.fingerprint)
    before = results.get(case, {})
    # Of results it does not matter how long they might have taken.
    if before and kept == {name: value for name, value in now.items() if name != "limit"}:
        raise place.error(
            "launches of it were recorded under the same conditions, and now it "
            f"{'' if failed is None else failed.words}: find out what else takes memory or time, "
            "or delete the case to record that"
        )
    if failed is None or (failures.get(case) == failed and kept == now):
        return []
    results.pop(case, None)
    failures[case] = failed
    fingerprints[case] = dict(entry.fingerprint)
    dropped = [_change(case, name, before[name], None, replaced=True) for name in sorted(before)]
    return [
        *dropped,
        Change(case, "", None, None, 0, 0, replaced=bool(before), failed=failed.words),
    ]


def _median(values: Sequence[float]) -> float:
    """The median; unlike that of ``statistics`` finite for all finite values."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    if len(ordered) % 2:
        return float(ordered[middle])
    return ordered[middle - 1] / 2 + ordered[middle] / 2


def _unseen(
    metrics: Mapping[str, Sequence[Sequence[float]]], held: Mapping[str, Sequence[Launch]]
) -> dict[str, list[Launch]]:
    """The launches of each metric that are not held yet; metrics without any are left out.

    Of a quality metric all chunks, unless just these are held.

    A launch is known by its timings: no two launches have the same. Sizes do repeat from launch
    to launch, so a launch's sizes count as held when its timings do. Without timings to go by,
    a value is new as often as it was measured more often than it is held.
    """
    batches = {name: [tuple(one) for one in launches] for name, launches in metrics.items()}
    timings = [name for name in batches if METRICS[name].kind == "timing"]
    unseen: dict[str, list[Launch]] = {}
    for name, batch in batches.items():
        marks = [mark for mark in timings if len(batches[mark]) == len(batch)]
        if name not in held:
            fresh = batch
        elif _is_pass(name):
            fresh = batch if tuple(batch) != held[name] else []
        elif marks:
            known = {
                index
                for mark in marks
                for index, launch in enumerate(batches[mark])
                if launch in held.get(mark, ())
            }
            fresh = [launch for index, launch in enumerate(batch) if index not in known]
        else:
            left = list(held[name])
            fresh = []
            for launch in batch:
                if launch in left:
                    left.remove(launch)
                else:
                    fresh.append(launch)
        if fresh:
            unseen[name] = fresh
    return unseen


def _change(
    case: str, name: str, before: Recorded | None, after: Recorded | None, *, replaced: bool
) -> Change:
    return Change(
        case=case,
        metric=name,
        old=None if before is None else before.value,
        new=None if after is None else after.value,
        launches_before=0 if before is None else len(before.launches or ()),
        launches_after=0 if after is None else len(after.launches or ()),
        replaced=replaced,
    )
