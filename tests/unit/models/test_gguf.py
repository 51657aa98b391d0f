"""GGUF files of plain floats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pytest_llmperf.errors import ModelError
from pytest_llmperf.models.gguf import Value, read_gguf, write_gguf

METADATA: dict[str, Value] = {
    "general.architecture": "llama",
    "a.count": 7,
    "a.rate": 0.5,
    "a.no": False,
    "a.words": ("one", "zwei", "▁"),
    "a.scores": [0.0, -1.0],
    "a.types": [3, -1],
    "a.flags": [True, False],
}


def tensors() -> dict[str, NDArray[Any]]:
    """Return tensors whose sizes are no multiples of the alignment."""
    return {
        "norm": np.arange(3, dtype=np.float32),
        "matrix": np.arange(15, dtype=np.float16).reshape(3, 5),
        "last": np.ones((2, 2), np.float32),
    }


scalars = st.one_of(
    st.text(max_size=8),
    st.booleans(),
    st.integers(0, 2**32 - 1),
    st.floats(width=32, allow_nan=False),
)
sequences = st.one_of(
    st.lists(st.text(max_size=8), min_size=1),
    st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1),
    st.lists(st.floats(width=32, allow_nan=False), min_size=1),
)


@given(
    metadata=st.dictionaries(st.text(max_size=8), st.one_of(scalars, sequences), max_size=5),
)
def test_what_is_written_is_read(
    metadata: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Keys, values and their order come back, and tensors in 32 bits."""
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_gguf(path, metadata, tensors())
    keys, found = read_gguf(path)
    assert list(keys.items()) == list(metadata.items())
    assert list(found) == list(tensors())
    for name, values in tensors().items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], values)


def test_the_reference_reader_reads_it(tmp_path: Path) -> None:
    """Types, dimensions and places are those of the format, not only of the reader here."""
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "model.gguf"
    write_gguf(path, METADATA, tensors())
    reader = gguf.GGUFReader(path)
    for key, value in METADATA.items():
        expected = list(value) if isinstance(value, (list, tuple)) else value
        assert reader.get_field(key).contents() == expected
    kinds = {field.name: field.types[-1].name for field in reader.fields.values()}
    assert kinds["a.count"] == "UINT32"
    assert kinds["a.types"] == "INT32"
    assert kinds["a.scores"] == kinds["a.rate"] == "FLOAT32"
    assert kinds["a.no"] == "BOOL"
    assert [tensor.name for tensor in reader.tensors] == list(tensors())
    for tensor in reader.tensors:
        assert tensor.data_offset % 32 == 0
        np.testing.assert_array_equal(tensor.data, tensors()[tensor.name])


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    """Nothing of the machine or the time is in the file, and a file that is there is replaced."""
    path = tmp_path / "model.gguf"
    write_gguf(path, METADATA, tensors())
    once = path.read_bytes()
    write_gguf(path, METADATA, tensors())
    assert path.read_bytes() == once


def test_a_matrix_that_is_not_contiguous_is_written_by_rows(tmp_path: Path) -> None:
    """A transposed view has the values of its own shape."""
    path = tmp_path / "model.gguf"
    values = np.arange(6, dtype=np.float32).reshape(2, 3).T
    write_gguf(path, {}, {"t": values})
    np.testing.assert_array_equal(read_gguf(path)[1]["t"], values)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"a.none": None}, "a.none: NoneType is not written"),
        ({"a.list": []}, "a.list: an empty sequence has no type"),
        ({"a.list": [None]}, "a.list: NoneType is not written"),
    ],
)
def test_a_value_of_another_type_is_refused(
    metadata: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """The key at fault is named, and no file is begun."""
    with pytest.raises(ValueError, match=message):
        write_gguf(tmp_path / "model.gguf", metadata, {})
    assert not list(tmp_path.iterdir())


def test_a_tensor_of_another_type_is_refused(tmp_path: Path) -> None:
    """Doubles are a mistake, not something to round in silence."""
    with pytest.raises(ValueError, match=r"tensor w: float64 is neither float32 nor float16"):
        write_gguf(tmp_path / "model.gguf", {}, {"w": np.zeros(3)})


@pytest.mark.parametrize("kept", [10, 30, 200, 600, -1])
def test_a_file_cut_short_is_refused(kept: int, tmp_path: Path) -> None:
    """Wherever it ends: in the header, a key or the values."""
    path = tmp_path / "model.gguf"
    write_gguf(path, METADATA, {"w": np.ones(512, np.float32)})
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ModelError, match=r"cannot be read as GGUF: .*: make it again"):
        read_gguf(path)


def test_another_file_is_refused(tmp_path: Path) -> None:
    """A missing file, one that is no GGUF, and one of another version each say so."""
    path = tmp_path / "model.gguf"
    with pytest.raises(ModelError, match=r"cannot read .*No such file"):
        read_gguf(path)
    path.write_bytes(b"PK\x03\x04 and more")
    with pytest.raises(ModelError, match="is no GGUF file, it starts with"):
        read_gguf(path)
    path.write_bytes(b"GGUF\x02\0\0\0")
    with pytest.raises(ModelError, match="it has version 2, not 3"):
        read_gguf(path)


def test_a_quantized_tensor_is_refused(tmp_path: Path) -> None:
    """Only plain floats are read; the tensor is named."""
    path = tmp_path / "model.gguf"
    write_gguf(path, {}, {"w": np.ones(32, np.float32)})
    data = bytearray(path.read_bytes())
    place = data.index(b"w") + 1 + 4 + 8  # the name, the number of dimensions, the dimension
    data[place] = 8  # Q8_0
    path.write_bytes(data)
    with pytest.raises(ModelError, match="tensor w has type 8, neither F32 nor F16"):
        read_gguf(path)
