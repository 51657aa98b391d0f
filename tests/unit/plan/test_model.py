"""Models and shapes as the suite file names them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from pytest_llmperf.errors import PlanError
from pytest_llmperf.plan.model import (
    BLOCK_QUANTS,
    MIXTURES,
    QUANTS,
    WEIGHT_TYPES,
    Model,
    PresetSpec,
    SynthSpec,
    check_projector,
)
from pytest_llmperf.plan.shapes import PRESETS, Shape

TEXT = {name: shape for name, shape in PRESETS.items() if isinstance(shape, Shape)}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers": 0}, "`layers` must be a whole number of at least 1, not 0"),
        ({"layers": True}, "`layers` must be a whole number of at least 1, not True"),
        ({"context": 1.5}, "`context` must be a whole number"),
        ({"seed": -1}, "`seed` must be a whole number of at least 0"),
        ({"vocab": 300}, "`vocab` must be a whole number of at least 512, not 300"),
        ({"quant": "Q4_K"}, "`quant` must be one of F32, F16, BF16, Q8_0, .* not 'Q4_K'"),
        ({"quant": "Q4_K"}, "made from an F16 one with llama-quantize"),
        ({"embedding": 320}, r"`embedding` \(320\).*`heads` 4 use 256 or 384"),
        ({"embedding": 64}, r"`embedding` \(64\).*`heads` 4 use 128"),
        ({"kv_heads": 3}, r"`kv-heads` \(3\) must divide `heads` \(4\): use one of 1, 2, 4"),
        ({"kv_heads": 8}, r"`kv-heads` \(8\) must divide `heads` \(4\)"),
        ({"feed_forward": 770}, r"`feed-forward` \(770\).*use 768 or 800"),
    ],
)
def test_a_shape_that_does_not_fit_names_field_and_mend(
    fields: dict[str, int], message: str
) -> None:
    """A value out of range or at odds with the others is refused, with what would do."""
    with pytest.raises(PlanError, match=message):
        SynthSpec(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("quant", QUANTS)
def test_every_quant_is_accepted(quant: str) -> None:
    """The default shape fits every quant on offer."""
    assert SynthSpec(quant=quant).quant == quant


def test_head_size_is_the_embedding_shared_by_the_heads() -> None:
    """Embedding 512 and 8 heads are 64 values a head."""
    assert SynthSpec(embedding=512, heads=8, kv_heads=4).head_size == 64


def test_equal_shapes_have_the_same_digest() -> None:
    """The digest depends on the values alone."""
    assert SynthSpec(layers=2).digest() == SynthSpec(layers=2).digest()


def test_each_field_changes_the_digest() -> None:
    """No two shapes share a file."""
    changed = {
        "layers": 5,
        "embedding": 384,
        "heads": 2,
        "kv_heads": 1,
        "feed_forward": 800,
        "vocab": 2049,
        "context": 4096,
        "quant": "Q4_0",
        "seed": 2,
    }
    assert set(changed) == {field.name for field in dataclasses.fields(SynthSpec)}
    plain = SynthSpec()
    digests = {dataclasses.replace(plain, **{k: v}).digest() for k, v in changed.items()}  # type: ignore[arg-type]
    assert len(digests | {plain.digest()}) == len(changed) + 1


def test_a_digest_is_fit_for_a_file_name() -> None:
    """It is twelve hexadecimal digits."""
    digest = SynthSpec().digest()
    assert len(digest) == 12
    assert set(digest) <= set("0123456789abcdef")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"preset": "llama-1B"},
            r"no preset `llama-1B` \(nearest: llama-1b\): there are llama-10m, ",
        ),
        ({"quant": "Q4_K_S"}, r"one of F16, .*, MXFP4_MOE, not 'Q4_K_S' \(nearest: Q4_K_M"),
        ({"quant": "F32"}, "`quant` of llama-1b must be one of F16, Q8_0"),
        ({"quant": "MXFP4_MOE"}, "llama-1b has no experts, .*: use Q8_0, or a preset with"),
        ({"embedding": 512}, "`embedding` of llama-1b is 2048, as published: leave it out"),
        ({"preset": "qwen35-27b", "layers": 3}, "`layers` of qwen35-27b must be at least 4, not 3"),
        ({"preset": "vision-tiny", "quant": "Q8_0"}, "of vision-tiny must be F16, not 'Q8_0'"),
        ({"preset": "vision-tiny", "vocab": 600}, "is a projector and has no vocabulary"),
        ({"preset": "vision-tiny", "embedding": 0}, "`embedding` must be a whole number of at"),
        ({"layers": 0}, "`layers` must be a whole number of at least 1, not 0"),
        ({"vocab": 300}, "`vocab` must be a whole number of at least 512, not 300"),
        ({"seed": -1}, "`seed` must be a whole number of at least 0, not -1"),
        ({"context": True}, "`context` must be a whole number of at least 1, not True"),
    ],
)
def test_a_preset_that_cannot_be_made_is_refused(fields: dict[str, Any], message: str) -> None:
    """With what there is instead."""
    with pytest.raises(PlanError, match=message):
        PresetSpec(**{"preset": "llama-1b", **fields})


@pytest.mark.parametrize("preset", TEXT)
@pytest.mark.parametrize("quant", [*BLOCK_QUANTS, "Q4_K_M"])
def test_every_preset_takes_every_quant(preset: str, quant: str) -> None:
    """And keeps the shape of its name."""
    assert PresetSpec(preset, quant).shape == PRESETS[preset]


def test_every_mixture_of_experts_takes_every_mixture_of_types() -> None:
    """MXFP4_MOE is made for experts."""
    experts = [name for name, shape in TEXT.items() if shape.experts]
    assert len(experts) == 4
    for name in experts:
        assert [PresetSpec(name, quant).quant for quant in MIXTURES] == list(MIXTURES)


def test_a_quant_left_out_is_the_usual_one() -> None:
    """Models come in four bits, projectors in halves; left out or said is the same model."""
    assert PresetSpec("llama-1b") == PresetSpec("llama-1b", quant="Q4_K")
    assert PresetSpec("vision-tiny") == PresetSpec("vision-tiny", quant="F16")


def test_a_preset_can_be_made_smaller() -> None:
    """Layers and vocabulary are set apart from the rest of the shape."""
    shape = PresetSpec("llama-8b", layers=2, vocab=1000).shape
    assert shape == dataclasses.replace(TEXT["llama-8b"], layers=2, vocab=1000)


def test_each_field_of_a_preset_changes_the_digest() -> None:
    """No two contents share a file, and one content has one name."""
    plain = PresetSpec("llama-1b")
    changed = {
        "preset": "llama-3b",
        "quant": "Q8_0",
        "seed": 2,
        "layers": 2,
        "vocab": 1000,
        "context": 64,
    }
    fields = {field.name for field in dataclasses.fields(PresetSpec)}
    assert set(changed) == fields - {"embedding"}
    digests = {dataclasses.replace(plain, **{k: v}).digest() for k, v in changed.items()}  # type: ignore[arg-type]
    assert len(digests | {plain.digest()}) == len(changed) + 1
    assert PresetSpec("llama-1b", layers=16).digest() == plain.digest()
    widths = {PresetSpec("vision-tiny", embedding=width).digest() for width in (256, 512)}
    assert len(widths | {PresetSpec("vision-tiny").digest()}) == 2


def test_a_model_needs_a_file_a_shape_or_a_source() -> None:
    """None of them is refused, with the model's name."""
    with pytest.raises(PlanError) as caught:
        Model("tiny")
    assert str(caught.value) == (
        "model `tiny` needs one of `file`, `synth`, and `from` with `quantize`, has none"
    )


@pytest.mark.parametrize(
    ("model", "found"),
    [
        ({"file": "tiny.gguf", "synth": SynthSpec()}, "`file` and `synth`"),
        ({"file": "tiny.gguf", "source": "a", "quantize": "Q4_K"}, "`file` and `from`"),
        ({"synth": SynthSpec(), "source": "a", "quantize": "Q4_K"}, "`synth` and `from`"),
    ],
)
def test_a_model_is_one_thing(model: dict[str, Any], found: str) -> None:
    """Two are refused, and named."""
    with pytest.raises(PlanError, match=rf"model `tiny` needs one of .*, has {found}\Z"):
        Model("tiny", **model)


@pytest.mark.parametrize("kind", WEIGHT_TYPES)
def test_every_weight_type_is_accepted(kind: str) -> None:
    """Each can be made without an importance matrix."""
    assert Model("tiny", source="big", quantize=kind).quantize == kind


def test_a_source_needs_a_weight_type() -> None:
    """Otherwise it would be another name for the same model."""
    with pytest.raises(PlanError, match=r"has `from` and lacks `quantize`: .*F16, Q8_0"):
        Model("t", source="big")


def test_a_weight_type_needs_a_source() -> None:
    """A model that is named by its file has the types it has."""
    with pytest.raises(PlanError, match="model `t` has `quantize` and lacks `from`: name the mod"):
        Model("t", file="t.gguf", quantize="Q4_K")


@pytest.mark.parametrize(
    ("quantize", "kind"),
    [("Q4_K_M", "Q4_K"), ("q3_k_l", "Q3_K"), ("Q2_K_S", "Q2_K"), ("MXFP4_MOE", "MXFP4")],
)
def test_a_mixture_is_refused_with_the_two_ways_out(quantize: str, kind: str) -> None:
    """One type for every matrix is something else, and must not pass for it."""
    with pytest.raises(PlanError) as caught:
        Model("t", source="big", quantize=quantize)
    assert str(caught.value) == (
        f"`quantize` of model `t`: {quantize} is a mixture of types, and here every matrix gets "
        f"the same type: write {kind}, or make the mixture with llama-quantize and name its file "
        "with `file`"
    )


@pytest.mark.parametrize(
    ("quantize", "nearest"), [("q4_k", " (nearest: Q4_K)"), ("fp16", " (nearest: F16)"), ("8", "")]
)
def test_what_is_no_weight_type_is_refused(quantize: str, nearest: str) -> None:
    """With all there are, and the one that was meant."""
    with pytest.raises(PlanError) as caught:
        Model("t", source="big", quantize=quantize)
    assert str(caught.value) == (
        f"`quantize` of model `t` must be one of {', '.join(WEIGHT_TYPES)}, "
        f"not {quantize!r}{nearest}"
    )


def test_an_empty_file_name_is_refused() -> None:
    """A name of blanks would match any folder."""
    with pytest.raises(PlanError, match="`file` of model `tiny` is empty"):
        Model("tiny", file=" ")


@pytest.mark.parametrize("sha256", ["", "abc", "g" * 64, "a" * 63, "a" * 64 + "\n"])
def test_what_is_no_hash_is_refused(sha256: str) -> None:
    """A hash is 64 hexadecimal digits and nothing else."""
    with pytest.raises(PlanError, match="`sha256` of model `tiny` must be 64 hexadecimal digits"):
        Model("tiny", file="tiny.gguf", sha256=sha256)


def test_a_hash_is_kept_in_lower_case() -> None:
    """Tools that print upper case do not cause a mismatch."""
    assert Model("tiny", file="tiny.gguf", sha256="AB" * 32).sha256 == "ab" * 32


PROJECTOR = Model("eyes", synth=PresetSpec("vision-tiny"))


@pytest.mark.parametrize(
    ("model", "projector"),
    [
        (Model("m", synth=SynthSpec()), PROJECTOR),
        (
            Model("m", synth=PresetSpec("llama-10m")),
            Model("eyes", synth=PresetSpec("vision-tiny", embedding=512)),
        ),
        (Model("m", file="m.gguf"), PROJECTOR),
        (Model("m", synth=SynthSpec()), Model("eyes", file="mmproj.gguf")),
    ],
)
def test_a_projector_that_may_fit_passes(model: Model, projector: Model) -> None:
    """What is in a file only the server knows."""
    check_projector(model, projector)


@pytest.mark.parametrize(
    ("model", "projector", "message"),
    [
        (
            Model("m", synth=PresetSpec("llama-10m")),
            PROJECTOR,
            "`eyes` makes tokens 256 wide and model `m` reads 512: set embedding = 512 in the",
        ),
        (
            Model("m", synth=SynthSpec()),
            Model("eyes", synth=SynthSpec()),
            "projector `eyes` of model `m` is a text model: name a model of the preset vision-tiny",
        ),
        (
            Model("m", synth=PresetSpec("vision-tiny")),
            PROJECTOR,
            "model `m` is a projector itself: name a projector in the text model",
        ),
    ],
)
def test_a_projector_that_does_not_fit_is_refused(
    model: Model, projector: Model, message: str
) -> None:
    """Before a server is started that would refuse it."""
    with pytest.raises(PlanError, match=message):
        check_projector(model, projector)
