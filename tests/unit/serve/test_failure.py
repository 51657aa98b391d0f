"""What ran out and who killed: lines of real logs, and counters as kernels show them."""

from __future__ import annotations

import re
import resource
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_llmperf.serve.failure import Kills, free_before, kills, limits, shortage, who_killed

# llama-server b11434 on the CPU, its KV cache larger than the limit of its address space.
KV = """\
0.00.005.207 I cmn  common_param:   - CPU     : AMD EPYC (24105 MiB, 24105 MiB free)
0.00.252.143 E ggml_aligned_malloc: insufficient memory (attempted to allocate 19532.50 MB)
0.00.252.195 E ggml_backend_cpu_buffer_type_alloc_buffer: failed to allocate buffer of size 20481310720
0.00.252.198 E ggml_backend_buft_alloc_buffer_n_default: failed to allocate CPU buffer of size 20481310720
0.00.257.645 E llama_init_from_model: failed to initialize the context: failed to allocate buffer for kv cache
0.00.257.739 E srv    load_model: failed to create_context with model 'model.gguf'
0.00.258.560 E srv  llama_server: exiting due to model loading error
"""  # noqa: E501 - as it was logged
# A build of 49bfdde; it dies of SIGSEGV right after.
OLDER_COMPUTE = """\
ggml_aligned_malloc: insufficient memory (attempted to allocate 181185.25 MB)
ggml_backend_cpu_buffer_type_alloc_buffer: failed to allocate buffer of size 189986504704
ggml_gallocr_reserve_n_impl: failed to allocate CPU buffer of size 189986504704
graph_reserve: failed to allocate compute buffers
llama_init_from_model: failed to initialize the context: failed to allocate compute pp buffers
"""
MODEL = """\
0.00.044.336 E ggml_aligned_malloc: insufficient memory (attempted to allocate  42.54 MB)
0.00.045.378 E ggml_backend_cpu_buffer_type_alloc_buffer: failed to allocate buffer of size 44608000
0.00.045.380 E ggml_backend_buft_alloc_buffer_n_default: failed to allocate CPU buffer of size 44608000
0.00.045.596 E llama_model_load: error loading model: unable to allocate CPU buffer
"""  # noqa: E501 - as it was logged
# It ends without a word on the second try: the first was that of `--fit`.
CELLS = """\
llama_init_from_model: failed to initialize the context: std::bad_alloc
llama_params_fit: encountered an error while trying to fit params to free device memory: failed
llama_context:        CPU  output buffer size =     0.01 MiB
"""
# As users report them.
CUDA_MODEL = """\
llama_model_load_from_file_impl: using device CUDA0 (NVIDIA GeForce RTX 5080) (0000:01:00.0) - 15222 MiB free
ggml_backend_cuda_buffer_type_alloc_buffer: allocating 8984.00 MiB on device 0: cudaMalloc failed: out of memory
alloc_tensor_range: failed to allocate CUDA0 buffer of size 9420406784
llama_model_load: error loading model: unable to allocate CUDA0 buffer
"""  # noqa: E501 - as it was logged
CUDA_KV = """\
E ggml_backend_cuda_buffer_type_alloc_buffer: allocating 4480.00 MiB on device 3: cudaMalloc failed: out of memory
E llama_kv_cache_init: failed to allocate buffer for kv cache
"""  # noqa: E501 - as it was logged
PIPELINE = """\
E ggml_backend_cuda_buffer_type_alloc_buffer: allocating 51748.72 MiB on device 1: cudaMalloc failed: out of memory
E ggml_gallocr_reserve_n_impl: failed to allocate CUDA1 buffer of size 54262464512
E graph_reserve: failed to allocate compute buffers
"""  # noqa: E501 - as it was logged
RETRIED = (
    "W sched_reserve: compute buffer allocation failed, retrying without pipeline parallelism\n"
)
AMD = """\
ggml_backend_cuda_buffer_type_alloc_buffer: allocating 100.00 MiB on device 0: cudaMalloc failed: out of memory
alloc_tensor_range: failed to allocate ROCm0 buffer of size 104857600
"""  # noqa: E501 - as it was logged
VULKAN = """\
ggml_vulkan: Device memory allocation of size 369827840 failed.
ggml_vulkan: vk::Device::allocateMemory: ErrorOutOfDeviceMemory
"""
VULKAN_PINNED = """\
ggml_vulkan: Failed to allocate pinned memory.
ggml_vulkan: vk::Device::allocateMemory: ErrorOutOfDeviceMemory
"""
METAL = """\
ggml_metal_synchronize: error: command buffer 0 failed with status 5
error: Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)
"""
METAL_BUFFER = "ggml_metal_buffer_init: error: failed to allocate buffer, size =  4096.00 MiB\n"
CUDA_RUN = """\
CUDA error: out of memory
  current device: 1, in function alloc at ggml/src/ggml-cuda/ggml-cuda.cu:583
  cuMemCreate(&handle, reserve_size, &prop, 0)
"""


@pytest.mark.parametrize(
    ("log", "words"),
    [
        (KV, "CPU KV buffer of 19532 MiB"),
        (OLDER_COMPUTE, "CPU compute buffer of 181185 MiB"),
        (MODEL, "CPU model buffer of 43 MiB"),
        (CELLS, "CPU context buffer"),
        (CUDA_MODEL, "CUDA0 model buffer of 8984 MiB"),
        (CUDA_KV, "CUDA3 KV buffer of 4480 MiB"),
        (PIPELINE, "CUDA1 compute buffer of 51749 MiB"),
        (AMD, "ROCm0 buffer of 100 MiB"),
        (VULKAN, "Vulkan buffer of 353 MiB"),
        (METAL, "Metal buffer"),
        (METAL_BUFFER, "Metal buffer of 4096 MiB"),
        (CUDA_RUN, "CUDA1 buffer"),
        ("model loaded\n" + CUDA_RUN, "CUDA1 buffer"),
        # The last one counts: what was overcome before it does not matter.
        (PIPELINE + RETRIED + CUDA_KV, "CUDA3 KV buffer of 4480 MiB"),
        (PIPELINE + CUDA_KV, "CUDA3 KV buffer of 4480 MiB"),
        ("failed to allocate output buffer of size 12.50 MiB", "output buffer of 12 MiB"),
    ],
)
def test_what_ran_out_is_read(log: str, words: str) -> None:
    """Device, purpose and size as far as the lines tell them, of old builds and new ones."""
    found = shortage(log)
    assert found is not None
    assert found.words == words


@pytest.mark.parametrize(
    "log",
    [
        "",
        "llama_server: model loaded\nsrv  update_slots: all slots are idle\n",
        PIPELINE + RETRIED,
        CELLS + "0.00.286.921 I srv  llama_server: model loaded\n",
        CUDA_KV + "main: server is listening on http://127.0.0.1:1234 - starting the main loop\n",
        VULKAN_PINNED,
        "ggml_cuda_host_malloc: failed to allocate 1900.00 MiB of pinned memory: out of memory\n",
        "srv failed to allocate memory for prompt cache state: std::bad_alloc\n",
        "warning: failed to mlock 100-byte buffer: Cannot allocate memory\n",
        "llama_model_load: error loading model: invalid magic\n",
    ],
)
def test_what_was_overcome_is_no_shortage(log: str) -> None:
    """A server that went on, or ended of something else, had memory."""
    assert shortage(log) is None


@given(st.text())
def test_any_log_can_be_read(log: str) -> None:
    """However broken, a log says something or nothing."""
    found = shortage(log)
    assert found is None or found.words


def test_advice_fits_the_buffer() -> None:
    """What to change depends on what ran out, and where."""
    told = [found.advice for log in (KV, MODEL, CUDA_MODEL, PIPELINE) if (found := shortage(log))]
    for advice, option in zip(told, ("ctx-size", "mmap", "n-cpu-moe", "batch-size"), strict=True):
        assert option in advice


def test_free_memory_is_read_from_the_log() -> None:
    """By device, as it was before the model was loaded; None where the log does not say."""
    assert free_before(CUDA_MODEL, "CUDA0") == 15222
    assert free_before(KV, "CPU") == 24105
    assert free_before(CUDA_MODEL, "CUDA1") is None


def write(root: Path, **files: str) -> None:
    """Write files below a folder; ``__`` in a name stands for a slash, ``_dot_`` for a dot."""
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")


def test_counters_of_version_2_are_read(tmp_path: Path) -> None:
    """Kills of our own group; the limit and the hits of it and of those around it."""
    write(tmp_path / "proc", vmstat="oom_kill 7\n", self__cgroup="0::/box/inner\n")
    write(
        tmp_path / "cg",
        cgroup_dot_controllers="memory",
        box__memory_dot_events="oom 3\noom_kill 2\n",
        box__memory_dot_max="1073741824\n",
        box__inner__memory_dot_events="oom 1\noom_kill 1\n",
        box__inner__memory_dot_max="max\n",
    )
    assert kills(tmp_path / "proc", tmp_path / "cg") == Kills(7, 1, 4, 1024)


def test_counters_of_version_1_are_read(tmp_path: Path) -> None:
    """Likewise; a container may have its group mounted as the root. A huge limit is none."""
    write(
        tmp_path / "proc", vmstat="nr 1\noom_kill 7\n", self__cgroup="4:cpu:/\n3:memory:/out/side\n"
    )
    write(
        tmp_path / "cg/memory",
        memory_dot_oom_control="oom_kill_disable 0\nunder_oom 0\noom_kill 5\n",
        memory_dot_failcnt="9\n",
        memory_dot_limit_in_bytes="9223372036854771712\n",
    )
    assert kills(tmp_path / "proc", tmp_path / "cg") == Kills(7, 5, 9, 0)


def test_a_system_that_tells_nothing_is_not_known(tmp_path: Path) -> None:
    """Then no counter is 0: nobody knows."""
    assert kills(tmp_path, tmp_path) == Kills(-1, -1, -1, 0)


def test_the_real_kernel_can_be_asked() -> None:
    """Whatever it is, asking it raises nothing, and two looks at once agree."""
    assert who_killed(kills(), kills())[0] is False


@pytest.mark.parametrize(
    ("earlier", "later", "memory", "told"),
    [
        (Kills(1, 1, 0, 0), Kills(2, 2, 0, 0), True, "OOM killer: the machine was out of memory"),
        (Kills(1, 1, 0, 512), Kills(2, 2, 3, 512), True, "may use 512 MiB"),
        (Kills(1, 1, 0, 512), Kills(2, 2, 0, 512), True, "the machine was out of memory"),
        (Kills(1, 1, 0, 0), Kills(1, 1, 0, 0), False, "somebody's kill: .* ended nothing"),
        (Kills(1, 1, 0, 0), Kills(2, 1, 0, 0), False, "but none of this control group"),
        (Kills(1, -1, -1, 0), Kills(2, -1, -1, 0), True, "ended a process meanwhile"),
        (Kills(1, -1, -1, 0), Kills(1, -1, -1, 0), False, "somebody's kill"),
        (Kills(-1, -1, -1, 0), Kills(-1, -1, -1, 0), False, "out of memory, or somebody's kill"),
    ],
)
def test_who_killed_is_told_by_the_counters(
    earlier: Kills, later: Kills, *, memory: bool, told: str
) -> None:
    """The kernel for want of memory, at a limit or not, or somebody; else it stays open."""
    found = who_killed(earlier, later)
    assert found[0] is memory
    assert re.search(told, found[1])


def test_inherited_limits_are_told() -> None:
    """Only those that are set."""
    free = resource.RLIM_INFINITY

    def some(kind: int) -> tuple[int, int]:
        return (2**30 if kind == resource.RLIMIT_AS else free, free)

    assert limits(some) == "the limit of the address space is 1024 MiB (ulimit -v)"
    assert limits(lambda _kind: (free, free)) == ""
