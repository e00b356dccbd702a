"""The report, made of invented sweeps: what it shows, that it loads no torch, and that a browser displays it."""

from __future__ import annotations

import csv
import errno
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from elastic.cli import main
from elastic.files import write_text
from elastic.reporting import plots
from elastic.reporting.contents import Model, rank_correlation, ranked
from elastic.reporting.report import report
from elastic.reporting.results import SweepFolder

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
TEXT = [
    ["perplexity_ratio", "perplexity over the teacher's", "lower"],
    ["kl", "KL to the teacher (nats per token)", "lower"],
]
IMAGES = [["top1", "top-1 accuracy", "higher"], ["kl", "KL to the teacher (nats per image)", "lower"]]
PIXEL = "data:image/webp;base64,UklGRhoAAABXRUJQVlA4TA0AAAAvAAAAEAcQERGIiP4HAA=="
WORDS = ("The", "routers", "of", "a", "model", "learn", "which", "<b>parts</b>", "an", "input", "needs", "&", "why")


def write_sweep(
    folder: Path, model: str = "tiny", family: str = "llm", presets: tuple[str, ...] = ("default",)
) -> Path:
    """Write a sweep of two seeds at three budgets, with baselines; quality falls with the budget. Return its folder."""
    draw = random.Random(f"{model} {presets}")
    sweep = SweepFolder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    places = [(p, s, c, b) for p in presets for s in (0, 1) for c in (1.0, 0.75, 0.5) for b in (None, "random")]
    for number, (preset, seed, budget, baseline) in enumerate(places):
        if budget == 1 and baseline is not None:
            continue
        lost = (1 - budget) * (3 if baseline else 1) * (1 + presets.index(preset)) + 0.01 * seed * (budget < 1)
        text = family == "llm"
        quality = {"perplexity_ratio": math.exp(3 * lost)} if text else {"top1": 0.9 - 0.2 * lost, "teacher_top1": 0.9}
        row = {
            **{"model": model, "family": family, "preset": preset, "phase": "decode" if text else "prefill"},
            **{"compute_target": budget, "data": "held-out data", "compute": budget + 0.002 * seed, **quality},
            **({"compute_prefill": 1.02} if text else {}),
            **{"kl": lost**2, "tokens": 640, "run": f"runs/{Path(model).name}-{preset}-0.5-1.0-seed{seed}"},
            **{"baseline": baseline, "seed": seed, "trained_for": "0.5:1.0", "metrics": TEXT if text else IMAGES},
            **{"bench": None, "train_seconds": 61.5, "train_steps": 40, "command": "elastic sweep --output 'a <b>'"},
            **{"measured_at": f"2025-01-01T00:{number:02}:00+00:00", "versions": {"python": "3.11", "torch": "2.14"}},
            "machine": {"platform": "Linux", "processor": "Test & Co", "threads": 2},
        }
        if baseline is None:
            timing = {"predicted_speedup": 1 / budget, "measured_speedup": 0.9 / budget, "seconds": 0.01 * budget}
            row["bench"] = [{"phase": p, "batch": 1, "tokens": 128, **timing} for p in ("prefill", "decode", "train")]
            run = folder / row["run"]
            run.mkdir(parents=True, exist_ok=True)
            (run / "config.yaml").write_text(f"model: {model}\npreset: {preset}\n")
        if baseline is None and budget < 1:
            blocks = [[budget + draw.uniform(-0.2, 0.2) for _ in range(2)] for _ in range(12)]
            tokens = [[draw.randrange(1000) for _ in range(32)] for _ in range(12)]
            example = {"pieces": [[f" {draw.choice(WORDS)}", draw.uniform(0.3, 1)] for _ in range(150)]}
            if not text:
                example = {"original": PIXEL, "image": PIXEL, "compute": budget}
            details = {"phase": row["phase"], "sample": "0", "branches": ["attention", "MLP"], "blocks": blocks}
            details["outside"] = {"LM head": 0.25 + budget / 2} if text else {}
            path = sweep.details(row)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({**details, "tokens": tokens, "examples": [example] * (1 if text else 6)}))
        sweep.append(row)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of two presets, of which a point failed, and another that has been made since."""
    folder = write_sweep(tmp_path_factory.mktemp("sweeps") / "text", presets=("default", "other"))
    run = "runs/tiny-default-0.5-1.0-seed0"
    SweepFolder(folder).fail([(run, 0.5, None, "held-out data"), (run, 0.1, "random", "held-out data")], "out of <air>")
    return folder


@pytest.fixture(scope="module")
def page(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a report of two sweeps, one of a language model, which is named three times, and one of an image
    model."""
    images = write_sweep(tmp_path_factory.mktemp("sweeps") / "images", model="org/vit", family="vit")
    output = tmp_path_factory.mktemp("report") / "report.html"
    link = output.with_name("link")
    link.symlink_to(folder)
    assert main(["report", *map(str, (folder, images, f"{folder}/", link)), "-o", str(output)]) == 0
    return output


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave all plots empty, for tests of what else a report says."""
    for name in ("curves", "heat"):
        monkeypatch.setattr(plots, name, lambda *_, **__: "<svg></svg>")


VOID = {"meta", "img"}
"""HTML elements without an end tag."""


class Elements(HTMLParser):
    """A parser that lists a page's start tags with their attributes (`found`) and those not ended yet (`open`)."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def test_the_page_stands_alone(page: Path):
    text = page.read_text()
    elements = Elements(text)
    assert elements.open == [] and len(text) < 3e6
    for tag, attributes in elements.found:
        assert tag not in ("script", "link", "iframe")
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:"))
    ids = [attributes["id"] for _, attributes in elements.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {attributes["href"][1:] for attributes in elements.all("a")}
    assert targets <= set(ids) and "content" in targets


def test_what_is_seen_is_said_in_words(page: Path):
    elements = Elements(page.read_text())
    plots = elements.all("svg")
    # for text: two metrics, two phases, two presets; for images: two metrics, two phases, one preset
    assert len(plots) == 6 + 5
    assert all(plot["role"] == "img" and len(plot["aria-label"]) > 20 for plot in plots)
    assert all(image["alt"] for image in elements.all("img")) and len(elements.all("img")) == 6 * 3
    assert all(region["aria-label"] for region in elements.all("div") if region.get("role") == "region")
    assert elements.all("html")[0]["lang"] == "en"


def test_the_numbers_are_there(page: Path):
    text = re.sub(r"\s+", " ", page.read_text())
    ends = math.exp(1.5), math.exp(1.53)
    told = f"{sum(ends) / 2:.4f} ± {(ends[1] - ends[0]) / 2:.4f}"
    assert told in text and f"{(math.exp(4.5) + math.exp(4.53)) / 2:.1f} ± " in text
    assert "runs/tiny-other-0.5-1.0-seed1" in text and "preset: other" in text and "40 steps, 1.0 min" in text
    assert "elastic sweep --output &#39;a &lt;b&gt;&#39;" in text and "Test &amp; Co" in text and "torch 2.14" in text
    assert "<span class" in text and "LM head: 0.62 at 0.75, 0.50 at 0.5<" in text
    assert "&lt;b&gt;parts&lt;/b&gt;" in text and "<b>parts" not in text
    assert text.count("out of &lt;air&gt;") == 1 and "seed0 at 0.1, random (baseline)</dt>" in text
    assert "random (baseline of default)" in text and "random (baseline of other)" in text
    markdown, table = page.with_suffix(".md").read_text(), page.with_suffix(".csv").read_text()
    assert markdown.count("out of <air>") == 1
    assert f"| default | 0.5 | 0.501 ± 0.001 | {told} |" in markdown
    assert "![Quality of tiny against compute](report-tiny.svg)" in markdown
    rows = list(csv.DictReader(table.splitlines()))
    assert len(rows) == 20 + 10, "a folder that is named again is read once"
    assert rows[0]["perplexity_ratio"] == "1.0" and rows[-1]["top1"] == str(0.9 - 0.2 * (1.5 + 0.01))
    assert rows[2]["decode, batch 1, 128 tokens: predicted_speedup"] or rows[1]["machine threads"] == "2"


@pytest.mark.parametrize(("linear", "shown", "hidden"), [(True, "0.4", "0.01"), (False, "0.01", "0.4")])
def test_shares_are_drawn_on_a_linear_axis(linear: bool, shown: str, hidden: str):
    values = [0.01, 0.9]
    line = plots.Line("routers", [0.5, 0.9], values, values, values, style=0)
    drawn = plots.curves([plots.Panel("agreement", "compute", "", [line], linear=linear)], "agreement")
    assert f">{shown}<" in drawn and f">{hidden}<" not in drawn


@pytest.mark.parametrize("name", ["report-tiny.svg", "report-vit.svg"])
def test_plots_for_a_readme(name: str, page: Path):
    text = page.with_name(name).read_text()
    root = ElementTree.fromstring(text)
    assert root.tag.endswith("svg") and root.find("{http://www.w3.org/2000/svg}title").text.startswith("Quality of ")
    assert "prefers-color-scheme: dark" in text and "currentColor" in text and "#00f0" not in text
    words = {element.text for element in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"default", "KL to the teacher (nats per token)" if "tiny" in name else "teacher"} & words


def test_a_report_needs_no_torch(folder: Path, tmp_path: Path):
    code = "import sys; from elastic.cli import main; assert main(sys.argv[1:]) == 0; print('torch' in sys.modules)"
    command = [sys.executable, "-c", code, "report", str(folder), "-o", str(tmp_path / "report.html")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "False", result.stderr


def test_a_sweep_that_was_killed_is_reported(folder: Path, tmp_path: Path, undrawn: None):
    copy = shutil.copytree(folder, tmp_path / "sweep")
    shutil.rmtree(copy / "details")
    shutil.rmtree(copy / "runs")
    with (copy / "results.jsonl").open("a") as file:
        file.write('{"run": "runs/')
    written = report([copy], tmp_path / "report.html")
    assert [path.name for path in written] == ["report.html", "report-tiny.svg", "report.md", "report.csv"]
    text = written[0].read_text()
    assert "Where the compute goes" not in text and "(the run folder is gone)" in text


def test_the_same_sweep_twice_is_told_apart(folder: Path, tmp_path: Path):
    places = folder, shutil.copytree(folder, tmp_path / "again")
    rows = [{**row, "folder": sweep} for sweep in map(SweepFolder.open, places) for row in sweep.rows()]
    labels = [series.label for series in Model("tiny", rows).students]
    assert labels == [f"{preset}, {place}" for place in places for preset in ("default", "other")]


def test_likeness_is_a_rank_correlation():
    def compare(*tokens: list[list[int]], samples: str = "aa") -> float | None:
        return rank_correlation(
            *(ranked({"sample": name, "tokens": t}) for name, t in zip(samples, tokens, strict=True))
        )

    first = [[1, 2, 3, 4], [5, 5, 5, 5]]
    assert compare(first, first) == pytest.approx(1)
    assert compare(first, [[40, 30, 20, 0], [1, 2, 3, 4]]) == pytest.approx(-1)
    assert compare(first, [[1, 1, 2, 2], [1, 2, 3, 4]]) == pytest.approx(2 / math.sqrt(5))
    assert compare([[1, 2, 3], [1, 2, 3]], [[1, 2, 3], [3, 2, 1]]) == pytest.approx(0)
    assert compare(first, first, samples="ab") is None
    assert compare(first, [[3, 3, 3, 3], [1, 2, 3, 4]]) is None


def test_examples_that_would_burst_the_page_are_left_out(folder: Path, tmp_path: Path):
    copy = shutil.copytree(folder, tmp_path / "sweep")
    for path in copy.glob("details/tiny-other*/*.json"):
        details = json.loads(path.read_text())
        details["examples"][0]["pieces"] *= 100
        path.write_text(json.dumps(details))
    text = report([copy], tmp_path / "report.html")[0].read_text()
    assert len(text) < 1e6 and "Left out, to keep the page small" in text and '<p class="text">' in text


def test_mistakes(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "results.jsonl").write_text("")
    (tmp_path / "folder.html").mkdir()
    for arguments, message in (
        ([str(tmp_path / "missing")], "is not a sweep folder"),
        ([str(tmp_path)], "no point is finished yet"),
        ([str(folder), "-o", str(tmp_path / "report.pdf")], "ends in .html"),
        ([str(folder), "-o", str(tmp_path / "none" / "report.html")], "none is missing: make that folder first"),
        ([str(folder), "-o", str(tmp_path / "results.jsonl" / "report.html")], "results.jsonl is a file"),
        ([str(folder), "-o", str(tmp_path / "folder.html")], "it is a folder"),
    ):
        assert main(["report", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert {path.name for path in tmp_path.rglob("*")} == {"results.jsonl", "folder.html"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "results.jsonl",
            b'{"run": "runs/a", "compute_target": 1, "baseline": null, "data": "b"}\n',
            "line 1 of .*row",
        ),
        ("results.jsonl", b"\xb5\xff\n", r"line 1 of .*results.jsonl is no row of a sweep: remove it"),
        ("failures.jsonl", b"[1\n", r"failures.jsonl is damaged \(.*\): delete it"),
        ("failures.jsonl", b"[1]\n", r"failures.jsonl is damaged \(.*\): delete it"),
        ("details", b'{"blocks": [[1]], "branches": ["a", "b"]}', r"json is damaged \(its blocks have not"),
        ("details", b'{"layers": [', r"json is damaged \(.*\): delete it, and the report does without"),
    ],
)
def test_damaged_files_are_named(folder: Path, tmp_path: Path, name: str, content: bytes, message: str, undrawn: None):
    copy = shutil.copytree(folder, tmp_path / "sweep")
    for path in copy.glob("details/*/*.json") if name == "details" else [copy / name]:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        report([copy], tmp_path / "report.html")
    assert "\n" not in str(error.value) and not (tmp_path / "report.html").exists()


def test_a_place_that_cannot_be_written_is_said_before_any_work(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write wherever modes forbid it
    monkeypatch.setattr(SweepFolder, "rows", lambda _: pytest.fail("the sweep was read"))
    with pytest.raises(ValueError, match=rf"cannot write .*report\.html: {tmp_path} cannot be written to"):
        report([folder], tmp_path / "report.html")


def test_a_disk_that_is_read_only_is_said_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The error stays one line although deleting the unfinished file fails as well."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "write_text", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(OSError, match=r"cannot write .*report\.html: Read-only file system"):
        write_text(tmp_path / "report.html", "")


@pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: apt-get install chromium")
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_it_without_complaint(width: int, page: Path, tmp_path: Path):
    """Chromium logs no message and draws every plot, and the page is no wider than the window."""
    script = (
        "<script>addEventListener('load', () => { const plots = [...document.querySelectorAll('figure svg')];"
        "parent.postMessage(JSON.stringify({width: innerWidth, needed: document.documentElement.scrollWidth,"
        "plots: plots.filter(plot => plot.getBoundingClientRect().height > 100).length,"
        "lines: document.querySelectorAll('figure svg path').length}), '*') })</script></body>"
    )
    text = page.read_text().replace("default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'")
    (tmp_path / "page.html").write_text(text.replace("</body>", script))
    frame = tmp_path / "frame.html"  # a frame can be as narrow as a phone, a window cannot
    frame.write_text(
        "<!doctype html><script>onmessage = event => { document.title = event.data }</script>"
        f"<iframe src=page.html style='border: 0; width: {width}px; height: 900px'></iframe>"
    )
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--hide-scrollbars"]
    options += ["--window-size=1400,1000", f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000"]
    result = subprocess.run(
        [CHROMIUM, *options, "--dump-dom", frame.as_uri()], capture_output=True, text=True, timeout=120
    )
    assert "CONSOLE" not in result.stderr
    seen = json.loads(re.search(r"<title>(\{.*?\})</title>", result.stdout).group(1))
    assert seen["plots"] == 11 and seen["lines"] > 200
    assert (seen["width"], seen["needed"]) == (width, width)
