"""Reads a suite file: models, builds, configs, workloads, passes and tolerances.

Every mistake is one line with file and line number, and says what would be right.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast, get_args

from pytest_llmperf.errors import PlanError, nearest
from pytest_llmperf.metrics import FEWEST_CHUNKS, METRICS, PUBLISHED_ONLY, check_tolerance
from pytest_llmperf.plan.config import (
    LAUNCH,
    REFERENCE_SUFFIX,
    Api,
    BuildEntry,
    Case,
    Config,
    CorpusPass,
    PassPath,
    Tool,
    Turn,
    Workload,
)
from pytest_llmperf.plan.env_file import read_env_file
from pytest_llmperf.plan.lines import line_of
from pytest_llmperf.plan.model import (
    FLOATS,
    Model,
    PresetSpec,
    SynthSpec,
    check_projector,
    is_projector,
)
from pytest_llmperf.plan.options import OWNED, TEMPLATE_FILE, OptionValue, from_flag

_T = TypeVar("_T")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_ENDING_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._]*")
_LEAST_CONTEXT = 32
_CONFIG_KEYS = (
    *("model", "draft", "extends", "options", "env-file", "gpu", "marks", "tolerances"),
    *("against", "budgets", "help", "reference", "gpus", "exclusive"),
)
_SIZES = ("context", "batch", "ubatch", "chunks")

REFERENCE_SUFFIXES = (REFERENCE_SUFFIX, ".kld")
"""Ends of the names of recorded distributions: compact ones, and those of llama-perplexity."""
_SECTIONS = ("models", "builds", "configs", "workloads", "passes", "tolerances")


@dataclass(frozen=True, slots=True)
class Suite:
    """A suite file, read and checked.

    Attributes:
        path: The file.
        models: By name.
        builds: By name.
        configs: By name, in the order of the file.
        workloads: By name, in the order of the file.
        passes: By name, in the order of the file.
        tolerances: Metric name to relative tolerance.
    """

    path: Path
    models: Mapping[str, Model]
    builds: Mapping[str, BuildEntry]
    configs: Mapping[str, Config]
    workloads: Mapping[str, Workload]
    passes: Mapping[str, CorpusPass]
    tolerances: Mapping[str, float]

    def cases(
        self,
        configs: Sequence[str] | None = None,
        workloads: Sequence[str] | None = None,
        passes: Sequence[str] | None = None,
    ) -> list[Case]:
        """Return the cases of the named configs with workloads or passes, configs outermost.

        Args:
            configs: Names, or None for every config of the file.
            workloads: Names.
            passes: Names. Without workloads and passes there is one case a config.

        Raises:
            PlanError: If a name is not in the file.
        """
        names = list(self.configs) if configs is None else configs
        chosen = [self._named(name, self.configs, "config") for name in names]
        asked = [self._named(name, self.workloads, "workload") for name in workloads or ()]
        passed = [self._named(name, self.passes, "pass") for name in passes or ()]
        if not asked and not passed:
            return [Case(config) for config in chosen]
        return [
            case
            for config in chosen
            for case in (
                *(Case(config, workload=workload) for workload in asked),
                *(Case(config, corpus_pass=one) for one in passed),
            )
        ]

    def _named(self, name: str, table: Mapping[str, _T], what: str) -> _T:
        if name not in table:
            plural = "es" if what == "pass" else "s"
            raise PlanError(
                f"no {what} `{name}`{nearest(name, table)}: "
                f"there are {', '.join(table) or f'no {what}' + plural}",
                self.path,
            )
        return table[name]


class _Reader:
    """Walks a parsed TOML document and knows where each key stands."""

    def __init__(self, path: Path, text: str) -> None:
        self.path = path
        self.text = text

    def fail(self, message: str, *where: str) -> PlanError:
        # A quoted key may hold a line break; the error is one line all the same.
        return PlanError(message.replace("\n", "\\n"), self.path, line_of(self.text, where))

    def table(self, value: object, *where: str) -> dict[str, object]:
        if not isinstance(value, dict):
            raise self.fail(f"`{'.'.join(where)}` must be a table", *where)
        return value

    def keys(self, table: Mapping[str, object], allowed: Collection[str], *where: str) -> None:
        for key in table:
            if key not in allowed:
                place = f"[{'.'.join(where)}]" if where else "the suite file"
                raise self.fail(
                    f"unknown key `{key}` in {place}{nearest(key, allowed)}: "
                    f"it takes {', '.join(allowed)}",
                    *where,
                    key,
                )

    def take(
        self, table: Mapping[str, object], key: str, kind: type[_T], default: _T, *where: str
    ) -> _T:
        value = table.get(key, default)
        # bool is an int to Python, but `seed = true` is a slip of the pen.
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            names = {str: "a string", bool: "true or false", list: "a list", dict: "a table"}
            raise self.fail(
                f"`{key}` must be {names.get(kind, kind.__name__)}, not {value!r}", *where, key
            )
        return value

    def strings(self, table: Mapping[str, object], key: str, *where: str) -> tuple[str, ...]:
        values = self.take(table, key, list, [], *where)
        for value in values:
            if not isinstance(value, str):
                raise self.fail(f"`{key}` must hold strings, not {value!r}", *where, key)
        return tuple(values)

    def each(
        self,
        document: Mapping[str, object],
        section: str,
        read: Callable[[str, dict[str, object]], _T],
    ) -> dict[str, _T]:
        entries = self.table(document.get(section, {}), section)
        # Such a name ends the node id `config-workload`: no dash, or ids collide.
        ends = section in {"workloads", "passes"}
        pattern = _ENDING_NAME if ends else _NAME
        for name in entries:
            if not pattern.fullmatch(name):
                allowed = "letters, digits, `.` and `_`" + ("" if ends else ", `-`")
                raise self.fail(
                    f"`{name}` is no name for [{section}]: use {allowed}", section, name
                )
        return {
            name: read(name, self.table(entry, section, name)) for name, entry in entries.items()
        }

    # one method a section

    def model(self, name: str, table: dict[str, object]) -> Model:
        where = ("models", name)
        self.keys(
            table, ("file", "synth", "from", "quantize", "sha256", "projector", "help"), *where
        )
        try:
            synth: SynthSpec | PresetSpec | None = None
            if "synth" in table:
                shape = self.take(table, "synth", dict, {}, *where)
                made = PresetSpec if "preset" in shape else SynthSpec
                allowed = [f.replace("_", "-") for f in made.__dataclass_fields__]
                self.keys(shape, allowed, *where, "synth")
                for key, value in shape.items():
                    kind = str if key in {"preset", "quant"} else int
                    if not isinstance(value, kind) or isinstance(value, bool):
                        shown = "a string" if kind is str else "a whole number"
                        raise self.fail(
                            f"`{key}` must be {shown}, not {value!r}", *where, "synth", key
                        )
                synth = made(**{key.replace("-", "_"): shape[key] for key in shape})
            return Model(
                name=name,
                file=self.take(table, "file", str, "", *where) or None,
                synth=synth,
                source=self.take(table, "from", str, "", *where) or None,
                quantize=self.take(table, "quantize", str, "", *where) or None,
                sha256=self.take(table, "sha256", str, "", *where) or None,
                projector=self.take(table, "projector", str, "", *where) or None,
                help=self.take(table, "help", str, "", *where),
            )
        except PlanError as error:
            if error.file is not None:
                raise
            raise self.fail(str(error), *where) from error

    def sources(self, models: Mapping[str, Model]) -> None:
        """Check that what is quantized is a model of the file, and of floats as far as known."""
        for model in models.values():
            if model.projector is not None and model.projector not in models:
                raise self.fail(
                    f"model `{model.name}` has the projector `{model.projector}`, which is no "
                    f"model{nearest(model.projector, models)}: give its file a name in [models]",
                    "models",
                    model.name,
                    "projector",
                )
            if model.projector is not None:
                if model.projector == model.name:
                    raise self.fail(
                        f"model `{model.name}` is its own projector: name the model that makes "
                        "tokens of images",
                        "models",
                        model.name,
                        "projector",
                    )
                try:
                    check_projector(model, models[model.projector])
                except PlanError as error:
                    where = ("models", model.name, "projector")
                    raise self.fail(str(error), *where) from error
            if model.source is None:
                continue
            where = ("models", model.name, "from")
            others = [name for name in models if name != model.name]
            if model.source not in others:
                raise self.fail(
                    f"model `{model.name}` is from `{model.source}`, which is no other model"
                    f"{nearest(model.source, others)}: there are {', '.join(others) or 'none'}",
                    *where,
                )
            if (first := models[model.source].source) is not None:
                raise self.fail(
                    f"model `{model.name}` is from `{model.source}`, itself quantized from "
                    f"`{first}`: quantize from `{first}`, or the error adds up",
                    *where,
                )
            shape = models[model.source].synth
            if shape is not None and shape.quant not in FLOATS:
                raise self.fail(
                    f"model `{model.name}` is from `{model.source}`, which is made in "
                    f'{shape.quant}: set quant = "F16" in its `synth`, or the error adds up',
                    *where,
                )

    def build(self, name: str, table: dict[str, object]) -> BuildEntry:
        where = ("builds", name)
        self.keys(table, ("source", "label", "options", "env", "help", "run", "program"), *where)
        if "source" not in table:
            raise self.fail('lacks `source`, such as source = "pypi:xllamacpp==0.2.12"', *where)
        for key in ("run", "program"):
            if key in table and not str(table["source"]).startswith("docker:"):
                raise self.fail(f"`{key}` is for a source `docker:IMAGE`", *where, key)
        env = self.take(table, "env", dict, {}, *where)
        for key, value in env.items():
            if not isinstance(value, str):
                raise self.fail(f"`{key}` must be a string, not {value!r}", *where, "env", key)
        return BuildEntry(
            name=name,
            source=self.take(table, "source", str, "", *where),
            label=self.take(table, "label", str, "", *where) or None,
            options=self.options(table, *where),
            env=env,
            help=self.take(table, "help", str, "", *where),
            run=self.strings(table, "run", *where),
            program=self.take(table, "program", str, "", *where),
        )

    def options(self, table: Mapping[str, object], *where: str) -> dict[str, OptionValue]:
        found: dict[str, OptionValue] = {}
        place = (*where, "options")
        for key, value in self.take(table, "options", dict, {}, *where).items():
            if key.startswith("-"):
                raise self.fail(f"`{key}`: write option names without dashes", *place, key)
            known = from_flag("--" + key)
            long = known[0] if known else key
            if long in OWNED:
                raise self.fail(f"`{key}` is not for a config: {OWNED[long]}", *place, key)
            typed = self.option(value, *place, key)
            if known and not known[1]:
                if not isinstance(typed, bool):
                    raise self.fail(f"`{key}` is a flag: write true or false", *place, key)
                typed = typed is not known[2]  # `no-mmap = true` is `mmap = false`
            elif known and isinstance(typed, bool):
                raise self.fail(f"`{key}` takes a value, not {str(typed).lower()}", *place, key)
            if long == TEMPLATE_FILE:
                typed = self.file(str(typed), *place, key)
            if long in found:
                raise self.fail(f"`{key}` is set twice, under two names: keep one", *place, key)
            found[long] = typed
        return found

    def option(self, value: object, *where: str) -> OptionValue:
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
        if isinstance(value, str | int | float | bool):
            return value
        raise self.fail(
            f"`{where[-1]}` must be a string, a number, true, false or a list of strings, "
            f"not {value!r}",
            *where,
        )

    def file(self, value: str, *where: str) -> str:
        """Return the full path of a file, which is relative to the suite file."""
        path = (self.path.parent / value).absolute()
        if not path.is_file():
            raise self.fail(f"no such file {path}", *where)
        return str(path)

    def tolerances(self, table: object, *where: str) -> dict[str, float]:
        found: dict[str, float] = {}
        for key, value in self.table(table, *where).items():
            try:
                found[key] = check_tolerance(key, value)
            except PlanError as error:
                raise self.fail(str(error), *where, key) from error
        return found

    def workload(self, name: str, table: dict[str, object]) -> Workload:
        where = ("workloads", name)
        keys = ("turns", "parallel", "api", "thinking", "image", "tool", "limit", "help")
        self.keys(table, keys, *where)
        if name == LAUNCH:
            raise self.fail(f"`{LAUNCH}` is taken: it stands for what a start alone shows", *where)
        turns = tuple(
            self.turn(self.table(entry, *where, "turns"), *where, "turns")
            for entry in self.take(table, "turns", list, [], *where)
        )
        if not turns:
            raise self.fail("lacks `turns`, such as [{ prompt = 64, generate = 64 }]", *where)
        if len(turns) > 1 and any(turn.depth for turn in turns):
            raise self.fail("has `depth` among several turns: it goes with a single one", *where)
        limit = table.get("limit")
        seconds = limit if isinstance(limit, int | float) else 0
        if limit is not None and (isinstance(limit, bool) or not 0 < seconds < math.inf):
            raise self.fail(
                f"`limit` must be a number of seconds above 0, not {limit!r}", *where, "limit"
            )
        found = Workload(
            name=name,
            turns=turns,
            help=self.take(table, "help", str, "", *where),
            parallel=self.count(table, "parallel", "requests", 1, 1, *where),
            api=cast("Api", self.choice(table, "api", get_args(Api), *where)),
            thinking=self.take(table, "thinking", bool, False, *where)  # noqa: FBT003 - unused
            if "thinking" in table
            else None,
            image=self.count(table, "image", "pixels", 1, 0, *where) if "image" in table else 0,
            tool=cast("Tool", self.choice(table, "tool", get_args(Tool), *where)),
            limit=float(seconds),
        )
        if wrong := _contradiction(found):
            raise self.fail(wrong, *where)
        return found

    def turn(self, turn: dict[str, object], *where: str) -> Turn:
        self.keys(turn, ("depth", "prompt", "generate"), *where)
        # One generated token has no time between tokens, so no decode speed.
        for key, least in (("prompt", 1), ("generate", 2)):
            value = turn.get(key)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise self.fail(
                    f"`{key}` of a turn must be a whole number of tokens, at least {least}", *where
                )
        return Turn(
            prompt=int(str(turn["prompt"])),
            generate=int(str(turn["generate"])),
            depth=self.count(turn, "depth", "tokens", 0, 0, *where),
        )

    def count(
        self,
        table: Mapping[str, object],
        key: str,
        what: str,
        least: int,
        default: int,
        *where: str,
    ) -> int:
        value = table.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.fail(
                f"`{key}` must be a whole number of {what}, at least {least}, not {value!r}",
                *where,
                key,
            )
        return value

    def choice(
        self, table: Mapping[str, object], key: str, allowed: tuple[str, ...], *where: str
    ) -> str:
        """Return one of the allowed strings; the first where the key is left out."""
        value = self.take(table, key, str, allowed[0], *where)
        if value not in allowed:
            raise self.fail(
                f"`{key}` must be one of {', '.join(allowed)}, not {value!r}", *where, key
            )
        return value

    def corpus_pass(self, name: str, table: dict[str, object]) -> CorpusPass:
        where = ("passes", name)
        self.keys(table, ("corpus", *_SIZES, "path", "marks", "help"), *where)
        if name == LAUNCH:
            raise self.fail(f"`{LAUNCH}` is taken: it stands for what a start alone shows", *where)
        corpus = self.take(table, "corpus", str, "", *where)
        if not corpus:
            raise self.fail('lacks `corpus`, a text file such as "wiki.test.raw"', *where)
        given: dict[str, int] = {}
        for key in _SIZES:
            value = table.get(key)
            if value is None:
                continue
            # Fewer chunks tell nothing of how chunks differ.
            least = FEWEST_CHUNKS if key == "chunks" else 1
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise self.fail(
                    f"`{key}` must be a whole number, at least {least}, not {value!r}", *where, key
                )
            given[key] = value
        context = given.get("context", 512)
        if context < _LEAST_CONTEXT:
            raise self.fail(
                f"`context` must be {_LEAST_CONTEXT} tokens at least, not {context}",
                *where,
                "context",
            )
        # A larger batch takes several chunks at once, which nobody serves.
        batch = given.get("batch", context)
        ubatch = given.get("ubatch", min(batch, 512))
        if not ubatch <= batch <= context:
            raise self.fail(
                f"needs ubatch <= batch <= context, not {ubatch}, {batch}, {context}", *where
            )
        return CorpusPass(
            name=name,
            corpus=corpus,
            context=context,
            batch=batch,
            ubatch=ubatch,
            chunks=given.get("chunks"),
            path=cast("PassPath", self.choice(table, "path", get_args(PassPath), *where)),
            marks=self.strings(table, "marks", *where),
            help=self.take(table, "help", str, "", *where),
        )

    def budgets(self, table: object, *where: str) -> dict[str, float]:
        found: dict[str, float] = {}
        known = [
            metric.name
            for metric in METRICS.values()
            if metric.scope == "quality" and metric.name not in PUBLISHED_ONLY
        ]
        for key, value in self.table(table, *where).items():
            if key not in known:
                raise self.fail(
                    f"`{key}` has no budget{nearest(key, known)}: there are {', '.join(known)}",
                    *where,
                    key,
                )
            unit = METRICS[key].unit
            number = value if isinstance(value, int | float) else 0
            if isinstance(value, bool) or not 0 < number < math.inf:
                raise self.fail(
                    f"`{key}` must be a number of {unit} above 0, not {value!r}", *where, key
                )
            found[key] = float(number)
        return found

    def against(
        self, table: Mapping[str, object], tables: Collection[str], default: str, *where: str
    ) -> str:
        value = self.take(table, "against", str, default, *where)
        is_file = "/" in value or Path(value).suffix in REFERENCE_SUFFIXES
        if value and value not in tables and not is_file:
            raise self.fail(
                f"against `{value}`, which is no config{nearest(value, tables)} and no file: a "
                f"file of recorded distributions ends in {' or '.join(REFERENCE_SUFFIXES)}",
                *where,
                "against",
            )
        # Against itself is what an empty one means.
        return "" if value == where[-1] else value

    def named_model(
        self,
        table: Mapping[str, object],
        key: str,
        default: str,
        models: Mapping[str, Model],
        *where: str,
    ) -> str:
        """Return the name of a text model, ``""`` where none is named."""
        name = self.take(table, key, str, default, *where)
        if name and name not in models:
            raise self.fail(
                f"no model `{name}`{nearest(name, models)}: "
                f"there are {', '.join(models) or 'none'}",
                *where,
                key,
            )
        if name and is_projector(models[name]):
            raise self.fail(
                f"`{name}` is a projector, which no server runs by itself: name it in the key "
                "`projector` of the text model that it is for",
                *where,
                key,
            )
        return name

    def cards(
        self, table: Mapping[str, object], parent: Config | None, *where: str, gpu: bool
    ) -> tuple[int, bool | None]:
        """Return how many GPUs a config takes, and whether it says that it wants no company."""
        gpus = self.take(table, "gpus", int, parent.gpus if parent else 1, *where)
        if gpus < 1:
            raise self.fail(f"`gpus` must be at least 1, not {gpus}", *where, "gpus")
        exclusive = parent.exclusive if parent else None
        if "exclusive" in table:
            exclusive = self.take(table, "exclusive", bool, bool(exclusive), *where)
        if not gpu and "gpus" in table:
            raise self.fail("`gpus` is for a config with gpu = true", *where, "gpus")
        if not gpu and table.get("exclusive") is False:
            raise self.fail(
                "exclusive = false is for a config with gpu = true: what runs on the CPU takes "
                "turns with all else",
                *where,
                "exclusive",
            )
        # A config that takes the GPU of the one it extends back takes back the rest of it too.
        return (gpus, exclusive) if gpu else (1, exclusive or None)

    def configs(
        self, tables: dict[str, dict[str, object]], models: Mapping[str, Model]
    ) -> dict[str, Config]:
        done: dict[str, Config] = {}

        def read(name: str, chain: tuple[str, ...]) -> Config:
            if name in done:
                return done[name]
            where = ("configs", name)
            table = tables[name]
            self.keys(table, _CONFIG_KEYS, *where)
            parent: Config | None = None
            if "extends" in table:
                base = self.take(table, "extends", str, "", *where)
                if base not in tables:
                    raise self.fail(
                        f"extends `{base}`, which is no config{nearest(base, tables)}",
                        *where,
                        "extends",
                    )
                if base in (*chain, name):
                    raise self.fail(
                        f"extends itself by way of {' -> '.join((*chain, name, base))}",
                        *where,
                        "extends",
                    )
                parent = read(base, (*chain, name))
            model, draft = (
                self.named_model(table, key, default, models, *where)
                for key, default in (
                    ("model", parent.model if parent else ""),
                    ("draft", parent.draft if parent else ""),
                )
            )
            if not model:
                raise self.fail("lacks `model`, a name in [models]", *where)
            from_file: dict[str, OptionValue] = {}
            if env_file := self.take(table, "env-file", str, "", *where):
                if not (self.path.parent / env_file).is_file():
                    raise self.fail(
                        f"no env-file {self.path.parent / env_file}", *where, "env-file"
                    )
                from_file = read_env_file(self.path.parent / env_file)
            gpu = self.take(table, "gpu", bool, parent.gpu if parent else False, *where)
            gpus, exclusive = self.cards(table, parent, *where, gpu=gpu)
            tolerances = self.tolerances(table.get("tolerances", {}), *where, "tolerances")
            budgets = self.budgets(table.get("budgets", {}), *where, "budgets")
            inherited: Mapping[str, OptionValue] = parent.options if parent else {}
            done[name] = Config(
                name=name,
                model=model,
                options={**inherited, **from_file, **self.options(table, *where)},
                gpu=gpu,
                gpus=gpus,
                exclusive=exclusive,
                marks=self.strings(table, "marks", *where)
                if "marks" in table
                else (parent.marks if parent else ()),
                tolerances={**(parent.tolerances if parent else {}), **tolerances},
                help=self.take(table, "help", str, "", *where),
                reference=self.take(
                    table, "reference", str, parent.reference if parent else "", *where
                ),
                against=self.against(table, tables, parent.against if parent else "", *where),
                budgets={**(parent.budgets if parent else {}), **budgets},
                draft=draft,
            )
            return done[name]

        return {name: read(name, ()) for name in tables}


def _contradiction(workload: Workload) -> str:
    """Return which keys of a workload do not go together, ``""`` if all do."""
    chat = workload.api == "chat"
    if workload.tool == "llama-bench":
        other = chat or workload.image or workload.thinking is not None
        if other or workload.parallel > 1 or len(workload.turns) > 1:
            return (
                "llama-bench takes one turn of `depth`, `prompt` and `generate`, and nothing else"
            )
        return ""
    if workload.thinking is not None and not chat:
        return '`thinking` is for the chat template: set api = "chat"'
    if workload.image and not chat:
        return '`image` goes with a message: set api = "chat"'
    if chat and any(turn.depth for turn in workload.turns):
        return "`depth` is counted in tokens before a prompt of tokens: leave `api` out"
    return ""


def load_suite(path: Path) -> Suite:
    """Read and check a suite file.

    Args:
        path: A TOML file as described in ``docs/suite-file.md``.

    Raises:
        PlanError: On the first mistake, with file and line.
    """
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError as error:
        raise PlanError(
            "there is no such suite file: give another with --llmperf-suite=FILE", path
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"cannot read the suite file: {error}", path) from error
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        position = re.search(r"\(at line (\d+), column \d+\)", str(error))
        line = int(position.group(1)) if position else len(text.splitlines())
        reason = re.sub(r"\s*\(at .*\)$", "", str(error))
        raise PlanError(f"not valid TOML: {reason}", path, line) from error
    reader = _Reader(path, text)
    reader.keys(document, _SECTIONS)
    models = reader.each(document, "models", reader.model)
    reader.sources(models)
    tables = reader.each(document, "configs", lambda _name, table: table)
    workloads = reader.each(document, "workloads", reader.workload)
    passes = reader.each(document, "passes", reader.corpus_pass)
    for name in passes:
        if name in workloads:
            raise reader.fail(
                f"`{name}` is a workload already: choose another name", "passes", name
            )
    return Suite(
        path=path,
        models=models,
        builds=reader.each(document, "builds", reader.build),
        configs=reader.configs(tables, models),
        workloads=workloads,
        passes=passes,
        tolerances=reader.tolerances(document.get("tolerances", {}), "tolerances"),
    )
