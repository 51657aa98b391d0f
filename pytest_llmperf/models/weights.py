"""What all models with random weights share: how floats are drawn, and what is not random.

The first dimension of the hidden state is a constant: every embedding has it, and no block reads or
changes it. The output layer subtracts a multiple of it from each token that no client should see
generated (see :class:`~pytest_llmperf.models.vocabulary.Vocabulary`), so that every generated token
is a piece of text on its own. And the weights are scaled by their fan-in, so that activations keep
their size from block to block.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from pytest_llmperf.models.vocabulary import Voice

Weights: TypeAlias = NDArray[np.float32]

CONSTANT = 2.0
"""First value of each embedding. The largest of its row, so every quant keeps it."""

VOICE: Mapping[Voice, float] = MappingProxyType({"often": 0.0, "rarely": -3.0, "never": -24.0})
"""Its weight in the logit of a token. The constant is about 1.4 after the last norm, so tokens of
the other two kinds trail by about 4 and 34: out of reach of sampling, yet with a logarithm of
their probability that is a number in 32 bits, as the perplexity of real text needs."""

LOGIT_SPREAD = 2.0
"""Standard deviation of the logits, near that of trained models, so that quality metrics move."""

ATTENTION_SPREAD = 2.0
"""Standard deviation of the attention scores: each position attends to few others, not to all."""


def seed_of(seed: int, name: str) -> int:
    """Return the seed of a tensor, 128 bits."""
    key = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(key[:16], "big")


def uniform(seed: int, name: str, shape: tuple[int, ...], deviation: float) -> Weights:
    """Draw uniform values of mean 0.

    Taken from the raw output of PCG64, which numpy promises never to change; its distributions
    may change with any release, and then the same spec would give another file.

    Args:
        seed: Of the model.
        name: Of the tensor, which has a source of its own.
        shape: Of the result.
        deviation: Standard deviation.
    """
    count = math.prod(shape)
    raw = np.random.PCG64(seed_of(seed, name)).random_raw((count + 3) // 4)
    steps = raw.astype("<u8").view("<u2")[:count].astype(np.float32)
    steps -= np.float32(32767.5)
    steps *= np.float32(deviation * math.sqrt(3) / 32768)
    return steps.reshape(shape)


def even(width: int, value: float = 1.0) -> Weights:
    """Make the weights of a norm that scales all alike."""
    return np.full(width, value, np.float32)


def blind(width: int) -> Weights:
    """Make the weights of a norm that hides the constant from its block."""
    values = even(width)
    values[0] = 0
    return values
