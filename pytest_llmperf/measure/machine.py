"""What machine this is: the key of its baselines, and what must be equal to compare on it."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from pytest_llmperf.gpu.cards import Gpu, gpus

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
        "gpu": [_facts(card) for card in cards],
        "driver": cards[0].driver if cards else None,
        "cpu": f"{_cpu()}, {os.cpu_count()} cores",
        "os": f"{platform.system()} {platform.machine()}",
    }


def machine_fingerprint(key: str | None = None) -> dict[str, str]:
    """Return what must be equal for two results of one machine to be comparable."""
    facts = machine(key)
    cards = gpus()
    found = {
        "machine": str(facts["key"]),
        "gpu": ", ".join(f"{card.name} {card.total_mib} MiB" for card in cards) or "none",
        "driver": str(facts["driver"] or "none"),
        "cpu": str(facts["cpu"]),
    }
    # Only where one is told: what was recorded without stays comparable elsewhere.
    if any(card.power_limit_w is not None for card in cards):
        limits = [_limit(card) for card in cards]
        found["power_limit"] = limits[0] if len(set(limits)) == 1 else ", ".join(limits)
    return found


def _facts(card: Gpu) -> dict[str, object]:
    """Return a GPU of the machine block, which is public: without the UUID."""
    facts: dict[str, object] = {"name": card.name, "memory_mib": card.total_mib}
    if card.power_limit_w is not None:
        facts["power_limit_w"] = round(card.power_limit_w)
    if card.persistence is not None:
        facts["persistence"] = card.persistence
    return facts


def _limit(card: Gpu) -> str:
    return "untold" if card.power_limit_w is None else f"{card.power_limit_w:.0f} W"


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
