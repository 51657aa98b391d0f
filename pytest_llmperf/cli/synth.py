"""``llmperf synth``: write a model of a published shape with random weights, of any size.

The weights are drawn as blocks of their type, so a gigabyte takes seconds, and speed and memory can
be gated where no trained weights are.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pytest_llmperf.errors import ModelError
from pytest_llmperf.files import replacing
from pytest_llmperf.plan.model import BLOCK_QUANTS, MIXTURES, PresetSpec
from pytest_llmperf.plan.shapes import PRESETS

_HASHED = 10**9
"""Bytes up to which the hash is printed: it takes longer than the writing."""

_EVERY = 0.5
"""Seconds between two lines of progress."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``llmperf synth``."""
    parser.add_argument("preset", metavar="PRESET", help=", ".join(PRESETS))
    parser.add_argument("out", metavar="OUT", type=Path, help="the GGUF file to write")
    parser.add_argument(
        "--quant",
        default="",
        help=f"type of the matrices: {', '.join([*BLOCK_QUANTS, *MIXTURES])} "
        "(Q4_K; of a projector F16)",
    )
    parser.add_argument("--seed", type=int, default=1, help="of the weights (1)")
    parser.add_argument("--layers", type=int, help="transformer blocks (as the preset has)")
    parser.add_argument("--vocab", type=int, help="tokens (as the preset has)")
    parser.add_argument("--context", type=int, default=32768, help="trained context (32768)")
    parser.add_argument(
        "--embedding", type=int, help="width of the text model, for a projector (as the preset has)"
    )
    parser.add_argument(
        "--list", action=_List, nargs=0, help="print the presets with their sizes, and exit"
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if it is there")


def run(arguments: argparse.Namespace) -> int:
    """Write the model and print what it is.

    Raises:
        UserError: No such preset or quant, a file that is there already, too full a disk, or one
            that cannot be written.
    """
    spec = PresetSpec(
        arguments.preset,
        quant=arguments.quant,
        seed=arguments.seed,
        layers=arguments.layers,
        vocab=arguments.vocab,
        context=arguments.context,
        embedding=arguments.embedding,
    )
    out: Path = arguments.out.absolute()
    if out.is_dir():
        raise ModelError(f"{out} is a folder: name the file in it")
    if out.exists() and not arguments.force:
        raise ModelError(f"{out} is there already: replace it with --force, or name another file")
    # numpy is slow to import, and no other command needs it.
    from pytest_llmperf.models.presets import (  # noqa: PLC0415
        check_room,
        size_of,
        weights_of,
        write_preset,
    )

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        total = size_of(spec)
        _say(
            f"{spec.preset} in {spec.quant}: {weights_of(spec) / 1e6:,.0f} million weights, "
            f"{total / 1e6:,.0f} MB\n"
        )
        check_room(spec, out.parent)
        progress = _Progress(total)
        with replacing(out) as file:
            write_preset(spec, Path(file.name), progress)
        progress.end()
        size = out.stat().st_size
        sys.stdout.write(f"{out}\nsize {size}\n")
        if size <= _HASHED:
            with out.open("rb") as stream:
                sys.stdout.write(f"sha256 {hashlib.file_digest(stream, 'sha256').hexdigest()}\n")
    except OSError as error:
        raise ModelError(
            f"cannot write {out}: {error.strerror or error}; "
            "free some space or choose another folder"
        ) from error
    return 0


class _List(argparse.Action):
    """Prints the presets, as ``--version`` prints the version."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[object] | None,
        option_string: str | None = None,
    ) -> None:
        """Print a line for each preset and end the program."""
        del namespace, values, option_string
        from pytest_llmperf.models.presets import size_of, weights_of  # noqa: PLC0415  as above

        for preset in PRESETS:
            spec = PresetSpec(preset)
            sys.stdout.write(
                f"{preset:18} {weights_of(spec) / 1e6:9,.1f} M weights "
                f"{size_of(spec) / 1e6:11,.1f} MB in {spec.quant}\n"
            )
        parser.exit()


class _Progress:
    """Says how much is written: on a terminal all along, elsewhere at the end."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = 0
        self._began = self._shown = time.monotonic()

    def __call__(self, size: int) -> None:
        self._done += size
        now = time.monotonic()
        if sys.stderr.isatty() and now - self._shown >= _EVERY:
            self._shown = now
            share = min(self._done / self._total, 1.0)
            _say(f"{100 * share:3.0f} %, {self._speed(now):.0f} MB/s ", start="\r")

    def end(self) -> None:
        """Say the last figures, those of a file that the disk has."""
        now = time.monotonic()
        start = "\r" if sys.stderr.isatty() else ""
        _say(f"written in {now - self._began:.1f} s, {self._speed(now):.0f} MB/s\n", start=start)

    def _speed(self, now: float) -> float:
        return self._done / 1e6 / max(now - self._began, 1e-9)


def _say(text: str, *, start: str = "") -> None:
    sys.stderr.write(f"{start}llmperf: {text}")
    sys.stderr.flush()
