"""The names of llama-server's options: long, short, synonyms and environment variables.

A config is written in long names. Short flags and ``LLAMA_ARG_…`` variables occur in
``.env`` files; both are turned into long names here, without a build at hand. Whether a
build knows an option is for its own ``--help`` to say (see ``build/dialect.py``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from importlib import resources
from pathlib import Path

OptionValue = str | int | float | bool | tuple[str, ...]
"""``True`` is the bare flag, ``False`` its ``--no-`` form, a tuple repeats the option."""

TEMPLATE_FILE = "chat-template-file"
"""Option whose value is a file that decides what a chat's prompt is."""

OWNED = {
    "host": "servers listen on 127.0.0.1",
    "port": "every server gets a free port of its own",
    "reuse-port": "every server gets a free port of its own",
    "api-key": "every server gets a random key of its own",
    "api-key-file": "every server gets a random key of its own",
    "model": "name it with the config's key `model`",
    "spec-draft-model": "name it in [models], and in the config's key `draft`",
    "mmproj": "name it in [models], and in the key `projector` of the model it belongs to",
    **dict.fromkeys(
        ("hf-repo", "hf-file", "hf-token", "model-url", "docker-repo"),
        "nothing is downloaded; name a file in [models]",
    ),
    **dict.fromkeys(
        ("models-dir", "models-preset", "models-max"), "a server of this suite serves one model"
    ),
    "log-file": "every server's log is kept in the run folder",
    "log-disable": "buffer sizes and errors are read from the log",
    "log-jsonl": "buffer sizes and errors are read from the log",
}
"""Options the harness sets itself, each with what to do instead."""


@dataclass(frozen=True, slots=True)
class OptionNames:
    """One option with all its names.

    Attributes:
        names: Every flag as typed, dashes included.
        takes_value: Whether a value follows.
        env: Environment variable, or ``""``.
        removed: Whether the build lists it only to say that it is gone.
        about: Its lines in the help text, joined.
    """

    names: tuple[str, ...]
    takes_value: bool
    env: str = ""
    removed: bool = False
    about: str = ""

    @property
    def negatives(self) -> tuple[str, ...]:
        """The flags that switch a boolean off: every name from the first ``--no-`` pair on."""
        if self.takes_value:
            return ()
        long = [n for n in self.names if n.startswith("--")]
        off = tuple(n for n in long if n.startswith("--no-"))
        if not off or len(off) == len(long):
            return ()
        short = tuple(n for n in self.names if re.match(r"^-n(o-)?\w", n))
        return off + short

    @property
    def long(self) -> str:
        """The name a config uses: the first long one that switches nothing off."""
        longs = [n for n in self.names if n.startswith("--") and n not in self.negatives]
        return (longs or list(self.names))[0].lstrip("-")


_ENTRY = re.compile(r"^(-{1,2}[A-Za-z][\w.-]*(?:,\s+-{1,2}[A-Za-z][\w.-]*)*)(.*)$")


def parse_help(text: str) -> tuple[OptionNames, ...]:
    """Read the options out of what ``llama-server --help`` prints.

    Args:
        text: The whole help text, of any build from early 2025 on.

    Returns:
        One entry an option, in the order of the text.
    """
    blocks: list[list[str]] = []
    for line in text.splitlines():
        if _ENTRY.match(line):
            blocks.append([line])
        elif blocks and line.startswith(" "):
            blocks[-1].append(line)
    found = []
    for block in blocks:
        match = _ENTRY.match(block[0])
        if match is None:  # pragma: no cover - blocks start with an entry by construction
            continue
        flags, rest = match.groups()
        # A metavar stands one space after the names; the description starts in its own column,
        # three spaces away at least, or on the next line.
        takes_value = bool(re.match(r" \S", rest))
        about = " ".join(block)
        env = re.search(r"\(env: (\w+)\)", about)
        found.append(
            OptionNames(
                names=tuple(re.split(r",\s+", flags)),
                takes_value=takes_value,
                env=env.group(1) if env else "",
                removed="argument has been removed" in about,
                about=" ".join(about.split()),
            )
        )
    return tuple(found)


@cache
def known_options() -> tuple[OptionNames, ...]:
    """Return the options of the builds this package was written against (b11434, 49bfdde)."""
    raw = resources.files("pytest_llmperf").joinpath("data/options.json").read_text("utf-8")
    return tuple(
        OptionNames(tuple(entry["names"]), entry["value"], entry["env"])
        for entry in json.loads(raw)
    )


@cache
def _by_flag() -> Mapping[str, OptionNames]:
    return {name: option for option in reversed(known_options()) for name in option.names}


@cache
def _by_env() -> Mapping[str, OptionNames]:
    return {option.env: option for option in reversed(known_options()) if option.env}


def from_flag(flag: str) -> tuple[str, bool, bool] | None:
    """Return (long name, takes a value, is the ``--no-`` form) of a flag, or None if unknown."""
    option = _by_flag().get(flag)
    if option is None:
        return None
    return option.long, option.takes_value, flag in option.negatives


def from_env(variable: str) -> tuple[str, bool] | None:
    """Return (long name, takes a value) of a ``LLAMA_ARG_…`` variable, or None if unknown.

    ``LLAMA_ARG_NO_…`` is unknown here where it stands for a ``--no-`` form.
    """
    option = _by_env().get(variable)
    if option is None and variable.startswith("LLAMA_ARG_"):
        guess = from_flag("--" + variable.removeprefix("LLAMA_ARG_").lower().replace("_", "-"))
        return None if guess is None or guess[2] else guess[:2]
    return None if option is None else (option.long, option.takes_value)


def told(options: Mapping[str, OptionValue]) -> str:
    """Return options for the fingerprint; a template file by its content, wherever it lies."""
    shown = dict(options)
    template = Path(str(options.get(TEMPLATE_FILE, "")))
    if template.is_file():
        shown[TEMPLATE_FILE] = "sha256:" + sha256(template.read_bytes()).hexdigest()[:16]
    return " ".join(f"{name}={value}" for name, value in sorted(shown.items()))
