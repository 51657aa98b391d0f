"""Random weights written as the blocks of a quantized type."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_llmperf.models.blocks import (
    BLOCKS,
    EVEN,
    Blocks,
    random_blocks,
    row_bytes,
    single_blocks,
)
from pytest_llmperf.plan.model import BLOCK_QUANTS, SUPER_BLOCK

KINDS = sorted(BLOCKS)
SINGLE = [kind for kind in KINDS if kind != "MXFP4"]


def decoded(kind: str, blocks: Blocks) -> np.ndarray[Any, Any]:
    """Return the values of blocks, (blocks, values of a block), as the package gguf decodes."""
    gguf = pytest.importorskip("gguf")
    found: np.ndarray[Any, Any]
    if kind == "F16":
        found = blocks.view("<f2").astype(np.float32)
    else:
        found = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind])
    return found.reshape(len(blocks), -1)


def drawn(kind: str, deviation: float, values: int = 1 << 19) -> Blocks:
    """Return that many random values."""
    return random_blocks(kind, values // BLOCKS[kind][0], deviation, np.random.SFC64(1))


def test_every_quant_on_offer_is_known() -> None:
    """What a spec accepts can be written, and a super-block is whole blocks of each."""
    assert set(BLOCKS) == {*BLOCK_QUANTS, "MXFP4"}
    assert all(SUPER_BLOCK % values == 0 for values, _ in BLOCKS.values())


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_are_those_of_ggml(kind: str) -> None:
    """Values and bytes of a block are what every reader expects."""
    gguf = pytest.importorskip("gguf")
    assert BLOCKS[kind] == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]


def test_a_row_is_whole_blocks() -> None:
    """2048 values of Q4_K are eight blocks of 144 bytes."""
    assert row_bytes("Q4_K", 2048) == 8 * 144


@pytest.mark.parametrize("deviation", [2.0, 0.05, 0.0012])
@pytest.mark.parametrize("kind", KINDS)
def test_values_have_mean_zero_and_the_spread_asked_for(kind: str, deviation: float) -> None:
    """Down to what the largest preset needs, where scales of 16 bits get coarse."""
    values = decoded(kind, drawn(kind, deviation))
    assert np.isfinite(values).all()
    assert values.std() == pytest.approx(deviation, rel=0.015)
    assert values.mean() == pytest.approx(0, abs=0.006 * deviation)


@pytest.mark.parametrize("kind", KINDS)
def test_every_place_of_a_block_is_random(kind: str) -> None:
    """No value of a block is always the same, and none decides another one."""
    values = decoded(kind, drawn(kind, 1.0))
    assert values.std(axis=0) == pytest.approx(1.0, rel=0.25)
    if values.shape[1] > 1:
        together = np.corrcoef(values[:, :64].T) - np.eye(min(values.shape[1], 64))
        assert np.abs(together).max() < 0.15


@pytest.mark.parametrize("kind", KINDS)
def test_large_values_are_bounded(kind: str) -> None:
    """No outlier that a trained model would not have either; the four bits of FP4 reach far."""
    assert np.abs(decoded(kind, drawn(kind, 1.0))).max() < (4.2 if kind == "MXFP4" else 3)


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_make_up_the_whole(kind: str) -> None:
    """Drawing in parts changes no byte, so how a file is cut into pieces does not either."""
    whole = random_blocks(kind, 5 * EVEN + 3, 0.1, np.random.SFC64(7))
    source = np.random.SFC64(7)
    parts = [random_blocks(kind, count, 0.1, source) for count in (2 * EVEN, 3 * EVEN, 3)]
    assert np.array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("kind", SINGLE)
def test_a_block_of_a_single_value_holds_it(kind: str) -> None:
    """The value comes first, exactly for those that models use, and all others are zero."""
    values = np.array([2.0, 0.0, -3.0, -24.0])
    found = decoded(kind, single_blocks(kind, values))
    assert found[:, 0].tolist() == values.tolist()
    assert not found[:, 1:].any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_of_zero_bytes_is_zero(kind: str) -> None:
    """Rows that must not write are made so."""
    assert not decoded(kind, np.zeros((3, BLOCKS[kind][1]), np.uint8)).any()


def test_int8_never_holds_its_lowest_value() -> None:
    """The encoder of Q8_0 writes -127 to 127."""
    assert drawn("Q8_0", 1.0)[:, 2:].view(np.int8).min() == -127


@given(st.sampled_from(["Q4_K", "Q5_K"]), st.floats(0.0005, 4.0))
def test_offsets_cancel_exactly(kind: str, deviation: float) -> None:
    """The scale of the mins is the middle quant times the scale, with nothing lost in rounding."""
    block = random_blocks(kind, 1, deviation, np.random.SFC64(1))
    step, offset = block[0, :4].view("<f2").astype(float)
    assert offset == step * (7.5 if kind == "Q4_K" else 15.5)
    assert step > 0


@given(st.floats(0.0005, 4.0))
def test_scales_of_mxfp4_are_two_powers_of_two(deviation: float) -> None:
    """The ones next to what is asked for, the lower and the higher."""
    scales = set(random_blocks("MXFP4", 512, deviation, np.random.SFC64(1))[:, 0].tolist())
    assert len(scales) <= 2
    assert max(scales) - min(scales) <= 1
    assert 2.0 ** (min(scales) - 128) <= deviation / 5.85 <= 2.0 ** (max(scales) - 127)


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        (SINGLE, "838ac3b80021cf3471009996f1db07588c380f41efa193188eb940e9a5d14395"),
        (["MXFP4"], "639fcfd1ab14714e9c515c8d492e8dcfb2e04645af396df84ab30bc5b6fa7532"),
    ],
)
def test_bytes_are_pinned(kinds: list[str], expected: str) -> None:
    """No release of numpy may change them unseen: it would change every model's hash."""
    digest = hashlib.sha256()
    for kind in kinds:
        digest.update(random_blocks(kind, 24, 0.02, np.random.SFC64(5)).tobytes())
    assert digest.hexdigest() == expected
