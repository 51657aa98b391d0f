"""Reads ``[workloads]`` and ``[passes]`` of a suite file."""

from __future__ import annotations

import math
from typing import cast, get_args

from pytest_llmperf.metrics import FEWEST_CHUNKS
from pytest_llmperf.plan.config import (
    LAUNCH,
    Api,
    CorpusPass,
    PassPath,
    Tool,
    Turn,
    Workload,
)
from pytest_llmperf.plan.reader import Reader

_LEAST_CONTEXT = 32
_SIZES = ("context", "batch", "ubatch", "chunks")


def read_workload(reader: Reader, name: str, table: dict[str, object]) -> Workload:
    """Return an entry of ``[workloads]``.

    Raises:
        PlanError: With file and line.
    """
    where = ("workloads", name)
    keys = ("turns", "parallel", "api", "thinking", "image", "tool", "limit", "help")
    reader.keys(table, keys, *where)
    if name == LAUNCH:
        raise reader.fail(f"`{LAUNCH}` is taken: it stands for what a start alone shows", *where)
    turns = tuple(
        _turn(reader, reader.table(entry, *where, "turns"), *where, "turns")
        for entry in reader.take(table, "turns", list, [], *where)
    )
    if not turns:
        raise reader.fail("lacks `turns`, such as [{ prompt = 64, generate = 64 }]", *where)
    if len(turns) > 1 and any(turn.depth for turn in turns):
        raise reader.fail("has `depth` among several turns: it goes with a single one", *where)
    limit = table.get("limit")
    seconds = limit if isinstance(limit, int | float) else 0
    if limit is not None and (isinstance(limit, bool) or not 0 < seconds < math.inf):
        raise reader.fail(
            f"`limit` must be a number of seconds above 0, not {limit!r}", *where, "limit"
        )
    found = Workload(
        name=name,
        turns=turns,
        help=reader.take(table, "help", str, "", *where),
        parallel=reader.count(table, "parallel", "requests", 1, 1, *where),
        api=cast("Api", reader.choice(table, "api", get_args(Api), *where)),
        thinking=reader.take(table, "thinking", bool, False, *where)  # noqa: FBT003 - unused
        if "thinking" in table
        else None,
        image=reader.count(table, "image", "pixels", 1, 0, *where) if "image" in table else 0,
        tool=cast("Tool", reader.choice(table, "tool", get_args(Tool), *where)),
        limit=float(seconds),
    )
    if wrong := _contradiction(found):
        raise reader.fail(wrong, *where)
    return found


def _turn(reader: Reader, turn: dict[str, object], *where: str) -> Turn:
    reader.keys(turn, ("depth", "prompt", "generate"), *where)
    # One generated token has no time between tokens, so no decode speed.
    for key, least in (("prompt", 1), ("generate", 2)):
        value = turn.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise reader.fail(
                f"`{key}` of a turn must be a whole number of tokens, at least {least}", *where
            )
    return Turn(
        prompt=int(str(turn["prompt"])),
        generate=int(str(turn["generate"])),
        depth=reader.count(turn, "depth", "tokens", 0, 0, *where),
    )


def _contradiction(workload: Workload) -> str:
    """Return which keys of a workload do not go together, ``""`` if all do."""
    chat = workload.api == "chat"
    if workload.tool == "llama-bench":
        other = chat or workload.image or workload.thinking is not None
        if other or workload.parallel > 1 or len(workload.turns) > 1:
            return (
                "llama-bench takes one turn of `depth`, `prompt` and `generate`, and nothing else"
            )
        return ""
    if workload.thinking is not None and not chat:
        return '`thinking` is for the chat template: set api = "chat"'
    if workload.image and not chat:
        return '`image` goes with a message: set api = "chat"'
    if chat and any(turn.depth for turn in workload.turns):
        return "`depth` is counted in tokens before a prompt of tokens: leave `api` out"
    return ""


def read_pass(reader: Reader, name: str, table: dict[str, object]) -> CorpusPass:
    """Return an entry of ``[passes]``.

    Raises:
        PlanError: With file and line.
    """
    where = ("passes", name)
    reader.keys(table, ("corpus", *_SIZES, "path", "marks", "help"), *where)
    if name == LAUNCH:
        raise reader.fail(f"`{LAUNCH}` is taken: it stands for what a start alone shows", *where)
    corpus = reader.take(table, "corpus", str, "", *where)
    if not corpus:
        raise reader.fail('lacks `corpus`, a text file such as "wiki.test.raw"', *where)
    given: dict[str, int] = {}
    for key in _SIZES:
        value = table.get(key)
        if value is None:
            continue
        # Fewer chunks tell nothing of how chunks differ.
        least = FEWEST_CHUNKS if key == "chunks" else 1
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise reader.fail(
                f"`{key}` must be a whole number, at least {least}, not {value!r}", *where, key
            )
        given[key] = value
    context = given.get("context", 512)
    if context < _LEAST_CONTEXT:
        raise reader.fail(
            f"`context` must be {_LEAST_CONTEXT} tokens at least, not {context}",
            *where,
            "context",
        )
    # A larger batch takes several chunks at once, which nobody serves.
    batch = given.get("batch", context)
    ubatch = given.get("ubatch", min(batch, 512))
    if not ubatch <= batch <= context:
        raise reader.fail(
            f"needs ubatch <= batch <= context, not {ubatch}, {batch}, {context}", *where
        )
    return CorpusPass(
        name=name,
        corpus=corpus,
        context=context,
        batch=batch,
        ubatch=ubatch,
        chunks=given.get("chunks"),
        path=cast("PassPath", reader.choice(table, "path", get_args(PassPath), *where)),
        marks=reader.strings(table, "marks", *where),
        help=reader.take(table, "help", str, "", *where),
    )
