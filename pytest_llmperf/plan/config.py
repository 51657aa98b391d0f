"""What to run, as frozen values: builds, configs, workloads and the cases they make."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from pytest_llmperf.plan.options import OptionValue

LAUNCH = "launch"
"""Stands for the workload in the key of what one server start shows by itself."""


@dataclass(frozen=True, slots=True)
class BuildEntry:
    """A name in ``[builds]``.

    Attributes:
        name: The name used on the command line.
        source: A build spec, such as ``pypi:xllamacpp==0.2.12``.
        label: What the build is called instead of by its number; without it a build that does
            not know its number is called by ``name``.
        options: Server options added to every config on this build only.
        env: Environment variables its servers get.
        help: One line for people.
    """

    name: str
    source: str
    label: str | None = None
    options: Mapping[str, OptionValue] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    help: str = ""


@dataclass(frozen=True, slots=True)
class Config:
    """A named set of server options plus a model.

    Attributes:
        name: As in ``[configs.NAME]``; part of the node id.
        model: A name in ``[models]``.
        options: Long option names without dashes, inherited ones included.
        gpu: Whether it needs a GPU; such configs carry the mark ``gpu``.
        marks: Further marks.
        tolerances: Relative tolerances that win over those of the suite file.
        help: One line for people.
        reference: Where the config comes from.
    """

    name: str
    model: str
    options: Mapping[str, OptionValue] = field(default_factory=dict)
    gpu: bool = False
    marks: tuple[str, ...] = ()
    tolerances: Mapping[str, float] = field(default_factory=dict)
    help: str = ""
    reference: str = ""


@dataclass(frozen=True, slots=True)
class Turn:
    """One request of a workload.

    Attributes:
        prompt: New prompt tokens of this turn; earlier turns and their answers come before.
        generate: Tokens to generate, exactly.
    """

    prompt: int
    generate: int


@dataclass(frozen=True, slots=True)
class Workload:
    """What is asked of a server: turns of a conversation, each sent with a cold cache."""

    name: str
    turns: tuple[Turn, ...]
    help: str = ""

    @property
    def tokens(self) -> int:
        """Context the last turn needs, in tokens."""
        return sum(turn.prompt + turn.generate for turn in self.turns)

    def digest(self) -> str:
        """Return a short hash of the lengths, for the fingerprint."""
        lengths = json.dumps([[turn.prompt, turn.generate] for turn in self.turns])
        return hashlib.sha256(lengths.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Case:
    """One config under one workload, or one config alone (``workload`` is None)."""

    config: Config
    workload: Workload | None

    @property
    def id(self) -> str:
        """The part of the node id between the brackets."""
        return (
            self.config.name
            if self.workload is None
            else f"{self.config.name}-{self.workload.name}"
        )

    @property
    def key(self) -> str:
        """The key in a baseline file: ``<config>/<workload>``."""
        return f"{self.config.name}/{LAUNCH if self.workload is None else self.workload.name}"
