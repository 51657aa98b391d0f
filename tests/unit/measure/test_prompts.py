"""Token ids of requests: exact lengths, growing history, and a digest that tells them apart."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_llmperf.errors import CheckError
from pytest_llmperf.measure.prompts import Request, write_chats, write_script
from pytest_llmperf.plan.config import Turn, Workload

TURNS = st.lists(st.builds(Turn, st.integers(1, 60), st.integers(2, 60)), min_size=1, max_size=4)
TOKENS = st.lists(st.integers(0, 50_000), min_size=1, max_size=80)


def talk(*turns: tuple[int, int], name: str = "talk") -> Workload:
    """A workload of turns (prompt, generate)."""
    return Workload(name, tuple(Turn(prompt, generate) for prompt, generate in turns))


@given(TURNS, TOKENS)
def test_lengths_are_exact(turns: list[Turn], tokens: list[int]) -> None:
    """A turn's prompt is the whole conversation before it and its own new tokens."""
    script = write_script(Workload("w", tuple(turns)), tokens)
    assert len(script.requests) == len(turns)
    before = 0
    for turn, request in zip(turns, script.requests, strict=True):
        assert len(request.prompt) == before + turn.prompt
        assert request.generate == turn.generate
        before += turn.prompt + turn.generate


@given(TURNS, TOKENS)
def test_the_history_grows(turns: list[Turn], tokens: list[int]) -> None:
    """Each prompt begins with the one before; all are cut from the stream, repeated if short."""
    script = write_script(Workload("w", tuple(turns)), tokens)
    for earlier, later in zip(script.requests, script.requests[1:], strict=False):
        assert later.prompt[: len(earlier.prompt)] == earlier.prompt
    for request in script.requests:
        assert request.prompt == tuple(tokens[i % len(tokens)] for i in range(len(request.prompt)))


def test_answers_in_the_history_come_from_the_text() -> None:
    """Between two turns lie as many tokens of the text as the answer has."""
    script = write_script(talk((2, 3), (2, 2)), list(range(100)))
    assert [request.prompt for request in script.requests] == [(0, 1), (0, 1, 2, 3, 4, 5, 6)]


@given(TURNS, TOKENS)
def test_the_same_input_has_the_same_digest(turns: list[Turn], tokens: list[int]) -> None:
    """The name of the workload is no input, and what lies behind the last prompt is none."""
    workload = Workload("w", tuple(turns))
    digest = write_script(workload, tokens).digest
    assert write_script(replace(workload, name="other", help="text"), tokens).digest == digest
    needed = list(tokens) * (workload.tokens // len(tokens) + 2)
    assert write_script(workload, needed).digest == digest


@given(TURNS, TOKENS, st.data())
def test_another_token_has_another_digest(
    turns: list[Turn], tokens: list[int], data: st.DataObject
) -> None:
    """One token that is sent and differs is seen."""
    workload = Workload("w", tuple(turns))
    sent = len(write_script(workload, tokens).requests[-1].prompt)
    index = data.draw(st.integers(0, min(sent, len(tokens)) - 1))
    other = [*tokens]
    other[index] += 1
    assert write_script(workload, other).digest != write_script(workload, tokens).digest


@pytest.mark.parametrize(
    "other", [talk((4, 4)), talk((3, 5)), talk((3, 4), (3, 4)), talk((1, 2), (1, 2))]
)
def test_other_lengths_have_another_digest(other: Workload) -> None:
    """Prompt length, tokens to generate and number of turns all count."""
    tokens = [5] * 50
    assert write_script(other, tokens).digest != write_script(talk((3, 4)), tokens).digest


@given(TURNS, TOKENS, st.integers(1, 6))
def test_parallel_conversations_have_the_same_lengths(
    turns: list[Turn], tokens: list[int], parallel: int
) -> None:
    """Each round holds one request a conversation; each conversation is cut as one alone."""
    workload = Workload("w", tuple(turns), parallel=min(parallel, len(tokens)))
    script = write_script(workload, tokens)
    assert [len(at_once) for at_once in script.rounds] == [workload.parallel] * len(turns)
    assert tuple(request for at_once in script.rounds for request in at_once) == script.requests
    for index in range(workload.parallel):
        start = index * len(tokens) // workload.parallel
        rest = [*tokens[start:], *tokens[:start]]
        alone = write_script(replace(workload, parallel=1), rest)
        assert tuple(at_once[index] for at_once in script.rounds) == alone.requests


def test_parallel_conversations_share_nothing() -> None:
    """Four prompts from a text without repetition have no token in common."""
    script = write_script(Workload("w", (Turn(20, 4), Turn(5, 4)), parallel=4), list(range(200)))
    for at_once in script.rounds:
        sent = [token for request in at_once for token in request.prompt]
        assert len(sent) == len({*sent})


def test_parallel_conversations_have_a_digest_of_their_own() -> None:
    """What the others are asked counts as well."""
    alone = Workload("w", (Turn(20, 4),))
    tokens = list(range(200))
    digests = {write_script(replace(alone, parallel=n), tokens).digest for n in (1, 2, 3)}
    assert len(digests) == 3


def test_more_conversations_than_tokens_are_refused() -> None:
    """They could not all be different; the error says what to change."""
    crowd = Workload("crowd", (Turn(2, 2),), parallel=4)
    with pytest.raises(CheckError, match=r"^workload crowd needs 4 different prompts, .* 3 tokens"):
        write_script(crowd, [1, 2, 3])


def test_without_tokens_there_is_nothing_to_send() -> None:
    """A tokenizer that makes nothing of the text is an error, not an empty prompt."""
    with pytest.raises(CheckError, match="no tokens of the shipped text"):
        write_script(talk((3, 4)), [])


@given(st.integers(1, 60), st.integers(1, 60), TOKENS, st.integers(1, 4))
def test_a_depth_comes_before_the_prompt(
    depth: int, prompt: int, tokens: list[int], parallel: int
) -> None:
    """The same ids as of a prompt of both lengths; the request says where the prompt begins."""
    parallel = min(parallel, len(tokens))
    deep = write_script(Workload("w", (Turn(prompt, 4, depth),), parallel=parallel), tokens)
    flat = write_script(Workload("w", (Turn(depth + prompt, 4),), parallel=parallel), tokens)
    assert [r.prompt for r in deep.requests] == [r.prompt for r in flat.requests]
    assert {r.depth for r in deep.requests} == {depth}
    assert deep.tokens == flat.tokens == depth + prompt + 4
    assert deep.workload.digest() != flat.workload.digest()


def test_a_chat_is_cut_as_a_prompt_is() -> None:
    """Questions and answers follow each other in the text, each conversation in its own place."""
    workload = Workload("w", (Turn(3, 2), Turn(4, 5), Turn(1, 2)), parallel=2)
    written = write_chats(workload, lambda number, at, count: f"{number}:{at}+{count}")
    assert [generate for _, generate in written] == [2, 2, 5, 5, 2, 2]
    one, other = ([(m["role"], m["content"]) for m in messages] for messages, _ in written[-2:])
    assert one == [
        ("user", "0:0+3"),
        ("assistant", "0:3+2"),
        ("user", "0:5+4"),
        ("assistant", "0:9+5"),
        ("user", "0:14+1"),
    ]
    assert [content for _, content in other] == [
        str(text).replace("0:", "1:", 1) for _, text in one
    ]
    assert [len(messages) for messages, _ in written] == [1, 1, 3, 3, 5, 5]


def test_a_prompt_is_counted_where_all_its_tokens_are_known() -> None:
    """Not with a picture, and not where the server shows none."""
    assert Request((1, 2), 4).counted
    assert not Request((1, 2), 4, pictured=True).counted
    assert not Request((), 4).counted
