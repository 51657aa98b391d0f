"""How pytest-xdist shares the tests out: those of one config to one worker.

Loaded on the controller, and only where there is a suite file.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]  # it has no types


def config_of(nodeid: str, names: Collection[str], works: Collection[str] = ()) -> str | None:
    """Return the config that a test is of, by its id; None if it is of none.

    Parameters of the user's own may come before and behind, and be called as a config is: one that
    has a workload or pass behind it comes first, then the first and longest.

    Args:
        nodeid: Such as ``suites/test_speed.py::test_decode[c7-short]``.
        names: Those of all configs.
        works: Those of all workloads and passes; they have no dash.
    """
    # Folders may have brackets in their names, too.
    _, bracket, inside = nodeid.partition("::")[2].removesuffix("]").partition("[")
    if not bracket:
        return None
    parts = inside.split("-")
    found = None
    for first in range(len(parts)):
        for last in range(len(parts), first, -1):
            name = "-".join(parts[first:last])
            if name not in names:
                continue
            if last < len(parts) and parts[last] in works:
                return name
            found = found or name
    return found


class ConfigScheduling(LoadScopeScheduling):  # type: ignore[misc]  # as above
    """Gives all tests of a config to one worker, which starts its servers once; others one by one.

    Args:
        config: Of the running pytest.
        log: pytest-xdist's.
        names: Those of all configs of the suite file.
        works: Those of all its workloads and passes.
    """

    def __init__(
        self,
        config: pytest.Config,
        log: Any,  # noqa: ANN401 - as above
        names: Collection[str],
        works: Collection[str] = (),
    ) -> None:
        super().__init__(config, log)
        self._names, self._works = frozenset(names), frozenset(works)

    def _split_scope(self, nodeid: str) -> str:
        name = config_of(nodeid, self._names, self._works)
        return nodeid if name is None else f"config {name}"

    def remove_node(self, node: Any) -> str | None:  # noqa: ANN401 - as above
        """Share out anew what a worker that died had left, but not the test that it died of.

        Returns:
            That test, None if it had nothing to do.
        """
        # The class that this extends would run that test again, until no worker may be replaced.
        work: dict[str, dict[str, bool]] = self.assigned_work.pop(node)
        left = [(unit, test) for unit in work.values() for test, done in unit.items() if not done]
        if not left:
            return None
        unit, crashed = left[0]
        unit[crashed] = True
        self.workqueue.update(
            {scope: unit for scope, unit in work.items() if not all(unit.values())}
        )
        for other in self.nodes:
            self._reschedule(other)
        return crashed
