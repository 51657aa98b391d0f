"""What a mark of a test says of its case."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pytest_llmperf.plan.config import Case, Config
from pytest_llmperf.plugin import _marked


@pytest.mark.parametrize(
    ("own", "mark", "gpu"),
    [
        (False, None, False),
        (False, pytest.mark.gpu, True),
        (True, None, True),
        (True, pytest.mark.gpu, True),
    ],
)
def test_the_mark_gpu_makes_a_gpu_case(*, own: bool, mark: object, gpu: bool) -> None:
    """Of whatever config; the case is the same otherwise."""
    item: Any = SimpleNamespace(get_closest_marker=lambda name: mark if name == "gpu" else None)
    found = _marked(Case(Config("c", "m", gpu=own)), item)
    assert found == Case(Config("c", "m", gpu=gpu))
