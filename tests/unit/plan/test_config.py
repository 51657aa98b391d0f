"""Workloads and cases as values."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_llmperf.plan.config import (
    LAUNCH,
    BuildEntry,
    Case,
    Config,
    CorpusPass,
    Turn,
    Workload,
    is_exclusive,
)
from pytest_llmperf.plan.options import OptionValue

CONFIG = Config("c7", "tiny")
WORKLOAD = Workload("multi_turn", (Turn(96, 48), Turn(32, 16)))
PASS = CorpusPass("wiki", "wiki.test.raw")
SIZES = st.tuples(*[st.integers(1, 4096)] * 3, st.none() | st.integers(1, 4096))
TURNS = st.lists(st.builds(Turn, st.integers(1, 5000), st.integers(2, 5000)), min_size=1)


def test_a_case_is_named_by_config_and_workload() -> None:
    """The id goes into the node id, the key into the baseline file."""
    case = Case(CONFIG, WORKLOAD)
    assert (case.id, case.key) == ("c7-multi_turn", "c7/multi_turn")


def test_a_case_without_workload_is_a_launch() -> None:
    """What a start alone shows is kept under the word that no workload may have."""
    case = Case(CONFIG, None)
    assert (case.id, case.key) == ("c7", f"c7/{LAUNCH}")


def test_a_case_is_named_by_config_and_pass() -> None:
    """As by a workload."""
    case = Case(CONFIG, corpus_pass=PASS)
    assert (case.id, case.key) == ("c7-wiki", "c7/wiki")


def test_a_case_has_a_workload_or_a_pass() -> None:
    """Speed and answers are measured apart."""
    with pytest.raises(ValueError, match="a workload or a pass, not both"):
        Case(CONFIG, WORKLOAD, PASS)


def test_a_config_compares_with_itself_and_has_no_budget_unless_told() -> None:
    """The reference is its own answers on the baseline's build."""
    assert (CONFIG.against, CONFIG.budgets) == ("", {})


@given(SIZES, SIZES)
def test_digests_of_passes_are_equal_exactly_when_the_sizes_are(
    one: tuple[int, int, int, int | None], other: tuple[int, int, int, int | None]
) -> None:
    """Name, text, path, marks and help change no number by themselves, or are told apart."""
    left = CorpusPass("a", "a.txt", *one)
    right = CorpusPass("b", "b.txt", *other, path="server", marks=("gpu",), help="b")
    assert (left.digest() == right.digest()) is (one == other)


def test_a_digest_of_a_pass_is_short_and_stays_the_same() -> None:
    """It is part of every baseline: a change would make all of them incomparable."""
    assert PASS.digest() == "a96347f333c8b50b"


def test_a_workload_needs_room_for_all_its_turns() -> None:
    """The last turn carries the earlier ones and their answers."""
    assert WORKLOAD.tokens == 96 + 48 + 32 + 16


@given(TURNS)
def test_tokens_grow_with_every_turn(turns: list[Turn]) -> None:
    """Leaving out the last turn leaves room for exactly that turn."""
    whole, rest = Workload("w", tuple(turns)), Workload("w", tuple(turns[:-1]))
    assert whole.tokens == rest.tokens + turns[-1].prompt + turns[-1].generate


@given(TURNS, TURNS)
def test_digests_are_equal_exactly_when_the_lengths_are(one: list[Turn], other: list[Turn]) -> None:
    """Two workloads are comparable by their lengths alone, whatever they are called."""
    left = Workload("a", tuple(one), help="one").digest()
    right = Workload("b", tuple(other), help="other").digest()
    assert (left == right) is (one == other)


def test_a_digest_is_short_and_stays_the_same() -> None:
    """It is part of every baseline: a change would make all of them incomparable."""
    assert Workload("short", (Turn(64, 64),)).digest() == "e9f555ddd3b85996"
    assert Workload("short", (Turn(64, 64),), parallel=1).digest() == "e9f555ddd3b85996"


def test_a_limit_is_not_part_of_the_digest() -> None:
    """How long a sample may take changes nothing of one that took less."""
    assert Workload("a", (Turn(64, 64),), limit=9.0).digest() == "e9f555ddd3b85996"


def test_all_that_changes_the_work_is_part_of_the_digest() -> None:
    """Each by itself; a template's own way is another than either switch."""
    plain = (Turn(64, 64),)
    told = [
        Workload("a", plain),
        Workload("a", (Turn(64, 64, 8),)),
        Workload("a", plain, parallel=2),
        Workload("a", plain, tool="llama-bench"),
        Workload("a", plain, api="chat"),
        Workload("a", plain, api="chat", thinking=True),
        Workload("a", plain, api="chat", thinking=False),
        Workload("a", plain, api="chat", image=224),
        Workload("a", plain, api="chat", image=448),
    ]
    assert len({one.digest() for one in told}) == len(told)


@given(TURNS, st.integers(1, 64), st.integers(1, 64))
def test_requests_at_once_are_part_of_the_digest(turns: list[Turn], one: int, other: int) -> None:
    """Four users at once and eight are not comparable, whatever the lengths."""
    left = Workload("a", tuple(turns), parallel=one)
    right = Workload("a", tuple(turns), parallel=other)
    assert (left.digest() == right.digest()) is (one == other)
    assert left.tokens == right.tokens


@pytest.mark.parametrize("value", [CONFIG, WORKLOAD, PASS, Turn(1, 2), BuildEntry("b", "embedded")])
def test_values_are_frozen(value: object) -> None:
    """A plan does not change once it is read."""
    assert dataclasses.is_dataclass(value)
    field = dataclasses.fields(value)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, field, "other")


def test_a_config_takes_cards_only_where_it_takes_a_gpu() -> None:
    """One, if it does not say how many."""
    assert CONFIG.cards == 0
    assert dataclasses.replace(CONFIG, gpus=2).cards == 0
    assert dataclasses.replace(CONFIG, gpu=True).cards == 1
    assert dataclasses.replace(CONFIG, gpu=True, gpus=2).cards == 2


@pytest.mark.parametrize("told", [None, True, False])
def test_what_runs_on_the_cpu_is_exclusive(*, told: bool | None) -> None:
    """Whatever it says: its figures are those of a host that does nothing else."""
    assert is_exclusive(dataclasses.replace(CONFIG, exclusive=told))


@pytest.mark.parametrize(
    ("name", "value", "exclusive"),
    [
        ("threads", 4, False),
        ("gpu-layers", 99, False),
        ("gpu-layers", "all", False),
        ("gpu-layers", 0, True),
        ("gpu-layers", "0", True),
        ("cpu-moe", True, True),
        ("cpu-moe", False, False),
        ("n-cpu-moe", 24, True),
        ("n-cpu-moe", "24", True),
        ("n-cpu-moe", 0, False),
        ("kv-offload", False, True),
        ("kv-offload", True, False),
        ("override-tensor", "exps=CPU", True),
        ("override-tensor", ("a=CUDA0", "b=CUDA0,exps=CPU"), True),
        ("override-tensor", "CPU=CUDA0", False),
        ("override-tensor", "exps=CUDA_Host", False),
        ("device", "none", True),
        ("device", "CUDA0", False),
        ("fit", "on", True),
        ("fit", "true", True),
        ("fit", 1, True),
        ("fit", "off", False),
        ("fit", 0, False),
        ("mmproj-offload", False, True),
        ("mmproj-offload", True, False),
        ("spec-draft-cpu-moe", True, True),
        ("spec-draft-n-cpu-moe", 2, True),
        ("spec-draft-override-tensor", "exps=CPU", True),
        ("spec-draft-ngl", 0, True),
        ("spec-draft-ngl", 99, False),
        ("spec-draft-device", "none", True),
    ],
)
def test_what_leaves_work_to_the_cpu_is_exclusive(
    name: str, value: OptionValue, *, exclusive: bool
) -> None:
    """Of a GPU config, unless it says itself whether it is."""
    config = dataclasses.replace(CONFIG, gpu=True, options={"ctx-size": 4096, name: value})
    assert is_exclusive(config) is exclusive
    for told in (True, False):
        assert is_exclusive(dataclasses.replace(config, exclusive=told)) is told
