"""Models that the project makes, in a real llama.cpp server."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from pytest_llmperf.models.synth import make_model
from pytest_llmperf.models.text import text
from pytest_llmperf.plan.model import BLOCK_QUANTS, QUANTS, PresetSpec, SynthSpec

if TYPE_CHECKING:
    from collections.abc import Iterator

_EMBEDDED = """
import sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.mmproj.path = sys.argv[2]
params.n_ctx = 2048
params.n_parallel = 1
params.port = 0
params.cache_ram_mib = 0
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
server = xllamacpp.Server(params)
print("listening on", server.listening_address, flush=True)
sys.stdin.read()
"""
_OPTIONS = ["-c", "2048", "-np", "1", "-t", "1", "--cache-ram", "0", "--offline"]
_ADDRESS = ["--host", "127.0.0.1", "--port", "0"]
_LISTENING = re.compile(rb"listening on (https?://\S+)")
_PATIENCE = 60.0


def embedded(model: Path, projector: Path | None = None) -> list[str]:
    """Return the command that serves `model` with the embedded wheel."""
    pytest.importorskip("xllamacpp")
    return [sys.executable, "-c", _EMBEDDED, str(model), str(projector or "")]


def binary(server: Path, model: Path, projector: Path | None = None) -> list[str]:
    """Return the command that serves `model` with a real llama-server."""
    images = ["--mmproj", str(projector)] if projector else []
    return [str(server), "-m", str(model), *images, *_OPTIONS, *_ADDRESS]


@contextlib.contextmanager
def serve(command: list[str], log: Path) -> Iterator[httpx.Client]:
    """Start a server, wait until it is ready, and stop it."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT
        )
    assert process.stdin is not None
    try:
        deadline = time.monotonic() + _PATIENCE
        while not (found := _LISTENING.search(log.read_bytes())):
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"no server: {log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.02)
        # A server closes the connection after a stream without saying so: use each once.
        once = httpx.Limits(max_keepalive_connections=0)
        with httpx.Client(base_url=found[1].decode(), timeout=_PATIENCE, limits=once) as client:
            while client.get("/health").status_code != httpx.codes.OK:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            yield client
    finally:
        process.stdin.close()
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def ask(client: httpx.Client, path: str, **body: object) -> dict[str, Any]:
    """Post a request and return the answer."""
    response = client.post(path, json=body)
    assert response.status_code == httpx.codes.OK, response.text
    answer: dict[str, Any] = response.json()
    return answer


def events(client: httpx.Client, path: str, **body: object) -> list[dict[str, Any]]:
    """Post a streaming request and return its events."""
    with client.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.status_code == httpx.codes.OK, response.read()
        return [
            json.loads(line.removeprefix("data: "))
            for line in response.iter_lines()
            if line.startswith("data: {")
        ]


def picture(width: int, height: int) -> str:
    """Return a PNG with a gradient, as the URL that a chat takes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    # One byte before each line says that it is not filtered; three bytes a pixel.
    lines = (
        b"\0" + b"".join(bytes((5 * x % 256, 5 * y % 256, 99)) for x in range(width))
        for y in range(height)
    )
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"".join(lines)))
    png = b"\x89PNG\r\n\x1a\n" + data + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(png).decode()


@pytest.fixture(
    scope="module", params=["embedded", pytest.param("binary", marks=pytest.mark.tools)]
)
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    """A server of the default shape."""
    pytest.importorskip("gguf")
    folder = tmp_path_factory.mktemp("synth")
    model = make_model(SynthSpec(), folder)
    if request.param == "embedded":
        command = embedded(model)
    else:
        command = binary(request.getfixturevalue("real_server"), model)
    with serve(command, folder / "log") as client:
        yield client


def fixed(prompt: list[int], length: int) -> dict[str, object]:
    """Return the body of a request of fixed length."""
    return {
        "prompt": prompt,
        "n_predict": length,
        "ignore_eos": True,
        "temperature": 0,
        "seed": 1,
        "cache_prompt": False,
    }


def test_text_to_tokens_and_back_is_the_same_text(server: httpx.Client) -> None:
    """Prompts are cut by tokens, and still are the text that they were cut from."""
    tokens = ask(server, "/tokenize", content=text())["tokens"]
    assert ask(server, "/detokenize", tokens=tokens)["content"] == text()
    assert 3 < len(text()) / len(tokens) < 4.5


def test_answers_have_the_length_asked_for(server: httpx.Client) -> None:
    """From anywhere in the text: none ends early, fails, or says one word over and over."""
    tokens = ask(server, "/tokenize", content=text())["tokens"]
    for start in range(0, len(tokens), len(tokens) // 12):
        answer = ask(server, "/completion", **fixed(tokens[start : start + 48], 64))
        assert answer["tokens_predicted"] == 64
        assert answer["stop_type"] == "limit"
        assert "\N{REPLACEMENT CHARACTER}" not in answer["content"]
        assert len(set(answer["content"].split())) > 8


def test_every_token_is_an_event_with_text(server: httpx.Client) -> None:
    """So time to first token, as a client sees it, is that of the first token."""
    tokens = ask(server, "/tokenize", content=text())["tokens"]
    for start in (0, 1500, 4000):
        found = events(server, "/completion", **fixed(tokens[start : start + 100], 64))
        *spoken, last = found
        assert last["stop"] is True
        assert [event for event in spoken if not event["content"]] == []
        assert len(spoken) == 64


def test_hot_sampling_finds_no_byte_either(server: httpx.Client) -> None:
    """What must not be said is out of reach, not just unlikely."""
    prompt = ask(server, "/tokenize", content=text()[:200])["tokens"]
    hot = {"temperature": 1.5, "top_k": 0, "top_p": 1, "min_p": 0}
    answer = ask(server, "/completion", **{**fixed(prompt, 400), **hot})
    assert answer["tokens_predicted"] == 400
    assert "\N{REPLACEMENT CHARACTER}" not in answer["content"]


def test_log_probabilities_are_numbers(server: httpx.Client) -> None:
    """Those of tokens that are never said included: divergence and perplexity need them."""
    prompt = ask(server, "/tokenize", content=text()[:200])["tokens"]
    answer = ask(server, "/completion", **fixed(prompt, 1), n_probs=2048)
    found = [entry["logprob"] for entry in answer["completion_probabilities"][0]["top_logprobs"]]
    assert len(found) == 2048
    assert all(-80 < value <= 0 for value in found)


def test_chat_works_token_by_token(server: httpx.Client) -> None:
    """The file has a chat template, and answers run to the length asked for."""
    messages = [{"role": "user", "content": "How do I mend a radio that hums?"}]
    found = events(server, "/v1/chat/completions", messages=messages, max_tokens=32, temperature=0)
    deltas = [event["choices"][0]["delta"] for event in found if event["choices"]]
    assert sum(bool(delta.get("content")) for delta in deltas) == 32


def test_thinking_is_switched_by_the_template(server: httpx.Client) -> None:
    """Off it reads an empty thought, on and by default nothing; answers stay token by token."""
    messages = [{"role": "user", "content": "Why does a radio hum?"}]

    def prompt(**switch: bool) -> str:
        body = {"messages": messages, "chat_template_kwargs": switch}
        return str(ask(server, "/apply-template", **body)["prompt"])

    asked = "<|im_start|>user\nWhy does a radio hum?<|im_end|>\n<|im_start|>assistant\n"
    assert prompt() == prompt(enable_thinking=True) == asked
    assert prompt(enable_thinking=False) == f"{asked}<think>\n\n</think>\n\n"
    found = events(
        server,
        "/v1/chat/completions",
        messages=messages,
        max_tokens=16,
        temperature=0,
        chat_template_kwargs={"enable_thinking": False},
    )
    deltas = [event["choices"][0]["delta"] for event in found if event["choices"]]
    assert sum(bool(delta.get("content")) for delta in deltas) == 16


@pytest.mark.parametrize("quant", [quant for quant in QUANTS if quant != "Q8_0"])
def test_every_quant_is_served(quant: str, tmp_path: Path) -> None:
    """Each type of weights loads, and generates numbers, not NaN."""
    pytest.importorskip("gguf")
    model = make_model(SynthSpec(quant=quant, layers=2), tmp_path)
    with serve(embedded(model), tmp_path / "log") as client:
        prompt = ask(client, "/tokenize", content=text()[:200])["tokens"]
        answer = ask(client, "/completion", **fixed(prompt, 16), n_probs=1)
        assert answer["tokens_predicted"] == 16
        assert all(-10 < token["logprob"] < 0 for token in answer["completion_probabilities"])


MADE = [
    *((preset, quant) for preset in ("llama-10m", "qwen3-moe-tiny") for quant in BLOCK_QUANTS),
    ("llama-10m", "Q4_K_M"),
    ("qwen3-moe-tiny", "MXFP4_MOE"),
    ("qwen35-tiny", "Q4_K"),
    ("qwen35-tiny", "F16"),
    ("qwen35-moe-tiny", "Q4_K_M"),
    ("qwen35-moe-tiny", "MXFP4_MOE"),
]


@pytest.mark.parametrize(("preset", "quant"), MADE)
def test_presets_are_served(preset: str, quant: str, tmp_path: Path) -> None:
    """Each type of blocks loads, dense, as experts and hybrid, and generates words, not NaN."""
    pytest.importorskip("gguf")
    model = make_model(PresetSpec(preset, quant=quant), tmp_path)
    with serve(embedded(model), tmp_path / "log") as client:
        prompt = ask(client, "/tokenize", content=text()[:200])["tokens"]
        answer = ask(client, "/completion", **fixed(prompt, 32), n_probs=1)
        assert answer["tokens_predicted"] == 32
        assert all(-10 < token["logprob"] < 0 for token in answer["completion_probabilities"])
        assert "\N{REPLACEMENT CHARACTER}" not in answer["content"]
        assert len(set(answer["content"].split())) > 4


@pytest.mark.parametrize("preset", ["qwen35-tiny", "qwen35-moe-tiny"])
def test_the_state_of_a_hybrid_stays_finite(preset: str, tmp_path: Path) -> None:
    """A long prompt and a long answer: nothing grows into NaN, and no word repeats for ever."""
    pytest.importorskip("gguf")
    model = make_model(PresetSpec(preset), tmp_path)
    with serve(embedded(model), tmp_path / "log") as client:
        prompt = ask(client, "/tokenize", content=text())["tokens"][:1200]
        answer = ask(client, "/completion", **fixed(prompt, 700), n_probs=1)
        found = answer["completion_probabilities"]
        assert len(found) == 700
        assert all(-10 < token["logprob"] < 0 for token in found)
        assert len(set(answer["content"].split()[-100:])) > 20


@pytest.mark.tools
@pytest.mark.parametrize("preset", ["qwen35-tiny", "qwen35-moe-tiny"])
def test_hybrids_are_served_by_a_binary(preset: str, real_server: Path, tmp_path: Path) -> None:
    """A llama-server that knows the architecture loads what the wheel loads."""
    pytest.importorskip("gguf")
    model = make_model(PresetSpec(preset), tmp_path)
    with serve(binary(real_server, model), tmp_path / "log") as client:
        prompt = ask(client, "/tokenize", content=text()[:200])["tokens"]
        answer = ask(client, "/completion", **fixed(prompt, 32), n_probs=1)
        assert all(-10 < token["logprob"] < 0 for token in answer["completion_probabilities"])


@pytest.fixture(params=["embedded", pytest.param("binary", marks=pytest.mark.tools)])
def seeing(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[httpx.Client]:
    """A server of the default shape that takes images."""
    pytest.importorskip("gguf")
    files = [make_model(spec, tmp_path) for spec in (SynthSpec(), PresetSpec("vision-tiny"))]
    if request.param == "embedded":
        command = embedded(*files)
    else:
        command = binary(request.getfixturevalue("real_server"), *files)
    with serve(command, tmp_path / "log") as client:
        yield client


def test_an_image_is_sixteen_tokens(seeing: httpx.Client) -> None:
    """Whatever its size; the answer is text, and depends on the image."""
    words = {"type": "text", "text": "What is that? "}

    def answer(*content: dict[str, Any]) -> tuple[int, str]:
        body = {"messages": [{"role": "user", "content": [words, *content]}]}
        found = ask(
            seeing, "/v1/chat/completions", **body, max_tokens=24, temperature=0, logprobs=True
        )
        choice = found["choices"][0]
        assert all(-10 < token["logprob"] < 0 for token in choice["logprobs"]["content"])
        return found["usage"]["prompt_tokens"], choice["message"]["content"]

    blind, without = answer()
    small, one = answer({"type": "image_url", "image_url": {"url": picture(48, 40)}})
    large, two = answer({"type": "image_url", "image_url": {"url": picture(200, 90)}})
    assert small == large == blind + 16
    assert len({without, one, two}) == 3


def test_a_projector_of_another_width_is_refused(tmp_path: Path) -> None:
    """The server says both widths; it is never used wrongly."""
    pytest.importorskip("gguf")
    files = [
        make_model(spec, tmp_path)
        for spec in (SynthSpec(), PresetSpec("vision-tiny", embedding=512))
    ]
    done = subprocess.run(embedded(*files), capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode != 0
    assert "n_embd = 256) and mmproj (n_embd = 512)" in done.stderr
