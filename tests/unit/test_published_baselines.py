"""The published figures in ``baselines/`` are what the reports say, and the suite can run them.

What the reports claim is recomputed in ``published/test_claims.py``. See ``docs/seed-reports.md``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pytest

from pytest_llmperf.judge.store import Baseline, Recorded, dump, find, load
from pytest_llmperf.metrics import METRICS
from pytest_llmperf.plan.config import LAUNCH
from pytest_llmperf.plan.suite import Suite, load_suite

ROOT = Path(__file__).resolve().parents[2]
SUITE_FILE = ROOT / "suites" / "llmperf.toml"
B8149 = "b8149/rtx-5080-16gb"
LATEST = "latest-2026-02-27/rtx-5080-16gb"
UNSTATED = "unstated-2026-02-25/rtx-5080-16gb"
FORK = "turboquant-fork/m5-max-128gb"
FILES = (B8149, LATEST, UNSTATED, FORK)


@cache
def published(file: str) -> Baseline:
    """Return a published file, read and checked by the store."""
    return load(ROOT / "baselines" / f"{file}.json")


def results(file: str) -> Mapping[str, Mapping[str, Recorded]]:
    """Return what a published file holds, by case and metric."""
    return published(file).results


def value(file: str, key: str, metric: str) -> float:
    """Return one published figure."""
    return results(file)[key][metric].value


@pytest.fixture(scope="module")
def suite() -> Suite:
    """The suite file of the repository."""
    return load_suite(SUITE_FILE)


# --- the files ------------------------------------------------------------------------------


@pytest.mark.parametrize("file", FILES)
def test_published_file_loads(file: str) -> None:
    """The store reads every published file, finds it by name, and would write it the same."""
    path = ROOT / "baselines" / f"{file}.json"
    label, machine = file.split("/")
    baseline = published(file)

    assert (baseline.label, baseline.machine_key) == (label, machine)
    assert baseline.recorded["source"]
    assert find(ROOT / "baselines", label, machine) == path
    assert dump(baseline) == path.read_text("utf-8")


def test_every_published_file_is_tested() -> None:
    """No file recorded as published escapes the checks of this module."""
    folder = ROOT / "baselines"
    found = {
        path.relative_to(folder).with_suffix("").as_posix()
        for path in folder.glob("*/*.json")
        if load(path).published
    }

    assert found == set(FILES)


@pytest.mark.parametrize("file", FILES)
def test_every_config_is_in_the_suite(file: str, suite: Suite) -> None:
    """Every case key names a config that can be run."""
    configs = {key.rpartition("/")[0] for key in results(file)}

    assert configs - set(suite.configs) == set()


def test_speed_cases_are_the_suite_s_workloads(suite: Suite) -> None:
    """Every decode speed on the RTX 5080 stands under a workload of the suite file."""
    for file in (B8149, LATEST, UNSTATED):
        for key, case in results(file).items():
            if "decode_tps" in case:
                assert key.rpartition("/")[2] in suite.workloads


@pytest.mark.parametrize("file", [LATEST, UNSTATED, FORK])
def test_unknown_build_number_is_zero(file: str) -> None:
    """A build whose number no report gives is recorded as 0, not guessed."""
    assert published(file).number == 0


# --- the suite file ---------------------------------------------------------------------------


def test_documented_tolerances_are_the_defaults() -> None:
    """The list in the suite file's comment is the registry's, metric by metric."""
    lines = re.findall(
        r"^#   ([a-z0-9_]+) = ([0-9.]+)$", SUITE_FILE.read_text("utf-8"), re.MULTILINE
    )

    expected = {m.name: m.tolerance for m in METRICS.values() if m.kind != "exact"}
    assert {name: float(shown) for name, shown in lines} == expected


def test_published_command_line(suite: Suite) -> None:
    """fit-nobatch is the command line that the report prints in full, option by option."""
    assert dict(suite.configs["fit-nobatch"].options) == {
        "ctx-size": 65536,
        "fit": "on",
        "flash-attn": "on",
        "threads": 20,
        "load-mode": "none",
        "jinja": True,
        "cache-type-k": "q8_0",
        "cache-type-v": "q8_0",
    }


@pytest.mark.parametrize(
    ("config", "model", "stated"),
    [
        ("c1", "q8_0", {"override-tensor": "exps=CPU", "cache-type-k": "q8_0"}),
        ("c2", "q8_0", {"n-cpu-moe": 16}),
        ("c2a", "q8_0", {"n-cpu-moe": 32}),
        ("c2b", "q8_0", {"n-cpu-moe": 36}),
        ("c3", "q8_0", {"override-tensor": "exps=CPU", "cache-type-k": "f16"}),
        ("c4", "q8_0", {"fit": "on"}),
        ("c4r", "q8_0", {"fit": "on"}),
        ("c5", "q4_k_m", {"override-tensor": "exps=CPU"}),
        ("c6", "q4_k_m", {"n-cpu-moe": 16}),
        ("c7", "q4_k_m", {"n-cpu-moe": 24}),
        ("c8", "q4_k_m", {"fit": "on"}),
        ("fit-default", "q4_k_m", {"fit": "on"}),
        ("fit-256", "q4_k_m", {"fit": "on", "fit-target": 256}),
    ],
)
def test_named_configs(suite: Suite, config: str, model: str, stated: dict[str, str | int]) -> None:
    """C1 to C8 have the model and offload the reports state, and batches of 4096."""
    found = suite.configs[config]

    assert found.model == f"qwen35-a3b-{model}"
    assert found.gpu
    stated = stated | {"batch-size": 4096, "ubatch-size": 4096, "threads": 20}
    assert {name: found.options.get(name) for name in stated} == stated


def test_hand_placed_configs_are_not_fitted(suite: Suite) -> None:
    """No config both places tensors by hand and asks for a fit, which would give up."""
    placed = {"n-cpu-moe", "override-tensor", "gpu-layers"}
    both = [
        config.name
        for config in suite.configs.values()
        if placed & set(config.options) and config.options.get("fit") == "on"
    ]

    assert both == []


def test_contexts_hold_the_workloads(suite: Suite) -> None:
    """Every config with a fixed context has room for every workload but sweeps and documents."""
    most = max(
        workload.tokens
        for workload in suite.workloads.values()
        if not any(turn.depth for turn in workload.turns) and workload.name != "document"
    )
    sizes = [c.options["ctx-size"] for c in suite.configs.values() if "ctx-size" in c.options]

    assert all(isinstance(size, int) and size >= most for size in sizes)


# --- runs without figures ---------------------------------------------------------------------


def test_failed_speculative_runs_have_no_figure() -> None:
    """ngram-mod crashed after its first request, ngram-simple-short failed in multi_turn."""
    found = {key for key in results(LATEST) if not key.startswith("ngram-simple/")}

    short = {f"ngram-simple-short/{workload}" for workload in ("short", "medium", "long")}
    assert found == {"ngram-mod/short"} | short


def test_outcomes_without_figures_are_not_recorded() -> None:
    """Runs that ran out of memory, failed or were not published are in no file."""
    keys = {key.rpartition("/")[0] for file in FILES for key in results(file)}

    assert keys & {"c2", "c2a", "c2b", "c3", "c4", "c6", "c7-q4kl", "c8"} == set()


def test_runs_out_of_memory_are_recorded_as_failures(suite: Suite) -> None:
    """Each workload of a config that could not be loaded, and one of one that could."""
    workloads = ("short", "medium", "long", "multi_turn", LAUNCH)
    out = {
        B8149: {f"{config}/{one}" for config in ("c6", "c7-q4kl") for one in workloads},
        UNSTATED: {f"c2/{one}" for one in workloads},
        FORK: {"m5-q8/depth_512k"},
        LATEST: set(),
    }
    for file, keys in out.items():
        failures = published(file).failures
        assert set(failures) == keys
        assert {one.kind for one in failures.values()} <= {"oom"}
        assert {key.rpartition("/")[0] for key in keys} <= set(suite.configs)
        assert {key.rpartition("/")[2] for key in keys} <= {*suite.workloads, LAUNCH}
    assert published(B8149).failures["c7-q4kl/short"].what == "CUDA0 model buffer of 8984 MiB"


# --- every figure -----------------------------------------------------------------------------

# The reports' tables, typed off them: a config, then its figures; "-" where a report has none.
SPEEDS = {
    B8149: """
        config             short medium long multi_turn launch
        c4r                40.5  40.3   39.6 40.3       14660
        c5                 51.0  49.8   49.4 50.5       7217
        c7                 69.6  67.0   65.7 69.2       14874
        fit-default        64.3  62.8   57.4 54.2       14595
        fit-256            66.0  64.7   63.7 66.0       15321
        fit-nobatch        74.7  72.9   73.7 76.1       14559
        mxfp4-fit-nobatch  49.5  47.8   46.9 43.0       14531
        q4kl-fit-nobatch   41.4  41.4   40.8 41.8       14489
        dense27b-fit       7.4   7.4    7.2  7.1        14075
    """,
    UNSTATED: """
        config             short medium long multi_turn launch
        c1                 35.7  32.8   33.2 35.2       8064
    """,
    LATEST: """
        config             short medium long multi_turn
        ngram-simple       44.9  43.4   42.9 49.1
        ngram-mod          44.6  -      -    -
        ngram-simple-short 45.0  43.1   43.1 -
    """,
    FORK: """
        config        depth_0 depth_8k depth_32k depth_64k depth_128k depth_256k depth_512k
        m5-f16        -       -        -         59.8      -          -          -
        m5-q8         -       -        -         57.9      -          -          -
        m5-turbo3     -       -        -         49.9      -          -          -
        m5-turbo4     -       -        -         55.2      -          -          -
        m5-q8-turbo4  82.9    75.4     66.0      55.9      41.0       27.1       16.5
        m5-q8-turbo3  81.8    75.6     63.2      52.6      38.2       25.0       14.8
        m5-f16-turbo4 72.8    16.9     8.6       4.9       2.8        -          -
    """,
}
PREFILL = """
    config        depth_64k depth_128k depth_256k
    m5-f16        602.0     -          -
    m5-q8         479.2     -          -
    m5-turbo3     469.8     -          -
    m5-turbo4     418.0     -          -
    m5-q8-turbo4  468.2     -          128
    m5-q8-turbo3  465.6     -          -
    m5-f16-turbo4 8.3       4.1        -
"""
PART_ONE = """
    config    depth_128k_part1 depth_256k_part1
    m5-q8     245              124
    m5-turbo3 253              -
"""
QUALITY = {
    B8149: {
        "wikitext2": """
            config          ppl
            quality-q8      6.5342
            quality-q4km    6.6688
            quality-udq4kxl 7.1702
            quality-q4kl    6.6125
            quality-27b     6.8573
        """,
        "wikitext2_kv_matrix": """
            config      ppl
            q8-kv-f16   5.8831
            q8-kv-q8    5.8822
            q8-kv-q4    5.8694
            q4km-kv-f16 6.0184
            q4km-kv-q8  5.9997
            q4km-kv-q4  6.0422
        """,
        "wikitext2_80x512": """
            config          kld_mean kld_max same_top
            quality-q4km    0.0282   -       92.4
            quality-udq4kxl 0.1087   7.7947  86.2
            quality-q4kl    0.0181   2.2596  94.2
        """,
        "wikitext2_80x512_experiment2": """
            config       kld_max
            quality-q4km 4.2146
        """,
        "wikitext2_80x512_experiment3": """
            config       kld_max
            quality-q4km 0.1912
        """,
        "wikitext2_40x512": """
            config        ppl
            quality-q4km  6.00
            quality-mxfp4 5.96
        """,
        "wikitext2_31x512": """
            config        same_top
            quality-mxfp4 91.0
        """,
        "wikitext2_31x512_table": """
            config        kld_mean
            quality-mxfp4 0.050
        """,
        "wikitext2_31x512_checklist": """
            config        kld_mean
            quality-mxfp4 0.037
        """,
    },
    FORK: {
        "wikitext2_c4096": """
            config    ppl    kld_mean same_top
            m5-f16    5.7438 -        -
            m5-q8     5.7433 0.0016   98.64
            m5-turbo3 5.8092 0.0199   93.93
            m5-turbo4 5.7810 0.0131   95.28
        """,
    },
}
Figures = dict[tuple[str, str], float]
"""Case key and metric to figure."""


def rows(table: str) -> list[tuple[str, str, float]]:
    """Return (config, head of the column, figure) of a table's cells that are filled."""
    head, *lines = [line.split() for line in table.strip().splitlines()]
    return [
        (line[0], column, float(cell))
        for line in lines
        for column, cell in zip(head[1:], line[1:], strict=True)
        if cell != "-"
    ]


def typed(file: str) -> Figures:
    """Return all figures of a report's tables that belong into a file."""
    found: Figures = {}
    for config, where, figure in rows(SPEEDS[file]):
        metric = "vram_mib" if where == LAUNCH else "decode_tps"
        found[f"{config}/{where}", metric] = figure
    if file == FORK:
        # Quoted from the report's first part, so another run: under keys that say so.
        found["m5-q8/depth_256k_part1", "decode_tps"] = 26.6
        for config, where, figure in rows(PREFILL) + rows(PART_ONE):
            found[f"{config}/{where}", "prefill_tps"] = figure
    if file == B8149:
        # "54/65 layers on GPU" (experiment 6): the only count of layers as a server's log has it.
        found["dense27b-fit/launch", "offloaded_layers"] = 54
    for name, table in QUALITY.get(file, {}).items():
        for config, metric, figure in rows(table):
            found[f"{config}/{name}", metric] = figure
    return found


@pytest.mark.parametrize("file", FILES)
def test_every_figure_is_that_of_the_reports(file: str) -> None:
    """All that the tables give is recorded, and nothing else; what they call MB is taken as MiB."""
    recorded = {
        (key, metric): entry.value
        for key, case in results(file).items()
        for metric, entry in case.items()
    }

    assert recorded == typed(file)


# --- figures that contradict each other -------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "corpus", "metric", "suffixes", "figures"),
    [
        (
            "quality-mxfp4",
            "wikitext2_31x512",
            "kld_mean",
            ("table", "checklist"),
            (0.050, 0.037),
        ),
        (
            "quality-q4km",
            "wikitext2_80x512",
            "kld_max",
            ("experiment2", "experiment3"),
            (4.2146, 0.1912),
        ),
    ],
)
def test_contradictions_are_kept_apart(
    config: str,
    corpus: str,
    metric: str,
    suffixes: tuple[str, str],
    figures: tuple[float, float],
) -> None:
    """Of two figures for one thing neither is chosen: both stand under keys of their own."""
    found = tuple(value(B8149, f"{config}/{corpus}_{suffix}", metric) for suffix in suffixes)

    assert found == figures
    assert metric not in results(B8149)[f"{config}/{corpus}"]


def test_part_one_figures_are_kept_apart() -> None:
    """Figures quoted from the report's first part carry its name: another run."""
    assert value(FORK, "m5-q8/depth_256k_part1", "decode_tps") == 26.6
    assert "m5-q8/depth_256k" not in results(FORK)
