"""Starting a server: its command and environment, readiness, and that it is ours."""

from __future__ import annotations

import os
import re
import signal
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
from support.fakes import CONFIG, PATIENCE, Journal, fake_build, fake_server, goes

from pytest_llmperf.build.build import Build
from pytest_llmperf.build.container import Container
from pytest_llmperf.build.engine import Engine
from pytest_llmperf.errors import BuildError, OutOfMemoryError, ServerError
from pytest_llmperf.gpu.cards import Gpu
from pytest_llmperf.plan.config import ModelFiles
from pytest_llmperf.plan.options import OptionValue
from pytest_llmperf.serve import launch as module
from pytest_llmperf.serve import process
from pytest_llmperf.serve.failure import Before, Kills
from pytest_llmperf.serve.launch import (
    ServePlan,
    Server,
    check_options,
    compose,
    needs,
    server_environment,
    server_options,
    start,
    tail,
)

MODEL = Path("models/model.gguf")
KEY_FILE = Path("run/one.key")
NO_KILLS = Kills(0, 0, 0, 0)
CARDS = tuple(Gpu(index, f"GPU-{index}", "card", 1000, "1") for index in range(3))


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    """What the fake servers of this test note."""
    return Journal(tmp_path / "journal")


def launch(tmp_path: Path, faults: str = "", *, timeout: float = PATIENCE) -> Server:
    """Start a fake server that is expected to fail."""
    build = fake_build(Journal(tmp_path / "journal"), faults=faults)
    return start(build, CONFIG, ModelFiles(MODEL), ServePlan(tmp_path / "run", timeout=timeout))


def options_of(command: tuple[str, ...], build: Build) -> dict[str, str]:
    """Return the options of a server's command, each with the argument that follows it."""
    rest = command[len(build.command) :]
    return {a: b for a, b in zip(rest, [*rest[1:], ""], strict=True) if a.startswith("--")}


def test_a_command_has_defaults_and_owned_options(journal: Journal) -> None:
    """One slot, no prompt cache, no network; loopback, a free port, a key file, a full log."""
    build = fake_build(journal)
    command = compose(build, CONFIG, ModelFiles(MODEL), KEY_FILE)
    assert command[: len(build.command)] == build.command
    assert options_of(command, build) == {
        "--model": str(MODEL),
        "--parallel": "1",
        "--cache-ram": "0",
        "--offline": "--threads",
        "--threads": "1",
        "--ctx-size": "1024",
        "--verbosity": "4",
        "--host": "127.0.0.1",
        "--port": "0",
        "--api-key-file": str(KEY_FILE),
    }


def test_config_wins_over_defaults_and_build_over_config(journal: Journal) -> None:
    """The build's own options come last, then the config's, then the defaults."""
    config = replace(CONFIG, options={"parallel": 4, "threads": 2, "verbosity": 1})
    build = fake_build(journal, options={"threads": 3, "mmap": False})
    assert server_options(build, config) == {
        "parallel": 4,
        "cache-ram": 0,
        "offline": True,
        "threads": 3,
        "verbosity": 1,
        "mmap": False,
    }
    found = options_of(compose(build, config, ModelFiles(MODEL), KEY_FILE, port=4242), build)
    assert (found["--parallel"], found["--threads"], found["--verbosity"]) == ("4", "3", "1")
    assert found["--port"] == "4242"
    assert "--no-mmap" in found


def test_defaults_that_a_build_lacks_are_left_out(journal: Journal) -> None:
    """A build without --offline and --cache-ram starts without; its log needs no level 4."""
    build = fake_build(journal, faults="older")
    found = options_of(compose(build, CONFIG, ModelFiles(MODEL), KEY_FILE), build)
    assert not {"--offline", "--cache-ram", "--verbosity"} & set(found)
    assert found["--parallel"] == "1"


@pytest.mark.parametrize(
    ("of_config", "of_build"),
    [({"cache-ram": 64}, {}), ({}, {"cache-ram": 64}), ({"offline": True}, {})],
)
def test_options_that_were_asked_for_are_never_left_out(
    journal: Journal, of_config: dict[str, OptionValue], of_build: dict[str, OptionValue]
) -> None:
    """What config or build ask for and the build does not know is an error that names both."""
    build = fake_build(journal, faults="older", options=of_build)
    config = replace(CONFIG, options=of_config)
    name = next(iter(of_config or of_build))
    with pytest.raises(BuildError, match=f"config one: build b9000 has no option --{name}"):
        compose(build, config, ModelFiles(MODEL), KEY_FILE)


def test_options_are_checked_without_a_start(journal: Journal) -> None:
    """Nor a model: what a build lacks is known before anything waits for it."""
    build = fake_build(journal, faults="older")
    check_options(build, CONFIG)
    with pytest.raises(BuildError, match="config one: build b9000 has no option --cache-ram"):
        check_options(build, replace(CONFIG, options={"cache-ram": 64}))
    with pytest.raises(BuildError, match="config one: build b9000 has no option --spec-draft-mod"):
        check_options(build, replace(CONFIG, draft="small"))
    assert journal.starts() == []
    check_options(replace(build, url="http://127.0.0.1:1"), replace(CONFIG, options={"x": 1}))


def test_the_environment_is_scrubbed(
    journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of ours configures a server behind our back; the build's own variables stay."""
    for name in ("LLAMA_ARG_THREADS", "LLAMA_API_KEY", "GGML_CUDA", "AIP_MODE", "HF_TOKEN"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("XDG_CONFIG_HOME", "somewhere")
    monkeypatch.setenv("KEPT", "1")
    build = fake_build(journal, env={"GGML_CUDA_NO_PINNED": "1"})
    found = server_environment(build, tmp_path)
    kept = {"KEPT": "1", "GGML_CUDA_NO_PINNED": "1", "XDG_CONFIG_HOME": str(tmp_path)}
    assert {k: v for k, v in found.items() if os.environ.get(k) != v or k == "KEPT"} == kept
    assert not {k for k in found if k.startswith(("LLAMA_", "AIP_", "HF_TOKEN"))}


@pytest.mark.parametrize(
    ("leased", "told"),
    [(CARDS, ""), ((), ""), (CARDS[1:2], "GPU-1"), ((CARDS[2], CARDS[0]), "GPU-2,GPU-0")],
)
def test_a_server_sees_the_cards_of_its_lease(
    journal: Journal,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    leased: tuple[Gpu, ...],
    told: str,
) -> None:
    """By their ids, and only where there are more; the build's own choice wins over that."""
    monkeypatch.setattr(module, "gpus", lambda: CARDS)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    build = fake_build(journal)
    found = server_environment(build, tmp_path, leased)
    assert found["CUDA_VISIBLE_DEVICES"] == (told or "0,1,2")
    start = f"CUDA_VISIBLE_DEVICES={told} " if told else ""
    assert module.shown(build, ["a b", "c"], leased) == f"{start}'a b' c"
    own = fake_build(journal, env={"CUDA_VISIBLE_DEVICES": "0"})
    assert server_environment(own, tmp_path, leased)["CUDA_VISIBLE_DEVICES"] == "0"
    assert module.shown(own, ["c"], leased) == "c"


def test_a_started_server_has_the_cards_of_its_plan(
    tmp_path: Path, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It sees them, and its command says so, also where it does not start."""
    monkeypatch.setattr(module, "gpus", lambda: CARDS)
    plan = ServePlan(tmp_path / "run", timeout=PATIENCE, cards=CARDS[1:2])
    with start(fake_build(journal), CONFIG, ModelFiles(MODEL), plan) as server:
        assert server.shown_command.startswith("CUDA_VISIBLE_DEVICES=GPU-1 /")
        assert server.command[0].startswith("/")
    assert journal.entries("start")[0]["env"]["CUDA_VISIBLE_DEVICES"] == "GPU-1"
    with pytest.raises(ServerError, match="command: CUDA_VISIBLE_DEVICES=GPU-1 /"):
        start(fake_build(journal, faults="start-exit"), CONFIG, ModelFiles(MODEL), plan)


@pytest.mark.parametrize(
    ("gpu", "sides", "found"),
    [
        (True, ("here", None), (2, False)),
        (True, ("here", "url"), (2, False)),
        (True, ("url", "url"), (0, True)),
        (True, ("url", None), (0, True)),
        (False, ("here", None), (0, True)),
        (True, ("here", "moe"), (2, True)),
        (True, ("here", "picky"), (2, True)),
        (True, ("here", "boxed"), (2, True)),
    ],
)
def test_what_measuring_takes_of_the_machine(
    journal: Journal, *, gpu: bool, sides: tuple[str | None, ...], found: tuple[int, bool]
) -> None:
    """As the config says, where anything is started here; but builds have options as well.

    One with a variable of its own that chooses its GPUs may be on another's.
    """
    here = fake_build(journal)
    mine = {"CUDA_VISIBLE_DEVICES": "1"}
    boxed = Container(Engine(("docker",), podman=False), "id", env=tuple(mine.items()))
    known = {
        "here": here,
        "url": replace(here, url="http://127.0.0.1:1"),
        "moe": replace(here, options={"n-cpu-moe": 4}),
        "picky": replace(here, env=mine),
        "boxed": replace(here, container=boxed),
    }
    builds = [known[side] if side else None for side in sides]
    assert needs(replace(CONFIG, gpu=gpu, gpus=2), builds) == found


def test_a_server_gets_the_server_environment(
    tmp_path: Path, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the server itself sees; its configuration folder is an empty one of the run."""
    monkeypatch.setenv("LLAMA_ARG_PORT", "1")
    with fake_server(tmp_path):
        seen = journal.entries("start")[0]["env"]
    assert "LLAMA_ARG_PORT" not in seen
    home = Path(seen["XDG_CONFIG_HOME"])
    assert home.is_relative_to(tmp_path)
    assert list(home.iterdir()) == []


def test_a_started_server_is_known(tmp_path: Path, journal: Journal) -> None:
    """Pid, address, log, properties and load time of a server that is ready."""
    with fake_server(tmp_path) as server:
        assert server.pid == journal.entries("start")[0]["pid"]
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", server.url)
        assert "model buffer size" in server.log_text()
        assert server.props["default_generation_settings"] == {"n_ctx": 1024}
        assert server.load_ms is not None
        assert server.load_ms > 0
        assert server.alive()
    assert not server.alive()
    assert "model buffer size" in server.log_text()


def test_the_key_is_nobody_elses(tmp_path: Path, journal: Journal) -> None:
    """The key is in a file of ours alone, in no command, and gone after stop()."""
    with fake_server(tmp_path) as server:
        (key_file,) = (tmp_path / "run").glob("*.key")
        key = key_file.read_text("utf-8").strip()
        (seen,) = journal.entries("start")
        assert seen["key_mode"] == 0o600
        assert len(key) >= 32
        assert key not in server.shown_command
        assert key not in " ".join(seen["argv"])
        assert key not in " ".join(seen["env"].values())
        assert str(key_file) in server.shown_command
    server.stop()
    assert not key_file.exists()


def test_every_server_has_a_key_and_a_log_of_its_own(tmp_path: Path) -> None:
    """Two servers of one build and config do not share files, ports or keys."""
    with fake_server(tmp_path) as one, fake_server(tmp_path) as two:
        keys = {path.read_text("utf-8") for path in (tmp_path / "run").glob("*.key")}
        assert len(keys) == 2
        assert one.log != two.log
        assert one.url != two.url
        assert two.client.status("/props") == 200


def test_a_label_may_hold_what_a_file_name_may_not(tmp_path: Path, journal: Journal) -> None:
    """A build called `fork/x y` has its files in the run folder all the same."""
    build = replace(fake_build(journal), label="fork/x y")
    with start(build, CONFIG, ModelFiles(MODEL), ServePlan(tmp_path / "run")) as server:
        assert server.log is not None
        assert server.log.parent == tmp_path / "run"
        assert server.log.name.endswith("-fork_x_y-one.log")


def test_a_log_that_lies_there_is_not_taken_for_ours(
    journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process with the same run folder has numbered its logs from 1 as well."""
    monkeypatch.setattr(module, "_numbers", count(1))
    build, folder = fake_build(journal), tmp_path / "run"
    folder.mkdir()
    older = folder / f"001-{build.label}-{CONFIG.name}.log"
    older.write_text("listening on http://127.0.0.1:9 - starting\n", "utf-8")
    with start(build, CONFIG, ModelFiles(MODEL), ServePlan(folder, timeout=PATIENCE)) as server:
        assert server.log is not None
        assert server.log.name.startswith("002-")
    assert older.read_text("utf-8").endswith(":9 - starting\n")


def test_a_port_that_comes_in_two_writes_is_read_whole(tmp_path: Path) -> None:
    """A log that is read in the middle of the line with the address gives no wrong port."""
    with fake_server(tmp_path, "torn-line") as server:
        assert server.client.status("/health") == 200


def test_an_early_exit_is_told_at_once(tmp_path: Path, journal: Journal) -> None:
    """A server that ends while loading is told with exit code, command, log and its last lines."""
    with pytest.raises(ServerError, match="b9000 for config one ended before") as caught:
        launch(tmp_path, "start-exit", timeout=3600)
    text = str(caught.value)
    assert caught.value.kind == "start"
    assert "exit code 3" in text
    assert "    | error: failed to load model" in text
    assert "--ctx-size 1024" in text
    assert caught.value.log is not None
    assert str(caught.value.log) in text
    assert list((tmp_path / "run").glob("*.key")) == []
    assert goes(journal.entries("start")[0]["pid"])


@pytest.mark.parametrize(
    ("fault", "message", "logged", "announced"),
    [
        (
            "never-listens",
            r"b9000 for config one was not ready within 2\.2 s",
            "loading, and loading",
            "waiting for b9000 for config one: ",
        ),
        (
            "never-healthy",
            r"/health answered 503 for 2\.2 s",
            "server is listening on",
            "waiting for http://127.0.0.1:",
        ),
    ],
)
def test_a_server_that_is_never_ready_is_given_up(
    tmp_path: Path, fault: str, message: str, logged: str, announced: str
) -> None:
    """After two seconds the wait is announced; after the limit the server is stopped.

    The error has the end of its log.
    """
    said: list[str] = []
    journal = Journal(tmp_path / "journal")
    plan = ServePlan(tmp_path / "run", timeout=2.2, progress=said.append)
    with pytest.raises(ServerError, match=message) as caught:
        start(fake_build(journal, faults=fault), CONFIG, ModelFiles(MODEL), plan)
    assert caught.value.kind == "timeout"
    assert logged in str(caught.value)
    assert [text.startswith(announced) for text in said] == [True]
    assert list((tmp_path / "run").glob("*.key")) == []
    assert goes(journal.entries("start")[0]["pid"])


@pytest.mark.parametrize("fault", ["no-key", "odd-props"])
def test_a_foreign_server_is_refused(tmp_path: Path, fault: str, journal: Journal) -> None:
    """A server that takes any key, or is no llama-server, is not the one that was started."""
    with pytest.raises(ServerError, match="another server answers at http://127") as caught:
        launch(tmp_path, fault)
    assert caught.value.kind == "foreign"
    assert list((tmp_path / "run").glob("*.key")) == []
    assert goes(journal.entries("start")[0]["pid"])


@pytest.mark.parametrize("fault", ["dies-once-ready", "dies-of-props"])
def test_a_server_that_dies_once_ready_is_not_foreign(tmp_path: Path, fault: str) -> None:
    """It is told with its exit status, not as another server in its place."""
    with pytest.raises(ServerError, match="the server died: exit code 7") as caught:
        launch(tmp_path, fault)
    assert caught.value.kind == "crashed"


def test_a_hidden_config_file_is_an_error(tmp_path: Path) -> None:
    """A build that reads options from a file of the machine is not measured."""
    with pytest.raises(ServerError, match=r"read /etc/llama.cpp/config.ini: move it away"):
        launch(tmp_path, "config-file")


def test_a_program_that_cannot_start_leaves_no_key(tmp_path: Path, journal: Journal) -> None:
    """A build whose program has gone since its help was read is a ServerError."""
    program = tmp_path / "llama-server"
    program.write_text("#!/bin/sh\n" + " ".join(fake_build(journal).command) + ' "$@"\n', "utf-8")
    program.chmod(0o755)
    build = replace(fake_build(journal), command=(str(program),))
    compose(build, CONFIG, ModelFiles(MODEL), KEY_FILE)
    program.unlink()
    with pytest.raises(ServerError, match="llama-server: No such file"):
        start(build, CONFIG, ModelFiles(MODEL), ServePlan(tmp_path / "run"))
    assert list((tmp_path / "run").glob("*.key")) == []


def endpoint(url: str) -> Build:
    """A build that is a running server."""
    return Build("there", 0, "unknown", url, "", url=url)


def test_an_endpoint_is_connected_to_and_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A running server has no pid, log or load time, and outlives its use."""
    with fake_server(tmp_path) as running:
        (key_file,) = (tmp_path / "run").glob("*.key")
        monkeypatch.setenv("LLMPERF_API_KEY", key_file.read_text("utf-8").strip())
        with start(endpoint(running.url), CONFIG, ModelFiles(MODEL), ServePlan(tmp_path)) as server:
            assert (server.pid, server.log, server.load_ms) == (None, None, None)
            assert server.shown_command == f"(a running server: {running.url})"
            assert server.log_text() == ""
            assert server.alive()
        assert running.alive()
        assert running.client.status("/props") == 200


@pytest.mark.parametrize(
    ("faults", "message"),
    [("", "GET /props: HTTP 401"), ("no-key,odd-props", "answers /props, but not as llama")],
)
def test_an_endpoint_that_is_no_llama_server_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faults: str, message: str
) -> None:
    """Without the key, or with an answer of another shape, there is nothing to measure."""
    monkeypatch.delenv("LLMPERF_API_KEY", raising=False)
    monkeypatch.setattr("pytest_llmperf.serve.launch._prove_ours", lambda *_: {})
    with (
        fake_server(tmp_path, faults) as running,
        pytest.raises(ServerError, match=message),
    ):
        start(endpoint(running.url), CONFIG, ModelFiles(MODEL), ServePlan(tmp_path))


@pytest.mark.parametrize(
    ("content", "shown"),
    [
        (None, "    | (the log is empty)"),
        (b"", "    | (the log is empty)"),
        (b"one\ntwo\n\n", "    | one\n    | two"),
        (b"1\n2\n3\n4", "    | 2\n    | 3\n    | 4"),
        (b"\xff\n", "    | \ufffd"),
    ],
)
def test_the_end_of_a_log_is_shown(tmp_path: Path, content: bytes | None, shown: str) -> None:
    """The last lines, indented; a log that is not there counts as empty."""
    log = tmp_path / "log"
    if content is not None:
        log.write_bytes(content)
    assert tail(log, lines=3) == shown


def test_stopping_twice_is_stopping_once(tmp_path: Path) -> None:
    """stop() may be called by the user and again by the context manager."""
    with fake_server(tmp_path) as server:
        server.stop()
        assert not server.alive()


def test_a_server_that_has_no_memory_says_what_for(tmp_path: Path) -> None:
    """An error of its own: the buffer, its size, and what to change; then the log as ever."""
    with pytest.raises(OutOfMemoryError, match=r"^out of memory: CUDA0 model buffer of") as caught:
        launch(tmp_path, "start-oom")
    text = str(caught.value)
    assert (caught.value.what, caught.value.kind) == ("CUDA0 model buffer of 8984 MiB", "start")
    for told in ("raise n-cpu-moe", "b9000 for config one ended", "exit code 1", "--ctx-size 1024"):
        assert told in text
    assert "    | alloc_tensor_range: failed to allocate CUDA0 buffer of size 9420406784" in text


def test_memory_that_runs_out_in_a_request_is_told_as_such(tmp_path: Path) -> None:
    """Not as a crash of unknown cause."""
    with fake_server(tmp_path, "oom@2") as server:
        server.client.complete([1, 2], 2, "the first")
        with pytest.raises(OutOfMemoryError, match="CUDA0 buffer could not be") as caught:
            server.client.complete([1, 2], 2, "the second")
    assert caught.value.kind == "crashed"
    assert "the server died: killed by SIGABRT" in str(caught.value)


@pytest.mark.parametrize(("later", "memory"), [(Kills(1, 1, 0, 0), True), (NO_KILLS, False)])
def test_a_kill_is_told_apart_by_the_kernels_counters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, later: Kills, *, memory: bool
) -> None:
    """The OOM killer's is a lack of memory, somebody's is not."""
    monkeypatch.setattr(process, "before", lambda: Before(NO_KILLS, 1000.0))
    monkeypatch.setattr(process, "kills", lambda: later)
    with fake_server(tmp_path) as server:
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
        with pytest.raises(ServerError, match=r"killed by SIGKILL \(exit 137: ") as caught:
            server.client.complete([1, 2], 2, "the first")
    text = str(caught.value)
    assert isinstance(caught.value, OutOfMemoryError) == memory
    assert ("the kernel's OOM killer: the machine was out of memory" in text) == memory
    assert ("1000 MiB were free on the host before it started" in text) == memory
    assert ("somebody's kill" in text) != memory
