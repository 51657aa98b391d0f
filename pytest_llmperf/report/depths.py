"""What the server and llama-bench make of the same depth, side by side.

Each shows regressions that the other does not: the server's sampling, HTTP and slots are not in
llama-bench, and the server may choose other kernels than the tool that developers look at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pytest_llmperf.plan.config import Tool, Workload
from pytest_llmperf.report.result import Result
from pytest_llmperf.report.wording import columns

_METRICS = ("decode_tps", "prefill_tps")
_HEADER = ("config", "metric", "depth", "llama-server", "llama-bench", "ratio")
_Cell = tuple[str, int, int, int, str]


def depth_lines(results: Sequence[Result], workloads: Mapping[str, Workload]) -> list[str]:
    """Return a table of the speeds that both programs were measured at, empty if there are none.

    Workloads count as the same where they agree in depth, prompt and generated tokens. Chats do
    not: their template adds tokens, and a picture more.

    Args:
        results: Of all tests.
        workloads: Those of the suite file, by name.
    """
    found: dict[_Cell, dict[Tool, float]] = {}
    for result in results:
        config, _, name = result.case.partition("/")
        workload = workloads.get(name)
        if workload is None or len(workload.turns) != 1 or workload.parallel != 1:
            continue
        if workload.api != "completion":
            continue
        turn = workload.turns[0]
        for verdict in result.verdicts:
            if verdict.metric in _METRICS and verdict.new is not None:
                cell = (config, turn.depth, turn.prompt, turn.generate, verdict.metric)
                found.setdefault(cell, {})[workload.tool] = verdict.new
    rows = []
    for (config, depth, _, _, metric), told in found.items():
        server, bench = told.get("llama-server"), told.get("llama-bench")
        if server is not None and bench:
            ratio = f"{server / bench:.3f}"
            rows.append((config, metric, str(depth), f"{server:.4g}", f"{bench:.4g}", ratio))
    return columns([_HEADER, *rows]) if rows else []
