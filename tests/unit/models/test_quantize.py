"""Models quantized from another one, by the real ggml of the embedded wheel."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pytest_llmperf.errors import ModelError
from pytest_llmperf.models import quantize
from pytest_llmperf.models.gguf import Value, read_gguf, write_gguf
from pytest_llmperf.models.quantize import quantize_model, write_quantized
from pytest_llmperf.plan.model import WEIGHT_TYPES

pytest.importorskip("xllamacpp")
gguf = pytest.importorskip("gguf")

METADATA: dict[str, Value] = {
    "general.architecture": "llama",
    "general.name": "a test",
    "general.file_type": 1,
    "general.quantization_version": 1,
    "tokenizer.ggml.tokens": ["<s>", "ä"],
    "tokenizer.ggml.scores": [0.5, -1.5],
    "tokenizer.ggml.token_type": [3, 1],
    "tokenizer.ggml.add_bos_token": False,
    "llama.rope.freq_base": 10000.0,
}

ERRORS = {
    "F16": (0.0, 0.001),
    "Q8_0": (0.002, 0.01),
    "Q6_K": (0.01, 0.03),
    "Q5_K": (0.02, 0.05),
    "Q4_K": (0.05, 0.1),
    "Q3_K": (0.1, 0.2),
    "Q2_K": (0.2, 0.4),
    "Q5_1": (0.02, 0.05),
    "Q5_0": (0.03, 0.06),
    "Q4_1": (0.05, 0.1),
    "Q4_0": (0.06, 0.12),
    "MXFP4": (0.07, 0.16),
}
"""Root of the mean squared error by that of the values. The spread of normal values in a block is
about four standard deviations, halved with each bit."""


def normal(*shape: int, seed: int = 1) -> np.ndarray[Any, Any]:
    """Return values that look like weights."""
    return (np.random.default_rng(seed).normal(size=shape) * 0.02).astype(np.float32)


def source(folder: Path, **tensors: np.ndarray[Any, Any]) -> Path:
    """Write a small model of these tensors, dots for double underscores."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "small.gguf"
    named = {name.replace("__", "."): values for name, values in tensors.items()}
    write_gguf(path, METADATA, named or {"blk.0.attn_q.weight": normal(16, 512)})
    return path


def read(path: Path) -> dict[str, Any]:
    """Return the tensors of a file by name."""
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def values(tensor: Any) -> np.ndarray[Any, Any]:  # noqa: ANN401  gguf is not typed
    """Return what a tensor stands for, by the arithmetic of numpy."""
    found: np.ndarray[Any, Any] = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    return found


def known(kind: str) -> str:
    """Skip what this release of the package cannot read back."""
    if kind not in gguf.GGMLQuantizationType.__members__:
        pytest.skip(f"this gguf does not know {kind}")
    return kind


def relative_error(kind: str, folder: Path, truth: np.ndarray[Any, Any]) -> float:
    """Quantize a matrix and return the error against what it was."""
    path = folder / f"{kind}.gguf"
    write_quantized(source(folder, m__weight=truth), path, kind)
    [tensor] = read(path).values()
    assert tensor.tensor_type.name == kind
    return float(np.sqrt(np.mean((values(tensor) - truth) ** 2) / np.mean(truth**2)))


@pytest.mark.parametrize("kind", WEIGHT_TYPES)
def test_the_error_is_of_the_size_the_type_promises(kind: str, tmp_path: Path) -> None:
    """Read back by other code than that which wrote it."""
    low, high = ERRORS[known(kind)]
    assert low < relative_error(kind, tmp_path, normal(64, 512)) < high


def test_fewer_bits_are_a_greater_error(tmp_path: Path) -> None:
    """The ladder of types is one."""
    kinds = ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K")
    found = [relative_error(kind, tmp_path, normal(64, 512)) for kind in kinds]
    assert found == sorted(found)
    assert len(set(found)) == len(kinds)


def test_what_the_type_can_hold_comes_back_exactly(tmp_path: Path) -> None:
    """Whole numbers up to 127 are what Q8_0 holds, so every row is where it belongs."""
    truth = np.arange(64 * 96, dtype=np.float32).reshape(64, 96) % 255 - 127
    truth[:, ::32] = 127  # the greatest of each block is its scale
    path = tmp_path / "out.gguf"
    write_quantized(source(tmp_path, m__weight=truth), path, "Q8_0")
    assert np.array_equal(values(read(path)["m.weight"]), truth)


def test_pieces_make_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix is quantized in pieces, on several processors."""
    path = source(tmp_path, m__weight=normal(67, 512))
    write_quantized(path, tmp_path / "whole.gguf", "Q4_K")
    monkeypatch.setattr(quantize, "_STEP", 3 * 512)
    write_quantized(path, tmp_path / "pieces.gguf", "Q4_K")
    assert (tmp_path / "whole.gguf").read_bytes() == (tmp_path / "pieces.gguf").read_bytes()


def test_vectors_and_small_float_matrices_stay(tmp_path: Path) -> None:
    """Norms and routers of experts are kept to the bit; a stack of matrices is quantized."""
    kept = {
        "output_norm__weight": normal(512),
        "blk__0__column__weight": normal(1, 512),
        "blk__0__ffn_gate_inp__weight": normal(4, 512),
        "blk__0__ssm_conv1d__weight": normal(512, 4),
    }
    experts = {"blk__0__ffn_up_exps__weight": normal(3, 8, 512).astype(np.float16)}
    path = tmp_path / "out.gguf"
    write_quantized(source(tmp_path, **kept, **experts), path, "Q4_K")
    found = read(path)
    for name, truth in kept.items():
        tensor = found[name.replace("__", ".")]
        assert tensor.tensor_type.name == "F32"
        assert np.array_equal(tensor.data.reshape(truth.shape), truth)
    stack = found["blk.0.ffn_up_exps.weight"]
    assert stack.tensor_type.name == "Q4_K"
    assert list(stack.shape) == [512, 8, 3]
    truth = experts["blk__0__ffn_up_exps__weight"].astype(np.float32)
    assert np.abs(values(stack).reshape(truth.shape) - truth).max() < 0.01


def test_a_bf16_source_is_read(tmp_path: Path) -> None:
    """What most models are published in."""
    truth = normal(4, 256)
    path = tmp_path / "bf16.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    kind = gguf.GGMLQuantizationType.BF16
    writer.add_tensor("m.weight", gguf.quants.quantize(truth, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    write_quantized(path, tmp_path / "out.gguf", "Q8_0")
    assert np.abs(values(read(tmp_path / "out.gguf")["m.weight"]) - truth).max() < 0.001


@pytest.mark.parametrize(
    ("kind", "file_type"), [("Q4_K", "Q4_K_S"), ("Q2_K", "Q2_K"), ("Q8_0", "Q8_0")]
)
def test_metadata_is_copied_and_the_type_is_told(kind: str, file_type: str, tmp_path: Path) -> None:
    """All keys with their types, but for the two that speak of the quantization."""
    path = tmp_path / "out.gguf"
    write_quantized(source(tmp_path), path, kind)
    fields = gguf.GGUFReader(path).fields
    found = {key: field.contents() for key, field in fields.items() if "GGUF." not in key}
    assert found == {
        **METADATA,
        "general.file_type": gguf.LlamaFileType[f"MOSTLY_{file_type}"],
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
    }
    before = gguf.GGUFReader(source(tmp_path)).fields
    assert all(fields[key].types == before[key].types for key in METADATA)


def test_a_split_model_becomes_one_file(tmp_path: Path) -> None:
    """The keys are those of the first part, and nothing speaks of parts any more."""
    first, second = (tmp_path / f"m-0000{n}-of-00002.gguf" for n in (1, 2))
    write_gguf(first, {**METADATA, "split.count": 2}, {"a.weight": normal(2, 256)})
    write_gguf(second, {"general.architecture": "llama"}, {"b.weight": normal(2, 256, seed=2)})
    path = quantize_model(first, "Q8_0", tmp_path / "cache")
    assert path.name.startswith("m-Q8_0-")
    assert list(read(path)) == ["a.weight", "b.weight"]
    assert "split.count" not in gguf.GGUFReader(path).fields


# -- the cache --------------------------------------------------------------------------------


def test_a_file_is_named_by_source_type_and_digest(tmp_path: Path) -> None:
    """And made once: the second time it is taken as it is."""
    path = quantize_model(source(tmp_path), "Q4_K", tmp_path / "cache")
    assert path.parent == tmp_path / "cache" / "models"
    assert path.name.startswith("small-Q4_K-")
    assert len(path.stem) == len("small-Q4_K-") + 12
    path.write_bytes(b"kept")
    assert quantize_model(source(tmp_path), "Q4_K", tmp_path / "cache") == path
    assert path.read_bytes() == b"kept"
    assert sorted(file.suffix for file in path.parent.iterdir()) == [".gguf", ".lock"]


def test_the_same_source_gives_the_same_bytes(tmp_path: Path) -> None:
    """Wherever it lies."""
    one = quantize_model(source(tmp_path / "a"), "Q3_K", tmp_path / "one")
    two = quantize_model(source(tmp_path / "b"), "Q3_K", tmp_path / "two")
    assert one.name == two.name
    assert one.read_bytes() == two.read_bytes()


def test_source_type_wheel_and_recipe_change_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file is never taken for one made of something else."""
    cache = tmp_path / "cache"
    found = [
        quantize_model(source(tmp_path / "a"), "Q8_0", cache),
        quantize_model(source(tmp_path / "a"), "Q5_0", cache),
        quantize_model(source(tmp_path / "b", m__weight=normal(4, 256)), "Q8_0", cache),
    ]
    with monkeypatch.context() as patch:
        patch.setattr(quantize, "GENERATION", 0)
        found.append(quantize_model(source(tmp_path / "a"), "Q8_0", cache))
    monkeypatch.setattr(importlib.metadata, "version", lambda _name: "0")
    found.append(quantize_model(source(tmp_path / "a"), "Q8_0", cache))
    assert len({path.stem[-12:] for path in found}) == 5


def test_several_at_once_make_one_file(tmp_path: Path) -> None:
    """One makes it and the others wait for it."""
    path = source(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(quantize_model, path, "Q4_0", tmp_path / "cache") for _ in range(4)]
    [made] = {one.result() for one in asked}
    assert list(read(made)) == ["blk.0.attn_q.weight"]


# -- mistakes ---------------------------------------------------------------------------------


def refused(path: Path, kind: str, folder: Path) -> str:
    """Return what is said, in one line, and see that no file is left."""
    with pytest.raises(ModelError) as caught:
        quantize_model(path, kind, folder / "cache")
    assert "\n" not in str(caught.value)
    assert [file for file in folder.glob("cache/models/*") if file.suffix != ".lock"] == []
    assert [file for file in folder.glob("cache/models/.*") if file.suffix != ".lock"] == []
    return str(caught.value)


def test_rows_that_do_not_fit_name_the_matrix(tmp_path: Path) -> None:
    """K types have blocks of 256 values."""
    path = source(tmp_path, blk__0__attn_q__weight=normal(4, 288))
    said = refused(path, "Q4_K", tmp_path)
    assert said == (
        f"{path} cannot be quantized to Q4_K: tensor blk.0.attn_q.weight has rows of 288 values, "
        "no multiple of 256, the block of Q4_K: use a type with a smaller block"
    )


def test_what_is_quantized_already_is_refused(tmp_path: Path) -> None:
    """Two roundings are not one."""
    path = quantize_model(source(tmp_path), "Q8_0", tmp_path / "first")
    said = refused(path, "Q4_0", tmp_path)
    assert "tensor blk.0.attn_q.weight is Q8_0 already" in said
    assert said.endswith("quantize from the original, in F32, F16, BF16")


def test_values_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    """What ggml makes of them is anybody's guess."""
    matrix = normal(4, 256)
    matrix[2, 3] = np.nan
    said = refused(source(tmp_path, m__weight=matrix), "Q4_K", tmp_path)
    assert said.endswith("tensor m.weight holds values that are no finite numbers")


def test_a_file_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    """With the last line that the process said."""
    path = source(tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    assert f"{path} cannot be quantized to Q4_K: ValueError: " in refused(path, "Q4_K", tmp_path)


def test_an_unknown_type_is_refused(tmp_path: Path) -> None:
    """As one of a later release would be."""
    said = refused(source(tmp_path), "Q9_9", tmp_path)
    assert said.endswith("this gguf does not know the type Q9_9: pip install --upgrade gguf")


def test_a_process_that_is_ended_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ggml ends it on a mistake of ours."""
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho GGML_ASSERT failed >&2\nkill -ABRT $$\n", "utf-8")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    said = refused(source(tmp_path), "Q4_K", tmp_path)
    assert said.endswith("cannot be quantized to Q4_K: SIGABRT: GGML_ASSERT failed")


def test_without_xllamacpp_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is started."""

    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    said = refused(source(tmp_path), "Q4_K", tmp_path)
    assert "the package `xllamacpp`: pip install 'pytest-llmperf[embedded]'" in said


def test_without_gguf_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is started."""
    monkeypatch.setitem(sys.modules, "gguf", None)
    said = refused(source(tmp_path), "Q4_K", tmp_path)
    assert "the package `gguf`: pip install 'pytest-llmperf[embedded]'" in said


def test_a_wheel_without_the_functions_is_refused(tmp_path: Path) -> None:
    """Its libraries are looked through, and none has them."""
    found = importlib.util.find_spec("_ctypes")
    assert found is not None
    if not str(found.origin).endswith(".so"):
        pytest.skip("this Python has no module in a library of its own")
    shutil.copy(str(found.origin), tmp_path / "other.so")
    with pytest.raises(ModelError, match="this xllamacpp lets nobody call ggml_quantize_chunk"):
        quantize._library(tmp_path)


def test_a_library_that_cannot_be_loaded_is_refused(tmp_path: Path) -> None:
    """It is named, with what the loader says."""
    (tmp_path / "broken.so").write_bytes(b"no library")
    with pytest.raises(ModelError, match=r"cannot load broken\.so of xllamacpp: "):
        quantize._library(tmp_path)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """A file is in its way."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "models").write_text("in the way", "utf-8")
    with pytest.raises(ModelError, match=r"cannot make the model .*choose another cache folder"):
        quantize_model(source(tmp_path), "Q4_K", tmp_path / "cache")


def test_f16_of_f16_is_the_same(tmp_path: Path) -> None:
    """Nothing is rounded twice."""
    path = source(tmp_path, m__weight=normal(4, 96).astype(np.float16))
    _, before = read_gguf(path)
    _, after = read_gguf(quantize_model(path, "F16", tmp_path / "cache"))
    assert np.array_equal(before["m.weight"], after["m.weight"])
