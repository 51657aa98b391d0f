"""What is known of a machine's noise before a verdict: from calibration, and from other cases.

``llmperf calibrate`` writes a file for the machine; every later run on it reads the file. A prior
says how much blocks or launches of equal builds differ, so that the first two or three of a verdict
need not be believed on how much they happen to.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pytest_llmperf.errors import BaselineError
from pytest_llmperf.judge._schema import Scalar
from pytest_llmperf.judge.statistics import Prior, fit_prior, log_means
from pytest_llmperf.judge.store import Baseline, write_atomic

SCHEMA = 1

MOST_D0 = 10.0
"""Most degrees of freedom that calibration is believed with: other configs are noisier or quieter,
and so is the same one on another day."""

LONE_D0 = 4.0
"""Degrees of freedom of a prior from one config and workload, which cannot show how they differ."""


@dataclass(frozen=True, slots=True)
class Priors:
    """What calibration found, by metric.

    Attributes:
        blocks: Of the log effects of side-by-side blocks.
        launches: Of the log values of launches.
        about: Where they come from, for people; ``""`` where there was no calibration.
    """

    blocks: Mapping[str, Prior] = field(default_factory=dict)
    launches: Mapping[str, Prior] = field(default_factory=dict)
    about: str = ""

    def block(self, metric: str, *, paired: bool = True) -> Prior | None:
        """The prior of a block's log effect, None if it is not known.

        Args:
            metric: Its name.
            paired: Whether the builds take turns within a block. If not, nothing cancels, and a
                block is the difference of two launches: its sd is that of one times sqrt(2).
        """
        if paired:
            return self.blocks.get(metric)
        launch = self.launches.get(metric)
        return None if launch is None else Prior(launch.s0 * math.sqrt(2), launch.d0)

    def launch(self, metric: str) -> Prior | None:
        """The prior of a launch's log value, None if it is not known."""
        return self.launches.get(metric)


def calibrated(variances: Sequence[float], dfs: Sequence[float]) -> Prior:
    """The prior that calibration stores: ``fit_prior``, believed no more than ``MOST_D0``.

    Args:
        variances: Variance of each config and workload of one metric.
        dfs: Degrees of freedom of each.

    Raises:
        ValueError: As ``fit_prior``.
    """
    prior = fit_prior(variances, dfs)
    return Prior(prior.s0, min(prior.d0, MOST_D0) if len(variances) > 1 else LONE_D0)


def path_of(cache: Path, machine: str) -> Path:
    """Where the priors of a machine are kept."""
    return cache / "noise" / f"{machine}.json"


def save(path: Path, priors: Priors, *, machine: str, at: str) -> None:
    """Write the priors of a machine; the file is replaced as a whole.

    Raises:
        BaselineError: If it cannot be written.
    """
    data = {
        "schema": SCHEMA,
        "machine": machine,
        "at": at,
        "blocks": {name: prior.to_json() for name, prior in priors.blocks.items()},
        "launches": {name: prior.to_json() for name, prior in priors.launches.items()},
    }
    try:
        write_atomic(path, json.dumps(data, indent=2, sort_keys=True) + "\n")
    except OSError as error:
        raise BaselineError(f"{path}: cannot write the priors: {error.strerror}") from error


def load(path: Path) -> Priors:
    """Return the priors of a machine, none where it was never calibrated.

    Raises:
        BaselineError: If there is a file that is none.
    """
    if not path.exists():
        return Priors()
    mend = "delete it, or run `llmperf calibrate` again"
    try:
        data: dict[str, Any] = json.loads(path.read_text("utf-8"))
        if data["schema"] != SCHEMA:
            raise BaselineError(f"{path}: schema {data['schema']!r} is not known: {mend}")
        return Priors(
            {name: Prior.from_json(one) for name, one in data["blocks"].items()},
            {name: Prior.from_json(one) for name, one in data["launches"].items()},
            f"calibrated {data['at']}",
        )
    except OSError as error:
        raise BaselineError(f"{path}: cannot read it: {error.strerror}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BaselineError(f"{path}: these are no priors ({error}): {mend}") from error


def pooled_prior(baseline: Baseline, key: str, metric: str) -> Prior | None:
    """Return the variance prior that the other cases of a metric in one baseline file give.

    Only those that the same program measured: llama-bench's own clock sees no HTTP and no sampling,
    so its launches differ in a way of their own. None if fewer than two others have enough launches
    to tell.
    """
    variances, dfs = [], []
    tool = _tool(baseline, key)
    for case, metrics in baseline.results.items():
        entry = metrics.get(metric)
        if case == key or entry is None or _tool(baseline, case) != tool:
            continue
        if entry.launches is None or len(entry.launches) < 2:  # noqa: PLR2004 - a variance needs two
            continue
        means = log_means(entry.launches)
        variances.append(float(means.var(ddof=1)))
        dfs.append(float(len(means) - 1))
    if len(variances) < 2 or not all(v > 0 for v in variances):  # noqa: PLR2004 - so does theirs
        return None
    return fit_prior(variances, dfs)


def _tool(baseline: Baseline, case: str) -> Scalar:
    # What a server measured does not say so.
    return baseline.fingerprints.get(case, {}).get("tool", "")
