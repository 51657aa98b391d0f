"""Walks a parsed suite file, and knows where each key stands."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TypeVar

from pytest_llmperf.errors import PlanError, nearest
from pytest_llmperf.metrics import check_tolerance
from pytest_llmperf.plan.lines import line_of
from pytest_llmperf.plan.options import OWNED, TEMPLATE_FILE, OptionValue, from_flag

_T = TypeVar("_T")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_ENDING_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._]*")


class Reader:
    """Walks a parsed TOML document and knows where each key stands.

    Args:
        path: The suite file.
        text: What stands in it.
    """

    def __init__(self, path: Path, text: str) -> None:
        self.path = path
        self.text = text

    def fail(self, message: str, *where: str) -> PlanError:
        """Return the error of what stands at a place, by its file and line."""
        # A quoted key may hold a line break; the error is one line all the same.
        return PlanError(message.replace("\n", "\\n"), self.path, line_of(self.text, where))

    def table(self, value: object, *where: str) -> dict[str, object]:
        """Return a value that must be a table."""
        if not isinstance(value, dict):
            raise self.fail(f"`{'.'.join(where)}` must be a table", *where)
        return value

    def keys(self, table: Mapping[str, object], allowed: Collection[str], *where: str) -> None:
        """Refuse keys that a table does not take."""
        for key in table:
            if key not in allowed:
                place = f"[{'.'.join(where)}]" if where else "the suite file"
                raise self.fail(
                    f"unknown key `{key}` in {place}{nearest(key, allowed)}: "
                    f"it takes {', '.join(allowed)}",
                    *where,
                    key,
                )

    def take(
        self, table: Mapping[str, object], key: str, kind: type[_T], default: _T, *where: str
    ) -> _T:
        """Return a value that must be of a kind, the default where the key is left out."""
        value = table.get(key, default)
        # bool is an int to Python, but `seed = true` is a slip of the pen.
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            names = {str: "a string", bool: "true or false", list: "a list", dict: "a table"}
            raise self.fail(
                f"`{key}` must be {names.get(kind, kind.__name__)}, not {value!r}", *where, key
            )
        return value

    def strings(self, table: Mapping[str, object], key: str, *where: str) -> tuple[str, ...]:
        """Return a list of strings, an empty one where the key is left out."""
        values = self.take(table, key, list, [], *where)
        for value in values:
            if not isinstance(value, str):
                raise self.fail(f"`{key}` must hold strings, not {value!r}", *where, key)
        return tuple(values)

    def each(
        self,
        document: Mapping[str, object],
        section: str,
        read: Callable[[str, dict[str, object]], _T],
    ) -> dict[str, _T]:
        """Read each table of a section, by its name."""
        entries = self.table(document.get(section, {}), section)
        # Such a name ends the node id `config-workload`: no dash, or ids collide.
        ends = section in {"workloads", "passes"}
        pattern = _ENDING_NAME if ends else _NAME
        for name in entries:
            if not pattern.fullmatch(name):
                allowed = "letters, digits, `.` and `_`" + ("" if ends else ", `-`")
                raise self.fail(
                    f"`{name}` is no name for [{section}]: use {allowed}", section, name
                )
        return {
            name: read(name, self.table(entry, section, name)) for name, entry in entries.items()
        }

    def options(self, table: Mapping[str, object], *where: str) -> dict[str, OptionValue]:
        """Return the table ``options``: llama-server's options by their long names."""
        found: dict[str, OptionValue] = {}
        place = (*where, "options")
        for key, value in self.take(table, "options", dict, {}, *where).items():
            if key.startswith("-"):
                raise self.fail(f"`{key}`: write option names without dashes", *place, key)
            known = from_flag("--" + key)
            long = known[0] if known else key
            if long in OWNED:
                raise self.fail(f"`{key}` is not for a config: {OWNED[long]}", *place, key)
            typed = self.option(value, *place, key)
            if known and not known[1]:
                if not isinstance(typed, bool):
                    raise self.fail(f"`{key}` is a flag: write true or false", *place, key)
                typed = typed is not known[2]  # `no-mmap = true` is `mmap = false`
            elif known and isinstance(typed, bool):
                raise self.fail(f"`{key}` takes a value, not {str(typed).lower()}", *place, key)
            if long == TEMPLATE_FILE:
                typed = self.file(str(typed), *place, key)
            if long in found:
                raise self.fail(f"`{key}` is set twice, under two names: keep one", *place, key)
            found[long] = typed
        return found

    def option(self, value: object, *where: str) -> OptionValue:
        """Return a value that an option may have."""
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
        if isinstance(value, str | int | float | bool):
            return value
        raise self.fail(
            f"`{where[-1]}` must be a string, a number, true, false or a list of strings, "
            f"not {value!r}",
            *where,
        )

    def file(self, value: str, *where: str) -> str:
        """Return the full path of a file, which is relative to the suite file."""
        path = (self.path.parent / value).absolute()
        if not path.is_file():
            raise self.fail(f"no such file {path}", *where)
        return str(path)

    def tolerances(self, table: object, *where: str) -> dict[str, float]:
        """Return a table of metrics to relative tolerances."""
        found: dict[str, float] = {}
        for key, value in self.table(table, *where).items():
            try:
                found[key] = check_tolerance(key, value)
            except PlanError as error:
                raise self.fail(str(error), *where, key) from error
        return found

    def count(
        self,
        table: Mapping[str, object],
        key: str,
        what: str,
        least: int,
        default: int,
        *where: str,
    ) -> int:
        """Return a whole number of something, at least so many."""
        value = table.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.fail(
                f"`{key}` must be a whole number of {what}, at least {least}, not {value!r}",
                *where,
                key,
            )
        return value

    def choice(
        self, table: Mapping[str, object], key: str, allowed: tuple[str, ...], *where: str
    ) -> str:
        """Return one of the allowed strings; the first where the key is left out."""
        value = self.take(table, key, str, allowed[0], *where)
        if value not in allowed:
            raise self.fail(
                f"`{key}` must be one of {', '.join(allowed)}, not {value!r}", *where, key
            )
        return value
