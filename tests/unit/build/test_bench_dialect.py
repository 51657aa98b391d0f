"""What a config's options become on the command line of llama-bench."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from support.fakes import write_program

from pytest_llmperf.build.bench_dialect import (
    BenchDialect,
    bench_dialect_of,
    computing,
    parse_bench_help,
)
from pytest_llmperf.build.build import Build
from pytest_llmperf.errors import BuildError
from pytest_llmperf.plan.options import OptionValue, known_options

DATA = Path(__file__).parents[2] / "data"
OLD, NEW = "49bfdde", "b11434"


def dialect(build: str) -> BenchDialect:
    """The dialect of a recorded help text."""
    text = (DATA / f"bench-help-{build}.txt").read_text("utf-8")
    return BenchDialect(build, parse_bench_help(text))


def spelled(build: str, options: Mapping[str, OptionValue]) -> str:
    """The options as one would type them."""
    return " ".join(dialect(build).arguments(options))


def test_help_of_both_generations() -> None:
    """All names of an option and what stands for its value, with a comma between names or none."""
    old, new = ({o.names[-1]: o for o in dialect(b).options} for b in (OLD, NEW))
    assert old["--flash-attn"].about == "0|1"
    assert new["--flash-attn"].about == "on|off|auto"
    assert new["--load-mode"].about == "auto|none|mmap|mlock|mmap+mlock|dio"
    assert old["--mmap"].names == ("-mmp", "--mmap")
    assert new["--override-tensor"].names == ("-ot", "--override-tensor")
    assert old["--hf-repo"].names == ("-hf", "-hfr", "--hf-repo")
    assert not new["--progress"].takes_value
    assert (len(old), len(new)) == (41, 46)


@pytest.mark.parametrize(
    ("options", "old", "new"),
    [
        ({"flash-attn": "on"}, "--flash-attn 1", "--flash-attn on"),
        ({"flash-attn": False}, "--flash-attn 0", "--flash-attn off"),
        ({"load-mode": "none"}, "--mmap 0", "--load-mode none"),
        ({"mmap": False}, "--mmap 0", "--load-mode none"),
        ({"load-mode": "mmap+mlock"}, "--mmap 1", "--load-mode mmap"),
        ({"direct-io": True}, "--direct-io 1", "--load-mode dio"),
        ({"mlock": True}, "", ""),
        ({"gpu-layers": 99}, "--n-gpu-layers 99", "--n-gpu-layers 99"),
        ({"n-gpu-layers": "all"}, "", ""),
        ({"threads": 20, "threads-batch": 20}, "--threads 20", "--threads 20"),
        ({"kv-offload": False}, "--no-kv-offload 1", "--no-kv-offload 1"),
        ({"op-offload": True}, "--no-op-offload 0", "--no-op-offload 0"),
        ({"repack": True}, "", "--repack 1"),
        ({"tensor-split": "3,1"}, "--tensor-split 3/1", "--tensor-split 3/1"),
        ({"device": "CUDA0,CUDA1"}, "--device CUDA0/CUDA1", "--device CUDA0/CUDA1"),
        (
            {"override-tensor": ("a=CPU", "b=CPU")},
            "--override-tensor a=CPU;b=CPU",
            "--override-tensor a=CPU;b=CPU",
        ),
        ({"fit": "off", "fit-target": 256}, "", ""),
        ({"spec-type": "none", "spec-draft-n-max": 8}, "", ""),
        ({"parallel": 1, "ctx-size": 4096, "jinja": True, "cache-ram": 0, "offline": True}, "", ""),
        ({"chat-template-kwargs": "{}", "verbosity": 4, "temp": 0.5}, "", ""),
    ],
)
def test_each_build_gets_its_own_spelling(
    options: Mapping[str, OptionValue], old: str, new: str
) -> None:
    """What the server alone has is left out; the rest is spelled as the help says."""
    assert spelled(OLD, options) == old
    assert spelled(NEW, options) == new


def test_a_whole_config_of_the_reports() -> None:
    """C7, with its KV types and its experts on the CPU."""
    options: dict[str, OptionValue] = {
        "ctx-size": 65536,
        "fit": "off",
        "flash-attn": "on",
        "threads": 20,
        "jinja": True,
        "load-mode": "none",
        "cache-type-k": "q8_0",
        "cache-type-v": "q8_0",
        "gpu-layers": 99,
        "batch-size": 4096,
        "ubatch-size": 4096,
        "n-cpu-moe": 24,
    }
    assert spelled(OLD, options) == (
        "--flash-attn 1 --threads 20 --cache-type-k q8_0 --cache-type-v q8_0 --n-gpu-layers 99 "
        "--batch-size 4096 --ubatch-size 4096 --n-cpu-moe 24 --mmap 0"
    )


def test_all_experts_on_the_cpu() -> None:
    """llama-bench has no --cpu-moe: the tensors are named, beside those of the config."""
    flag, value = dialect(NEW).arguments({"cpu-moe": True, "override-tensor": "x=CPU"})
    assert flag == "--override-tensor"
    assert value.startswith("x=CPU;")
    assert value.endswith("exps=CPU")


def test_fitting_where_the_tool_can() -> None:
    """The server's own margin unless the config says another; the old tool cannot."""
    assert spelled(NEW, {"fit": "on"}) == "--fit-target 1024"
    assert spelled(NEW, {"fit": "on", "fit-target": 256}) == "--fit-target 256"
    with pytest.raises(BuildError, match="cannot take --fit on"):
        spelled(OLD, {"fit": "on"})


@pytest.mark.parametrize(
    ("build", "options", "named"),
    [
        (NEW, {"spec-type": "ngram-mod"}, "--spec-type ngram-mod"),
        (NEW, {"threads": 2, "threads-batch": 4}, "--threads-batch 4"),
        (NEW, {"rope-freq-base": 1e6}, "--rope-freq-base 1000000.0"),
        (NEW, {"lora": "a.gguf"}, "--lora a.gguf"),
        (NEW, {"threads": "1,2"}, r"--threads 1,2 \(a comma\)"),
        (OLD, {"flash-attn": "auto"}, r"--flash-attn auto \(it takes 0|1\)"),
        (OLD, {"repack": False}, "--repack 0"),
        (OLD, {"lazy-mode": "on"}, "--lazy-mode on"),
    ],
)
def test_what_shapes_the_computation_is_not_dropped(
    build: str, options: Mapping[str, OptionValue], named: str
) -> None:
    """Figures of another computation would be another config's: an error names the option."""
    with pytest.raises(BuildError, match=f"build {build}: llama-bench cannot take {named}"):
        dialect(build).arguments(options)


def test_a_model_that_drafts_is_beyond_it() -> None:
    """Though no option names it."""
    with pytest.raises(BuildError, match="a model that drafts"):
        dialect(NEW).arguments({}, drafts=True)


def test_every_known_option_has_a_meaning() -> None:
    """Each is passed on, left out as the server's own, or an error: none is without a decision."""
    shaping = set(computing({option.long: "x" for option in known_options()}))
    assert {"cache-type-k", "flash-attn", "rope-scaling", "lora", "override-kv"} <= shaping
    assert not shaping & {"ctx-size", "parallel", "chat-template", "seed", "cache-ram", "slots"}


def test_the_fingerprint_knows_an_option_by_one_name() -> None:
    """A synonym is the same option."""
    assert computing({"n-gpu-layers": 9}) == computing({"gpu-layers": 9}) == {"gpu-layers": 9}


def test_a_program_that_is_none_is_told(tmp_path: Path) -> None:
    """What it says instead of its options is in the error."""
    write_program(tmp_path / "llama-bench", ("sh", "-c", "echo cannot find libllama.so >&2"))
    build = Build("b1", 1, "unknown", "here", "", command=(str(tmp_path / "llama-server"),))
    with pytest.raises(BuildError, match=r"no --n-depth.*cannot find libllama\.so"):
        bench_dialect_of(build)
