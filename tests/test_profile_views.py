"""Views of a profile: an HTML page that needs nothing else, Markdown, JUnit, a trace."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from unittest.mock import Mock
from xml.etree import ElementTree

import pytest

from helpers import run
from moe2edge.evaluation.profile import measure
from moe2edge.evaluation.profile.document import ProfileSetDocument
from moe2edge.evaluation.profile.measure import profile_folders
from moe2edge.evaluation.profile.settings import ProfileSettings
from moe2edge.evaluation.profile.views.charts import draw_cells, draw_lines
from moe2edge.evaluation.profile.views.junit import build_junit
from moe2edge.evaluation.profile.views.markdown import COMMENT_MARKER, build_markdown
from moe2edge.evaluation.profile.views.page import SECTIONS, build_page
from moe2edge.evaluation.profile.views.trace import build_trace
from moe2edge.testing import make_checkpoint

PROMPTS = [[1 + (7 * n + i) % 90 for i in range(16)] for n in range(3)]
MIB = 2**20
ODD = "a <b> | \x07 & 'c'"


def answer(request: dict[str, Any], _: ProfileSettings) -> dict[str, Any]:
    """Answer in place of a process."""
    slow = request["folder"].endswith("b")
    if request.get("explain"):
        samples = [
            {"t_s": n / 10, "phase": phase, "rss": 90 * MIB, "rss_anon": 60 * MIB,
             "rss_file": 30 * MIB}
            for n, phase in enumerate(("import", "load", "decode", "after"))
        ]  # fmt: skip
        call = {"op": "QMoE", "kind": "experts", "layer": 1, "begin_ms": 0.5, "ms": 2.0}
        decode = {
            "phase": "decode", "tokens": 2, "ms": 10.0, "by_kind": {"experts": 6.0, "gap": 4.0},
            "by_operator": [{"op": "QMoE", "calls": 2, "ms": 6.0}], "by_layer": [],
            "last_token": [call],
        }  # fmt: skip
        fell = {"node": "/l/Mul", "op": "Mul", "wanted_ep": "Fast", "got_ep": "Slow", "pct": 1.5}
        times = {"reason": None, "phases": [decode], "fallback_nodes": [fell]}
        layer = {"block": 0, "experts": 3, "hit": 2, "max_over_mean": 1.5,
                 "coefficient_of_variation": 0.8, "counts": [3, 1, 0]}  # fmt: skip
        use = {"reason": None, "tokens": 4, "coverage_pct": 66.7, "load_imbalance": 0.8,
               "layers": [layer]}  # fmt: skip
        return {
            "cold_load": {"seconds": 0.25, "state": "evicted", "resident": 0.0},
            "timeline": {"reason": None, "method": "told", "interval_s": 0.1, "samples": samples},
            "experts": use if not slow else {"reason": ODD},
            "breakdown": times if not slow else {"reason": ODD},
        }
    step, peak = (0.125, 150 * MIB) if slow else (0.1, 100 * MIB)
    reading = {"peak_rss": peak, "rss": peak, "rss_anon": peak - MIB, "rss_file": MIB,
               "pss": 7 * MIB, "private_dirty": None, "major_faults": 12}  # fmt: skip
    return {
        "import_s": 1.0, "load_s": 2.0, "first_s": 0.6, "dtype": "float32", "threads": 1,
        "note": "",
        "runs": [{"ttft_s": 0.5, "gaps_s": [step] * 2, "tokens": [1, 2, 3], "joules": None}] * 2,
        "memory": {"method": "told", "reason": None, "shares_reason": ODD,
                   "phases": {"import": reading, "decode": reading}},
        "cache_bytes": 1000, "energy_reason": ODD,
        "bandwidth": {"bytes_per_s": 1e9, "samples": [1e9], "threads": 1, "array_bytes": 1},
        "sensors": None,
    }  # fmt: skip


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the document of two folders, one of which lacks much."""
    root = tmp_path_factory.mktemp("views <i>&|")
    folders = [make_checkpoint(root / name, "olmoe") for name in "ab"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "run_child", answer)
        settings = ProfileSettings(gen_tokens=3, repeats=2, explain=True)
        found = profile_folders(folders, prompts=PROMPTS, settings=settings)
    return found.to_json()


class Page(HTMLParser):
    """Collects what a page refers to, and its headings."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []
        self.headings: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [str(v) for name, v in attrs if name in ("href", "src", "srcset", "action")]

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == "h3":
            self.headings.append(data)


def test_the_document_of_the_views_is_of_the_published_form(document: dict[str, Any]) -> None:
    ProfileSetDocument.model_validate_json(json.dumps(document))


def test_the_page_has_every_section_and_needs_nothing(document: dict[str, Any]) -> None:
    text = build_page(document)
    page = Page()
    page.feed(text)
    for heading in SECTIONS:
        assert page.headings.count(heading) == 2
    assert page.links == []
    assert not {"script", "link", "img", "iframe", "object", "b", "i"} & set(page.tags)
    assert "url(" not in text
    assert "@import" not in text
    assert "default-src 'none'" in text
    # Two bars for the kinds, a dot for each token, a cell for each expert.
    assert text.count("<circle") == 2 * 8
    assert text.count("<title>block 0, expert") == 3
    assert "60.0 %" in text
    assert text.count("<td>7.0</td><td>-</td><td>12</td>") == 2 * 2
    assert "<td>/l/Mul</td><td>Mul</td><td>Fast</td><td>Slow</td><td>1.5</td>" in text
    assert "a &lt;b&gt; | " in text
    assert "1.25 (1.25-1.25)" in text


def test_the_page_of_one_folder(document: dict[str, Any]) -> None:
    text = build_page(document["profiles"][0])
    page = Page()
    page.feed(text)
    assert page.headings == list(SECTIONS)
    assert "Ratios to the first folder" not in text


def test_charts_without_samples_and_with_too_many() -> None:
    assert "no samples" in draw_lines({"x": []}, ("a", "b"))
    assert "200 x 200 cells are not drawn" in draw_cells(
        {str(n): [1] * 200 for n in range(200)}, "e"
    )
    thin = draw_lines({"x": [(float(n), 1.0) for n in range(100_000)]}, ("a", "b"), dots=True)
    assert 1000 < thin.count("<circle") <= 2000


def test_markdown_compares_and_folds_details(document: dict[str, Any]) -> None:
    text = build_markdown(document)
    assert text.startswith(COMMENT_MARKER)
    assert "| ms_per_token | 100.0 | 125.0 (x1.25) | ms |" in text
    assert "| peak_rss_decode | 100.0 | 150.0 (x1.50) | MiB |" in text
    assert text.count("<details>") == text.count("</details>") == 2
    assert "| experts | 60.0 |" in text
    assert "a &lt;b> \\|" in text
    widths = {line.replace("\\|", "").count("|") for line in text.splitlines() if line[:1] == "|"}
    assert widths == {3, 5}


def test_junit_has_a_case_for_each_quantity(document: dict[str, Any]) -> None:
    root = ElementTree.fromstring(build_junit(document))
    suites = root.findall("testsuite")
    assert len(suites) == 2
    for suite in suites:
        cases = {case.get("name"): case for case in suite.findall("testcase")}
        assert set(cases) == set(document["profiles"][0]["metrics"])
        skipped = cases["joules_per_token"].find("skipped")
        assert skipped is not None
        assert (skipped.get("message") or "").startswith("a <b> | ")
        assert (suite.get("tests"), suite.get("skipped")) == (str(len(cases)), "2")
    shown = {p.get("name"): p.get("value") for p in suites[1].iter("property")}
    assert shown["unit"] == "token/s"


def test_the_trace_has_processes_tokens_memory_and_operators(document: dict[str, Any]) -> None:
    events = json.loads(json.dumps(build_trace(document)))["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    tokens = [event for event in spans if event["name"] == "token"]
    assert len(tokens) == 2 * 2 * 2 * 2
    assert {round(token["dur"]) for token in tokens} == {100_000, 125_000}
    (operator,) = (event for event in spans if event["name"] == "QMoE")
    assert (operator["ts"], operator["dur"], operator["args"]) == (500, 2000, {"layer": 1})
    assert sum(event["ph"] == "C" for event in events) == 2 * 4
    names = [event["args"]["name"] for event in events if event["name"] == "process_name"]
    assert "source: process 1" in names
    begins = [event["ts"] for event in spans if event["pid"] == 2]
    assert begins == sorted(begins)


def test_the_command_writes_views_and_refuses_places_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_checkpoint(tmp_path / "a", "olmoe")
    monkeypatch.setattr(measure, "cut_prompts", lambda *_: PROMPTS)
    tokenizer = Mock(return_value={"input_ids": [1]})
    monkeypatch.setattr(measure, "load_tokenizer", lambda _: tokenizer)
    asked: list[bool] = []

    def reply(request: dict[str, Any], settings: ProfileSettings) -> dict[str, Any]:
        asked.append(bool(request.get("explain")))
        return answer(request, settings)

    monkeypatch.setattr(measure, "run_child", reply)
    files = {name: tmp_path / f"p.{name}" for name in ("output", "report", "trace", "junit")}
    options = [part for name, path in files.items() for part in (f"--{name}", path)]
    sizes = ("--preset", "quick", "--prompt-tokens", 16, "--gen-tokens", 3)
    result = run("profile", folder, *sizes, *options, "--markdown", tmp_path / "p.md")
    assert result.exit_code == 0, result.output
    assert asked == [True, False]  # a report shows what only that process finds
    assert files["report"].read_text("utf-8").startswith("<!doctype html>")
    assert json.loads(files["output"].read_text("utf-8"))["kind"] == "moe2edge.profile"
    assert json.loads(files["trace"].read_text("utf-8"))["traceEvents"]
    assert (tmp_path / "p.md").read_text("utf-8").startswith(COMMENT_MARKER)
    asked.clear()
    for place, said in (
        (tmp_path / "none" / "r.html", "does not exist; make it first"),
        (tmp_path / "a", "is a folder; name a file in it"),
    ):
        result = run("profile", folder, "--report", place)
        assert (result.exit_code, asked) == (2, [])
        assert said in result.stderr
    result = run("profile", folder, "--report", tmp_path / "x", "--trace", tmp_path / "x")
    assert (result.exit_code, asked) == (2, [])
    assert "give each a file of its own" in result.stderr


CHROMIUM = next(
    (found for name in ("chromium-headless-shell", "chromium", "google-chrome")
     if (found := shutil.which(name))),
    None,
)  # fmt: skip


def show_in_chromium(page: Path) -> tuple[bytes, list[str], set[str], str]:
    """Open a page in Chromium; return a picture, headings, URLs asked for, and console lines."""
    picture, log = page.with_suffix(".png"), page.with_suffix(".net")
    done = subprocess.run(
        [
            str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            "--disable-background-networking", "--disable-component-update",
            f"--user-data-dir={page.with_suffix('.user')}", f"--screenshot={picture}",
            f"--log-net-log={log}", "--enable-logging=stderr", "--window-size=1000,3000",
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    asked = set(re.findall(r'"url":"([^"]*)"', log.read_text("utf-8", errors="replace")))
    lines = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    shown = Page()
    shown.feed(done.stdout)
    return picture.read_bytes(), shown.headings, asked, "\n".join(lines)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_chromium_shows_the_page_without_network_or_errors(
    document: dict[str, Any], tmp_path: Path
) -> None:
    page, other = tmp_path / "page.html", tmp_path / "other.html"
    page.write_text(build_page(document), "utf-8")
    picture, headings, asked, console = show_in_chromium(page)
    assert len(picture) > 20_000
    assert headings == [*SECTIONS, *SECTIONS]
    assert (asked, console) == (set(), "")
    # What this would have seen.
    other.write_text("<img src=http://127.0.0.1:9/x><script>console.log('hi')</script>", "utf-8")
    _, _, asked, console = show_in_chromium(other)
    assert asked == {"http://127.0.0.1:9/x"}
    assert "hi" in console
