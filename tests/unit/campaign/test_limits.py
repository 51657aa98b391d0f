"""A workload that takes too long, among others that do not."""

from __future__ import annotations

import random
from pathlib import Path

from support.fakes import CONFIG, PATIENCE, Journal, fake_build

from pytest_llmperf.campaign.servers import ServerCampaign
from pytest_llmperf.errors import TooSlowError
from pytest_llmperf.leases import Leases
from pytest_llmperf.plan.config import LAUNCH, ModelFiles, Turn, Workload
from pytest_llmperf.serve.launch import ServePlan

BEFORE = Workload("before", (Turn(24, 4),))
SLOW = Workload("slow", (Turn(40, 100),), limit=0.5)
AFTER = Workload("after", (Turn(48, 4),), limit=PATIENCE)


def test_what_takes_too_long_is_given_up_and_the_others_go_on(tmp_path: Path) -> None:
    """Its server still works at it, so it is started anew for the next."""
    journal = Journal(tmp_path / "journal")
    campaign = ServerCampaign(
        config=CONFIG,
        workloads=(BEFORE, SLOW, AFTER),
        new=fake_build(journal, faults="slow#40"),
        base=None,
        files=ModelFiles(tmp_path / "model.gguf"),
        serve=ServePlan(tmp_path / "run", timeout=PATIENCE, hang=PATIENCE),
        pairs=2,
        leases=Leases(tmp_path / "locks", (), (), print),
        rng=random.Random(7),  # noqa: S311 - a coin, not a key
    )
    launch = campaign.launch(0)
    assert launch.samples.keys() == {LAUNCH, "before", "after"}
    (error,) = campaign.failures.values()
    assert isinstance(error, TooSlowError)
    assert str(error).startswith("one on b9000: warm-up of slow, request 1 of 1 (prompt 40, ")
    assert "given up after the 0.5 s that one sample may take, with about" in str(error)
    assert len(journal.starts()) == 2
    _ = campaign.launch(1)
    assert len(journal.starts()) == 3
