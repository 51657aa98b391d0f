"""A regression and what it rests on."""

from __future__ import annotations

from typing import Any

import pytest

from pytest_llmperf.judge.verdict import Outcome, Verdict
from pytest_llmperf.report.result import Result, Side


@pytest.fixture
def verdict() -> Verdict:
    """Decode speed fell by 12 %."""
    return Verdict(
        outcome=Outcome.REGRESSION,
        metric="decode_tps",
        mode="side-by-side",
        base=70.0,
        new=61.6,
        change=-0.12,
        interval=(-0.125, -0.115),
        tolerance=0.05,
        slack=0.0,
        launches_base=3,
        launches_new=4,
        samples_base=12,
        samples_new=16,
        reason="decode_tps fell by 12.0 %",
        evidence={"alpha": 0.01, "blocks": [-0.12, -0.121]},
    )


@pytest.fixture
def result(verdict: Verdict) -> Result:
    """One case of two builds with that verdict."""
    return Result(
        options="--baseline=b8149",
        nodeid="suites/test_speed.py::test_decode[c7-short]",
        case="c7/short",
        new=Side(
            label="b8156",
            about="b8156 (build 8156, pypi:xllamacpp==0.2.12)",
            build={"label": "b8156", "number": 8156},
            command="llama-server --threads 2",
            logs=("/run/new-1.log", "/run/new-2.log"),
        ),
        base=Side(
            label="b8149",
            about="b8149 (build 8149, /opt/llama)",
            command="/opt/llama/llama-server --threads 2",
            logs=("/run/base-1.log",),
        ),
        machine="rtx-5080-16gb",
        verdicts=(verdict,),
        fingerprint={"threads": 2, "model": "abc", "gpu": True, "share": 0.5},
        measured={"decode_tps": [[50.0, 40.0], [62.5]], "ttft_ms": [[12.0]]},
    )


@pytest.fixture
def roofline() -> dict[str, Any]:
    """Shares of the bandwidth that both builds used."""
    return {
        "gb_per_token": 4.6171,
        "bandwidth_gbs": 960.0,
        "source": "NVML: memory clock x bus width",
        "new": 0.2963,
        "base": 0.3367,
    }


@pytest.fixture
def card() -> dict[str, Any]:
    """A GPU of which all is known, and a stranger on it."""
    return {
        "index": 0,
        "name": "NVIDIA H200",
        "driver": "580.159.04",
        "power_limit_w": 700.0,
        "persistence": True,
        "busy": 61.2,
        "sm_clock_mhz": [1980, 1980, 1980],
        "memory_clock_mhz": None,
        "temperature_c": 45,
        "power_w": 412.3,
        "energy_j": 9000.0,
        "used_peak_mib": 5312.4,
        "throttled": {},
        "power_capped": 0.0,
        "foreign": [{"pid": 12, "name": "python3", "mib": 500.0, "busy": None}],
    }
