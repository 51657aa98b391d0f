"""What one test may spend on measuring again."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(slots=True)
class Budget:
    """Seconds that run from now on, but not while something is measured that has to be.

    Attributes:
        seconds: How many there are to begin with; none and fewer are spent at once.
    """

    seconds: float
    _deadline: float = field(init=False)
    _nested: int = field(init=False, default=0)
    _closed: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self._deadline = time.monotonic() + self.seconds

    @property
    def spent(self) -> bool:
        """Whether nothing may be measured again."""
        return self._closed or time.monotonic() >= self._deadline

    @property
    def closed(self) -> bool:
        """Whether nothing may be measured at all, not even what a verdict needs."""
        return self._closed

    def close(self) -> None:
        """Leave nothing of it, and nothing beside it."""
        self._closed = True

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Measure what has to be measured, or wait for other runs: it costs nothing."""
        began = time.monotonic()
        self._nested += 1
        try:
            yield
        finally:
            self._nested -= 1
            # What is paused inside of what is paused is not given back twice.
            if not self._nested:
                self._deadline += time.monotonic() - began
