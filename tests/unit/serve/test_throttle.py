"""A process that is stopped for a share of the time."""

from __future__ import annotations

import subprocess
import sys

import psutil
import pytest

from pytest_llmperf.serve.throttle import Throttle


@pytest.fixture
def worker() -> subprocess.Popen[bytes]:
    """A process group of its own that works without end."""
    return subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=True)


def test_it_is_stopped_and_goes_on_in_the_end(worker: subprocess.Popen[bytes]) -> None:
    """Some of the time it is stopped; once released it runs."""
    try:
        throttle = Throttle(worker.pid, 0.5)
        process = psutil.Process(worker.pid)
        seen = set()
        for _ in range(2000):
            seen.add(process.status())
            if psutil.STATUS_STOPPED in seen:
                break
        throttle.stop()
        throttle.stop()
        assert psutil.STATUS_STOPPED in seen
        assert process.status() != psutil.STATUS_STOPPED
    finally:
        worker.kill()
        worker.wait()


def test_a_process_that_is_gone_is_no_error(worker: subprocess.Popen[bytes]) -> None:
    """A server may die while it is throttled."""
    throttle = Throttle(worker.pid, 0.5)
    worker.kill()
    worker.wait()
    throttle.stop()


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 2.0])
def test_share_is_a_fraction(share: float) -> None:
    """Never and always are not throttling."""
    with pytest.raises(ValueError, match="share must be between 0 and 1"):
        Throttle(1, share)
