"""Reads a llama-server ``.env`` file: ``LLAMA_ARG_…`` variables and plain flags.

The files people keep beside a compose file hold both styles::

    # C7: 24 of 40 expert layers on the CPU
    LLAMA_ARG_CTX_SIZE=65536
    LLAMA_ARG_FLASH_ATTN=on
    EXTRA_ARGS="--n-cpu-moe 24 -ctk q8_0 -ctv q8_0"
    --no-mmap
    -t 20
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from pytest_llmperf.errors import PlanError
from pytest_llmperf.plan.options import OWNED, OptionValue, from_env, from_flag

_ASSIGNMENT = re.compile(r"^(?:export\s+)?([A-Za-z_]\w*)\s*=\s*(.*)$")
_NUMBER = re.compile(r"^-?\d+(\.\d+)?$")
_COMMENT = re.compile(r"(^|\s)#")
# Options that llama-server adds up when they are given again; of the others the last one counts.
_REPEATED = frozenset(
    {
        "override-tensor",
        "spec-draft-override-tensor",
        "override-kv",
        "lora",
        "lora-scaled",
        "control-vector",
        "control-vector-scaled",
        "logit-bias",
        "dry-sequence-breaker",
        "reverse-prompt",
    }
)


def read_env_file(path: Path) -> dict[str, OptionValue]:
    """Return the options an ``.env`` file sets, by long name.

    Lines are ``LLAMA_ARG_NAME=value``, ``ANYTHING_ARGS="flags"`` (or ``…_FLAGS``), plain
    flags, comments or blank. The model, address, port and key are the harness's own and are
    passed over, as are variables that are not llama-server's.

    Raises:
        PlanError: If the file cannot be read, or a line is none of these, or a flag is unknown.
    """
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise PlanError(f"cannot read the env-file: {error.strerror}", path) from error
    except UnicodeDecodeError as error:
        raise PlanError("the env-file is not UTF-8 text", path) from error
    options: dict[str, OptionValue] = {}
    for number, raw in enumerate(text.splitlines(), start=1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        if line.startswith("-"):
            _take_flags(_words(line, path, number), options, path, number)
        elif assignment := _ASSIGNMENT.match(line):
            name, value = assignment.groups()
            if name.startswith("LLAMA_ARG_"):
                _take_variable(name, _plain(value, path, number), options, path, number)
            elif name.endswith(("_ARGS", "_FLAGS")) or name in {"ARGS", "FLAGS"}:
                words = _words(value, path, number)
                if len(words) == 1:
                    # The flags were quoted as one word. A shell that expands them keeps their
                    # backslashes, which the patterns of --override-tensor need.
                    words = _words(words[0], path, number, escape="")
                _take_flags(words, options, path, number)
        else:
            raise PlanError(
                f"`{line}` is neither NAME=value, a flag, nor a comment: write one option a line",
                path,
                number,
            )
    return options


def _words(text: str, path: Path, line: int, *, escape: str = "\\") -> list[str]:
    lexer = shlex.shlex(text, posix=True)
    lexer.whitespace_split = True
    lexer.escape = escape
    # Left alone it would take a `#` inside a word for a comment as well.
    lexer.commenters = "#" if _COMMENT.search(text) else ""
    try:
        return list(lexer)
    except ValueError as error:
        mend = (
            "close the quote"
            if "quotation" in str(error)
            else "a line does not go on in the next, remove the backslash"
        )
        raise PlanError(f"{str(error).lower()}: {mend}", path, line) from error


def _plain(text: str, path: Path, line: int) -> str:
    """Return a variable's value: quotes around it go, those inside (of JSON, say) stay."""
    if text.startswith(('"', "'")):
        return " ".join(_words(text, path, line))
    return _COMMENT.split(text, maxsplit=1)[0].rstrip()


def _typed(value: str) -> OptionValue:
    if not _NUMBER.match(value):
        return value
    return float(value) if "." in value else int(value)


def _put(options: dict[str, OptionValue], name: str, value: OptionValue) -> None:
    if name not in OWNED:
        options[name] = value


def _take_variable(
    name: str, value: str, options: dict[str, OptionValue], path: Path, line: int
) -> None:
    known = from_env(name)
    if known is None:
        # LLAMA_ARG_NO_MMAP and its like: any value, even 0, switches off.
        off = name.removeprefix("LLAMA_ARG_NO_")
        flag = from_flag("--no-" + off.lower().replace("_", "-"))
        positive = from_env("LLAMA_ARG_" + off)
        if off != name and flag is not None and flag[2]:
            _put(options, flag[0], value=False)
        elif off != name and positive is not None and not positive[1]:
            _put(options, positive[0], value=False)
        else:
            raise PlanError(
                f"{name} is no variable of llama-server: check its spelling", path, line
            )
        return
    long, takes_value = known
    if takes_value and not value:
        if long not in OWNED:
            raise PlanError(f"{name} lacks its value: write {name}=VALUE", path, line)
    elif takes_value:
        _put(options, long, _typed(value))
    elif value.lower() in {"1", "on", "true", "enabled", "yes"}:
        _put(options, long, value=True)
    elif value.lower() in {"0", "off", "false", "disabled", "no"}:
        _put(options, long, value=False)
    else:
        raise PlanError(f"{name}={value}: it is on or off, write 1 or 0", path, line)


def _take_flags(
    words: Sequence[str], options: dict[str, OptionValue], path: Path, line: int
) -> None:
    position = 0
    while position < len(words):
        flag, equals, attached = words[position].partition("=")
        position += 1
        known = from_flag(flag)
        if known is None:
            raise PlanError(f"unknown flag {flag}: see llama-server --help", path, line)
        long, takes_value, negative = known
        if not takes_value:
            if equals:
                raise PlanError(f"{flag} takes no value: write `{flag}` alone", path, line)
            _put(options, long, value=not negative)
            continue
        if equals:
            value = attached
        elif position < len(words) and from_flag(words[position]) is None:
            value = words[position]
            position += 1
        else:
            raise PlanError(f"{flag} lacks its value: write `{flag} VALUE`", path, line)
        before = options.get(long)
        if long in _REPEATED and before is not None:
            earlier = before if isinstance(before, tuple) else (str(before),)
            options[long] = (*earlier, value)
        else:
            _put(options, long, _typed(value))
