"""Lines of TOML keys, for error texts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_llmperf.plan.lines import line_of

SUITE = """\
# a comment with key = value
[models.tiny]
synth = {}

[configs.c7] # the best by hand
model = "tiny"
options = { threads = 2, ctx-size = 4096 }

[configs.c8.options]
threads = 4
"cache-type-k" = "q8_0"

[configs]
c9.model = "tiny"

[[workloads]]
  turns = [
    { prompt = 1, generate = 2 },
  ]
"""


@pytest.mark.parametrize(
    ("path", "line"),
    [
        (("models", "tiny"), 2),
        (("models", "tiny", "synth"), 3),
        (("configs", "c7"), 5),
        (("configs", "c7", "model"), 6),
        (("configs", "c8", "options"), 9),
        (("configs", "c8", "options", "threads"), 10),
        (("configs", "c8", "options", "cache-type-k"), 11),
        (("configs", "c9", "model"), 14),
        (("workloads", "turns"), 17),
    ],
)
def test_a_key_or_table_has_the_line_it_stands_on(path: tuple[str, ...], line: int) -> None:
    """Headers, plain, quoted and dotted keys are all found."""
    assert line_of(SUITE, path) == line


@pytest.mark.parametrize(
    ("path", "line"),
    [
        (("configs", "c7", "options", "threads"), 7),
        (("configs", "c7", "extends"), 5),
        (("configs", "c8", "options", "absent"), 9),
        (("workloads", "turns", "prompt"), 17),
    ],
)
def test_a_key_without_a_line_has_that_of_its_table(path: tuple[str, ...], line: int) -> None:
    """A key of an inline table, or one that is missing, points at the nearest table."""
    assert line_of(SUITE, path) == line


@pytest.mark.parametrize(("path", "line"), [(("configs", "c8"), 9), (("models",), 2)])
def test_a_table_named_only_within_others_has_the_line_of_the_first(
    path: tuple[str, ...], line: int
) -> None:
    """`[configs.c8.options]` alone is where `configs.c8` begins."""
    assert line_of(SUITE, path) == line


def test_the_table_itself_wins_over_a_table_within_it() -> None:
    """`[a.b]` is the line of `a.b`, even where `[a.b.c]` stands above it."""
    assert line_of("[a.b.c]\nx = 1\n[a.b]\ny = 2\n", ("a", "b")) == 3


def test_what_is_nowhere_has_no_line() -> None:
    """A key of which not even the section is there has no line."""
    assert line_of(SUITE, ("tolerances", "decode_tps")) is None
    assert line_of("", ("models",)) is None


NAMES = st.text("abcXYZ019_-", min_size=1, max_size=6)


@given(st.lists(st.tuples(NAMES, NAMES, NAMES), min_size=1, max_size=8, unique=True))
def test_every_key_of_a_plain_file_is_found_where_it_was_written(
    keys: list[tuple[str, str, str]],
) -> None:
    """Whatever the names, a key under its own header is found on its own line."""
    text = "".join(f"[{a}.{b}]\n{c} = 1\n" for a, b, c in keys)
    for index, (a, b, c) in enumerate(keys):
        assert line_of(text, (a, b, c)) == 2 * index + 2
