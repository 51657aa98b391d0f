"""Stands in for llama-perplexity where the real one cannot be made to fail on demand.

It speaks the tool's lines. ``FAULT`` in its environment says how it ends, ``STREAM`` names a file
whose bytes it writes as its log-probabilities, ``STREAM_TYPE`` one for that type of K cache,
``DEVICE`` where its log says that its layers are, and ``LAYERS`` how many of four.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import BinaryIO

HELP = """
-c,    --ctx-size N                     size of the prompt context
-b,    --batch-size N                   logical batch
-ub,   --ubatch-size N                  physical batch
-m,    --model FNAME                    model path
-f,    --file FNAME                     a file
--chunks N                              max number of chunks
--kl-divergence-base FNAME              file for the logits
-ctk,  --cache-type-k TYPE              KV cache data type for K
-ngl,  --gpu-layers, --n-gpu-layers N   layers to keep on the GPU
-lv,   --verbosity, --log-verbosity N   Set the verbosity threshold. Values:
                                         - 3: info
                                         - 4: trace (more info)
"""

BUFFERS = """load_tensors: offloaded {layers}/4 layers to GPU
load_tensors:   CPU_Mapped model buffer size =     3.00 MiB
load_tensors:        {device} model buffer size =     7.00 MiB
sched_reserve:  CUDA_Host compute buffer size =     1.00 MiB
"""


def _quarter(chunk: int) -> bytes:
    flag = "--cache-type-k"
    kind = sys.argv[sys.argv.index(flag) + 1] if flag in sys.argv else ""
    given = os.environ.get(f"STREAM_{kind}") or os.environ.get("STREAM")
    if given is None:
        return b"chunk" * 50_000
    data = Path(given).read_bytes()
    size = -(-len(data) // 4)
    return data[(chunk - 1) * size : chunk * size]


NO_MEMORY = """failed to allocate CPU buffer of size 20481310720
failed to allocate buffer for kv cache
"""


def play(fault: str, stream: BinaryIO | None) -> int:
    """Pass four chunks, unless the fault comes in between."""
    say = sys.stderr.write
    if "DEVICE" in os.environ and sys.argv[sys.argv.index("--verbosity") + 1] == "4":
        layers = os.environ.get("LAYERS", "4")
        say(BUFFERS.format(device=os.environ["DEVICE"], layers=layers))
    say("perplexity: calculating perplexity over 4 chunks, n_ctx=512, batch_size=512\n")
    for chunk in range(1, 5):
        if chunk == 3 and fault in {"killed", "decode", "silent"}:
            if fault == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            say("\ndecode: failed to decode, ret = -3\n" if fault == "decode" else "")
            return 0
        value = "nan" if (chunk, fault) == (3, "nan") else f"{8 + chunk / 8:.4f}"
        sys.stdout.write(f"[{chunk}]{value},")
        sys.stdout.flush()
        if stream is not None:
            stream.write(_quarter(chunk))
        time.sleep(1.5 if fault == "slow" else 0)
    ends = {"final": "\nFinal estimate: PPL = nan +/- nan\n", "unsaid": ""}
    say(ends.get(fault, "\nFinal estimate: PPL = 8.5000 +/- 0.25000\n"))
    return 0


def main(arguments: list[str]) -> int:
    """Answer for help, or play a pass."""
    fault = os.environ.get("FAULT", "")
    if "--help" in arguments:
        sys.stdout.write(HELP)
        return 0
    if fault == "short":
        sys.stderr.write("perplexity: you need at least 1024 tokens to evaluate perplexity\n")
        return 0
    if fault in {"dies", "memory"}:
        sys.stderr.write(NO_MEMORY if fault == "memory" else "")
        return 3
    if fault == "stuck":
        time.sleep(600)
    if fault == "config":
        home = os.environ.get("XDG_CONFIG_HOME", "nowhere")
        sys.stderr.write(f"using config file: {home}/llama.cpp/config.ini\n")
    if fault == "unwritten":
        return play("", None)
    if "--kl-divergence-base" not in arguments:
        return play(fault, None)
    with Path(arguments[arguments.index("--kl-divergence-base") + 1]).open("wb") as stream:
        return play(fault, stream)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
