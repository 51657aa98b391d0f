"""What was found out about one metric of one case."""

from __future__ import annotations

import enum
import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, cast, get_args

Mode = Literal["stored", "side-by-side", "chunks", "published", "exact", "none"]
"""How the verdict was reached; ``none`` where nothing could be compared."""

MODES: tuple[str, ...] = get_args(Mode)


class Outcome(enum.StrEnum):
    """The word a verdict comes down to."""

    PASS = "PASS"  # noqa: S105 - a verdict, not a password
    IMPROVED = "IMPROVED"
    INCONCLUSIVE = "INCONCLUSIVE"
    REGRESSION = "REGRESSION"
    INCOMPARABLE = "INCOMPARABLE"
    MISSING = "MISSING"
    OOM = "OOM"
    ERROR = "ERROR"
    RECORDED = "RECORDED"

    def fails(self, *, strict: bool) -> bool:
        """Whether a test with this outcome fails.

        Args:
            strict: INCONCLUSIVE fails too.
        """
        return self in _FAILING or (strict and self is Outcome.INCONCLUSIVE)


_FAILING = frozenset(
    {Outcome.REGRESSION, Outcome.INCOMPARABLE, Outcome.MISSING, Outcome.OOM, Outcome.ERROR},
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome for one metric of one case, with what is needed to recompute it.

    Attributes:
        outcome: The word it comes down to.
        metric: Name of the metric.
        mode: How it was compared.
        base: Point value of the baseline in the metric's unit, None if there is none.
        new: Point value of the build under test in the metric's unit, None if there is none.
        change: ``new / base - 1``, signed as measured: -0.08 is 8 % lower.
        interval: Two-sided confidence interval of ``change``; its level is
            ``evidence["level"]``.
        tolerance: Relative change for the worse that is allowed.
        slack: Absolute difference, in the metric's unit, that never counts.
        launches_base: Launches of the baseline that were looked at.
        launches_new: Launches of the build under test that were looked at.
        samples_base: Samples in those launches of the baseline.
        samples_new: Samples in those launches of the build under test.
        reason: One sentence a person can act on.
        evidence: JSON values only: launches or blocks, alpha, statistic, threshold, degrees of
            freedom, prior and looks.

    Raises:
        ValueError: A number that is not finite, or evidence that JSON cannot hold.
    """

    outcome: Outcome
    metric: str
    mode: Mode
    base: float | None
    new: float | None
    change: float | None
    interval: tuple[float, float] | None
    tolerance: float
    slack: float
    launches_base: int
    launches_new: int
    samples_base: int
    samples_new: int
    reason: str
    # A dict has no hash; the other fields tell verdicts apart well enough.
    evidence: Mapping[str, object] = field(hash=False)

    def __post_init__(self) -> None:
        # Plain floats, lists and dicts, so that a trip through JSON gives an equal verdict.
        for name in ("base", "new", "change", "tolerance", "slack"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _finite(value, name))
        if self.interval is not None:
            low, high = (_finite(end, "interval") for end in self.interval)
            object.__setattr__(self, "interval", (low, high))
        object.__setattr__(self, "evidence", _plain(self.evidence, "evidence"))

    @property
    def settled(self) -> bool:
        """Whether blocks of today judged what a record left open or suspected."""
        return "stored" in self.evidence

    def to_json(self) -> dict[str, object]:
        """The verdict as JSON values; ``from_json`` gives an equal verdict back."""
        data: dict[str, object] = {f.name: getattr(self, f.name) for f in fields(self)}
        data["outcome"] = self.outcome.value
        data["interval"] = None if self.interval is None else list(self.interval)
        data["evidence"] = _plain(self.evidence, "evidence")
        return data

    @classmethod
    def from_json(cls, data: object) -> Verdict:
        """The verdict that ``to_json`` wrote.

        Args:
            data: What a JSON parser returned.

        Raises:
            ValueError: A missing, unknown or ill-typed field, named in one line.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"verdict: expected an object, got {type(data).__name__}")  # noqa: TRY004 - one error type for bad data
        names = {f.name for f in fields(cls)}
        if missing := sorted(names - data.keys()):
            raise ValueError(f"verdict: missing {', '.join(missing)}")
        if unknown := sorted(str(key) for key in data.keys() - names):
            raise ValueError(f"verdict: unknown {', '.join(unknown)}")
        return cls(
            outcome=Outcome(_one_of(data, "outcome", tuple(Outcome))),
            metric=_string(data, "metric"),
            mode=cast("Mode", _one_of(data, "mode", MODES)),
            base=_optional(data, "base"),
            new=_optional(data, "new"),
            change=_optional(data, "change"),
            interval=_interval(data["interval"]),
            tolerance=_finite(data["tolerance"], "tolerance"),
            slack=_finite(data["slack"], "slack"),
            launches_base=_count(data, "launches_base"),
            launches_new=_count(data, "launches_new"),
            samples_base=_count(data, "samples_base"),
            samples_new=_count(data, "samples_new"),
            reason=_string(data, "reason"),
            evidence=_object(data["evidence"]),
        )


def _finite(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"verdict: {name}: expected a number, got {value!r}")  # noqa: TRY004 - one error type for bad data
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"verdict: {name}: expected a finite number, got {number}")
    return number


def _optional(data: Mapping[str, object], name: str) -> float | None:
    return None if data[name] is None else _finite(data[name], name)


def _count(data: Mapping[str, object], name: str) -> int:
    value = data[name]
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"verdict: {name}: expected a count, got {value!r}")
    return value


def _string(data: Mapping[str, object], name: str) -> str:
    value = data[name]
    if not isinstance(value, str):
        raise ValueError(f"verdict: {name}: expected a string, got {value!r}")  # noqa: TRY004 - one error type for bad data
    return value


def _one_of(data: Mapping[str, object], name: str, allowed: Sequence[str]) -> str:
    value = data[name]
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"verdict: {name}: {value!r} is none of {', '.join(allowed)}")
    return value


def _interval(value: object) -> tuple[float, float] | None:
    if value is None:
        return None
    if not isinstance(value, list | tuple) or len(value) != 2:  # noqa: PLR2004 - two ends
        raise ValueError(f"verdict: interval: expected two numbers, got {value!r}")
    return _finite(value[0], "interval"), _finite(value[1], "interval")


def _object(value: object) -> Mapping[str, object]:
    if not isinstance(value, Mapping):
        raise ValueError(f"verdict: evidence: expected an object, got {value!r}")  # noqa: TRY004 - one error type for bad data
    return value


def _plain(value: object, where: str) -> Any:  # noqa: ANN401 - a JSON value of any shape
    """``value`` made of dict, list, str, int, float, bool and None only."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return _finite(value, where)
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise ValueError(f"verdict: {where}: keys must be strings")
        return {key: _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    raise ValueError(f"verdict: {where}: {type(value).__name__} is no JSON value")
