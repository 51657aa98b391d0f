"""Compares the wall time of a streamed divergence with that of llama-perplexity's own two steps.

The tool writes the base's log-probabilities to a file, then reads them and compares. Here both
passes run at once and are compared as they write. Both ways are taken in turn, several times, and
their ratio is printed, with the figures that both find::

    python scripts/streaming_ratio.py FOLDER_OF_LLAMA_CPP --vocab 248320 --chunks 4

The model is the shipped one; with ``--vocab`` its vocabulary is widened by tokens that are hardly
ever likely, so that the distributions stay those of a language model.
"""

from __future__ import annotations

import argparse
import math
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pytest_llmperf.build.build import Build
from pytest_llmperf.models.gguf import read_gguf, write_gguf
from pytest_llmperf.plan.config import Config
from pytest_llmperf.plan.options import OptionValue
from pytest_llmperf.quality.compare import compare_passes
from pytest_llmperf.quality.divergence import summarize
from pytest_llmperf.quality.logits import LogitsReader
from pytest_llmperf.quality.perplexity import PassPlan
from pytest_llmperf.quality.reference import build_reference, compare_reference
from pytest_llmperf.quality.side import Side
from pytest_llmperf.serve.launch import ServePlan

DATA = Path(__file__).parents[1] / "pytest_llmperf" / "data"
BYTES = slice(3, 259)
"""Tokens of single bytes, most of which the text never has."""


def widen(source: Path, target: Path, n_vocab: int) -> None:
    """Write a model with a larger vocabulary: the new tokens are as unlikely as its rare ones."""
    metadata, tensors = read_gguf(source)
    random = np.random.default_rng(1)
    more = n_vocab - len(metadata["tokenizer.ggml.tokens"])
    metadata["tokenizer.ggml.tokens"] += [f"\N{REPLACEMENT CHARACTER}{n}" for n in range(more)]
    metadata["tokenizer.ggml.scores"] += [-1e9] * more
    metadata["tokenizer.ggml.token_type"] += [1] * more
    metadata["llama.vocab_size"] = n_vocab
    for name in ("token_embd.weight", "output.weight"):
        rare = tensors[name][BYTES]
        rows = rare[random.integers(0, len(rare), more)]
        rows = rows * random.normal(1, 0.05, (more, 1))
        tensors[name] = np.concatenate([tensors[name], rows.astype(np.float32)])
    shaped = {n: t.astype(np.float16) if t.ndim > 1 else t for n, t in tensors.items()}
    write_gguf(target, metadata, shaped)


def two_steps(command: Sequence[str], chunks: int, candidate: Sequence[str], file: Path) -> str:
    """Run the tool's own two steps; return what the second one says."""
    base = [*command, "--kl-divergence-base", str(file)]
    subprocess.run([*base, "--chunks", str(chunks)], check=True, capture_output=True)  # noqa: S603 - a program of the user's
    second = [*base, "--kl-divergence", *candidate]
    done = subprocess.run(second, check=True, capture_output=True, text=True)  # noqa: S603 - likewise
    return done.stdout + done.stderr


def said(text: str, what: str) -> float:
    """Return a figure of the tool's, NaN where it lost the line."""
    found = re.search(rf"^{what}\s*:\s+(\S+)", text, re.MULTILINE)
    return float(found.group(1)) if found else math.nan


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("folder", type=Path, help="folder with llama-perplexity and llama-server")
    parser.add_argument("--vocab", type=int, help="widen the vocabulary to this many tokens")
    parser.add_argument("--chunks", type=int, default=20)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--layers", type=int, default=0, help="layers on the GPU")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        measure(given, Path(name))


def measure(given: argparse.Namespace, folder: Path) -> None:
    """Take both ways in turn."""
    model = DATA / "tiny-quality.gguf"
    if given.vocab:
        widen(model, folder / "wide.gguf", given.vocab)
        model = folder / "wide.gguf"
    server = given.folder / "llama-server"
    build = Build("build", 1, "unknown", str(server), "", (str(server),))
    options: dict[str, OptionValue] = {
        "threads": given.threads,
        "flash-attn": "on",
        "n-gpu-layers": given.layers,
    }
    cache: dict[str, OptionValue] = {"cache-type-k": "q8_0", "cache-type-v": "q8_0"}
    serve = ServePlan(folder)
    sides = [
        Side(build, Config(name, "m", its), model, "tool", serve)
        for name, its in (("base", options), ("candidate", {**options, **cache}))
    ]
    size = given.context
    plan = PassPlan(size, size, min(size, 512), given.chunks, folder / "run")
    command = [str(given.folder / "llama-perplexity"), "-m", str(model)]
    command += ["-f", str(DATA / "quality.txt"), "-c", str(size), "-b", str(size)]
    command += ["-t", str(given.threads), "-fa", "on", "-ngl", str(given.layers)]
    candidate = ["-ctk", "q8_0", "-ctv", "q8_0"]
    ratios = []
    file = folder / "base.kld"
    for number in range(1, given.rounds + 1):
        began = time.perf_counter()
        found = summarize(compare_passes(*sides, DATA / "quality.txt", plan).tokens)
        streamed = time.perf_counter() - began
        began = time.perf_counter()
        text = two_steps(command, given.chunks, candidate, file)
        own = time.perf_counter() - began
        ratios.append(streamed / own)
        sys.stdout.write(
            f"round {number}: streamed {streamed:.1f} s, two steps {own:.1f} s, ratio "
            f"{streamed / own:.3f}; mean KLD {found.kld.value:.6f} and "
            f"{said(text, 'Mean +KLD'):.6f}, same top {100 * found.same_top.value:.3f} and "
            f"{said(text, 'Same top p'):.3f} %\n"
        )
        sys.stdout.flush()
    sys.stdout.write(
        f"median ratio {statistics.median(ratios):.3f}; {given.chunks} chunks of {size}; "
        f"the tool's file {file.stat().st_size / 1e6:.0f} MB, streamed 0 MB\n"
    )
    reference(file, folder, found.kld.value, sides[1], plan)
    shutil.rmtree(folder / "run", ignore_errors=True)


def reference(file: Path, folder: Path, exact: float, candidate: Side, plan: PassPlan) -> None:
    """Print the size and the error of a compact reference of the same base."""
    began = time.perf_counter()
    with file.open("rb") as stream:
        made = build_reference(
            LogitsReader(stream, "base"),
            folder / "base.kldref",
            model_sha256="0" * 64,
            corpus_sha256="0" * 64,
        )
    took = time.perf_counter() - began
    found = []
    candidate.run(
        DATA / "quality.txt",
        plan,
        lambda stream: found.append(compare_reference(made, LogitsReader(stream, "candidate"))),
    )
    kld = float(found[0].tokens.kld.mean())
    low, high = found[0].kld_bounds
    share = 100 * made.nbytes / file.stat().st_size
    sys.stdout.write(
        f"compact reference: {made.nbytes / 1e6:.2f} MB, {share:.3f} % of the file, made in "
        f"{took:.1f} s; mean KLD {kld:.6f}, {100 * (kld / exact - 1):+.2f} % (standard error "
        f"{found[0].kld_error:.2g}, bounds {low:.2g} to {high:.2g})\n"
    )


if __name__ == "__main__":
    main()
