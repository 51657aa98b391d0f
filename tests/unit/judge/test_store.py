"""The baseline file: read, checked, written, updated by many processes at once."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pytest_llmperf.errors import BaselineError
from pytest_llmperf.judge import store
from pytest_llmperf.judge.chunks import pooled
from pytest_llmperf.judge.store import (
    Baseline,
    Failure,
    Measured,
    Recorded,
    dump,
    find,
    labels,
    load,
    lock_path,
    newest,
    oldest,
    parse,
    stale,
    update,
    validate_label,
    write_atomic,
)
from pytest_llmperf.metrics import METRICS

BUILD = {"label": "b8149", "number": 8149, "commit": "abc", "source": "embedded", "sha256": "00"}
MACHINE = {"key": "rtx-5080", "gpu": ["RTX 5080"], "driver": "1", "cpu": "x", "os": "Linux"}
RECORDED = {"at": "2026-02-27", "by": "measured", "source": "here"}
CASE = "c7/short"
PRINT: dict[str, str | int | float | bool] = {
    "flash_attn": True,
    "n_ctx": 4096,
    "kv": "q8_0",
    "share": 0.123456789,
}
ONE = [[69.5, 69.8, 70.1]]
TWO = [[68.0, 70.25], [71.0, 71.5]]

NUMBERS = st.integers(-(10**9), 10**9) | st.floats(allow_nan=False, allow_infinity=False)
LAUNCHES = st.lists(st.lists(NUMBERS, min_size=1, max_size=4), min_size=1, max_size=4)
NAMES = st.text("abcdefghij0123456789._-", min_size=1, max_size=8).map(lambda s: "x" + s)
CASES = st.tuples(NAMES, NAMES).map("/".join)
SCALARS = st.text(max_size=8) | st.booleans() | NUMBERS
METRIC_NAMES = st.sampled_from(sorted(METRICS))
LAUNCHED = st.sampled_from(sorted(n for n, m in METRICS.items() if m.scope != "quality"))
CORPUS = "c7/corpus"


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks go to a folder of the test, not to the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the baseline of this test goes."""
    return tmp_path / "baselines" / "b8149" / "rtx-5080.json"


def record(path: Path, measured: dict[str, Measured], **over: Any) -> list[store.Change]:  # noqa: ANN401 - passed on
    """Update with the usual build, machine and date."""
    given_: dict[str, Any] = {"build": BUILD, "machine": MACHINE, "recorded": RECORDED} | over
    return update(path, measured=measured, **given_)


def speed(launches: list[list[float]]) -> dict[str, Measured]:
    """One case with decode speeds only."""
    return {CASE: Measured(PRINT, {"decode_tps": launches})}


def document() -> dict[str, Any]:
    """A valid file as JSON values."""
    entry = {"unit": "tok/s", "better": "higher", "launches": [[69.5, 70]], "value": 69.75}
    return {
        "schema": 1,
        "build": dict(BUILD),
        "machine": dict(MACHINE),
        "recorded": dict(RECORDED),
        "results": {CASE: {"decode_tps": entry}},
        "fingerprints": {CASE: dict(PRINT)},
    }


@st.composite
def baselines(draw: st.DrawFn) -> Baseline:
    """Any measured baseline."""
    results = {}
    for case in draw(st.lists(CASES, max_size=3, unique=True)):
        metrics = {}
        for name in draw(st.lists(METRIC_NAMES, max_size=3, unique=True)):
            launches = tuple(map(tuple, draw(LAUNCHES)))
            metric = METRICS[name]
            metrics[name] = Recorded(metric.unit, metric.better, launches, draw(NUMBERS))
        results[case] = metrics
    fingerprints = {
        case: draw(st.dictionaries(st.text(max_size=8), SCALARS, max_size=3)) for case in results
    }
    return Baseline(BUILD, MACHINE, RECORDED, results, fingerprints)


@given(baselines())
def test_store_and_load_are_inverse(baseline: Baseline) -> None:
    """What was dumped is loaded, and dumping that gives the same text."""
    text = dump(baseline)
    loaded = parse(text, Path("x.json"))
    assert dump(loaded) == text
    assert parse(dump(loaded), Path("x.json")) == loaded
    assert loaded.fingerprints == baseline.fingerprints


@given(st.dictionaries(CASES, st.dictionaries(LAUNCHED, LAUNCHES, max_size=3), max_size=3))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
def test_updating_twice_is_updating_once(
    tmp_path: Path, measured: dict[str, dict[str, list[list[float]]]]
) -> None:
    """The second of two equal updates changes nothing, not a byte of the file."""
    path = tmp_path / "twice" / "m.json"
    path.unlink(missing_ok=True)
    entries = {case: Measured({}, metrics) for case, metrics in measured.items()}
    first = record(path, entries)
    before = path.read_bytes() if first else b""
    assert record(path, entries) == []
    assert path.exists() == bool(first)
    assert not first or path.read_bytes() == before


def test_the_text_is_for_people(path: Path) -> None:
    """Keys are sorted, a launch takes a line, floats have six digits, whole numbers all."""
    numbers = [[1 / 3, 1e-7 / 3, 70.0, 1234567.0, 5]]
    record(path, {CASE: Measured({"b": 1, "a": 0.123456789}, {"decode_tps": numbers})})
    text = path.read_text()
    assert "[0.333333, 3.33333e-08, 70.0, 1234567.0, 5]\n" in text
    assert '"a": 0.123456789,\n      "b": 1\n' in text
    keys = ["build", "fingerprints", "machine", "recorded", "results", "schema"]
    assert list(json.loads(text)) == keys
    assert text.endswith("}\n")


def test_a_first_update_makes_the_file(path: Path) -> None:
    """Folder and file are made, with the median of the launch medians as value."""
    changes = record(path, speed(TWO))
    entry = load(path).results[CASE]["decode_tps"]
    assert entry.launches == ((68.0, 70.25), (71.0, 71.5))
    assert entry.value == pytest.approx((69.125 + 71.25) / 2, rel=1e-5)
    assert changes == [store.Change(CASE, "decode_tps", None, entry.value, 0, 2, replaced=False)]
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_an_update_appends(path: Path) -> None:
    """New launches come after the old ones; the rest of the file stays; the date is new."""
    other = {"d/long": Measured({}, {"vram_mib": [[800]]})}
    record(path, speed(ONE) | other)
    changes = record(path, speed(TWO), recorded=RECORDED | {"at": "2026-03-01"})
    baseline = load(path)
    assert baseline.results[CASE]["decode_tps"].launches == tuple(map(tuple, ONE + TWO))
    assert [(c.launches_before, c.launches_after, c.replaced) for c in changes] == [(1, 3, False)]
    assert baseline.results["d/long"]["vram_mib"].launches == ((800,),)
    assert baseline.recorded["at"] == "2026-03-01"


def test_held_launches_are_not_added_again(path: Path) -> None:
    """Of launches that grew since the last update only the new ones are added."""
    record(path, speed(TWO[:1]))
    record(path, speed(TWO))
    assert load(path).results[CASE]["decode_tps"].launches == tuple(map(tuple, TWO))


def test_equal_sizes_of_new_launches_count(path: Path) -> None:
    """Sizes repeat from launch to launch: whether a launch is new its timings tell."""
    for launches in (TWO, [[65.0, 66.0]]):
        sizes = [[8123.0] for _ in launches]
        entry = Measured(PRINT, {"decode_tps": launches, "vram_mib": sizes})
        record(path, {CASE: entry})
        assert record(path, {CASE: entry}) == []
    assert load(path).results[CASE]["vram_mib"].launches == ((8123.0,),) * 3


def test_a_metric_added_later(path: Path) -> None:
    """A metric that the case had not is taken from launches that are already held."""
    record(path, speed(TWO))
    both = Measured(PRINT, {"decode_tps": TWO, "ttft_ms": [[9.0], [8.0]]})
    assert [change.metric for change in record(path, {CASE: both})] == ["ttft_ms"]


def test_another_fingerprint_replaces_the_case(path: Path) -> None:
    """Launches under other conditions go, and so do metrics not measured again."""
    both = Measured(PRINT, {"decode_tps": TWO, "ttft_ms": [[9.0]]})
    record(path, {CASE: both, "d/long": both})
    changes = record(path, {CASE: Measured(PRINT | {"n_ctx": 8192}, {"decode_tps": ONE})})
    assert changes == [
        store.Change(CASE, "decode_tps", 70.1875, 69.8, 2, 1, replaced=True),
        store.Change(CASE, "ttft_ms", 9.0, None, 1, 0, replaced=True),
    ]
    baseline = load(path)
    assert list(baseline.results[CASE]) == ["decode_tps"]
    assert baseline.fingerprints[CASE]["n_ctx"] == 8192
    assert set(baseline.results["d/long"]) == {"decode_tps", "ttft_ms"}


def test_true_is_not_one(path: Path) -> None:
    """A fingerprint with 1 where there was true is another fingerprint."""
    record(path, speed(ONE))
    other = {CASE: Measured(PRINT | {"flash_attn": 1}, {"decode_tps": ONE})}
    assert record(path, other)[0].replaced


def test_only_the_newest_launches_are_kept(path: Path) -> None:
    """Above twenty launches the oldest go, and doing it again changes nothing."""
    launches = [[float(n)] for n in range(1, 26)]
    for _ in range(2):
        record(path, speed(launches[:5]), most_launches=20)
        record(path, speed(launches), most_launches=20)
        held = load(path).results[CASE]["decode_tps"].launches
        assert held == tuple(map(tuple, launches[5:]))
        assert record(path, speed(launches)) == []
        path.unlink()


def one_pass(chunks: int, more: float = 0.0, tokens: int = 256) -> dict[str, Measured]:
    """One case with a pass over a corpus."""
    tail = [[more + 1 + n, more + 0.5] for n in range(chunks)]
    means = [[more + 2.0 ** (n % 2)] for n in range(chunks)]
    metrics = {"ppl": means, "kld_mean": [[-1e-5], *means[1:]], "kld_p999": tail}
    return {CORPUS: Measured({"tokens": tokens}, metrics)}


def test_a_pass_is_recorded_whole(path: Path) -> None:
    """All of its chunks, more than launches are kept; the values are those of the whole pass."""
    changes = record(path, one_pass(30), most_launches=20)
    assert [(c.metric, c.launches_before, c.launches_after) for c in changes] == [
        ("kld_mean", 0, 30),
        ("kld_p999", 0, 30),
        ("ppl", 0, 30),
    ]
    held = load(path).results[CORPUS]
    assert held["ppl"].launches == ((1.0,), (2.0,)) * 15
    assert held["ppl"].value == pytest.approx(2**0.5, rel=1e-5)
    assert held["kld_mean"].value == pytest.approx(44 / 30, rel=1e-5)
    for name, entry in held.items():
        assert entry.launches is not None
        value = pooled(METRICS[name], entry.launches, 256)
        assert entry.value == pytest.approx(value, rel=1e-5)
    before = path.read_bytes()
    assert record(path, one_pass(30)) == []
    assert path.read_bytes() == before


def test_a_pass_replaces_the_one_before(path: Path) -> None:
    """As a whole, in the order of the text; what was not measured again stays."""
    record(path, one_pass(6))
    backwards = {name: chunks[::-1] for name, chunks in one_pass(6)[CORPUS].metrics.items()}
    changes = record(path, {CORPUS: Measured({"tokens": 256}, {"ppl": backwards["ppl"]})})
    assert [(c.metric, c.replaced) for c in changes] == [("ppl", False)]
    assert load(path).results[CORPUS]["ppl"].launches == ((2.0,), (1.0,)) * 3
    record(path, one_pass(4, more=1.0))
    held = load(path).results[CORPUS]
    assert {len(entry.launches or ()) for entry in held.values()} == {4}
    assert record(path, one_pass(4, more=1.0, tokens=128))[0].replaced


def test_a_pass_beside_launches(path: Path) -> None:
    """Launches of the same case gather as ever, though there are as many of them as chunks."""
    for n in range(3):
        speeds = [[float(n)], [n + 0.5]]
        entry = Measured({"tokens": 9}, {"decode_tps": speeds, "ppl": [[3.0], [4.0 + n]]})
        record(path, {CORPUS: entry})
        assert record(path, {CORPUS: entry}) == []
    held = load(path).results[CORPUS]
    assert len(held["decode_tps"].launches or ()) == 6
    assert held["ppl"].launches == ((3.0,), (6.0,))


def test_published_figures_are_not_overwritten(path: Path) -> None:
    """Measured launches do not go into a file of published figures."""
    data = document()
    data["recorded"]["by"] = "published"
    data["results"][CASE]["decode_tps"]["launches"] = None
    write_atomic(path, json.dumps(data))
    assert load(path).published
    with pytest.raises(BaselineError, match="choose another label or delete"):
        record(path, speed(ONE))
    assert json.loads(path.read_text()) == data


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"build": BUILD | {"sha256": "ff"}}, r"\$\.build\.sha256: the file holds '00'"),
        ({"build": BUILD | {"number": 1}}, r"\$\.build\.number: the file holds 8149"),
        ({"machine": MACHINE | {"key": "h200"}}, r"\$\.machine\.key: the file holds 'rtx-5080'"),
        ({"recorded": RECORDED | {"by": "published"}}, "measured launches only"),
        ({"build": {"number": 1}}, "key 'label' is missing"),
        ({"build": BUILD | {"label": "../x"}}, r"\$\.build\.label: baseline name"),
    ],
)
def test_what_does_not_belong_together_is_not_mixed(
    path: Path, over: dict[str, Any], message: str
) -> None:
    """Another build, another machine or another kind of figure is refused."""
    record(path, speed(ONE))
    before = path.read_bytes()
    with pytest.raises(BaselineError, match=message):
        record(path, speed(TWO), **over)
    assert path.read_bytes() == before


def test_an_unknown_hash_is_no_other_hash(path: Path) -> None:
    """Where one side does not know the hash, the build may be the same."""
    record(path, speed(ONE))
    assert record(path, speed(TWO), build=BUILD | {"sha256": None})


@pytest.mark.parametrize(
    ("measured", "message"),
    [
        ({"c7": Measured({}, {"decode_tps": [[1.0]]})}, "expected CONFIG/WORKLOAD"),
        ({CASE: Measured({}, {"speed": [[1.0]]})}, "no metric has this name: known are .*compute"),
        ({CASE: Measured({}, {"decode_tps": []})}, "expected at least one entry"),
        ({CASE: Measured({}, {"decode_tps": [[]]})}, "expected at least one entry"),
        ({CASE: Measured({}, {"decode_tps": [[float("nan")]]})}, "expected a finite number"),
        ({CASE: Measured({"a": None}, {})}, r"fingerprint\.a: expected a string, number"),  # type: ignore[dict-item]
        ({CASE: Measured({}, {"ppl": [[2]]})}, r"fingerprint\.tokens: ppl needs the number of sc"),
        ({CASE: Measured({"tokens": True}, {"ppl": [[2]]})}, r"of a chunk, got True"),
        ({CASE: Measured({"tokens": 9}, {"ppl": [[2, 3]]})}, r"ppl: cannot be recorded: chunk 1 w"),
        ({CASE: Measured({"tokens": 9}, {"kld_p999": [[-1]]})}, r"chunk 1 with a value of -1"),
        ({CASE: Measured({"tokens": 9}, {"kld_max": [[1]]})}, r"kld_max: is only published, rec"),
    ],
)
def test_what_cannot_be_stored_is_refused(
    path: Path, measured: dict[str, Measured], message: str
) -> None:
    """A bad case, metric, sample or fingerprint is refused before the file is touched."""
    with pytest.raises(BaselineError, match=message):
        record(path, measured)
    assert not path.exists()


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (["schema"], 2, r"\$\.schema: 2 is not known, this version reads schema 1"),
        (["schema"], True, r"\$\.schema: True is not known"),
        (["extra"], 1, r"\$\.extra: unknown key"),
        (["build"], [], r"\$\.build: expected an object, got list"),
        (["build", "label"], ".hidden", r"\$\.build\.label: baseline name '\.hidden'"),
        (["build", "label"], 3, r"\$\.build\.label: expected a string"),
        (["build", "number"], "8149", r"\$\.build\.number: expected a whole number"),
        (["build", "commit"], 3, r"\$\.build\.commit: expected a string or null"),
        (["build", "colour"], "red", r"\$\.build\.colour: unknown key"),
        (["machine", "key"], "a/b", r"\$\.machine\.key: baseline name 'a/b'"),
        (["machine", "gpu"], "RTX", r"\$\.machine\.gpu: expected a list"),
        (["machine", "gpu"], [3], r"\$\.machine\.gpu\[0\]: expected a string or an object"),
        (["machine", "gpu"], [{"a": []}], r"\$\.machine\.gpu\[0\]\.a: expected a string, number"),
        (["recorded", "at"], "yesterday", r"\$\.recorded\.at: expected an ISO date"),
        (["recorded", "at"], 20260227, r"\$\.recorded\.at: expected an ISO date"),
        (["recorded", "by"], "guessed", r"\$\.recorded\.by: expected 'measured' or 'published'"),
        (["recorded", "by"], "published", r"launches: a published figure has null here"),
        (["results", "c7"], {}, r"\$\.results\.c7: case 'c7': expected CONFIG/WORKLOAD"),
        (["results", CASE], [], r"\$\.results\['c7/short'\]: expected an object"),
        (["results", CASE, "speed"], {}, r"\['c7/short'\]\.speed: no metric has this name"),
        (["results", CASE, "decode_tps", "unit"], "ms", r"unit: decode_tps has 'tok/s', got 'ms'"),
        (["results", CASE, "decode_tps", "better"], "lower", r"better: decode_tps has 'higher'"),
        (["results", CASE, "decode_tps", "launches"], None, "launches: measured needs launches"),
        (["results", CASE, "decode_tps", "launches"], [[]], r"launches\[0\]: expected at least"),
        (["results", CASE, "decode_tps", "launches"], [["1"]], r"launches\[0\]\[0\]: expected a n"),
        (["results", CASE, "decode_tps", "launches"], [3], r"launches\[0\]: expected a list"),
        (["results", CASE, "decode_tps", "value"], True, r"value: expected a number, got True"),
        (["results", CASE, "decode_tps", "value"], 10**400, "value: expected a finite number"),
        (["fingerprints", "d/long"], {}, r"\['d/long'\]: results have no such case"),
        (["fingerprints", CASE, "a"], [], r"\['c7/short'\]\.a: expected a string, number"),
    ],
)
def test_bad_files_are_refused(keys: list[str], value: object, message: str) -> None:
    """What schema 1 does not allow is refused with the file and the path inside it."""
    data = document()
    inner = data
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    with pytest.raises(BaselineError, match=message) as caught:
        parse(json.dumps(data), Path("dir/x.json"))
    assert str(caught.value).startswith("dir/x.json: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["schema", "build", "machine", "recorded", "results"])
def test_missing_keys_are_named(key: str) -> None:
    """A file without one of its parts is refused."""
    data = document()
    del data[key]
    with pytest.raises(BaselineError, match=key):
        parse(json.dumps(data), Path("x.json"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no valid JSON"),
        ("[]", "expected an object, got list"),
        ("<<<<<<< HEAD\n{}", "no valid JSON"),
        ('{"schema": NaN}', "NaN is not a finite number"),
        ('{"schema": 1, "schema": 1}', "key 'schema' occurs twice"),
        ('{"schema": 1e999}', "inf is not known"),
        ("[" * 100_000, "no valid JSON"),
    ],
)
def test_no_json_is_refused(text: str, message: str) -> None:
    """What is no JSON, or JSON that readers disagree about, is refused in one line."""
    with pytest.raises(BaselineError, match=message):
        parse(text, Path("x.json"))


def test_unreadable_files(tmp_path: Path) -> None:
    """A file that is missing or no text is refused, saying how to mend it."""
    with pytest.raises(BaselineError, match="record it with --update-baselines"):
        load(tmp_path / "none.json")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe")
    with pytest.raises(BaselineError, match="cannot be read"):
        load(tmp_path / "bytes.json")


def test_unwritable_places(tmp_path: Path) -> None:
    """A folder that cannot be made is a baseline error, not a traceback."""
    (tmp_path / "file").write_text("")
    with pytest.raises(BaselineError, match="cannot be updated"):
        record(tmp_path / "file" / "x.json", speed(ONE))


def test_a_damaged_file_is_kept(path: Path) -> None:
    """An update does not overwrite what it cannot read."""
    write_atomic(path, "{damaged")
    with pytest.raises(BaselineError, match="no valid JSON"):
        record(path, speed(ONE))
    assert path.read_text() == "{damaged"


@pytest.mark.parametrize("name", ["b8149", "b8149-cuda_13.0+x", "2026", "_a", "a" * 64])
def test_good_labels(name: str) -> None:
    """Letters, digits and four signs make a label."""
    assert validate_label(name) == name


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", ".git", "-x", "a/b", "../a", "a\\b", "a b", "a\n", "é", "a\0", "a" * 65, "a:b"],
)
def test_bad_labels(name: str) -> None:
    """Nothing that could leave the folder, hide or look like an option is a label."""
    with pytest.raises(BaselineError, match="baseline name"):
        validate_label(name)


def test_finding_baselines(tmp_path: Path) -> None:
    """A file is found by label and machine; a build spec or a way out has none."""
    made = tmp_path / "b1" / "m.json"
    write_atomic(made, "{}")
    write_atomic(tmp_path / "secret.json", "{}")
    assert find(tmp_path, "b1", "m") == made
    assert find(tmp_path, "b1", "other") is None
    for name in ("b2", "..", "../b1", "docker:image", "/", ""):
        assert find(tmp_path, name, "m") is None
    with pytest.raises(BaselineError, match=r"'\.\./\.\./m'"):
        find(tmp_path, "b1", "../../m")


def test_labels_and_the_newest(tmp_path: Path) -> None:
    """The newest has the highest number, then the latest date, on this machine."""
    entries = [
        ("b9", 9, "2026-01-01", "m"),
        ("b10", 10, "2026-01-02", "m"),
        ("b10-fit", 10, "2026-01-03", "m"),
        ("b11", 11, "2026-01-04", "other"),
        ("mine", None, "2026-12-31", "m"),
    ]
    for label, number, at, machine in entries:
        record(
            tmp_path / label / f"{machine}.json",
            speed(ONE),
            build={"label": label, "number": number},
            machine={"key": machine},
            recorded={"at": at, "by": "measured"},
        )
    write_atomic(tmp_path / ".git" / "m.json", "{}")
    (tmp_path / "empty").mkdir()
    assert labels(tmp_path) == ["b10", "b10-fit", "b11", "b9", "mine"]
    assert newest(tmp_path, "m") == "b10-fit"
    assert newest(tmp_path, "other") == "b11"
    assert newest(tmp_path, "third") is None
    assert newest(tmp_path / "none", "m") is None
    assert oldest(tmp_path, "m") == "b9"
    assert oldest(tmp_path, "third") is None
    assert labels(tmp_path / "none") == []


def test_stale_entries() -> None:
    """Cases that the suite file does not make any more are listed."""
    baseline = parse(json.dumps(document()), Path("x.json"))
    assert stale(baseline, ["c7/long"]) == [CASE]
    assert stale(baseline, [CASE, "c7/long"]) == []


def test_names_of_a_baseline() -> None:
    """The label, number and machine of a baseline are at hand."""
    baseline = parse(json.dumps(document()), Path("x.json"))
    assert (baseline.label, baseline.number, baseline.machine_key) == ("b8149", 8149, "rtx-5080")
    assert not baseline.published


def test_a_failed_write_leaves_the_old_file(path: Path) -> None:
    """Text that cannot be encoded changes nothing and leaves no litter."""
    write_atomic(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "new \ud800")
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert path.read_text() == "old"


def test_locks_stay_out_of_the_folder(path: Path, tmp_path: Path) -> None:
    """The lock lies in the cache, the same for every way to name the file; no litter stays."""
    record(path, speed(ONE))
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert lock_path(path).is_relative_to(tmp_path / "cache")
    assert lock_path(path.parent / ".." / path.parent.name / path.name) == lock_path(path)


def test_waiting_for_a_lock_ends(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock that another holds for too long is reported, with what to do."""
    monkeypatch.setattr(store, "LOCK_TIMEOUT_S", 0.0)
    with store._locked(path), pytest.raises(BaselineError, match="another process has been"):
        record(path, speed(ONE))


WRITER = """
import sys
from pathlib import Path
from pytest_llmperf.judge.store import Measured, update

path, name, first, last = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
print("ready", flush=True)
sys.stdin.readline()
for n in range(first, last):
    update(
        path,
        build={"label": "b1"},
        machine={"key": "m"},
        recorded={"at": "2026-02-27", "by": "measured"},
        measured={
            "shared/short": Measured({}, {"decode_tps": [[float(n)]]}),
            f"{name}/{n}": Measured({}, {"decode_tps": [[1.0, 2.0]]}),
        },
        most_launches=1000,
    )
    print(n, flush=True)
"""


def start(path: Path, name: str, first: int, last: int) -> subprocess.Popen[str]:
    """A process that updates the file once for each number, and waits to be told to begin."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), name, str(first), str(last)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def begin(process: subprocess.Popen[str]) -> None:
    """Tell a writer to begin."""
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def test_two_processes_lose_nothing(path: Path) -> None:
    """Two processes that update the same case at once both find all they wrote."""
    each = 25
    with start(path, "a", 1, 1 + each) as one, start(path, "b", 101, 101 + each) as two:
        begin(one)
        begin(two)
        one.communicate(timeout=60)
        two.communicate(timeout=60)
    assert (one.returncode, two.returncode) == (0, 0)
    baseline = load(path)
    launches = baseline.results["shared/short"]["decode_tps"].launches
    assert launches is not None
    expected = [float(n) for n in (*range(1, 1 + each), *range(101, 101 + each))]
    assert sorted(v for (v,) in launches) == expected
    assert len(baseline.results) == 1 + 2 * each


@pytest.mark.parametrize("updates", [1, 4, 9])
def test_a_killed_process_loses_nothing(path: Path, updates: int) -> None:
    """After SIGKILL the file is whole, holds every finished update, and can be updated."""
    with start(path, "a", 0, 100_000) as process:
        begin(process)
        assert process.stdout is not None
        for _ in range(updates):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        finished = updates + len(process.stdout.readlines())
    assert process.returncode == -signal.SIGKILL
    launches = load(path).results["shared/short"]["decode_tps"].launches
    assert launches is not None
    # The update that was under way may have got through before its number was printed.
    assert len(launches) in (finished, finished + 1)
    assert record_small(path)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def record_small(path: Path) -> list[store.Change]:
    """One more update of the file that the writers share."""
    return update(
        path,
        build={"label": "b1"},
        machine={"key": "m"},
        recorded={"at": "2026-02-28", "by": "measured"},
        measured={"after/short": Measured({}, {"decode_tps": [[5.0]]})},
    )


def test_litter_of_a_killed_process_is_removed(path: Path) -> None:
    """A half-written file that a killed process left goes with the next update."""
    record(path, speed(ONE))
    litter = path.with_name(f".{path.name}.0123456789ab.tmp")
    litter.write_text("{half")
    record(path, speed(TWO))
    assert not litter.exists()


def test_the_largest_numbers_have_a_median(path: Path) -> None:
    """Absurd as they are, what was measured is written or refused, never a traceback."""
    largest = 8.98847e307
    record(path, {CASE: Measured({}, {"compute_mib": [[largest, largest]]})})
    assert store.load(path).results[CASE]["compute_mib"].value == largest


# --- Failures ---------------------------------------------------------------------------------

FAILED = Failure("oom", "CUDA0 model buffer of 8984 MiB")


def oom(fingerprint: dict[str, str | int | float | bool] = PRINT) -> dict[str, Measured]:
    """One case that runs out of memory."""
    return {CASE: Measured(fingerprint, {}, FAILED)}


def test_a_failure_is_recorded_and_read(path: Path) -> None:
    """In the place of results; what is recorded twice is recorded once."""
    [change] = record(path, oom())
    assert (change.case, change.metric, change.failed) == (CASE, "", FAILED.words)
    baseline = load(path)
    assert baseline.failures == {CASE: FAILED}
    assert (baseline.results, baseline.fingerprints) == ({}, {CASE: PRINT})
    assert dump(baseline) == path.read_text("utf-8")
    assert record(path, oom()) == []
    assert stale(baseline, []) == [CASE]


def test_results_take_the_place_of_a_failure(path: Path) -> None:
    """What works is no failure any more."""
    record(path, oom())
    record(path, speed(ONE))
    baseline = load(path)
    assert baseline.failures == {}
    assert baseline.results[CASE]["decode_tps"].launches == tuple(map(tuple, ONE))
    assert '"failures"' not in path.read_text("utf-8")


def test_a_failure_takes_the_place_of_results_of_other_conditions(path: Path) -> None:
    """Each metric that goes is told."""
    record(path, speed(ONE))
    gone, failed = record(path, oom({**PRINT, "n_ctx": 65536}))
    assert (gone.metric, gone.new, gone.replaced) == ("decode_tps", None, True)
    assert failed.failed == FAILED.words
    assert load(path).results == {}


def test_a_failure_does_not_wipe_what_was_measured_alike(path: Path) -> None:
    """Memory was short for another reason then; the prompt is not known of what failed."""
    record(path, {CASE: Measured({**PRINT, "prompt": "abc"}, {"decode_tps": ONE})})
    before = path.read_text("utf-8")
    with pytest.raises(
        BaselineError, match=r"now it runs out of memory \(CUDA0 .* delete the case"
    ):
        record(path, oom({**PRINT, "prompt": "unknown"}))
    assert path.read_text("utf-8") == before


def test_what_only_answers_tell_is_not_of_the_conditions(path: Path) -> None:
    """Where the GPU memory was read, tokens, a reference: unknown of a case that failed."""
    told = {**PRINT, "vram": "by the log", "tokens": 128, "reference": "ab"}
    record(path, {CASE: Measured(told, {"decode_tps": ONE})})
    before = path.read_text("utf-8")
    with pytest.raises(BaselineError, match="under the same conditions"):
        record(path, oom())
    assert path.read_text("utf-8") == before


def test_a_limit_is_of_the_conditions_of_what_was_too_slow(path: Path) -> None:
    """Another one is recorded anew; launches stay, whatever the limit was."""
    slow = Failure("too-slow", "given up")
    record(path, {CASE: Measured({**PRINT, "limit": 60.0}, {}, slow)})
    assert record(path, {CASE: Measured({**PRINT, "limit": 60.0}, {}, slow)}) == []
    assert len(record(path, {CASE: Measured({**PRINT, "limit": 90.0}, {}, slow)})) == 1
    assert load(path).fingerprints[CASE]["limit"] == 90.0
    record(path, speed(ONE))
    with pytest.raises(BaselineError, match="it is too slow"):
        record(path, {CASE: Measured({**PRINT, "limit": 60.0}, {}, slow)})


@pytest.mark.parametrize(
    ("failures", "message"),
    [
        ({CASE: {"kind": "slow", "what": "x"}}, "kind: expected one of 'oom', 'too-slow'"),
        ({CASE: {"kind": "oom", "what": " "}}, "what: expected what ran out"),
        ({CASE: {"kind": "oom"}}, "key 'what' is missing"),
        ({CASE: {"kind": "oom", "what": "x", "mib": 1}}, "unknown key"),
        ({"c7": {"kind": "oom", "what": "x"}}, "expected CONFIG/WORKLOAD"),
        ({CASE: "oom"}, "expected an object"),
        ([], "expected an object"),
    ],
)
def test_a_bad_failure_is_refused(path: Path, failures: object, message: str) -> None:
    """With file and place."""
    record(path, oom())
    data = json.loads(path.read_text("utf-8")) | {"failures": failures, "fingerprints": {}}
    with pytest.raises(BaselineError, match=message):
        parse(json.dumps(data), path)


def test_a_case_was_measured_or_failed(path: Path) -> None:
    """Not both."""
    record(path, speed(ONE))
    data = json.loads(path.read_text("utf-8"))
    data["failures"] = {CASE: {"kind": "oom", "what": "x"}}
    with pytest.raises(BaselineError, match="results have this case too"):
        parse(json.dumps(data), path)


def test_only_known_failures_are_recorded(path: Path) -> None:
    """Refused before the file is touched."""
    with pytest.raises(BaselineError, match="expected one of"):
        record(path, {CASE: Measured(PRINT, {}, Failure("crash", "x"))})
    assert not path.exists()
