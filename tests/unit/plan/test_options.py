"""Names of llama-server's options, read from real help texts."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_llmperf.errors import nearest
from pytest_llmperf.plan.options import (
    OWNED,
    OptionNames,
    from_env,
    from_flag,
    known_options,
    parse_help,
    told,
)

DATA = Path(__file__).parents[2] / "data"
HELP = {
    name: (DATA / f"help-{name}.txt").read_text("utf-8").rstrip() for name in ("b11434", "49bfdde")
}
NEW = {option.long: option for option in parse_help(HELP["b11434"])}
OLD = {option.long: option for option in parse_help(HELP["49bfdde"])}


@pytest.mark.parametrize("text", HELP.values(), ids=HELP)
def test_every_entry_of_a_help_text_is_one_option(text: str) -> None:
    """Each line that starts with a dash is an option, but for the headings of the sections."""
    entries = [line for line in text.splitlines() if line.startswith("-") and line[:3] != "---"]
    assert [option.names[0] for option in parse_help(text)] == [
        line.split(",")[0].split()[0] for line in entries
    ]


def test_all_names_of_an_option_are_kept_as_typed() -> None:
    """Short and long names keep their dashes and their order."""
    assert NEW["gpu-layers"].names == ("-ngl", "--gpu-layers", "--n-gpu-layers")
    assert NEW["fim-qwen-1.5b-default"].names == ("--fim-qwen-1.5b-default",)


@pytest.mark.parametrize(
    ("name", "takes_value"),
    [
        ("threads", True),
        ("flash-attn", True),
        ("override-kv", True),
        ("control-vector-layer-range", True),
        ("override-tensor", True),
        ("fit-target", True),
        ("verbosity", True),
        ("split-mode", True),
        ("swa-full", False),
        ("verbose", False),
        ("jinja", False),
        ("kv-offload", False),
        ("no-host", False),
        ("fim-qwen-1.5b-default", False),
    ],
)
def test_a_placeholder_after_the_names_means_a_value(name: str, takes_value: bool) -> None:  # noqa: FBT001 - the expectation
    """Whether or not the description fits on the same line, both builds agree on the value."""
    assert NEW[name].takes_value is takes_value
    assert OLD[name].takes_value is takes_value


@pytest.mark.parametrize(
    ("name", "negatives"),
    [
        ("perf", ("--no-perf",)),
        ("kv-offload", ("--no-kv-offload", "-nkvo")),
        ("repack", ("--no-repack", "-nr")),
        ("kv-unified", ("--no-kv-unified", "-no-kvu")),
        ("mmproj-auto", ("--no-mmproj", "--no-mmproj-auto")),
        ("no-host", ()),
        ("swa-full", ()),
        ("parallel", ()),
    ],
)
def test_negatives_are_the_names_that_switch_off(name: str, negatives: tuple[str, ...]) -> None:
    """The `--no-` forms with their short ones; an option that has only those is no negative."""
    assert NEW[name].negatives == negatives


def test_the_long_name_is_the_first_that_switches_nothing_off() -> None:
    """`-nkvo` and `--no-kv-offload` belong to `kv-offload`."""
    names = ("-nkvo", "--no-kv-offload", "--kv-offload")
    assert OptionNames(names, takes_value=False).long == "kv-offload"


def test_an_option_without_long_names_is_called_by_its_short_one() -> None:
    """`-x` is `x`."""
    assert OptionNames(("-x",), takes_value=False).long == "x"


@pytest.mark.parametrize(
    ("name", "env"),
    [
        ("threads", "LLAMA_ARG_THREADS"),
        ("kv-offload", "LLAMA_ARG_KV_OFFLOAD"),
        ("verbosity", "LLAMA_ARG_LOG_VERBOSITY"),
        ("warmup", ""),
    ],
)
def test_the_environment_variable_is_read_from_the_description(name: str, env: str) -> None:
    """It stands at the end of the description, where there is one."""
    assert NEW[name].env == env


def test_removed_options_are_marked() -> None:
    """The newer build lists `--draft-max` only to say that it is gone; the older one has it."""
    assert {name for name, option in NEW.items() if option.removed} == {
        "draft",
        "draft-min",
        "spec-ngram-size-n",
    }
    assert not any(option.removed for option in OLD.values())


def test_the_description_is_joined_to_one_line() -> None:
    """Lines that go on, values listed below and all, are joined by single spaces."""
    assert "3: info - 4: trace (more info) - 5: debug" in NEW["verbosity"].about
    assert "3: info - 4: debug (default: 3)" in OLD["verbosity"].about


def test_a_text_without_options_has_none() -> None:
    """Output of another program is no error here; the caller sees that options are missing."""
    assert parse_help("bash: llama-server: command not found\n  -x indented\n") == ()


FLAGS = st.from_regex(r"--[a-z][a-z0-9-]{0,20}", fullmatch=True)


@given(
    st.lists(
        st.tuples(FLAGS, st.booleans(), st.text("abc ,.-()", max_size=30)),
        max_size=10,
        unique_by=lambda entry: entry[0],
    )
)
def test_a_help_text_in_llama_cpps_layout_reads_back(entries: list[tuple[str, bool, str]]) -> None:
    """Names and whether a value follows survive, whatever the description says."""
    text = "".join(
        f"{flag} N".ljust(40) + about + "\n" if value else flag.ljust(40) + about + "\n"
        for flag, value, about in entries
    )
    found = [(option.names, option.takes_value) for option in parse_help(text)]
    assert found == [((flag,), value) for flag, value, _ in entries]


@given(st.text())
def test_any_text_is_read_without_an_error(text: str) -> None:
    """A build may print anything."""
    for option in parse_help(text):
        assert option.names
        assert option.long


# -- the options this package knows -----------------------------------------------------------


@pytest.mark.parametrize("help_text", HELP.values(), ids=HELP)
def test_the_known_options_cover_both_builds(help_text: str) -> None:
    """Every name that the two builds list is known, and agrees on whether a value follows."""
    for option in parse_help(help_text):
        for name in option.names:
            known = from_flag(name)
            assert known is not None, name
            assert known[1] is option.takes_value, name


def test_no_flag_belongs_to_two_known_options() -> None:
    """A flag has one meaning."""
    names = [name for option in known_options() for name in option.names]
    assert len(names) == len(set(names))


def test_owned_options_are_known_by_their_long_names() -> None:
    """The names refused in a config are those that a config's names are turned into."""
    for name in OWNED:
        known = from_flag(f"--{name}")
        assert known is not None
        assert known[0] == name


@pytest.mark.parametrize(
    ("flag", "found"),
    [
        ("-t", ("threads", True, False)),
        ("-ngl", ("gpu-layers", True, False)),
        ("--n-gpu-layers", ("gpu-layers", True, False)),
        ("--no-mmap", ("mmap", False, True)),
        ("-nkvo", ("kv-offload", False, True)),
        ("--no-host", ("no-host", False, False)),
        ("--threads-draft", ("spec-draft-threads", True, False)),
        ("--webui", ("ui", False, False)),
        ("--nonsense", None),
        ("threads", None),
    ],
)
def test_a_flag_is_turned_into_its_long_name(
    flag: str, found: tuple[str, bool, bool] | None
) -> None:
    """Synonyms share one long name; a `--no-` form is told apart."""
    assert from_flag(flag) == found


@pytest.mark.parametrize(
    ("variable", "found"),
    [
        ("LLAMA_ARG_CTX_SIZE", ("ctx-size", True)),
        ("LLAMA_ARG_N_PARALLEL", ("parallel", True)),
        ("LLAMA_ARG_PARALLEL", ("parallel", True)),
        ("LLAMA_ARG_MMAP", ("mmap", False)),
        ("LLAMA_ARG_NO_HOST", ("no-host", False)),
        ("LLAMA_ARG_NO_MMAP", None),
        ("LLAMA_ARG_NONSENSE", None),
        ("PATH", None),
    ],
)
def test_a_variable_is_turned_into_its_long_name(
    variable: str, found: tuple[str, bool] | None
) -> None:
    """By the help text's own variables, else by the long name; never into its opposite."""
    assert from_env(variable) == found


def test_nearest_names_what_was_likely_meant() -> None:
    """The closest candidate is offered, in brackets and after a space."""
    assert nearest("thread", ["threads", "ctx-size"]) == " (nearest: threads)"


def test_nearest_says_nothing_where_nothing_is_near() -> None:
    """No guess is better than a wild one."""
    assert nearest("xyz", ["threads", "ctx-size"]) == ""
    assert nearest("threads", []) == ""


@given(st.sampled_from([option.long for option in known_options()]))
def test_a_name_is_nearest_to_itself(name: str) -> None:
    """An exact match wins over every likeness."""
    assert nearest(name, [option.long for option in known_options()]) == f" (nearest: {name})"


def test_a_template_file_is_told_by_its_content(tmp_path: Path) -> None:
    """Wherever it lies; a file that is not there, as one of a container, by its name."""
    texts = []
    for folder, content in (("a", "x"), ("b", "x"), ("c", "y")):
        path = tmp_path / folder
        path.mkdir()
        (path / "my.jinja").write_text(content)
        texts.append(told({"threads": 1, "chat-template-file": str(path / "my.jinja")}))
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("chat-template-file=sha256:")
    assert texts[0].endswith(" threads=1")
    assert told({"chat-template-file": "/no/such"}) == "chat-template-file=/no/such"
    assert told({}) == ""
