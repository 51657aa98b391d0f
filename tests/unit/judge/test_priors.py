"""Priors of a machine: written by calibration, read by every later run."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_llmperf.errors import BaselineError
from pytest_llmperf.judge.priors import (
    LONE_D0,
    MOST_D0,
    Priors,
    calibrated,
    load,
    path_of,
    pooled_prior,
    save,
)
from pytest_llmperf.judge.statistics import Prior
from pytest_llmperf.judge.store import Baseline, Recorded

PRIOR = st.builds(Prior, st.floats(1e-4, 1), st.floats(0, 20) | st.just(math.inf))
BY_METRIC = st.dictionaries(st.sampled_from(["decode_tps", "ttft_ms"]), PRIOR)


@given(BY_METRIC, BY_METRIC)
def test_saving_and_loading_are_inverse(
    tmp_path_factory: pytest.TempPathFactory,
    blocks: dict[str, Prior],
    launches: dict[str, Prior],
) -> None:
    """What is read is what was written."""
    path = path_of(tmp_path_factory.mktemp("cache"), "box-2c")
    save(path, Priors(blocks, launches), machine="box-2c", at="2026-11-21")
    found = load(path)
    assert (found.blocks, found.launches) == (blocks, launches)
    assert found.about == "calibrated 2026-11-21"


def test_a_machine_that_was_never_calibrated(tmp_path: Path) -> None:
    """There are no priors, and that is no error."""
    found = load(path_of(tmp_path, "box"))
    assert found == Priors()
    assert found.block("decode_tps") is None
    assert found.launch("decode_tps") is None


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{", "these are no priors"),
        ("[]", "these are no priors"),
        ('{"schema": 2}', "schema 2 is not known"),
        ('{"schema": 1, "at": "x", "blocks": {"a": {"s0": -1, "d0": 1}}, "launches": {}}', "s0"),
        ('{"schema": 1, "at": "x", "blocks": 3, "launches": {}}', "these are no priors"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, what: str) -> None:
    """The error names the file and how to mend it."""
    path = path_of(tmp_path, "box")
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(BaselineError) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert what in str(caught.value)
    assert "llmperf calibrate" in str(caught.value)


def test_calibration_is_not_believed_without_end() -> None:
    """However alike the cases are, the blocks at hand keep their say."""
    assert calibrated([1e-4] * 8, [100.0] * 8).d0 == MOST_D0
    assert calibrated([1e-4], [100.0]).d0 == LONE_D0
    assert calibrated([1e-4], [100.0]).s0 == pytest.approx(0.01, rel=0.02)


def test_blocks_without_turns_are_as_noisy_as_two_launches() -> None:
    """Nothing cancels in them, so the prior of paired blocks does not hold for them."""
    priors = Priors(
        blocks={"decode_tps": Prior(0.01, 8.0)}, launches={"decode_tps": Prior(0.03, 6.0)}
    )
    assert priors.block("decode_tps") == Prior(0.01, 8.0)
    apart = priors.block("decode_tps", paired=False)
    assert apart is not None
    assert apart.s0 == pytest.approx(0.03 * 2**0.5)
    assert apart.d0 == 6.0
    assert priors.block("ttft_ms", paired=False) is None


def test_cases_are_pooled_with_those_of_their_program() -> None:
    """Steady launches of llama-bench say nothing of those of a server, nor the other way round."""

    def recorded(spread: float) -> dict[str, Recorded]:
        launches = tuple((100.0 * math.exp(spread * n),) for n in (-1, 0, 1))
        return {"decode_tps": Recorded("tok/s", "higher", launches, 100.0)}

    served = {f"c/w{n}": recorded(0.1) for n in range(3)}
    benched = {f"c/d{n}": recorded(0.001) for n in range(3)}
    baseline = Baseline(
        build={"label": "b1"},
        machine={"key": "lab"},
        recorded={"by": "measured"},
        results={**served, **benched},
        fingerprints={
            **{case: {"machine": "lab"} for case in served},
            **{case: {"machine": "lab", "tool": "llama-bench"} for case in benched},
        },
    )
    for case, spread in (("c/w0", 0.1), ("c/d0", 0.001)):
        prior = pooled_prior(baseline, case, "decode_tps")
        assert prior is not None
        assert prior.s0 == pytest.approx(spread, rel=0.5)
