"""What test authors use. Imports nothing heavy; the work is done where it is called."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from pytest_llmperf.budget import Budget

if TYPE_CHECKING:
    from pytest_llmperf.build.build import Build
    from pytest_llmperf.plan.config import Case
    from pytest_llmperf.report.result import Result
    from pytest_llmperf.serve.launch import Server
    from pytest_llmperf.session import Run


RUN = pytest.StashKey["Run"]()
"""Where the plugin keeps the run on the config."""


class Gate:
    """Judges metrics of one case and fails the test where they regress.

    Args:
        request: Of the test.
        run: The pytest run.
        case: Config and workload.
    """

    def __init__(self, request: pytest.FixtureRequest, run: Run, case: Case) -> None:
        self._request = request
        self._run = run
        # Of the first gate(): the budget is the test's, however many metrics it judges.
        self._budget: Budget | None = None
        self.case = case

    def gate(self, *metrics: str) -> Result:
        """Measure, compare with the baseline, and fail on a regression.

        Args:
            metrics: Names as in the baseline file, such as ``decode_tps`` and ``ttft_ms``.

        Returns:
            The verdicts with all they rest on, if none of them fails.

        Raises:
            pytest.fail.Exception: If a verdict fails; the text says what to do next.
        """
        __tracebackhide__ = True
        from pytest_llmperf.errors import PlanError  # noqa: PLC0415 - only when used
        from pytest_llmperf.report.result import PROPERTY  # noqa: PLC0415 - only when used
        from pytest_llmperf.report.wording import failure  # noqa: PLC0415 - only when used

        node = self._request.node
        marker = node.get_closest_marker("llmperf")
        own = marker.kwargs.get("tolerances", {}) if marker else {}
        if not metrics:
            pytest.fail("gate() needs the name of at least one metric", pytrace=False)
        wrong = ""
        try:
            asked = {metric: own.get(metric) for metric in metrics}
            gpu = node.get_closest_marker("gpu") is not None
            if self._budget is None:
                # The budget is for measuring, not for waiting until others have measured.
                self._run.prepare(self.case, asked, gpu=gpu)
                self._budget = Budget(self._run.settings.budget)
            result = self._run.gate(node.nodeid, self.case, asked, self._budget, gpu=gpu)
        except PlanError as error:
            wrong = str(error)
        finally:
            self._run.progress.clear()
        if wrong:
            pytest.fail(f"{node.nodeid}: {wrong}", pytrace=False)
        node.user_properties.append((PROPERTY, result.dumps()))
        self._replay(result)
        if any(v.outcome.fails(strict=self._run.settings.strict) for v in result.verdicts):
            pytest.fail(failure(result, strict=self._run.settings.strict), pytrace=False)
        return result

    def _replay(self, result: Result) -> None:
        config = self._request.config
        if config.pluginmanager.hasplugin("benchmark"):
            from pytest_llmperf.report.benchmark import replay  # noqa: PLC0415 - only when used

            replay(self._request, result)


@pytest.fixture
def llmperf_case(request: pytest.FixtureRequest) -> Case:
    """The config and workload this test runs over, as its ``llmperf`` marker asks."""
    case: Case = request.param
    return case


@pytest.fixture
def _llmperf_run(request: pytest.FixtureRequest) -> Run:
    run = request.config.stash.get(RUN, None)
    if run is None:
        pytest.fail("pytest-llmperf was not ready: collection did not finish", pytrace=False)
    return run


@pytest.fixture
def speed(request: pytest.FixtureRequest, _llmperf_run: Run, llmperf_case: Case) -> Gate:
    """Gates decode and prefill speed, TTFT and latency: ``speed.gate("decode_tps", "ttft_ms")``."""
    return Gate(request, _llmperf_run, llmperf_case)


@pytest.fixture
def memory(request: pytest.FixtureRequest, _llmperf_run: Run, llmperf_case: Case) -> Gate:
    """Gates memory, buffers and load time of a server start: ``memory.gate("rss_mib")``."""
    return Gate(request, _llmperf_run, llmperf_case)


@pytest.fixture
def quality(request: pytest.FixtureRequest, _llmperf_run: Run, llmperf_case: Case) -> Gate:
    """Gates answers over a corpus: ``quality.gate("ppl", "kld_mean", "same_top")``."""
    return Gate(request, _llmperf_run, llmperf_case)


@pytest.fixture
def build(_llmperf_run: Run) -> Build:
    """The build under test: label, number, commit, source, hash."""
    return _llmperf_run.new


@pytest.fixture
def llama_server(
    request: pytest.FixtureRequest, _llmperf_run: Run, llmperf_case: Case
) -> Iterator[Server]:
    """A running server of the build under test with this test's config.

    One start serves all tests of the config; ``llama_server.client`` asks it, and
    ``llama_server.url`` is its address.
    """
    from pytest_llmperf.errors import LlmperfError  # noqa: PLC0415 - only when used

    failed = ""
    try:
        marked = request.node.get_closest_marker("gpu") is not None
        server = _llmperf_run.server(llmperf_case.config, gpu=marked)
    except LlmperfError as error:
        failed = str(error)
    if failed:
        pytest.fail(failed, pytrace=False)
    yield server
    # gate() in the same test stops it, so that nothing but what is measured runs.
    if not server.stopped and not server.alive():
        pytest.fail(f"the server died during the test; log: {server.log}", pytrace=False)
