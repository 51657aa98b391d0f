"""Reads ``[models]`` of a suite file."""

from __future__ import annotations

from collections.abc import Mapping

from pytest_llmperf.errors import PlanError, nearest
from pytest_llmperf.plan.model import FLOATS, Model, PresetSpec, SynthSpec, check_projector
from pytest_llmperf.plan.reader import Reader


def read_model(reader: Reader, name: str, table: dict[str, object]) -> Model:
    """Return an entry of ``[models]``.

    Raises:
        PlanError: With file and line.
    """
    where = ("models", name)
    reader.keys(table, ("file", "synth", "from", "quantize", "sha256", "projector", "help"), *where)
    try:
        synth: SynthSpec | PresetSpec | None = None
        if "synth" in table:
            shape = reader.take(table, "synth", dict, {}, *where)
            made = PresetSpec if "preset" in shape else SynthSpec
            allowed = [f.replace("_", "-") for f in made.__dataclass_fields__]
            reader.keys(shape, allowed, *where, "synth")
            for key, value in shape.items():
                kind = str if key in {"preset", "quant"} else int
                if not isinstance(value, kind) or isinstance(value, bool):
                    shown = "a string" if kind is str else "a whole number"
                    raise reader.fail(
                        f"`{key}` must be {shown}, not {value!r}", *where, "synth", key
                    )
            synth = made(**{key.replace("-", "_"): shape[key] for key in shape})
        return Model(
            name=name,
            file=reader.take(table, "file", str, "", *where) or None,
            synth=synth,
            source=reader.take(table, "from", str, "", *where) or None,
            quantize=reader.take(table, "quantize", str, "", *where) or None,
            sha256=reader.take(table, "sha256", str, "", *where) or None,
            projector=reader.take(table, "projector", str, "", *where) or None,
            help=reader.take(table, "help", str, "", *where),
        )
    except PlanError as error:
        if error.file is not None:
            raise
        raise reader.fail(str(error), *where) from error


def check_sources(reader: Reader, models: Mapping[str, Model]) -> None:
    """Check that what is quantized is a model of the file, and of floats as far as known."""
    for model in models.values():
        if model.projector is not None and model.projector not in models:
            raise reader.fail(
                f"model `{model.name}` has the projector `{model.projector}`, which is no "
                f"model{nearest(model.projector, models)}: give its file a name in [models]",
                "models",
                model.name,
                "projector",
            )
        if model.projector is not None:
            if model.projector == model.name:
                raise reader.fail(
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
                raise reader.fail(str(error), *where) from error
        if model.source is None:
            continue
        where = ("models", model.name, "from")
        others = [name for name in models if name != model.name]
        if model.source not in others:
            raise reader.fail(
                f"model `{model.name}` is from `{model.source}`, which is no other model"
                f"{nearest(model.source, others)}: there are {', '.join(others) or 'none'}",
                *where,
            )
        if (first := models[model.source].source) is not None:
            raise reader.fail(
                f"model `{model.name}` is from `{model.source}`, itself quantized from "
                f"`{first}`: quantize from `{first}`, or the error adds up",
                *where,
            )
        shape = models[model.source].synth
        if shape is not None and shape.quant not in FLOATS:
            raise reader.fail(
                f"model `{model.name}` is from `{model.source}`, which is made in "
                f'{shape.quant}: set quant = "F16" in its `synth`, or the error adds up',
                *where,
            )
