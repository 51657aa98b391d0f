"""What a workload's requests are made of: token ids, or messages."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pytest_llmperf.errors import CheckError
from pytest_llmperf.plan.config import Workload
from pytest_llmperf.serve.ask import Message


@dataclass(frozen=True, slots=True)
class Request:
    """One request.

    Attributes:
        prompt: Token ids, with those that lie in the cache already; of a chat those that the
            server's template makes of it, without those of a picture. Empty where nobody tells.
        generate: Tokens to generate.
        depth: How many of the prompt's tokens lie in the cache when the clock starts.
        messages: The chat, empty for a plain prompt.
        text: The prompt as text, for a server that takes no token ids.
        pictured: Whether a picture makes prompt tokens of its own.
    """

    prompt: tuple[int, ...]
    generate: int
    depth: int = 0
    messages: tuple[Message, ...] = ()
    text: str = ""
    pictured: bool = False

    @property
    def counted(self) -> bool:
        """Whether all prompt tokens are known before it is sent."""
        return bool(self.prompt) and not self.pictured


@dataclass(frozen=True, slots=True)
class Script:
    """A workload as fixed requests.

    Attributes:
        workload: What it was made from.
        requests: One a turn and parallel conversation, turns outermost; each prompt begins with
            its whole conversation so far.
        digest: Short hash of all that is sent; two results with different ones differ in input.
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

    @property
    def tokens(self) -> int:
        """Context that one conversation needs at least, in tokens."""
        return max(len(request.prompt) + request.generate for request in self.requests)


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
        end += turn.depth + turn.prompt
        requests += [
            Request(tuple(stream[at : at + end]), turn.generate, turn.depth) for at in starts
        ]
        end += turn.generate
    return Script(
        workload, tuple(requests), digest_of([[list(r.prompt), r.generate] for r in requests])
    )


Cut = Callable[[int, int, int], str]
"""Returns text: of the conversation of this number, from this token on, so many tokens."""


def write_chats(workload: Workload, cut: Cut) -> list[tuple[list[Message], int]]:
    """Return the messages of a workload's requests, each with the tokens to generate.

    The order is that of :class:`Script`, and so is where the answers in the history come from.

    Args:
        workload: Turns with their lengths.
        cut: Gives the text of messages.
    """
    talks: list[list[Message]] = [[] for _ in range(workload.parallel)]
    found: list[tuple[list[Message], int]] = []
    at = answered = 0
    for turn in workload.turns:
        for number, talk in enumerate(talks):
            if answered:
                answer = cut(number, at - answered, answered)
                talk.append({"role": "assistant", "content": answer})
            talk.append({"role": "user", "content": cut(number, at, turn.prompt)})
            found.append(([*talk], turn.generate))
        answered = turn.generate
        at += turn.prompt + answered
    return found


def digest_of(sent: object) -> str:
    """Return a short hash of what is sent, given as JSON takes it."""
    return hashlib.sha256(json.dumps(sent, sort_keys=True).encode()).hexdigest()[:16]
