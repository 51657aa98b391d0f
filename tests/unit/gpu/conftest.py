"""What the tests of GPUs share."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from support.nvml import Card, Driver, forget

Pretend = Callable[..., Driver]


@pytest.fixture(autouse=True)
def _nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test finds is not remembered by the next, nor set by who runs the tests."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    forget()
    yield
    forget()


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Pretend:
    """Gives this machine other GPUs."""

    def now(*cards: Card, **keywords: object) -> Driver:
        driver = Driver(*cards, **keywords)  # type: ignore[arg-type]
        driver.install(monkeypatch)
        return driver

    return now
