"""Options in the words of the build at hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_llmperf.build.build import Build
from pytest_llmperf.build.dialect import Dialect, dialect_of
from pytest_llmperf.errors import BuildError
from pytest_llmperf.plan.options import OptionValue, parse_help

MakeProgram = Callable[..., Path]

DATA = Path(__file__).parents[2] / "data"


def dialect(name: str) -> Dialect:
    """Return the dialect of a build whose help text is kept beside the tests."""
    text = (DATA / f"help-{name}.txt").read_text("utf-8")
    return Dialect(name, tuple(option for option in parse_help(text) if not option.removed))


NEW = dialect("b11434")
OLD = dialect("49bfdde")


@pytest.mark.parametrize(
    ("options", "new", "old"),
    [
        # values
        ({"threads": 2}, "--threads 2", "--threads 2"),
        ({"seed": -1}, "--seed -1", "--seed -1"),
        ({"timeout": 0.5}, "--timeout 0.5", "--timeout 0.5"),
        ({"n-gpu-layers": 9}, "--n-gpu-layers 9", "--n-gpu-layers 9"),
        (
            {"override-tensor": ("a=CPU", "b=CPU")},
            "--override-tensor a=CPU --override-tensor b=CPU",
            "--override-tensor a=CPU --override-tensor b=CPU",
        ),
        ({"cache-type-k": "turbo3"}, "--cache-type-k turbo3", "--cache-type-k turbo3"),
        # switches
        ({"jinja": True}, "--jinja", "--jinja"),
        ({"jinja": False}, "--no-jinja", "--no-jinja"),
        ({"jinja": "on"}, "--jinja", "--jinja"),
        ({"jinja": "off"}, "--no-jinja", "--no-jinja"),
        ({"kv-offload": False}, "--no-kv-offload", "--no-kv-offload"),
        ({"swa-full": True}, "--swa-full", "--swa-full"),
        ({"swa-full": False}, "", ""),
        ({"no-host": True}, "--no-host", "--no-host"),
        ({"no-host": False}, "", ""),
        ({"no-jinja": True}, "--no-jinja", "--no-jinja"),
        ({"no-jinja": False}, "--jinja", "--jinja"),
        ({"flash-attn": True}, "--flash-attn on", "--flash-attn on"),
        ({"flash-attn": False}, "--flash-attn off", "--flash-attn off"),
        ({"flash-attn": "auto"}, "--flash-attn auto", "--flash-attn auto"),
        # another name in each build
        ({"spec-draft-n-max": 8}, "--spec-draft-n-max 8", "--draft 8"),
        ({"draft-max": 8}, "--spec-draft-n-max 8", "--draft-max 8"),
        ({"draft": 8}, "--spec-draft-n-max 8", "--draft 8"),
        ({"spec-draft-n-min": 1}, "--spec-draft-n-min 1", "--draft-min 1"),
        ({"draft-min": 1}, "--spec-draft-n-min 1", "--draft-min 1"),
        (
            {"spec-ngram-simple-size-n": 8},
            "--spec-ngram-simple-size-n 8",
            "--spec-ngram-size-n 8",
        ),
        ({"spec-ngram-size-n": 8}, "--spec-ngram-simple-size-n 8", "--spec-ngram-size-n 8"),
        ({"spec-draft-threads": 2}, "--spec-draft-threads 2", "--threads-draft 2"),
        ({"threads-draft": 2}, "--threads-draft 2", "--threads-draft 2"),
        ({"spec-draft-model": "d.gguf"}, "--spec-draft-model d.gguf", "--model-draft d.gguf"),
        ({"spec-draft-type-k": "f16"}, "--spec-draft-type-k f16", "--cache-type-k-draft f16"),
        ({"ui": False}, "--no-ui", "--no-webui"),
        ({"webui": True}, "--webui", "--webui"),
        # one option in place of several
        ({"load-mode": "none"}, "--load-mode none", "--no-mmap"),
        ({"mmap": False}, "--load-mode none", "--no-mmap"),
        ({"load-mode": "mmap"}, "--load-mode mmap", "--mmap"),
        ({"mmap": True}, "--load-mode mmap", "--mmap"),
        ({"load-mode": "mlock"}, "--load-mode mlock", "--mlock"),
        ({"mlock": True}, "--load-mode mlock", "--mlock"),
        ({"load-mode": "dio"}, "--load-mode dio", "--direct-io"),
        ({"direct-io": True}, "--load-mode dio", "--direct-io"),
        # one option of all kinds of drafting, before it was split
        ({"spec-ngram-mod-n-max": 64}, "--spec-ngram-mod-n-max 64", "--draft 64"),
        ({"spec-ngram-mod-n-min": 48}, "--spec-ngram-mod-n-min 48", "--draft-min 48"),
        ({"spec-ngram-mod-n-match": 24}, "--spec-ngram-mod-n-match 24", "--spec-ngram-size-n 24"),
        # another value in each build
        ({"spec-type": "draft"}, "--spec-type draft-simple", "--spec-type draft"),
        ({"spec-type": "ngram-mod"}, "--spec-type ngram-mod", "--spec-type ngram-mod"),
        ({"spec-type": "of-a-fork"}, "--spec-type of-a-fork", "--spec-type of-a-fork"),
    ],
)
def test_a_config_is_written_once(options: dict[str, OptionValue], new: str, old: str) -> None:
    """Each build gets the same meaning in its own words."""
    assert NEW.arguments(options) == new.split()
    assert OLD.arguments(options) == old.split()


def test_an_older_word_is_used_only_where_the_build_lists_it() -> None:
    """`draft-simple` becomes `draft` for a build that offers only that."""
    help_text = "--spec-type [none|draft|ngram-mod]      a type, draft-simple it is not called\n"
    between = Dialect("b9000", parse_help(help_text))
    assert between.arguments({"spec-type": "draft-simple"}) == ["--spec-type", "draft"]


def test_options_keep_their_order() -> None:
    """Of two options that contradict each other the later one counts."""
    assert OLD.arguments({"mlock": True, "threads": 2, "mmap": False}) == [
        "--mlock",
        "--threads",
        "2",
        "--no-mmap",
    ]


def test_no_options_are_no_arguments() -> None:
    """A config may have none."""
    assert NEW.arguments({}) == []


@pytest.mark.parametrize(
    ("build", "options", "said"),
    [
        (NEW, {"thread": 2}, "build b11434 has no option --thread (nearest: threads)"),
        (NEW, {"xyzzy": 2}, "build b11434 has no option --xyzzy"),
        (OLD, {"load-mode": "mmap+mlock"}, "build 49bfdde has no option --load-mode"),
        (NEW, {"mlock": False}, "build b11434 has no option --mlock"),
        (
            OLD,
            {"jinja": "maybe"},
            "build 49bfdde: --jinja takes no value, the config gives 'maybe'",
        ),
        (NEW, {"jinja": 1}, "build b11434: --jinja takes no value, the config gives 1"),
    ],
)
def test_what_a_build_cannot_do_names_option_and_build(
    build: Dialect, options: dict[str, OptionValue], said: str
) -> None:
    """Before the server is started, which would only exit."""
    with pytest.raises(BuildError) as caught:
        build.arguments(options)
    assert str(caught.value).startswith(said)


def test_removed_options_are_not_used() -> None:
    """The newer build lists `--draft-max` but refuses it."""
    assert "--draft-max" not in {name for option in NEW.options for name in option.names}
    assert NEW.supports("draft-max")


@pytest.mark.parametrize(
    ("name", "new", "old"),
    [
        ("load-mode", True, False),
        ("mmap", False, True),
        ("n-gpu-layers", True, True),
        ("threads-draft", True, True),
        ("xyzzy", False, False),
    ],
)
def test_a_build_supports_an_option_under_any_of_its_names(
    name: str,
    new: bool,  # noqa: FBT001 - the expectation
    old: bool,  # noqa: FBT001 - the expectation
) -> None:
    """A replacement by another option is not the option."""
    assert (NEW.supports(name), OLD.supports(name)) == (new, old)


def test_the_verbosity_that_tells_buffer_sizes() -> None:
    """Level 4 is a trace in the newer build; in the older one, debugging that is not needed."""
    assert NEW.log_verbosity == 4
    assert OLD.log_verbosity is None
    assert Dialect("b1", ()).log_verbosity is None


VALUED = sorted(option.long for option in NEW.options if option.takes_value)


@given(st.sampled_from(VALUED), st.integers() | st.text(max_size=10))
def test_a_value_is_one_argument_after_its_flag(name: str, value: int | str) -> None:
    """Spaces, dashes and quotes in a value need no care: there is no shell."""
    if name == "spec-type":
        value = "none"
    assert NEW.arguments({name: value}) == [f"--{name}", str(value)]


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_decimal_number_loses_nothing(value: float) -> None:
    """What the server reads is what the config says."""
    _, text = NEW.arguments({"timeout": value})
    assert float(text) == value


# -- from the program -------------------------------------------------------------------------


def build_of(program: Path, **env: str) -> Build:
    """Return a build that is started with this program."""
    return Build(program.name, 1234, "abc", "test", "", (str(program),), env=env)


def test_the_dialect_is_asked_of_the_program(make_program: MakeProgram) -> None:
    """What `--help` prints, without the options it says are removed."""
    program = make_program('[ "$*" = --help ] || exit 9', f"cat {DATA / 'help-b11434.txt'}")
    assert dialect_of(build_of(program)) == Dialect("llama-server", NEW.options)


def test_help_on_stderr_will_do(make_program: MakeProgram) -> None:
    """Some builds print it there, and exit with an error."""
    program = make_program(f"cat {DATA / 'help-49bfdde.txt'} >&2", "exit 1")
    assert dialect_of(build_of(program)).options == OLD.options


def test_the_builds_environment_is_set(make_program: MakeProgram) -> None:
    """A build that needs `LD_LIBRARY_PATH` to run needs it for its help, too."""
    program = make_program(f'[ "$LIBRARIES" = here ] && cat {DATA / "help-b11434.txt"}')
    assert dialect_of(build_of(program, LIBRARIES="here")).supports("load-mode")


def test_a_program_is_asked_once(make_program: MakeProgram, tmp_path: Path) -> None:
    """Every config of a run asks for the dialect."""
    count = tmp_path / "count"
    program = make_program(f"echo >>{count}", f"cat {DATA / 'help-b11434.txt'}")
    for _ in range(3):
        dialect_of(build_of(program))
    assert count.read_text("utf-8") == "\n"


def test_a_program_without_options_is_refused(make_program: MakeProgram) -> None:
    """Another program, or a build that does not run."""
    program = make_program("echo 'usage: ls [--all]'")
    with pytest.raises(BuildError, match="build llama-server: `--help` lists no options of llama-"):
        dialect_of(build_of(program))


def test_a_program_that_is_gone_is_named(tmp_path: Path) -> None:
    """With the build's label."""
    with pytest.raises(BuildError, match="build gone: cannot run `--help`: "):
        dialect_of(build_of(tmp_path / "gone"))
