"""The command that writes a model of a published shape."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from pytest_llmperf.cli import synth
from pytest_llmperf.cli.main import main
from pytest_llmperf.models.synth import make_model
from pytest_llmperf.plan.model import PresetSpec
from pytest_llmperf.plan.shapes import PRESETS

if TYPE_CHECKING:
    from pathlib import Path

SMALL = ["synth", "qwen3-moe-tiny", "--layers=1", "--vocab=600"]


@pytest.fixture(autouse=True)
def _needs_gguf() -> None:
    pytest.importorskip("gguf")


def test_it_writes_the_file_that_a_suite_makes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same bytes as ``preset`` in a suite file, in a folder that is made; figures are said."""
    out = tmp_path / "new" / "tiny.gguf"
    assert main([*SMALL, "--quant=Q8_0", "--seed=3", str(out)]) == 0
    spec = PresetSpec("qwen3-moe-tiny", quant="Q8_0", seed=3, layers=1, vocab=600)
    content = out.read_bytes()
    assert content == make_model(spec, tmp_path / "cache").read_bytes()
    shown = capsys.readouterr()
    digest = hashlib.sha256(content).hexdigest()
    assert shown.out == f"{out}\nsize {len(content)}\nsha256 {digest}\n"
    assert "llmperf: qwen3-moe-tiny in Q8_0: 5 million weights, 5 MB\n" in shown.err
    assert "MB/s\n" in shown.err
    assert list(out.parent.iterdir()) == [out]


def test_a_projector_is_written_for_a_width(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The width is that of the text model it is for."""
    out = tmp_path / "eyes.gguf"
    assert main(["synth", "vision-tiny", "--embedding=512", str(out)]) == 0
    spec = PresetSpec("vision-tiny", embedding=512)
    assert out.read_bytes() == make_model(spec, tmp_path / "cache").read_bytes()
    assert "llmperf: vision-tiny in F16: 1 million weights, 2 MB\n" in capsys.readouterr().err


def test_presets_are_listed_with_their_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    """One line each, without naming a file."""
    with pytest.raises(SystemExit) as ended:
        main(["synth", "--list"])
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(PRESETS)
    shown = {line.split()[0]: " ".join(line.split()[1:]) for line in lines}
    assert shown["llama-8b"] == "8,030.3 M weights 4,523.1 MB in Q4_K"
    assert shown["vision-tiny"] == "0.6 M weights 1.2 MB in F16"


def test_a_large_file_is_not_hashed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would take longer than the writing."""
    monkeypatch.setattr(synth, "_HASHED", 1000)
    assert main([*SMALL, str(tmp_path / "tiny.gguf")]) == 0
    assert "sha256" not in capsys.readouterr().out


def test_a_file_is_replaced_only_when_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is there may be somebody's."""
    out = tmp_path / "tiny.gguf"
    out.write_bytes(b"mine")
    assert main([*SMALL, str(out)]) == 4
    assert "is there already: replace it with --force" in capsys.readouterr().err
    assert out.read_bytes() == b"mine"
    assert main([*SMALL, "--force", str(out)]) == 0
    assert out.read_bytes()[:4] == b"GGUF"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["llama-2b", "x.gguf"], "no preset `llama-2b` (nearest: llama-"),
        (["llama-1b", "--quant=IQ2_M", "x.gguf"], "`quant` of llama-1b must be one of F16"),
        (["llama-1b", "--embedding=512", "x.gguf"], "it can be set for a projector alone"),
        (["llama-1b", "--layers=0", "x.gguf"], "`layers` must be a whole number of at least 1"),
        (["llama-1b", "."], "is a folder: name the file in it"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Exit code 4, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    assert main(["synth", *arguments]) == 4
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said_with_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is written."""
    monkeypatch.setattr("shutil.disk_usage", lambda _path: SimpleNamespace(free=10**9))
    assert main(["synth", "llama-8b", str(tmp_path / "big.gguf")]) == 4
    assert "takes 4.52 GB and" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_the_file_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A disk that fills up is a mistake in one line, and costs nothing."""
    out = tmp_path / "tiny.gguf"
    out.write_bytes(b"mine")

    def full(self: synth._Progress, size: int) -> None:
        raise OSError(28, "No space left on device", self, size)

    monkeypatch.setattr(synth._Progress, "__call__", full)
    assert main([*SMALL, "--force", str(out)]) == 4
    assert "cannot write" in capsys.readouterr().err
    assert out.read_bytes() == b"mine"
    assert list(tmp_path.iterdir()) == [out]
