"""Random floats, and what is not random."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from pytest_llmperf.models.weights import blind, even, uniform


def test_weights_are_pinned() -> None:
    """No release of numpy may change them unseen: it would change every model's hash."""
    values = uniform(1, "blk.0.attn_q.weight", (3, 5), 0.5)
    found = hashlib.sha256(values.astype("<f4").tobytes()).hexdigest()
    assert found == "dc2f74c720a39396b327c67dde7dbfa024281599ac61a548316daf119acb4b15"


def test_weights_have_the_spread_asked_for() -> None:
    """Uniform about zero, with the standard deviation that the scaling counts on."""
    values = uniform(7, "any", (200, 200), 0.25)
    assert values.mean() == pytest.approx(0, abs=0.01)
    assert values.std() == pytest.approx(0.25, rel=0.02)
    assert np.abs(values).max() <= 0.25 * np.sqrt(3)


def test_tensors_have_sources_of_their_own() -> None:
    """Two of a shape differ, and so do two seeds."""
    drawn = [uniform(seed, name, (9,), 1.0) for seed, name in ((1, "a"), (1, "b"), (2, "a"))]
    assert len({one.tobytes() for one in drawn}) == 3


def test_a_norm_hides_the_constant_and_nothing_else() -> None:
    """Blocks are blind for the first dimension; the last norm is not."""
    assert blind(4).tolist() == [0, 1, 1, 1]
    assert even(3, 0.5).tolist() == [0.5, 0.5, 0.5]
