"""What one test found out, in a form that travels: to JUnit, to another process, to a file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pytest_llmperf.judge.verdict import Verdict

PROPERTY = "llmperf"
"""Name of the user property, and so of the JUnit property, that holds a result."""


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two builds of a comparison.

    Attributes:
        label: What it is called.
        about: Number, commit, source and hash, for people.
        build: The build block of a baseline file.
        command: The exact server command, ``""`` where nothing was started.
        logs: Log files, newest last.
        gpu: How its launches used the GPUs: ``rate_hz``, at which they were looked at, and
            ``cards``, one mapping a GPU; empty where nobody looked. Any figure may be None.
    """

    label: str
    about: str
    build: Mapping[str, object] = field(default_factory=dict)
    command: str = ""
    logs: tuple[str, ...] = ()
    gpu: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Result:
    """The verdicts of one call of ``gate`` with all they rest on.

    Attributes:
        nodeid: The test.
        case: ``<config>/<workload>``.
        new: The build under test.
        base: The baseline, or None.
        machine: The machine's key.
        verdicts: One a metric.
        fingerprint: What must be equal for two results to be comparable.
        measured: Metric name to the samples of each launch of the build under test.
        options: The options that say what was compared with what, to repeat it.
        reference: File of the distributions that the answers of the build under test were compared
            with, to be kept with a baseline; ``""`` for none.
        partial: What was answered of a workload before it failed, never judged: ``build``, ``how``,
            ``answered`` and ``asked`` requests, ``samples`` by metric; empty if nothing failed.
        roofline: How near decoding came to what the memory allows: ``gb_per_token``,
            ``bandwidth_gbs`` and its ``source``, and the share of the bandwidth that the build
            under test (``new``) and the baseline (``base``) used, None if unmeasured; ``notes`` on
            what was not counted; empty where that means nothing.
    """

    nodeid: str
    case: str
    new: Side
    base: Side | None
    machine: str
    verdicts: tuple[Verdict, ...]
    fingerprint: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    measured: Mapping[str, Sequence[Sequence[float]]] = field(default_factory=dict)
    options: str = ""
    reference: str = ""
    partial: Mapping[str, Any] = field(default_factory=dict)
    roofline: Mapping[str, Any] = field(default_factory=dict)

    def dumps(self) -> str:
        """Return the result as one line of JSON."""
        data = {
            "nodeid": self.nodeid,
            "case": self.case,
            "new": asdict(self.new),
            "base": asdict(self.base) if self.base else None,
            "machine": self.machine,
            "verdicts": [verdict.to_json() for verdict in self.verdicts],
            "fingerprint": dict(self.fingerprint),
            "options": self.options,
            "reference": self.reference,
            "partial": dict(self.partial),
            "roofline": dict(self.roofline),
            "measured": {name: [list(one) for one in all_] for name, all_ in self.measured.items()},
        }
        return json.dumps(data, sort_keys=True)

    @classmethod
    def loads(cls, text: str) -> Result:
        """Return the result that :meth:`dumps` wrote.

        Raises:
            ValueError: If the text is not one.
        """
        try:
            data = json.loads(text)
            sides = {
                name: Side(**{**data[name], "logs": tuple(data[name]["logs"])})
                if data[name]
                else None
                for name in ("new", "base")
            }
            new = sides["new"]
            if new is None:
                raise ValueError("lacks the build under test")
            return cls(
                nodeid=data["nodeid"],
                case=data["case"],
                new=new,
                base=sides["base"],
                machine=data["machine"],
                verdicts=tuple(Verdict.from_json(one) for one in data["verdicts"]),
                fingerprint=data["fingerprint"],
                measured=data["measured"],
                options=data["options"],
                reference=data["reference"],
                partial=data["partial"],
                # Results from before there was one have none.
                roofline=data.get("roofline", {}),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"not an llmperf result: {error}") from error
