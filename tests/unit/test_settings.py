"""One frozen value out of command line, ini file and environment."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_llmperf.errors import PlanError
from pytest_llmperf.metrics import METRICS
from pytest_llmperf.settings import Containers, Settings, default_foreign_load, read_settings

ROOT = Path("/project")
HERE = Path("/project/sub")
CACHE = Path("/cache")


def read(
    options: dict[str, object] | None = None,
    ini: dict[str, object] | None = None,
    environment: dict[str, str] | None = None,
) -> Settings:
    """Return the settings of a run; names go without ``llmperf_``.

    What is not given is as pytest has it: None for an option, ``""`` or ``[]`` for an ini value.
    """
    lists = ("llmperf_models", "llmperf_tolerances")
    given_options = {f"llmperf_{name}": value for name, value in (options or {}).items()}
    given_ini = {f"llmperf_{name}": value for name, value in (ini or {}).items()}
    return read_settings(
        option=given_options.get,
        ini=lambda name: given_ini.get(name, [] if name in lists else ""),
        environment=environment or {},
        root=ROOT,
        invoked_from=HERE,
        cache=CACHE,
    )


def test_without_anything_the_defaults_hold() -> None:
    """No baseline, no report; three launches and three pairs."""
    assert read() == Settings(
        baseline=None,
        update=False,
        build=None,
        suite=ROOT / "suites/llmperf.toml",
        models=(),
        strict=False,
        report=None,
        budget=300.0,
        machine=None,
        baselines=ROOT / "baselines",
        cache=CACHE,
        root=ROOT,
        tolerances={},
        launches=3,
        pairs=3,
        foreign_load=default_foreign_load(),
        pass_limit=4 * 3600.0,
    )


@pytest.mark.parametrize("name", ["baseline", "build"])
def test_the_command_line_wins_over_the_ini_file(name: str) -> None:
    """A name or spec is taken as it is written."""
    assert getattr(read({name: "given"}, {name: "configured"}), name) == "given"
    assert getattr(read({}, {name: "configured"}), name) == "configured"


def test_the_budget_of_the_command_line_wins() -> None:
    """In seconds; 0 is a budget, too."""
    assert read({"budget": "0"}, {"budget": "60"}).budget == 0.0
    assert read({}, {"budget": "60.5"}).budget == 60.5


def test_a_path_from_the_command_line_is_relative_to_where_pytest_was_called() -> None:
    """As a shell completes it."""
    settings = read({"suite": "my.toml", "report": "out", "models": ["a", "/b"]})
    assert settings.suite == HERE / "my.toml"
    assert settings.report == HERE / "out"
    assert settings.models == (HERE / "a", Path("/b"))


def test_a_path_from_the_ini_file_is_relative_to_the_root() -> None:
    """Wherever pytest is called."""
    settings = read({}, {"suite": "my.toml", "baselines": "kept", "models": ["a", "/b"]})
    assert settings.suite == ROOT / "my.toml"
    assert settings.baselines == ROOT / "kept"
    assert settings.models == (ROOT / "a", Path("/b"))


def test_a_path_may_begin_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """From each of the three sources."""
    monkeypatch.setenv("HOME", "/home/someone")
    home = Path("/home/someone")
    settings = read(
        {"suite": "~/s.toml", "report": "~/out", "models": ["~/m"]},
        {"baselines": "~/b", "models": ["~/n"]},
        {"LLMPERF_CACHE": "~/c", "LLMPERF_MODELS": "~/o"},
    )
    assert settings.suite == home / "s.toml"
    assert settings.report == home / "out"
    assert settings.baselines == home / "b"
    assert settings.cache == home / "c"
    assert settings.models == (home / "m", home / "n", home / "o")


def test_model_folders_of_all_sources_are_searched_in_order() -> None:
    """The command line first, then the ini file, then the environment."""
    settings = read({"models": ["/a"]}, {"models": ["/b"]}, {"LLMPERF_MODELS": "/c::/d"})
    assert [str(folder) for folder in settings.models] == ["/a", "/b", "/c", "/d"]


def test_the_machine_may_be_named_in_ini_file_or_environment() -> None:
    """The ini file wins."""
    assert read({}, {}, {"LLMPERF_MACHINE": "env"}).machine == "env"
    assert read({}, {"machine": "ini"}, {"LLMPERF_MACHINE": "env"}).machine == "ini"


def test_the_cache_of_the_environment_is_made_absolute() -> None:
    """Servers are started in other folders."""
    assert read({}, {}, {"LLMPERF_CACHE": "cache"}).cache == Path.cwd() / "cache"


@pytest.mark.parametrize("name", ["strict", "update"])
def test_switches_are_off_unless_given(name: str) -> None:
    """They have no ini value."""
    assert getattr(read({name: True}), name) is True
    assert getattr(read({}, {name: "true"}), name) is False


def test_recording_with_a_baseline_of_the_ini_file_is_no_contradiction() -> None:
    """Only what is typed together contradicts itself."""
    settings = read({"update": True}, {"baseline": "b8149"})
    assert (settings.update, settings.baseline) == (True, "b8149")


def test_numbers_of_the_ini_file_are_read() -> None:
    """Launches and pairs are whole, however they are written."""
    settings = read({}, {"launches": "5", "pairs": "2.0"})
    assert (settings.launches, settings.pairs) == (5, 2)
    assert isinstance(settings.pairs, int)


def test_tolerances_of_the_ini_file_are_read() -> None:
    """One a line; spaces do not matter."""
    settings = read({}, {"tolerances": ["decode_tps = 0.1", "ttft_ms=0"]})
    assert settings.tolerances == {"decode_tps": 0.1, "ttft_ms": 0.0}


@given(st.dictionaries(st.sampled_from(list(METRICS)), st.floats(0, 1, exclude_max=True)))
def test_every_tolerance_comes_through(tolerances: dict[str, float]) -> None:
    """For any metric, any fraction from 0 to below 1."""
    lines = [f"{name} = {value!r}" for name, value in tolerances.items()]
    assert read({}, {"tolerances": lines}).tolerances == tolerances


@pytest.mark.parametrize(
    ("options", "ini", "message"),
    [
        (
            {"update": True, "baseline": "b8149"},
            {},
            "--update-baselines records and --baseline compares: run them one after the other",
        ),
        ({"budget": "long"}, {}, "--llmperf-budget: 'long' is no number"),
        ({"budget": "-1"}, {}, "--llmperf-budget: -1 must be a finite number of at least 0"),
        ({"budget": "inf"}, {}, "--llmperf-budget: inf must be a finite number of at least 0"),
        ({"budget": "nan"}, {}, "--llmperf-budget: nan must be a finite number of at least 0"),
        ({}, {"budget": "long"}, "ini llmperf_budget: 'long' is no number"),
        ({}, {"launches": "0"}, "ini llmperf_launches: 0 must be a finite number of at least 1"),
        ({}, {"launches": "2.5"}, "ini llmperf_launches: 2.5 must be a whole number"),
        ({}, {"foreign_load": "much"}, "ini llmperf_foreign_load: 'much' is no number"),
        ({}, {"pairs": "many"}, "ini llmperf_pairs: 'many' is no number"),
        ({}, {"pass_limit": "long"}, "ini llmperf_pass_limit: 'long' is no number"),
        (
            {},
            {"pass_limit": "0"},
            "ini llmperf_pass_limit: 0 must be a finite number of at least 1",
        ),
        ({}, {"pass_limit": "inf"}, "ini llmperf_pass_limit: inf must be a finite number of at"),
        (
            {},
            {"tolerances": ["decode = 0.1"]},
            "ini llmperf_tolerances: `decode = 0.1`: no metric `decode` (nearest: decode_tps)",
        ),
        (
            {},
            {"tolerances": ["decode_tps = 5 %"]},
            "ini llmperf_tolerances: `decode_tps = 5 %`: `decode_tps` must be a fraction from 0 to",
        ),
        (
            {},
            {"tolerances": ["decode_tps"]},
            "ini llmperf_tolerances: `decode_tps`: `decode_tps` must",
        ),
        (
            {},
            {"tolerances": ["decode_tps = 5"]},
            "ini llmperf_tolerances: `decode_tps = 5`: `decode_tps` must be a fraction",
        ),
        ({}, {"tolerances": ["decode_tps = nan"]}, "ini llmperf_tolerances: `decode_tps = nan`: `"),
        ({}, {"tolerances": ["decode_tps = -1"]}, "ini llmperf_tolerances: `decode_tps = -1`: `"),
        ({"suite": "~no-such-user-here/s"}, {}, "`~no-such-user-here/s`: there is no such user"),
        ({}, {"models": ["~no-such-user-here"]}, "`~no-such-user-here`: there is no such user"),
    ],
)
def test_a_mistake_names_the_option_and_the_mend(
    options: dict[str, object], ini: dict[str, object], message: str
) -> None:
    """In one line, with the place it was written in."""
    with pytest.raises(PlanError) as caught:
        read(options, ini)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("given", "cores"), [("1.5", 1.5), ("0", 0.0), ("off", float("inf"))])
def test_foreign_load(given: str, cores: float) -> None:
    """Cores that others may keep busy, or no look at them at all."""
    assert read(ini={"foreign_load": given}).foreign_load == cores


def test_the_limit_of_a_pass_is_an_ini_value() -> None:
    """In seconds; there is no option of the command line."""
    assert read(ini={"pass_limit": "90.5"}).pass_limit == 90.5
    assert read({"pass_limit": "90"}).pass_limit == 4 * 3600.0


def test_containers_are_run_as_ini_file_or_environment_say() -> None:
    """In words of a shell; the ini file wins, each value by itself."""
    environment = {
        "LLMPERF_CONTAINER": "sudo -n docker",
        "LLMPERF_CONTAINER_RUN": "--volume '/my data:/data'",
    }
    run = ("--volume", "/my data:/data")
    assert read().containers == Containers()
    found = read(environment=environment).containers
    assert found == Containers(("sudo", "-n", "docker"), run)
    found = read(ini={"container": "podman"}, environment=environment).containers
    assert found == Containers(("podman",), run)


@pytest.mark.parametrize(
    ("ini", "environment", "place"),
    [
        ({"container_run": "'open"}, {}, "ini llmperf_container_run"),
        ({}, {"LLMPERF_CONTAINER": "'open"}, "LLMPERF_CONTAINER"),
    ],
)
def test_a_quote_that_is_not_closed_names_its_place(
    ini: dict[str, object], environment: dict[str, str], place: str
) -> None:
    """The value is shown."""
    with pytest.raises(PlanError, match=rf"^{place}: .*'open.*No closing quotation"):
        read(ini=ini, environment=environment)
