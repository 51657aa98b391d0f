"""Which cases have a roofline, and by whose bandwidth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from pytest_llmperf import roof
from pytest_llmperf.errors import ModelError
from pytest_llmperf.gpu.cards import Gpu
from pytest_llmperf.judge.decide import failed, recorded
from pytest_llmperf.judge.verdict import Verdict
from pytest_llmperf.measure.roofline import Reading
from pytest_llmperf.metrics import METRICS
from pytest_llmperf.models.tensors import ModelTensors, Tensor
from pytest_llmperf.plan.config import Case, Config, Turn, Workload
from pytest_llmperf.plan.options import OptionValue
from pytest_llmperf.roof import BY_NVML, BY_USER, Memory, memory_of, roofline

CARD = Gpu(0, "GPU-1", "NVIDIA H200", 1000, "580.1", bandwidth_gbs=4000.0)
CASE = Case(Config("c7", "m", gpu=True), Workload("short", (Turn(100, 20),)))
HOST = replace(CASE, config=replace(CASE.config, gpu=False))
DECODE = recorded(METRICS["decode_tps"], [[100.0]])
MODEL = ModelTensors(
    (Tensor("blk.0.attn_norm.weight", (1000,), "F32", 4_000_000_000),),
    {"general.architecture": "llama", "llama.block_count": 1},
)


def line(
    case: Case = CASE,
    options: Mapping[str, OptionValue] | None = None,
    *,
    decode: Verdict = DECODE,
    splits: float | None = 2,
) -> dict[str, object]:
    """Return what is shown of a case on a memory of 4000 GB/s."""
    memory = Memory(4000.0, BY_NVML)
    given = {**case.config.options, **(options or {})}
    return roofline(case, Path("m"), given, memory, decode, splits=splits)


@pytest.fixture(autouse=True)
def _model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of which each token reads 4 GB."""
    monkeypatch.setattr(roof, "read_tensors", lambda _path: MODEL)


def test_a_gpu_is_held_against_what_nvml_says_of_it() -> None:
    """Of several that take turns, the slowest one; of one that does not tell, nothing."""
    slower = replace(CARD, uuid="GPU-2", bandwidth_gbs=900.0)
    untold = replace(CARD, uuid="GPU-3", bandwidth_gbs=None)
    assert memory_of(CASE, [CARD], None) == Memory(4000.0, BY_NVML)
    assert memory_of(CASE, [CARD, slower], None) == Memory(900.0, BY_NVML)
    assert memory_of(CASE, [CARD, untold], None) is None
    assert memory_of(CASE, [], None) is None
    assert memory_of(HOST, [CARD], None) is None


def test_what_the_user_says_wins() -> None:
    """Of the GPUs where there are any, else of the host; never of the host beside GPUs."""
    assert memory_of(CASE, [CARD], 3500.0) == Memory(3500.0, BY_USER)
    assert memory_of(HOST, [], 60.0) == Memory(60.0, BY_USER)
    assert memory_of(HOST, [CARD], 3500.0) is None
    assert memory_of(CASE, [], 900.0) == Memory(900.0, BY_USER), "a GPU that NVML does not know"


def test_a_share_of_the_bandwidth_is_told() -> None:
    """100 tokens of 4 GB a second out of 4000 GB/s are a tenth."""
    found = line()
    assert found["new"] == pytest.approx(0.1)
    assert (found["gb_per_token"], found["source"]) == (pytest.approx(4.0), BY_NVML)
    assert line(HOST)["new"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("case", "options", "splits"),
    [
        (replace(CASE, workload=Workload("p", (Turn(9, 9),), parallel=4)), {}, 2),
        (replace(CASE, config=replace(CASE.config, draft="d")), {}, 2),
        (CASE, {"spec-type": "ngram-simple"}, 2),
        (replace(CASE, config=replace(CASE.config, options={"n-cpu-moe": 4})), {}, 2),
        (CASE, {}, 50),
        (Case(CASE.config), {}, 2),
    ],
)
def test_it_means_nothing_where_a_token_is_not_one_reading_of_one_memory(
    case: Case, options: Mapping[str, OptionValue], splits: float
) -> None:
    """Several at once, drafts, weights in two memories, or no requests at all."""
    assert line(case, options, splits=splits) == {}


def test_a_config_that_only_wants_to_be_alone_has_one() -> None:
    """And one that leaves work to the CPU has none, though it lets others measure meanwhile."""
    alone = replace(CASE, config=replace(CASE.config, exclusive=True))
    assert line(alone)
    shared = replace(CASE.config, exclusive=False, options={"n-cpu-moe": 4})
    assert not line(replace(CASE, config=shared))


def test_answers_of_llama_bench_begin_at_the_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    """It evaluates prompts and generates apart, where a server's answer follows the prompt."""
    depths: list[float] = []

    def reading(_model: object, depth: float, _types: object) -> Reading:
        depths.append(depth)
        return Reading(1e9, 0.0)

    monkeypatch.setattr(roof, "bytes_per_token", reading)
    deep = Workload("deep", (Turn(512, 20, 4096),))
    line(replace(CASE, workload=deep))
    line(replace(CASE, workload=replace(deep, tool="llama-bench")))
    assert depths == [4096 + 512 + 10, 4096 + 10]


def test_two_gpus_may_cut_the_graph_in_more_parts() -> None:
    """Each one has its own."""
    pair = replace(CASE, config=replace(CASE.config, gpus=2))
    assert line(pair, splits=3)
    assert not line(CASE, splits=3)
    assert line(pair, {"split-mode": "layer"}, splits=3)
    assert not line(pair, {"split-mode": "row"}, splits=3), "both work at once"
    assert line(CASE, {"split-mode": "row"})


def test_what_was_not_measured_or_cannot_be_read_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A case that failed; a cache type of the future; a file that has gone."""
    assert line(decode=failed(METRICS["decode_tps"], "it died")) == {}
    told = {"llama.attention.head_count": 8, "llama.attention.key_length": 64}
    query = Tensor("blk.0.attn_q.weight", (8, 8), "F16", 128)
    attends = replace(MODEL, tensors=(*MODEL.tensors, query), metadata={**MODEL.metadata, **told})
    monkeypatch.setattr(roof, "read_tensors", lambda _path: attends)
    assert line()
    assert line(options={"cache-type-k": "turbo3"}) == {}

    def gone(_path: Path) -> ModelTensors:
        raise ModelError("no such file")

    monkeypatch.setattr(roof, "read_tensors", gone)
    assert line() == {}
