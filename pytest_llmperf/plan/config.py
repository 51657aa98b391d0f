"""What to run, as frozen values: builds, configs, workloads, passes and the cases they make."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pytest_llmperf.plan.options import OptionValue

REFERENCE_SUFFIX = ".kldref"
"""End of the name of a compact reference."""

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
        run: Further flags of the container engine's ``run``.
        program: Program of a container that is run instead of its entry point.
    """

    name: str
    source: str
    label: str | None = None
    options: Mapping[str, OptionValue] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    help: str = ""
    run: tuple[str, ...] = ()
    program: str = ""


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
        against: What its answers are compared with: a config, or a file of recorded
            distributions; ``""`` for its own answers on the baseline's build.
        budgets: Quality metric to the value, in its unit, that must not be exceeded whatever the
            baseline.
        draft: A name in ``[models]``: the model that drafts for this one; ``""`` for none.
        gpus: Cards that a GPU config takes.
        exclusive: Whether it is measured with nothing else on the whole machine; None leaves that
            to :func:`is_exclusive`.
    """

    name: str
    model: str
    options: Mapping[str, OptionValue] = field(default_factory=dict)
    gpu: bool = False
    marks: tuple[str, ...] = ()
    tolerances: Mapping[str, float] = field(default_factory=dict)
    help: str = ""
    reference: str = ""
    against: str = ""
    budgets: Mapping[str, float] = field(default_factory=dict)
    draft: str = ""
    gpus: int = 1
    exclusive: bool | None = None

    @property
    def cards(self) -> int:
        """How many GPUs it is measured on."""
        return self.gpus if self.gpu else 0


_DRAFTS = {
    "spec-draft-cpu-moe": "cpu-moe",
    "spec-draft-n-cpu-moe": "n-cpu-moe",
    "spec-draft-override-tensor": "override-tensor",
    "spec-draft-ngl": "gpu-layers",
    "spec-draft-device": "device",
}
"""Options of the model that drafts, and those of the other model that they are like."""


def _overrides(value: OptionValue) -> bool:
    rules = ",".join(value) if isinstance(value, tuple) else str(value)
    return any("CPU" in rule.rpartition("=")[2] for rule in rules.split(","))


_LEAVES_WORK: Mapping[str, Callable[[OptionValue], bool]] = {
    "cpu-moe": lambda value: value is True,
    "n-cpu-moe": lambda value: str(value) != "0",
    "kv-offload": lambda value: value is False,
    "gpu-layers": lambda value: str(value) == "0",
    "n-gpu-layers": lambda value: str(value) == "0",
    "override-tensor": _overrides,
    "device": lambda value: value == "none",
    "mmproj-offload": lambda value: value is False,
    # As llama.cpp reads it: `true`, `1` and `enabled` are `on`.
    "fit": lambda value: str(value).lower() in {"on", "enabled", "true", "1"},
}
"""Options that have a part of a model kept or computed by the CPU, and with which values."""


def is_exclusive(config: Config) -> bool:
    """Return whether a config is measured with nothing else on the whole machine.

    What runs on the CPU always is. On GPUs that is for the config to say; where it does not, it is
    if one of its options leaves work to the CPU. What a server leaves there by itself, since not
    all layers fit, cannot be known before it starts.
    """
    if not config.gpu:
        return True
    if config.exclusive is not None:
        return config.exclusive
    for name, value in config.options.items():
        leaves_work = _LEAVES_WORK.get(_DRAFTS.get(name, name))
        if leaves_work is not None and leaves_work(value):
            return True
    return False


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """The files that one server loads.

    Attributes:
        main: The model; of a split one, its first part.
        draft: The model that drafts for it, if there is one.
        projector: What makes tokens of images for it, if there is one.
    """

    main: Path
    draft: Path | None = None
    projector: Path | None = None

    @property
    def all(self) -> tuple[Path, ...]:
        """Every file, the model first."""
        return tuple(path for path in (self.main, self.draft, self.projector) if path is not None)


@dataclass(frozen=True, slots=True)
class Turn:
    """One request of a workload.

    Attributes:
        prompt: New prompt tokens of this turn; earlier turns and their answers come before.
        generate: Tokens to generate, exactly.
        depth: Tokens before the prompt that lie in the cache already when the clock starts.
    """

    prompt: int
    generate: int
    depth: int = 0


Api = Literal["completion", "chat"]
"""How a server is asked: token ids to ``/completion``, or messages to ``/v1/chat/completions``,
where its chat template makes the prompt."""

Tool = Literal["llama-server", "llama-bench"]
"""Which program of a build does the work of a workload."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What is asked of a server: turns of a conversation, each sent with a cold cache.

    Attributes:
        name: As in ``[workloads.NAME]``; part of the node id.
        turns: One request each.
        help: One line for people.
        parallel: Conversations held at once, each of these lengths, of its own text and in a slot
            of its own; the next turn is sent once all have their answers.
        api: How the server is asked.
        thinking: For the chat template: whether the model is to think first; None leaves it to
            the template.
        image: Width and height, in pixels, of a picture that is sent along; 0 for none.
        tool: The program that does the work; the tokens of llama-bench are random ones.
        limit: Most seconds that one sample may take; past it, it counts as too slow to measure.
            0 for no limit.
    """

    name: str
    turns: tuple[Turn, ...]
    help: str = ""
    parallel: int = 1
    api: Api = "completion"
    thinking: bool | None = None
    image: int = 0
    tool: Tool = "llama-server"
    limit: float = 0.0

    @property
    def tokens(self) -> int:
        """Context the last turn of one conversation needs, in tokens."""
        return sum(turn.depth + turn.prompt + turn.generate for turn in self.turns)

    def digest(self) -> str:
        """Return a short hash of all that changes the work, for the fingerprint."""
        lengths = [
            [turn.prompt, turn.generate, *([turn.depth] if turn.depth else [])]
            for turn in self.turns
        ]
        # What is at its default is left unsaid: baselines from before there was a choice stay
        # valid.
        more: dict[str, object] = {
            name: value
            for name, value, default in (
                ("api", self.api, "completion"),
                ("thinking", self.thinking, None),
                ("image", self.image, 0),
                ("tool", self.tool, "llama-server"),
            )
            if value != default
        }
        shape: list[object] = [lengths]
        if self.parallel != 1 or more:
            shape.append(self.parallel)
        if more:
            shape.append(more)
        told = json.dumps(shape if len(shape) > 1 else lengths, sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()[:16]


PassPath = Literal["auto", "tool", "server"]
"""How a corpus is passed: by llama-perplexity, by asking llama-server token by token, or by the
tool where every build that is compared has it."""


@dataclass(frozen=True, slots=True)
class CorpusPass:
    """A corpus passed through a model to see how well it answers.

    Attributes:
        name: As in ``[passes.NAME]``; part of the node id.
        corpus: Text file: its path, or the name of one that ships with the package.
        context: Tokens of a chunk; the second half of each is scored.
        batch: Logical batch, in tokens.
        ubatch: Physical batch, in tokens; 1 takes the kernels of decoding.
        chunks: Chunks to pass, None for the whole corpus.
        path: Who computes the log-probabilities.
        marks: Marks of its tests.
        help: One line for people.
    """

    name: str
    corpus: str
    context: int = 512
    batch: int = 512
    ubatch: int = 512
    chunks: int | None = None
    path: PassPath = "auto"
    marks: tuple[str, ...] = ()
    help: str = ""

    def digest(self) -> str:
        """Return a short hash of all that changes the numbers, but for the text and the path."""
        sizes = json.dumps([self.context, self.batch, self.ubatch, self.chunks])
        return hashlib.sha256(sizes.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Case:
    """One config under one workload or corpus pass, or one config alone.

    Raises:
        ValueError: If it has both a workload and a pass.
    """

    config: Config
    workload: Workload | None = None
    corpus_pass: CorpusPass | None = None

    def __post_init__(self) -> None:
        if self.workload is not None and self.corpus_pass is not None:
            raise ValueError("a case has a workload or a pass, not both")

    @property
    def _what(self) -> str:
        what = self.workload or self.corpus_pass
        return "" if what is None else what.name

    @property
    def tool(self) -> Tool:
        """The program that does the work."""
        return "llama-server" if self.workload is None else self.workload.tool

    @property
    def id(self) -> str:
        """The part of the node id between the brackets."""
        return f"{self.config.name}-{self._what}" if self._what else self.config.name

    @property
    def where(self) -> str:
        """What its samples stand under in a launch: workload or pass, else :data:`LAUNCH`."""
        return self._what or LAUNCH

    @property
    def key(self) -> str:
        """The key in a baseline file: ``<config>/<workload>`` or ``<config>/<pass>``."""
        return f"{self.config.name}/{self.where}"
