"""What a llama-server's log tells about memory and devices."""

from __future__ import annotations

import re
from dataclasses import dataclass

_LOADED = re.compile(r"loaded meta data with .* tensors from (.+?)(?: \(version GGUF .*)?$")
_BUFFER = re.compile(r"(\S+)\s+(model|KV|RS|compute|output) buffer size =\s*([\d.]+) MiB")
# `splits = 2` or, for two sizes of batch, `splits = 66 (with bs=512), 3 (with bs=1)`, which b11434
# writes as `graph (pp bs=512, tg bs=1): nodes = 111 / 111, splits = 66 / 3, ...`.
_SPLITS = re.compile(r"graph\b.*?\bsplits = (\d+)(?:(?: / | \(with bs=\d+\), )(\d+))?")
_HOST = re.compile(r"^(?:CPU|AMX|BLAS)|_Host$")
_OFFLOADED = re.compile(r"offloaded (\d+)/(\d+) layers to GPU")


@dataclass(frozen=True, slots=True)
class LogFacts:
    """Memory as the server's log tells it, in MiB, all devices together, and what runs where.

    Attributes:
        model_mib: Weights, or None if the log has no such line.
        kv_mib: KV cache and recurrent state.
        compute_mib: Compute and output buffers.
        offloaded_layers: Layers on the GPU, None where the log does not say.
        layers: Layers there are.
        graph_splits: Parts that the graph is cut into because its operations run on several
            devices, at the batch size with the most; None where the log does not say.
        devices: Device (``CUDA0``, ``CPU``, ``CPU_Mapped``) to MiB of all its buffers.
    """

    model_mib: float | None
    kv_mib: float | None
    compute_mib: float | None
    offloaded_layers: int | None
    layers: int | None
    graph_splits: int | None
    devices: dict[str, float]

    @property
    def gpu_mib(self) -> dict[str, float]:
        """MiB by device, only those that are no memory of the CPU's own.

        ``CPU``, ``CPU_Mapped``, ``CPU_REPACK`` and ``AMX`` are, and so is what a GPU reads from
        there: ``CUDA_Host``, ``Vulkan_Host``.
        """
        return {name: mib for name, mib in self.devices.items() if not _HOST.search(name)}


_GROUP = {"model": "model", "KV": "kv", "RS": "kv", "compute": "compute", "output": "compute"}


def read_log(text: str) -> LogFacts:
    """Read buffer sizes and offloaded layers out of a server's log.

    With ``--fit on`` a build may first load the model without memory to see whether it fits, and
    print sizes that are not allocated. Only the last load of each model file counts.

    Args:
        text: The log from the start to at least the end of loading.
    """
    # One list of lines a model file; a further load of the same file begins it anew.
    loads: dict[str, list[str]] = {"": []}
    current = ""
    for line in text.splitlines():
        if loaded := _LOADED.search(line):
            current = loaded.group(1)
            loads[current] = []
        loads[current].append(line)
    sums: dict[str, float] = {}
    devices: dict[str, float] = {}
    offloaded: tuple[int, int] | None = None
    splits: int | None = None
    for lines in loads.values():
        for line in lines:
            if found := _BUFFER.search(line):
                device, what, size = found.group(1), _GROUP[found.group(2)], float(found.group(3))
                sums[what] = sums.get(what, 0.0) + size
                devices[device] = devices.get(device, 0.0) + size
            elif layers := _OFFLOADED.search(line):
                done, total = int(layers.group(1)), int(layers.group(2))
                before = offloaded or (0, 0)
                offloaded = (before[0] + done, before[1] + total)
            elif cut := _SPLITS.search(line):
                splits = max(splits or 0, *(int(part) for part in cut.groups() if part))
    return LogFacts(
        model_mib=sums.get("model"),
        kv_mib=sums.get("kv"),
        compute_mib=sums.get("compute"),
        offloaded_layers=offloaded[0] if offloaded else None,
        layers=offloaded[1] if offloaded else None,
        graph_splits=splits,
        devices=devices,
    )
