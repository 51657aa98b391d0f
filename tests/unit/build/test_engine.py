"""Finding a container engine, and telling what a killed run left from what goes on."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.engines import fake_engine, install

from pytest_llmperf.build import engine as module
from pytest_llmperf.build.engine import (
    OWNER,
    USE,
    Engine,
    Owner,
    find_engine,
    is_left,
    owner,
    started,
)
from pytest_llmperf.errors import BuildError


@pytest.fixture(autouse=True)
def fresh() -> None:
    """Look for engines anew in each test."""
    module._find.cache_clear()


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder on PATH, and empty."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def test_docker_comes_first(tmp_path: Path, programs: Path) -> None:
    """Where both answer, docker is taken."""
    install(fake_engine(tmp_path / "a", "podman"), programs)
    install(fake_engine(tmp_path / "b", "docker"), programs)
    assert find_engine(()) == Engine(("docker",), podman=False)


def test_a_docker_client_without_an_engine_leaves_podman(tmp_path: Path, programs: Path) -> None:
    """A client alone runs nothing."""
    docker = fake_engine(tmp_path / "b", "docker")
    docker.fail("down")
    install(docker, programs)
    install(fake_engine(tmp_path / "a", "podman"), programs)
    assert find_engine(()) == Engine(("podman",), podman=True)


def test_podman_may_answer_to_the_name_of_docker(tmp_path: Path, programs: Path) -> None:
    """What counts is who it says it is, since flags differ."""
    engine = fake_engine(tmp_path / "a", "podman")
    install(engine, programs).rename(programs / "docker")
    assert find_engine(()).podman


def test_without_an_engine_the_error_says_what_each_lacks(tmp_path: Path, programs: Path) -> None:
    """One line, with what to install or start."""
    docker = fake_engine(tmp_path / "b", "docker")
    docker.fail("down")
    install(docker, programs)
    with pytest.raises(BuildError, match="no container engine answers") as caught:
        find_engine(())
    text = str(caught.value)
    assert "`docker version` says: Is it running?" in text
    assert "podman is not on PATH" in text
    assert "LLMPERF_CONTAINER" in text
    assert "\n" not in text


def test_a_given_command_is_taken_with_its_flags(tmp_path: Path) -> None:
    """Global flags come before every subcommand."""
    engine = fake_engine(tmp_path / "a", "podman")
    assert find_engine(engine.command) == Engine(engine.command, podman=True)


@pytest.mark.parametrize("down", [True, False])
def test_a_given_command_that_does_not_answer_is_an_error(tmp_path: Path, down: bool) -> None:  # noqa: FBT001 - the case
    """No other engine is tried in its place."""
    engine = fake_engine(tmp_path / "a")
    engine.fail("down")
    command = engine.command if down else ("no-such-engine", "--flag")
    with pytest.raises(BuildError, match=r"does not answer: .*LLMPERF_CONTAINER"):
        find_engine(command)


def test_the_engine_gets_no_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its environment is scrubbed like a server's."""
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("LLAMA_ARG_CTX_SIZE", "1")
    engine = fake_engine(tmp_path / "a")
    find_engine(engine.command)
    assert all(not {"HF_TOKEN", "LLAMA_ARG_CTX_SIZE"} & env.keys() for env in engine.environments())


def test_an_owner_that_lives_is_not_gone() -> None:
    """This process is alive."""
    assert not is_left(str(owner()), running=True)


@pytest.mark.parametrize("running", [True, False])
def test_an_owner_that_ended_is_gone(running: bool) -> None:  # noqa: FBT001 - the case
    """A process id that nobody has any more."""
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        dead = replace(owner(), pid=child.pid, start=started(child.pid))
    assert is_left(str(dead), running=running)


def test_a_process_id_used_again_is_another_process() -> None:
    """Same number, another start."""
    assert is_left(str(replace(owner(), start="1")), running=True)


@pytest.mark.parametrize(
    "other",
    [replace(owner(), user=os.getuid() + 1), replace(owner(), namespace="1")],
    ids=["user", "namespace"],
)
def test_owners_that_cannot_be_seen_are_left_alone(other: Owner) -> None:
    """Another user's, and those of another PID namespace."""
    assert not is_left(str(replace(other, pid=2**22 + 1)), running=True)


def test_of_another_boot_only_what_does_not_run_is_left() -> None:
    """What runs there is another machine's, seen through a shared engine."""
    before = str(replace(owner(), boot="0"))
    assert is_left(before, running=False)
    assert not is_left(before, running=True)


@given(st.text(max_size=60))
def test_any_other_label_is_left_alone(text: str) -> None:
    """What we did not write tells nothing."""
    assert not is_left(text, running=False)


def test_only_what_is_left_is_removed(tmp_path: Path) -> None:
    """Containers of living owners and of others stay."""
    fake = fake_engine(tmp_path / "a")
    fake.add("dead", {OWNER: str(replace(owner(), start="1"))})
    fake.add("alive", {OWNER: str(owner())})
    fake.add("foreign", {"com.example.owner": "me"})
    engine = find_engine(fake.command)
    assert engine.reap() == ("dead",)
    assert fake.left() == ["alive", "foreign"]
    assert engine.reap() == ()


def test_containers_are_removed_by_all_labels(tmp_path: Path) -> None:
    """One label alone is not enough."""
    fake = fake_engine(tmp_path / "a")
    fake.add("asked", {OWNER: str(owner()), USE: "ask"})
    fake.add("serving", {OWNER: str(owner()), USE: "serve"})
    find_engine(fake.command).remove_all(owner=str(owner()), use="ask")
    assert fake.left() == ["serving"]


@pytest.mark.parametrize(("kind", "at_once"), [("docker", False), ("podman", True)])
def test_removing_does_not_wait(tmp_path: Path, kind: str, at_once: bool) -> None:  # noqa: FBT001 - the expectation
    """Podman would ask a server to stop, and wait for ten seconds."""
    command = find_engine(fake_engine(tmp_path / "a", kind).command).removing("one")
    assert ("--time" in command) is at_once
    assert command[-1] == "one"
