"""One pass of one build: by the tool, or by asking a server token by token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Literal

from pytest_llmperf.build.build import Build
from pytest_llmperf.build.tools import PERPLEXITY, tool_of
from pytest_llmperf.errors import BuildError, PartialPassError
from pytest_llmperf.plan.config import Config
from pytest_llmperf.quality.perplexity import PassPlan, Perplexity, run_perplexity
from pytest_llmperf.quality.probe import LISTED, run_probes
from pytest_llmperf.serve.launch import ServePlan

Way = Literal["tool", "server"]
"""By llama-perplexity, in batches; or by a server, token by token."""


@dataclass(frozen=True, slots=True)
class Side:
    """One build with one config, ready to pass a corpus.

    Attributes:
        build: Whose program.
        config: Options and name.
        model: GGUF file; not used where the server already runs.
        way: Which program computes the log-probabilities.
        serve: How a server is started.
        listed: How many tokens' log-probabilities a server names a position; see
            :mod:`pytest_llmperf.quality.probe`.
        progress: Is told how far it is; by default the plan's.
        check: Looks at the log once all is loaded; by default the plan's.
    """

    build: Build
    config: Config
    model: Path
    way: Way
    serve: ServePlan
    listed: int = LISTED
    progress: Callable[[str], None] | None = None
    check: Callable[[Path], None] | None = None

    def run(
        self, corpus: Path, plan: PassPlan, consume: Callable[[BinaryIO], object]
    ) -> Perplexity:
        """Pass a corpus through the model, all of it.

        Args:
            corpus: Text file.
            plan: Pinned sizes, folder, progress.
            consume: Reads the log-probabilities while they are written; see
                :func:`pytest_llmperf.quality.perplexity.run_perplexity`.

        Raises:
            PartialPassError: If it did not get through; what it found is kept with the error.
            LlmperfError: If it cannot be run at all, or what ``consume`` raised.
        """
        if self.progress is not None:
            plan = replace(plan, progress=self.progress)
        if self.check is not None:
            plan = replace(plan, check=self.check)
        if self.way == "server":
            found = run_probes(
                self.build,
                self.config,
                self.model,
                corpus,
                plan,
                self.serve,
                consume=consume,
                listed=self.listed,
            )
        else:
            options = {**self.config.options, **self.build.options}
            found = run_perplexity(
                self.build,
                options,
                self.model,
                corpus,
                plan,
                consume=consume,
                cards=self.serve.cards,
            )
        if found.partial:
            raise PartialPassError(
                f"the pass of {self.build.label} {found.failure}; perplexity so far "
                f"{found.value:.4f}; log: {found.log}",
                planned=found.planned,
                running=found.running,
            )
        return found


def has_tool(build: Build) -> bool:
    """Return whether a build has llama-perplexity."""
    try:
        tool_of(build, PERPLEXITY)
    except BuildError:
        return False
    return True
