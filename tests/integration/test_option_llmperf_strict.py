"""``--llmperf-strict`` makes INCONCLUSIVE fail."""

from __future__ import annotations

import json

import pytest
from support.project import Project

pytestmark = pytest.mark.alone


def test_inconclusive_warns_and_under_strict_fails(project: Project) -> None:
    """One recorded launch is too little to decide from; the verdict says how many are missing."""
    project.run("--update-baselines", "-k", "decode")
    [path] = project.baseline_files()
    data = json.loads(path.read_text("utf-8"))
    entry = data["results"]["one/w"]["decode_tps"]
    entry["launches"] = entry["launches"][:1]
    path.write_text(json.dumps(data), "utf-8")
    mild = project.run("-k", "decode", "--llmperf-budget=0")
    assert mild.verdicts() == {"one/w decode_tps": "INCONCLUSIVE"}, mild.text
    assert mild.code == 0
    assert "warning: one/w decode_tps" in mild.text
    assert "launch" in mild.results[0]["verdicts"][0]["reason"]
    strict = project.run("-k", "decode", "--llmperf-budget=0", "--llmperf-strict")
    assert strict.code == 1
    assert "decode_tps: INCONCLUSIVE" in strict.text
