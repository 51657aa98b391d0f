"""Which servers start when, who is asked first, and what a failure takes with it."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event, Thread
from threading import enumerate as enumerate_threads
from types import SimpleNamespace
from typing import Any

import pytest
from filelock import FileLock
from support.fakes import CONFIG, PATIENCE, Journal, fake_command, goes, running, write_program
from support.nvml import Card, Driver, Task, forget

from pytest_llmperf import preflight
from pytest_llmperf.build.build import Build
from pytest_llmperf.build.resolve import resolve
from pytest_llmperf.build.spec import parse_spec
from pytest_llmperf.campaign import base, servers
from pytest_llmperf.campaign.servers import ServerCampaign
from pytest_llmperf.errors import BuildError, LeakError, OutOfMemoryError, RunError, ServerError
from pytest_llmperf.gpu.cards import Gpu, gpus
from pytest_llmperf.gpu.memory import Release
from pytest_llmperf.leases import Leases
from pytest_llmperf.measure.host import Load
from pytest_llmperf.plan.config import LAUNCH, Config, ModelFiles, Turn, Workload
from pytest_llmperf.serve.launch import ServePlan, Server, start

BASE, NEW = 9000, 9001
FIRST, SECOND, THIRD = (Workload(f"w{n}", (Turn(n, 4),)) for n in (24, 40, 48))


class Coin(random.Random):
    """A coin that falls as told, then as it likes."""

    def __init__(self, *falls: str) -> None:
        super().__init__(7)
        self.falls = list(falls)

    def choice(self, seq: Any) -> Any:  # noqa: ANN401 - as in the standard library
        """Return the next fall."""
        return self.falls.pop(0) if self.falls else super().choice(seq)


@dataclass
class Lab:
    """A folder with fake builds, and campaigns on them."""

    folder: Path
    journal: Journal = field(init=False)
    said: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.journal = Journal(self.folder / "journal")
        (self.folder / "model.gguf").write_bytes(b"GGUF")

    def build(self, number: int, faults: str = "", token_ms: float = 1.0) -> Build:
        """Return a build that is found by its path, as a user's is."""
        command = fake_command(self.journal, number=number, faults=faults, token_ms=token_ms)
        program = write_program(self.folder / f"b{number}" / "llama-server", command)
        spec = parse_spec(str(program), {}, self.folder)
        return resolve(spec, self.folder / "cache", self.said.append)

    def campaign(
        self,
        workloads: Sequence[Workload] = (FIRST, SECOND, THIRD),
        *,
        new: str = "",
        base: str | None = "",
        config: Config = CONFIG,
        pairs: int = 2,
        hang: float = PATIENCE,
        progress: Callable[[str], None] | None = None,
        coin: random.Random | None = None,
        foreign_load: float = math.inf,
    ) -> ServerCampaign:
        """Return a campaign; ``new`` and ``base`` are the faults of the two builds."""
        return ServerCampaign(
            config=config,
            workloads=workloads,
            new=self.build(NEW, new, token_ms=2.0),
            base=None if base is None else self.build(BASE, base),
            files=ModelFiles(self.folder / "model.gguf"),
            serve=ServePlan(
                self.folder / "run",
                timeout=PATIENCE,
                hang=hang,
                progress=progress or self.said.append,
            ),
            pairs=pairs,
            leases=Leases(self.folder / "locks", (), (), progress or self.said.append),
            rng=coin or random.Random(7),  # noqa: S311 - a coin, not a key
            foreign_load=foreign_load,
        )

    def starts(self, number: int) -> int:
        """Return how often servers of a build were started."""
        return self.journal.starts().count(str(number))

    def all_gone(self) -> bool:
        """Return whether every server that was started has gone."""
        return all(goes(entry["pid"]) for entry in self.journal.entries("start"))


def have_memory(monkeypatch: pytest.MonkeyPatch, available: int) -> None:
    """Pretend that so many bytes of memory are free."""
    memory = SimpleNamespace(available=available, total=2**50)
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    """A folder with fake builds, on a machine with room for two of anything."""
    have_memory(monkeypatch, 2**50)
    return Lab(tmp_path)


def test_a_block_starts_each_build_once(lab: Lab) -> None:
    """However many workloads there are, and however often the block is looked at."""
    campaign = lab.campaign()
    assert campaign.measured == (0, 0)
    pair = campaign.block(0)
    assert (lab.starts(BASE), lab.starts(NEW)) == (1, 1)
    assert campaign.block(0) is pair
    assert (lab.starts(BASE), lab.starts(NEW)) == (1, 1)
    campaign.block(2)
    assert (lab.starts(BASE), lab.starts(NEW)) == (3, 3)
    assert campaign.measured == (3, 0)
    assert campaign.failures == {}
    assert lab.all_gone()


def test_a_block_holds_what_both_builds_did(lab: Lab) -> None:
    """Both sides have as many samples of every workload, of the same tokens."""
    pair = lab.campaign().block(0)
    assert pair.together
    for launch, label, tps in ((pair.base, "b9000", 750.0), (pair.new, "b9001", 375.0)):
        assert launch.build == label
        assert launch.samples.keys() == {LAUNCH, "w24", "w40", "w48"}
        for workload in ("w24", "w40", "w48"):
            assert launch.samples[workload]["decode_tps"] == pytest.approx([tps, tps])
        # The probe, and for each workload a warm-up and two samples.
        assert launch.requests == 10
    assert pair.base.digests == pair.new.digests
    assert pair.base.digests.keys() == {"w24", "w40", "w48"}


def test_who_goes_first_is_a_coin_flip(lab: Lab) -> None:
    """Both orders occur, the record tells them, and it is what the servers saw."""
    pair = lab.campaign((SECOND,), pairs=12).block(0)
    order = pair.orders["w40"]
    assert len(order) == 12
    assert set(order) == {"b", "n"}
    asked = lab.journal.asked(40)
    pairs = [asked[i : i + 2] for i in range(2, len(asked), 2)]
    assert [{"b": str(BASE), "n": str(NEW)}[first] for first in order] == [p[0] for p in pairs]
    assert all(sorted(p) == [str(BASE), str(NEW)] for p in pairs)


@pytest.mark.parametrize(("fall", "first"), [("bn", BASE), ("nb", NEW)])
def test_who_starts_first_is_a_coin_flip(lab: Lab, fall: str, first: int) -> None:
    """The second to start finds warmer file caches, so the coin decides."""
    lab.campaign((FIRST,), coin=Coin(fall)).block(0)
    assert lab.journal.starts()[0] == str(first)


def test_the_same_seed_flips_the_same(lab: Lab) -> None:
    """Orders come from the campaign's own coin alone."""
    one, two = (lab.campaign((FIRST,), pairs=8).block(0).orders for _ in range(2))
    assert one == two


def test_launches_of_one_build_alone(lab: Lab) -> None:
    """One start a launch, the build under test only, as many samples as pairs."""
    campaign = lab.campaign(base=None)
    launch = campaign.launch(1)
    assert (lab.starts(BASE), lab.starts(NEW)) == (0, 2)
    assert campaign.measured == (0, 2)
    assert campaign.launch(1) is launch
    assert {len(launch.samples[w]["ttft_ms"]) for w in ("w24", "w40", "w48")} == {2}
    with pytest.raises(RunError, match="no second build"):
        campaign.block(0)
    assert lab.all_gone()


@pytest.mark.parametrize("side", ["base", "new"])
def test_a_workload_that_is_refused_stops_no_other(lab: Lab, side: str) -> None:
    """HTTP 500 to one workload on either side fails that one, on both sides; nothing restarts."""
    fault = "http500#40"
    campaign = lab.campaign(base=fault * (side == "base"), new=fault * (side == "new"))
    pair = campaign.block(0)
    assert campaign.failures.keys() == {"w40"}
    assert "HTTP 500: Failed to parse input" in str(campaign.failures["w40"])
    for launch in (pair.base, pair.new):
        assert launch.samples.keys() == {LAUNCH, "w24", "w48"}
    assert (lab.starts(BASE), lab.starts(NEW)) == (1, 1)
    asked = len(lab.journal.asked(40))
    campaign.block(1)
    assert len(lab.journal.asked(40)) == asked


def test_a_failure_after_samples_takes_them_along(lab: Lab) -> None:
    """A workload that fails late leaves no part of its samples on either side."""
    # The probe, the warm-up and a sample go well.
    campaign = lab.campaign((SECOND,), new="http500@4", pairs=4)
    pair = campaign.block(0)
    assert campaign.failures.keys() == {"w40"}
    assert pair.base.samples.keys() == pair.new.samples.keys() == {LAUNCH}


def test_a_refused_workload_of_a_single_launch_stops_no_other(lab: Lab) -> None:
    """The same holds where one build is measured alone."""
    campaign = lab.campaign(base=None, new="cached#40")
    launch = campaign.launch(0)
    assert "came from a cache" in str(campaign.failures["w40"])
    assert launch.samples.keys() == {LAUNCH, "w24", "w48"}
    assert lab.starts(NEW) == 1


@pytest.mark.parametrize("fault", ["crash#40", "exit#40", "hang#40"])
@pytest.mark.parametrize("alone", [True, False])
def test_a_server_that_dies_or_hangs_is_started_again(lab: Lab, fault: str, *, alone: bool) -> None:
    """The workload that killed it fails; those before it stay, those after it are measured."""
    campaign = lab.campaign(new=fault, base=None if alone else "", hang=1.0)
    launch = campaign.launch(0) if alone else campaign.block(0).new
    assert campaign.failures.keys() == {"w40"}
    assert ("hung" in str(campaign.failures["w40"])) == fault.startswith("hang")
    assert launch.samples.keys() == {LAUNCH, "w24", "w48"}
    assert launch.digests.keys() >= {"w24", "w48"}
    assert {len(launch.samples[w]["ttft_ms"]) for w in ("w24", "w48")} == {2}
    assert lab.starts(NEW) == 2
    assert lab.starts(BASE) == (0 if alone else 1)
    # The probe and three of w24 before the end; the probe and three of w48 after it.
    assert launch.requests == 8
    # It is not asked again, so nothing dies of it again.
    _ = campaign.launch(1) if alone else campaign.block(1)
    assert lab.starts(NEW) == 3
    assert lab.all_gone()


def test_a_server_that_cannot_start_again_ends_the_campaign(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the whole config has failed, and the other build's server is stopped too."""
    campaign = lab.campaign(new="crash#40")
    started: list[Server] = []

    def twice(*arguments: Any) -> Server:  # noqa: ANN401 - passed on
        if len(started) == 2:
            raise ServerError("no more", kind="start")
        started.append(start(*arguments))
        return started[-1]

    monkeypatch.setattr(servers, "start", twice)
    with pytest.raises(ServerError, match="no more"):
        campaign.block(0)
    assert campaign.failures.keys() == {"w40", LAUNCH}
    assert lab.all_gone()


def test_a_config_that_cannot_start_is_not_tried_again(lab: Lab) -> None:
    """Every later test of the config gets the same error at once."""
    campaign = lab.campaign(new="start-exit", base=None)
    with pytest.raises(ServerError, match="exit code 3") as first:
        campaign.launch(0)
    with pytest.raises(ServerError) as second:
        campaign.launch(0)
    assert second.value is first.value
    with pytest.raises(ServerError):
        campaign.block(0)
    assert lab.starts(NEW) == 1


@pytest.mark.parametrize(("base", "new"), [("start-exit", ""), ("", "start-exit")])
def test_one_build_that_cannot_start_stops_the_other(lab: Lab, base: str, new: str) -> None:
    """No server is left, whichever started first."""
    campaign = lab.campaign(base=base, new=new, coin=Coin("bn" if new else "nb"))
    with pytest.raises(ServerError, match="exit code 3"):
        campaign.block(0)
    assert campaign.measured == (0, 0)
    assert lab.all_gone()


def test_an_option_that_a_build_lacks_is_the_configs_failure(lab: Lab) -> None:
    """A BuildError, told once, without a server."""
    campaign = lab.campaign(config=replace(CONFIG, options={"no-such-option": 1}), base=None)
    for _ in range(2):
        with pytest.raises(BuildError, match="config one: build b9001 has no option"):
            campaign.launch(0)
    assert lab.journal.starts() == []


def test_a_server_that_fails_the_probe_is_stopped(lab: Lab) -> None:
    """A server that cannot answer anything fails the config and does not stay."""
    campaign = lab.campaign(new="http500", base=None)
    with pytest.raises(ServerError, match="probe"):
        campaign.launch(0)
    assert lab.all_gone()


@pytest.mark.parametrize("failing", ["new", "base"])
@pytest.mark.parametrize("fault", ["http500", "crash#40"])
def test_a_failure_names_its_build(lab: Lab, failing: str, fault: str) -> None:
    """In a block of two it shows which of them is not to be trusted, at its start and later."""
    faults = {"new": "", "base": "", failing: fault}
    campaign = lab.campaign(new=faults["new"], base=faults["base"])
    with suppress(ServerError):
        campaign.block(0)
    [error] = campaign.failures.values()
    assert campaign.blames(error) is (failing == "new")
    assert campaign.base is not None
    assert error.build == (campaign.new if failing == "new" else campaign.base).identity


def test_ctrl_c_stops_the_servers(lab: Lab) -> None:
    """An interruption in the middle of a block leaves no server, and fails nothing for good."""

    def interrupt(text: str) -> None:
        if "against" in text and lab.starts(NEW) == 1:
            raise KeyboardInterrupt

    campaign = lab.campaign((FIRST,), progress=interrupt)
    with pytest.raises(KeyboardInterrupt):
        campaign.block(0)
    assert (lab.starts(BASE), lab.starts(NEW)) == (1, 1)
    assert lab.all_gone()
    assert campaign.failures == {}
    assert campaign.block(0).new.samples["w24"]


def test_one_run_measures_at_a_time(lab: Lab) -> None:
    """While another holds the lock the user is told, and no server is started."""
    waiting = Event()

    def progress(text: str) -> None:
        if "waiting for another run" in text:
            waiting.set()

    campaign = lab.campaign((FIRST,), base=None, progress=progress)
    thread = Thread(target=campaign.launch, args=(0,), daemon=True)
    with FileLock(lab.folder / "locks" / "host.lock"):
        thread.start()
        assert waiting.wait(PATIENCE)
        assert lab.journal.starts() == []
    thread.join(PATIENCE)
    assert campaign.measured == (0, 1)


def test_the_lock_is_free_between_blocks(lab: Lab) -> None:
    """Another run may measure between two blocks, also after a failure."""
    campaign = lab.campaign((FIRST,), base=None)
    campaign.launch(0)
    with FileLock(campaign.leases.folder / "host.lock", timeout=0):
        pass
    failing = lab.campaign((FIRST,), base=None, new="start-exit")
    with pytest.raises(ServerError):
        failing.launch(0)
    with FileLock(failing.leases.folder / "host.lock", timeout=0):
        pass


def test_servers_of_a_config_have_its_cards(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both of a block the same, of those that the machine has; between blocks none is held."""
    cards = tuple(Gpu(index, f"GPU-{index}", "card", 16000, "1") for index in range(2))
    monkeypatch.setattr("pytest_llmperf.serve.launch.gpus", lambda: cards)
    warned: list[object] = []

    def warnings(leased: object) -> list[str]:
        warned.append(leased)
        return []

    monkeypatch.setattr(base, "gpu_warnings", warnings)
    config = replace(CONFIG, gpu=True)
    campaign = lab.campaign((FIRST,), config=config)
    campaign.leases = Leases(lab.folder / "locks", cards, cards, lab.said.append, first=1)
    monkeypatch.setattr(type(campaign), "_fits_twice", lambda _self: True)
    assert campaign.needs == (1, False)
    campaign.block(0)
    told = [entry["env"].get("CUDA_VISIBLE_DEVICES") for entry in lab.journal.entries("start")]
    assert told == ["GPU-1", "GPU-1"]
    assert warned == [(cards[1],)]
    assert campaign.serve.cards == ()
    assert not campaign.leases.held


def test_a_side_alone_needs_what_both_need(lab: Lab) -> None:
    """Its lease is within that of the test, which cannot grow."""
    campaign = lab.campaign((FIRST,), config=replace(CONFIG, gpu=True))
    assert campaign.base is not None
    campaign.base = replace(campaign.base, url="http://127.0.0.1:1")
    assert campaign.alone(base=True).needs == campaign.needs == (1, False)


def test_another_server_of_ours_is_stopped_first(lab: Lab) -> None:
    """Before a server is measured, the one that tests use has to go."""
    campaign = lab.campaign((FIRST,), base=None)
    seen: list[int] = []
    campaign.before = lambda: seen.append(len(lab.journal.starts()))
    campaign.launch(1)
    campaign.launch(0)
    assert seen == [0, 1]


@pytest.mark.parametrize(("fall", "first"), [("bn", BASE), ("nb", NEW)])
def test_builds_that_do_not_fit_together_alternate(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, fall: str, first: int
) -> None:
    """One is started, measured and stopped, then the other; the coin says which is first."""
    have_memory(monkeypatch, 0)
    campaign = lab.campaign((FIRST, SECOND), coin=Coin(fall))
    alive: list[list[bool]] = []

    def look(_text: str) -> None:
        alive.append([running(entry["pid"]) for entry in lab.journal.entries("start")])

    campaign.serve = replace(campaign.serve, progress=look)
    pair = campaign.block(0)
    assert not pair.together
    assert max(map(sum, alive)) == 1
    assert lab.journal.starts()[0] == str(first)
    assert pair.orders == {"w24": fall[0], "w40": fall[0]}
    assert (pair.base.build, pair.new.build) == ("b9000", "b9001")
    for launch in (pair.base, pair.new):
        assert {len(launch.samples[w]["ttft_ms"]) for w in ("w24", "w40")} == {2}


@pytest.mark.parametrize(
    ("gpu", "host", "free", "fits"),
    [
        (False, 10_000, {}, True),
        (False, 3_000, {}, False),
        (True, 10_000, {}, False),
        (True, 10_000, {0: 80_000.0}, True),
        (True, 10_000, {0: 80_000.0, 1: 5_000.0}, False),
        (True, 3_000, {0: 80_000.0}, False),
    ],
)
def test_what_fits_together(
    lab: Lab,
    monkeypatch: pytest.MonkeyPatch,
    *,
    gpu: bool,
    host: int,
    free: dict[int, float],
    fits: bool,
) -> None:
    """Both models need room in memory, and far more than that on every GPU; unknown is no."""
    have_memory(monkeypatch, host * 2**20)
    monkeypatch.setattr(preflight, "free_mib", lambda: free)
    campaign = lab.campaign(config=replace(CONFIG, gpu=gpu))
    with campaign.files.main.open("ab") as file:
        file.truncate(1000 * 2**20)
    assert campaign._fits_twice() is fits


def test_a_running_server_needs_no_room(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """An endpoint has loaded its model already, so nothing has to fit."""
    have_memory(monkeypatch, 0)
    campaign = lab.campaign()
    assert not campaign._fits_twice()
    campaign.base = Build("there", 0, "unknown", "http://h:1", "", url="http://h:1")
    assert campaign._fits_twice()


@dataclass
class Disturbing:
    """In place of a watch: tells of load so many times, then of none."""

    times: int

    def __call__(self) -> Disturbing:
        """Begin to watch."""
        return self

    def load(self) -> Load:
        """Return the load of this look."""
        self.times -= 1
        return Load(1.5 if self.times >= 0 else 0.0, "make (pid 7) 1.5 of them", 0)


def restless(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> ServerCampaign:
    """Return a campaign on a machine that is never quiet."""
    monkeypatch.setattr(base, "Watch", Disturbing(10**6))
    monkeypatch.setattr(base, "_QUIET_LOOK_S", 0.0)
    monkeypatch.setattr(base, "_QUIET_WAIT_S", 0.01)
    return lab.campaign((FIRST,), foreign_load=0.5)


@pytest.mark.parametrize("alone", [True, False])
def test_a_disturbed_launch_is_measured_again(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, *, alone: bool
) -> None:
    """It is named, a quiet moment is waited for, and the quiet one is kept."""
    # Two looks: at the first measurement, and once while waiting for quiet.
    monkeypatch.setattr(base, "Watch", Disturbing(2))
    monkeypatch.setattr(base, "_QUIET_LOOK_S", 0.0)
    campaign = lab.campaign((FIRST,), foreign_load=0.5)
    unit = campaign.launch(0) if alone else campaign.block(0)
    assert not unit.disturbed
    assert any("is measured again: other programs kept 1.5" in said for said in lab.said)
    assert any("waits for a quiet machine" in said for said in lab.said)


def test_a_disturbance_that_lasts_stays_with_the_block(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a few tries the block is kept and says what disturbed it; no test tries again."""
    campaign = restless(lab, monkeypatch)
    block = campaign.block(0)
    assert "make (pid 7)" in block.disturbed
    asked = len(lab.said)
    assert campaign.block(0) is block
    assert len(lab.said) == asked


def test_a_disturbed_launch_is_kept_where_the_next_finds_no_memory(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others hold the memory for the moment, so the config does not run out of it."""
    campaign = restless(lab, monkeypatch)
    opened: list[Server] = []

    def once(*arguments: Any) -> Server:  # noqa: ANN401 - passed on
        if opened:
            raise OutOfMemoryError("no room", what="KV buffer", log=None, kind="start")
        opened.append(start(*arguments))
        return opened[-1]

    monkeypatch.setattr(servers, "start", once)
    assert "make (pid 7)" in campaign.launch(0).disturbed
    assert not campaign.failures
    assert any("stays as it was: no room" in said for said in lab.said)


def test_a_wandering_launch_is_named(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples of one server that wander are told with workload and metric."""
    monkeypatch.setattr(base, "unsteady", lambda values: "they drift" if values else "")
    monkeypatch.setattr(base, "_QUIET_WAIT_S", 0.0)
    launch = lab.campaign((FIRST,)).launch(0)
    assert launch.disturbed.endswith("decode_tps: they drift")


@pytest.mark.parametrize("alone", [True, False])
def test_what_was_answered_before_a_crash_is_kept_aside(lab: Lab, *, alone: bool) -> None:
    """Never judged: the build, how many requests of how many, and their samples."""
    campaign = lab.campaign((SECOND,), new="crash@4", base=None if alone else "", pairs=4)
    launch = campaign.launch(0) if alone else campaign.block(0).new
    # The first completion is the probe, the second the warm-up.
    assert campaign.partial.keys() == {"w40"} == campaign.failures.keys()
    partial = campaign.partial["w40"]
    assert (partial.build, partial.how, partial.answered, partial.asked) == (
        "b9001",
        "crashed",
        2,
        5,
    )
    assert len(partial.samples["decode_tps"]) == 1
    assert launch.samples.keys() == {LAUNCH}


@pytest.mark.parametrize("fault", ["crash#48", "hang#48"])
@pytest.mark.parametrize("alone", [True, False])
def test_no_server_is_started_for_nothing(lab: Lab, fault: str, *, alone: bool) -> None:
    """Where the last workload kills it, nothing is left to ask of another."""
    campaign = lab.campaign(new=fault, base=None if alone else "", hang=1.0)
    launch = campaign.launch(0) if alone else campaign.block(0).new
    assert campaign.failures.keys() == {"w48"}
    assert launch.samples.keys() == {LAUNCH, "w24", "w40"}
    assert lab.starts(NEW) == 1
    assert lab.all_gone()


def test_builds_that_do_not_fit_at_once_take_turns(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second server's lack of memory is not the config's; no later block tries it again."""
    running: list[Server] = []

    def crowded(*arguments: Any) -> Server:  # noqa: ANN401 - passed on
        if any(server.alive() for server in running):
            raise OutOfMemoryError("none left", what="a buffer", log=None, kind="start")
        running.append(start(*arguments))
        return running[-1]

    monkeypatch.setattr(servers, "start", crowded)
    campaign = lab.campaign((FIRST,))
    assert [campaign.block(index).together for index in range(2)] == [False, False]
    assert campaign.failures == {}
    assert (lab.starts(BASE) + lab.starts(NEW)) == 1 + 2 + 2
    assert sum("do not fit" in text for text in lab.said) == 1


def test_memory_that_runs_out_of_a_request_beside_another_server_is_tried_alone(lab: Lab) -> None:
    """The workload fails only if it does so by itself as well."""
    campaign = lab.campaign((FIRST, SECOND), new="oom#40")
    pair = campaign.block(0)
    assert not pair.together
    assert campaign.failures.keys() == {"w40"}
    assert isinstance(campaign.failures["w40"], OutOfMemoryError)
    assert campaign.partial["w40"].how == "ran out of memory"
    assert lab.all_gone()


def test_each_build_can_be_measured_alone(lab: Lab) -> None:
    """To see which of the two a failure is of; once, however often it is asked."""
    campaign = lab.campaign((FIRST,), new="start-oom")
    with pytest.raises(OutOfMemoryError):
        campaign.block(0)
    assert campaign.alone(base=True).launch(0).build == "b9000"
    for _ in range(2):
        with pytest.raises(OutOfMemoryError):
            campaign.alone(base=False).launch(0)
    # One in the block, one alone.
    assert lab.starts(NEW) == 2


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("require_disk", "no room"),
        ("require_memory", "no memory"),
    ],
)
def test_nothing_is_started_that_cannot_go_well(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, what: str, message: str
) -> None:
    """What is checked before a start refuses it."""

    def refuse(*_arguments: object) -> None:
        raise RunError(message)

    monkeypatch.setattr(base, what, refuse)
    with pytest.raises(RunError, match=message):
        lab.campaign().block(0)
    assert lab.journal.starts() == []


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Card]:
    """The one GPU of this machine, whose driver names no process."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    wait = Release.wait

    def short(self: Release, pids: set[int], progress: object = None, *, alone: bool = True) -> str:
        del progress
        return wait(self, pids, timeout=0.05, alone=alone)

    monkeypatch.setattr(Release, "wait", short)
    monkeypatch.setattr(ServerCampaign, "_fits_twice", lambda _self: True)
    monkeypatch.setattr(base, "_QUIET_LOOK_S", 0.01)
    one = Card(energy_mj=0)
    Driver(one).install(monkeypatch)
    yield one
    forget()


def on_card(lab: Lab, workloads: Sequence[Workload] = (FIRST,), **changes: Any) -> ServerCampaign:  # noqa: ANN401 - of a campaign
    """Return a campaign on the one GPU."""
    campaign = lab.campaign(workloads, config=replace(CONFIG, gpu=True), **changes)
    campaign.leases = Leases(lab.folder / "locks", gpus(), gpus(), lab.said.append)
    return campaign


def watches() -> list[Thread]:
    """Return the threads that watch a GPU."""
    return [one for one in enumerate_threads() if one.name == "gpu-watch"]


@pytest.mark.parametrize("fault", ["", "start-exit", "http500", "http500#24", "crash#24"])
@pytest.mark.parametrize("alone", [True, False])
def test_no_watch_outlives_its_server(lab: Lab, card: Card, fault: str, *, alone: bool) -> None:
    """However it ends, nor one that waits for a quiet machine."""
    campaign = on_card(lab, (FIRST, SECOND), base=None if alone else "", new=fault)
    with suppress(ServerError):
        _ = campaign.launch(0) if alone else campaign.block(0)
    assert watches() == []
    card.used = 500
    campaign._wait_for_quiet("launch 1")
    assert watches() == []
    assert lab.all_gone()


def test_a_leak_leaves_no_watch_and_no_server(lab: Lab, card: Card) -> None:
    """Of two servers the one that is looked at first may have left nothing."""
    campaign = on_card(lab, progress=lambda _text: setattr(card, "used", card.used + 100))
    with pytest.raises(LeakError, match="not free"):
        campaign.block(0)
    assert watches() == []
    assert lab.all_gone()


def test_one_that_cannot_be_stopped_keeps_no_other(
    lab: Lab, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interruption in the middle of the end of a block still ends the other server."""
    assert card.used == 0
    stop, tried = Server.stop, list[int]()

    def interrupted(self: Server) -> None:
        tried.append(1)
        stop(self)
        if len(tried) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Server, "stop", interrupted)
    with pytest.raises(KeyboardInterrupt):
        on_card(lab).block(0)
    assert lab.all_gone()
    assert watches() == []


@pytest.mark.parametrize("fall", ["bn", "nb"])
def test_a_server_that_died_beside_another_left_no_leak(lab: Lab, card: Card, fall: str) -> None:
    """Where NVML names no process, what the other one holds is not taken for it."""
    card.on_memory = lambda it: setattr(
        it, "used", 300.0 * sum(running(one["pid"]) for one in lab.journal.entries("start"))
    )
    campaign = on_card(lab, (FIRST, SECOND, THIRD), new="crash#40", coin=Coin(fall))
    pair = campaign.block(0)
    assert campaign.failures.keys() == {"w40"}
    for launch in (pair.base, pair.new):
        assert launch.samples[LAUNCH]["vram_mib"] == [300.0]
        assert launch.samples[LAUNCH]["vram_peak_mib"] == [300.0]
        assert launch.vram_by == "use"


def test_a_running_server_has_no_gpu_of_ours(
    lab: Lab, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its energy is not that of our GPU, where another program may be its own."""
    assert card.energy_mj == 0
    campaign = on_card(lab)
    there = Build("there", 0, "unknown", "http://h:1", "", url="http://h:1")
    campaign.serve = replace(campaign.serve, cards=gpus())
    own = campaign._on_gpu(campaign.new)
    own.stop()
    assert own.cards == gpus()
    assert campaign._on_gpu(there).cards == ()
    monkeypatch.setattr("pytest_llmperf.measure.on_gpu.is_ours", lambda _pid: False)
    card.hold(Task(os.getpid(), 100.0))
    campaign.base = there
    beside = campaign._on_gpu(campaign.new)
    beside.stop()
    assert beside.disturbed == ""


def test_what_was_asked_counts_every_warm_up(lab: Lab, card: Card) -> None:
    """A workload on a GPU has two of them."""
    assert card.used == 0
    campaign = on_card(lab, (SECOND,), new="http500@6", pairs=4, base=None)
    campaign.launch(0)
    # The probe, two warm-ups and two samples; the third sample failed.
    assert (campaign.partial["w40"].answered, campaign.partial["w40"].asked) == (4, 6)
