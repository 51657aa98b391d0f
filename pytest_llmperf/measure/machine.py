"""What machine this is: the key of its baselines, and what must be equal to compare on it."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from pytest_llmperf.measure.gpu import gpus

_GIB = 1024
_LONGEST = 52
"""Characters of a name in a key; a key has 64 at most, with number and size of the GPUs."""


@cache
def machine(key: str | None = None) -> Mapping[str, object]:
    """Return the machine block of a baseline file.

    Args:
        key: A name given by the user; otherwise made from the first GPU and their number, or
            from the processor and its cores.
    """
    cards = gpus()
    return {
        "key": key or _key(),
        "gpu": [{"name": card.name, "memory_mib": card.total_mib} for card in cards],
        "driver": cards[0].driver if cards else None,
        "cpu": f"{_cpu()}, {os.cpu_count()} cores",
        "os": f"{platform.system()} {platform.machine()}",
    }


def machine_fingerprint(key: str | None = None) -> dict[str, str]:
    """Return what must be equal for two results of one machine to be comparable."""
    facts = machine(key)
    cards = ", ".join(f"{card.name} {card.total_mib} MiB" for card in gpus())
    return {
        "machine": str(facts["key"]),
        "gpu": cards or "none",
        "driver": str(facts["driver"] or "none"),
        "cpu": str(facts["cpu"]),
    }


def _key() -> str:
    cards = gpus()
    if cards:
        name = re.sub(r"\b(nvidia|geforce|tesla|graphics)\b", "", cards[0].name.lower())
        size = round(cards[0].total_mib / _GIB)
        slug = f"{_slug(name)}-{size}gb" if size else _slug(name)
        return slug if len(cards) == 1 else f"{len(cards)}x-{slug}"
    # Marks and clock rates say nothing that the model number does not.
    name = re.sub(r"\((r|tm)\)|\bcpu\b|\bprocessor\b|@.*$|\b\d+-core\b", " ", _cpu().lower())
    return f"{_slug(name)}-{os.cpu_count()}c"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower())[:_LONGEST].strip("-") or "unknown"


@cache
def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text("utf-8", errors="replace").splitlines():
            if line.startswith(("model name", "Model")):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
