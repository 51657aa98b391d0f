"""The report folder: results.json and a page that needs nothing else."""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pytest_llmperf.errors import UserError
from pytest_llmperf.judge.verdict import Outcome, Verdict
from pytest_llmperf.report.files import SCHEMA, write_report
from pytest_llmperf.report.result import Result, Side
from pytest_llmperf.report.wording import row


class Page(HTMLParser):
    """What a browser would see.

    Attributes:
        tags: Each tag with its attributes.
        text: All text between tags.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep a tag."""
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        """Keep text."""
        self.text += data


def test_both_files_are_written_into_a_new_folder(tmp_path: Path, result: Result) -> None:
    """And nothing else; anyone may read them."""
    page = write_report(tmp_path / "a" / "b", [result])
    assert page == tmp_path / "a" / "b" / "index.html"
    files = sorted(page.parent.iterdir())
    assert [path.name for path in files] == ["index.html", "results.json"]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o644}


def test_a_second_report_replaces_the_first(tmp_path: Path, result: Result) -> None:
    """The folder of a nightly run is used again."""
    write_report(tmp_path, [result])
    write_report(tmp_path, [])
    assert json.loads((tmp_path / "results.json").read_text("utf-8"))["results"] == []


def test_results_json_holds_every_result_under_its_schema(tmp_path: Path, result: Result) -> None:
    """Each as it travels, with verdicts, evidence and samples."""
    other = replace(result, case="c8/short", base=None)
    write_report(tmp_path, [result, other])
    data = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert data.keys() == {"schema", "false_regression_bound", "results"}
    assert data["schema"] == SCHEMA == 1
    assert [Result.loads(json.dumps(one)) for one in data["results"]] == [result, other]
    assert data["results"][0].keys() == {
        "nodeid",
        "case",
        "new",
        "base",
        "machine",
        "verdicts",
        "fingerprint",
        "measured",
        "options",
        "reference",
        "partial",
        "roofline",
    }


def test_the_page_shows_every_verdict_with_what_it_rests_on(
    tmp_path: Path, result: Result, verdict: Verdict
) -> None:
    """Cells, reason, node id, both commands, all logs, evidence, builds and machine."""
    page = Page(write_report(tmp_path, [result]))
    shown = [
        *row(result, verdict),
        verdict.reason,
        result.nodeid,
        result.new.command,
        *result.new.logs,
        '"alpha": 0.01',
        f"Build under test: {result.new.about}",
        "Machine: rtx-5080-16gb",
        "1 REGRESSION",
    ]
    if result.base is not None:
        shown += [result.base.command, *result.base.logs, f"Baseline: {result.base.about}"]
    assert [text for text in shown if text not in page.text] == []


def test_the_page_shows_the_roofline_and_the_gpus(
    tmp_path: Path, result: Result, roofline: dict[str, Any], card: dict[str, Any]
) -> None:
    """The share beside the decode speed, what it rests on, and a section with a line a GPU."""
    assert result.base is not None
    evil = card | {"name": "<b>card</b>"}
    told = replace(
        result,
        roofline=roofline,
        new=replace(result.new, gpu={"rate_hz": 9.8, "cards": [card, card | {"index": 1}]}),
        base=replace(result.base, gpu={"rate_hz": 9.8, "cards": [evil]}),
    )
    page = Page(write_report(tmp_path, [told, result]))
    share = "30 % of the bandwidth (34 % before)"
    assert f"61.6 tok/s{share}" in page.text
    assert f"{share}: a token reads 4.617 GB, the memory 960 GB/s (NVML: " in page.text
    assert page.text.count(share) == 2
    assert "b8156: GPU 0: NVIDIA H200, 61 % busy" in page.text
    assert "b8156: GPU 1: NVIDIA H200" in page.text
    assert "b8149: GPU 0: <b>card</b>, 61 % busy" in page.text
    tags = [tag for tag, _ in page.tags]
    assert (tags.count("h2"), tags.count("h3"), tags.count("li"), tags.count("b")) == (1, 1, 3, 0)
    assert "GPU" not in Page(write_report(tmp_path, [result])).text


def test_each_outcome_is_counted(tmp_path: Path, result: Result, verdict: Verdict) -> None:
    """The heading says how the run went."""
    passed = replace(verdict, outcome=Outcome.PASS)
    page = Page(write_report(tmp_path, [replace(result, verdicts=(passed, verdict, passed))]))
    assert "2 PASS" in page.text
    assert "1 REGRESSION" in page.text


def test_builds_and_machines_are_named_once(tmp_path: Path, result: Result) -> None:
    """However many cases they have."""
    page = Page(write_report(tmp_path, [result, replace(result, case="c8/short")]))
    assert page.text.count("Build under test: ") == 1
    assert page.text.count("Machine: ") == 1


def test_a_report_without_results_is_a_page(tmp_path: Path) -> None:
    """An empty table rather than an error."""
    assert ("table", {}) in Page(write_report(tmp_path, [])).tags


def test_the_page_needs_nothing_from_elsewhere(tmp_path: Path, result: Result) -> None:
    """No script, no reference: it opens from an artefact store, without a network."""
    page = write_report(tmp_path, [result])
    tags = Page(page).tags
    assert not {"script", "link", "img", "iframe", "object", "base"} & {tag for tag, _ in tags}
    assert not {"src", "href", "srcset", "action", "style"} & {
        a for _, found in tags for a in found
    }
    text = page.read_text("utf-8")
    assert "http:" not in text
    assert "https:" not in text
    assert "url(" not in text
    assert "@import" not in text


def test_what_was_measured_cannot_become_markup(
    tmp_path: Path, result: Result, verdict: Verdict
) -> None:
    """Names, commands and reasons come from files and servers; all are shown as they are."""
    evil = '<script>alert("1")</script>&amp;\'"><img src=x>'
    side = Side(label=evil, about=evil, command=evil, logs=(evil,))
    hostile = Result(
        nodeid=evil,
        case=evil,
        new=side,
        base=side,
        machine=evil,
        verdicts=(replace(verdict, reason=evil, evidence={evil: evil}),),
    )
    page, plain = Page(write_report(tmp_path, [hostile])), Page(write_report(tmp_path, [result]))
    assert {tag for tag, _ in page.tags} == {tag for tag, _ in plain.tags}
    # Case, reason, node id, two commands, two logs, build, baseline, machine. The evidence shows
    # it twice more, with the escapes of JSON.
    assert page.text.count(evil) == 10
    assert page.text.count(json.dumps(evil)) == 2


def test_names_of_processes_cannot_spoil_a_report(
    tmp_path: Path, result: Result, card: dict[str, Any], verdict: Verdict
) -> None:
    """Whoever chooses them: no markup, no control characters, and bytes that are no UTF-8."""
    evil = "<script>alert(1)</script>\x1b[2J\udc80"
    card |= {"foreign": [{"pid": 7, "name": evil, "mib": 5.0, "busy": None}]}
    hostile = replace(
        result,
        new=replace(result.new, gpu={"rate_hz": 10.0, "cards": [card]}),
        verdicts=(replace(verdict, reason=f"GPU 0 is shared: {evil}"),),
    )
    path = write_report(tmp_path, [hostile])
    page = Page(path)
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text.count("<script>alert(1)</script>?[2J?") == 2
    assert "\x1b" not in path.read_text("utf-8")
    read = json.loads((tmp_path / "results.json").read_text("utf-8"))["results"][0]
    assert read["new"]["gpu"]["cards"][0]["foreign"][0]["name"] == evil


def test_what_gpus_did_is_told_once_a_case(
    tmp_path: Path, result: Result, card: dict[str, Any]
) -> None:
    """However many tests gate it."""
    seen = replace(result, new=replace(result.new, gpu={"rate_hz": 10.0, "cards": [card]}))
    page = Page(write_report(tmp_path, [seen, replace(seen, nodeid="t::other")]))
    assert page.text.count("NVIDIA H200") == 1


@pytest.mark.parametrize("folder", ["file", "file/below"])
def test_a_folder_that_cannot_be_made_is_the_users_mistake(
    tmp_path: Path, result: Result, folder: str
) -> None:
    """One line with the option that named it."""
    (tmp_path / "file").touch()
    with pytest.raises(UserError) as caught:
        write_report(tmp_path / folder, [result])
    assert str(caught.value).startswith(f"--llmperf-report={tmp_path / folder}: cannot write: ")


def test_a_file_that_cannot_be_replaced_leaves_nothing_half_written(
    tmp_path: Path, result: Result
) -> None:
    """A folder stands where the page should go."""
    (tmp_path / "index.html").mkdir()
    with pytest.raises(UserError, match="cannot write: "):
        write_report(tmp_path, [result])
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["index.html", "results.json"]
