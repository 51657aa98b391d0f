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
        requests: One a turn and parallel conversation, turns outermost; each prompt begins with
            its whole conversation so far.
        digest: Short hash of all token ids; two results with different ones differ in input.
    """

    workload: Workload
    requests: tuple[Request, ...]
    digest: str

    @property
    def rounds(self) -> tuple[tuple[Request, ...], ...]:
        """The requests that are sent at once, turn by turn."""
        at_once = self.workload.parallel
        return tuple(
            self.requests[begin : begin + at_once]
            for begin in range(0, len(self.requests), at_once)
        )


def write_script(workload: Workload, tokens: Sequence[int]) -> Script:
    """Cut a workload's requests out of a token stream.

    The answers in the history are text from the stream, not what a server generated, since
    greedy text may differ between builds and the requests must not. Parallel conversations begin
    at places spread evenly over the stream, so that no two say the same.

    Args:
        workload: Turns with their lengths.
        tokens: Ids of the shipped text under the model's tokenizer; repeated if too short.

    Raises:
        CheckError: If there are no tokens to cut from, or fewer than parallel conversations.
    """
    if not tokens:
        raise CheckError("the tokenizer made no tokens of the shipped text")
    if workload.parallel > len(tokens):
        raise CheckError(
            f"workload {workload.name} needs {workload.parallel} different prompts, and the "
            f"shipped text has {len(tokens)} tokens: lower `parallel`"
        )
    repeats = -(-workload.tokens // len(tokens)) + 1
    stream = list(tokens) * repeats
    starts = [index * len(tokens) // workload.parallel for index in range(workload.parallel)]
    requests = []
    end = 0
    for turn in workload.turns:
        end += turn.prompt
        requests += [Request(tuple(stream[at : at + end]), turn.generate) for at in starts]
        end += turn.generate
    ids = json.dumps([[list(r.prompt), r.generate] for r in requests])
    return Script(workload, tuple(requests), hashlib.sha256(ids.encode()).hexdigest()[:16])
