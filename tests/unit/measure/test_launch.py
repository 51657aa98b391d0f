"""What counts as a measurement, the formulas, and a session on a server."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.fakes import Journal, fake_server

from pytest_llmperf.errors import CheckError, TooSlowError
from pytest_llmperf.measure import launch as module
from pytest_llmperf.measure import on_gpu
from pytest_llmperf.measure.launch import (
    Session,
    check,
    measured,
    process_tree,
    rss_mib,
    timings,
)
from pytest_llmperf.measure.logfacts import read_log
from pytest_llmperf.measure.prompts import Request
from pytest_llmperf.plan.config import LAUNCH, Turn, Workload
from pytest_llmperf.serve.stream import Reply

GOOD = Reply(
    prompt_n=100,
    prompt_ms=50.0,
    predicted_n=21,
    predicted_ms=200.0,
    cache_n=0,
    truncated=False,
    stop_type="limit",
    ttft_ms=60.0,
    last_ms=260.0,
    e2e_ms=265.0,
    draft_n=None,
    draft_accepted_n=None,
    text="",
)
SHORT = Workload("short", (Turn(40, 8),))
TALK = Workload("talk", (Turn(20, 4), Turn(10, 4)))
WHAT = "c7 on b9000: sample 1"

TIMES = st.floats(1e-3, 1e6)
REPLIES = st.lists(
    st.builds(
        lambda n, m, prompt, predicted, steps: replace(
            GOOD,
            prompt_n=n,
            predicted_n=m,
            prompt_ms=prompt,
            predicted_ms=predicted,
            ttft_ms=steps[0],
            last_ms=steps[0] + steps[1],
            e2e_ms=steps[0] + steps[1] + steps[2],
        ),
        st.integers(1, 10**5),
        st.integers(2, 10**4),
        TIMES,
        TIMES,
        st.tuples(TIMES, TIMES, TIMES),
    ),
    min_size=1,
    max_size=4,
)


ASKED = Request(prompt=(1,) * 100, generate=21)


def test_cold_full_length_work_is_a_measurement() -> None:
    """An answer that is what was asked for passes in silence."""
    check(GOOD, ASKED, WHAT)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cache_n": 5}, "5 prompt tokens came from a cache"),
        ({"prompt_n": 95}, "95 of 100 prompt tokens were evaluated"),
        ({"predicted_n": 20}, "20 of 21 tokens were generated"),
        ({"stop_type": "eos"}, "it stopped by eos, not by the limit"),
        ({"truncated": True}, "the context overflowed"),
        ({"prompt_ms": 0.0}, "its timings are not positive"),
        ({"predicted_ms": -1.0}, "its timings are not positive"),
        ({"predicted_ms": float("nan")}, "its timings are not positive"),
        ({"prompt_ms": float("inf")}, "its timings are not positive"),
    ],
)
def test_every_violation_is_named(fields: Mapping[str, Any], message: str) -> None:
    """The error names the request and what is wrong with the answer."""
    with pytest.raises(CheckError) as caught:
        check(replace(GOOD, **fields), ASKED, WHAT)
    assert str(caught.value) == f"{WHAT}: not a measurement: {message}"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cache_n": 60, "prompt_n": 40}, ""),
        ({}, "0 prompt tokens came from a cache, not 60; 100 of 40 prompt tokens were evaluated"),
        ({"cache_n": 61, "prompt_n": 39}, "61 prompt tokens came from a cache, not 60; 39 of 40"),
    ],
)
def test_at_a_depth_exactly_that_comes_from_the_cache(
    fields: Mapping[str, Any], message: str
) -> None:
    """Neither less, which would be a cold prompt, nor more."""
    asked = Request(prompt=(1,) * 100, generate=21, depth=60)
    if not message:
        check(replace(GOOD, **fields), asked, WHAT)
        return
    with pytest.raises(CheckError, match=message):
        check(replace(GOOD, **fields), asked, WHAT)


@pytest.mark.parametrize(
    ("fields", "known", "message"),
    [
        ({}, None, ""),
        ({}, 100, ""),
        ({}, 101, "100 prompt tokens were evaluated, and 101 before"),
        ({"prompt_n": 84}, None, "the picture made no tokens: 84 were evaluated"),
        ({"cache_n": 1}, None, "1 prompt tokens came from a cache"),
    ],
)
def test_a_picture_always_makes_as_many_tokens(
    fields: Mapping[str, Any], known: int | None, message: str
) -> None:
    """How many is known from the first answer; none at all is wrong."""
    asked = Request(prompt=(1,) * 84, generate=21, pictured=True)
    if not message:
        check(replace(GOOD, **fields), asked, WHAT, known)
        return
    with pytest.raises(CheckError, match=message):
        check(replace(GOOD, **fields), asked, WHAT, known)


@pytest.mark.parametrize(
    ("fields", "known", "message"),
    [
        ({"cache_n": None}, None, ""),
        ({"cache_n": 20}, 118, ""),
        ({"cache_n": 33}, None, "33 prompt tokens came from a cache"),
        ({"cache_n": None}, 120, "its prompt has 100 tokens, and had 120 before"),
        ({"predicted_n": 20, "stop_type": "eos"}, None, "20 of 21 .*; it stopped by eos"),
    ],
)
def test_of_a_server_that_hides_tokens_less_is_checked(
    fields: Mapping[str, Any], known: int | None, message: str
) -> None:
    """A template's first words may be cached, and a number is not always as many tokens."""
    asked = Request(prompt=(), generate=21)
    if not message:
        check(replace(GOOD, **fields), asked, WHAT, known)
        return
    with pytest.raises(CheckError, match=message):
        check(replace(GOOD, **fields), asked, WHAT, known)


def test_all_violations_are_named_together() -> None:
    """One answer with several faults has them all in one line."""
    with pytest.raises(CheckError) as caught:
        check(replace(GOOD, cache_n=5, prompt_n=95, truncated=True), ASKED, WHAT)
    assert str(caught.value).count(";") == 2


def test_the_formulas_of_one_request() -> None:
    """20 gaps in 200 ms are 100 tok/s, 100 tokens in 50 ms are 2000 tok/s."""
    assert timings([GOOD]) == {
        "decode_tps": 100.0,
        "prefill_tps": 2000.0,
        "ttft_ms": 60.0,
        "itl_ms": 10.0,
        "e2e_ms": 265.0,
    }


def test_turns_are_summed_before_dividing() -> None:
    """Speeds are of the sums, TTFT is a mean over the turns, the whole time is a sum."""
    second = replace(
        GOOD,
        prompt_n=300,
        prompt_ms=150.0,
        predicted_n=11,
        predicted_ms=400.0,
        ttft_ms=160.0,
        last_ms=560.0,
        e2e_ms=570.0,
    )
    assert timings([GOOD, second]) == pytest.approx(
        {
            "decode_tps": 1e3 * 30 / 600,
            "prefill_tps": 2000.0,
            "ttft_ms": 110.0,
            "itl_ms": 20.0,
            "e2e_ms": 835.0,
        }
    )


@given(REPLIES, st.floats(0.01, 100))
def test_twice_as_slow_is_half_the_speed(replies: list[Reply], factor: float) -> None:
    """All times scaled by a factor scale times by it, and speeds by its inverse."""
    slower = [
        replace(
            reply,
            prompt_ms=reply.prompt_ms * factor,
            predicted_ms=reply.predicted_ms * factor,
            ttft_ms=reply.ttft_ms * factor,
            last_ms=reply.last_ms * factor,
            e2e_ms=reply.e2e_ms * factor,
        )
        for reply in replies
    ]
    before, after = timings(replies), timings(slower)
    for metric, value in before.items():
        expected = value / factor if metric.endswith("_tps") else value * factor
        assert after[metric] == pytest.approx(expected, rel=1e-6)


@given(REPLIES)
def test_a_repeated_turn_changes_no_mean(replies: list[Reply]) -> None:
    """The same turns twice have the same speeds and mean times, and twice the whole time."""
    once, twice = timings(replies), timings(replies * 2)
    assert twice.pop("e2e_ms") == pytest.approx(2 * once.pop("e2e_ms"))
    assert twice == pytest.approx(once)


def test_a_request_alone_is_measured_as_one_of_one() -> None:
    """All as without others, and 21 tokens in 265 ms, prompt included."""
    found = measured([GOOD], 1, GOOD.e2e_ms)
    assert found.pop("aggregate_tps") == pytest.approx(1e3 * 21 / 265)
    assert found == timings([GOOD])


@given(st.integers(1, 8))
def test_equal_parallel_requests_are_as_one(parallel: int) -> None:
    """The metrics of one among others are means; what all got together is a multiple."""
    alone = measured([GOOD], 1, 300.0)
    together = measured([GOOD] * parallel, parallel, 300.0)
    assert together.pop("aggregate_tps") == pytest.approx(parallel * alone.pop("aggregate_tps"))
    assert together == pytest.approx(alone)


def test_a_request_that_starves_shows() -> None:
    """One of two that decodes at a tenth of the speed takes ten of eleven parts of the time."""
    starved = replace(GOOD, predicted_ms=2000.0, ttft_ms=600.0, last_ms=2600.0, e2e_ms=2650.0)
    found = measured([GOOD, starved], 2, 2650.0)
    assert found == pytest.approx(
        {
            "decode_tps": 1e3 * 40 / 2200,
            "prefill_tps": 2000.0,
            "ttft_ms": 330.0,
            "itl_ms": 2200 / 40,
            "e2e_ms": (265 + 2650) / 2,
            "aggregate_tps": 1e3 * 42 / 2650,
        }
    )


def test_accepted_drafts_are_a_share_of_all() -> None:
    """Over all requests, in percent; a request that drafted nothing does not count."""
    replies = [
        replace(GOOD, draft_n=30, draft_accepted_n=27),
        GOOD,
        replace(GOOD, draft_n=10, draft_accepted_n=0),
    ]
    assert measured(replies, 1, 900.0)["draft_acceptance"] == 100 * 27 / 40


@pytest.mark.parametrize("drafted", [None, 0])
def test_a_server_that_drafts_nothing_has_no_acceptance(drafted: int | None) -> None:
    """0 of 0 is no share: nothing is recorded, rather than 0 %."""
    replies = [replace(GOOD, draft_n=drafted, draft_accepted_n=drafted)]
    assert "draft_acceptance" not in measured(replies, 1, 265.0)


def test_a_fresh_server_is_settled_and_looked_at(tmp_path: Path) -> None:
    """Load time, sizes of the log, context and memory of the start are there before any sample."""
    with fake_server(tmp_path) as server:
        session = Session(server, list(range(600)))
        session.settle()
        launch = session.launch
        found = launch.samples[LAUNCH]
        assert found["load_ms"] == [server.load_ms]
        assert (found["model_mib"], found["kv_mib"], found["compute_mib"]) == ([12.5], [4], [8.25])
        assert (found["offloaded_layers"], found["n_ctx"]) == ([5.0], [1024.0])
        assert 1 < found["rss_mib"][0] < 1000
        assert found["vram_mib"] == [10.5 + 4 + 8.25]
        assert (launch.build, launch.config, launch.requests) == ("b9000", "one", 1)
        assert launch.log == str(server.log)


def test_samples_are_taken_and_warm_ups_are_not(tmp_path: Path) -> None:
    """A sample adds one value to every timing metric; a warm-up adds requests only."""
    with fake_server(tmp_path) as server:
        session = Session(server, list(range(100)))
        session.warm_up(TALK)
        assert TALK.name not in session.launch.samples
        session.sample(TALK)
        session.sample(TALK)
        session.sample(SHORT)
        taken = session.launch.samples
        assert {len(values) for values in taken["talk"].values()} == {2}
        assert {len(values) for values in taken["short"].values()} == {1}
        assert taken["talk"]["decode_tps"] == pytest.approx([750.0, 750.0])
        assert taken["short"]["prefill_tps"] == pytest.approx([10_000.0])
        assert session.launch.requests == 7
        assert session.launch.digests == {
            "talk": session.script(TALK).digest,
            "short": session.script(SHORT).digest,
        }


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("cached#40", "5 prompt tokens came from a cache"),
        ("short#40", "7 of 8 tokens were generated"),
        ("truncated#40", "the context overflowed"),
        ("eos#40", "stopped by eos"),
    ],
)
def test_an_answer_that_must_not_be_counted_is_refused(
    tmp_path: Path, fault: str, message: str
) -> None:
    """The error names config, build, purpose and request."""
    with fake_server(tmp_path, fault) as server:
        session = Session(server, list(range(100)))
        with pytest.raises(CheckError, match=message) as caught:
            session.sample(SHORT)
        assert str(caught.value).startswith(
            "one on b9000: sample 1 of short, request 1 of 1 (prompt 40, generate 8 tokens): "
        )


def test_a_workload_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    """A conversation longer than the context is not sent; the error says what to change."""
    with fake_server(tmp_path) as server:
        session = Session(server, list(range(100)))
        long = Workload("long", (Turn(1000, 25),))
        with pytest.raises(CheckError, match="long needs 1025 tokens of context, config one has"):
            session.sample(long)
        assert session.launch.requests == 0


def test_parallel_requests_are_one_sample(tmp_path: Path) -> None:
    """Each round goes to as many slots; what all did is one value a metric."""
    crowd = Workload("crowd", (Turn(20, 4), Turn(10, 4)), parallel=3)
    with fake_server(tmp_path) as server:
        server.props = {**server.props, "total_slots": 3}
        session = Session(server, list(range(200)))
        session.warm_up(crowd)
        session.sample(crowd)
        taken = session.launch.samples["crowd"]
        assert {len(values) for values in taken.values()} == {1}
        assert taken["decode_tps"] == pytest.approx([750.0])
        assert taken["aggregate_tps"][0] > 0
        assert session.launch.requests == 12
    asked = Journal(tmp_path / "journal").entries("completion")
    assert [entry["prompt"] for entry in asked] == [20, 20, 20, 34, 34, 34] * 2
    slots = [entry["slot"] for entry in asked]
    assert [sorted(slots[at : at + 3]) for at in (0, 3, 6, 9)] == [[0, 1, 2]] * 4


def test_one_answer_among_parallel_ones_that_must_not_be_counted_is_refused(
    tmp_path: Path,
) -> None:
    """The error names it; the sample is none."""
    crowd = Workload("crowd", (Turn(40, 8),), parallel=2)
    with fake_server(tmp_path, "cached@2") as server:
        server.props = {**server.props, "total_slots": 2}
        session = Session(server, list(range(100)))
        with pytest.raises(CheckError, match=r"request [12] of 2 .* 5 prompt tokens came from a"):
            session.sample(crowd)
        assert session.launch.samples["crowd"] == {}


@pytest.mark.parametrize("props", [{}, {"total_slots": 1}])
def test_too_few_slots_are_refused(tmp_path: Path, props: Mapping[str, int]) -> None:
    """By what the server says, or else by its options: one unless the config says otherwise."""
    crowd = Workload("crowd", (Turn(8, 4),), parallel=2)
    with fake_server(tmp_path) as server:
        server.props = {**server.props, **props}
        session = Session(server, list(range(100)))
        with pytest.raises(
            CheckError,
            match=r"^workload crowd sends 2 requests at once, config one has slots for 1: set "
            "parallel = 2 in its options",
        ):
            session.sample(crowd)
        assert session.launch.requests == 0


@pytest.mark.parametrize(("asked", "slots"), [(4, 4), (-1, 0)])
def test_slots_are_those_of_the_config_where_the_server_says_nothing(
    tmp_path: Path, asked: int, slots: int
) -> None:
    """A number that is left to the server is not known."""
    with fake_server(tmp_path) as server:
        server.config = replace(server.config, options={"parallel": asked})
        assert Session(server, list(range(100))).slots() == slots


def test_slots_that_share_a_context_need_room_for_all(tmp_path: Path) -> None:
    """With ``kv-unified`` the context that the server tells is that of all slots together."""
    crowd = Workload("crowd", (Turn(300, 100),), parallel=3)
    with fake_server(tmp_path) as server:
        server.config = replace(server.config, options={"parallel": 3, "kv-unified": True})
        session = Session(server, list(range(600)))
        with pytest.raises(CheckError, match="crowd needs 1200 tokens of context, config one has"):
            session.sample(crowd)
        server.config = replace(server.config, options={"parallel": 3})
        assert len(session.script(crowd).requests) == 3


def test_a_depth_lies_in_the_cache_before_the_clock_starts(tmp_path: Path) -> None:
    """Each sample primes its slots; only what follows is evaluated and counted."""
    deep = Workload("deep", (Turn(8, 4, depth=60),), parallel=2)
    with fake_server(tmp_path) as server:
        server.props = {**server.props, "total_slots": 2}
        session = Session(server, list(range(600)))
        session.warm_up(deep)
        session.sample(deep)
        taken = session.launch.samples["deep"]
        assert taken["prefill_tps"] == pytest.approx([1e3 * 8 / 6.8])
        assert session.launch.requests == 4
    asked = Journal(tmp_path / "journal").entries("completion")
    first, again = asked[:4], asked[4:]
    assert [(e["prompt"], e["cached"], e["generate"]) for e in first[:2]] == [(60, 0, 1)] * 2
    assert [(e["prompt"], e["cached"], e["generate"]) for e in first[2:]] == [(68, 60, 4)] * 2
    # The second time the primer finds its own tokens; one has to be evaluated all the same.
    assert [e["cached"] for e in again] == [59, 59, 60, 60]


def test_a_depth_counts_as_context(tmp_path: Path) -> None:
    """It has to fit as well."""
    with fake_server(tmp_path) as server:
        session = Session(server, list(range(600)))
        with pytest.raises(CheckError, match="deep needs 1025 tokens of context, config one has"):
            session.sample(Workload("deep", (Turn(5, 20, depth=1000),)))


def test_a_sample_has_a_limit(tmp_path: Path) -> None:
    """All its requests together, with what lies before the clock starts; no sample is counted."""
    with fake_server(tmp_path, "slow#60") as server:
        session = Session(server, list(range(600)))
        slow = Workload("slow", (Turn(60, 40),), limit=0.5)
        with pytest.raises(
            TooSlowError,
            match=r"^one on b9000: sample 1 of slow, request 1 of 1 \(prompt 60, generate 40 "
            r"tokens\): too slow: given up after the 0\.5 s",
        ):
            session.sample(slow)
        assert session.launch.samples["slow"] == {}
        session.sample(replace(SHORT, limit=60.0))


CHAT = Workload("chat", (Turn(20, 4), Turn(10, 4)), api="chat")


def test_a_chat_is_measured_as_a_completion_is(tmp_path: Path) -> None:
    """Its prompt is the text and what the template adds, evaluated in full."""
    with fake_server(tmp_path) as server:
        session = Session(server, list(range(97, 120)) * 9)
        session.warm_up(CHAT)
        session.sample(CHAT)
        first, second = session.script(CHAT).requests
        assert [message["role"] for message in second.messages] == ["user", "assistant", "user"]
        assert second.messages[0] == first.messages[0]
        assert len(first.prompt) > 20
        assert len(second.prompt) > len(first.prompt) + 14
        taken = session.launch.samples["chat"]
        assert {len(values) for values in taken.values()} == {1}
        assert taken["decode_tps"] == pytest.approx([750.0])
    asked = Journal(tmp_path / "journal").entries("completion")
    assert [entry["prompt"] for entry in asked] == [len(first.prompt), len(second.prompt)] * 2


def test_the_template_is_part_of_what_was_asked(tmp_path: Path) -> None:
    """A build that renders otherwise, and a chat that thinks, have digests of their own."""
    digests = set()
    for number, fault in enumerate(("", "own-template", "sees")):
        folder = tmp_path / str(number)
        folder.mkdir()
        with fake_server(folder, fault) as server:
            session = Session(server, list(range(97, 120)) * 9)
            digests.add(session.script(CHAT).digest)
            if fault != "sees":
                continue
            assert len(digests) == 2
            for changed in (
                replace(CHAT, name="mute", thinking=False),
                replace(CHAT, name="seen", image=8),
                replace(CHAT, name="larger", image=9),
                replace(CHAT, name="longer", turns=(Turn(20, 4), Turn(10, 5))),
            ):
                digests.add(session.script(changed).digest)
    assert len(digests) == 6


def test_a_template_that_cannot_think_is_refused(tmp_path: Path) -> None:
    """Else the two would be measured as if they differed."""
    with fake_server(tmp_path, "deaf-template") as server:
        session = Session(server, list(range(97, 120)) * 9)
        with pytest.raises(CheckError, match="config one makes the same prompt of true and false"):
            session.sample(replace(CHAT, thinking=True))


def test_a_picture_needs_a_projector(tmp_path: Path) -> None:
    """The error names the key, before anything is sent."""
    with fake_server(tmp_path) as server:
        session = Session(server, list(range(97, 120)) * 9)
        with pytest.raises(
            CheckError, match=r"\[models\.tiny\] projector = NAME in the suite file"
        ):
            session.sample(replace(CHAT, image=8))
        assert session.launch.requests == 0


def test_a_picture_is_sent_in_the_first_message(tmp_path: Path) -> None:
    """Its tokens come on top of the text's; its marker is none of them."""
    seen = replace(CHAT, image=8, parallel=2)
    with fake_server(tmp_path, "sees") as server:
        server.props = {**server.props, "total_slots": 2}
        session = Session(server, list(range(97, 120)) * 9)
        session.warm_up(seen)
        session.sample(seen)
        requests = session.script(seen).requests
        one, other = (request.messages[0]["content"] for request in requests[:2])
        assert one[0]["image_url"]["url"].startswith("data:image/png;base64,")  # type: ignore[index]
        assert one != other
        assert session.launch.requests == 8
    asked = Journal(tmp_path / "journal").entries("completion")
    assert [entry["prompt"] for entry in asked[:2]] == [len(requests[0].prompt) + 16] * 2


def test_a_chat_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    """With what the template adds."""
    with fake_server(tmp_path) as server:
        session = Session(server, list(range(97, 120)) * 90)
        with pytest.raises(CheckError, match=r"long needs 10[0-9]+ tokens of context, config one"):
            session.sample(Workload("long", (Turn(1000, 24),), api="chat"))


def test_a_small_context_gets_a_small_probe(tmp_path: Path) -> None:
    """The first request fits into whatever context the server has."""
    with fake_server(tmp_path) as server:
        session = Session(server, list(range(600)))
        server.props = {"default_generation_settings": {"n_ctx": 64}}
        session.settle()
        server.props = {"default_generation_settings": "none"}
        session.settle()
        assert session.context() == 0
        assert "n_ctx" not in session.launch.samples[LAUNCH]


def test_memory_of_a_server_that_has_gone_is_not_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is recorded, rather than 0 MiB."""
    monkeypatch.setattr(module, "process_tree", lambda _pid: [])
    with fake_server(tmp_path) as server:
        session = Session(server, list(range(600)))
        session.settle()
        assert "rss_mib" not in session.launch.samples[LAUNCH]


def test_gpu_memory_is_summed_over_the_process_tree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All GPUs together, asked for the server and its children."""
    asked: list[set[int]] = []

    def held(pids: set[int]) -> dict[int, float]:
        asked.append(set(pids))
        return {0: 100.0, 1: 20.0}

    monkeypatch.setattr(on_gpu, "vram_mib", held)
    with fake_server(tmp_path, "child") as server:
        session = Session(server, list(range(600)))
        session.settle()
        assert session.launch.samples[LAUNCH]["vram_mib"] == [120.0]
        assert server.pid in asked[0]
        assert len(asked[0]) == 2


def test_gpu_memory_is_read_from_the_log_where_nvml_tells_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The buffers on any device that is no CPU; that they are from the log is kept with them."""
    told = read_log("I load_tensors: Vulkan0 model buffer size = 6.50 MiB")
    monkeypatch.setattr(module, "read_log", lambda _text: told)
    with fake_server(tmp_path) as server:
        session = Session(server, list(range(600)))
        session.settle()
    assert session.launch.samples[LAUNCH]["vram_mib"] == [6.5]
    assert session.launch.vram_by == "log"
    assert not session.launch.vram


def test_a_process_tree_is_a_process_and_its_descendants() -> None:
    """A process that has gone has none; memory is that of all together."""
    assert process_tree(os.getpid())[0] == psutil.Process()
    assert rss_mib(process_tree(os.getpid())) > 1
    with psutil.Popen(["/bin/true"]) as gone:
        pass
    assert process_tree(gone.pid) == []
    assert rss_mib([gone]) == 0


def test_the_log_tells_the_gpu_memory_of_a_process_that_cannot_be_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a container whose engine is in another machine; what its process holds is not known."""
    told = read_log("I load_tensors: CUDA0 model buffer size = 6.50 MiB")
    monkeypatch.setattr(module, "read_log", lambda _text: told)
    with fake_server(tmp_path) as server:
        monkeypatch.setattr(type(server), "pid", None)
        session = Session(server, list(range(600)))
        session.settle()
    assert session.launch.samples[LAUNCH]["vram_mib"] == [6.5]
    assert session.launch.vram_by == "log"
    assert "rss_mib" not in session.launch.samples[LAUNCH]
