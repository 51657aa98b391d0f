"""GPUs that tests make up."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from support.nvml import Card, Driver, forget

Pretend = Callable[..., Driver]


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pretend]:
    """Gives this machine other GPUs, for as long as the test lasts."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def now(*cards: Card, **keywords: object) -> Driver:
        driver = Driver(*cards, **keywords)  # type: ignore[arg-type]  # whatever the test says
        driver.install(monkeypatch)
        return driver

    yield now
    forget()
