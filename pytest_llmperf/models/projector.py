"""What makes tokens of images, with random weights: an ``mmproj`` file.

The kind is LLaVA's, ``mlp``: a vision transformer, of which the last layer but one counts, and two
matrices that bring each patch to the width of the text model. An image is scaled to one size, and
each patch is one token. The tokens hold the constant that all embeddings of text hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from pytest_llmperf.models.large import LargeTensor, floats, matrix
from pytest_llmperf.models.weights import CONSTANT, Weights, even, uniform
from pytest_llmperf.plan.shapes import ProjectorShape

_CHANNELS = 3
_LOUD = 1.6
"""What brings the values after GELU back to a standard deviation of about 1."""


def projector_tensors(shape: ProjectorShape, seed: int) -> Iterator[LargeTensor]:
    """Yield the tensors in the order of the file."""
    width, patches, patch = shape.embedding, shape.patches, shape.patch
    branch = (2 * shape.layers) ** -0.5
    # One row is one line of one channel, and a patch has many.
    seen = (width, _CHANNELS, patch, patch)
    yield matrix(seed, "v.patch_embd.weight", seen, "F16", (_CHANNELS * patch) ** -0.5)
    yield floats(
        "v.position_embd.weight",
        (patches, width),
        lambda: uniform(seed, "v.position_embd.weight", (patches, width), 1.0),
    )
    for layer in range(shape.layers):
        block = f"v.blk.{layer}."
        for norm in ("ln1", "ln2"):
            yield floats(f"{block}{norm}.weight", (width,), lambda: even(width))
            yield floats(f"{block}{norm}.bias", (width,), lambda: even(width, 0.0))
        for name, rows, columns, gain in (
            ("attn_q", width, width, 1.0),
            ("attn_k", width, width, 1.0),
            ("attn_v", width, width, 1.0),
            ("attn_out", width, width, branch),
            ("ffn_up", shape.feed_forward, width, 1.0),
            ("ffn_down", width, shape.feed_forward, branch),
        ):
            yield matrix(seed, f"{block}{name}.weight", (rows, columns), "F16", gain)
            yield _zeros(f"{block}{name}.bias", rows)
    out = shape.projection
    yield matrix(seed, "mm.0.weight", (out, width), "F16", 1.0)
    yield _zeros("mm.0.bias", out)
    yield matrix(seed, "mm.2.weight", (out, out), "F16", _LOUD, writes=True)
    yield floats("mm.2.bias", (out,), lambda: _constant(out))


def describe_projector(writer: Any, shape: ProjectorShape) -> None:  # noqa: ANN401  gguf is not typed
    """Add the metadata of a projector, without its name and types."""
    writer.add_type("mmproj")
    writer.add_clip_has_vision_encoder(value=True)
    writer.add_string("clip.projector_type", "mlp")
    writer.add_vision_use_gelu(value=True)
    for key, value in (
        ("embedding_length", shape.embedding),
        ("feed_forward_length", shape.feed_forward),
        ("block_count", shape.layers),
        ("projection_dim", shape.projection),
        ("attention.head_count", shape.heads),
        ("image_size", shape.image),
        ("patch_size", shape.patch),
    ):
        writer.add_uint32(f"clip.vision.{key}", value)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-5)
    for key in ("image_mean", "image_std"):
        writer.add_array(f"clip.vision.{key}", [0.5] * _CHANNELS)


def _zeros(name: str, width: int) -> LargeTensor:
    return floats(name, (width,), lambda: even(width, 0.0))


def _constant(width: int) -> Weights:
    """Make what is added to each token: the constant, and nothing else."""
    values = np.zeros(width, np.float32)
    values[0] = CONSTANT
    return values
