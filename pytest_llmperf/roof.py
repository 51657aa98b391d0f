"""How near a case came to what the memory allows, where that can be known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pytest_llmperf.build.tools import BENCH
from pytest_llmperf.errors import ModelError
from pytest_llmperf.gpu.cards import Gpu
from pytest_llmperf.judge.verdict import Verdict
from pytest_llmperf.measure.roofline import Roofline, bytes_per_token, mean_depth
from pytest_llmperf.models.tensors import read_tensors
from pytest_llmperf.plan.config import Case, is_exclusive
from pytest_llmperf.plan.options import OptionValue

DECODE = "decode_tps"
BY_NVML = "NVML: memory clock x bus width"
BY_USER = "ini llmperf_bandwidth"

_IN_TURNS = frozenset({"layer", "none"})
"""Ways to split a model with which its GPUs do not work at once."""

_ONE_DEVICE = 2
"""Parts of the graph where all layers are on one device: the CPU looks the embeddings up."""


@dataclass(frozen=True, slots=True)
class Memory:
    """The memory that weights and cache are read from: ``bandwidth_gbs`` in GB/s, and by whom."""

    bandwidth_gbs: float
    source: str


def memory_of(case: Case, cards: Sequence[Gpu], stated: float | None) -> Memory | None:
    """Return the memory that a case decodes from; None where it is not one, or not known.

    Several GPUs take turns, layer by layer, so that the slowest one's bandwidth counts.

    Args:
        case: Config and workload.
        cards: GPUs that it is measured on; none where it runs on the CPU.
        stated: GB/s as the user says, of the GPUs, or of the host where there is no GPU.
    """
    # GPUs that NVML does not know, such as another maker's, are none of the cards.
    if stated is not None and (case.config.gpu or not cards):
        return Memory(stated, BY_USER)
    told = [card.bandwidth_gbs for card in cards]
    known = [one for one in told if one is not None]
    if not case.config.gpu or not known or len(known) < len(told):
        return None
    return Memory(min(known), BY_NVML)


def roofline(
    case: Case,
    model: Path,
    options: Mapping[str, OptionValue],
    memory: Memory | None,
    decode: Verdict,
    *,
    splits: float | None,
) -> dict[str, object]:
    """Return what a report shows of the roofline beside a decode speed; empty where it has none.

    It has one where a single request decodes alone, nothing is drafted, and all that it reads is
    in one kind of memory.

    Args:
        case: Config and workload.
        model: Its file.
        options: Of its server.
        memory: What it decodes from, None if unknown.
        decode: Verdict on its decode speed.
        splits: Parts of its graph, None if unknown.
    """
    workload, config = case.workload, case.config
    if memory is None or workload is None or decode.new is None:
        return {}
    drafts = config.draft or options.get("spec-type", "none") != "none"
    # By its options: one that only wants to be alone is on its GPU all the same.
    spread = config.gpu and is_exclusive(replace(config, options=options, exclusive=None))
    if workload.parallel > 1 or drafts or spread or (splits or 0) > _ONE_DEVICE * config.gpus:
        return {}
    if config.cards > 1 and options.get("split-mode", "layer") not in _IN_TURNS:
        # They read at once, as fast as all of them together.
        return {}
    types = (
        str(options.get("cache-type-k", "f16")),
        str(options.get("cache-type-v", "f16")),
    )
    try:
        depth = mean_depth(workload, prompts=case.tool != BENCH)
        read = bytes_per_token(read_tensors(model), depth, types)
        line = Roofline(read.total, memory.bandwidth_gbs, memory.source)
    except (ModelError, ValueError):
        # A type of the future, or an empty model: nothing to be compared with.
        return {}
    return {**line.facts(decode.new, decode.base), "notes": list(read.notes)}
