"""Results travel as one line of JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_llmperf.judge.verdict import Outcome, Verdict
from pytest_llmperf.report.result import Result, Side

FINITE = st.floats(allow_nan=False, allow_infinity=False)
SIDES = st.builds(
    Side,
    label=st.text(),
    about=st.text(),
    build=st.dictionaries(st.text(), st.text() | st.integers()),
    command=st.text(),
    logs=st.lists(st.text(), max_size=3).map(tuple),
    gpu=st.dictionaries(st.text(), st.none() | st.lists(st.dictionaries(st.text(), FINITE))),
)
VERDICTS = st.builds(
    Verdict,
    outcome=st.sampled_from(Outcome),
    metric=st.text(),
    mode=st.sampled_from(["stored", "side-by-side", "none"]),
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
    evidence=st.dictionaries(st.text(), st.lists(FINITE, max_size=3)),
)
RESULTS = st.builds(
    Result,
    nodeid=st.text(),
    case=st.text(),
    new=SIDES,
    base=st.none() | SIDES,
    machine=st.text(),
    verdicts=st.lists(VERDICTS, max_size=3).map(tuple),
    fingerprint=st.dictionaries(st.text(), st.text() | st.integers() | FINITE | st.booleans()),
    measured=st.dictionaries(st.text(), st.lists(st.lists(FINITE, max_size=3), max_size=3)),
    partial=st.dictionaries(st.text(), st.integers() | st.dictionaries(st.text(), FINITE)),
    roofline=st.dictionaries(st.text(), st.none() | FINITE | st.text()),
)


@given(RESULTS)
def test_what_goes_out_comes_back(result: Result) -> None:
    """A result that went through text equals the one that went in."""
    text = result.dumps()
    assert Result.loads(text) == result
    assert "\n" not in text


def test_the_text_is_plain_json(result: Result) -> None:
    """Other programs read it from JUnit, with nothing but a JSON parser."""
    data = json.loads(result.dumps())
    assert data["case"] == "c7/short"
    assert data["new"]["logs"] == ["/run/new-1.log", "/run/new-2.log"]
    assert data["verdicts"][0]["outcome"] == "REGRESSION"
    assert data["measured"]["decode_tps"] == [[50.0, 40.0], [62.5]]


def test_a_result_from_before_there_were_gpu_facts_is_read(result: Result) -> None:
    """Its keys lack the roofline and the use of the GPUs."""
    data = json.loads(result.dumps())
    del data["roofline"], data["new"]["gpu"], data["base"]["gpu"]
    assert Result.loads(json.dumps(data)) == result


def test_a_side_without_a_baseline_is_null(result: Result) -> None:
    """A missing baseline is no empty one."""
    alone = replace(result, base=None)
    assert json.loads(alone.dumps())["base"] is None
    assert Result.loads(alone.dumps()).base is None


def test_equal_results_have_equal_texts(result: Result) -> None:
    """Keys are sorted, so that the order in which they were found does not show."""
    assert result.fingerprint
    turned = replace(result, fingerprint=dict(reversed(list(result.fingerprint.items()))))
    assert turned.dumps() == result.dumps()


@pytest.mark.parametrize(
    "change",
    [
        {"new": None},
        {"new": "b8149"},
        {"new": {"label": "b8149"}},
        {"new": {"label": "b", "about": "b", "logs": [], "extra": 1}},
        {"verdicts": None},
        {"verdicts": [{}]},
        {"verdicts": ["PASS"]},
    ],
)
def test_a_changed_result_is_refused(result: Result, change: Mapping[str, object]) -> None:
    """A property of that name that somebody else wrote is a ValueError, not a crash."""
    text = json.dumps(json.loads(result.dumps()) | change)
    with pytest.raises(ValueError, match=r"not an llmperf result|lacks the build|verdict: "):
        Result.loads(text)


@pytest.mark.parametrize("text", ["", "{", "null", "[]", "1", '"text"', "{}"])
def test_another_text_is_refused(text: str) -> None:
    """Whether or not it is JSON."""
    with pytest.raises(ValueError, match=r"not an llmperf result|Expecting"):
        Result.loads(text)
