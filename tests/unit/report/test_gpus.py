"""GPUs in words."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_llmperf.report.gpus import gpu_lines, hundredths
from pytest_llmperf.report.result import Side

NUMBERS = st.none() | st.floats(0, 1e6)
CARDS = st.fixed_dictionaries(
    {},
    optional={
        "index": st.none() | st.integers(0, 15),
        "name": st.none() | st.text(min_size=1),
        "driver": st.none() | st.text(),
        "persistence": st.none() | st.booleans(),
        "sm_clock_mhz": st.none() | st.tuples(NUMBERS, NUMBERS, NUMBERS).map(list),
        "memory_clock_mhz": NUMBERS,
        "throttled": st.none() | st.dictionaries(st.text(), NUMBERS),
        "foreign": st.none()
        | st.lists(
            st.fixed_dictionaries({}, optional={"pid": st.none() | st.just(7), "mib": NUMBERS})
        ),
        **dict.fromkeys(
            ("busy", "temperature_c", "power_w", "power_limit_w", "used_peak_mib", "power_capped"),
            NUMBERS,
        ),
    },
)


def line(card: dict[str, Any], rate: float | None = 9.8) -> str:
    """The line of one GPU."""
    (told,) = gpu_lines(Side("b1", "b1", gpu={"rate_hz": rate, "cards": [card]}))
    return told


def test_a_gpu_has_one_line(card: dict[str, Any]) -> None:
    """What it did, what it is and who else was there."""
    assert line(card) == (
        "GPU 0: NVIDIA H200, 61 % busy, SM 1980 MHz, 45 °C, 412 W, peak 5312 MiB sampled at 10 Hz, "
        "driver 580.159.04, limit 700 W; also there: python3 (pid 12) 500 MiB"
    )


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"sm_clock_mhz": [1200, 1800, 1980]}, "SM 1800 (1200…1980) MHz"),
        ({"sm_clock_mhz": 1750}, "SM 1750 MHz"),
        ({"memory_clock_mhz": [3201, 3201, 3201]}, "memory 3201 MHz"),
        ({"throttled": {"hw_thermal": 0.4}}, "throttled 40 % of the time: hw_thermal"),
        ({"power_capped": 0.25}, "at its power limit 25 % of the time"),
        ({"persistence": False}, "persistence mode off"),
        ({"foreign": [{"pid": 3, "name": None, "mib": 10, "busy": 45.0}]}, "a process (pid 3) 10"),
        ({"foreign": [{"pid": 3, "name": "a\x1b[2Jb\n\udc80"}]}, "also there: a?[2Jb?? (pid 3)"),
        ({"mig": True}, "NVIDIA H200, a MIG instance, 61 % busy"),
        ({"mig": True, "name": "H200 MIG 1g.18gb"}, "GPU 0: H200 MIG 1g.18gb, 61 % busy"),
    ],
)
def test_what_is_out_of_the_ordinary_is_told(
    card: dict[str, Any], change: dict[str, Any], told: str
) -> None:
    """And only then."""
    assert told not in line(card)
    assert told in line(card | change)


def test_nothing_is_told_where_nobody_looked() -> None:
    """A machine without a GPU has no lines, one that tells nothing has one."""
    assert gpu_lines(Side("b1", "b1")) == []
    assert gpu_lines(Side("b1", "b1", gpu={"cards": None})) == []
    assert line({"index": 2, "name": None}) == "GPU 2: nothing is known of it"


@given(CARDS, st.none() | st.floats(0, 100))
def test_any_figure_may_be_missing(card: dict[str, Any], rate: float | None) -> None:
    """No None ever reaches the text."""
    assert line(card, rate).startswith("GPU")
    assert "None" not in line({**card, "name": "x", "driver": "y", "throttled": {}}, rate)


def test_a_share_is_a_whole_percentage() -> None:
    """The figure has no more digits than it is worth."""
    assert hundredths(0.534) == "53 %"
