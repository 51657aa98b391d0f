"""The token ids that a workload's requests are made of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from pytest_llmperf.errors import CheckError
from pytest_llmperf.plan.config import Workload


@dataclass(frozen=True, slots=True)
class Request:
    """One request: ``prompt`` token ids, and the tokens to ``generate``."""

    prompt: tuple[int, ...]
    generate: int


@dataclass(frozen=True, slots=True)
class Script:
    """A workload as requests of fixed token ids.

    Attributes:
        workload: What it was made from.
        requests: One a turn; each prompt begins with the whole conversation so far.
        digest: Short hash of all token ids; two results with different ones differ in input.
    """

    workload: Workload
    requests: tuple[Request, ...]
    digest: str


def write_script(workload: Workload, tokens: Sequence[int]) -> Script:
    """Cut a workload's requests out of a token stream.

    The answers in the history are text from the stream, not what a server generated, since
    greedy text may differ between builds and the requests must not.

    Args:
        workload: Turns with their lengths.
        tokens: Ids of the shipped text under the model's tokenizer; repeated if too short.

    Raises:
        CheckError: If there are no tokens to cut from.
    """
    if not tokens:
        raise CheckError("the tokenizer made no tokens of the shipped text")
    repeats = -(-workload.tokens // len(tokens))
    stream = list(tokens) * repeats
    requests = []
    end = 0
    for turn in workload.turns:
        end += turn.prompt
        requests.append(Request(tuple(stream[:end]), turn.generate))
        end += turn.generate
    ids = json.dumps([[list(r.prompt), r.generate] for r in requests])
    return Script(workload, tuple(requests), hashlib.sha256(ids.encode()).hexdigest()[:16])
