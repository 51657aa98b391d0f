"""On a real GPU: run by hand or on a GPU runner, with ``LLMPERF_TEST_GPU_BUILD=…/llama-server``."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from support.project import Project

from pytest_llmperf.gpu.cards import gpus
from pytest_llmperf.gpu.memory import read_used
from pytest_llmperf.gpu.nvml import handle

BUILD = os.environ.get("LLMPERF_TEST_GPU_BUILD", "")
pytestmark = [
    pytest.mark.alone,
    pytest.mark.skipif(
        not BUILD or not gpus(),
        reason="set LLMPERF_TEST_GPU_BUILD to a llama-server on a machine with an NVIDIA GPU",
    ),
]

SUITE = """
[models.small]
synth = { preset = "llama-1b", quant = "Q8_0" }

[configs.card]
model = "small"
gpu = true
options = { ctx-size = 4096, fit = "off", gpu-layers = 99, flash-attn = "on" }

[configs.other]
extends = "card"
options = { cache-type-k = "q8_0", cache-type-v = "q8_0" }

[configs.pair]
extends = "card"
gpus = 2

[workloads.w]
turns = [{ prompt = 128, generate = 256 }]
"""

MODULE = """
import pytest

@pytest.mark.llmperf(configs=["card", "other"], workloads=["w"])
def test_decode(speed):
    speed.gate("decode_tps", "tokens_per_joule")

@pytest.mark.llmperf(configs=["card"])
def test_memory(memory):
    memory.gate("vram_mib", "vram_peak_mib", "offloaded_layers")

@pytest.mark.llmperf(configs=["pair"])
def test_pair(memory):
    memory.gate("vram_mib")
"""


@pytest.fixture
def gpu_project(project: Project) -> Project:
    """A project whose configs run on GPUs."""
    project.write("suites/llmperf.toml", SUITE)
    project.write("test_suite.py", MODULE)
    ini = project.path / "tox.ini"
    # Three launches, or a baseline is too thin for a verdict; and others do count.
    text = ini.read_text("utf-8").replace("llmperf_foreign_load = off", "llmperf_foreign_load = 8")
    ini.write_text(text.replace("llmperf_launches = 2", "llmperf_launches = 3"), "utf-8")
    return project


def wrapper(project: Project, name: str, body: str) -> str:
    """Write a build that is the real one but for what the shell lines do to its arguments."""
    folder = project.path / name
    path = project.write(f"{name}/llama-server", f'#!/bin/bash\n{body}\nexec {BUILD} "$@"\n')
    path.chmod(0o755)
    # What tells builds apart lies beside the program.
    assert folder.is_dir()
    return str(path)


def entry(project: Project, key: str) -> dict[str, float]:
    """Return the values of an entry of the one recorded baseline, by metric."""
    [path] = project.baseline_files()
    found = json.loads(path.read_text("utf-8"))["results"][key]
    return {name: one["value"] for name, one in found.items()}


def used() -> list[float]:
    """Return MiB in use on each GPU by anybody."""
    return [read_used(handle(card.uuid)) or 0.0 for card in gpus()]


def test_what_a_gpu_does_is_recorded(gpu_project: Project) -> None:
    """Memory now and at its most, energy, layers; clocks, power and limits beside the result."""
    done = gpu_project.run("-k", "card", f"--llmperf-build={BUILD}", "--update-baselines")
    assert done.code == 0, done.text
    memory = entry(gpu_project, "card/launch")
    assert 1300 < memory["vram_mib"] <= memory["vram_peak_mib"] < 6000
    assert memory["offloaded_layers"] == 17
    assert entry(gpu_project, "card/w")["tokens_per_joule"] > 0.01
    assert entry(gpu_project, "card/w")["offloaded_layers"] == 17, "for speed as well"
    [facts] = [one["new"]["gpu"] for one in done.results if one["case"] == "card/w"]
    [card] = facts["cards"]
    assert facts["rate_hz"] > 1
    assert card["name"] == gpus()[0].name
    assert card["busy"] > 0
    assert card["power_w"] > 0
    assert card["sm_clock_mhz"][2] > 0
    assert card["driver"]
    assert card["foreign"] == []


def test_memory_is_free_once_a_run_has_ended(gpu_project: Project) -> None:
    """Each server waits for the one before it to let go, and the last one leaves nothing."""
    before = used()
    done = gpu_project.run("-k", "card", f"--llmperf-build={BUILD}", "--update-baselines")
    assert done.code == 0, done.text
    assert all(now - mib < 64 for now, mib in zip(used(), before, strict=True))


def test_fewer_layers_fail_by_name(gpu_project: Project) -> None:
    """A build that puts fewer layers on the GPU is not called slower, but what it is."""
    done = gpu_project.run(
        "-k", "decode and card", f"--llmperf-build={BUILD}", "--update-baselines"
    )
    assert done.code == 0, done.text
    [path] = gpu_project.baseline_files()
    fewer = wrapper(
        gpu_project, "fewer", 'for a; do [ "$a" = 99 ] && a=16; b+=("$a"); done; set -- "${b[@]}"'
    )
    done = gpu_project.run(
        "-k", "decode and card", f"--llmperf-build={fewer}", f"--baseline={path.parent.name}"
    )
    assert done.code == 1
    assert done.verdicts()["card/w offloaded_layers"] == "REGRESSION"
    assert "offloaded_layers is 16 layers, 17 in the baseline" in done.text


def test_falling_back_to_the_cpu_fails_by_name(gpu_project: Project) -> None:
    """A server that could have used the GPU, and does not, is not measured."""
    host = wrapper(gpu_project, "host", 'case "$*" in *--model*) set -- "$@" --device none;; esac')
    done = gpu_project.run("-k", "card", f"--llmperf-build={host}", "--update-baselines")
    assert done.code == 1
    assert set(done.verdicts().values()) == {"ERROR"}
    assert "fell back to the CPU" in done.text
    assert gpu_project.baseline_files() == []


def test_a_shared_gpu_makes_no_verdict(gpu_project: Project) -> None:
    """Another program that computes is named; what it disturbs is INCOMPARABLE."""
    done = gpu_project.run(
        "-k", "decode and card", f"--llmperf-build={BUILD}", "--update-baselines"
    )
    assert done.code == 0, done.text
    # It will not get quiet, so there is no need to wait half a minute for it each time.
    gpu_project.write(
        "conftest.py", "import pytest_llmperf.campaign.base as base\n\nbase._QUIET_WAIT_S = 1.0\n"
    )
    model = next(Path(os.environ["LLMPERF_CACHE"]).glob("models/llama-1b-Q8_0-*.gguf"))
    command = [BUILD.replace("llama-server", "llama-bench"), "-m", str(model), "-ngl", "99"]
    with subprocess.Popen(
        [*command, "-p", "0", "-n", "1000000"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as other:
        time.sleep(3)
        try:
            done = gpu_project.run(
                *("-k", "decode and card", f"--llmperf-build={BUILD}", "--llmperf-budget=5")
            )
        finally:
            other.kill()
    assert done.code == 1
    assert done.verdicts()["card/w decode_tps"] == "INCOMPARABLE"
    assert f"llama-bench (pid {other.pid})" in done.text


def test_a_killed_run_leaves_its_gpu(gpu_project: Project) -> None:
    """By SIGKILL: its server ends, its memory is free, and its lease is to be had."""
    before = used()
    command = [sys.executable, "-m", "pytest", "-k", "decode", f"--llmperf-build={BUILD}"]
    with subprocess.Popen(
        [*command, "--update-baselines"],
        cwd=gpu_project.path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as run:
        while run.poll() is None and not _servers(run.pid):
            time.sleep(0.1)
        time.sleep(1)
        run.send_signal(signal.SIGKILL)
    done = gpu_project.run("-k", "card", f"--llmperf-build={BUILD}", "--update-baselines")
    assert done.code == 0, done.text
    assert all(now - mib < 64 for now, mib in zip(used(), before, strict=True))


def _servers(pid: int) -> list[psutil.Process]:
    try:
        tree = psutil.Process(pid).children(recursive=True)
        return [one for one in tree if one.name() == "llama-server"]
    except psutil.Error:
        return []


@pytest.mark.skipif(len(gpus()) < 2, reason="needs two GPUs")
def test_a_config_takes_as_many_gpus_as_it_says(gpu_project: Project) -> None:
    """One config's server sees one of them, the other's both, and holds memory on both."""
    done = gpu_project.run("-k", "memory or pair", f"--llmperf-build={BUILD}", "--update-baselines")
    assert done.code == 0, done.text
    cards = {
        one["case"]: [card["used_peak_mib"] for card in one["new"]["gpu"]["cards"]]
        for one in done.results
    }
    assert len(cards["card/launch"]) == 1
    assert len(cards["pair/launch"]) == 2
    assert min(cards["pair/launch"]) > 500


def test_a_config_that_needs_more_gpus_than_there_are_fails(
    gpu_project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one line, with the number."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus()[0].uuid)
    done = gpu_project.run("-k", "pair", f"--llmperf-build={BUILD}", "--update-baselines")
    assert done.code == 1
    assert "needs 2 GPUs" in done.text


@pytest.mark.skipif(len(gpus()) < 2, reason="needs two GPUs")
def test_workers_take_a_gpu_each(gpu_project: Project) -> None:
    """Configs are spread over workers, each starts its servers once, on a GPU of its own."""
    # pytest-benchmark warns that it does nothing under xdist, and warnings are errors here.
    done = gpu_project.run(
        *("-n", "2", "-pno:benchmark", "-k", "decode"),
        *(f"--llmperf-build={BUILD}", "--update-baselines"),
    )
    assert done.code == 0, done.text
    used = {
        one["case"]: [card["index"] for card in one["new"]["gpu"]["cards"]] for one in done.results
    }
    assert sorted(index for cards in used.values() for index in cards) == [0, 1]
    logs = list((gpu_project.path / ".llmperf").rglob("*-card.log"))
    assert len(logs) == 3, "three launches of one config"
