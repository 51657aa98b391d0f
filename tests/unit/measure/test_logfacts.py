"""What is read out of a server's log, over the builds' ways of writing it."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_llmperf.measure.logfacts import LogFacts, read_log

# b8156, CPU.
OLDER = """\
llama_model_loader: loaded meta data with 24 key-value pairs and 75 tensors from /m/synth.gguf (version GGUF V3 (latest))
llama_model_loader: Dumping metadata keys/values. Note: KV overrides do not apply in this output.
print_info: file size   = 59.02 MiB (8.51 BPW)
load_tensors:   CPU_Mapped model buffer size =    59.02 MiB
llama_context: n_ctx         = 4096
llama_context:        CPU  output buffer size =     0.01 MiB
llama_kv_cache:        CPU KV buffer size =    32.00 MiB
llama_kv_cache: size =   32.00 MiB (  4096 cells,   8 layers,  1/1 seqs), K (f16):   16.00 MiB
sched_reserve:        CPU compute buffer size =    28.51 MiB
main: server is listening on http://127.0.0.1:39117 - starting the main loop
"""  # noqa: E501 - a log, as it is

# b11549, CPU, with time and level before each line.
NEWER = """\
0.00.002.500 I cmn  common_init_: fitting params to device memory ...
0.00.008.201 I common_params_fit_impl: projected to use 116 MiB of host memory vs. 24105 MiB
0.00.008.748 I llama_model_loader: loaded meta data with 24 key-value pairs and 75 tensors from /m/synth.gguf (version GGUF V3 (latest))
0.00.014.252 I load_tensors:   CPU_Mapped model buffer size =    59.02 MiB
0.00.014.509 I llama_context:        CPU  output buffer size =     0.01 MiB
0.00.014.549 I llama_kv_cache:        CPU KV buffer size =    32.00 MiB
0.00.034.581 I sched_reserve:        CPU compute buffer size =    25.02 MiB
"""  # noqa: E501 - a log, as it is


def loading(model: str, *lines: str) -> str:
    """The part of a log that the loading of a model file writes."""
    first = (
        "llama_model_loader: loaded meta data with 30 key-value pairs and 99 tensors from "
        f"{model} (version GGUF V3 (latest))"
    )
    return "\n".join((first, *lines)) + "\n"


GPU = (
    "load_tensors: offloading 24 repeating layers to GPU",
    "load_tensors: offloaded 25/41 layers to GPU",
    "load_tensors:   CPU_Mapped model buffer size =  9000.25 MiB",
    "load_tensors:        CUDA0 model buffer size = 11000.50 MiB",
    "load_tensors:        CUDA1 model buffer size =  1000.00 MiB",
    "llama_context:  CUDA_Host  output buffer size =     0.95 MiB",
    "llama_kv_cache:      CUDA0 KV buffer size =   320.00 MiB",
    "llama_kv_cache:      CUDA0 KV buffer size =    64.00 MiB",
    "llama_memory_recurrent:      CUDA0 RS buffer size =    60.75 MiB",
    "llama_context:      CUDA0 compute buffer size =   493.00 MiB",
    "llama_context:  CUDA_Host compute buffer size =    12.01 MiB",
)
GPU_FACTS = LogFacts(
    model_mib=21000.75,
    kv_mib=444.75,
    compute_mib=493.0 + 12.01 + 0.95,
    offloaded_layers=25,
    layers=41,
    graph_splits=None,
    devices={"CPU_Mapped": 9000.25, "CUDA0": 11938.25, "CUDA1": 1000.0, "CUDA_Host": 12.96},
)


def about(facts: LogFacts) -> dict[str, object]:
    """The facts for a comparison, sums of two-digit sizes rounded to two digits."""
    rounded = {name: round(size, 2) for name, size in facts.devices.items()}
    compute = None if facts.compute_mib is None else round(facts.compute_mib, 2)
    return asdict(replace(facts, compute_mib=compute, devices=rounded))


@pytest.mark.parametrize(("log", "compute"), [(OLDER, 28.52), (NEWER, 25.03)])
def test_both_ways_of_writing_are_read(log: str, compute: float) -> None:
    """With or without time and level, the same facts; a CPU build tells no layers."""
    facts = read_log(log)
    assert (facts.model_mib, facts.kv_mib) == (59.02, 32.0)
    assert facts.compute_mib == pytest.approx(compute)
    assert (facts.offloaded_layers, facts.layers) == (None, None)
    assert facts.devices.keys() == {"CPU", "CPU_Mapped"}


def test_sizes_are_summed_over_devices() -> None:
    """All GPUs and the host, several caches of one device, recurrent state with the KV cache."""
    assert about(read_log(loading("/m/big.gguf", *GPU))) == about(GPU_FACTS)


def test_a_dry_run_of_the_fit_is_not_counted() -> None:
    """A first load of the same file without memory says nothing of what is allocated."""
    dry = (
        "load_tensors: offloaded 41/41 layers to GPU",
        "load_tensors:   CPU_Mapped model buffer size =     0.00 MiB",
        "load_tensors:        CUDA0 model buffer size =     0.00 MiB",
        "llama_kv_cache:      CUDA0 KV buffer size =     0.00 MiB",
        "llama_context:      CUDA0 compute buffer size =  9999.00 MiB",
    )
    facts = read_log(loading("/m/big.gguf", *dry) + loading("/m/big.gguf", *GPU))
    assert about(facts) == about(GPU_FACTS)


@pytest.mark.parametrize("folder", ["/m", "/my models", "/m/v1 (version 2)"])
def test_a_draft_model_adds(folder: str) -> None:
    """Sizes and layers of a second file come on top, also where the folder has spaces."""
    draft = (
        "load_tensors: offloaded 5/5 layers to GPU",
        "load_tensors:        CUDA0 model buffer size =   100.00 MiB",
        "llama_kv_cache:      CUDA0 KV buffer size =    10.00 MiB",
        "llama_context:      CUDA0 compute buffer size =     1.00 MiB",
    )
    facts = read_log(loading(f"{folder}/big.gguf", *GPU) + loading(f"{folder}/small.gguf", *draft))
    assert facts.model_mib == 21100.75
    assert facts.kv_mib == 454.75
    assert facts.compute_mib == pytest.approx(506.96)
    assert (facts.offloaded_layers, facts.layers) == (30, 46)
    assert facts.devices["CUDA0"] == pytest.approx(12049.25)


@pytest.mark.parametrize("log", ["", "\n", "error: failed to load model\n"])
def test_a_log_without_sizes_tells_nothing(log: str) -> None:
    """What is not told is None, never 0."""
    assert read_log(log) == LogFacts(None, None, None, None, None, None, {})


@pytest.mark.parametrize(
    ("line", "splits"),
    [
        ("sched_reserve: graph splits = 1", 1),
        ("0.00.039.076 I sched_reserve: graph: nodes = 257, splits = 3, input objects = 4", 3),
        ("llama_context: graph splits = 66 (with bs=512), 3 (with bs=1)", 66),
        ("llama_context: graph splits = 2 (with bs=512), 42 (with bs=1)", 42),
        ("I sched_reserve: graph (pp bs=512, tg bs=1): nodes = 9 / 9, splits = 5 / 4, in = 4", 5),
        ("I sched_reserve: graph (pp bs=512, tg bs=1): nodes = 9 / 9, splits = 2 / 98, in = 4", 98),
        ("slot print_timing: id  0 | task 0 |    graphs reused =         15", None),
    ],
)
def test_the_parts_of_the_graph_are_counted(line: str, splits: int | None) -> None:
    """In each way of writing, at the batch size that has the most."""
    assert read_log(loading("/m/big.gguf", line)).graph_splits == splits


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=8))
def test_the_sum_is_that_of_the_lines(sizes: list[int]) -> None:
    """Any number of devices, sizes with two digits after the point."""
    lines = [
        f"load_tensors: CUDA{index} model buffer size = {size / 100:8.2f} MiB"
        for index, size in enumerate(sizes)
    ]
    facts = read_log(loading("/m/a.gguf", *lines))
    assert facts.model_mib == pytest.approx(sum(sizes) / 100)
    assert len(facts.devices) == len(sizes)


def test_what_lies_on_a_gpu_is_told_apart() -> None:
    """The memory of the CPU is not counted, whichever device reads from it."""
    vulkan = (
        "I load_tensors:   CPU_Mapped model buffer size =     2.83 MiB",
        "I load_tensors:      Vulkan0 model buffer size =     3.14 MiB",
        "I llama_context: Vulkan_Host  output buffer size =     0.01 MiB",
        "I llama_kv_cache:    Vulkan0 KV buffer size =     2.00 MiB",
        "I sched_reserve: Vulkan_Host compute buffer size =     5.02 MiB",
    )
    apple = (
        "load_tensors:   CPU_Mapped model buffer size =   315.30 MiB",
        "load_tensors:  MTL0_Mapped model buffer size = 19000.00 MiB",
        "llama_kv_cache:       MTL0 KV buffer size =   320.00 MiB",
        "load_tensors:   CPU_REPACK model buffer size =     7.00 MiB",
    )
    assert read_log(loading("/m/one.gguf", *vulkan)).gpu_mib == pytest.approx({"Vulkan0": 5.14})
    assert read_log(loading("/m/one.gguf", *apple)).gpu_mib == {
        "MTL0_Mapped": 19000.0,
        "MTL0": 320.0,
    }
    assert read_log(loading("/m/big.gguf", *GPU)).gpu_mib.keys() == {"CUDA0", "CUDA1"}
