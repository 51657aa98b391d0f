"""Files of models of published shapes."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pytest_llmperf.errors import ModelError
from pytest_llmperf.models import large, presets
from pytest_llmperf.models.presets import (
    check_room,
    preset_tensors,
    size_of,
    weights_of,
    write_preset,
)
from pytest_llmperf.models.synth import make_model
from pytest_llmperf.models.vocabulary import vocabulary
from pytest_llmperf.plan.model import BLOCK_QUANTS, MIXTURES, SUPER_BLOCK, PresetSpec
from pytest_llmperf.plan.shapes import PRESETS, Shape

gguf = pytest.importorskip("gguf")

TEXT = {name: shape for name, shape in PRESETS.items() if isinstance(shape, Shape)}


def tensors(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Read the values of every tensor."""
    return {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        for tensor in gguf.GGUFReader(path).tensors
    }


@pytest.mark.parametrize(
    ("preset", "millions"),
    [
        ("llama-10m", 10),
        ("llama-150m", 150),
        ("llama-1b", 1_499),
        ("llama-3b", 3_607),
        ("llama-8b", 8_030),
        ("qwen3-moe-tiny", 10),
        ("qwen3-moe-30b-a3b", 30_532),
        ("qwen35-tiny", 12),
        ("qwen35-27b", 27_000),
        ("qwen35-moe-tiny", 32),
        ("qwen35-35b-a3b", 35_000),
        ("vision-tiny", 0.6),
    ],
)
def test_presets_have_the_weights_of_their_names(preset: str, millions: float) -> None:
    """Those of the published models, and the output matrix where they share it."""
    assert weights_of(PresetSpec(preset)) / 1e6 == pytest.approx(millions, rel=0.06)


def test_published_shapes_are_met_exactly() -> None:
    """The two that share no matrix have the published number of weights."""
    assert weights_of(PresetSpec("llama-8b")) == 8_030_261_248
    assert weights_of(PresetSpec("qwen3-moe-30b-a3b")) == 30_532_122_624


@pytest.mark.parametrize("preset", TEXT)
def test_rows_of_presets_are_whole_blocks(preset: str) -> None:
    """In every type; and embeddings have more than the block that the constant takes."""
    shape = TEXT[preset]
    widths = [shape.embedding, shape.heads * shape.head_size, shape.feed_forward]
    widths += [shape.expert_feed_forward, shape.shared_feed_forward]
    widths += [shape.linear.values] if shape.linear else []
    assert all(width % SUPER_BLOCK == 0 for width in widths)
    assert shape.embedding > SUPER_BLOCK
    assert shape.heads % shape.kv_heads == 0
    assert shape.experts_used <= shape.experts


@pytest.mark.parametrize("quant", BLOCK_QUANTS)
@pytest.mark.parametrize("preset", ["llama-10m", "qwen3-moe-tiny"])
def test_a_preset_is_what_it_says(preset: str, quant: str, tmp_path: Path) -> None:
    """Weights of the spread that the scaling counts on, and the constant where it belongs."""
    spec = PresetSpec(preset, quant=quant, layers=1, vocab=600)
    path = make_model(spec, tmp_path)
    assert path == tmp_path / f"{preset}-{quant}-{spec.digest()}.gguf"
    assert path.stat().st_size == pytest.approx(size_of(spec), rel=0.02)
    found = tensors(path)
    assert sum(values.size for values in found.values()) == weights_of(spec)
    for name, values in found.items():
        assert np.isfinite(values).all(), name
    assert (found["token_embd.weight"][:, 0] == 2).all()
    assert found["token_embd.weight"][:, SUPER_BLOCK:].std() == pytest.approx(1, rel=0.02)
    voices = np.array(vocabulary(600).voices)
    assert (found["output.weight"][voices == "never", 0] == -24).all()
    assert (found["output.weight"][voices == "often", 0] == 0).all()
    assert found["blk.0.attn_q.weight"].std() * 512**0.5 == pytest.approx(
        2**0.5 if preset == "llama-10m" else 1, rel=0.03
    )
    down = found["blk.0.ffn_down.weight" if preset == "llama-10m" else "blk.0.ffn_down_exps.weight"]
    for writes in (found["blk.0.attn_output.weight"], *down.reshape(-1, 512, down.shape[-1])):
        assert not writes[0].any()
        assert writes[1:].any(axis=1).all()
    for norm in ("attn_norm", "ffn_norm"):
        assert found[f"blk.0.{norm}.weight"][0] == 0


def test_a_mixture_of_experts_has_their_keys_and_tensors(tmp_path: Path) -> None:
    """Names and shapes are those that llama.cpp loads for the architecture."""
    spec = PresetSpec("qwen3-moe-tiny", layers=1, vocab=600)
    reader = gguf.GGUFReader(make_model(spec, tmp_path))

    def field(key: str) -> Any:  # noqa: ANN401  whatever the file holds
        return reader.get_field(key).contents()

    assert field("general.architecture") == "qwen3moe"
    assert field("qwen3moe.expert_count") == 8
    assert field("qwen3moe.expert_used_count") == 2
    assert field("qwen3moe.expert_feed_forward_length") == 256
    assert field("qwen3moe.attention.key_length") == 128
    assert field("general.file_type") == gguf.LlamaFileType.MOSTLY_Q4_K_S
    known = gguf.MODEL_TENSORS[gguf.MODEL_ARCH.QWEN3MOE]
    names = {gguf.TENSOR_NAMES[one].format(bid=0) + ".weight" for one in known}
    shapes = {tensor.name: [int(n) for n in tensor.shape] for tensor in reader.tensors}
    assert set(shapes) == names
    assert shapes["blk.0.ffn_down_exps.weight"] == [256, 512, 8]
    assert shapes["blk.0.attn_q.weight"] == [512, 6 * 128]
    router = next(tensor for tensor in reader.tensors if "ffn_gate_inp" in tensor.name)
    assert router.tensor_type == gguf.GGMLQuantizationType.F32


def test_a_preset_does_not_depend_on_its_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However little is in memory at once, the bytes are the same, and all of them are told."""
    spec = PresetSpec("qwen3-moe-tiny", quant="Q6_K", layers=1, vocab=600)
    write_preset(spec, tmp_path / "large")
    monkeypatch.setattr(large, "_PIECE", 40_000)
    monkeypatch.setattr(presets, "_SETTLE", 100_000)
    told: list[int] = []
    write_preset(spec, tmp_path / "small", told.append)
    assert (tmp_path / "large").read_bytes() == (tmp_path / "small").read_bytes()
    assert len(told) > 60
    assert sum(told) == sum(tensor.size for tensor in preset_tensors(spec))


def test_a_seed_gives_other_weights_of_a_preset(tmp_path: Path) -> None:
    """And the matrices of a model differ from each other."""
    one, two = (
        tensors(make_model(PresetSpec("llama-10m", layers=2, vocab=600, seed=seed), tmp_path))
        for seed in (1, 2)
    )
    assert not np.array_equal(one["blk.0.attn_k.weight"], two["blk.0.attn_k.weight"])
    assert not np.array_equal(one["blk.0.attn_k.weight"], one["blk.1.attn_k.weight"])
    assert not np.array_equal(one["blk.0.attn_k.weight"], one["blk.0.attn_v.weight"])


HYBRID = {
    # As the loader of the two architectures asks for them, row length first.
    "blk.0.attn_qkv.weight": (512, 1024),
    "blk.0.attn_gate.weight": (512, 512),
    "blk.0.ssm_conv1d.weight": (4, 1024),
    "blk.0.ssm_dt.bias": (4,),
    "blk.0.ssm_a": (4,),
    "blk.0.ssm_alpha.weight": (512, 4),
    "blk.0.ssm_beta.weight": (512, 4),
    "blk.0.ssm_norm.weight": (128,),
    "blk.0.ssm_out.weight": (512, 512),
    "blk.0.post_attention_norm.weight": (512,),
    "blk.3.attn_q.weight": (512, 2 * 2 * 256),
    "blk.3.attn_k.weight": (512, 256),
    "blk.3.attn_v.weight": (512, 256),
    "blk.3.attn_q_norm.weight": (256,),
    "blk.3.attn_output.weight": (512, 512),
}


@pytest.mark.parametrize("preset", ["qwen35-tiny", "qwen35-moe-tiny"])
def test_a_hybrid_has_two_kinds_of_layers(preset: str, tmp_path: Path) -> None:
    """Three with a state, the fourth with a cache; keys and tensors are those that are loaded."""
    shape = TEXT[preset]
    reader = gguf.GGUFReader(make_model(PresetSpec(preset, vocab=600), tmp_path))
    name = shape.architecture
    keys = {
        "full_attention_interval": 4,
        "rope.dimension_count": 64,
        "rope.dimension_sections": [11, 11, 10, 0],
        "attention.key_length": 256,
        "ssm.conv_kernel": 4,
        "ssm.state_size": 128,
        "ssm.group_count": 2,
        "ssm.time_step_rank": 4,
        "ssm.inner_size": 512,
    }
    if shape.experts:
        keys |= {"expert_count": 16, "expert_shared_feed_forward_length": 256}
    for key, value in keys.items():
        field = reader.get_field(f"{name}.{key}")
        assert field is not None, key
        assert field.contents() == value, key
    found = {one.name: tuple(int(size) for size in one.shape) for one in reader.tensors}
    assert HYBRID.items() <= found.items()
    for layer in range(4):
        recurrent = layer != 3
        assert (f"blk.{layer}.ssm_a" in found) == recurrent
        assert (f"blk.{layer}.attn_k.weight" in found) != recurrent
        assert (f"blk.{layer}.ffn_down_exps.weight" in found) == bool(shape.experts)
        assert (f"blk.{layer}.ffn_gate_inp_shexp.weight" in found) == bool(shape.experts)
    known = gguf.MODEL_TENSORS[getattr(gguf.MODEL_ARCH, name.upper())]
    names = {gguf.TENSOR_NAMES[one] for one in known}
    assert {
        re.sub(r"blk\.\d+", "blk.{bid}", one.removesuffix(".weight").removesuffix(".bias"))
        for one in found
    } <= names


def test_states_of_a_hybrid_fade(tmp_path: Path) -> None:
    """Heads forget at rates of their own, all negative, so no state grows without end."""
    spec = PresetSpec("qwen35-tiny", vocab=600)
    path = make_model(spec, tmp_path)
    found = tensors(path)
    assert found["blk.0.ssm_a"].tolist() == [-1 / 4, -1 / 8, -1 / 16, -1 / 32]
    assert not found["blk.0.ssm_dt.bias"].any()
    assert found["blk.0.ssm_conv1d.weight"].std() == pytest.approx(0.5, rel=0.05)
    for writes in ("blk.0.ssm_out.weight", "blk.3.attn_output.weight", "blk.0.ffn_down.weight"):
        assert not found[writes][0].any()
    for norm in ("attn_norm", "post_attention_norm"):
        assert found[f"blk.0.{norm}.weight"][0] == 0
    kinds = {one.name: one.tensor_type.name for one in gguf.GGUFReader(path).tensors}
    floats = {"ssm_conv1d.weight", "ssm_dt.bias", "ssm_a", "ssm_norm.weight"}
    assert {kinds[f"blk.0.{name}"] for name in floats} == {"F32"}


@pytest.mark.parametrize("quant", MIXTURES)
def test_a_mixture_has_several_types(quant: str, tmp_path: Path) -> None:
    """The file is named for it, says so, and is as large as was told."""
    spec = PresetSpec("qwen3-moe-tiny", quant=quant, vocab=600)
    path = make_model(spec, tmp_path)
    assert path.name.startswith(f"qwen3-moe-tiny-{quant}-")
    assert path.stat().st_size == pytest.approx(size_of(spec), rel=0.02)
    reader = gguf.GGUFReader(path)
    field = reader.get_field("general.file_type")
    assert field is not None
    assert field.contents() == gguf.LlamaFileType[f"MOSTLY_{quant}"]
    kinds = {one.tensor_type.name for one in reader.tensors} - {"F32"}
    assert kinds == (
        {"Q8_0", "MXFP4"} if quant == "MXFP4_MOE" else {"Q4_K", "Q5_K", "Q6_K", "Q8_0"}
    )
    assert all(np.isfinite(values).all() for values in tensors(path).values())


def test_an_old_gguf_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A type that it does not know is named, and what mends it."""
    old = SimpleNamespace(GGMLQuantizationType=SimpleNamespace(__members__={"F32": 0, "Q8_0": 8}))
    monkeypatch.setattr(presets, "load_gguf", lambda: old)
    with pytest.raises(ModelError, match=r"this gguf does not know MXFP4: pip install -U gguf"):
        write_preset(PresetSpec("qwen3-moe-tiny", quant="MXFP4_MOE"), tmp_path / "out")


def test_too_full_a_disk_is_found_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error has both figures, and nothing is left."""
    monkeypatch.setattr("shutil.disk_usage", lambda _path: SimpleNamespace(free=2 * 10**9))
    spec = PresetSpec("llama-8b")
    with pytest.raises(
        ModelError, match=r"llama-8b in Q4_K takes 4\.52 GB and .* has 2\.00 GB free"
    ):
        check_room(spec, tmp_path)
    with pytest.raises(ModelError, match="set fewer layers"):
        make_model(spec, tmp_path)
    assert [path for path in tmp_path.iterdir() if path.suffix != ".lock"] == []
