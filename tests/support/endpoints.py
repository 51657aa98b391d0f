"""Servers that are no llama-server: a fake Ollama, and a proxy that shows OpenAI's API alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import httpx

Route = Callable[[str, bytes], tuple[int, Iterator[bytes]]]
"""Answers ``METHOD PATH`` and a body with a status and the parts of an answer."""

MILLISECOND = 1_000_000
"""In nanoseconds, which Ollama counts in."""


@contextmanager
def serving(route: Route) -> Iterator[str]:
    """Run a server on this machine; give its address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            size = int(self.headers.get("Content-Length") or 0)
            status, parts = route(f"{self.command} {self.path}", self.rfile.read(size))
            self.send_response(status)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for part in parts:
                self.wfile.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
                self.wfile.flush()
            self.wfile.write(b"0\r\n\r\n")

        do_GET = do_POST = _answer  # noqa: N815 - named by the standard library

        def log_message(self, *_: object) -> None:
            """Stay silent."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def _one(status: int, body: object) -> tuple[int, Iterator[bytes]]:
    return status, iter([json.dumps(body).encode()])


@dataclass
class FakeOllama:
    """Answers as Ollama's documentation says; a token is four characters.

    Attributes:
        models: Tags.
        cached: Prompt tokens that it says came from its cache, None for an older one that does
            not say.
        reason: Why answers end.
        asked: The bodies of all requests for answers.
    """

    models: tuple[str, ...] = ("tiny:latest",)
    cached: int | None = None
    reason: str = "length"
    asked: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self, what: str, content: bytes) -> tuple[int, Iterator[bytes]]:
        """Answer one request."""
        if what == "GET /api/version":
            return _one(200, {"version": "0.40.12"})
        if what == "GET /api/tags":
            known = [{"name": name, "digest": "5a" * 32, "size": 1} for name in self.models]
            return _one(200, {"models": known})
        if what == "GET /api/ps":
            running = [{"name": name, "size_vram": 3 * 1024**2} for name in self.models]
            return _one(200, {"models": running})
        if what not in {"POST /api/generate", "POST /api/chat"}:
            return _one(404, {"error": "404 page not found"})
        body = json.loads(content)
        self.asked.append(body)
        if body["model"] not in self.models:
            return _one(404, {"error": f"model '{body['model']}' not found"})
        return 200, self._answer(body)

    def _answer(self, body: Mapping[str, Any]) -> Iterator[bytes]:
        talk = "messages" in body
        said = "".join(m["content"] for m in body["messages"]) if talk else body["prompt"]
        count = body["options"]["num_predict"]
        for _ in range(count):
            token: dict[str, Any] = (
                {"message": {"role": "assistant", "content": "a"}} if talk else {"response": "a"}
            )
            yield json.dumps({"model": body["model"], **token, "done": False}).encode() + b"\n"
        end = {
            "model": body["model"],
            **({"message": {"role": "assistant", "content": ""}} if talk else {"response": ""}),
            "done": True,
            "done_reason": self.reason,
            "load_duration": MILLISECOND,
            "prompt_eval_count": len(said) // 4,
            "prompt_eval_duration": 20 * MILLISECOND,
            "eval_count": count,
            "eval_duration": 10 * count * MILLISECOND,
        }
        if self.cached is not None:
            end["prompt_eval_cached_count"] = self.cached
        yield json.dumps(end).encode() + b"\n"


@dataclass
class Mask:
    """Passes on what belongs to OpenAI's API, and nothing else.

    Attributes:
        url: Whom it asks.
        key: With which key.
        silent: Whether answers are left without their counts of tokens.
        asked: The bodies of all chats.
    """

    url: str
    key: str
    silent: bool = False
    asked: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self, what: str, content: bytes) -> tuple[int, Iterator[bytes]]:
        """Answer one request."""
        method, path = what.split(" ")
        if path not in {"/v1/models", "/v1/chat/completions"}:
            return _one(404, {"error": {"message": "Not Found"}})
        if method == "GET":
            return _one(200, {"object": "list", "data": [{"id": "org/tiny", "object": "model"}]})
        self.asked.append(json.loads(content))
        headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
        asking = httpx.stream(
            *("POST", self.url + path), content=content, headers=headers, trust_env=False
        )
        reply = asking.__enter__()
        return reply.status_code, self._stream(asking, reply)

    def _stream(
        self, asking: AbstractContextManager[httpx.Response], reply: httpx.Response
    ) -> Iterator[bytes]:
        with ExitStack() as stack:
            stack.push(asking)
            for line in reply.iter_lines():
                if not line.startswith("data: {"):
                    yield line.encode() + b"\n"
                    continue
                event = json.loads(line.removeprefix("data: "))
                # What a stranger does not tell.
                event.pop("timings", None)
                if self.silent:
                    event.pop("usage", None)
                yield b"data: " + json.dumps(event).encode() + b"\n"
