"""Which type each matrix of a preset has, where not all have the same.

The rules are those of ``llama_tensor_get_type_impl`` in ``llama-quant.cpp`` of llama.cpp, as far as
they concern the architectures of the presets.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

from pytest_llmperf.plan.shapes import Shape

_BLOCK = re.compile(r"blk\.(?P<layer>\d+)\.(?P<part>\w+)\.weight")
_PRECIOUS = ("attn_v", "attn_qkv")
_OF_EIGHT = 8
_SHARED = {"attn_k": "Q8_0", "attn_v": "Q8_0", "attn_output": "Q5_K"}
"""Types where so many experts share attention matrices that are small beside them."""

FILE_TYPES: Mapping[str, str] = MappingProxyType({"Q5_K": "Q5_K_S", "Q4_K": "Q4_K_S"})
"""Names in ``general.file_type`` where they differ from the type's: it knows mixtures only."""


def type_of(quant: str, name: str, shape: Shape) -> str:
    """Return the type of a matrix.

    Args:
        quant: Of the preset, a type or a mixture.
        name: Of the matrix, as in GGUF.
        shape: Of the model.
    """
    if quant == "MXFP4_MOE":
        return "MXFP4" if "_exps." in name else "Q8_0"
    if quant == "Q4_K_M":
        return _medium(name, shape)
    return quant


def _medium(name: str, shape: Shape) -> str:
    """Return the type of a matrix in Q4_K_M: more bits where errors weigh most."""
    if name == "output.weight":
        return "Q6_K"
    found = _BLOCK.fullmatch(name)
    if found is None:
        return "Q4_K"
    part = found["part"]
    if shape.experts == _OF_EIGHT and part in _SHARED:
        return _SHARED[part]
    precious = part in _PRECIOUS or part.startswith("ffn_down")
    return "Q6_K" if precious and _more_bits(int(found["layer"]), shape.layers) else "Q4_K"


def _more_bits(layer: int, layers: int) -> bool:
    """Tell the first and the last eighth of the layers, and every third one between."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2  # noqa: PLR2004  the rule
