"""Images as builds: what is known of them, and the commands that run them."""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.engines import ID, IMAGE, FakeEngine, fake_engine

from pytest_llmperf.build import ask
from pytest_llmperf.build.build import Build
from pytest_llmperf.build.container import Container, container_of, gpu_flags, mount
from pytest_llmperf.build.devices import devices_command, devices_of
from pytest_llmperf.build.dialect import dialect_of
from pytest_llmperf.build.engine import OWNER, Engine, find_engine, owner
from pytest_llmperf.build.resolve import resolve
from pytest_llmperf.build.spec import parse_spec
from pytest_llmperf.errors import BuildError
from pytest_llmperf.plan.config import BuildEntry

DOCKER = Engine(("docker",), podman=False)
PODMAN = Engine(("podman", "--storage-driver=vfs"), podman=True)
OWN = BuildEntry("own", f"docker:{IMAGE}")


def found(engine: FakeEngine, entry: BuildEntry = OWN, *run: str) -> Build:
    """Return the build in a fake engine's image."""
    spec = parse_spec(entry.name, {entry.name: entry}, Path("/"))
    return resolve(spec, Path("/cache"), print, engine.containers(*run))


def following(command: Sequence[str], flag: str) -> list[str]:
    """Return the arguments that follow a flag, each time it is there."""
    return [after for one, after in pairwise(command) if one == flag]


# -- identity ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["docker", "podman"])
def test_an_image_is_a_build(tmp_path: Path, kind: str) -> None:
    """Its number is its program's, its hash the image's id, its source the spec."""
    build = found(fake_engine(tmp_path / "e", kind))
    assert (build.label, build.number, build.commit) == ("b9000", 9000, "0a1b2c3")
    assert (build.source, build.sha256) == (f"docker:{IMAGE}", ID)
    assert build.note == ""


def test_two_names_of_one_image_are_one_build(tmp_path: Path) -> None:
    """The command names the image's id, so that a tag cannot move in the middle of a run."""
    engine = fake_engine(tmp_path / "e")
    images = engine.state / "images.json"
    images.write_text(images.read_text("utf-8").replace(IMAGE, "other:tag"), "utf-8")
    other = found(engine, replace(OWN, source="docker:other:tag"))
    one = found(fake_engine(tmp_path / "f"))
    assert other.container is not None
    assert one.container is not None
    assert other.container.image == one.container.image == f"sha256:{ID}"
    again = replace(other, command=one.command)
    assert again.identity == one.identity


@pytest.mark.parametrize(
    "entry",
    [
        replace(OWN, run=("--cpus=2",)),
        replace(OWN, program="/app/other"),
        replace(OWN, env={"A": "b"}),
    ],
)
def test_an_image_run_otherwise_is_another_build(tmp_path: Path, entry: BuildEntry) -> None:
    """It has a label of its own, to be recorded and compared."""
    engine = fake_engine(tmp_path / "e")
    assert found(engine, entry).label == "b9000+own"
    assert found(engine, entry).identity != found(engine).identity


def test_limits_are_conditions(tmp_path: Path) -> None:
    """In either way to write them; what shows devices and folders is none, nor is the program."""
    engine = fake_engine(tmp_path / "e")
    run = ("--network=host", "--memory", "8g", "--device", "/dev/dri", "--cpus=2")
    entry = replace(OWN, run=run, program="/app/other", env={"A": "b"})
    assert found(engine, entry).conditions == {"env": "A=b", "run": "--cpus=2 --memory=8g"}
    assert found(engine).conditions == {}


def test_the_digest_of_the_registry_is_told(tmp_path: Path) -> None:
    """The one of the image's own name, where it has several."""
    mine = f"ghcr.io/ggml-org/llama.cpp@sha256:{'1' * 64}"
    engine = fake_engine(tmp_path / "e", digests=[f"mirror/x@sha256:{'2' * 64}", mine])
    assert mine in found(engine).describe()


def test_an_image_that_is_not_here_is_not_pulled(tmp_path: Path) -> None:
    """The error says what to type."""
    engine = fake_engine(tmp_path / "e")
    with pytest.raises(
        BuildError, match=r"^docker:nothing:1: the image is not here: `.* pull nothing:1`$"
    ):
        found(engine, replace(OWN, source="docker:nothing:1"))
    assert engine.calls("pull") == []


def test_an_entry_point_that_is_no_server_is_named(tmp_path: Path) -> None:
    """With what it said, and the key that names the program."""
    command = [sys.executable, "-c", "print('Unknown command: --version'); raise SystemExit(1)"]
    engine = fake_engine(tmp_path / "e", command=command)
    with pytest.raises(
        BuildError, match=r"entry point /app/llama-server does not .*Unknown command.*program = "
    ):
        found(engine)


@pytest.mark.parametrize("code", [125, 126])
def test_an_engine_that_cannot_run_it_is_no_fault_of_the_program(tmp_path: Path, code: int) -> None:
    """The engine's own exit codes ask for flags, not for another program."""
    fail = f"import sys; sys.stderr.write('Error: rlimit type 7'); sys.exit({code})"
    engine = fake_engine(tmp_path / "e", command=[sys.executable, "-c", fail])
    with pytest.raises(BuildError, match=rf"{code}: Error: rlimit type 7\): flags that .*_RUN$"):
        found(engine)


def test_what_ends_well_without_a_version_is_no_server(tmp_path: Path) -> None:
    """An exit code of 0 proves nothing."""
    engine = fake_engine(tmp_path / "e", command=[sys.executable, "-c", "print('hello')"])
    with pytest.raises(BuildError, match=r"\(exit code 0: hello\)"):
        found(engine)


def test_a_program_that_does_not_start_without_a_driver_gets_the_gpu(tmp_path: Path) -> None:
    """It is asked again with the GPUs, and has them from then on."""
    script = tmp_path / "program.py"
    # The engine is asked once without, once with the flag of the GPUs.
    script.write_text(
        "import sys, pathlib\n"
        f"calls = pathlib.Path({str(tmp_path / 'e' / 'calls')!r}).read_text().splitlines()\n"
        "if '--gpus' not in calls[-1]: sys.exit('libcuda.so.1: cannot open')\n"
        "print('version: 9000 (0a1b2c3)')\n",
        "utf-8",
    )
    build = found(fake_engine(tmp_path / "e", command=[sys.executable, str(script)]))
    assert build.number == 9000
    assert build.container is not None
    assert "--gpus" in build.container.asking()


@pytest.mark.parametrize("flag", ["--name=x", "-d", "--detach", "--rm", "--restart=always", "-it"])
def test_flags_that_are_ours_are_refused(tmp_path: Path, flag: str) -> None:
    """They would take the server out of our hands."""
    with pytest.raises(BuildError, match=r"is not for the flags of run"):
        found(fake_engine(tmp_path / "e"), OWN, flag)


# -- commands ---------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", [DOCKER, PODMAN])
def test_a_question_is_asked_in_a_throwaway_container(engine: Engine) -> None:
    """Without network, pull or GPU, and gone afterwards; the user's flags stand last."""
    command = Container(
        engine, "id", run=("--ulimit", "nofile=9:9"), gpu=("--gpus", "all")
    ).asking()
    assert command[: len(engine.command) + 1] == (*engine.command, "run")
    assert {"--rm", "--network=none", "--pull=never", "--cap-drop=ALL"} <= set(command)
    assert command[-3:] == ("--ulimit", "nofile=9:9", "id")
    assert f"{OWNER}={owner()}" in command
    assert "--gpus" not in command


def test_a_question_about_devices_is_asked_with_the_gpus() -> None:
    """Only then, since an engine without NVIDIA's toolkit refuses the flag."""
    container = Container(DOCKER, "id", gpu=("--gpus", "all"))
    assert following(container.asking(gpu=True), "--gpus") == ["all"]


def test_a_network_of_the_users_is_kept() -> None:
    """Where only the host's network works, questions are asked there."""
    for run in (("--network=host",), ("--net", "host")):
        container = Container(DOCKER, "id", run=run)
        assert container.network == "host"
        assert "--network=none" not in container.asking()


def test_a_server_keeps_its_container_until_it_was_looked_at() -> None:
    """No `--rm`; a name of its own; an entry point only if one is named."""
    command = Container(DOCKER, "id", program="/app/llama-server").serving("one", ["-p"], gpu=False)
    assert "--rm" not in command
    assert following(command, "--name") == ["one"]
    assert command[-3:] == ("--entrypoint", "/app/llama-server", "id")
    assert "--entrypoint" not in Container(DOCKER, "id").serving("one", [], gpu=False)


def test_variables_of_the_image_that_configure_the_server_are_taken_away() -> None:
    """Docker unsets what is named without a value, podman has a flag; the build's own stay."""
    unset, env = ("LLAMA_ARG_HOST", "GGML_X"), (("GGML_X", "1"), ("A", "b"))
    docker = Container(DOCKER, "id", unset=unset, env=env).asking()
    assert following(docker, "--env") == [
        "LLAMA_ARG_HOST",
        "XDG_CONFIG_HOME=/nonexistent",
        "GGML_X=1",
        "A=b",
    ]
    podman = Container(PODMAN, "id", unset=unset, env=env).asking()
    assert following(podman, "--unsetenv") == ["LLAMA_ARG_HOST"]
    assert following(podman, "--env") == ["XDG_CONFIG_HOME=/nonexistent", "GGML_X=1", "A=b"]


def test_the_image_tells_which_variables_those_are(tmp_path: Path) -> None:
    """By the same beginnings as on the host."""
    env = ["PATH=/bin", "LLAMA_ARG_HOST=0.0.0.0", "GGML_X=1", "AIP_MODE=p", "CUDA_VERSION=12"]
    container = found(fake_engine(tmp_path / "e", env=env)).container
    assert container is not None
    assert container.unset == ("LLAMA_ARG_HOST", "GGML_X", "AIP_MODE")


def test_nothing_of_our_environment_goes_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Podman would hand on the address of a proxy, which may hold a password."""
    monkeypatch.setenv("HTTPS_PROXY", "http://user:secret@proxy")
    command = Container(PODMAN, "id").asking()
    assert "--http-proxy=false" in command
    assert not any("secret" in part for part in command)


def test_labels_of_files_are_let_be_where_there_is_selinux(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the user's models would not be readable inside."""
    assert "--security-opt=label=disable" not in Container(PODMAN, "id").asking()
    monkeypatch.setattr(Path, "exists", lambda _self: True)
    assert "--security-opt=label=disable" in Container(PODMAN, "id").asking()


@pytest.mark.parametrize(
    ("engine", "visible", "flags"),
    [
        (DOCKER, None, ("--gpus", "all")),
        (DOCKER, "0,2", ("--gpus", '"device=0,2"')),
        (DOCKER, " 1 , -1, 2", ("--gpus", '"device=1"')),
        (DOCKER, "", ()),
        (DOCKER, "-1", ()),
        (PODMAN, None, ("--device", "nvidia.com/gpu=all")),
        (
            PODMAN,
            "0,GPU-8f",
            ("--device", "nvidia.com/gpu=0", "--device", "nvidia.com/gpu=GPU-8f"),
        ),
    ],
)
def test_gpus_are_those_that_cuda_would_see(
    engine: Engine, visible: str | None, flags: tuple[str, ...]
) -> None:
    """All, or the ones of CUDA_VISIBLE_DEVICES up to one that is none."""
    assert gpu_flags(engine, (), visible) == flags


@pytest.mark.parametrize("run", [("--device", "/dev/dri"), ("--gpus=1",), ("--device=/dev/kfd",)])
def test_devices_that_the_user_names_stand_alone(run: tuple[str, ...]) -> None:
    """Another maker's GPU is no NVIDIA one."""
    assert gpu_flags(DOCKER, run, None) == ()


def test_cuda_visible_devices_of_the_build_count_inside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then all GPUs are shown, and the variable chooses."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    engine = fake_engine(tmp_path / "e")
    own = found(engine, replace(OWN, env={"CUDA_VISIBLE_DEVICES": "0"})).container
    ours = found(engine).container
    assert own is not None
    assert ours is not None
    assert own.gpu == ("--gpus", "all")
    assert ours.gpu == ("--gpus", '"device=1"')


@given(st.text(st.characters(exclude_characters="\0\r\n", codec="utf-8"), min_size=1))
def test_any_path_survives_the_flag_of_a_mount(name: str) -> None:
    """Commas and quotes are part of names."""
    flag, value = mount(Path("/models") / name.replace("/", "_"), "/models/0/x")
    [fields] = csv.reader([value])
    assert flag == "--mount"
    assert fields[1] == f"source={Path('/models') / name.replace('/', '_')}"
    assert fields[-1] == "readonly"


@pytest.mark.parametrize(
    ("text", "last"),
    [
        ("", "no output"),
        ("one\n two \n\n", "two"),
        ("docker: the device is busy\n\nRun 'docker run --help' for more information\n", "busy"),
        ("See 'docker run --help'.", "See 'docker run --help'."),
    ],
)
def test_what_docker_says_of_its_help_is_not_the_error(text: str, last: str) -> None:
    """The line before it is."""
    assert ask.last_line(text).endswith(last)


# -- asking -----------------------------------------------------------------------------------


def test_help_and_devices_are_asked_inside(tmp_path: Path) -> None:
    """As of any build; the build's variables go in by flag, not to the engine's client."""
    engine = fake_engine(tmp_path / "e")
    build = found(engine, replace(OWN, env={"LD_LIBRARY_PATH": "/inside"}))
    assert dialect_of(build).supports("ctx-size")
    assert [device.id for device in devices_of(build)] == ["CUDA0"]
    assert devices_command(build)[-1] == "--list-devices"
    assert "--gpus" in engine.calls("run")[-1]
    assert all(env.get("LD_LIBRARY_PATH") != "/inside" for env in engine.environments())
    assert engine.left() == []


def test_gpus_that_cannot_be_given_are_told_with_a_mend(tmp_path: Path) -> None:
    """The engine's own words, the flags, and what to do."""
    fail = (
        "import sys; '--list-devices' in sys.argv and sys.exit('no driver'); "
        "print('version: 9 (a)')"
    )
    build = found(fake_engine(tmp_path / "e", command=[sys.executable, "-c", fail]))
    with pytest.raises(BuildError, match=r"no driver \(asked with --gpus all: install NVIDIA's"):
        devices_of(build)


def test_a_question_without_an_end_leaves_no_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client is killed, and what it started as well."""
    monkeypatch.setattr(ask, "_TIMEOUT", 1.0)
    engine = fake_engine(
        tmp_path / "e", command=[sys.executable, "-c", "import time; time.sleep(600)"]
    )
    with pytest.raises(BuildError, match="cannot run `--version`"):
        found(engine)
    assert engine.left() == []


def test_what_an_earlier_run_left_is_removed_first(tmp_path: Path) -> None:
    """It would hold memory that is to be measured."""
    engine = fake_engine(tmp_path / "e")
    engine.add("dead", {OWNER: str(replace(owner(), start="1"))})
    found(engine)
    assert engine.left() == []


def test_an_image_without_config_is_an_image(tmp_path: Path) -> None:
    """Fields that are null tell nothing."""
    engine = fake_engine(tmp_path / "e")
    (engine.state / "images.json").write_text(
        f'{{"{IMAGE}": {{"Id": "{ID}", "RepoDigests": null, "Config": null}}}}', "utf-8"
    )
    found = container_of(
        find_engine(engine.command), IMAGE, run=(), program="", env={}, visible=None
    )
    assert (found.digest, found.unset) == ("", ())
