"""What a running server is found to be: OpenAI-compatible, or Ollama."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.endpoints import FakeOllama, serving

from pytest_llmperf.build.build import Build
from pytest_llmperf.build.resolve import resolve
from pytest_llmperf.build.spec import parse_spec
from pytest_llmperf.errors import BuildError
from pytest_llmperf.judge.store import validate_label
from pytest_llmperf.plan.config import BuildEntry


@pytest.fixture(autouse=True)
def _no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model is named unless a test does."""
    monkeypatch.delenv("LLMPERF_ENDPOINT_MODEL", raising=False)


def found(spec: str, builds: dict[str, BuildEntry] | None = None) -> Build:
    """Resolve a spec."""
    return resolve(parse_spec(spec, builds or {}, Path()), Path(), print)


@contextmanager
def openai(*models: str) -> Iterator[str]:
    """Serve a list of models and nothing else."""
    listed = {"object": "list", "data": [{"id": name} for name in models]}

    def route(what: str, _content: bytes) -> tuple[int, Iterator[bytes]]:
        known = what == "GET /v1/models"
        body = listed if known else {"error": {"message": "Not Found"}}
        return (200 if known else 404), iter([json.dumps(body).encode()])

    with serving(route) as url:
        yield url


def test_a_server_with_a_list_of_models_is_openai_compatible() -> None:
    """It is called by its model; what cannot be checked is said."""
    with openai("org/Model-7B:q4") as url:
        build = found(url)
        assert (build.api, build.url, build.model) == ("openai", url, "org/Model-7B:q4")
        assert (build.label, build.number) == ("Model-7B-q4", 0)
        assert "whether a prompt came from a cache is known only where" in build.note


def test_of_several_models_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the environment; the error lists them."""
    with openai("one", "two") as url:
        with pytest.raises(BuildError, match=r"name one by LLMPERF_ENDPOINT_MODEL: one, two$"):
            found(url)
        monkeypatch.setenv("LLMPERF_ENDPOINT_MODEL", "two")
        assert found(url).model == "two"
        monkeypatch.setenv("LLMPERF_ENDPOINT_MODEL", "twoo")
        with pytest.raises(BuildError, match=r"has no such model \(nearest: two\): there are one"):
            found(url)


def test_a_server_without_models_is_none() -> None:
    """As before: what answers may be any server."""
    wanted = pytest.raises(BuildError, match="answered 404 to /props: not llama-server")
    with openai() as url, wanted:
        found(url)


def test_an_ollama_is_called_by_its_version() -> None:
    """Its address is that of the spec; the digest of its model is told."""
    with serving(FakeOllama()) as url:
        build = found(f"ollama:{url}")
        assert (build.api, build.url, build.model) == ("ollama", url, "tiny:latest")
        assert build.label == "ollama-0.40.12"
        assert "(5a5a5a5a5a5a)" in build.note
        entry = BuildEntry("mine", f"ollama:{url}", label="ours")
        assert found("mine", {"mine": entry}).label == "ours"


@pytest.mark.parametrize(
    ("models", "message"), [((), "has no model: pull one"), (("a", "b"), "has several models")]
)
def test_an_ollama_must_have_the_model(models: tuple[str, ...], message: str) -> None:
    """One, or the one that is named."""
    with serving(FakeOllama(models=models)) as url, pytest.raises(BuildError, match=message):
        found(f"ollama:{url}")


def test_what_tells_no_version_is_no_ollama() -> None:
    """Nor is a port where nobody answers."""
    wanted = pytest.raises(BuildError, match="tells no version at /api/version: not Ollama")
    with openai("one") as url, wanted:
        found(f"ollama:{url}")
    with pytest.raises(BuildError, match=r"no Ollama answers at http://127\.0\.0\.1:1"):
        found("ollama:http://127.0.0.1:1")


def test_labels_are_names_of_baselines() -> None:
    """Whatever the model is called, and with the name of a variant."""
    for name in ("../" * 30 + "x" * 99, "...", "Ünï cödé/模型"):
        with openai(name) as url:
            label = found(url).label
            assert validate_label(f"{label}+a-variant-of-mine") == f"{label}+a-variant-of-mine"
