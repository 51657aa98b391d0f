"""Why a server ended: what its log says ran out, and whether the kernel or somebody killed it."""

from __future__ import annotations

import re
import resource
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

_MIB = 1024 * 1024
# A limit this high is none: version 1 of control groups has a number for it.
_NO_LIMIT = 2**60

# What an allocation that failed says of itself: the device, or what is asked for, in MiB or bytes.
_ASKED = (
    re.compile(r"failed to allocate output buffer of size (?P<mib>[\d.]+) MiB"),
    re.compile(r"failed to allocate (?P<device>\S+) buffer of size (?P<bytes>\d+)"),
    re.compile(r"failed to allocate (?P<device>\S+) buffer of (?P<bytes>\d+) bytes"),
    re.compile(r"allocating (?P<mib>[\d.]+) MiB on device (?P<cuda>\d+): .* out of memory"),
    re.compile(r"(?P<host>insufficient memory) \(attempted to allocate +(?P<mib>[\d.]+) MB\)"),
    re.compile(r"_(?P<host>cpu)_\w+: failed to allocate buffer of size (?P<bytes>\d+)"),
    re.compile(r"ggml_(?P<api>vulkan): .*emory allocation of size (?P<bytes>\d+) failed"),
    re.compile(r"_(?P<api>metal)_.*failed to allocate buffer, size = +(?P<mib>[\d.]+) MiB"),
    re.compile(r"_(?P<api>sycl)_.*can't allocate (?P<bytes>\d+) Bytes of memory on device"),
)
# What says no size, and where memory ran out.
_SIZELESS = (
    (re.compile(r"std::bad_alloc|mmap failed: Cannot allocate memory|ErrorOutOfHostMemory"), "CPU"),
    (re.compile(r"ErrorOutOfDeviceMemory"), "Vulkan"),
    (re.compile(r"kIOGPUCommandBufferCallbackErrorOutOfMemory"), "Metal"),
    (re.compile(r"(?:CUDA|ROCm|HIP|MUSA) error: out of memory"), ""),
    (re.compile(r"cudaMalloc failed: out of memory|error \(failed to allocate memory\)"), ""),
)
_APIS = {"vulkan": "Vulkan", "metal": "Metal", "sycl": "SYCL"}
_CURRENT = re.compile(r"current device: (\d+), in function")
_PURPOSES = {
    "model": re.compile(r"error loading model: unable to allocate \S+ buffer"),
    "KV": re.compile(r"failed to allocate buffer for kv cache"),
    "recurrent-state": re.compile(r"failed to allocate buffer for rs cache"),
    "compute": re.compile(r"ggml_gallocr_reserve|failed to allocate compute \w*\s?buffers"),
    "output": re.compile(r"failed to allocate output buffer"),
    "context": re.compile(r"failed to initialize the context: std::bad_alloc"),
}
# Tried again without, or done without: such a line is followed by a server that works.
_HARMLESS = re.compile(r"pinned memory|prompt cache state", re.IGNORECASE)
_OVERCOME = re.compile(r"retrying without pipeline parallelism|model loaded|listening on http")
_FREE = (
    re.compile(r"using device (\S+) \(.*\) - (\d+) MiB free"),
    re.compile(r" - (\w+) +: .*\(\d+ MiB, (\d+) MiB free\)"),
)
_ADVICE = {
    "model": "raise n-cpu-moe, lower n-gpu-layers, or take a smaller quantization",
    "KV": "lower ctx-size or parallel, or quantize the cache (cache-type-k, cache-type-v)",
    "recurrent-state": "lower parallel",
    "compute": "lower ubatch-size and batch-size",
    "output": "lower batch-size or parallel",
    "context": "lower ctx-size",
}
_ANY_ADVICE = "lower ctx-size, batch-size or n-gpu-layers, or raise n-cpu-moe"
_HOST_MODEL = "take a smaller model or quantization, or let it be mapped (mmap)"
_HOST_ADVICE = "lower ctx-size or batch-size, or take a smaller model"


@dataclass(frozen=True, slots=True)
class Shortage:
    """A buffer that there was no memory for.

    Attributes:
        device: As the server calls it, ``CUDA0``; ``CPU`` for the host, ``""`` where not told.
        purpose: ``model``, ``KV``, ``recurrent-state``, ``compute``, ``output`` or ``context``;
            ``""`` where not told.
        mib: Its size in MiB, None where not told.
    """

    device: str
    purpose: str
    mib: float | None

    @property
    def words(self) -> str:
        """What ran out in a few words: ``CUDA0 model buffer of 8984 MiB``."""
        size = "" if self.mib is None else f" of {self.mib:.0f} MiB"
        about = f"{self.device} {self.purpose}".strip() or "a"
        return f"{about} buffer{size}"

    @property
    def advice(self) -> str:
        """What may help."""
        if self.device == "CPU" and self.purpose in {"model", ""}:
            return _HOST_MODEL if self.purpose else _HOST_ADVICE
        return _ADVICE.get(self.purpose, _ANY_ADVICE)


def shortage(log: str) -> Shortage | None:
    """Return the buffer that a server which ended had no memory for, None if its log tells none.

    What went well in the end does not count: a start tries again without pipeline parallelism,
    without pinned memory, or with a smaller context.

    Args:
        log: All that a server that ended has logged.
    """
    found: Shortage | None = None
    harmless = False
    for line in log.splitlines():
        # Vulkan names the error in the line after the one that says what it is about.
        after, harmless = harmless, bool(_HARMLESS.search(line))
        if _OVERCOME.search(line):
            found = None
        elif not harmless and not (after and "Memory" in line):
            found = _read(line, found)
    return found


def _read(line: str, found: Shortage | None) -> Shortage | None:
    """Return what is known of a shortage with one more line of the log."""
    purpose = next((name for name, told in _PURPOSES.items() if told.search(line)), "")
    device, mib, by_name = "", None, False
    if said := next((match for told in _ASKED if (match := told.search(line))), None):
        groups = said.groupdict()
        device, mib, by_name = _device(groups), _size(groups), bool(groups.get("device"))
    elif sizeless := [where for told, where in _SIZELESS if told.search(line)]:
        device = sizeless[0]
    elif found is None:
        return None
    elif (current := _CURRENT.search(line)) and not found.device:
        device = f"CUDA{current[1]}"
    if found is None or (found.purpose and mib is not None and not purpose):
        # A shortage that was told in full is over: this is the next one.
        return Shortage(device, purpose, mib)
    # Of several lines on one shortage some know the device by its name, and some no size.
    named = device if by_name or not found.device else found.device
    return Shortage(named, found.purpose or purpose, found.mib if mib is None else mib)


def _device(groups: Mapping[str, str | None]) -> str:
    if groups.get("host"):
        return "CPU"
    if (number := groups.get("cuda")) is not None:
        return f"CUDA{number}"
    if api := groups.get("api"):
        return _APIS[api]
    return groups.get("device") or ""


def _size(groups: Mapping[str, str | None]) -> float | None:
    if size := groups.get("bytes"):
        return int(size) / _MIB
    return float(size) if (size := groups.get("mib")) else None


def free_before(log: str, device: str) -> float | None:
    """Return the free memory of a device before the model was loaded, MiB, as the log tells it."""
    for told in _FREE:
        for match in told.finditer(log):
            if match[1] == device:
                return float(match[2])
    return None


@dataclass(frozen=True, slots=True)
class Kills:
    """Counters of the kernel's OOM killer; -1 where one cannot be read.

    Attributes:
        machine: Processes killed on the whole machine.
        group: Those of our control group.
        at_limit: How often our control group, or one around it, was at its limit of memory.
        limit_mib: The lowest such limit, MiB; 0 for none.
    """

    machine: int
    group: int
    at_limit: int
    limit_mib: int


@dataclass(frozen=True, slots=True)
class Before:
    """What was true before a process started.

    Attributes:
        kills: Counters of the OOM killer.
        available_mib: Memory of the host that a new program could have, MiB.
    """

    kills: Kills
    available_mib: float


def before() -> Before:
    """Return what is true now, to be compared when a process has ended."""
    return Before(kills(), psutil.virtual_memory().available / _MIB)


def kills(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> Kills:
    """Read the counters of the OOM killer.

    Args:
        proc: Where the kernel shows processes.
        groups: Where control groups are mounted.
    """
    machine = _counter(proc / "vmstat", "oom_kill")
    group, at_limit, limit = -1, -1, 0
    for index, folder in enumerate(_folders(proc, groups)):
        second = folder / "memory.events"
        if index == 0:
            # Both count all below them, whatever limit was hit.
            group = max(
                _counter(second, "oom_kill"), _counter(folder / "memory.oom_control", "oom_kill")
            )
        hit = max(_counter(second, "oom"), _number(folder / "memory.failcnt"))
        at_limit = max(at_limit, 0) + hit if hit >= 0 else at_limit
        most = max(_number(folder / "memory.max"), _number(folder / "memory.limit_in_bytes"))
        if 0 <= most < _NO_LIMIT:
            limit = min(limit or most // _MIB, most // _MIB)
    return Kills(machine, group, at_limit, limit)


def _folders(proc: Path, groups: Path) -> Iterator[Path]:
    """Yield the folder of our control group of memory, then those around it."""
    with suppress(OSError):
        for line in (proc / "self/cgroup").read_text("utf-8").splitlines():
            _, _, rest = line.partition(":")
            controllers, _, path = rest.partition(":")
            if "memory" in controllers.split(","):
                root = groups / "memory"
            elif not controllers and (groups / "cgroup.controllers").exists():
                root = groups
            else:
                continue
            folder = root / path.strip("/")
            # Inside a container its own group may be mounted as the root.
            while not folder.is_dir() and folder != root:
                folder = folder.parent
            yield folder
            while folder != root:
                folder = folder.parent
                yield folder


def _counter(path: Path, name: str) -> int:
    with suppress(OSError, ValueError):
        for line in path.read_text("utf-8").splitlines():
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
    return -1


def _number(path: Path) -> int:
    with suppress(OSError, ValueError):
        return int(path.read_text("utf-8"))
    return -1


def who_killed(earlier: Kills, later: Kills) -> tuple[bool, str]:
    """Return whether SIGKILL came from the kernel for want of memory, and who sent it, in words."""
    known = min(earlier.group, later.group) >= 0
    if later.group > earlier.group >= 0:
        if later.limit_mib and later.at_limit > earlier.at_limit:
            return True, (
                "the kernel's OOM killer, at the limit of this control group: a container or "
                f"service may use {later.limit_mib} MiB"
            )
        return True, "the kernel's OOM killer: the machine was out of memory"
    if later.machine > earlier.machine >= 0:
        if known:
            return False, (
                "somebody's kill: the kernel's OOM killer ended a process meanwhile, but none of "
                "this control group"
            )
        return True, (
            "the kernel's OOM killer, which ended a process meanwhile: the machine was out of "
            "memory"
        )
    if known or min(earlier.machine, later.machine) >= 0:
        return False, "somebody's kill: the kernel's OOM killer ended nothing meanwhile"
    return False, "out of memory, or somebody's kill"


def limits(get: Callable[[int], tuple[int, int]] = resource.getrlimit) -> str:
    """Return the limits of memory that programs inherit from us, in words; ``""`` for none."""
    told = [
        f"{name} is {soft // _MIB} MiB ({option})"
        for name, option, kind in (
            ("the limit of the address space", "ulimit -v", resource.RLIMIT_AS),
            ("the limit of data", "ulimit -d", resource.RLIMIT_DATA),
        )
        if (soft := get(kind)[0]) != resource.RLIM_INFINITY
    ]
    return " and ".join(told)
