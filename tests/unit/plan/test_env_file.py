"""Options from a llama-server .env file."""

from __future__ import annotations

import json
import shlex
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_llmperf.errors import PlanError
from pytest_llmperf.plan.env_file import read_env_file
from pytest_llmperf.plan.options import OptionValue


def read(text: str) -> dict[str, OptionValue]:
    """Return what a file of this text sets."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "server.env"
        path.write_text(text, "utf-8")
        return read_env_file(path)


def test_a_file_in_every_style_is_read() -> None:
    """Variables, quoted flags and plain flags may stand in one file."""
    text = """\
# C7: 24 of 40 expert layers on the CPU

LLAMA_ARG_CTX_SIZE=65536
export LLAMA_ARG_FLASH_ATTN="on"   # needed for a quantized cache
EXTRA_ARGS="--n-cpu-moe 24 -ctk q8_0 -ctv q8_0"
--no-mmap
-t 20 --temp 0.5
COMPOSE_PROJECT_NAME=llm
"""
    assert read(text) == {
        "ctx-size": 65536,
        "flash-attn": "on",
        "n-cpu-moe": 24,
        "cache-type-k": "q8_0",
        "cache-type-v": "q8_0",
        "mmap": False,
        "threads": 20,
        "temp": 0.5,
    }


def test_an_empty_file_sets_nothing() -> None:
    """Blank lines and comments are passed over."""
    assert read("\n  # nothing\n\n") == {}


def test_lines_may_end_as_on_windows() -> None:
    """A carriage return is no part of a value."""
    assert read("LLAMA_ARG_ALIAS=a\r\n-t 2\r\n") == {"alias": "a", "threads": 2}


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("LLAMA_ARG_MMAP=1", True),
        ("LLAMA_ARG_MMAP=off", False),
        ("LLAMA_ARG_MMAP=Disabled", False),
        ("LLAMA_ARG_NO_MMAP=1", False),
        ("LLAMA_ARG_NO_MMAP=0", False),
        ("--mmap", True),
        ("--no-mmap", False),
        ("ARGS=--no-mmap", False),
        ("LLAMA_FLAGS='--no-mmap'", False),
    ],
)
def test_a_switch_is_on_or_off(line: str, value: bool) -> None:  # noqa: FBT001 - the expectation
    """As llama-server takes it: a `NO_` variable switches off, whatever its value."""
    assert read(line) == {"mmap": value}


@pytest.mark.parametrize(
    ("line", "options"),
    [
        ("LLAMA_ARG_NO_MMPROJ=1", {"mmproj-auto": False}),
        ("LLAMA_ARG_NO_CONT_BATCHING=1", {"cont-batching": False}),
        ("LLAMA_ARG_NO_HOST=1", {"no-host": True}),
        ("LLAMA_ARG_NO_ENDPOINT_SLOTS=1", {"slots": False}),
    ],
)
def test_a_no_variable_is_found_by_flag_or_by_variable(
    line: str, options: dict[str, OptionValue]
) -> None:
    """Some are named after the flag, some after the variable, and one is an option itself."""
    assert read(line) == options


@pytest.mark.parametrize(
    ("line", "options"),
    [
        ("LLAMA_ARG_SEED=-1", {"seed": -1}),
        ("--temp -0.25", {"temp": -0.25}),
        ("-ngl all", {"gpu-layers": "all"}),
        ("--ctx-size=4096", {"ctx-size": 4096}),
        ("-ts 3,1", {"tensor-split": "3,1"}),
        ("LLAMA_ARG_ALIAS=c#7 # the best", {"alias": "c#7"}),
        ("LLAMA_ARG_ALIAS=it's", {"alias": "it's"}),
        ("--alias c#7", {"alias": "c#7"}),
        ("--alias 'a b' # two words", {"alias": "a b"}),
        ("EXTRA_ARGS=--alias 'a b' --jinja", {"alias": "a b", "jinja": True}),
    ],
)
def test_values_are_numbers_or_text(line: str, options: dict[str, OptionValue]) -> None:
    """A whole number, a decimal one, or the text itself; a comment begins after a space."""
    assert read(line) == options


def test_json_in_a_variable_keeps_its_quotes() -> None:
    """Only quotes around the whole value go, as docker reads such files."""
    kwargs = '{"enable_thinking": false}'
    for line in (kwargs, f"'{kwargs}'"):
        found = read(f"LLAMA_ARG_CHAT_TEMPLATE_KWARGS={line}")
        assert json.loads(str(found["chat-template-kwargs"])) == {"enable_thinking": False}


@pytest.mark.parametrize(
    "line", [r'EXTRA_ARGS="-ot blk\.\d+\.ffn=CPU"', r'-ot "blk\.\d+\.ffn=CPU"']
)
def test_a_pattern_keeps_its_backslashes(line: str) -> None:
    r"""`\d+` must not become `d+`: the placement of tensors depends on it."""
    assert read(line) == {"override-tensor": r"blk\.\d+\.ffn=CPU"}


def test_options_that_add_up_are_kept_in_order() -> None:
    """An override given three times is three overrides."""
    assert read("-ot a=CPU -ot b=CPU\n-ot c=CUDA0") == {
        "override-tensor": ("a=CPU", "b=CPU", "c=CUDA0")
    }
    assert read("--lora a.gguf\n--lora b.gguf") == {"lora": ("a.gguf", "b.gguf")}


def test_of_other_options_the_last_one_counts() -> None:
    """As on a command line."""
    assert read("LLAMA_ARG_THREADS=4\n-t 8 --threads 16") == {"threads": 16}


@pytest.mark.parametrize(
    "line",
    [
        "LLAMA_ARG_MODEL=/models/a.gguf",
        "LLAMA_ARG_HOST=0.0.0.0",
        "LLAMA_ARG_PORT=",
        "-m /models/a.gguf --port 8080 --api-key secret",
        "LLAMA_API_KEY=secret",
        "HF_TOKEN=secret",
    ],
)
def test_what_the_harness_sets_itself_is_passed_over(line: str) -> None:
    """Model, address and keys of the file are not the run's."""
    assert read(line) == {}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("just words", "`just words` is neither NAME=value, a flag, nor a comment"),
        ("LLAMA_ARG_CTX=1", "LLAMA_ARG_CTX is no variable of llama-server: check its spelling"),
        ("LLAMA_ARG_NO_CTX_SIZE=1", "LLAMA_ARG_NO_CTX_SIZE is no variable of llama-server"),
        ("LLAMA_ARG_NO_NONSENSE=1", "LLAMA_ARG_NO_NONSENSE is no variable of llama-server"),
        ("LLAMA_ARG_CTX_SIZE=", "LLAMA_ARG_CTX_SIZE lacks its value"),
        ("LLAMA_ARG_MMAP=maybe", "LLAMA_ARG_MMAP=maybe: it is on or off, write 1 or 0"),
        ('LLAMA_ARG_ALIAS="a', "no closing quotation: close the quote"),
        ("--alias 'a", "no closing quotation: close the quote"),
        ('EXTRA_ARGS="--alias \'a"', "no closing quotation: close the quote"),
        ("--jinja \\", "no escaped character: a line does not go on in the next"),
        ("--nonsense 1", "unknown flag --nonsense: see llama-server --help"),
        ("-t 4 loose", "unknown flag loose"),
        ("--ctx-size", "--ctx-size lacks its value: write `--ctx-size VALUE`"),
        ("-fa --no-mmap", "-fa lacks its value: write `-fa VALUE`"),
        ("--jinja=off", "--jinja takes no value: write `--jinja` alone"),
    ],
)
def test_a_mistake_names_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    """One line that says where it is and what would be right."""
    path = tmp_path / "c7.env"
    path.write_text(f"# first\n{line}\n", "utf-8")
    with pytest.raises(PlanError) as caught:
        read_env_file(path)
    assert str(caught.value).startswith(f"{path}:2: {message}")
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """The error is the suite author's to mend."""
    with pytest.raises(PlanError, match=r"gone\.env: cannot read the env-file: No such file"):
        read_env_file(tmp_path / "gone.env")


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    """Bytes that are not UTF-8 are no .env file."""
    path = tmp_path / "model.env"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match=r"model\.env: the env-file is not UTF-8 text"):
        read_env_file(path)


WORDS = st.text(
    st.characters(codec="ascii", exclude_characters="\r\n", min_codepoint=32, max_codepoint=126),
    min_size=1,
    max_size=20,
)


@given(WORDS)
def test_a_quoted_value_comes_through_as_it_is(value: str) -> None:
    """Whatever a value holds, quoting it as a shell would is enough."""
    found = str(read(f"--chat-template x{shlex.quote(value)}")["chat-template"])
    assert found == "x" + value


@given(st.integers(-(10**9), 10**9))
def test_whole_numbers_are_numbers(number: int) -> None:
    """Variables and flags read a number alike."""
    assert read(f"LLAMA_ARG_CTX_SIZE={number}") == read(f"-c {number}") == {"ctx-size": number}


@given(st.text(max_size=60))
def test_any_text_is_read_or_refused_in_one_line(text: str) -> None:
    """No file, however odd, ends in another error."""
    try:
        read(text)
    except PlanError as error:
        assert "\n" not in str(error)  # noqa: PT017 - an error is one of the two right answers
