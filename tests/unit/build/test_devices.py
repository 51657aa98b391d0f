"""Devices, as a build lists them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_llmperf.build.build import Build
from pytest_llmperf.build.devices import Device, devices_of
from pytest_llmperf.errors import BuildError

MakeProgram = Callable[..., Path]


def build_of(*command: str | Path, **env: str) -> Build:
    """Return a build that is started with this command."""
    return Build("b1234", 1234, "abc", "test", "", tuple(map(str, command)), env=env)


def test_each_device_is_read_with_its_memory(make_program: MakeProgram) -> None:
    """Names may hold brackets of their own; what is no device is passed over."""
    program = make_program(
        '[ "$*" = --list-devices ] || exit 9',
        "cat <<'EOF'",
        "Available devices:",
        "  CUDA0: NVIDIA GeForce RTX 5080 (16303 MiB, 15903 MiB free)",
        "  Vulkan1: AMD Radeon 780M (RADV PHOENIX) (14336 MiB, 0 MiB free)",
        "EOF",
    )
    assert devices_of(build_of(program)) == (
        Device("CUDA0", "NVIDIA GeForce RTX 5080", 16303, 15903),
        Device("Vulkan1", "AMD Radeon 780M (RADV PHOENIX)", 14336, 0),
    )


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("MTL0: Apple M5 Max (110100 MiB, 110099 MiB free)", "MTL0"),
        ("Metal: Apple M4 Max (98304 MiB, 98303 MiB free)", "Metal"),
        ("ROCm0: AMD Radeon RX 7900 XTX (24560 MiB, 24510 MiB free)", "ROCm0"),
        ("SYCL0: Intel(R) Arc(TM) A770 Graphics (15473 MiB, 15473 MiB free)", "SYCL0"),
        ("Vulkan0: llvmpipe (LLVM 15.0.6, 256 bits) (2048 MiB, 2048 MiB free)", "Vulkan0"),
    ],
)
def test_every_backend_counts_and_a_library_of_the_cpu_does_not(
    make_program: MakeProgram, line: str, found: str
) -> None:
    """A Mac lists the library that multiplies on its CPU beside its GPU."""
    lines = ("Available devices:", f"  {line}", "  BLAS: Accelerate (0 MiB, 0 MiB free)")
    program = make_program("cat <<'EOF'", *lines, "EOF")
    assert [device.id for device in devices_of(build_of(program))] == [found]


def test_a_build_without_gpu_code_has_none(make_program: MakeProgram) -> None:
    """An empty list, with or without the word for it."""
    program = make_program("echo 'Available devices:'", "echo '  (none)'")
    assert devices_of(build_of(program)) == ()


def test_a_device_on_stderr_does_not_count(make_program: MakeProgram) -> None:
    """The list is on stdout; drivers talk on stderr."""
    program = make_program("echo '  CUDA0: X (1 MiB, 1 MiB free)' >&2")
    assert devices_of(build_of(program)) == ()


def test_an_endpoint_is_not_asked() -> None:
    """There is no program of a running server."""
    assert devices_of(build_of()) == ()


def test_the_builds_environment_counts(make_program: MakeProgram) -> None:
    """A build that a variable hides a device from does not have it."""
    program = make_program('echo "  CUDA0: X (1 MiB, $CUDA_FREE MiB free)"')
    assert devices_of(build_of(program, CUDA_FREE="7")) == (Device("CUDA0", "X", 1, 7),)


def test_a_build_that_does_not_run_is_no_build_without_gpus(make_program: MakeProgram) -> None:
    """A missing library must not pass for a machine without a GPU."""
    program = make_program("echo 'libcudart.so.13: cannot open shared object file' >&2", "exit 127")
    with pytest.raises(BuildError) as caught:
        devices_of(build_of(program))
    assert str(caught.value) == (
        "build b1234: `--list-devices` ended with 127: "
        "libcudart.so.13: cannot open shared object file"
    )


def test_a_silent_failure_says_so(make_program: MakeProgram) -> None:
    """There may be nothing to quote."""
    with pytest.raises(BuildError, match="ended with 3: no output"):
        devices_of(build_of(make_program("exit 3")))


def test_a_program_that_is_gone_is_named(tmp_path: Path) -> None:
    """With the build's label."""
    with pytest.raises(BuildError, match="build b1234: cannot run `--list-devices`: "):
        devices_of(build_of(tmp_path / "gone"))
