"""The option names that one build understands, read from its own ``--help``.

A config is written once, in the newest names. Here they become the arguments of the build at
hand, or an error that names the option and the build.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from pytest_llmperf.build.ask import ask_program
from pytest_llmperf.build.build import Build
from pytest_llmperf.errors import BuildError, nearest
from pytest_llmperf.plan.options import (
    OptionNames,
    OptionValue,
    known_options,
    parse_help,
)

# Options that changed their name, newest first. The same meaning, so either stands for the other.
_RENAMED: tuple[tuple[str, ...], ...] = (
    ("spec-draft-n-max", "draft-max", "draft"),
    ("spec-draft-n-min", "draft-min"),
    ("spec-draft-model", "model-draft"),
    ("spec-draft-ngl", "gpu-layers-draft"),
    ("spec-draft-p-min", "draft-p-min"),
    ("spec-ngram-simple-size-n", "spec-ngram-size-n"),
    ("spec-ngram-simple-size-m", "spec-ngram-size-m"),
    ("spec-ngram-simple-min-hits", "spec-ngram-min-hits"),
)
# One option that became several, or several that became one: (option, value) on each side.
_REPLACED: tuple[tuple[tuple[str, OptionValue], tuple[str, OptionValue]], ...] = (
    (("load-mode", "none"), ("mmap", False)),
    (("load-mode", "mmap"), ("mmap", True)),
    (("load-mode", "mlock"), ("mlock", True)),
    (("load-mode", "dio"), ("direct-io", True)),
    (("spec-type", "draft-simple"), ("spec-type", "draft")),
)
# Options that took over a part of what another one meant: only the new name stands for the old one.
# Up to April 2026 all kinds of drafting shared these (docs/speculative.md of those builds).
_SPLIT: Mapping[str, str] = {
    "spec-ngram-mod-n-max": "spec-draft-n-max",
    "spec-ngram-mod-n-min": "spec-draft-n-min",
    "spec-ngram-mod-n-match": "spec-ngram-simple-size-n",
}
# Options without another name in older builds: the last build seen without, the first seen with it.
_CAME: Mapping[str, tuple[int, int]] = {
    "spec-type": (7827, 7964),
    "spec-ngram-simple-size-n": (7827, 7964),
    "spec-ngram-simple-size-m": (7827, 7964),
    "spec-ngram-simple-min-hits": (7827, 7964),
    "load-mode": (10068, 10229),
}


@dataclass(frozen=True, slots=True)
class Dialect:
    """The options of one build.

    Attributes:
        build: Label of the build, for error texts.
        options: As its help lists them; those listed as removed are left out.
    """

    build: str
    options: tuple[OptionNames, ...]

    def _find(self, name: str) -> OptionNames | None:
        flags = {f"--{name}"}
        # A build may know the option by a synonym only that another build has for it.
        flags.update(
            n for known in known_options() if f"--{name}" in known.names for n in known.names
        )
        for group in _RENAMED:
            if name in group:
                flags.update(f"--{other}" for other in group)
        found = next((o for o in self.options if flags & set(o.names)), None)
        return self._find(_SPLIT[name]) if found is None and name in _SPLIT else found

    def arguments(self, options: Mapping[str, OptionValue]) -> list[str]:
        """Return command-line arguments for ``options``.

        Args:
            options: Long names without dashes, in the newest dialect or any older one.

        Raises:
            BuildError: If the build has no such option; the text names both.
        """
        found: list[str] = []
        for name, value in options.items():
            found += self._argument(name, value)
        return found

    def _argument(self, name: str, value: OptionValue) -> list[str]:
        option = self._find(name)
        if option is None or (name == "spec-type" and value not in _offered(option)):
            for new, old in _REPLACED:
                for have, want in ((new, old), (old, new)):
                    other = self._find(want[0]) if (name, value) == have else None
                    if other is not None and (other != option or want[1] in _offered(other)):
                        return self._spell(other, want[0], want[1])
        if option is None:
            hint = _since(name) or nearest(name, [o.long for o in self.options])
            raise BuildError(f"build {self.build} has no option --{name}{hint}")
        return self._spell(option, name, value)

    def _spell(self, option: OptionNames, name: str, value: OptionValue) -> list[str]:
        flag = f"--{name}" if f"--{name}" in option.names else f"--{option.long}"
        if isinstance(value, bool):
            return self._spell_switch(option, flag, on=value)
        if not option.takes_value:
            if value in {"on", "off"}:
                return self._spell_switch(option, flag, on=value == "on")
            raise BuildError(
                f"build {self.build}: --{name} takes no value, the config gives {value!r}"
            )
        values = value if isinstance(value, tuple) else (value,)
        return [part for item in values for part in (flag, _text(item))]

    def _spell_switch(self, option: OptionNames, flag: str, *, on: bool) -> list[str]:
        if option.takes_value:
            # A flag in one generation, on/off in another (--flash-attn).
            return [flag, "on" if on else "off"]
        if flag in option.negatives:
            return [flag] if on else [f"--{option.long}"]
        if on:
            return [flag]
        # A flag without a --no- form is off when left out.
        return list(option.negatives[:1])

    @property
    def log_verbosity(self) -> int | None:
        """The verbosity at which the log tells buffer sizes, or None where it does anyway.

        Up to b9093 level 3 told them and 4 was debugging, which writes a line a token;
        from b9294 on 4 is ``trace`` and tells them.
        """
        option = self._find("verbosity")
        return 4 if option is not None and "4: trace" in option.about else None

    def offers(self, name: str, value: str) -> bool:
        """Return whether the build lists this value of an option, under a name of its time."""
        option = self._find(name)
        older = {old[1] for new, old in _REPLACED if new == (name, value)}
        return option is not None and bool({value, *older} & _offered(option))

    def supports(self, name: str) -> bool:
        """Return whether the build has the option under any of its names."""
        return self._find(name) is not None


def _since(name: str) -> str:
    """Return when an option came, for an error text; ``""`` where that is not known."""
    group = next((names for names in _RENAMED if name in names), (name,))
    seen = next((_CAME[one] for one in group if one in _CAME), None)
    return f": it came after b{seen[0]}, with b{seen[1]} at the latest" if seen else ""


def _offered(option: OptionNames) -> set[OptionValue]:
    """Return the values that an option lists: ``[on|off|auto]``, or ``NAME`` and ``(on, off)``."""
    text = option.about.removeprefix(", ".join(option.names)).lstrip()
    if not text or not option.takes_value:
        return set()
    # A wheel's help has a placeholder such as NAME, and what it stands for in parentheses.
    apart = re.match(r"[A-Z]+(?:,\.\.\.)? [^(]*\((.*?)\)", text)
    return set(re.findall(r"[\w.+-]+", apart[1] if apart else text.split(maxsplit=1)[0]))


def _text(value: str | float) -> str:
    return repr(value) if isinstance(value, float) else str(value)


def dialect_of(build: Build) -> Dialect:
    """Return the dialect of a build, by asking its program for help.

    Raises:
        BuildError: If the help cannot be read.
    """
    env = tuple(sorted(build.host_env.items()))
    return Dialect(build.label, _ask_help(build.command, env, build.label, build.forget))


@lru_cache(maxsize=32)
def _ask_help(
    command: Sequence[str],
    env: Sequence[tuple[str, str]],
    label: str,
    forget: Callable[[], object] | None,
) -> tuple[OptionNames, ...]:
    text, more, _ = ask_program(command, "--help", dict(env), f"build {label}", forget)
    options = tuple(o for o in parse_help(text + more) if not o.removed)
    if not any("--ctx-size" in option.names for option in options):
        raise BuildError(f"build {label}: `--help` lists no options of llama-server")
    return options
