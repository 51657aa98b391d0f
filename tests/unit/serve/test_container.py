"""Servers in containers: what they are shown, that they end, and how that is told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
from support.engines import IMAGE, FakeEngine, fake_engine
from support.fakes import CONFIG, PATIENCE, eventually, goes, running

from pytest_llmperf.build.build import Build
from pytest_llmperf.build.container import Container
from pytest_llmperf.build.engine import OWNER, Engine, owner
from pytest_llmperf.build.resolve import resolve
from pytest_llmperf.build.spec import parse_spec
from pytest_llmperf.errors import BuildError, ModelError, ServerError
from pytest_llmperf.measure.host import is_ours
from pytest_llmperf.plan.config import BuildEntry, ModelFiles
from pytest_llmperf.plan.options import OptionValue
from pytest_llmperf.serve import launch
from pytest_llmperf.serve.container import box, boxed_by, check_signals, how_it_ended
from pytest_llmperf.serve.launch import ServePlan, Server, start

DOCKER = Container(Engine(("docker",), podman=False), "id")
HOST = replace(DOCKER, run=("--network=host",))
START = """
import os, sys, time
from pathlib import Path
from pytest_llmperf.build.resolve import resolve
from pytest_llmperf.build.spec import parse_spec
from pytest_llmperf.plan.config import Config, ModelFiles
from pytest_llmperf.serve.launch import ServePlan, start
build = resolve(parse_spec(sys.argv[1], {}, Path("/")), Path("/cache"), print)
folder = Path(sys.argv[2])
server = start(build, Config("one", "m", {}), ModelFiles(folder / "m.gguf"), ServePlan(folder))
print(server.pid, flush=True)
time.sleep(600)
"""


def build_of(engine: FakeEngine, *run: str) -> Build:
    """Return the build in a fake engine's image, on the host's network."""
    entry = BuildEntry("own", f"docker:{IMAGE}")
    spec = parse_spec("own", {"own": entry}, Path("/"))
    return resolve(spec, Path("/cache"), print, engine.containers("--network=host", *run))


def started(engine: FakeEngine, folder: Path) -> Server:
    """Start a server in a container of a fake engine."""
    model = folder / "m.gguf"
    model.touch()
    plan = ServePlan(folder / "run", timeout=PATIENCE, hang=PATIENCE)
    return start(build_of(engine), CONFIG, ModelFiles(model), plan)


def mounts(command: tuple[str, ...]) -> dict[str, str]:
    """Return the sources of mounts by destination."""
    lines = [after for one, after in pairwise(command) if one == "--mount"]
    fields = [dict(field.partition("=")[::2] for field in line.split(",")) for line in lines]
    assert all("readonly" in one for one in fields)
    return {one["destination"]: one["source"] for one in fields}


# -- what it is shown -------------------------------------------------------------------------


def test_each_file_is_shown_under_its_own_name(tmp_path: Path) -> None:
    """Files of one folder stay together, those of another apart; nothing else is shown."""
    for name in ("a/main.gguf", "a/draft.gguf", "b/main.gguf", "a/other.gguf", "key"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    a, b = tmp_path / "a", tmp_path / "b"
    files = ModelFiles(a / "main.gguf", a / "draft.gguf", b / "main.gguf")
    boxed = box(DOCKER, files, {}, tmp_path / "key", gpu=False)
    assert mounts(boxed.command) == {
        "/models/0/main.gguf": str(a / "main.gguf"),
        "/models/0/draft.gguf": str(a / "draft.gguf"),
        "/models/1/main.gguf": str(b / "main.gguf"),
        str(boxed.key_file): str(tmp_path / "key"),
    }
    assert boxed.files(files) == ModelFiles(
        Path("/models/0/main.gguf"), Path("/models/0/draft.gguf"), Path("/models/1/main.gguf")
    )


def test_variables_are_told_to_it(tmp_path: Path) -> None:
    """Before the user's own flags, which win."""
    (tmp_path / "m.gguf").touch()
    (tmp_path / "key").touch()
    container = replace(DOCKER, run=("--env", "CUDA_VISIBLE_DEVICES=2"))
    files, env = ModelFiles(tmp_path / "m.gguf"), {"CUDA_VISIBLE_DEVICES": "GPU-1,GPU-2"}
    words = box(container, files, {}, tmp_path / "key", gpu=True, env=env).command
    told = [after for one, after in pairwise(words) if one == "--env"]
    assert told[-2:] == ["CUDA_VISIBLE_DEVICES=GPU-1,GPU-2", "CUDA_VISIBLE_DEVICES=2"]


@pytest.mark.parametrize("pid", [1, 99_999_999])
def test_what_is_no_container_of_ours_has_no_owner(pid: int) -> None:
    """Nor what is not there."""
    assert boxed_by(pid) is None


def test_links_are_followed_and_parts_lie_beside_each_other(tmp_path: Path) -> None:
    """As in a cache of models, where each part is a link to a file with a hash for a name."""
    names = [f"m-0000{number}-of-00002.gguf" for number in (1, 2)]
    for index, name in enumerate(names):
        (tmp_path / f"blob{index}").touch()
        (tmp_path / name).symlink_to(f"blob{index}")
    (tmp_path / "key").touch()
    first = tmp_path / names[0]
    boxed = box(DOCKER, ModelFiles(first), {}, tmp_path / "key", gpu=False)
    shown = mounts(boxed.command)
    assert shown[f"/models/0/{names[0]}"] == str(tmp_path / "blob0")
    assert shown[f"/models/0/{names[1]}"] == str(tmp_path / "blob1")
    (tmp_path / names[1]).unlink()
    with pytest.raises(ModelError, match="1 of 2 parts are missing"):
        box(DOCKER, ModelFiles(first), {}, tmp_path / "key", gpu=False)


def test_files_that_options_name_are_shown_too(tmp_path: Path) -> None:
    """By absolute path; other values stay as they are."""
    for name in ("m.gguf", "lora.gguf", "chat.jinja", "key"):
        (tmp_path / name).touch()
    options: dict[str, OptionValue] = {
        "lora": (str(tmp_path / "lora.gguf"), "/nowhere"),
        "chat-template-file": str(tmp_path / "chat.jinja"),
        "api-prefix": "/v1",
        "threads": 2,
    }
    files = ModelFiles(tmp_path / "m.gguf")
    boxed = box(DOCKER, files, options, tmp_path / "key", gpu=False)
    assert boxed.options(options) == {
        "lora": ("/models/0/lora.gguf", "/nowhere"),
        "chat-template-file": "/models/0/chat.jinja",
        "api-prefix": "/v1",
        "threads": 2,
    }


def test_a_file_is_found_however_its_path_is_spelt(tmp_path: Path) -> None:
    """It is shown once, and each way to write it is told where it is."""
    for name in ("m.gguf", "lora.gguf", "key"):
        (tmp_path / name).touch()
    spelt = (f"{tmp_path}//lora.gguf", f"{tmp_path}/./lora.gguf", str(tmp_path / "lora.gguf"))
    options: dict[str, OptionValue] = {"lora": spelt, "chat-template": "/" + "x" * 300}
    boxed = box(DOCKER, ModelFiles(tmp_path / "m.gguf"), options, tmp_path / "key", gpu=False)
    assert boxed.options(options) == {**options, "lora": ("/models/0/lora.gguf",) * 3}
    assert boxed.command.count("--mount") == 3


@pytest.mark.parametrize(
    ("port", "published"), [(0, "127.0.0.1::8080"), (4242, "127.0.0.1:4242:8080")]
)
def test_the_port_is_published_on_loopback(tmp_path: Path, port: int, published: str) -> None:
    """Inside it listens on all addresses of a network of its own."""
    boxed = box(DOCKER, ModelFiles(tmp_path), {}, tmp_path, gpu=False, port=port)
    assert boxed.command[boxed.command.index("--publish") + 1] == published
    assert (boxed.host, boxed.port) == ("0.0.0.0", 8080)  # noqa: S104 - the expectation


def test_on_the_hosts_network_the_server_itself_listens_on_loopback(tmp_path: Path) -> None:
    """Nothing is published there."""
    boxed = box(HOST, ModelFiles(tmp_path), {}, tmp_path, gpu=False)
    assert "--publish" not in boxed.command
    assert (boxed.host, boxed.port) == ("127.0.0.1", 0)


def test_no_two_containers_have_one_name(tmp_path: Path) -> None:
    """Names say whose they are."""
    names = {box(HOST, ModelFiles(tmp_path), {}, tmp_path, gpu=False).name for _ in range(5)}
    assert len(names) == 5
    assert all(name.startswith(f"llmperf-{os.getpid()}-") for name in names)


@pytest.mark.parametrize("gpu", [True, False])
def test_only_a_config_with_a_gpu_gets_one(tmp_path: Path, gpu: bool) -> None:  # noqa: FBT001 - the case
    """The others run on machines without."""
    container = replace(DOCKER, gpu=("--gpus", "all"))
    boxed = box(container, ModelFiles(tmp_path), {}, tmp_path, gpu=gpu)
    assert ("--gpus" in boxed.command) is gpu


# -- running ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["docker", "podman"])
def test_a_server_in_a_container_is_served_and_removed(tmp_path: Path, kind: str) -> None:
    """Its process is known, its work is ours, its key is in a folder of ours alone."""
    engine = fake_engine(tmp_path / "e", kind)
    server = started(engine, tmp_path)
    [name] = engine.left()
    with server:
        assert server.client.get("/props")
        assert server.pid is not None
        assert server.pid is not None
        assert is_ours(server.pid)
        assert boxed_by(server.pid) == os.getpid()
        labels = json.loads((engine.state / f"{name}.container").read_text("utf-8"))["labels"]
        assert labels[OWNER] == str(owner())
        [key] = (tmp_path / "run" / "keys").iterdir()
        assert key.read_text("utf-8").strip() not in server.shown_command
        assert key.stat().st_mode & 0o777 == 0o444
        assert key.parent.stat().st_mode & 0o777 == 0o700
    assert engine.left() == []
    assert goes(server.pid)
    assert not key.exists()


def test_a_process_of_another_namespace_is_not_taken_for_the_servers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A number that means another process here is worse than none."""
    monkeypatch.setattr("pytest_llmperf.serve.container._is_ours", lambda _pid, _key: False)
    with started(fake_engine(tmp_path / "e"), tmp_path) as server:
        assert server.pid is None


def test_a_container_that_the_engine_cannot_start_is_told(tmp_path: Path) -> None:
    """With what the engine said, in the log."""
    engine = fake_engine(tmp_path / "e")
    engine.fail("start")
    with pytest.raises(ServerError, match="could not make the container") as caught:
        started(engine, tmp_path)
    assert "the device is busy" in str(caught.value)
    assert caught.value.kind == "start"


def test_a_container_outlives_neither_its_killed_client(tmp_path: Path) -> None:
    """As with docker, where the client is nobody's parent."""
    engine = fake_engine(tmp_path / "e")
    with started(engine, tmp_path) as server:
        assert server.pid is not None
        client = psutil.Process(server.pid).parent()
        assert client is not None
        client.kill()
        assert eventually(lambda: not engine.left())
        assert goes(server.pid)
        assert not server.alive()


def test_nor_its_killed_supervisor(tmp_path: Path) -> None:
    """Then stopping the server removes it, from this process."""
    engine = fake_engine(tmp_path / "e")
    with started(engine, tmp_path) as server:
        assert server.pid is not None
        process = server._process
        assert process is not None
        process._supervisor.kill()
        assert eventually(lambda: not server.alive())
        assert running(server.pid)
    assert engine.left() == []
    assert goes(server.pid)


def test_nor_a_killed_run(tmp_path: Path) -> None:
    """SIGKILL of the process that started it."""
    engine = fake_engine(tmp_path / "e")
    (tmp_path / "m.gguf").touch()
    env = {
        **os.environ,
        "LLMPERF_CONTAINER": " ".join(engine.command),
        "LLMPERF_CONTAINER_RUN": "--network=host",
    }
    with subprocess.Popen(
        [sys.executable, "-c", START, f"docker:{IMAGE}", str(tmp_path)],
        env=env,
        stdout=subprocess.PIPE,
        text=True,
    ) as run:
        try:
            assert run.stdout is not None
            pid = int(run.stdout.readline())
            assert running(pid)
        finally:
            run.send_signal(signal.SIGKILL)
    assert eventually(lambda: not engine.left())
    assert goes(pid)


def test_a_server_that_dies_is_told_by_its_containers_state(tmp_path: Path) -> None:
    """The client's own exit code says less."""
    engine = fake_engine(tmp_path / "e")
    with started(engine, tmp_path) as server:
        assert server.pid is not None
        os.kill(server.pid, signal.SIGSEGV)
        assert eventually(lambda: not server.alive())
        with pytest.raises(ServerError, match=r"killed by SIGSEGV \(exit 139\)"):
            server.client.get("/props")


def test_a_death_is_told_however_long_the_engine_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the next request would find a dead server, and be blamed for it."""
    monkeypatch.setattr(launch, "_DEATH", 0.5)
    engine = fake_engine(tmp_path / "e")
    with started(engine, tmp_path) as server:
        engine.fail("slow")
        assert server.pid is not None
        os.kill(server.pid, signal.SIGSEGV)
        with pytest.raises(ServerError, match=r"killed by SIGSEGV \(exit 139\)") as caught:
            server.client.get("/props")
        assert caught.value.kind == "crashed"
        assert not server.alive()


def test_a_removed_container_is_told(tmp_path: Path) -> None:
    """Not as a crash of the server."""
    engine = fake_engine(tmp_path / "e")
    with started(engine, tmp_path) as server:
        [name] = engine.left()
        subprocess.run([*engine.command, "rm", name], check=True)
        assert eventually(lambda: not server.alive())
        with pytest.raises(ServerError, match="removed by somebody else while it ran"):
            server.client.get("/props")


# -- how it ended -----------------------------------------------------------------------------


def state(**told: object) -> str:
    """Return what an engine tells of a container that ran."""
    return json.dumps({"StartedAt": "2026-01-01T00:00:00Z", "Running": False, **told})


@pytest.mark.parametrize(
    ("status", "code", "told", "said"),
    [
        (0, 0, state(ExitCode=0) + " 0", "exit code 0"),
        (1, 0, state(ExitCode=1) + " 0", "exit code 1"),
        (139, 0, state(ExitCode=139) + " 0", "killed by SIGSEGV (exit 139)"),
        (
            137,
            0,
            state(ExitCode=137) + " 0",
            "killed by SIGKILL (exit 137: out of memory, or somebody's kill)",
        ),
        (
            137,
            0,
            state(ExitCode=137) + f" {24 * 2**20}\n",
            (
                "killed by SIGKILL (exit 137: out of memory, or somebody's kill); its container "
                "may use 24 MiB of memory"
            ),
        ),
        (
            137,
            0,
            state(ExitCode=137, OOMKilled=True) + f" {24 * 2**20}",
            "killed: out of memory (container limit of 24 MiB)",
        ),
        (137, 0, state(OOMKilled=True) + " 0", "killed: out of memory (container limit)"),
        (
            -9,
            0,
            state(Running=True) + " 0",
            (
                "the container engine's client ended (killed by SIGKILL (exit 137: out of memory, "
                "or somebody's kill)), its container ran on"
            ),
        ),
        (
            125,
            0,
            json.dumps({"StartedAt": "0001-01-01T00:00:00Z", "Error": "port is taken"}) + " 0",
            "the container engine could not start the container (exit code 125): port is taken",
        ),
        (
            127,
            0,
            json.dumps({"StartedAt": "0001-01-01T00:00:00Z"}) + " 0",
            "the container engine could not start the container (exit code 127)",
        ),
        (
            125,
            1,
            "Error: no such container x",
            "the container engine could not make the container (exit code 125)",
        ),
        (
            137,
            1,
            "Error response from daemon: No such container: x",
            "its container was removed by somebody else while it ran",
        ),
        (
            1,
            1,
            "Cannot connect to the Docker daemon.\n",
            (
                "exit code 1; the container engine does not tell how its container ended: Cannot "
                "connect to the Docker daemon."
            ),
        ),
        (3, 0, "nonsense", "exit code 3; its container's state cannot be read: nonsense"),
    ],
)
def test_an_end_is_told_in_words(status: int, code: int, told: str, said: str) -> None:
    """From the client's exit status and the engine's answer."""
    assert how_it_ended(status, code, told) == said


@pytest.mark.parametrize("pid", [None, 2**22 + 1])
def test_a_process_that_cannot_be_stopped_cannot_be_slowed_down(pid: int | None) -> None:
    """Calibration with it would find no slowdown, and blame the verdicts."""
    check_signals("b1", os.getpid())
    with pytest.raises(BuildError, match="b1: its server cannot be slowed down"):
        check_signals("b1", pid)
