"""Reads ``[builds]`` and ``[configs]`` of a suite file."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path

from pytest_llmperf.errors import nearest
from pytest_llmperf.metrics import METRICS, PUBLISHED_ONLY
from pytest_llmperf.plan.config import REFERENCE_SUFFIX, BuildEntry, Config
from pytest_llmperf.plan.env_file import read_env_file
from pytest_llmperf.plan.model import Model, is_projector
from pytest_llmperf.plan.options import OptionValue
from pytest_llmperf.plan.reader import Reader

_CONFIG_KEYS = (
    *("model", "draft", "extends", "options", "env-file", "gpu", "marks", "tolerances"),
    *("against", "budgets", "help", "reference", "gpus", "exclusive"),
)
REFERENCE_SUFFIXES = (REFERENCE_SUFFIX, ".kld")
"""Ends of the names of recorded distributions: compact ones, and those of llama-perplexity."""


def read_build(reader: Reader, name: str, table: dict[str, object]) -> BuildEntry:
    """Return an entry of ``[builds]``.

    Raises:
        PlanError: With file and line.
    """
    where = ("builds", name)
    reader.keys(table, ("source", "label", "options", "env", "help", "run", "program"), *where)
    if "source" not in table:
        raise reader.fail('lacks `source`, such as source = "pypi:xllamacpp==0.2.12"', *where)
    for key in ("run", "program"):
        if key in table and not str(table["source"]).startswith("docker:"):
            raise reader.fail(f"`{key}` is for a source `docker:IMAGE`", *where, key)
    env = reader.take(table, "env", dict, {}, *where)
    for key, value in env.items():
        if not isinstance(value, str):
            raise reader.fail(f"`{key}` must be a string, not {value!r}", *where, "env", key)
    return BuildEntry(
        name=name,
        source=reader.take(table, "source", str, "", *where),
        label=reader.take(table, "label", str, "", *where) or None,
        options=reader.options(table, *where),
        env=env,
        help=reader.take(table, "help", str, "", *where),
        run=reader.strings(table, "run", *where),
        program=reader.take(table, "program", str, "", *where),
    )


def read_configs(
    reader: Reader, tables: dict[str, dict[str, object]], models: Mapping[str, Model]
) -> dict[str, Config]:
    """Return the configs, each with what it inherits, in the order of the file.

    Raises:
        PlanError: With file and line.
    """
    done: dict[str, Config] = {}

    def read(name: str, chain: tuple[str, ...]) -> Config:
        if name in done:
            return done[name]
        where = ("configs", name)
        table = tables[name]
        reader.keys(table, _CONFIG_KEYS, *where)
        parent: Config | None = None
        if "extends" in table:
            base = reader.take(table, "extends", str, "", *where)
            if base not in tables:
                raise reader.fail(
                    f"extends `{base}`, which is no config{nearest(base, tables)}",
                    *where,
                    "extends",
                )
            if base in (*chain, name):
                raise reader.fail(
                    f"extends itself by way of {' -> '.join((*chain, name, base))}",
                    *where,
                    "extends",
                )
            parent = read(base, (*chain, name))
        model, draft = (
            _named_model(reader, table, key, default, models, *where)
            for key, default in (
                ("model", parent.model if parent else ""),
                ("draft", parent.draft if parent else ""),
            )
        )
        if not model:
            raise reader.fail("lacks `model`, a name in [models]", *where)
        from_file: dict[str, OptionValue] = {}
        if env_file := reader.take(table, "env-file", str, "", *where):
            if not (reader.path.parent / env_file).is_file():
                raise reader.fail(
                    f"no env-file {reader.path.parent / env_file}", *where, "env-file"
                )
            from_file = read_env_file(reader.path.parent / env_file)
        gpu = reader.take(table, "gpu", bool, parent.gpu if parent else False, *where)
        gpus, exclusive = _cards(reader, table, parent, *where, gpu=gpu)
        tolerances = reader.tolerances(table.get("tolerances", {}), *where, "tolerances")
        budgets = _budgets(reader, table.get("budgets", {}), *where, "budgets")
        inherited: Mapping[str, OptionValue] = parent.options if parent else {}
        done[name] = Config(
            name=name,
            model=model,
            options={**inherited, **from_file, **reader.options(table, *where)},
            gpu=gpu,
            gpus=gpus,
            exclusive=exclusive,
            marks=reader.strings(table, "marks", *where)
            if "marks" in table
            else (parent.marks if parent else ()),
            tolerances={**(parent.tolerances if parent else {}), **tolerances},
            help=reader.take(table, "help", str, "", *where),
            reference=reader.take(
                table, "reference", str, parent.reference if parent else "", *where
            ),
            against=_against(reader, table, tables, parent.against if parent else "", *where),
            budgets={**(parent.budgets if parent else {}), **budgets},
            draft=draft,
        )
        return done[name]

    return {name: read(name, ()) for name in tables}


def _named_model(
    reader: Reader,
    table: Mapping[str, object],
    key: str,
    default: str,
    models: Mapping[str, Model],
    *where: str,
) -> str:
    """Return the name of a text model, ``""`` where none is named."""
    name = reader.take(table, key, str, default, *where)
    if name and name not in models:
        raise reader.fail(
            f"no model `{name}`{nearest(name, models)}: there are {', '.join(models) or 'none'}",
            *where,
            key,
        )
    if name and is_projector(models[name]):
        raise reader.fail(
            f"`{name}` is a projector, which no server runs by itself: name it in the key "
            "`projector` of the text model that it is for",
            *where,
            key,
        )
    return name


def _cards(
    reader: Reader, table: Mapping[str, object], parent: Config | None, *where: str, gpu: bool
) -> tuple[int, bool | None]:
    """Return how many GPUs a config takes, and whether it says that it wants no company."""
    gpus = reader.take(table, "gpus", int, parent.gpus if parent else 1, *where)
    if gpus < 1:
        raise reader.fail(f"`gpus` must be at least 1, not {gpus}", *where, "gpus")
    exclusive = parent.exclusive if parent else None
    if "exclusive" in table:
        exclusive = reader.take(table, "exclusive", bool, bool(exclusive), *where)
    if not gpu and "gpus" in table:
        raise reader.fail("`gpus` is for a config with gpu = true", *where, "gpus")
    if not gpu and table.get("exclusive") is False:
        raise reader.fail(
            "exclusive = false is for a config with gpu = true: what runs on the CPU takes "
            "turns with all else",
            *where,
            "exclusive",
        )
    # A config that takes the GPU of the one it extends back takes back the rest of it too.
    return (gpus, exclusive) if gpu else (1, exclusive or None)


def _budgets(reader: Reader, table: object, *where: str) -> dict[str, float]:
    found: dict[str, float] = {}
    known = [
        metric.name
        for metric in METRICS.values()
        if metric.scope == "quality" and metric.name not in PUBLISHED_ONLY
    ]
    for key, value in reader.table(table, *where).items():
        if key not in known:
            raise reader.fail(
                f"`{key}` has no budget{nearest(key, known)}: there are {', '.join(known)}",
                *where,
                key,
            )
        unit = METRICS[key].unit
        number = value if isinstance(value, int | float) else 0
        if isinstance(value, bool) or not 0 < number < math.inf:
            raise reader.fail(
                f"`{key}` must be a number of {unit} above 0, not {value!r}", *where, key
            )
        found[key] = float(number)
    return found


def _against(
    reader: Reader, table: Mapping[str, object], tables: Collection[str], default: str, *where: str
) -> str:
    value = reader.take(table, "against", str, default, *where)
    is_file = "/" in value or Path(value).suffix in REFERENCE_SUFFIXES
    if value and value not in tables and not is_file:
        raise reader.fail(
            f"against `{value}`, which is no config{nearest(value, tables)} and no file: a "
            f"file of recorded distributions ends in {' or '.join(REFERENCE_SUFFIXES)}",
            *where,
            "against",
        )
    # Against itself is what an empty one means.
    return "" if value == where[-1] else value
