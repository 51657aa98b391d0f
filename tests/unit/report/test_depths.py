"""The table of both programs at the same depth."""

from __future__ import annotations

from dataclasses import replace

from pytest_llmperf.judge.verdict import Verdict
from pytest_llmperf.plan.config import Turn, Workload
from pytest_llmperf.report.depths import depth_lines
from pytest_llmperf.report.result import Result

TURN = (Turn(512, 128, 8192),)
WORKLOADS = {
    "depth_8k": Workload("depth_8k", TURN),
    "bench_8k": Workload("bench_8k", TURN, tool="llama-bench"),
    "bench_4k": Workload("bench_4k", (Turn(512, 128, 4096),), tool="llama-bench"),
    "parallel": Workload("parallel", TURN, parallel=4),
    "talk": Workload("talk", (*TURN, *TURN)),
    "chat": Workload("chat", (Turn(512, 128),), api="chat"),
    "bench_0": Workload("bench_0", (Turn(512, 128),), tool="llama-bench"),
}


def measured(result: Result, case: str, new: float | None) -> Result:
    """The result of another case."""
    return replace(result, case=case, verdicts=(replace(result.verdicts[0], new=new),))


def test_both_programs_stand_side_by_side(result: Result) -> None:
    """One line a config, depth and metric, with the server's share of llama-bench."""
    lines = depth_lines(
        [measured(result, "c7/depth_8k", 45.0), measured(result, "c7/bench_8k", 50.0)], WORKLOADS
    )
    assert [line.split() for line in lines] == [
        ["config", "metric", "depth", "llama-server", "llama-bench", "ratio"],
        ["c7", "decode_tps", "8192", "45", "50", "0.900"],
    ]


def test_a_chat_is_not_what_llama_bench_does(result: Result) -> None:
    """Its template adds tokens to the same lengths."""
    both = [measured(result, "c7/chat", 45.0), measured(result, "c7/bench_0", 50.0)]
    assert depth_lines(both, WORKLOADS) == []


def test_nothing_is_shown_of_one_program_alone(result: Result, verdict: Verdict) -> None:
    """Nor of another config, depth, metric or kind of workload, nor of what was not measured."""
    server = measured(result, "c7/depth_8k", 45.0)
    others = [
        measured(result, "c5/bench_8k", 50.0),
        measured(result, "c7/bench_4k", 50.0),
        measured(result, "c7/bench_8k", None),
        measured(result, "c7/parallel", 50.0),
        measured(result, "c7/talk", 50.0),
        measured(result, "c7/gone", 50.0),
        replace(result, case="c7/bench_8k", verdicts=(replace(verdict, metric="ttft_ms"),)),
    ]
    assert depth_lines([server, *others], WORKLOADS) == []
