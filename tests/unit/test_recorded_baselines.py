"""The measured baselines in ``baselines/``: a gate on such a machine finds all that it needs."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from pytest_llmperf.judge.references import find_reference
from pytest_llmperf.judge.store import dump, load
from pytest_llmperf.metrics import METRICS
from pytest_llmperf.plan.config import LAUNCH
from pytest_llmperf.plan.suite import Suite, load_suite

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(path for path in ROOT.glob("baselines/*/*.json") if not load(path).published)
IDS = [f"{path.parent.name}/{path.stem}" for path in FILES]


@pytest.fixture(scope="module")
def suite() -> Suite:
    """The suite file of the repository."""
    return load_suite(ROOT / "suites" / "llmperf.toml")


def test_there_are_some() -> None:
    """Those of one H200 and of a host with two."""
    assert {"b10001/h200-140gb", "b10001/2x-h200-140gb"} <= set(IDS)


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_a_recorded_file_is_as_it_was_written(path: Path) -> None:
    """Its names are those of its folder and file, and no path of the machine is in it."""
    baseline = load(path)
    assert (baseline.label, baseline.machine_key) == (path.parent.name, path.stem)
    assert dump(baseline) == path.read_text("utf-8")
    assert not str(baseline.build["source"]).startswith(("/", "~"))


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_every_case_is_in_the_suite(path: Path, suite: Suite) -> None:
    """A case that no test names any more would be compared with nothing."""
    for key in load(path).results:
        config, _, name = key.rpartition("/")
        assert config in suite.configs
        assert name == LAUNCH or name in {*suite.workloads, *suite.passes}


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_every_reference_is_beside_its_file(path: Path) -> None:
    """Without it a pass is INCOMPARABLE; and it is what its digest says."""
    baseline = load(path)
    wanted = {
        str(baseline.fingerprints[key]["reference"])
        for key, case in baseline.results.items()
        if any(METRICS[name].scope == "quality" for name in case)
    }
    for digest in wanted:
        found = find_reference(path, digest)
        assert found is not None, digest
        assert hashlib.sha256(found.read_bytes()).hexdigest().startswith(digest)
