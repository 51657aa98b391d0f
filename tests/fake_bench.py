"""Stands in for ``llama-bench``: rows of made-up speeds, and every way of going wrong.

Run as ``fake_bench.py --fake-faults FAULTS --fake-journal FILE --fake-number N -- ARGUMENTS``.
Faults, by comma; DEPTH is where it happens:

=================  ==============================================================
``dies@DEPTH``     ends with exit code 3 and says nothing of why
``full@DEPTH``     has no memory for its context, and says so with ``--verbose``
``hangs@DEPTH``    stays in its depth run
``killed@DEPTH``   kills itself
``short@DEPTH``    gives one sample too few
``lost@DEPTH``     leaves the row out that tells decode speed, and ends well
``model``          cannot load the model; ``model@DEPTH`` for that depth alone
``loading``        never gets the model loaded
``twice``          gives every row twice
``cpu``            computed on the CPU; without it, on a GPU
``odd``            writes a row that is no JSON
``foreign``        tells another build and model
=================  ==============================================================
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from itertools import pairwise
from pathlib import Path

HELP = Path(__file__).parent / "data" / "bench-help-b11434.txt"


def say(text: str) -> None:
    """Write a line of progress or log."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def give_up(text: str) -> None:
    """End as the tool does where it cannot go on."""
    say(f"llama_bench: error: {text}")
    raise SystemExit(1)


def load(faults: set[str], model: str) -> None:
    """Load the model, or not."""
    if "loading" in faults:
        time.sleep(60)
    if "model" in faults:
        give_up(f"failed to load model '{model}'")


def fail(at: set[str], model: str, *, verbose: bool) -> None:
    """Go wrong where it is wanted."""
    if "full" in at:
        if verbose:
            say("llama_init_from_model: failed to initialize the context: std::bad_alloc")
        give_up(f"failed to create context with model '{model}'")
    if "dies" in at:
        raise SystemExit(3)
    if "killed" in at:
        os.kill(os.getpid(), signal.SIGKILL)
    if "hangs" in at:
        time.sleep(60)


def main() -> None:
    """Do as asked."""
    end = sys.argv.index("--")
    own, arguments = dict(pairwise(sys.argv[1:end])), sys.argv[end + 1 :]
    faults = set(filter(None, own["--fake-faults"].split(",")))
    if arguments == ["--help"]:
        sys.stdout.write(HELP.read_text("utf-8"))
        return
    with Path(own["--fake-journal"]).open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({"pid": os.getpid(), "arguments": arguments}) + "\n")
    given = dict(pairwise(arguments))
    model, repetitions = given["--model"], int(given["--repetitions"])
    depths = [int(one) for one in given["--n-depth"].split(",")]
    kinds = (int(given["--n-prompt"]), 0), (0, int(given["--n-gen"]))
    works = [(depth, *kind) for depth in depths for kind in kinds]
    for index, (depth, prompt, generate) in enumerate(works, start=1):
        at = {fault.partition("@")[0] for fault in faults if fault.endswith(f"@{depth}")}
        step = f"llama-bench: benchmark {index}/{len(works)}:"
        say(f"{step} starting")
        load(faults | (at & {"model"}), model)
        if "full" not in at:
            say(f"{step} warmup {'prompt' if prompt else 'generation'} run")
            say(f"{step} depth run 1/{repetitions}")
        fail(at, model, verbose="--verbose" in arguments)
        if "lost" in at and generate:
            continue
        foreign = "foreign" in faults
        row = {
            "build_commit": "beef123" if foreign else "0a1b2c3",
            "build_number": 9999 if foreign else int(own["--fake-number"]),
            "backends": "CPU" if "cpu" in faults else "CUDA",
            "model_filename": "other.gguf" if foreign else model,
            "n_gpu_layers": int(given.get("--n-gpu-layers", "-1")),
            "n_prompt": prompt,
            "n_gen": generate,
            "n_depth": depth,
            "samples_ts": [(1000 if prompt else 100) / (1 + depth / 100)]
            * (repetitions - ("short" in at)),
        }
        for _ in range(1 + ("twice" in faults)):
            sys.stdout.write(json.dumps(row)[: 60 if "odd" in faults else None] + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
