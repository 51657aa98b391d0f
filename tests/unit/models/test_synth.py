"""Files of models that the project makes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pytest_llmperf.errors import ModelError
from pytest_llmperf.models.synth import make_model
from pytest_llmperf.models.vocabulary import vocabulary
from pytest_llmperf.plan.model import QUANTS, SynthSpec

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
    assert "enable_thinking" in field("tokenizer.chat_template")


def test_a_missing_package_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Making models is an extra."""
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModelError, match=r"pip install 'pytest-llmperf\[embedded\]'"):
        make_model(small(), tmp_path)
