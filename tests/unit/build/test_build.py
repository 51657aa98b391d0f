"""What a build is called, and what tells two of them apart."""

from __future__ import annotations

import dataclasses
import hashlib
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_llmperf.build.build import Build, hash_files, parse_build_info, parse_version

BUILD = Build(
    label="b8156",
    number=8156,
    commit="3769fe6eb",
    source="pypi:xllamacpp==0.2.12",
    sha256="0123456789abcdef",
    command=("/opt/llama-server",),
)
COMMITS = st.from_regex(r"[0-9a-f]{7,40}", fullmatch=True)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("version: 9093 (49bfdde)\nbuilt with cc (Debian 12.2.0) 12.2.0\n", (9093, "49bfdde")),
        ("version: 0.6.0-dev (build 11434, commit 0a1b2c3)\n", (11434, "0a1b2c3")),
        ("ggml_cuda_init: found 1 CUDA devices:\nversion: 9093 (49bfdde)\n", (9093, "49bfdde")),
        ("version: 1 (49bfdde)\n", (0, "49bfdde")),
        ("version: 0.6.0 (build 1, commit 0a1b2c3)\n", (0, "0a1b2c3")),
        ("version: 0 (unknown)\n", (0, "unknown")),
        ("llama-server: hello\n", (0, "unknown")),
        ("", (0, "unknown")),
    ],
)
def test_number_and_commit_are_read_in_either_shape(text: str, found: tuple[int, str]) -> None:
    """A shallow clone counts one commit, so its number 1 says nothing."""
    assert parse_version(text) == found


@given(st.integers(2, 10**6), COMMITS)
def test_both_shapes_tell_the_same(number: int, commit: str) -> None:
    """A build is called the same before and after the shape changed."""
    old = parse_version(f"version: {number} ({commit})\n")
    new = parse_version(f"version: 0.6.0-dev (build {number}, commit {commit})\n")
    assert old == new == parse_build_info(f"b{number}-{commit}") == (number, commit)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("b11434-0a1b2c3", (11434, "0a1b2c3")),
        (" 11434-0a1b2c3\n", (11434, "0a1b2c3")),
        ("b1-0a1b2c3", (0, "0a1b2c3")),
        ("b0-unknown", (0, "unknown")),
        ("b11434", (0, "unknown")),
        ("None", (0, "unknown")),
        ("", (0, "unknown")),
    ],
)
def test_build_info_is_read(text: str, found: tuple[int, str]) -> None:
    """As a running server tells it; anything else is unknown, not an error."""
    assert parse_build_info(text) == found


# -- hashes -----------------------------------------------------------------------------------


def write(folder: Path, **files: str) -> list[Path]:
    """Write files of these names (`__` for a slash) and contents; return their paths."""
    paths = []
    for name, content in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, "utf-8")
        paths.append(path)
    return paths


def test_a_hash_stays_the_same(tmp_path: Path) -> None:
    """It is kept in baselines: a change would make builds look rebuilt."""
    parts = b"a\0" + hashlib.sha256(b"1").digest() + b"b\0" + hashlib.sha256(b"2").digest()
    expected = hashlib.sha256(parts).hexdigest()
    assert hash_files(write(tmp_path, b="2", a="1")) == expected


@given(st.permutations(["bin__llama-server", "bin__libggml.so", "lib__libggml.so", "lib__x.so"]))
def test_the_order_of_the_files_does_not_count(
    tmp_path_factory: pytest.TempPathFactory, order: list[str]
) -> None:
    """Not even where two files of one name differ."""
    folder = tmp_path_factory.getbasetemp() / "order"
    contents = {name: name for name in sorted(order)}
    expected = hash_files(write(folder, **contents))
    assert hash_files(write(folder, **{name: name for name in order})) == expected


def test_the_folder_does_not_count(tmp_path: Path) -> None:
    """The same build at another place is the same build."""
    assert hash_files(write(tmp_path, here__a="1")) == hash_files(write(tmp_path, there__a="1"))


@pytest.mark.parametrize("other", [{"a": "1", "b": "3"}, {"a": "1", "c": "2"}, {"a": "1"}])
def test_names_and_contents_count(tmp_path: Path, other: dict[str, str]) -> None:
    """A changed byte, another name or a missing file is another build."""
    one = hash_files(write(tmp_path / "one", a="1", b="2"))
    assert hash_files(write(tmp_path / "two", **other)) != one


# -- identity ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"sha256": "fedcba"},
        {"command": ("/other/llama-server",)},
        {"url": "http://127.0.0.1:1"},
        {"options": {"threads": 2}},
        {"env": {"GGML_CUDA_DISABLE_GRAPHS": "1"}},
    ],
)
def test_what_changes_what_runs_changes_the_identity(change: dict[str, object]) -> None:
    """One program with two sets of options is two builds to compare."""
    assert dataclasses.replace(BUILD, **change).identity != BUILD.identity  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change", [{"label": "mine"}, {"source": "embedded"}, {"note": "x"}, {"number": 0}]
)
def test_names_do_not_change_the_identity(change: dict[str, object]) -> None:
    """A program does not differ from itself by being called something else."""
    assert dataclasses.replace(BUILD, **change).identity == BUILD.identity  # type: ignore[arg-type]


def test_the_order_of_options_does_not_change_the_identity() -> None:
    """Options and environment are compared as sets; the identity can be hashed."""
    names = ["threads", "ctx-size", "parallel"]
    builds = []
    for seed in range(3):
        random.Random(seed).shuffle(names)  # noqa: S311 - an order, not a secret
        builds.append(dataclasses.replace(BUILD, options=dict.fromkeys(names, 1)))
    assert len({build.identity for build in builds}) == 1


# -- for people -------------------------------------------------------------------------------


def test_a_build_is_described_in_one_line() -> None:
    """Label, number, commit, source and the beginning of the hash."""
    assert BUILD.describe() == (
        "b8156 (build 8156, commit 3769fe6eb, pypi:xllamacpp==0.2.12, sha256 0123456789ab)"
    )


def test_what_a_build_does_not_know_is_left_out() -> None:
    """An endpoint has no hash, and may know neither number nor commit."""
    url = "http://127.0.0.1:8080"
    build = Build("endpoint", 0, "unknown", url, "", url=url)
    assert build.describe() == "endpoint (build number unknown, http://127.0.0.1:8080)"


def test_conditions_are_what_a_build_adds() -> None:
    """Variables in the order of their names; where its libraries lie is none."""
    assert BUILD.conditions == {}
    env = {"B": "2", "LD_LIBRARY_PATH": "/opt", "A": "1"}
    assert dataclasses.replace(BUILD, env=env).conditions == {"env": "A=1 B=2"}
