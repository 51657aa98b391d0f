"""A stand-in for llama-server that fails on demand.

For the faults that a real server does not show when a test wants them; it computes nothing. A
program of its own (standard library only), started as ``fake_server.py OPTIONS...``. It knows
the options of llama-server that the harness gives, ignores the rest, and has some of its own:

``--fake-number N``     build number that ``--version`` tells
``--fake-token-ms X``   milliseconds that a token takes, by its own account
``--fake-journal FILE`` gets a JSON line for every start and every completion
``--fake-faults LIST``  faults, separated by commas

A fault of an answer may be bound to one completion: ``crash@3`` crashes in the third since the
start, ``crash#48`` in every one with 48 prompt tokens.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

HELP = """----- common params -----
-h,    --help, --usage                  print usage and exit
-c,    --ctx-size N                     size of the prompt context (default: 0)
                                        (env: LLAMA_ARG_CTX_SIZE)
-t,    --threads N                      number of CPU threads to use (default: -1)
-np,   --parallel N                     number of server slots (default: -1)
--mmap, --no-mmap                       whether to memory-map the model
-m,    --model FNAME                    model path
--host HOST                             ip address to listen
--port PORT                             port to listen
--api-key-file FNAME                    path to file containing API keys
-lv,   --verbosity, --log-verbosity N   Set the verbosity threshold. Values:
                                         - 3: info
                                         - 4: LEVEL4
"""
NEWER = """-cram, --cache-ram N                    set the maximum cache size in MiB (default: 8192)
--offline                               Offline mode: forces use of cache
"""
LOG = """load: loaded meta data with 30 key-value pairs and 99 tensors from MODEL (version GGUF V3)
load_tensors: offloaded 5/5 layers to GPU
load_tensors:        CUDA0 model buffer size =     10.50 MiB
load_tensors:   CPU_Mapped model buffer size =      2.00 MiB
llama_kv_cache:        CUDA0 KV buffer size =     4.00 MiB
llama_context:        CUDA0 compute buffer size =     8.25 MiB
"""
OUT_OF_MEMORY = """ggml_backend_cuda_buffer_type_alloc_buffer: allocating 8984.00 MiB on device 0: \
cudaMalloc failed: out of memory
alloc_tensor_range: failed to allocate CUDA0 buffer of size 9420406784
llama_model_load: error loading model: unable to allocate CUDA0 buffer
"""
COMMIT = "0a1b2c3"
MARKER = f"<__media_{os.getpid()}__>"


@dataclass
class Fake:
    """The server's options, faults and what it has seen."""

    options: dict[str, str]
    faults: list[str]
    keys: set[str] = field(default_factory=set)
    health_asked: int = 0
    completions: int = 0
    caches: dict[object, list[int]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def has(self, fault: str) -> bool:
        """Return whether a fault that is bound to no completion is switched on."""
        return fault in self.faults

    def strikes(self, fault: str, number: int, prompt: int) -> bool:
        """Return whether a fault of an answer is due in this completion."""
        return bool({fault, f"{fault}@{number}", f"{fault}#{prompt}"} & set(self.faults))

    def note(self, **what: object) -> None:
        """Write a line into the journal."""
        if path := self.options.get("--fake-journal"):
            handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            os.write(handle, (json.dumps(what) + "\n").encode())
            os.close(handle)

    @property
    def number(self) -> str:
        """Build number."""
        return self.options.get("--fake-number", "9000")


Send = Callable[[bytes], None]


def reply(send: Send, status: int, body: object) -> None:
    """Answer with JSON."""
    content = json.dumps(body).encode()
    send(
        f"HTTP/1.1 {status} Whatever\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n".encode()
        + content
    )


def fail(send: Send, status: int, message: str) -> None:
    """Answer with an error in llama-server's form."""
    reply(send, status, {"error": {"code": status, "message": message, "type": "server_error"}})


@dataclass
class Work:
    """One answer to make.

    Attributes:
        tokens: The prompt.
        generate: Tokens to make.
        slot: Slot that makes them.
        keep: Whether the cache of the slot is used and kept.
        say: Writes a token of this number.
        close: Writes the end, from the reason and the timings.
    """

    tokens: list[int]
    generate: int
    slot: object
    keep: bool
    say: Callable[[int], Mapping[str, object]]
    close: Callable[[Callable[[str], bool], Mapping[str, object]], list[Mapping[str, object]]]


def complete(fake: Fake, send: Send, body: Mapping[str, object]) -> None:
    """Answer a completion as a stream of events."""
    prompt = body["prompt"]
    generate = body["n_predict"]
    if not isinstance(prompt, list) or not isinstance(generate, int):
        fail(send, 400, "a prompt of token ids and a length are needed")
        return

    def say(index: int) -> Mapping[str, object]:
        return {"content": "a", "tokens": [index], "stop": False}

    def close(
        due: Callable[[str], bool], timings: Mapping[str, object]
    ) -> list[Mapping[str, object]]:
        end = {
            "content": "",
            "stop": True,
            "stop_type": "eos" if due("eos") else "limit",
            "truncated": due("truncated"),
        }
        return [end if due("no-timings") else {**end, "timings": timings}]

    keep = body.get("cache_prompt") is True
    # One token is made even where none is asked for.
    answer_with(fake, send, Work(prompt, generate or 1, body.get("id_slot"), keep, say, close))


def chat(fake: Fake, send: Send, body: Mapping[str, object]) -> None:
    """Answer a chat as a stream of events."""
    generate = body["max_tokens"]
    if not isinstance(generate, int):
        fail(send, 400, "a length is needed")
        return
    tokens = tokenized(render(fake, body).replace(MARKER, ""))
    tokens += [0] * 16 * render(fake, body).count(MARKER)

    def delta(**what: str) -> Mapping[str, object]:
        return {"choices": [{"index": 0, "delta": what, "finish_reason": None}]}

    def say(index: int) -> Mapping[str, object]:
        return delta(reasoning_content="t") if index == 0 else delta(content="a")

    def close(
        due: Callable[[str], bool], timings: Mapping[str, object]
    ) -> list[Mapping[str, object]]:
        reason = "stop" if due("eos") else "length"
        end = {"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]}
        usage = {"prompt_tokens": len(tokens), "completion_tokens": timings["predicted_n"]}
        last: Mapping[str, object] = {"choices": [], "usage": usage}
        return [end, last if due("no-timings") else {**last, "timings": timings}]

    answer_with(
        fake, send, Work(tokens, generate, body.get("id_slot"), keep=False, say=say, close=close)
    )


def answer_with(fake: Fake, send: Send, work: Work) -> None:
    """Do a work, or fail at it."""
    size = len(work.tokens)
    with fake.lock:
        fake.completions += 1
        number = fake.completions
        cached = shared(fake.caches.pop(work.slot, []), work.tokens) if work.keep else 0
        if work.keep:
            fake.caches[work.slot] = work.tokens
    fake.note(
        event="completion",
        build=fake.number,
        number=number,
        prompt=size,
        cached=cached,
        generate=work.generate,
        slot=work.slot,
    )

    def due(fault: str) -> bool:
        return fake.strikes(fault, number, size)

    def part(data: bytes) -> None:
        send(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    if due("http500"):
        fail(send, 500, "Failed to parse input at pos 0")
        return
    if due("mute"):
        time.sleep(600)
    send(
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
        b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    )
    part(b": ping\n\n")
    generated = work.generate - 1 if due("short") else work.generate
    say(work, generated, due, part)
    if not due("no-close"):
        token_ms = float(fake.options.get("--fake-token-ms", "1"))
        for last in work.close(due, timings(due, size, cached, generated, token_ms)):
            event(last, part)
    send(b"0\r\n\r\n")


def event(data: Mapping[str, object], part: Send) -> None:
    """Send an event of a stream."""
    part(b"data: " + json.dumps(data).encode() + b"\n\n")


def say(work: Work, generated: int, due: Callable[[str], bool], part: Send) -> None:
    """Send the tokens, slowly or not at all if that is due."""
    if due("crawl"):
        size = len(work.tokens)
        event({"prompt_progress": {"total": size, "cache": 0, "processed": 3}}, part)
        time.sleep(600)
    for index in range(generated):
        event(work.say(index), part)
        if index == 0:
            spoil(due, part)
        if due("slow"):
            time.sleep(0.1)


def shared(cached: list[int], tokens: list[int]) -> int:
    """Return how many tokens of a prompt are in the cache; the last one is always evaluated."""
    same = 0
    for one, other in zip(cached, tokens[:-1], strict=False):
        if one != other:
            break
        same += 1
    return same


def render(fake: Fake, body: Mapping[str, object]) -> str:
    """Return what the chat template makes of messages."""
    messages = body["messages"]
    said = []
    for message in messages if isinstance(messages, list) else []:
        content = message["content"]
        parts = content if isinstance(content, list) else [{"text": content}]
        text = "".join(str(one.get("text", MARKER)) for one in parts)
        said.append(f"<{message['role']}>    {text}")
    kwargs = body.get("chat_template_kwargs")
    empty = isinstance(kwargs, dict) and kwargs.get("enable_thinking") is False
    thought = "<think></think>" if empty and not fake.has("deaf-template") else ""
    own = f"<build {fake.number}>" if fake.has("own-template") else ""
    return own + "".join(said) + "<assistant>" + thought


def tokenized(text: str) -> list[int]:
    """Return a token for every four characters."""
    return [ord(letter) for letter in text[::4]]


def spoil(due: Callable[[str], bool], part: Send) -> None:
    """Die or hang in mid-answer, if that is due."""
    if due("crash"):
        signal.raise_signal(signal.SIGSEGV)
    if due("exit"):
        sys.stdout.write("ggml_abort: a check failed\n")
        sys.stdout.flush()
        os._exit(1)
    if due("oom"):
        sys.stdout.write(
            "CUDA error: out of memory\n  current device: 0, in function alloc at x:1\n"
        )
        sys.stdout.flush()
        os.abort()
    if due("hang"):
        time.sleep(600)
    while due("pings"):
        part(b": ping\n\n")
        time.sleep(0.05)
    if due("error"):
        part(b'data: {"error": {"code": 500, "message": "the compute failed"}}\n\n')


def timings(
    due: Callable[[str], bool], prompt: int, cached: int, generated: int, token_ms: float
) -> dict[str, object]:
    """Return the server's own account of an answer."""
    cached += 5 if due("cached") else 0
    return {
        "cache_n": cached,
        "prompt_n": prompt - cached,
        "prompt_ms": token_ms * prompt / 10,
        "predicted_n": generated,
        "predicted_ms": token_ms * generated,
    }


def answer(fake: Fake, connection: socket.socket) -> None:
    """Answer the one request of a connection."""
    with connection, connection.makefile("rb") as stream:
        method, path, _ = stream.readline().decode().split(" ", 2)
        headers: dict[str, str] = {}
        while line := stream.readline().decode().strip():
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        content = stream.read(int(headers.get("content-length", "0")))
        try:
            route(fake, connection.sendall, f"{method} {path}", headers, content)
        except OSError:
            return  # the client has gone


def route(fake: Fake, send: Send, what: str, headers: Mapping[str, str], content: bytes) -> None:
    """Answer one request."""
    if what == "GET /health":
        fake.health_asked += 1
        if fake.has("never-healthy") or fake.health_asked == 1:
            fail(send, 503, "Loading model")
        else:
            reply(send, 200, {"status": "ok"})
        return
    if what == "GET /props" and fake.has("dies-once-ready"):
        os._exit(7)
    key = headers.get("authorization", "").removeprefix("Bearer ")
    if key not in fake.keys and not fake.has("no-key"):
        fail(send, 401, "Invalid API Key")
    elif what == "GET /props":
        if fake.has("dies-of-props"):
            os._exit(7)
        context = int(fake.options.get("--ctx-size", "4096"))
        settings = {"default_generation_settings": {"n_ctx": context}}
        sees = {"modalities": {"vision": True}, "media_marker": MARKER} if fake.has("sees") else {}
        props: object = {**settings, **sees, "build_info": f"b{fake.number}-{COMMIT}"}
        reply(send, 200, ["no", "object"] if fake.has("odd-props") else props)
    elif what in {"POST /completion", "POST /v1/chat/completions"}:
        make = complete if what == "POST /completion" else chat
        make(fake, send, json.loads(content))
    elif what.startswith("POST ") and (told := text_route(fake, what, content)) is not None:
        reply(send, 200, told)
    else:
        fail(send, 404, "File Not Found")


def text_route(fake: Fake, what: str, content: bytes) -> object:
    """Return the answer of a route that only handles text, None for another route."""
    body = json.loads(content)
    if what == "POST /tokenize":
        ids: object = tokenized(str(body["content"]))
        return {"tokens": "none" if fake.has("odd-tokens") else ids}
    if what == "POST /detokenize":
        text = "".join(chr(token) + "   " for token in body["tokens"])
        return {} if fake.has("odd-tokens") else {"content": text}
    if what == "POST /apply-template":
        return {} if fake.has("odd-template") else {"prompt": render(fake, body)}
    return None


def leave_child() -> int:
    """Start a child that leaves the session and ignores SIGTERM; return its process id."""
    child = os.fork()
    if child == 0:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)
        os._exit(0)
    return child


def announce(fake: Fake, port: int) -> None:
    """Write the log of loading, and the line that tells the port."""
    out = sys.stdout
    if fake.has("config-file"):
        out.write("init: using config file: /etc/llama.cpp/config.ini\n")
    out.write(LOG.replace("MODEL", fake.options.get("--model", "")))
    line = f"main: server is listening on http://127.0.0.1:{port}"
    if fake.has("torn-line"):
        out.write(line[:-2])
        out.flush()
        time.sleep(0.3)
        line = line[-2:]
    out.write(line + " - starting the main loop\n")
    out.flush()


def serve(fake: Fake) -> None:
    """Start as llama-server does, and answer until the end."""
    key_file = Path(fake.options.get("--api-key-file", os.devnull))
    fake.keys.update(key_file.read_text("utf-8").split())
    signal.signal(signal.SIGTERM, signal.SIG_IGN if fake.has("deaf") else lambda *_: os._exit(0))
    child = leave_child() if fake.has("child") else None
    fake.note(
        event="start",
        build=fake.number,
        pid=os.getpid(),
        child=child,
        argv=sys.argv[1:],
        env=dict(os.environ),
        key_mode=key_file.stat().st_mode & 0o777,
    )
    if fake.has("start-oom"):
        sys.stdout.write(OUT_OF_MEMORY)
        sys.exit(1)
    if fake.has("start-exit"):
        sys.stdout.write("error: failed to load model\n")
        sys.exit(3)
    if fake.has("never-listens"):
        sys.stdout.write("loading, and loading\n")
        sys.stdout.flush()
        time.sleep(600)
    listener = socket.create_server(("127.0.0.1", int(fake.options.get("--port", "8080"))))
    announce(fake, listener.getsockname()[1])
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=answer, args=(fake, connection), daemon=True).start()


def main(arguments: list[str]) -> int:
    """Do what the arguments ask."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pairs = zip(arguments, [*arguments[1:], ""], strict=True)
    options = {name: value for name, value in pairs if name.startswith("--")}
    fake = Fake(options, [one for one in options.get("--fake-faults", "").split(",") if one])
    if "--version" in options:
        sys.stderr.write(f"version: {fake.number} ({COMMIT})\nbuilt with a text editor\n")
    elif "--help" in options:
        text = HELP.replace("LEVEL4", "debug" if fake.has("older") else "trace (more info)")
        sys.stdout.write(text if fake.has("older") else text + NEWER)
    elif "--list-devices" in options:
        devices = (
            "  (none)" if fake.has("no-gpu") else "  CUDA0: Fake 1 (16000 MiB, 15000 MiB free)"
        )
        sys.stdout.write(f"Available devices:\n{devices}\n")
    else:
        serve(fake)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
