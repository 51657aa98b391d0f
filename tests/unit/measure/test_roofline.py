"""What decoding reads, and how near it comes to what the memory allows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_llmperf.errors import ModelError
from pytest_llmperf.measure.roofline import Reading, Roofline, bytes_per_token, mean_depth
from pytest_llmperf.models.presets import preset_tensors, write_preset
from pytest_llmperf.models.synth import make_model
from pytest_llmperf.models.tensors import ModelTensors, Tensor, read_tensors
from pytest_llmperf.plan.config import Turn, Workload
from pytest_llmperf.plan.model import PresetSpec, SynthSpec
from pytest_llmperf.plan.shapes import Shape

GB = 1e9
F16 = 2.0
Q8_0 = 34 / 32


def model(architecture: str, tensors: dict[str, int], **metadata: Any) -> ModelTensors:  # noqa: ANN401 - as in a file
    """A header of tensors by size, each of one row; keys have ``__`` for a dot."""
    keys = {f"{architecture}.{key.replace('__', '.')}": value for key, value in metadata.items()}
    return ModelTensors(
        tuple(Tensor(name, (1, size), "I8", size) for name, size in tensors.items()),
        {"general.architecture": architecture, **keys},
    )


def attention(layers: int, **metadata: Any) -> ModelTensors:  # noqa: ANN401 - as in a file
    """A header of layers with attention, of two heads of 64 keys and 32 values each."""
    keys = {
        "block_count": layers,
        "attention__head_count_kv": 2,
        "attention__key_length": 64,
        "attention__value_length": 32,
        **metadata,
    }
    architecture = keys.pop("architecture", "llama")
    return model(architecture, {f"blk.{n}.attn_q.weight": 1 for n in range(layers)}, **keys)


POSITION = 2 * (64 + 32) * F16
"""Bytes of one position in the cache of one of those layers."""


def preset(name: str, quant: str) -> ModelTensors:
    """The header of a preset that nobody has to write."""
    spec = PresetSpec(name, quant)
    shape = spec.shape
    assert isinstance(shape, Shape)
    told: dict[str, object] = {
        "block_count": shape.layers,
        "embedding_length": shape.embedding,
        "attention.head_count": shape.heads,
        "attention.head_count_kv": shape.kv_heads,
        "attention.key_length": shape.head_size,
        "attention.value_length": shape.head_size,
    }
    if shape.experts:
        told |= {"expert_count": shape.experts, "expert_used_count": shape.experts_used}
    if (linear := shape.linear) is not None:
        told |= {
            "full_attention_interval": 4,
            "ssm.conv_kernel": linear.kernel,
            "ssm.state_size": linear.head_size,
            "ssm.group_count": linear.key_heads,
            "ssm.inner_size": linear.values,
        }
    return ModelTensors(
        tuple(Tensor(one.name, one.shape, one.kind, one.size) for one in preset_tensors(spec)),
        {
            "general.architecture": shape.architecture,
            **{f"{shape.architecture}.{key}": value for key, value in told.items()},
        },
    )


def test_a_dense_model_reads_its_file_but_for_the_embeddings(tmp_path: Path) -> None:
    """And one row of those; each position costs keys and values of every layer."""
    path = make_model(SynthSpec(layers=3, vocab=512, quant="Q8_0"), tmp_path)
    found = read_tensors(path)
    reading = bytes_per_token(found, 100)
    embeddings = 512 * 256 * Q8_0
    everything = sum(tensor.size for tensor in found.tensors)
    assert reading.weights == everything - embeddings + 256 * Q8_0
    # Without the embeddings, the header with its 512 tokens is all that the file has beside them.
    assert reading.weights == pytest.approx(path.stat().st_size - embeddings, abs=40_000)
    assert reading.cache == 100 * 3 * 2 * 2 * 64 * F16
    assert (reading.state, reading.notes) == (0, ())
    assert reading.total == reading.weights + reading.cache


def test_llama_8b_reads_what_its_shape_says() -> None:
    """By hand: 7.5 billion weights of 4.5 bits, and 128 KiB of F16 for each position."""
    reading = bytes_per_token(preset("llama-8b", "Q4_K"), 4096)
    layer = 2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096
    matrices = 32 * layer + 128256 * 4096
    norms = (2 * 32 + 1) * 4096 * 4
    assert reading.weights == matrices * 144 / 256 + norms + 4096 * 144 / 256
    assert reading.weights == pytest.approx(4.2 * GB, rel=0.01)
    assert reading.cache == 4096 * 128 * 1024


def test_a_mixture_reads_the_experts_that_work() -> None:
    """Of 30 billion weights 8 experts in 128 and what all tokens share: about 3 billion."""
    reading = bytes_per_token(preset("qwen3-moe-30b-a3b", "Q4_K"), 0)
    experts = 48 * 3 * 8 * 768 * 2048
    heads = 48 * (2 * 4096 * 2048 + 2 * 512 * 2048)
    floats = 48 * (128 * 2048 + 2 * 2048 + 2 * 128) + 2048
    matrices = experts + heads + 151936 * 2048 + 2048
    assert reading.weights == matrices * 144 / 256 + floats * 4
    assert reading.weights == pytest.approx(1.755 * GB, rel=0.01)
    assert (reading.cache, reading.notes) == (0, ())


def test_a_hybrid_reads_and_writes_its_states() -> None:
    """Ten layers of 40 have a cache; the others a state of the same size at every depth."""
    found = preset("qwen35-35b-a3b", "Q4_K")
    near, far = bytes_per_token(found, 0), bytes_per_token(found, 32768)
    inner, mixed = 32 * 128, (32 + 2 * 16) * 128
    assert near.state == far.state == 30 * (128 * inner + 3 * mixed) * 4 * 2
    assert far.cache == 32768 * 10 * 2 * 2 * 256 * F16
    assert near.weights == far.weights
    assert near.notes == ()
    # One shared expert works beside 8 of 256, each of three matrices of 512 by 2048.
    routed = sum(tensor.size for tensor in found.tensors if "_exps." in tensor.name)
    rest = sum(tensor.size for tensor in found.tensors) - routed
    embeddings = 248320 * 2048 * 144 / 256
    assert near.weights == routed * 8 / 256 + rest - embeddings + 2048 * 144 / 256


@pytest.mark.parametrize("name", ["qwen3-moe-tiny", "qwen35-tiny", "qwen35-moe-tiny"])
def test_a_written_preset_reads_as_its_shape(tmp_path: Path, name: str) -> None:
    """The file says all that is needed."""
    write_preset(PresetSpec(name, "Q4_K"), tmp_path / "model.gguf")
    found = bytes_per_token(read_tensors(tmp_path / "model.gguf"), 50)
    assert found == bytes_per_token(preset(name, "Q4_K"), 50)
    assert found.cache > 0


def test_tied_embeddings_are_the_output_matrix() -> None:
    """They are read wholly; other tables by their rows."""
    rows = Tensor("token_embd.weight", (10, 8), "F16", 160)
    lookup = Tensor("per_layer_token_embd.weight", (10, 64), "F16", 1280)
    output = Tensor("output.weight", (10, 8), "F16", 160)
    assert bytes_per_token(ModelTensors((rows, lookup)), 0).weights == 160 + 128
    assert bytes_per_token(ModelTensors((rows, lookup, output)), 0).weights == 160 + 16 + 128


def test_what_drafts_or_encodes_is_not_read() -> None:
    """`block_count` has the layers that draft among it."""
    sizes = {
        "blk.0.attn_q.weight": 1,
        "blk.1.attn_q.weight": 10,
        "blk.1.nextn.eh_proj.weight": 100,
        "enc.blk.0.attn_q.weight": 1000,
        "output.weight": 10000,
    }
    keys = {"attention__head_count_kv": 1, "attention__key_length": 8, "attention__value_length": 8}
    drafts = model("glm4moe", sizes, block_count=2, nextn_predict_layers=1, **keys)
    reading = bytes_per_token(drafts, 1)
    assert (reading.weights, reading.cache) == (10001, 16 * F16)
    untold = bytes_per_token(model("glm4moe", sizes, **keys), 1)
    assert (untold.weights, untold.cache) == (10011, 2 * 16 * F16)


def test_experts_are_shared_out_layer_by_layer() -> None:
    """Whatever is per expert counts by those used; shared ones, routers and single values not."""
    tensors = (
        Tensor("blk.0.ffn_up_exps.weight", (8, 4, 4), "F32", 512),
        Tensor("blk.1.ffn_up_exps.bias", (8, 4), "F32", 128),
        Tensor("blk.1.ffn_down_exps.scale", (8,), "F32", 32),
        Tensor("blk.1.ffn_up_shexp.weight", (4, 4), "F32", 64),
        Tensor("blk.1.ffn_gate_inp.weight", (8, 4), "F32", 128),
    )
    keys = {"general.architecture": "x", "x.expert_used_count": (2, 4), "x.expert_count": 8}
    assert bytes_per_token(ModelTensors(tensors, keys), 0).weights == 128 + 64 + 32 + 64 + 128
    untold = bytes_per_token(ModelTensors(tensors), 0)
    assert untold.weights == 512 + 128 + 32 + 64 + 128
    (note,) = untold.notes
    assert note == "the file does not say how many experts work on a token: all are counted"


@pytest.mark.parametrize(
    ("types", "keys", "values"),
    [(("f16", "f16"), 2, 2), (("q8_0", "q4_0"), Q8_0, 18 / 32), (("BF16", "f32"), 2, 4)],
)
def test_a_cache_costs_what_its_types_do(
    types: tuple[str, str], keys: float, values: float
) -> None:
    """Those of keys and values may differ."""
    reading = bytes_per_token(attention(3), 10, types)
    assert reading.cache == pytest.approx(10 * 3 * 2 * (64 * keys + 32 * values))


def test_an_unknown_cache_type_is_told() -> None:
    """By its name."""
    with pytest.raises(ModelError, match="no cache type `q9_9`"):
        bytes_per_token(attention(1), 10, ("f16", "q9_9"))


def test_a_depth_is_not_negative() -> None:
    """There is nothing before the first token."""
    with pytest.raises(ValueError, match="0 at least"):
        bytes_per_token(attention(1), -1)


def test_latent_attention_is_read_once() -> None:
    """Keys and values are the same numbers; a file that does not say so has both."""
    latent = {
        "attention__kv_lora_rank": 512,
        "rope__dimension_count": 64,
        "attention__key_length_mla": 192,
        "attention__value_length_mla": 128,
        "attention__head_count_kv": 1,
    }
    assert bytes_per_token(attention(2, **latent), 10).cache == 10 * 2 * (512 + 64) * F16
    del latent["attention__key_length_mla"]
    assert bytes_per_token(attention(2, **latent), 10).cache == 10 * 2 * (64 + 32) * F16


@pytest.mark.parametrize(
    ("architecture", "keys", "whole"),
    [
        ("gemma3", {}, (5,)),
        ("gpt-oss", {}, (1, 3, 5)),
        ("smallthinker", {}, (0, 4)),
        ("gemma3", {"attention__sliding_window_pattern": 3}, (2, 5)),
        ("gemma3", {"attention__sliding_window_pattern": 0}, ()),
        ("gemma4", {"attention__sliding_window_pattern": (True, False)}, (1, 2, 3, 4, 5)),
        ("gemma3", {"attention__sliding_window": 0}, (0, 1, 2, 3, 4, 5)),
    ],
)
def test_layers_with_a_window_read_no_more_than_it(
    architecture: str, keys: dict[str, Any], whole: tuple[int, ...]
) -> None:
    """Which ones, the file says or llama.cpp assumes; before the window is full all are alike."""
    told = {"attention__sliding_window": 100, **keys}
    found = attention(6, architecture=architecture, **told)
    assert bytes_per_token(found, 80).cache == 80 * 6 * POSITION
    assert bytes_per_token(found, 1000).cache == POSITION * (
        1000 * len(whole) + 100 * (6 - len(whole))
    )
    assert bytes_per_token(found, 1000).notes == ()


def test_a_window_may_have_narrower_heads() -> None:
    """Gemma 4 has two sizes of heads."""
    keys = {
        "attention__sliding_window": 100,
        "attention__key_length_swa": 16,
        "attention__value_length_swa": 16,
    }
    found = bytes_per_token(attention(2, architecture="gpt-oss", **keys), 1000)
    assert found.cache == 1000 * POSITION + 100 * 2 * 32 * F16


def test_a_window_that_llama_cpp_does_not_know_is_none() -> None:
    """The whole cache is counted, and that is told once."""
    found = bytes_per_token(attention(2, attention__sliding_window=100), 1000)
    assert found.cache == 1000 * 2 * POSITION
    (note,) = found.notes
    assert "no pattern of windows for llama" in note


def test_a_default_window_holds_where_the_file_is_silent() -> None:
    """Those of two architectures are in llama.cpp."""
    found = bytes_per_token(attention(4, architecture="llama4"), 10_000)
    assert found.cache == (3 * 8192 + 10_000) * POSITION


@pytest.mark.parametrize(
    "keys",
    [
        {"attention__head_count_kv": (0, 2)},
        {"attention__recurrent_layers": (True, False)},
        {"full_attention_interval": 2},
        {},
    ],
)
def test_a_layer_without_attention_has_no_cache(keys: dict[str, Any]) -> None:
    """By its heads, by a list, by an interval, or by the tensors that it has."""
    sizes = {"blk.0.attn_qkv.weight": 1, "blk.0.ssm_out.weight": 1, "blk.1.attn_q.weight": 1}
    shape = {"attention__head_count_kv": 2, "attention__key_length": 64} | {
        "attention__value_length": 32
    }
    ssm = {"ssm__inner_size": 16, "ssm__state_size": 4, "ssm__conv_kernel": 4}
    found = bytes_per_token(model("x", sizes, block_count=2, **(shape | ssm | keys)), 10)
    assert found.cache == 10 * POSITION
    assert found.state == 2 * 4 * (3 * 16 + 4 * 16)
    assert found.notes == ()


def test_both_kinds_of_layer_may_be_one() -> None:
    """Falcon H1 has attention and a state in each."""
    sizes = {"blk.0.attn_q.weight": 1, "blk.0.ssm_in.weight": 1}
    keys = {"attention__head_count_kv": 1, "embedding_length": 64, "attention__head_count": 4}
    found = bytes_per_token(
        model("x", sizes, ssm__inner_size=16, ssm__state_size=4, ssm__group_count=1, **keys), 10
    )
    assert found.cache == 10 * 2 * 16 * F16
    assert found.state == 2 * 4 * 4 * 16


def test_what_the_file_does_not_say_is_noted() -> None:
    """Rather than guessed."""
    found = bytes_per_token(
        model("x", {"blk.0.time_mix_key.weight": 1, "blk.1.attn_q.weight": 1}), 10
    )
    assert (found.cache, found.state) == (0, 0)
    assert [note.split(":")[0] for note in found.notes] == [
        "the file does not say how large the recurrent state is",
        "the file does not say how large the cache is",
    ]
    sparse = bytes_per_token(attention(1, attention__indexer__head_count=64), 10)
    assert "sparse attention" in sparse.notes[0]


def test_a_share_is_what_the_speed_moves() -> None:
    """Half the speed that the memory allows is half its bandwidth."""
    roof = Roofline(4e9, 1000.0, "NVML")
    assert roof.most_tps == 250
    assert roof.share(125) == 0.5
    assert roof.facts(125.0, None) == {
        "gb_per_token": 4.0,
        "bandwidth_gbs": 1000.0,
        "source": "NVML",
        "new": 0.5,
        "base": None,
    }
    assert roof.facts(None, 250.0)["base"] == 1.0


@pytest.mark.parametrize("figures", [(0.0, 1.0), (1.0, 0.0), (-1.0, 1.0), (float("nan"), 1.0)])
def test_a_roofline_needs_figures(figures: tuple[float, float]) -> None:
    """Nothing can be a share of nothing."""
    with pytest.raises(ValueError, match="must be above 0"):
        Roofline(*figures, "x")


@pytest.mark.parametrize(
    ("turns", "depth"),
    [
        ((Turn(512, 128),), 576),
        ((Turn(512, 128, 8192),), 8768),
        # 100 + 10 / 2 and, behind both of the first, 110 + 100 + 30 / 2, three times as heavy.
        ((Turn(100, 10), Turn(100, 30)), (105 + 3 * 225) / 4),
        ((Turn(512, 0),), 512),
        ((), 0),
    ],
)
def test_the_depth_of_a_workload_is_where_it_generates(
    turns: tuple[Turn, ...], depth: float
) -> None:
    """On the average over its tokens; turns lie behind each other."""
    assert mean_depth(Workload("w", turns)) == depth


TURNS = st.lists(
    st.builds(Turn, st.integers(1, 4096), st.integers(0, 512), st.integers(0, 8192)), min_size=1
)


@given(TURNS)
def test_a_mean_depth_is_within_the_workload(turns: list[Turn]) -> None:
    """Behind the first prompt, before the last token."""
    workload = Workload("w", tuple(turns))
    assert turns[0].depth + turns[0].prompt <= mean_depth(workload) <= workload.tokens


@given(st.floats(0, 1e5), st.floats(0, 1e5))
def test_more_depth_never_reads_less(one: float, other: float) -> None:
    """With windows or without."""
    found = attention(6, architecture="gemma3", attention__sliding_window=1024)
    low, high = sorted((one, other))
    assert bytes_per_token(found, low).total <= bytes_per_token(found, high).total


def test_a_reading_adds_up() -> None:
    """The state counts, too."""
    assert Reading(1.0, 2.0, 4.0).total == 7.0
