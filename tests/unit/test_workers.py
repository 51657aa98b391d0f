"""How tests are shared out among the workers of pytest-xdist."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pytest_llmperf import plugin
from pytest_llmperf.gpu import cards
from pytest_llmperf.workers import ConfigScheduling, config_of

NAMES = ("c7", "c7-q8", "fit", "q8", "a.b")
FILE = "suites/test_speed.py::test_decode"


@pytest.mark.parametrize(
    ("nodeid", "name"),
    [
        (FILE, None),
        (f"{FILE}[c7]", "c7"),
        (f"{FILE}[c7-short]", "c7"),
        (f"{FILE}[c7-q8]", "c7-q8"),
        (f"{FILE}[c7-q8-short]", "c7-q8"),
        (f"{FILE}[a.b-short]", "a.b"),
        (f"{FILE}[c77-short]", None),
        (f"{FILE}[short]", None),
        (f"{FILE}[0-fit-short]", "fit"),
        (f"{FILE}[fit-short-c7]", "fit"),
        (f"{FILE}[]", None),
        (f"{FILE}[a[b]-c7-short]", "c7"),
        (f"{FILE}[x::y-c7-short]", "c7"),
        (f"suites/[old]/{FILE}[c7]", "c7"),
        (f"suites/[c7]/{FILE}", None),
        ("suites/[c7]", None),
    ],
)
def test_a_test_tells_its_config(nodeid: str, name: str | None) -> None:
    """By the longest name that its id begins with, behind parameters of the user's own."""
    assert config_of(nodeid, NAMES) == name


@pytest.mark.parametrize(
    ("inside", "name"),
    [
        ("fit-c7-short-q8", "c7"),
        ("fit-c7-q8-long-q8", "c7-q8"),
        ("fit-c7", "fit"),
        ("c7-short", "c7"),
    ],
)
def test_a_parameter_that_is_called_as_a_config_is_none(inside: str, name: str) -> None:
    """Where a workload or pass tells which of them is the config."""
    assert config_of(f"{FILE}[{inside}]", NAMES, {"short", "long"}) == name


class Node:
    """A worker of pytest-xdist, as far as its scheduler sees it."""

    def __init__(self, name: str) -> None:
        self.gateway = SimpleNamespace(id=name)
        self.shutting_down = False
        self.sent: list[int] = []

    def send_runtest_some(self, indices: list[int]) -> None:
        """Note the tests that it is to run."""
        self.sent += indices

    def shutdown(self) -> None:
        """Note that no more will come."""
        self.shutting_down = True


TESTS = [
    *(f"t.py::test_a[{config}-{workload}]" for config in ("c7", "fit") for workload in "wxyz"),
    "t.py::test_plain",
]


def schedule(*nodes: Node) -> ConfigScheduling:
    """Return a scheduler that has shared :data:`TESTS` out among these workers."""
    options = SimpleNamespace(loadscopereorder=True)
    config: Any = SimpleNamespace(getvalue=lambda _name: ["popen"] * len(nodes), option=options)
    made = ConfigScheduling(config, None, NAMES)
    for node in nodes:
        made.add_node(node)
        made.add_node_collection(node, TESTS)
    made.schedule()
    return made


def test_tests_of_a_config_go_to_one_worker() -> None:
    """Each config to another, and the rest to whoever is done first."""
    one, two = nodes = Node("gw0"), Node("gw1")
    made = schedule(*nodes)
    assert (one.sent, two.sent) == ([0, 1, 2, 3], [4, 5, 6, 7])
    for index in (4, 5):
        made.mark_test_complete(two, index)
    assert two.sent[-1] == 8


def test_the_test_that_a_worker_died_of_is_not_run_again() -> None:
    """The others that it had left are."""
    one, two = nodes = Node("gw0"), Node("gw1")
    made = schedule(*nodes)
    made.mark_test_complete(one, 0)
    assert made.remove_node(one) == TESTS[1]
    for index in (4, 5, 6, 7, 8):
        made.mark_test_complete(two, index)
    assert sorted(two.sent) == [2, 3, 4, 5, 6, 7, 8]
    assert made.remove_node(two) == TESTS[2]
    assert made.has_pending


def test_a_worker_that_was_done_leaves_nothing() -> None:
    """Neither a test that it died of."""
    one = Node("gw0")
    made = schedule(one)
    for index in range(len(TESTS)):
        made.mark_test_complete(one, index)
    assert made.remove_node(one) is None


@pytest.mark.parametrize(
    ("asked", "suite", "there", "told", "workers"),
    [
        ("auto", True, 3, None, 3),
        ("auto", True, 0, None, None),
        ("auto", False, 3, None, None),
        ("logical", True, 3, None, None),
        ("auto", True, 3, "7", None),
    ],
)
def test_auto_is_one_worker_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
    *,
    asked: str,
    suite: bool,
    there: int,
    told: str | None,
    workers: int | None,
) -> None:
    """Where there is a suite file and a GPU, and nobody has said otherwise."""
    monkeypatch.delenv("PYTEST_XDIST_AUTO_NUM_WORKERS", raising=False)
    if told is not None:
        monkeypatch.setenv("PYTEST_XDIST_AUTO_NUM_WORKERS", told)
    monkeypatch.setattr(plugin, "_suite_if_any", lambda _config: object() if suite else None)
    monkeypatch.setattr(cards, "gpus", lambda: (object(),) * there)
    config: Any = SimpleNamespace(getoption=lambda _name: asked)
    assert plugin.pytest_xdist_auto_num_workers(config) == workers
