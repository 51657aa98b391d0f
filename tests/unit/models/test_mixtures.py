"""Which type each matrix has in a mixture."""

from __future__ import annotations

import pytest

from pytest_llmperf.models.mixtures import type_of
from pytest_llmperf.plan.shapes import PRESETS, Shape


def shape_of(preset: str) -> Shape:
    """Return the shape of a text model."""
    shape = PRESETS[preset]
    assert isinstance(shape, Shape)
    return shape


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("token_embd", "Q8_0"),
        ("output", "Q8_0"),
        ("blk.0.attn_qkv", "Q8_0"),
        ("blk.0.ffn_down_shexp", "Q8_0"),
        ("blk.0.ffn_down_exps", "MXFP4"),
        ("blk.39.ffn_up_exps", "MXFP4"),
    ],
)
def test_only_experts_are_mxfp4(name: str, kind: str) -> None:
    """All else is Q8_0, the shared expert too."""
    assert type_of("MXFP4_MOE", f"{name}.weight", shape_of("qwen35-35b-a3b")) == kind


def test_a_type_is_the_type_of_all() -> None:
    """Where no mixture is asked for."""
    assert type_of("Q5_K", "output.weight", shape_of("llama-1b")) == "Q5_K"


@pytest.mark.parametrize("part", ["attn_v", "attn_qkv", "ffn_down", "ffn_down_exps"])
def test_precious_matrices_have_more_bits_in_some_layers(part: str) -> None:
    """Those of the first and last eighth and every third between; 12 layers have one eighth."""
    shape = Shape("llama", 12, 256, 4, 2, 64, 512, 512)
    found = {n for n in range(12) if type_of("Q4_K_M", f"blk.{n}.{part}.weight", shape) == "Q6_K"}
    # As llama-quantize of b11434 chose them for a model of this many layers.
    assert found == {0, 3, 6, 9, 10, 11}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("output", "Q6_K"),
        ("token_embd", "Q4_K"),
        ("blk.0.attn_q", "Q4_K"),
        ("blk.0.ffn_up_exps", "Q4_K"),
        ("blk.1.attn_k", "Q8_0"),
        ("blk.1.attn_v", "Q8_0"),
        ("blk.1.attn_output", "Q5_K"),
    ],
)
def test_eight_experts_share_better_attention(name: str, kind: str) -> None:
    """The rule of Mixtral holds for any model of eight experts."""
    assert type_of("Q4_K_M", f"{name}.weight", shape_of("qwen3-moe-tiny")) == kind


def test_other_counts_of_experts_do_not() -> None:
    """Attention is as in a dense model."""
    assert type_of("Q4_K_M", "blk.1.attn_k.weight", shape_of("qwen35-moe-tiny")) == "Q4_K"
