"""Verdicts: which fail, what they hold, and their JSON form."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_llmperf.judge.verdict import Outcome, Verdict

FINITE = st.floats(allow_nan=False, allow_infinity=False)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | FINITE | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)
VERDICTS = st.builds(
    Verdict,
    outcome=st.sampled_from(Outcome),
    metric=st.text(),
    mode=st.sampled_from(["stored", "side-by-side", "published", "exact", "none"]),
    base=st.none() | FINITE,
    new=st.none() | FINITE,
    change=st.none() | FINITE,
    interval=st.none() | st.tuples(FINITE, FINITE),
    tolerance=FINITE,
    slack=FINITE,
    launches_base=st.integers(0),
    launches_new=st.integers(0),
    samples_base=st.integers(0),
    samples_new=st.integers(0),
    reason=st.text(),
    evidence=st.dictionaries(st.text(), JSON_VALUES),
)

VERDICT = Verdict(
    outcome=Outcome.PASS,
    metric="decode_tps",
    mode="stored",
    base=70.0,
    new=69.5,
    change=69.5 / 70 - 1,
    interval=(-0.02, 0.01),
    tolerance=0.05,
    slack=0.0,
    launches_base=3,
    launches_new=2,
    samples_base=15,
    samples_new=10,
    reason="decode_tps is fine",
    evidence={"alpha": 0.01},
)


@given(VERDICTS)
def test_json_round_trip(verdict: Verdict) -> None:
    """A verdict that went through JSON text equals the one that went in."""
    assert Verdict.from_json(json.loads(json.dumps(verdict.to_json()))) == verdict


@pytest.mark.parametrize(
    ("outcome", "fails", "fails_strict"),
    [
        (Outcome.PASS, False, False),
        (Outcome.IMPROVED, False, False),
        (Outcome.INCONCLUSIVE, False, True),
        (Outcome.REGRESSION, True, True),
        (Outcome.INCOMPARABLE, True, True),
        (Outcome.MISSING, True, True),
        (Outcome.OOM, True, True),
        (Outcome.ERROR, True, True),
        (Outcome.RECORDED, False, False),
    ],
)
def test_which_outcomes_fail(outcome: Outcome, fails: bool, fails_strict: bool) -> None:  # noqa: FBT001 - table columns
    """A gate that could not measure fails, an unclear one only under strict."""
    assert (outcome.fails(strict=False), outcome.fails(strict=True)) == (fails, fails_strict)


def test_numpy_values_become_plain() -> None:
    """NumPy numbers and tuples in evidence come out as JSON has them."""
    evidence = {"a": np.float64(1.5), "b": np.int64(2), "c": (1, 2)}
    assert replace(VERDICT, evidence=evidence).evidence == {"a": 1.5, "b": 2, "c": [1, 2]}


def test_evidence_is_a_copy() -> None:
    """Changing the dict that went in does not change the verdict."""
    evidence = {"looks": [1]}
    verdict = replace(VERDICT, evidence=evidence)
    evidence["looks"].append(2)
    assert verdict.evidence == {"looks": [1]}


def test_verdicts_can_be_hashed() -> None:
    """Equal verdicts have equal hashes, so that they can be kept in sets."""
    assert len({VERDICT, replace(VERDICT)}) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_are_finite(value: float) -> None:
    """What JSON cannot hold is refused when the verdict is made, naming the field."""
    with pytest.raises(ValueError, match="change: expected a finite number"):
        replace(VERDICT, change=value)
    with pytest.raises(ValueError, match=r"evidence\.x\[0\]: expected a finite number"):
        replace(VERDICT, evidence={"x": [value]})


def test_evidence_of_another_type_is_refused() -> None:
    """An object that JSON has no form for is refused, naming its place."""
    with pytest.raises(ValueError, match=r"evidence\.x: object is no JSON value"):
        replace(VERDICT, evidence={"x": object()})
    with pytest.raises(ValueError, match="keys must be strings"):
        replace(VERDICT, evidence={"x": {1: 2}})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("outcome", "GOOD", "outcome: 'GOOD' is none of PASS"),
        ("outcome", None, "outcome: None is none of PASS"),
        ("metric", 3, "metric: expected a string, got 3"),
        ("mode", "guess", "mode: 'guess' is none of stored"),
        ("base", "70", "base: expected a number, got '70'"),
        ("tolerance", None, "tolerance: expected a number, got None"),
        ("slack", True, "slack: expected a number, got True"),
        ("interval", [1], "interval: expected two numbers"),
        ("launches_new", -1, "launches_new: expected a count, got -1"),
        ("samples_base", 1.5, "samples_base: expected a count, got 1.5"),
        ("evidence", [], "evidence: expected an object"),
    ],
)
def test_bad_fields_are_named(field: str, value: object, message: str) -> None:
    """An ill-typed field is refused in one line that names it."""
    with pytest.raises(ValueError, match=message):
        Verdict.from_json(VERDICT.to_json() | {field: value})


def test_missing_and_unknown_fields_are_named() -> None:
    """A verdict with a field too few or too many is refused, and so is no object at all."""
    data = VERDICT.to_json()
    with pytest.raises(ValueError, match="verdict: unknown colour"):
        Verdict.from_json(data | {"colour": "red"})
    del data["reason"]
    with pytest.raises(ValueError, match="verdict: missing reason"):
        Verdict.from_json(data)
    with pytest.raises(ValueError, match="expected an object, got list"):
        Verdict.from_json([])
