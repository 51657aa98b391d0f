"""Files of models that the project makes."""

from __future__ import annotations

import hashlib
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from filelock import FileLock

from pytest_llmperf.errors import ModelError
from pytest_llmperf.models import synth
from pytest_llmperf.models.synth import check_room, make_model, size_of, weights_of, write_preset
from pytest_llmperf.models.vocabulary import vocabulary
from pytest_llmperf.plan.model import (
    BLOCK_QUANTS,
    PRESETS,
    QUANTS,
    SUPER_BLOCK,
    PresetSpec,
    SynthSpec,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

SMALL = {"layers": 2, "embedding": 128, "heads": 4, "kv_heads": 2, "feed_forward": 192}


def small(**fields: Any) -> SynthSpec:  # noqa: ANN401  whatever the spec takes
    """Return a shape that takes a moment to make."""
    return SynthSpec(**{**SMALL, "vocab": 512, "context": 1024, **fields})


def tensors(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Read the values of every tensor."""
    gguf = pytest.importorskip("gguf")
    return {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        for tensor in gguf.GGUFReader(path).tensors
    }


@pytest.fixture(autouse=True)
def _needs_gguf() -> None:
    pytest.importorskip("gguf")


def test_the_file_is_named_by_its_digest(tmp_path: Path) -> None:
    """The name says which shape it is, and the folder is created."""
    spec = small()
    path = make_model(spec, tmp_path / "models")
    assert path == tmp_path / "models" / f"synth-llama-{spec.digest()}.gguf"
    assert path.read_bytes()[:4] == b"GGUF"


def test_the_same_spec_gives_the_same_bytes(tmp_path: Path) -> None:
    """Two machines that make a model have the same one."""
    one = make_model(small(), tmp_path / "one").read_bytes()
    two = make_model(small(), tmp_path / "two").read_bytes()
    assert one == two


def test_weights_are_pinned() -> None:
    """No release of numpy may change them unseen: it would change every model's hash."""
    values = synth._uniform(1, "blk.0.attn_q.weight", (3, 5), 0.5)
    found = hashlib.sha256(values.astype("<f4").tobytes()).hexdigest()
    assert found == "dc2f74c720a39396b327c67dde7dbfa024281599ac61a548316daf119acb4b15"


def test_weights_have_the_spread_asked_for() -> None:
    """Uniform about zero, with the standard deviation that the scaling counts on."""
    values = synth._uniform(7, "any", (200, 200), 0.25)
    assert values.mean() == pytest.approx(0, abs=0.01)
    assert values.std() == pytest.approx(0.25, rel=0.02)
    assert np.abs(values).max() <= 0.25 * np.sqrt(3)


def test_another_seed_gives_other_weights(tmp_path: Path) -> None:
    """The seed is what tells two models of a shape apart."""
    one = tensors(make_model(small(seed=1), tmp_path))["blk.0.attn_q.weight"]
    two = tensors(make_model(small(seed=2), tmp_path))["blk.0.attn_q.weight"]
    assert not np.array_equal(one, two)


@pytest.mark.parametrize("quant", QUANTS)
def test_quants_round_the_same_model(quant: str, tmp_path: Path) -> None:
    """Models of one seed differ by rounding alone, so they can be compared for divergence."""
    exact = tensors(make_model(small(quant="F32"), tmp_path))
    rounded = tensors(make_model(small(quant=quant), tmp_path))
    assert exact.keys() == rounded.keys()
    for name in ("blk.0.attn_v.weight", "blk.1.ffn_down.weight"):
        spread = exact[name].std()
        assert np.abs(exact[name] - rounded[name]).max() < 0.3 * spread


@pytest.mark.parametrize("quant", QUANTS)
def test_the_constant_survives_every_quant(quant: str, tmp_path: Path) -> None:
    """It enters with each embedding, no block writes to it, and it keeps bytes back."""
    found = tensors(make_model(small(quant=quant), tmp_path))
    assert found["token_embd.weight"][:, 0] == pytest.approx(2.0, rel=0.01)
    for layer in range(2):
        assert not found[f"blk.{layer}.attn_output.weight"][0].any()
        assert not found[f"blk.{layer}.ffn_down.weight"][0].any()
        assert found[f"blk.{layer}.attn_norm.weight"][0] == 0
        assert found[f"blk.{layer}.ffn_norm.weight"][0] == 0
    voices = np.array(vocabulary(512).voices)
    held = found["output.weight"][:, 0]
    assert held[voices == "never"] == pytest.approx(-24.0, rel=0.01)
    assert np.abs(held[voices == "often"]).max() < 0.05


def test_the_metadata_is_that_of_the_spec(tmp_path: Path) -> None:
    """A server reads shape, tokenizer and chat template from the file."""
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(make_model(small(), tmp_path))

    def field(key: str) -> Any:  # noqa: ANN401  whatever the file holds
        return reader.get_field(key).contents()

    assert field("general.architecture") == "llama"
    assert field("llama.block_count") == 2
    assert field("llama.embedding_length") == 128
    assert field("llama.attention.head_count_kv") == 2
    assert field("llama.context_length") == 1024
    assert field("llama.vocab_size") == len(field("tokenizer.ggml.tokens")) == 512
    assert field("tokenizer.ggml.model") == "llama"
    assert field("tokenizer.ggml.add_space_prefix") is False
    assert "<|im_start|>" in field("tokenizer.chat_template")


def test_a_file_that_is_there_is_returned_at_once(tmp_path: Path) -> None:
    """It is not made again, whatever is in it."""
    path = tmp_path / f"synth-llama-{small().digest()}.gguf"
    path.write_bytes(b"made before")
    assert make_model(small(), tmp_path) == path
    assert path.read_bytes() == b"made before"


def test_two_that_ask_at_once_get_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second waits for the first and does not make it again."""
    made: list[Path] = []
    write = synth._write

    def counted(spec: SynthSpec, path: Path) -> None:
        made.append(path)
        write(spec, path)

    monkeypatch.setattr(synth, "_write", counted)
    with ThreadPoolExecutor(2) as pool:
        target = tmp_path / f"synth-llama-{small().digest()}.gguf"
        with FileLock(target.with_suffix(".lock")):
            asked = [pool.submit(make_model, small(), tmp_path) for _ in range(2)]
        found = {future.result() for future in asked}
    assert found == {target}
    assert len(made) == 1


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk is a ModelError, and neither a short model nor a temporary file stays."""

    def broken(spec: SynthSpec) -> Iterator[synth._Tensor]:
        def full() -> np.ndarray[Any, Any]:
            raise OSError(28, "No space left on device")

        yield synth._Tensor("output_norm.weight", (spec.embedding,), full)

    monkeypatch.setattr(synth, "_tensors", broken)
    with pytest.raises(ModelError, match=r"cannot make .*No space left on device; free some"):
        make_model(small(), tmp_path)
    assert [path for path in tmp_path.iterdir() if path.suffix != ".lock"] == []


def test_a_missing_package_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Making models is an extra."""
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModelError, match=r"pip install 'pytest-llmperf\[embedded\]'"):
        make_model(small(), tmp_path)


# -- presets ------------------------------------------------------------------------------------


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
    ],
)
def test_presets_have_the_weights_of_their_names(preset: str, millions: int) -> None:
    """Those of the published models, and the output matrix where they share it."""
    assert weights_of(PresetSpec(preset)) / 1e6 == pytest.approx(millions, rel=0.06)


def test_published_shapes_are_met_exactly() -> None:
    """The two that share no matrix have the published number of weights."""
    assert weights_of(PresetSpec("llama-8b")) == 8_030_261_248
    assert weights_of(PresetSpec("qwen3-moe-30b-a3b")) == 30_532_122_624


@pytest.mark.parametrize("preset", PRESETS)
def test_rows_of_presets_are_whole_blocks(preset: str) -> None:
    """In every type; and embeddings have more than the block that the constant takes."""
    shape = PRESETS[preset]
    widths = [shape.embedding, shape.heads * shape.head_size, shape.feed_forward]
    assert all(width % SUPER_BLOCK == 0 for width in [*widths, shape.expert_feed_forward])
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
    gguf = pytest.importorskip("gguf")
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
    monkeypatch.setattr(synth, "_PIECE", 40_000)
    told: list[int] = []
    write_preset(spec, tmp_path / "small", told.append)
    assert (tmp_path / "large").read_bytes() == (tmp_path / "small").read_bytes()
    assert len(told) > 60
    assert sum(told) == sum(tensor.size for tensor in synth._large_tensors(spec))


def test_a_seed_gives_other_weights_of_a_preset(tmp_path: Path) -> None:
    """And the matrices of a model differ from each other."""
    one, two = (
        tensors(make_model(PresetSpec("llama-10m", layers=2, vocab=600, seed=seed), tmp_path))
        for seed in (1, 2)
    )
    assert not np.array_equal(one["blk.0.attn_k.weight"], two["blk.0.attn_k.weight"])
    assert not np.array_equal(one["blk.0.attn_k.weight"], one["blk.1.attn_k.weight"])
    assert not np.array_equal(one["blk.0.attn_k.weight"], one["blk.0.attn_v.weight"])


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
