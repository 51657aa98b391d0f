"""What one test may spend."""

from __future__ import annotations

import pytest

from pytest_llmperf.budget import Budget


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still until it is set."""
    now = [1000.0]
    monkeypatch.setattr("pytest_llmperf.budget.time.monotonic", lambda: now[0])
    return now


def test_it_runs_from_its_making(clock: list[float]) -> None:
    """And is spent with its last second."""
    budget = Budget(5.0)
    clock[0] += 4.9
    assert not budget.spent
    clock[0] += 0.1
    assert budget.spent


@pytest.mark.parametrize("seconds", [0.0, -1.0])
def test_nothing_is_spent_at_once(clock: list[float], seconds: float) -> None:
    """However coarse the clock."""
    assert clock
    assert Budget(seconds).spent


def test_what_has_to_be_measured_is_free(clock: list[float]) -> None:
    """Also where one such thing asks for another, and where it fails."""
    budget = Budget(5.0)
    with budget.paused():
        clock[0] += 100.0
        with budget.paused():
            clock[0] += 100.0

    def breaks() -> None:
        with budget.paused():
            clock[0] += 100.0
            raise ValueError("it broke")

    with pytest.raises(ValueError, match="it broke"):
        breaks()
    clock[0] += 4.9
    assert not budget.spent
    clock[0] += 0.1
    assert budget.spent


def test_it_can_be_closed(clock: list[float]) -> None:
    """Nothing of it is left then, whatever is paused."""
    budget = Budget(5.0)
    assert not budget.closed
    budget.close()
    with budget.paused():
        clock[0] += 100.0
    assert budget.closed
    assert budget.spent
