"""The ``llmperf`` command: one subcommand a module."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pytest_llmperf import __version__
from pytest_llmperf.cli import calibrate, synth, verdict
from pytest_llmperf.errors import LlmperfError, UserError

_USAGE = 4
"""Exit code of a user's mistake, as pytest's own."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand and return its exit code."""
    parser = argparse.ArgumentParser(prog="llmperf", description="What goes beside pytest.")
    parser.add_argument("--version", action="version", version=f"llmperf {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (calibrate, synth, verdict):
        text = (module.__doc__ or "").partition(": ")[2].partition("\n")[0]
        name = module.__name__.rpartition(".")[2]
        command = commands.add_parser(name, help=text, description=text)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    given = parser.parse_args(arguments)
    try:
        return int(given.run(given))
    except UserError as error:
        sys.stderr.write(f"ERROR: {error}\n")
        return _USAGE
    except LlmperfError as error:
        sys.stderr.write(f"ERROR: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; what was measured is kept\n")
        return 130
