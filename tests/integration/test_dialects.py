"""A config in the newest names on builds of eleven months: each takes it, or says what it lacks.

The embedded build and the wheel that other tests install are asked always. Other wheels are asked
where they lie in the cache, and programs where ``LLMPERF_TEST_BUILDS`` lists their paths.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import platformdirs
import pytest

from pytest_llmperf.build.ask import scrubbed_environment
from pytest_llmperf.build.build import Build
from pytest_llmperf.build.dialect import _CAME, Dialect, dialect_of
from pytest_llmperf.build.resolve import resolve
from pytest_llmperf.build.spec import parse_spec
from pytest_llmperf.errors import BuildError
from pytest_llmperf.plan.config import Config, ModelFiles
from pytest_llmperf.plan.options import OptionValue, parse_help
from pytest_llmperf.plan.suite import Suite, load_suite
from pytest_llmperf.serve.launch import ServePlan, Server, start

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "data"
MODEL = ROOT / "pytest_llmperf" / "data" / "tiny-quality.gguf"
PATIENCE_S = 60.0
NO_OPTION = "--no-option-of-any-build"
"""Options are read one after the other, so who complains of this one has taken those before it."""

WHEELS = {
    "b7827": "0.2.10",
    "b7964": "0.2.11",
    "b8156": "0.2.12",
    "b8352": "0.2.13",
    "b8672": "2026.4.8672",
    "b10229": "2026.8.10229",
}
INSTALLED = "b8156"
"""The one wheel that is installed where it is not at hand: other tests do so, too."""

PROGRAMS = [path for path in os.environ.get("LLMPERF_TEST_BUILDS", "").split(os.pathsep) if path]
AT_HAND = [
    pytest.param("embedded", id="embedded"),
    *(pytest.param(label, id=label) for label in WHEELS),
    pytest.param("tools", id="tools", marks=pytest.mark.tools),
    *(pytest.param(path, id=f"program{number}") for number, path in enumerate(PROGRAMS)),
]

# No wheel up to b8672 lets anyone say where tensors go; llama-server of that time does.
PLACES = {"n-cpu-moe": "", "override-tensor": ""}
LACKING: Mapping[str, Mapping[str, str]] = {
    "b7827": PLACES | {"spec-type": ": it came after b7827, with b7964 at the latest"},
    "b7964": PLACES,
    "b8156": PLACES,
    "b8352": PLACES,
    "b8672": PLACES,
    "49bfdde": {},
    "b10001": {},
    "b10229": {},
    "b11434": {},
    "b11549": {},
}
"""What the configs of the suite need and a build lacks, and how its error goes on."""

RENAMED: Mapping[str, OptionValue] = {
    "threads": 1,
    "ctx-size": 768,
    "fit": "on",
    "cache-type-k": "q8_0",
    "cache-type-v": "q8_0",
    "flash-attn": "on",
    "load-mode": "none",
}
DRAFTING: Mapping[str, OptionValue] = {
    "spec-type": "ngram-simple",
    "spec-ngram-simple-size-n": 4,
    "spec-ngram-simple-size-m": 6,
}
TEXT = "The quick brown fox jumps over the lazy dog. " * 12


def installed(wheel: str, shared_cache: Path) -> Path | None:
    """Return the cache in which a wheel lies for this interpreter, None if in none."""
    name = f"xllamacpp-{wheel}-{sys.implementation.cache_tag}-{sys.platform}-{os.uname().machine}"
    caches = (shared_cache, Path(platformdirs.user_cache_dir("pytest-llmperf")))
    return next((cache for cache in caches if (cache / "builds" / name).is_dir()), None)


@pytest.fixture(scope="module", params=AT_HAND)
def build(request: pytest.FixtureRequest, shared_cache: Path) -> Build:
    """One build after the other."""
    name, cache = str(request.param), shared_cache
    if name == "embedded":
        pytest.importorskip("xllamacpp")
    elif name == "tools":
        name = str(request.getfixturevalue("real_server"))
    elif name in WHEELS:
        found = installed(WHEELS[name], shared_cache)
        if found is None and name != INSTALLED:
            pytest.skip(f"the wheel of {name} is in no cache: gate against it once")
        name, cache = f"pypi:xllamacpp=={WHEELS[name]}", found or shared_cache
    return resolve(parse_spec(name, {}, Path.cwd()), cache, print)


@pytest.fixture(scope="module")
def suite() -> Suite:
    """The suite file of the repository."""
    return load_suite(ROOT / "suites" / "llmperf.toml")


def resolved(dialect: Dialect, suite: Suite) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Return the arguments of each config, and by lacking option how the error goes on."""
    taken: dict[str, list[str]] = {}
    lacking: dict[str, str] = {}
    for config in suite.configs.values():
        try:
            taken[config.name] = dialect.arguments(config.options)
        except BuildError as error:
            option, goes_on = named(str(error), dialect.build)
            lacking[option] = goes_on
    asked = {name for config in suite.configs.values() for name in config.options}
    assert set(lacking) <= asked
    return taken, lacking


def named(error: str, build: str) -> tuple[str, str]:
    """Return the option that an error names, and how it goes on; it has to name the build."""
    said = re.fullmatch(r"build (\S+) has no option --([\w-]+)(.*)", error)
    assert said is not None, error
    assert said[1] == build
    return said[2], said[3]


def complaint(build: Build, arguments: list[str]) -> str:
    """Return what a build's program says of arguments, and then of one that is none."""
    done = subprocess.run(
        [*build.command, *arguments, NO_OPTION],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
        env=scrubbed_environment(build.env),
    )
    assert done.returncode == 1, done
    return done.stdout + done.stderr


def test_every_config_is_taken_or_names_what_the_build_lacks(build: Build, suite: Suite) -> None:
    """What comes out of a config the build's own program accepts, every option and value."""
    dialect = dialect_of(build)
    taken, lacking = resolved(dialect, suite)
    if build.label in LACKING:
        assert lacking == LACKING[build.label]
    plain = [part for one in taken.values() if not _of_a_fork(one) for part in one]
    said = complaint(build, plain)
    assert f"invalid argument: {NO_OPTION}" in said, said


def test_a_value_of_a_fork_is_the_builds_to_refuse(build: Build, suite: Suite) -> None:
    """KV types are passed on as they are, and a build that has no such type says so."""
    taken, _ = resolved(dialect_of(build), suite)
    of_a_fork = {name: one for name, one in taken.items() if _of_a_fork(one)}
    assert set(of_a_fork) == {
        "m5-turbo3",
        "m5-turbo4",
        "m5-q8-turbo4",
        "m5-q8-turbo3",
        "m5-f16-turbo4",
    }
    said = complaint(build, of_a_fork["m5-q8-turbo4"])
    assert "--cache-type-v" in said
    assert "turbo4" in said
    assert NO_OPTION not in said


def _of_a_fork(arguments: list[str]) -> bool:
    return any(part.startswith("turbo") for part in arguments)


@pytest.mark.parametrize("label", ["49bfdde", "b10001", "b11434"])
def test_recorded_help_will_do(label: str, suite: Suite) -> None:
    """The same of programs that are not at hand everywhere, from what their help said."""
    dialect = recorded(label)
    taken, lacking = resolved(dialect, suite)
    assert lacking == LACKING[label]
    known = {name for option in dialect.options for name in option.names}
    flags = {part for one in taken.values() for part in one if part.startswith("--")}
    assert flags - known == set()


def recorded(label: str) -> Dialect:
    """Return the dialect of a build whose help is kept with the tests."""
    options = parse_help((DATA / f"help-{label}.txt").read_text("utf-8"))
    return Dialect(label, tuple(option for option in options if not option.removed))


@pytest.mark.parametrize(("label", "number"), [("b10001", 10001), ("b11434", 11434)])
def test_recorded_help_came_when_it_is_said(label: str, number: int) -> None:
    """As below, of builds that are not at hand everywhere."""
    check_came(recorded(label), number)


def test_options_came_when_it_is_said(build: Build) -> None:
    """A build before an option came lacks it, and one after that has it."""
    if build.number == 0:
        pytest.skip(f"{build.label} does not tell its number")
    check_came(dialect_of(build), build.number)


def check_came(dialect: Dialect, number: int) -> None:
    """Hold what is said of when options came against a build."""
    for name, (without, first) in _CAME.items():
        if not without < number < first:
            assert dialect.supports(name) is (number >= first), name


def test_the_drafting_of_a_model_has_a_name_of_its_time(build: Build) -> None:
    """``draft-simple`` was ``draft``, and was asked for by naming a model only, before that."""
    dialect = dialect_of(build)
    if not dialect.offers("spec-type", "draft-simple"):
        assert build.label in {"b7827", "49bfdde"}
        return
    said = complaint(build, dialect.arguments({"spec-type": "draft-simple"}))
    assert f"invalid argument: {NO_OPTION}" in said, said


def started(build: Build, options: Mapping[str, OptionValue], folder: Path) -> Server:
    """Start a build's server with these options."""
    config = Config("newest", "tiny-quality", options)
    return start(build, config, ModelFiles(MODEL), ServePlan(folder, timeout=PATIENCE_S))


def test_newest_names_start_every_build(build: Build, tmp_path: Path) -> None:
    """A server is healthy, and does what the options say that have another name there.

    What came later is named before a start: config, option, build and since when.
    """
    drafts = dialect_of(build).supports("spec-type")
    if not drafts:
        with pytest.raises(BuildError) as caught:
            started(build, {**RENAMED, **DRAFTING}, tmp_path)
        assert str(caught.value) == (
            f"config newest: build {build.label} has no option --spec-type: "
            "it came after b7827, with b7964 at the latest"
        )
        assert list(tmp_path.glob("*.log")) == []
    with started(build, {**RENAMED, **(DRAFTING if drafts else {})}, tmp_path) as server:
        assert server.client.status("/health") == 200
        props = server.client.get("/props")
        assert props["default_generation_settings"]["n_ctx"] == 768
        log = server.log_text()
        # Neither of the two sizes of the cache in a log is told without the type.
        assert re.search(r"K \(q8_0\).*V \(q8_0\)", log), log
        # Weights of a file that is mapped lie in a buffer of that name.
        assert "CPU_Mapped model buffer size" not in log
        assert "model buffer size" in log
        reply = server.client.complete(server.client.tokenize(TEXT), 48, "a draft")
    if drafts:
        assert reply.draft_n
        assert server.command.count("ngram-simple") == 1


def test_a_mapped_model_is_asked_for_by_its_name_of_the_time(build: Build, tmp_path: Path) -> None:
    """The contrary of the above, so that the log can tell the one from the other."""
    with started(build, {**RENAMED, "load-mode": "mmap"}, tmp_path) as server:
        assert server.client.status("/health") == 200
        assert "CPU_Mapped model buffer size" in server.log_text()
