"""What the published reports claim, recomputed from their own figures by the gate's own comparison.

Of every claim one side stands in a baseline that is recorded as published, and the other is what a
server is said to have measured: no server runs, all after it is what a gate does. Each claim says
what people concluded, what the verdict is, and whether the figures bear it out. Those that do not
follow are in ``docs/seed-reports.md``, which is held against this list.

Reports: *Handoff*, *Follow-up* (with the number of the experiment), *Replies* and *M5 Max*.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal, cast

import pytest

from pytest_llmperf.budget import Budget
from pytest_llmperf.campaign.base import Campaign
from pytest_llmperf.errors import BuildError
from pytest_llmperf.gate import Question, Stored
from pytest_llmperf.judge.decide import compare_published
from pytest_llmperf.judge.priors import Priors
from pytest_llmperf.judge.store import Baseline, Recorded, dump, load, parse
from pytest_llmperf.judge.verdict import Outcome, Verdict
from pytest_llmperf.measure.launch import Launch
from pytest_llmperf.metrics import METRICS, PUBLISHED_ONLY
from pytest_llmperf.passes import Passed, Passes
from pytest_llmperf.plan.config import LAUNCH, Case, Config, CorpusPass, Turn, Workload
from pytest_llmperf.plan.suite import Suite, load_suite
from pytest_llmperf.quality_gate import QualityQuestion, not_alone

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "docs" / "seed-reports.md"
FILES = {
    "b8149": "b8149/rtx-5080-16gb",
    "latest": "latest-2026-02-27/rtx-5080-16gb",
    "unstated": "unstated-2026-02-25/rtx-5080-16gb",
    "fork": "turboquant-fork/m5-max-128gb",
}
SPEED = ("short", "medium", "long", "multi_turn")
DEPTHS = tuple(f"depth_{depth}" for depth in ("0", "8k", "32k", "64k", "128k", "256k", "512k"))
CHUNKS = 8
LAUNCHES = 3

R, P, I = Outcome.REGRESSION, Outcome.PASS, Outcome.IMPROVED  # noqa: E741 - letters for a table

Side = str | tuple[float, ...]
"""``FILE CONFIG``, for the figures of a config in ``baselines/``; ``FILE CONFIG/CASE`` for one of
another name; or the figures themselves, where a report gives them of what is no config."""


@dataclass(frozen=True, slots=True)
class Claim:
    """One sentence of a report, and what becomes of it.

    Attributes:
        text: The claim in few words, figures as the report has them.
        report: Which report, and where in it.
        base: What it compares with.
        new: What it is about.
        claimed: The factors new / base that the claim allows, its rounding included; differences
            where ``of`` is ``points``.
        gives: The smallest and the largest that the report's own figures give.
        verdicts: Of the gate, one for each of ``cases``, or one for all.
        drawn: What people concluded, in the gate's words.
        cases: Workloads or passes.
        metric: Name of the metric.
        of: Whether the claim is about each case, their mean, or a difference in points.
        instead: Where the claim does not follow: what the figures say. Also in the docs.
        apart: Where the verdict is not what people concluded: why.
    """

    text: str
    report: str
    base: Side
    new: Side
    claimed: tuple[float, float]
    gives: tuple[float, float]
    verdicts: tuple[Outcome, ...]
    drawn: Outcome
    cases: tuple[str, ...] = SPEED
    metric: str = "decode_tps"
    of: Literal["each", "mean", "points"] = "each"
    instead: str = ""
    apart: str = ""

    def __str__(self) -> str:
        return f"{self.report}: {self.text}"


def percent(low: float, high: float | None = None, digits: int = 0) -> tuple[float, float]:
    """Return the factors of a change that was rounded to so many digits of a per cent."""
    half = 0.5 * 10**-digits
    return 1 + (low - half) / 100, 1 + ((low if high is None else high) + half) / 100


def times(factor: float, digits: int = 0) -> tuple[float, float]:
    """Return the factors of "so many times", rounded to so many digits."""
    half = 0.5 * 10**-digits
    return factor - half, factor + half


def slower(factor: float) -> tuple[float, float]:
    """Return the factors of "so many times slower"."""
    low, high = times(factor)
    return 1 / high, 1 / low


def about(new: float, base: float, digits: int = 0) -> tuple[float, float]:
    """Return the factors of "so much against so much", both rounded to so many digits."""
    half = 0.5 * 10**-digits
    return (new - half) / (base + half), (new + half) / (base - half)


MORE, LESS = (1.0, float("inf")), (0.0, 1.0)
WITHIN = "the change is within the default tolerance"

WIKI, KLD80, MATRIX, LONG = (
    ("wikitext2",),
    ("wikitext2_80x512",),
    ("wikitext2_kv_matrix",),
    ("wikitext2_c4096",),
)

CLAIMS = (
    # -- Handoff ---------------------------------------------------------------------------------
    Claim(
        "Q4_K_M has +2.1 % perplexity over Q8_0",
        "Handoff, quality; Replies 5",
        "b8149 quality-q8",
        "b8149 quality-q4km",
        percent(2.1, digits=1),
        (1.0206, 1.0206),
        (R,),
        P,
        WIKI,
        "ppl",
        apart="people took 2.1 % for the size saved; a gate of 1 % has to be told so",
    ),
    Claim(
        "UD-Q4_K_XL has +9.7 % perplexity over Q8_0",
        "Handoff, quality; Replies 5",
        "b8149 quality-q8",
        "b8149 quality-udq4kxl",
        percent(9.7, digits=1),
        (1.0973, 1.0973),
        (R,),
        R,
        WIKI,
        "ppl",
    ),
    Claim(
        "UD-Q4_K_XL is worse than Q4_K_M, 7.17 against 6.67",
        "Handoff, decision 4; Replies 1",
        "b8149 quality-q4km",
        "b8149 quality-udq4kxl",
        about(7.17, 6.67, 2),
        (1.0752, 1.0752),
        (R,),
        R,
        WIKI,
        "ppl",
    ),
    Claim(
        "C7 runs at ~70 tok/s",
        "Handoff, models and decisions",
        (70.0,) * 4,
        "b8149 c7",
        about(70, 70, -1),
        (0.9386, 0.9943),
        (P, P, R, P),
        P,
        apart="long is 65.7, 6 % below",
    ),
    Claim(
        "Q8_0 with fit runs at ~40 tok/s",
        "Handoff, models; Replies 6",
        (40.0,) * 4,
        "b8149 c4r",
        times(1.0, 1),
        (0.99, 1.0125),
        (P,),
        P,
    ),
    Claim(
        "Q4_K_M over Q8_0: 70 against 40 tok/s",
        "Handoff, decision 2",
        "b8149 c4r",
        "b8149 c7",
        about(70, 40, -1),
        (1.6591, 1.7185),
        (I,),
        I,
    ),
    Claim(
        "3.2x faster than Qwen3-Next-80B, ~22 against ~70 tok/s",
        "Handoff, against the model before and decision 1",
        (22.0,),
        (70.0,),
        times(3.2, 1),
        (3.1818, 3.1818),
        (I,),
        I,
        ("short",),
    ),
    Claim(
        "+8.6 GB of VRAM, 6247 to 14874 MB",
        "Handoff, against the model before",
        (6247.0,),
        "b8149 c7",
        (8550.0, 8649.0),
        (8627.0, 8627.0),
        (R,),
        I,
        (LAUNCH,),
        "vram_mib",
        "points",
        apart="more layers on the GPU were wanted; to a gate more memory is worse",
    ),
    Claim(
        "-76 % of RAM, 84.8 to ~20 GB",
        "Handoff, against the model before",
        (84800.0,),
        (20000.0,),
        percent(-76),
        (0.2358, 0.2358),
        (I,),
        I,
        (LAUNCH,),
        "rss_mib",
    ),
    Claim(
        "manual tuning yields ~7 % over fit, C7 ~70 against C8 ~64",
        "Handoff, decision 3",
        (64.0,),
        (70.0,),
        percent(7),
        (1.0937, 1.0938),
        (I,),
        I,
        ("short",),
        instead="70 over 64 is 9.4 %",
    ),
    Claim(
        "manual tuning wins by about 7 %, ~67-70 against ~62-67",
        "Replies 6",
        (62.0, 67.0),
        (67.0, 70.0),
        percent(7),
        (1.0447, 1.0807),
        (I, P),
        I,
        ("short", "long"),
        of="mean",
        instead="the ends of the ranges give 8.1 and 4.5 %",
        apart="the upper ends are within 5 % of each other",
    ),
    Claim(
        "manual tuning yields ~7 % over fit, C7 against fit-default",
        "Handoff, decision 3; Follow-up 4",
        "b8149 fit-default",
        "b8149 c7",
        percent(7),
        (1.0669, 1.2768),
        (I,),
        I,
        instead="6.7 to 27.7 %",
    ),
    # -- Replies ---------------------------------------------------------------------------------
    Claim(
        "fit gets you 90 % and more of the way",
        "Replies 6",
        "b8149 c7",
        "b8149 fit-default",
        (0.9, 1.0),
        (0.7832, 0.9373),
        (R,),
        R,
        instead="92, 94, 87 and 78 % of C7",
    ),
    Claim(
        "the 3x gap to Ollama, 21.6 against 70 tok/s",
        "Replies 2; Follow-up, R2",
        (21.6,),
        (70.0,),
        times(3),
        (3.2407, 3.2408),
        (I,),
        I,
        ("short",),
    ),
    Claim(
        "Q4_K_L has zero speed difference",
        "Replies 4, a prediction",
        "b8149 fit-nobatch",
        "b8149 q4kl-fit-nobatch",
        (0.95, 1.05),
        (0.5492, 0.5679),
        (R,),
        P,
        instead="43.2 to 45.1 % slower",
        apart="the prediction was wrong",
    ),
    Claim(
        "~50 tok/s with all experts on the CPU",
        "Replies 8",
        (50.0,) * 4,
        "b8149 c5",
        about(50, 50),
        (0.988, 1.02),
        (P,),
        P,
    ),
    Claim(
        "about 7.2 GB of VRAM with all experts on the CPU",
        "Replies 8",
        (7200.0,),
        "b8149 c5",
        about(7.2, 7.2, 1),
        (1.0023, 1.0024),
        (P,),
        P,
        (LAUNCH,),
        "vram_mib",
    ),
    # -- Follow-up 1: KV types -------------------------------------------------------------------
    *(
        Claim(
            f"KV {kv}_0 changes the perplexity of {weights} by {change:+.2f} %",
            "Follow-up 1",
            f"b8149 {config}-kv-f16",
            f"b8149 {config}-kv-{kv}",
            percent(change, digits=2),
            gives,
            (P,),
            P,
            MATRIX,
            "ppl",
        )
        for weights, config, kv, change, gives in (
            ("Q8_0", "q8", "q8", -0.02, (0.9998, 0.9999)),
            ("Q8_0", "q8", "q4", -0.23, (0.9976, 0.9977)),
            ("Q4_K_M", "q4km", "q8", -0.31, (0.9968, 0.9969)),
            ("Q4_K_M", "q4km", "q4", 0.40, (1.0039, 1.0040)),
        )
    ),
    # -- Follow-up 2: divergence -----------------------------------------------------------------
    Claim(
        "UD-Q4_K_XL has 3.9x the mean KLD of Q4_K_M",
        "Follow-up 2",
        "b8149 quality-q4km",
        "b8149 quality-udq4kxl",
        times(3.9, 1),
        (3.8546, 3.8547),
        (R,),
        R,
        KLD80,
        "kld_mean",
    ),
    Claim(
        "UD-Q4_K_XL keeps the top token of 86.2 %, Q4_K_M of 92.4 %",
        "Follow-up 2",
        "b8149 quality-q4km",
        "b8149 quality-udq4kxl",
        (-6.25, -6.15),
        (-6.2, -6.2),
        (R,),
        R,
        KLD80,
        "same_top",
        "points",
    ),
    Claim(
        "UD-Q4_K_XL has the larger max KLD, 7.7947 against 4.2146",
        "Follow-up 2",
        "b8149 quality-q4km/wikitext2_80x512_experiment2",
        "b8149 quality-udq4kxl",
        MORE,
        (1.8494, 1.8495),
        (R,),
        R,
        KLD80,
        "kld_max",
    ),
    # -- Follow-up 3: Q4_K_L ---------------------------------------------------------------------
    Claim(
        "Q4_K_L has -0.8 % perplexity",
        "Follow-up 3",
        "b8149 quality-q4km",
        "b8149 quality-q4kl",
        percent(-0.8, digits=1),
        (0.9915, 0.9916),
        (P,),
        I,
        WIKI,
        "ppl",
        apart=WITHIN,
    ),
    Claim(
        "Q4_K_L has -36 % mean KLD",
        "Follow-up 3",
        "b8149 quality-q4km",
        "b8149 quality-q4kl",
        percent(-36),
        (0.6418, 0.6419),
        (I,),
        I,
        KLD80,
        "kld_mean",
    ),
    Claim(
        "Q4_K_L keeps the top token 1.8 points more often",
        "Follow-up 3",
        "b8149 quality-q4km",
        "b8149 quality-q4kl",
        (1.75, 1.85),
        (1.8, 1.8),
        (P,),
        I,
        KLD80,
        "same_top",
        "points",
        apart="two unrelated builds of one model differ by more, so 4 points never count",
    ),
    Claim(
        "Q4_K_L has a max KLD of 2.2596, Q4_K_M of 0.1912",
        "Follow-up 3",
        "b8149 quality-q4km/wikitext2_80x512_experiment3",
        "b8149 quality-q4kl",
        LESS,
        (11.8179, 11.8180),
        (R,),
        I,
        KLD80,
        "kld_max",
        instead="the better quant has 11.8 times the maximum: 0.1912 can hardly be one",
        apart="the table contradicts that of experiment 2",
    ),
    Claim(
        "Q4_K_L has a max KLD of 2.2596, Q4_K_M of 4.2146",
        "Follow-up 3 against 2",
        "b8149 quality-q4km/wikitext2_80x512_experiment2",
        "b8149 quality-q4kl",
        LESS,
        (0.5361, 0.5362),
        (I,),
        I,
        KLD80,
        "kld_max",
    ),
    Claim(
        "Q4_K_L is 44 % slower",
        "Follow-up 3",
        "b8149 fit-nobatch",
        "b8149 q4kl-fit-nobatch",
        percent(-44),
        (0.5492, 0.5679),
        (R,),
        R,
        of="mean",
    ),
    Claim(
        "Q4_K_L halves the throughput",
        "Follow-up 3",
        "b8149 fit-nobatch",
        "b8149 q4kl-fit-nobatch",
        percent(-50),
        (0.5492, 0.5679),
        (R,),
        R,
        of="mean",
        instead="44.4 % less on the mean",
    ),
    Claim(
        "Q4_K_L runs at ~41 tok/s",
        "Follow-up 3",
        (41.0,) * 4,
        "b8149 q4kl-fit-nobatch",
        about(41, 41),
        (0.9951, 1.0196),
        (P,),
        P,
    ),
    Claim(
        "the model buffer of Q4_K_L is 8984 MiB, that of Q4_K_M 8556 MiB",
        "Follow-up 3",
        (8556.0,),
        (8984.0,),
        MORE,
        (1.05, 1.0501),
        (R,),
        R,
        (LAUNCH,),
        "model_mib",
    ),
    # -- Follow-up 4: fit ------------------------------------------------------------------------
    Claim(
        "fit-nobatch is +7-12 % over C7",
        "Follow-up 4",
        "b8149 c7",
        "b8149 fit-nobatch",
        percent(7, 12),
        (1.0732, 1.1218),
        (I,),
        I,
    ),
    Claim(
        "fit-nobatch runs at ~74 tok/s",
        "Follow-up 4",
        (74.0,) * 4,
        "b8149 fit-nobatch",
        about(74, 74),
        (0.9851, 1.0284),
        (P,),
        P,
        of="mean",
    ),
    Claim(
        "fit-nobatch uses less VRAM than C7",
        "Follow-up 4",
        "b8149 c7",
        "b8149 fit-nobatch",
        LESS,
        (0.9788, 0.9789),
        (I,),
        I,
        (LAUNCH,),
        "vram_mib",
    ),
    Claim(
        "fit-256 is faster than fit-default",
        "Follow-up 4",
        "b8149 fit-default",
        "b8149 fit-256",
        MORE,
        (1.0264, 1.2178),
        (P, P, I, I),
        I,
        apart="2.6 and 3.0 % on short and medium: " + WITHIN,
    ),
    Claim(
        "fit-target 256 does not close the gap to C7",
        "Follow-up 4",
        "b8149 c7",
        "b8149 fit-256",
        LESS,
        (0.9482, 0.9696),
        (R, P, P, P),
        R,
        apart="3.0 to 4.6 % on all but short: " + WITHIN,
    ),
    Claim(
        "removing the batch flags is the key",
        "Follow-up 4",
        "b8149 fit-default",
        "b8149 fit-nobatch",
        MORE,
        (1.1608, 1.4041),
        (I,),
        I,
    ),
    Claim(
        "fit-target 256 uses more VRAM than fit-default",
        "Follow-up 4",
        "b8149 fit-default",
        "b8149 fit-256",
        MORE,
        (1.0497, 1.0498),
        (R,),
        R,
        (LAUNCH,),
        "vram_mib",
    ),
    # -- Follow-up 5: speculative decoding -------------------------------------------------------
    Claim(
        "the image latest is ~40 % regressed",
        "Follow-up 5, by ngram-simple",
        "b8149 fit-nobatch",
        "latest ngram-simple",
        percent(-45, -35),
        (0.5820, 0.6453),
        (R,),
        R,
    ),
    Claim(
        "the image latest is ~40 % regressed, short n-grams",
        "Follow-up 5, by ngram-simple-short",
        "b8149 fit-nobatch",
        "latest ngram-simple-short",
        percent(-45, -35),
        (0.5848, 0.6025),
        (R,),
        R,
        SPEED[:3],
    ),
    Claim(
        "the image latest is ~40 % regressed, ngram-mod",
        "Follow-up 5, by ngram-mod",
        "b8149 fit-nobatch",
        "latest ngram-mod",
        percent(-45, -35),
        (0.5970, 0.5971),
        (R,),
        R,
        SPEED[:1],
    ),
    Claim(
        "shorter n-grams and longer drafts gain nothing",
        "Follow-up 5",
        "latest ngram-simple",
        "latest ngram-simple-short",
        (0.95, 1.05),
        (0.9930, 1.0047),
        (P,),
        P,
        SPEED[:3],
    ),
    Claim(
        "ngram-mod gains nothing over ngram-simple",
        "Follow-up 5",
        "latest ngram-simple",
        "latest ngram-mod",
        (0.95, 1.05),
        (0.9933, 0.9934),
        (P,),
        P,
        SPEED[:1],
    ),
    # -- Follow-up 6: the dense model ------------------------------------------------------------
    Claim(
        "27B dense is 10x slower",
        "Follow-up 6",
        "b8149 fit-nobatch",
        "b8149 dense27b-fit",
        slower(10),
        (0.0932, 0.1016),
        (R,),
        R,
        of="mean",
    ),
    Claim(
        "27B dense runs at ~7.2 tok/s",
        "Follow-up 6",
        (7.2,) * 4,
        "b8149 dense27b-fit",
        (0.95, 1.05),
        (0.9861, 1.0278),
        (P,),
        P,
    ),
    Claim(
        "27B dense has +2.8 % perplexity",
        "Follow-up 6",
        "b8149 quality-q4km",
        "b8149 quality-27b",
        percent(2.8, digits=1),
        (1.0282, 1.0283),
        (R,),
        R,
        WIKI,
        "ppl",
    ),
    # -- Follow-up 7: MXFP4_MOE ------------------------------------------------------------------
    Claim(
        "MXFP4_MOE is 34-42 % slower",
        "Follow-up 7",
        "b8149 fit-nobatch",
        "b8149 mxfp4-fit-nobatch",
        percent(-42, -34),
        (0.5650, 0.6627),
        (R,),
        R,
        instead="33.7 to 43.5 %",
    ),
    Claim(
        "MXFP4_MOE runs at ~47 tok/s",
        "Follow-up 7",
        (47.0,) * 4,
        "b8149 mxfp4-fit-nobatch",
        about(47, 47),
        (0.9148, 1.0532),
        (I, P, P, R),
        P,
        of="mean",
        apart="43.0 to 49.5 is 5 % above to 9 % below",
    ),
    Claim(
        "MXFP4_MOE has slightly better perplexity, 5.96 against 6.00",
        "Follow-up 7",
        "b8149 quality-q4km",
        "b8149 quality-mxfp4",
        LESS,
        (0.9933, 0.9934),
        (P,),
        I,
        ("wikitext2_40x512",),
        "ppl",
        apart=WITHIN,
    ),
    Claim(
        "MXFP4_MOE has slightly better quality than Q4_K_M: its KLD in the table",
        "Follow-up 7",
        (0.028,),
        "b8149 quality-mxfp4/wikitext2_31x512_table",
        LESS,
        (1.7857, 1.7858),
        (R,),
        I,
        ("wikitext2_31x512",),
        "kld_mean",
        instead="0.050 against 0.028, 1.8 times",
        apart="the conclusion rests on perplexity alone",
    ),
    Claim(
        "MXFP4_MOE has slightly better quality than Q4_K_M: its KLD in the checklist",
        "Follow-up 7",
        (0.028,),
        "b8149 quality-mxfp4/wikitext2_31x512_checklist",
        LESS,
        (1.3214, 1.3215),
        (R,),
        I,
        ("wikitext2_31x512",),
        "kld_mean",
        instead="0.037 against 0.028, 1.3 times",
        apart="the conclusion rests on perplexity alone",
    ),
    Claim(
        "MXFP4_MOE has slightly better quality than Q4_K_M: its same top",
        "Follow-up 7",
        "b8149 quality-q4km/wikitext2_80x512",
        "b8149 quality-mxfp4",
        (0.0, 100.0),
        (-1.4, -1.4),
        (P,),
        I,
        ("wikitext2_31x512",),
        "same_top",
        "points",
        instead="1.4 points fewer",
        apart="within the slack of 4 points",
    ),
    Claim(
        "UD-Q4_K_XL has a KLD of 0.109, Q4_K_M of 0.028",
        "Follow-up 7",
        (0.028,),
        (0.109,),
        times(3.9, 1),
        (3.8928, 3.8929),
        (R,),
        R,
        ("wikitext2_31x512",),
        "kld_mean",
    ),
    Claim(
        "the VRAM of MXFP4_MOE is nearly identical",
        "Follow-up 7",
        "b8149 fit-nobatch",
        "b8149 mxfp4-fit-nobatch",
        (0.98, 1.02),
        (0.9980, 0.9981),
        (P,),
        P,
        (LAUNCH,),
        "vram_mib",
    ),
    # -- M5 Max: quality -------------------------------------------------------------------------
    Claim(
        "q8_0 KV changes perplexity by -0.0005",
        "M5 Max, quality",
        "fork m5-f16",
        "fork m5-q8",
        (-0.00055, -0.00045),
        (-0.0005, -0.0005),
        (P,),
        P,
        LONG,
        "ppl",
        "points",
    ),
    Claim(
        "q8_0 KV is essentially free: a KLD of 0.0016",
        "M5 Max, quality",
        (0.0,),
        "fork m5-q8",
        (0.0, 0.0025),
        (0.0016, 0.0016),
        (P,),
        P,
        LONG,
        "kld_mean",
        "points",
    ),
    Claim(
        "q8_0 KV picks the same top token 98.6 % of the time",
        "M5 Max, quality",
        (100.0,),
        "fork m5-q8",
        (-1.45, -1.35),
        (-1.36, -1.36),
        (P,),
        P,
        LONG,
        "same_top",
        "points",
    ),
    Claim(
        "turbo3 costs about 1 % of perplexity",
        "M5 Max, quality",
        "fork m5-f16",
        "fork m5-turbo3",
        percent(1),
        (1.0113, 1.0114),
        (R,),
        R,
        LONG,
        "ppl",
    ),
    Claim(
        "the KLD of turbo3 is roughly 12x that of q8_0",
        "M5 Max, quality",
        "fork m5-q8",
        "fork m5-turbo3",
        times(12),
        (12.4375, 12.4375),
        (R,),
        R,
        LONG,
        "kld_mean",
    ),
    Claim(
        "turbo3 has 5 points more of top-token disagreement than q8_0",
        "M5 Max, quality",
        "fork m5-q8",
        "fork m5-turbo3",
        (-5.5, -4.5),
        (-4.71, -4.71),
        (R,),
        R,
        LONG,
        "same_top",
        "points",
    ),
    Claim(
        "turbo3 has 5 points of top-token disagreement with f16",
        "M5 Max, quality",
        (100.0,),
        "fork m5-turbo3",
        (-5.5, -4.5),
        (-6.07, -6.07),
        (R,),
        R,
        LONG,
        "same_top",
        "points",
        instead="6.1 points",
    ),
    Claim(
        "turbo4 sits between: more KLD than q8_0",
        "M5 Max, quality",
        "fork m5-q8",
        "fork m5-turbo4",
        MORE,
        (8.1875, 8.1875),
        (R,),
        R,
        LONG,
        "kld_mean",
    ),
    Claim(
        "turbo4 sits between: less KLD than turbo3",
        "M5 Max, quality",
        "fork m5-turbo3",
        "fork m5-turbo4",
        LESS,
        (0.6582, 0.6583),
        (I,),
        I,
        LONG,
        "kld_mean",
    ),
    Claim(
        "turbo4 sits between: more perplexity than q8_0",
        "M5 Max, quality",
        "fork m5-q8",
        "fork m5-turbo4",
        MORE,
        (1.0065, 1.0066),
        (P,),
        R,
        LONG,
        "ppl",
        apart=WITHIN,
    ),
    Claim(
        "turbo4 sits between: less perplexity than turbo3",
        "M5 Max, quality",
        "fork m5-turbo3",
        "fork m5-turbo4",
        LESS,
        (0.9951, 0.9952),
        (P,),
        I,
        LONG,
        "ppl",
        apart=WITHIN,
    ),
    Claim(
        "turbo4 sits between: fewer same tops than q8_0",
        "M5 Max, quality",
        "fork m5-q8",
        "fork m5-turbo4",
        LESS,
        (0.9659, 0.9660),
        (P,),
        R,
        LONG,
        "same_top",
        apart="3.4 points, within the slack of 4",
    ),
    # -- M5 Max: speed ---------------------------------------------------------------------------
    Claim(
        "q8_0 K / turbo4 V matches q8_0 at 256K: tg 27.1 against 26.6",
        "M5 Max, asymmetric",
        "fork m5-q8/depth_256k_part1",
        "fork m5-q8-turbo4",
        (0.95, 1.05),
        (1.0187, 1.0188),
        (P,),
        P,
        ("depth_256k",),
    ),
    Claim(
        "q8_0 K / turbo4 V matches q8_0 at 256K: pp 128 against 124",
        "M5 Max, asymmetric",
        "fork m5-q8/depth_256k_part1",
        "fork m5-q8-turbo4",
        (0.95, 1.05),
        (1.0322, 1.0323),
        (P,),
        P,
        ("depth_256k",),
        "prefill_tps",
    ),
    Claim(
        "q8_0 K / turbo3 V decodes worse than q8_0 K / turbo4 V",
        "M5 Max, asymmetric",
        "fork m5-q8-turbo4",
        "fork m5-q8-turbo3",
        LESS,
        (0.8969, 1.0027),
        (P, P, P, R, R, R, R),
        R,
        DEPTHS,
        instead="75.6 against 75.4 tok/s at 8K; 1.3 % worse at 0, 4 to 10 % from 32K on",
        apart="up to 32K within the default tolerance",
    ),
    Claim(
        "f16 K / turbo4 V is broken: decode against q8_0 K / turbo4 V",
        "M5 Max, asymmetric",
        "fork m5-q8-turbo4",
        "fork m5-f16-turbo4",
        LESS,
        (0.0682, 0.8782),
        (R,),
        R,
        DEPTHS[:5],
    ),
    Claim(
        "f16 K / turbo4 V is 34x to 78x slower: prefill at 64K, between 8K and 128K",
        "M5 Max, asymmetric and 64K",
        "fork m5-f16",
        "fork m5-f16-turbo4",
        (1 / 78, 1 / 34),
        (0.0137, 0.0138),
        (R,),
        R,
        ("depth_64k",),
        "prefill_tps",
    ),
    Claim(
        "f16 K / turbo4 V is 34x to 78x slower: decode at 64K",
        "M5 Max, asymmetric and 64K",
        "fork m5-f16",
        "fork m5-f16-turbo4",
        (1 / 78, 1 / 34),
        (0.0819, 0.0820),
        (R,),
        R,
        ("depth_64k",),
        instead="12.2 times: the factors are of prefill",
    ),
    Claim(
        "at 64K turbo3 is within 2 % of q8_0",
        "M5 Max, 64K",
        "fork m5-q8",
        "fork m5-turbo3",
        (0.98, 1.02),
        (0.9803, 0.9804),
        (P,),
        P,
        ("depth_64k",),
        "prefill_tps",
    ),
    Claim(
        "at 64K the prefill curves are nearly converged: f16 and q8_0",
        "M5 Max, 64K",
        "fork m5-q8",
        "fork m5-f16",
        (0.95, 1.05),
        (1.2562, 1.2563),
        (I,),
        P,
        ("depth_64k",),
        "prefill_tps",
        instead="f16 is 26 % above q8_0",
        apart="a quarter is no convergence",
    ),
    Claim(
        "at 64K the prefill curves are nearly converged: turbo4 and q8_0",
        "M5 Max, 64K",
        "fork m5-q8",
        "fork m5-turbo4",
        (0.95, 1.05),
        (0.8722, 0.8723),
        (R,),
        P,
        ("depth_64k",),
        "prefill_tps",
        instead="turbo4 is 13 % below q8_0",
        apart="an eighth is no convergence",
    ),
    Claim(
        "at 64K q8_0 K / turbo4 V tracks q8_0 prefill closely",
        "M5 Max, 64K",
        "fork m5-q8",
        "fork m5-q8-turbo4",
        (0.95, 1.05),
        (0.9770, 0.9771),
        (P,),
        P,
        ("depth_64k",),
        "prefill_tps",
    ),
    Claim(
        "at 64K q8_0 K / turbo3 V tracks q8_0 prefill closely",
        "M5 Max, 64K",
        "fork m5-q8",
        "fork m5-q8-turbo3",
        (0.95, 1.05),
        (0.9716, 0.9717),
        (P,),
        P,
        ("depth_64k",),
        "prefill_tps",
    ),
    Claim(
        "at 128K turbo3 pulls ahead of q8_0, 253 against 245",
        "M5 Max, 64K",
        "fork m5-q8",
        "fork m5-turbo3",
        MORE,
        (1.0326, 1.0327),
        (P,),
        I,
        ("depth_128k_part1",),
        "prefill_tps",
        apart=WITHIN,
    ),
)

UNCHECKED = {
    "KV q8_0 gives +12-38 % of throughput": ("b8149 c3", "unstated c3"),
    "another unpinned HEAD was 30 % slower": ("unstated c7", "latest c7"),
    "the slowdown is of the image latest, not of n-grams": ("latest fit-nobatch",),
    "f16 K / turbo4 V is 34x slower at 8K": ("fork m5-f16/depth_8k",),
    "f16 K / turbo4 V is 78x slower at 128K": ("fork m5-f16/depth_128k",),
    "symmetric turbo3 is all that fits at 1M": ("fork m5-turbo3/depth_1m",),
    "C8 runs at ~64 tok/s": ("b8149 c8",),
}
"""Claims that the reports' figures say nothing of, and the figures that they would need."""


# --- what is compared ---------------------------------------------------------------------------


@cache
def published(file: str) -> Baseline:
    """Return a published file, read and checked by the store."""
    return load(ROOT / "baselines" / f"{FILES[file]}.json")


@cache
def suite() -> Suite:
    """Return the suite file of the repository."""
    return load_suite(ROOT / "suites" / "llmperf.toml")


def figures(side: Side, cases: tuple[str, ...], metric: str) -> list[float]:
    """Return the figures of one side of a claim, one for each case."""
    if not isinstance(side, str):
        return list(side)
    file, name = side.split()
    keys = [name] if "/" in name else [f"{name}/{case}" for case in cases]
    return [published(file).results[key][metric].value for key in keys]


def config_of(claim: Claim) -> Config:
    """Return the config that is gated: that of the new side, or else C7."""
    side = claim.new if isinstance(claim.new, str) else "b8149 c7"
    name = side.split()[1].partition("/")[0]
    if isinstance(claim.new, tuple) and METRICS[claim.metric].scope == "quality":
        name = "quality-q4km"
    config = suite().configs[name]
    # A divergence needs to know of what, and the suite file does not say it for the M5 Max.
    return config if config.against else replace(config, against="what the report says")


def stored(case: Case, metric: str, value: float) -> Stored:
    """Return a published baseline of one figure, as the store reads it from its file."""
    entry = Recorded(METRICS[metric].unit, METRICS[metric].better, None, value)
    baseline = Baseline(
        build={"label": "report"},
        machine={"key": "lab"},
        recorded={"at": "2026-02-27", "by": "published", "source": "a report"},
        results={case.key: {metric: entry}},
        fingerprints={},
    )
    path = Path("baselines/report/lab.json")
    return Stored(parse(dump(baseline), path), "report", str(path), "--llmperf-build=report")


@dataclass
class Measured:
    """In place of a campaign: launches that all measured one value."""

    case: Case
    metric: str
    value: float
    endpoint: bool = False
    measured: tuple[int, int] = (0, LAUNCHES)

    @property
    def failures(self) -> dict[str, Exception]:
        """Workloads that failed: none."""
        return {}

    def launch(self, _index: int) -> Launch:
        """Return a launch of the build under test."""
        name = self.case.workload.name if self.case.workload else LAUNCH
        samples = {name: {self.metric: [self.value]}}
        return Launch("b1", self.case.config.name, "llama-server", "", samples=samples)


@dataclass
class Answered:
    """In place of the passes of a run: one whose chunks all have one value."""

    metric: str
    value: float

    def alone(self, _case: Case) -> Passed:
        """Return the pass of the build under test."""
        values = {self.metric: [[self.value]] * CHUNKS}
        return Passed("b1", "llama-perplexity", "", values, tokens=256, way="tool")


def gated(config: Config, where: str, metric: str, base: float, new: float) -> Verdict:
    """Return the verdict of a gate with the default tolerance, on what was measured."""
    known = METRICS[metric]
    if metric in PUBLISHED_ONLY:
        # Nothing measures it, so no gate does: the comparison itself.
        return compare_published(known, base, [[new]], tolerance=known.tolerance)
    if known.scope == "quality":
        case = Case(config, corpus_pass=CorpusPass(where, "wiki.test.raw"))
        passes = cast("Passes", Answered(metric, new))
        question = QualityQuestion(passes, case, known, known.tolerance)
        return question.answer(stored(case, metric, base))[0]
    workload = None if where == LAUNCH else Workload(where, (Turn(64, 48),))
    case = Case(config, workload)

    def rematch() -> Campaign:
        raise BuildError("a published figure has no build")

    return Question(
        campaign=cast("Campaign", Measured(case, metric, new)),
        case=case,
        metric=known,
        tolerance=known.tolerance,
        budget=Budget(0.0),
        launches=LAUNCHES,
        fingerprint=lambda _launch: {},
        priors=Priors(),
        rematch=rematch,
    ).answer(stored(case, metric, base))


def verdicts_on(claim: Claim) -> list[Verdict]:
    """Return the verdict on each case of a claim."""
    config = config_of(claim)
    bases, news = (figures(side, claim.cases, claim.metric) for side in (claim.base, claim.new))
    return [
        gated(config, where, claim.metric, base, new)
        for where, base, new in zip(claim.cases, bases, news, strict=True)
    ]


def effects(claim: Claim, verdicts: list[Verdict]) -> list[float]:
    """Return what the verdicts say of each case: factors, or differences in points."""
    found = []
    for verdict in verdicts:
        assert verdict.base is not None
        assert verdict.new is not None
        if claim.of == "points":
            found.append(verdict.new - verdict.base)
        else:
            assert verdict.change is not None
            found.append(1 + verdict.change)
    return found


def follows(claim: Claim, found: list[float]) -> bool:
    """Return whether the effects are those that a claim allows."""
    low, high = claim.claimed
    of = [sum(found) / len(found)] if claim.of == "mean" else found
    return all(low <= effect <= high for effect in of)


# --- the claims ---------------------------------------------------------------------------------


@pytest.mark.parametrize("claim", CLAIMS, ids=str)
def test_a_gate_comes_to_this_verdict(claim: Claim) -> None:
    """With the default tolerance, by tolerance only, and it says that a report is behind it."""
    found = verdicts_on(claim)

    expected = claim.verdicts * (len(claim.cases) if len(claim.verdicts) == 1 else 1)
    assert tuple(verdict.outcome for verdict in found) == expected
    for verdict in found:
        assert verdict.mode == "published"
        assert verdict.tolerance == METRICS[claim.metric].tolerance
        assert (verdict.launches_base, verdict.samples_base) == (0, 0)


@pytest.mark.parametrize("claim", CLAIMS, ids=str)
def test_the_figures_give_this(claim: Claim) -> None:
    """Smallest and largest effect, to four digits behind the point."""
    found = effects(claim, verdicts_on(claim))

    assert (min(found), max(found)) == pytest.approx(claim.gives, abs=1e-4)


@pytest.mark.parametrize("claim", CLAIMS, ids=str)
def test_a_claim_follows_from_the_figures_or_is_said_not_to(claim: Claim) -> None:
    """What the figures give instead stands beside the claim, and in the docs with it."""
    assert follows(claim, effects(claim, verdicts_on(claim))) is (not claim.instead)


@pytest.mark.parametrize("claim", CLAIMS, ids=str)
def test_the_verdict_is_what_people_concluded_or_is_said_not_to_be(claim: Claim) -> None:
    """Where it is not, the claim says why."""
    agrees = {verdict.outcome for verdict in verdicts_on(claim)} == {claim.drawn}

    assert agrees is (not claim.apart)


@pytest.mark.parametrize("claim", [one for one in CLAIMS if one.instead], ids=str)
def test_the_docs_list_what_does_not_follow(claim: Claim) -> None:
    """Claim and finding, word for word, in one row."""
    rows = [line for line in PAGE.read_text("utf-8").splitlines() if line.startswith("|")]

    assert [row for row in rows if claim.text in row and claim.instead in row] != []


@pytest.mark.parametrize(("text", "needed"), UNCHECKED.items(), ids=list(UNCHECKED))
def test_what_cannot_be_checked_has_no_figures(text: str, needed: tuple[str, ...]) -> None:
    """Once a report gives them, the claim belongs to the others; the docs list it until then."""
    assert text in PAGE.read_text("utf-8")
    for side in needed:
        file, name = side.split()
        known = published(file).results
        keys = {name} if "/" in name else {f"{name}/{workload}" for workload in SPEED}
        assert keys & set(known) == set()


# --- claims about more than two figures ---------------------------------------------------------


def test_fit_nobatch_is_the_winner() -> None:
    """Follow-up 4: the fastest on every workload, of all that ran on b8149."""
    for workload, winner in zip(
        SPEED, figures("b8149 fit-nobatch", SPEED, "decode_tps"), strict=True
    ):
        others = [
            case["decode_tps"].value
            for key, case in published("b8149").results.items()
            if key.endswith(f"/{workload}") and key != f"fit-nobatch/{workload}"
        ]
        assert max(others) < winner


def test_order_of_the_fits() -> None:
    """Follow-up 4: fit-default < fit-256 < C7 < fit-nobatch, on short and on all the others."""
    for workload in SPEED:
        speeds = [
            figures(f"b8149 {config}", (workload,), "decode_tps")[0]
            for config in ("fit-default", "fit-256", "c7", "fit-nobatch")
        ]
        assert speeds == sorted(speeds)


def test_perplexity_ranks_as_divergence_does() -> None:
    """Follow-up 2: PPL and KLD tell the same story. They rank three quants alike."""
    ranks = [
        sorted(
            ("q4kl", "q4km", "udq4kxl"),
            key=lambda w: figures(f"b8149 quality-{w}", (where,), metric)[0],
        )
        for where, metric in (("wikitext2", "ppl"), ("wikitext2_80x512", "kld_mean"))
    ]

    assert ranks[0] == ranks[1] == ["q4kl", "q4km", "udq4kxl"]


def test_divergence_does_not_amplify_perplexity() -> None:
    """Follow-up 2: the gap is even larger by KLD. By what each quant lost it is smaller.

    UD-Q4_K_XL has lost 4.7 times the perplexity that Q4_K_M has, against Q8_0, and 3.9 times the
    KLD. Only the plain ratio of the perplexities, 1.08, is smaller than that.
    """
    q8, q4km, udq4kxl = (
        figures(f"b8149 quality-{weights}", WIKI, "ppl")[0] for weights in ("q8", "q4km", "udq4kxl")
    )

    assert round((udq4kxl - q8) / (q4km - q8), 1) == 4.7
    assert "4.7 times the perplexity that Q4_K_M has lost" in PAGE.read_text("utf-8")


def test_decode_falls_with_depth() -> None:
    """M5 Max: from depth to depth, in every asymmetric config."""
    for config in ("m5-q8-turbo4", "m5-q8-turbo3", "m5-f16-turbo4"):
        cases = (published("fork").results.get(f"{config}/{depth}", {}) for depth in DEPTHS)
        speeds = [case["decode_tps"].value for case in cases if "decode_tps" in case]
        assert len(speeds) >= 5
        assert speeds == sorted(speeds, reverse=True)


def test_only_an_asymmetric_cache_fits_512k() -> None:
    """M5 Max: q8_0 K / turbo4 V fits 512K where q8_0 ran out of memory, which has no figure."""
    known = published("fork").results

    assert known["m5-q8-turbo4/depth_512k"]["decode_tps"].value == 16.5
    assert "m5-q8/depth_512k" not in known


@pytest.mark.parametrize(
    ("found", "claimed"),
    [
        pytest.param(16 / 3.25, times(4.9, 1), id="turbo3 ~4.9x smaller, 3.25 bits a value"),
        pytest.param(16 / 4.25, times(3.8, 1), id="turbo4 ~3.8x smaller, 4.25 bits a value"),
        pytest.param(21.60 / 21.23, percent(1.7, digits=1), id="Q4_K_L ~1.7 % larger"),
        pytest.param(10, about(27, 3), id="27B 10x the memory bandwidth of ~3B"),
        pytest.param(960 / 15.6, (60, 62), id="~61 tok/s at 960 GB/s"),
    ],
)
def test_arithmetic(found: float, claimed: tuple[float, float]) -> None:
    """What is claimed of things that are no metric follows from the figures beside it."""
    low, high = claimed

    assert low <= found <= high


def test_perplexity_alone_passes_no_gate() -> None:
    """Follow-up 1 has nothing but perplexity: KV q8_0 is INCONCLUSIVE until a KLD was shown."""
    claims = [claim for claim in CLAIMS if claim.report == "Follow-up 1"]
    assert len(claims) == 4
    for claim in claims:
        [verdict] = not_alone(verdicts_on(claim))
        assert verdict.outcome is Outcome.INCONCLUSIVE
        assert "perplexity alone never passes" in verdict.reason
