"""Streams of log-probabilities of made-up models, and builds whose tool writes them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from support.fakes import write_program

from pytest_llmperf.build.build import Build
from pytest_llmperf.quality.logits import write_stream

FAKE = Path(__file__).parents[1] / "fake_perplexity.py"
CHUNKS, CONTEXT, VOCAB = 4, 16, 300
SCORED = CONTEXT - 1 - CONTEXT // 2


def made_up(noise: float = 0.0, seed: int = 2) -> np.ndarray:
    """Return logits of the scored tokens of four chunks, disturbed by this much noise."""
    logits = np.random.default_rng(1).normal(0, 3, (CHUNKS, SCORED, VOCAB))
    disturbance = np.random.default_rng(seed).normal(0, noise, logits.shape)
    return (logits + disturbance).astype(np.float32)


@dataclass
class Lab:
    """Makes streams and builds in a folder."""

    folder: Path

    def stream(self, name: str, logits: np.ndarray, seed: int = 0) -> Path:
        """Write a stream of these logits about a text."""
        tokens = np.random.default_rng(seed).integers(0, VOCAB, (CHUNKS, CONTEXT))
        path = self.folder / name
        with path.open("wb") as file:
            write_stream(file, tokens, logits, n_vocab=VOCAB)
        return path

    def build(
        self,
        name: str,
        stream: Path,
        fault: str = "",
        says: Mapping[str, str] | None = None,
        **by_cache_type: Path,
    ) -> Build:
        """Return a build whose tool writes this stream and ends in this way.

        Args:
            name: Its label.
            stream: What it writes.
            fault: As ``tests/fake_perplexity.py`` takes it.
            says: What else it takes.
            by_cache_type: What it writes where the K cache is of this type.
        """
        env = {"FAULT": fault, "STREAM": str(stream), **(says or {})}
        env |= {f"STREAM_{kind}": str(path) for kind, path in by_cache_type.items()}
        # Not the build's own variables, which are conditions of what it measures.
        own = (f"{variable}={value}" for variable, value in env.items())
        command = ("env", *own, sys.executable, str(FAKE))
        write_program(self.folder / name / "llama-perplexity", command)
        server = write_program(self.folder / name / "llama-server", command)
        number = int("".join(c for c in name if c.isdigit()) or 1)
        digest = f"{number:064x}"
        return Build(name, number, "abc", str(server), digest, (str(server),))
