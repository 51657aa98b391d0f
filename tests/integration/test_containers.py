"""Builds in container images, run by a real engine: docker or podman.

They need a ``llama-server`` (``LLMPERF_TEST_SERVER``) to make an image of, and an engine that
answers; ``LLMPERF_CONTAINER`` and ``LLMPERF_CONTAINER_RUN`` say how it is run on this machine.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from support.project import Project, command_lines

from pytest_llmperf.build.build import Build
from pytest_llmperf.build.engine import OWNER, USE, Engine, find_engine, owner
from pytest_llmperf.build.resolve import resolve
from pytest_llmperf.build.spec import parse_spec
from pytest_llmperf.errors import BuildError, ServerError
from pytest_llmperf.models.synth import make_model
from pytest_llmperf.plan.config import BuildEntry, Config, ModelFiles
from pytest_llmperf.plan.model import SynthSpec
from pytest_llmperf.serve.launch import ServePlan, start
from pytest_llmperf.settings import read_containers

pytestmark = pytest.mark.tools

SCRIPT = Path(__file__).parents[2] / "scripts" / "container_image.sh"
# The image would give every server these, unasked.
IMAGE_ENV = ("LLAMA_ARG_HOST=0.0.0.0", "LLAMA_ARG_CACHE_TYPE_K=q8_0")
CONFIG = Config("one", "tiny", {"threads": 1, "ctx-size": 512})
LONG = """
import pytest

@pytest.mark.llmperf(configs=["one"], workloads=["long"])
def test_decode(speed):
    speed.gate("decode_tps")
"""


@dataclass(frozen=True)
class Image:
    """An image of a real llama-server under two names, and what runs it."""

    engine: Engine
    name: str
    other: str
    id: str

    def build(self, *run: str, program: str = "") -> Build:
        """Return the build in it, run with further flags."""
        entry = BuildEntry("boxed", f"docker:{self.name}", run=run, program=program)
        return resolve(parse_spec("boxed", {"boxed": entry}, Path.cwd()), Path(), print)

    def ours(self, *filters: str) -> list[str]:
        """Return the names of the containers of this image."""
        flags = [part for one in (f"ancestor={self.id}", *filters) for part in ("--filter", one)]
        return self.engine.says("ps", "--all", "--format", "{{.Names}}", *flags).stdout.split()

    def serving(self, project: Project) -> list[str]:
        """Return the names of the containers that serve, once a request has come."""
        logs = (project.path / ".llmperf" / "latest").glob("*.log")
        busy = any("processing task" in log.read_text("utf-8") for log in logs)
        return self.ours(f"label={USE}=serve") if busy else []


@pytest.fixture(scope="module")
def image(real_server: Path) -> Iterator[Image]:
    """An image of the real llama-server; skips where no engine can run it."""
    try:
        engine = find_engine(read_containers(lambda _name: None, os.environ).engine)
    except BuildError as error:
        pytest.skip(str(error))
    name = f"localhost/pytest-llmperf-test:{os.getpid()}"
    other = f"localhost/pytest-llmperf-other:{os.getpid()}"
    words = {"LLMPERF_CONTAINER": " ".join(engine.command)}
    made = subprocess.run(
        [str(SCRIPT), str(real_server), name, *IMAGE_ENV],
        env={**os.environ, **words},
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    try:
        engine.says("tag", name, other)
        told = engine.says("image", "inspect", "--format", "{{.Id}}", name).stdout.strip()
        found = Image(engine, name, other, told.removeprefix("sha256:"))
        try:
            found.build()
        except BuildError as error:
            # Whoever names an engine wants to see it work.
            if "cannot run it" not in str(error) or "LLMPERF_CONTAINER" in os.environ:
                raise
            pytest.skip(str(error))
        yield found
    finally:
        engine.says("rmi", "--force", name, other)


@pytest.fixture
def boxed(image: Image, project: Project) -> Iterator[Project]:
    """A project whose build under test is in the image; no container is left behind."""
    ini = project.path / "tox.ini"
    spec = f"llmperf_build = docker:{image.name}"
    ini.write_text(ini.read_text("utf-8").replace("llmperf_build = embedded", spec), "utf-8")
    yield project
    assert image.ours() == []


@pytest.fixture
def model(shared_cache: Path) -> Path:
    """The small model that the projects use."""
    return make_model(SynthSpec(), shared_cache / "models")


def until(condition: Callable[[], object], seconds: float = 60.0) -> bool:
    """Return whether a condition comes true in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.1)
    return bool(condition())


def inspect(image: Image, name: str) -> dict[str, Any]:
    """Return all that the engine tells of a container."""
    found = json.loads(image.engine.says("container", "inspect", name).stdout)[0]
    assert isinstance(found, dict)
    return found


def long_run(project: Project, *arguments: str) -> subprocess.Popen[str]:
    """Start a run whose one request takes its time."""
    project.lengthen()
    project.write("test_suite.py", LONG)
    return subprocess.Popen(
        [sys.executable, "-m", "pytest", *arguments],
        cwd=project.path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_container_is_a_build_like_any_other(
    boxed: Project, image: Image, real_server: Path
) -> None:
    """It has the numbers of the same program outside, whatever the image's environment says."""
    done = boxed.run(f"--baseline={real_server}", "-k", "buffers")
    assert done.code == 0, done.text
    [result] = done.results
    assert {one["outcome"] for one in result["verdicts"]} == {"PASS"}
    new, base = result["new"]["build"], result["base"]["build"]
    assert new["sha256"] == image.id
    assert new["source"] == f"docker:{image.name}"
    assert (new["number"], new["commit"]) == (base["number"], base["commit"])


def test_speed_and_memory_are_recorded(boxed: Project) -> None:
    """A baseline holds the container's speed, and the memory of its process on this machine."""
    boxed.write(
        "test_suite.py",
        """
        import pytest

        @pytest.mark.llmperf(configs=["one"], workloads=["w"])
        def test_all(speed, memory):
            speed.gate("decode_tps", "ttft_ms")

        @pytest.mark.llmperf(configs=["one"])
        def test_memory(memory):
            memory.gate("rss_mib", "kv_mib")
        """,
    )
    done = boxed.run("--update-baselines")
    assert done.code == 0, done.text
    [path] = boxed.baseline_files()
    results = json.loads(path.read_text("utf-8"))["results"]
    assert results["one/launch"]["rss_mib"]["value"] > 5
    assert len(results["one/w"]["decode_tps"]["launches"]) == 2


def test_two_names_of_one_image_are_one_build(image: Image) -> None:
    """A gate between them would measure noise, and says so."""
    one, other = image.build(), replace(image, name=image.other).build()
    assert one.source != other.source
    assert one.identity == other.identity


def test_an_image_that_is_not_here_is_not_pulled(boxed: Project) -> None:
    """Exit 4, and the command that fetches it."""
    done = boxed.run("--llmperf-build=docker:localhost/no/such:1", "--update-baselines")
    assert done.code == 4
    assert "pull localhost/no/such:1" in done.text


def test_another_program_is_named_where_the_entry_point_is_none(image: Image) -> None:
    """What is no llama-server is an error that says where to name one."""
    assert image.build(program="/app/llama-server").number == image.build().number
    with pytest.raises(BuildError, match=r"/app/none does not answer --version .* program = "):
        image.build(program="/app/none")


@pytest.mark.parametrize("network", [(), ("--network=host",)])
def test_a_server_is_shown_its_files_alone(
    image: Image, tmp_path: Path, model: Path, network: tuple[str, ...]
) -> None:
    """Links are followed, files are read-only, the key is nowhere to be read, the port is local."""
    odd = tmp_path / "a, b"
    odd.mkdir()
    (odd / "link.gguf").symlink_to(os.path.relpath(model, odd))
    plan = ServePlan(tmp_path / "run")
    build = image.build(*network)
    with start(build, CONFIG, ModelFiles(odd / "link.gguf"), plan) as server:
        assert server.url.startswith("http://127.0.0.1:")
        assert server.props["model_path"] == "/models/0/link.gguf"
        [name] = image.ours()
        told = inspect(image, name)
        assert {one["RW"] for one in told["Mounts"]} == {False}
        assert server.pid == told["State"]["Pid"]
        assert Path(f"/proc/{server.pid}/comm").read_text("utf-8").strip() == "llama-server"
        [key_file] = (tmp_path / "run" / "keys").glob("*.key")
        key = key_file.read_text("utf-8").strip()
        assert key not in json.dumps(told)
        assert key not in " ".join(server.command)
        assert (tmp_path / "run" / "keys").stat().st_mode & 0o077 == 0
        addresses = {
            one["HostIp"]
            for ports in (told["NetworkSettings"]["Ports"] or {}).values()
            for one in ports or ()
        }
        assert addresses <= {"127.0.0.1"}
    assert image.ours() == []
    assert not key_file.exists()


def test_a_limit_of_memory_is_named(image: Image, tmp_path: Path, model: Path) -> None:
    """A server that the limit of its container ends says how much it had."""
    build = image.build("--memory=24m", "--memory-swap=24m")
    config = replace(CONFIG, options={"threads": 1, "ctx-size": 200_000})
    with pytest.raises(ServerError, match="24 MiB") as caught:
        start(build, config, ModelFiles(model), ServePlan(tmp_path / "run"))
    assert caught.value.kind == "start"
    assert image.ours() == []


def test_a_killed_run_takes_its_container_along(boxed: Project, image: Image) -> None:
    """SIGKILL of pytest in mid-measurement ends and removes the container."""
    with long_run(boxed, "--update-baselines") as run:
        try:
            assert until(lambda: image.serving(boxed)), "the container should be up"
        finally:
            run.send_signal(signal.SIGKILL)
    assert until(lambda: not image.ours()), image.ours()
    # The supervisor goes last.
    path = str(boxed.path)
    assert until(lambda: not any(path in line for line in command_lines()))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("kill", "killed by SIGKILL (exit 137"),
        ("remove", "its container was removed by somebody else while it ran"),
    ],
)
def test_a_container_that_ends_in_mid_run_fails_the_test(
    boxed: Project, image: Image, how: str, said: str
) -> None:
    """The failure tells what became of the container."""
    with long_run(boxed, "--update-baselines") as run:
        try:
            assert until(lambda: image.serving(boxed)), "the container should be up"
            [name] = image.serving(boxed)
            if how == "kill":
                image.engine.says("kill", name)
            else:
                image.engine.remove(name)
            text, _ = run.communicate(timeout=60)
        finally:
            run.kill()
    assert run.returncode == 1, text
    assert said in text


def test_what_a_killed_run_left_is_removed_by_the_next(image: Image) -> None:
    """Only containers whose owner is gone are removed, not those of a run that goes on."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    dead = replace(owner(), pid=gone.pid, start="1")
    gone.wait()
    for name, one in (("dead", dead), ("alive", owner())):
        made = image.engine.says(
            *("create", "--name", f"llmperf-{name}", "--label", f"{OWNER}={one}", image.name)
        )
        assert made.returncode == 0, made.stderr
    try:
        image.build()
        assert image.ours() == ["llmperf-alive"]
    finally:
        image.engine.remove("llmperf-alive", "llmperf-dead")


def test_a_pass_by_the_tool_is_not_to_be_had(boxed: Project) -> None:
    """A container shows its server alone; a pass that insists on the tool says so."""
    boxed.write(
        "suites/llmperf.toml",
        """
        [models.tiny]
        synth = {}

        [configs.one]
        model = "tiny"
        options = { threads = 1, ctx-size = 512 }

        [passes.short]
        corpus = "quality.txt"
        context = 64
        chunks = 4
        path = "tool"
        """,
    )
    boxed.write(
        "test_suite.py",
        """
        import pytest

        @pytest.mark.llmperf(configs=["one"], passes=["short"])
        def test_answers(quality):
            quality.gate("ppl", "kld_mean")
        """,
    )
    done = boxed.run("--update-baselines")
    assert done.code == 1
    assert "has no llama-perplexity" in done.text
