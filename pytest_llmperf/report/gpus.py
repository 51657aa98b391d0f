"""What the GPUs did meanwhile, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pytest_llmperf.plain import plain
from pytest_llmperf.report.result import Side


def hundredths(share: float) -> str:
    """Return a share as a whole percentage, without a sign."""
    return f"{100 * share:.0f} %"


def gpu_lines(side: Side) -> list[str]:
    """Return a line for each GPU that a build's launches used; what is not known is left out."""
    rate = side.gpu.get("rate_hz")
    return [_card(card, rate) for card in side.gpu.get("cards") or ()]


def _card(card: Mapping[str, Any], rate: float | None) -> str:
    """Return what is known of a GPU: what it did, what it is, and who else was there."""
    sampled = "" if rate is None else f" sampled at {rate:.0f} Hz"
    slowed, capped = card.get("throttled") or {}, card.get("power_capped")
    parts = [
        card.get("name"),
        # Most names say so. What follows of power, clocks and temperature is the whole GPU's.
        "a MIG instance" if card.get("mig") and "MIG" not in (card.get("name") or "") else "",
        _known(card.get("busy"), "{:.0f} % busy"),
        _known(_clock(card.get("sm_clock_mhz")), "SM {} MHz"),
        _known(_clock(card.get("memory_clock_mhz")), "memory {} MHz"),
        _known(card.get("temperature_c"), "{:.0f} °C"),
        _known(card.get("power_w"), "{:.0f} W"),
        _known(card.get("used_peak_mib"), "peak {:.0f} MiB" + sampled),
        _known(card.get("driver"), "driver {}"),
        _known(card.get("power_limit_w"), "limit {:.0f} W"),
        "persistence mode off" if card.get("persistence") is False else "",
        *(
            f"throttled {hundredths(share)} of the time: {why}"
            for why, share in slowed.items()
            if share
        ),
        f"at its power limit {hundredths(capped)} of the time" if capped else "",
    ]
    told = ", ".join(part for part in parts if part) or "nothing is known of it"
    others = ", ".join(_foreign(one) for one in card.get("foreign") or ())
    number = _known(card.get("index"), " {}")
    # Names of processes are theirs to choose.
    return plain(f"GPU{number}: {told}" + (f"; also there: {others}" if others else ""), kept="")


def _foreign(one: Mapping[str, Any]) -> str:
    """Return a process that is none of the build's."""
    parts = (
        one.get("name") or "a process",
        _known(one.get("pid"), "(pid {})"),
        _known(one.get("mib"), "{:.0f} MiB"),
        _known(one.get("busy"), "{:.0f} % busy"),
    )
    return " ".join(part for part in parts if part)


def _clock(told: Any) -> str | None:  # noqa: ANN401 - a JSON value
    """Return the median of a least, middle and highest clock, with the ends if they differ."""
    if not isinstance(told, list | tuple):
        return None if told is None else f"{told:.0f}"
    if len(told) != 3 or None in told:  # noqa: PLR2004 - least, middle, highest
        return None
    low, middle, high = (f"{value:.0f}" for value in told)
    return middle if low == high else f"{middle} ({low}…{high})"


def _known(value: Any, layout: str) -> str:  # noqa: ANN401 - a JSON value
    """Return a value in words, ``""`` for None."""
    return "" if value is None else layout.format(value)
