"""pytest's hooks, and nothing else.

Imports pytest and the standard library only: a run that uses no fixture of this plugin loads
none of numpy, httpx and pynvml.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pytest_llmperf.plan.config import Case
    from pytest_llmperf.plan.suite import Suite
    from pytest_llmperf.recording import Written
    from pytest_llmperf.report.result import Result
    from pytest_llmperf.session import Run
    from pytest_llmperf.settings import Settings

pytest_plugins = ["pytest_llmperf.fixtures"]

MARKERS = (
    "gpu: needs a GPU; fails where there is none",
    "multi_gpu: needs several GPUs; fails where there are fewer",
    "long_running: takes more than a few minutes",
    "quality: measures answers, not speed",
    (
        "llmperf(configs=..., workloads=..., passes=..., tolerances=...): the configs, workloads "
        "and corpus passes of the suite file that the test runs over (no configs: all; neither "
        "workloads nor passes: the server start alone), and tolerances that win over those of the "
        "suite file"
    ),
)
_CASE = "llmperf_case"
_RUN_FIXTURE = "_llmperf_run"


class _State:
    """What this plugin keeps on the config between hooks; loaded piece by piece, on need."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.error: Exception | None = None
        self.run: Run | None = None
        self.seen: list[Result] = []
        self.written: list[Written] = []
        self.report: Path | None = None
        self.hears_sigterm = False
        self.headlines: dict[str, list[str]] = {}
        self.run_name = ""
        self._settings: Settings | None = None
        self._suite: Suite | None = None

    @property
    def settings(self) -> Settings:
        if self._settings is None:
            from platformdirs import user_cache_path  # noqa: PLC0415 - only when used

            from pytest_llmperf.settings import read_settings  # noqa: PLC0415 - only when used

            self._settings = read_settings(
                option=lambda name: self.config.getoption(name, None),
                ini=self.config.getini,
                environment=os.environ,
                root=self.config.rootpath,
                invoked_from=self.config.invocation_params.dir,
                cache=user_cache_path("pytest-llmperf"),
            )
        return self._settings

    @property
    def suite(self) -> Suite:
        if self._suite is None:
            from pytest_llmperf.plan.suite import load_suite  # noqa: PLC0415 - only when used

            self._suite = load_suite(self.settings.suite)
        return self._suite


STATE = pytest.StashKey[_State]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the command-line options and ini values."""
    group = parser.getgroup("llmperf", "llama.cpp builds: speed, memory, quality")
    group.addoption(
        "--baseline",
        metavar="NAME",
        dest="llmperf_baseline",
        help="What to compare with: a set recorded under baselines/NAME for this machine, or a "
        "build (a spec, or a name in [builds]) that is started and measured side by side. "
        "Default: the newest set recorded on this machine.",
    )
    group.addoption(
        "--update-baselines",
        action="store_true",
        dest="llmperf_update",
        help="Record what is measured as the baseline of the build under test on this machine.",
    )
    group.addoption(
        "--llmperf-build",
        metavar="SPEC",
        dest="llmperf_build",
        help="The build under test: a path to llama-server or its folder, docker:IMAGE, "
        "pypi:NAME==VERSION, embedded, http://HOST:PORT, or a name in [builds]. Default: "
        "LLMPERF_BUILD, then llama-server on PATH, then embedded.",
    )
    group.addoption(
        "--llmperf-suite",
        metavar="FILE",
        dest="llmperf_suite",
        help="The suite file (default: suites/llmperf.toml).",
    )
    group.addoption(
        "--llmperf-models",
        metavar="DIR",
        action="append",
        dest="llmperf_models",
        help="Folder in which GGUF files are looked up; repeatable. Also LLMPERF_MODELS.",
    )
    group.addoption(
        "--llmperf-strict",
        action="store_true",
        dest="llmperf_strict",
        help="Fail on INCONCLUSIVE too.",
    )
    group.addoption(
        "--llmperf-report",
        metavar="DIR",
        dest="llmperf_report",
        help="Write results.json and a self-contained index.html into DIR.",
    )
    group.addoption(
        "--llmperf-budget",
        metavar="SECONDS",
        dest="llmperf_budget",
        help="Most seconds one test may spend on measuring again until its verdict is clear "
        "(default: 300).",
    )
    parser.addini("llmperf_baseline", "Default of --baseline.")
    parser.addini("llmperf_build", "Default of --llmperf-build.")
    parser.addini("llmperf_suite", "Default of --llmperf-suite, relative to the root folder.")
    parser.addini("llmperf_models", "Folders in which GGUF files are looked up.", type="args")
    parser.addini("llmperf_budget", "Default of --llmperf-budget, in seconds.")
    parser.addini("llmperf_baselines", "Folder of the recorded baselines (default: baselines).")
    parser.addini("llmperf_machine", "Key of this machine's baselines, instead of a made one.")
    parser.addini(
        "llmperf_tolerances", "Lines METRIC = FRACTION; the suite file wins.", type="linelist"
    )
    parser.addini("llmperf_launches", "Fresh starts for and against a recorded baseline (3).")
    parser.addini("llmperf_start_timeout", "Seconds a server may take to become ready (600).")
    parser.addini("llmperf_hang_timeout", "Seconds without an answer until a server hangs (300).")
    parser.addini(
        "llmperf_pass_limit", "Most seconds a pass over a corpus may be expected to take (14400)."
    )
    parser.addini(
        "llmperf_container",
        "The container engine's command with its own flags (docker if it answers, else podman). "
        "Also LLMPERF_CONTAINER.",
    )
    parser.addini(
        "llmperf_container_run",
        "Flags that every `run` of a container gets on this machine. Also LLMPERF_CONTAINER_RUN.",
    )
    parser.addini(
        "llmperf_bandwidth",
        "Bandwidth in GB/s that decode speeds are compared with: of the GPUs' memory, or of the "
        "host's where there is no GPU (what NVML tells).",
    )
    parser.addini("llmperf_pairs", "Pairs of requests a workload in a side-by-side block (3).")
    parser.addini(
        "llmperf_foreign_load",
        "Cores that other programs may keep busy while something is measured (a tenth of all, half "
        "a core at least); `off` to ignore them.",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Register markers; nothing is read or loaded yet."""
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)
    state = config.stash[STATE] = _State(config)
    config.pluginmanager.register(_Collector(state), "llmperf-collector")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Leave no server behind."""
    state = config.stash.get(STATE, None)
    if state is None:
        return
    if state.run is not None:
        state.run.close()
    if state.hears_sigterm:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _hear_sigterm(state: _State) -> None:
    """End in order when asked to end: with the report of what was judged until then.

    As CI does when a job takes too long; pytest itself only knows Ctrl-C.
    """
    default = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if default and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)
        state.hears_sigterm = True


def _interrupt(number: int, _frame: object) -> None:
    raise KeyboardInterrupt(signal.strsignal(number))


# -- collection ---------------------------------------------------------------------------------


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make a test of each case that the ``llmperf`` marker asks for."""
    if _CASE not in metafunc.fixturenames:
        return
    state = metafunc.config.stash[STATE]
    parameters = []
    try:
        cases = _cases(state, metafunc)
        parameters = [pytest.param(case, id=case.id, marks=_marks(case)) for case in cases]
    except Exception as error:  # noqa: BLE001 - raised again once collection can fail as a whole
        state.error = state.error or error
    metafunc.parametrize(_CASE, parameters, indirect=True)


def _cases(state: _State, metafunc: pytest.Metafunc) -> list[Case]:
    from pytest_llmperf.errors import PlanError  # noqa: PLC0415 - only when used
    from pytest_llmperf.metrics import check_tolerance  # noqa: PLC0415 - only when used

    name = metafunc.definition.nodeid
    marker = metafunc.definition.get_closest_marker("llmperf")
    if marker is None:
        raise PlanError(
            f"{name} uses a fixture of pytest-llmperf: say what it runs over with "
            '@pytest.mark.llmperf(configs=["..."], workloads=["..."])'
        )
    lists = ("configs", "workloads", "passes")
    allowed = {*lists, "tolerances"}
    if marker.args or set(marker.kwargs) - allowed:
        raise PlanError(f"{name}: the marker llmperf takes {', '.join(sorted(allowed))} by name")
    for key in lists:
        names = marker.kwargs.get(key, [])
        if not isinstance(names, list | tuple) or not all(isinstance(n, str) for n in names):
            raise PlanError(f'{name}: llmperf({key}=...) is a list of names: write ["..."]')
        if len(set(names)) != len(names):
            raise PlanError(f"{name}: llmperf({key}=...) names one twice")
    tolerances = marker.kwargs.get("tolerances", {})
    if not isinstance(tolerances, dict) or not all(isinstance(m, str) for m in tolerances):
        raise PlanError(f'{name}: llmperf(tolerances=...) is a dict: write {{"decode_tps": 0.05}}')
    for metric, tolerance in tolerances.items():
        try:
            check_tolerance(metric, tolerance)
        except PlanError as error:
            raise PlanError(f"{name}: llmperf(tolerances=...): {error}") from error
    cases = state.suite.cases(*(marker.kwargs.get(key) for key in lists))
    if not cases:
        raise PlanError(f"{name}: llmperf(configs=[]) names no config, so nothing would be gated")
    return cases


def _marks(case: Case) -> list[pytest.MarkDecorator]:
    names = [*(["gpu"] if case.config.gpu else []), *case.config.marks]
    if case.config.cards > 1:
        names.append("multi_gpu")
    if case.corpus_pass is not None:
        names += ["quality", *case.corpus_pass.marks]
    try:
        return [getattr(pytest.mark, name) for name in dict.fromkeys(names)]
    except (pytest.fail.Exception, pytest.PytestUnknownMarkWarning, AttributeError):
        from pytest_llmperf.errors import PlanError  # noqa: PLC0415 - only when used

        raise PlanError(
            f"{case.key}: not all of the marks {names} are registered: add them to `markers` in "
            "pytest's ini file"
        ) from None


def _case_of(item: pytest.Item) -> Case | None:
    callspec = getattr(item, "callspec", None)
    case = callspec.params.get(_CASE) if callspec is not None else None
    # Without cases pytest makes one skipped item with a placeholder for the parameter.
    return case if hasattr(case, "config") else None


def _marked(case: Case, item: pytest.Item) -> Case:
    """Return the case of a test; a test that is marked ``gpu`` makes a GPU config of its own."""
    gpu = case.config.gpu or item.get_closest_marker("gpu") is not None
    return replace(case, config=replace(case.config, gpu=gpu))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the tests of one config next to each other, so that its servers start once."""
    state = config.stash[STATE]
    if _gave_up(state, state.error, items):
        return
    places: dict[str, int] = {}
    slots = [index for index, item in enumerate(items) if _case_of(item) is not None]
    ours = [items[index] for index in slots]
    for item in ours:
        case = _case_of(item)
        if case is not None:
            places.setdefault(case.config.name, len(places))

    def place(item: pytest.Item) -> int:
        case = _case_of(item)
        return places[case.config.name] if case is not None else -1

    for index, item in zip(slots, sorted(ours, key=place), strict=True):
        items[index] = item


@pytest.hookimpl(tryfirst=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Resolve builds and baseline once the selection is known."""
    config = session.config
    state = config.stash[STATE]
    selected = [
        _marked(case, item) for item in session.items if (case := _case_of(item)) is not None
    ]
    asks = any(_RUN_FIXTURE in getattr(item, "fixturenames", ()) for item in session.items)
    # pytest calls this hook even where the one before it failed.
    if not asks or session.testsfailed or state.error is not None:
        return
    from pytest_llmperf.beginning import (  # noqa: PLC0415 - only when used
        begin,
        check_baseline_name,
    )
    from pytest_llmperf.errors import UserError  # noqa: PLC0415 - only when used
    from pytest_llmperf.fixtures import RUN  # noqa: PLC0415 - pytest rewrites that module first
    from pytest_llmperf.report.progress import Progress  # noqa: PLC0415 - only when used
    from pytest_llmperf.session import Worker  # noqa: PLC0415 - only when used

    try:
        check_baseline_name(state.settings, state.suite)
        if config.option.collectonly:
            return
        progress = Progress(config)
        told = getattr(config, "workerinput", None)
        worker = Worker(told["workerid"], told["llmperf_run"]) if told is not None else None
        run = begin(state.settings, state.suite, selected, progress, worker)
        state.run = config.stash[RUN] = run
        if worker is None:
            _hear_sigterm(state)
        progress.announce(state.run)
    except UserError as error:
        _gave_up(state, error, session.items)


def _gave_up(state: _State, error: Exception | None, items: list[pytest.Item]) -> bool:
    """Turn a user's mistake into pytest's usage error: one line, exit 4, no traceback.

    A worker of pytest-xdist that raised it would end in an internal error; it runs nothing, and
    the controller says what was wrong.
    """
    if error is None:
        return False
    from pytest_llmperf.errors import UserError  # noqa: PLC0415 - only when used

    if not isinstance(error, UserError):
        raise error
    output = getattr(state.config, "workeroutput", None)
    if output is None:
        state.error = None  # told now, not again at the end
        raise pytest.UsageError(str(error)) from None
    state.error = error
    output["llmperf_error"] = str(error)
    items.clear()
    return True


# -- pytest-xdist -------------------------------------------------------------------------------


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object | None:  # noqa: ANN401 - pytest-xdist's type
    """Give all tests of a config to one worker, unless another way was asked for."""
    # What `-n` alone gives.
    if config.getoption("dist") != "load" or (suite := _suite_if_any(config)) is None:
        return None
    from pytest_llmperf.workers import ConfigScheduling  # noqa: PLC0415 - only when used

    return ConfigScheduling(config, log, suite.configs, {*suite.workloads, *suite.passes})


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """Make ``-n auto`` one worker a GPU."""
    if config.getoption("numprocesses") != "auto" or "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ:
        return None
    if _suite_if_any(config) is None:
        return None
    from pytest_llmperf.gpu.cards import gpus  # noqa: PLC0415 - only when used

    return len(gpus()) or None


def _suite_if_any(config: pytest.Config) -> Suite | None:
    """Return the suite if there is a file that can be read; workers say what is wrong."""
    # pytest-xdist asks for the number of its workers before pytest_configure.
    state = config.stash.get(STATE, None) or _State(config)
    from pytest_llmperf.errors import UserError  # noqa: PLC0415 - only when used

    try:
        return state.suite if state.settings.suite.is_file() else None
    except UserError:
        return None


# -- results ------------------------------------------------------------------------------------


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(
    item: pytest.Item, nextitem: pytest.Item | None
) -> Generator[None, Any, Any]:
    """Stop a config's server, and let others have its GPUs, when the next test needs another."""
    try:
        return (yield)
    finally:
        run = item.config.stash[STATE].run
        case = _case_of(item)
        following = _case_of(nextitem) if nextitem is not None else None
        if (
            run is not None
            and case is not None
            and (following is None or following.config is not case.config)
        ):
            run.leave_config()


class _Collector:
    """Gathers results from reports; on the controller also those of pytest-xdist's workers."""

    def __init__(self, state: _State) -> None:
        self._state = state
        self._failed: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep a test's results; record those of a passed one at once, so that none is lost."""
        # A fixture of the user's may call gate() too; at teardown all properties are there.
        if report.when != "teardown":
            self._failed |= {report.nodeid} if report.failed else set()
            return
        texts = [value for name, value in report.user_properties if name == "llmperf"]
        if not texts:
            return
        from pytest_llmperf.report.result import Result  # noqa: PLC0415 - only when used

        results = [Result.loads(str(text)) for text in texts]
        self._state.seen += results
        state = self._state
        passed = report.passed and report.nodeid not in self._failed
        if passed and state.settings.update and not _is_worker(state.config):
            from pytest_llmperf.errors import BaselineError  # noqa: PLC0415 - only when used
            from pytest_llmperf.recording import write_baselines  # noqa: PLC0415 - only when used

            try:
                state.written += write_baselines(state.settings, results)
            except BaselineError as error:
                state.error = error

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:  # noqa: ANN401 - pytest-xdist's type
        """Tell a worker which folder all of them keep their logs in."""
        from pytest_llmperf.files import run_name  # noqa: PLC0415 - only when used

        self._state.run_name = self._state.run_name or run_name()
        node.workerinput["llmperf_run"] = self._state.run_name
        if _suite_if_any(self._state.config) is not None:
            _hear_sigterm(self._state)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object) -> None:  # noqa: ANN401, ARG002 - pytest-xdist's hook and types
        """Take over what a worker compared, or found wrong with the command line or a file."""
        output = getattr(node, "workeroutput", {})
        self._state.headlines[node.gateway.id] = output.get("llmperf_headline", [])
        message = output.get("llmperf_error")
        if message is not None and self._state.error is None:
            from pytest_llmperf.errors import UserError  # noqa: PLC0415 - only when used

            self._state.error = UserError(message)


def _is_worker(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput")


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Stop servers; write the report."""
    state = session.config.stash[STATE]
    if state.run is not None:
        state.run.close()
    if _is_worker(session.config):
        return
    if state.seen and state.settings.report is not None:
        from pytest_llmperf.errors import UserError  # noqa: PLC0415 - only when used
        from pytest_llmperf.report.files import write_report  # noqa: PLC0415 - only when used

        try:
            state.report = write_report(state.settings.report, state.seen)
        except UserError as error:
            state.error = error
    if state.error is not None:
        session.exitstatus = pytest.ExitCode.USAGE_ERROR


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Close with the table of verdicts."""
    state = config.stash[STATE]
    # Workers compare the same; what the first one says is said once.
    names = sorted(state.headlines, key=lambda name: (len(name), name))
    told = [lines for name in names if (lines := state.headlines[name])]
    for line in told[0] if told and config.get_verbosity() >= 0 else ():
        terminalreporter.write_line(f"llmperf: {line}")
    if not state.seen:
        if state.error is not None:
            terminalreporter.write_line(f"ERROR: {state.error}", red=True)
        return
    from pytest_llmperf.report.terminal import summarize  # noqa: PLC0415 - only when used

    stale: dict[Path, list[str]] = {}
    if state.written:
        from pytest_llmperf.recording import stale_entries  # noqa: PLC0415 - only when used

        stale = stale_entries(state.suite, state.written)
    summarize(
        terminalreporter,
        state.seen,
        written=state.written,
        stale=stale,
        strict=state.settings.strict,
        report=state.report,
        error=None if state.error is None else str(state.error),
    )
    from pytest_llmperf.report.depths import depth_lines  # noqa: PLC0415 - only when used

    for line in depth_lines(state.seen, state.suite.workloads):
        terminalreporter.write_line(line)
