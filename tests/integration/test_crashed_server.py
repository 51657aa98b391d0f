"""A server that dies after some requests: what worked is told, and the rest of the run goes on."""

from __future__ import annotations

import re

from support.fakes import Journal, fake_command, write_program
from support.project import Project

MODULE = """
import pytest

@pytest.mark.llmperf(configs=["one"], workloads=["w", "talk"])
def test_decode(speed):
    speed.gate("decode_tps", "prefill_tps")
"""


def test_what_worked_before_a_crash_is_told_and_not_judged(project: Project) -> None:
    """The first workload stays, the second is told so far, and no server starts for nothing."""
    journal = Journal(project.path / "journal")
    # The probe, three passes of w, then talk, of two turns each: it dies in its third pass.
    builds = {
        name: write_program(
            project.path / name / "llama-server",
            fake_command(journal, number=number, faults=faults),
        )
        for name, number, faults in (("good", 9000, ""), ("bad", 9001, "crash@9"))
    }
    project.write("test_suite.py", MODULE)
    command = (f"--baseline={builds['good']}", "--llmperf-budget=0")
    run = project.run(f"--llmperf-build={builds['bad']}", *command)
    assert run.code == 1
    verdicts = run.verdicts()
    assert {verdicts[f"one/talk {name}"] for name in ("decode_tps", "prefill_tps")} == {"ERROR"}
    assert "ERROR" not in {verdicts[f"one/w {name}"] for name in ("decode_tps", "prefill_tps")}

    told = r"b9001 crashed after 4 of 6 requests; those that worked, not judged: decode_tps \d+"
    # In the failure's text and below the table.
    assert len(re.findall(told, run.text)) == 2
    assert "one/talk: decode_tps, prefill_tps ERROR" in run.text
    partial = {result["case"]: result["partial"] for result in run.results}
    assert partial["one/w"] == {}
    assert {name: partial["one/talk"][name] for name in ("build", "how", "answered", "asked")} == {
        "build": "b9001",
        "how": "crashed",
        "answered": 4,
        "asked": 6,
    }
    assert len(partial["one/talk"]["samples"]["decode_tps"]) == 1
    # Nothing was left to ask when it died, so every start of it was one of a block.
    assert journal.starts().count("9001") == journal.starts().count("9000")
