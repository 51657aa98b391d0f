"""Files that make tokens of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pytest_llmperf.models.presets import size_of
from pytest_llmperf.models.synth import make_model
from pytest_llmperf.plan.model import PresetSpec, SynthSpec

gguf = pytest.importorskip("gguf")

TINY = PresetSpec("vision-tiny")


def test_the_metadata_is_what_llama_cpp_reads(tmp_path: Path) -> None:
    """Every key that its loader asks for, and the type that tells a projector from a model."""
    reader = gguf.GGUFReader(make_model(TINY, tmp_path))
    found = {key: field.contents() for key, field in reader.fields.items()}
    expected = {
        "general.architecture": "clip",
        "general.type": "mmproj",
        "clip.has_vision_encoder": True,
        "clip.projector_type": "mlp",
        "clip.vision.image_size": 64,
        "clip.vision.patch_size": 16,
        "clip.vision.embedding_length": 128,
        "clip.vision.feed_forward_length": 256,
        "clip.vision.block_count": 3,
        "clip.vision.projection_dim": 256,
        "clip.vision.attention.head_count": 2,
        "clip.vision.image_mean": [0.5] * 3,
        "clip.vision.image_std": [0.5] * 3,
    }
    assert {key: found.get(key) for key in expected} == expected
    assert "clip.vision.attention.layer_norm_epsilon" in found
    assert not [key for key in found if key.startswith("tokenizer")]


def test_matrices_are_halves_and_vectors_floats(tmp_path: Path) -> None:
    """Rows are of the sizes that the transformer and the text model have."""
    path = make_model(TINY, tmp_path)
    reader = gguf.GGUFReader(path)
    shapes = {one.name: tuple(int(size) for size in one.shape) for one in reader.tensors}
    assert shapes["v.patch_embd.weight"] == (16, 16, 3, 128)
    assert shapes["v.position_embd.weight"] == (128, 16)
    assert shapes["v.blk.0.ffn_up.weight"] == (128, 256)
    assert shapes["v.blk.2.ffn_down.weight"] == (256, 128)
    assert shapes["mm.0.weight"] == (128, 256)
    assert shapes["mm.2.weight"] == (256, 256)
    assert path.stat().st_size == pytest.approx(size_of(TINY), rel=0.01)
    kinds: dict[str, Any] = {one.name: one.tensor_type.name for one in reader.tensors}
    assert {kind for name, kind in kinds.items() if len(shapes[name]) == 1} == {"F32"}
    assert {kind for name, kind in kinds.items() if name.startswith("mm.") and "w" in name} == {
        "F16"
    }


def test_tokens_of_images_hold_the_constant_of_text(tmp_path: Path) -> None:
    """Without it the model would say bytes after an image."""
    tensors = {one.name: one.data for one in gguf.GGUFReader(make_model(TINY, tmp_path)).tensors}
    assert tensors["mm.2.bias"].tolist() == [2.0] + [0.0] * 255
    assert not tensors["mm.2.weight"][0].any()
    assert tensors["mm.2.weight"][1:].any(axis=1).all()


def test_patches_become_as_large_as_norms_expect(tmp_path: Path) -> None:
    """A picture of noise as bright as pictures are gives values of the size of positions."""
    tensors = {one.name: one.data for one in gguf.GGUFReader(make_model(TINY, tmp_path)).tensors}
    kernel = tensors["v.patch_embd.weight"].astype(np.float32).reshape(128, -1)
    seen = kernel @ np.random.default_rng(1).uniform(-1, 1, kernel.shape[1])
    assert seen.std() == pytest.approx(0.58, rel=0.3)


def test_its_width_can_be_that_of_any_model() -> None:
    """The default is that of the default text model."""
    plain = TINY.shape
    assert getattr(plain, "projection", None) == SynthSpec().embedding
    assert getattr(PresetSpec("vision-tiny", embedding=512).shape, "projection", None) == 512
