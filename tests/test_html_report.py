"""The HTML report: what it says, and that a browser shows it without complaint."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from support import optional
from torch import nn

from snnkernels import convert, html_report, metrics, models
from snnkernels.conversion.report import NodeReport, Report

NAUGHTY = '<script>alert("&")</script>'
VOID = {"meta", "link", "img", "wbr", "br"}


class Page(HTMLParser):
    """Open and closed tags must match; collects text, attributes and tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.stack, self.stack

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.stack and self.stack[-1] not in ("script", "style"):
            self.words.append(data)


@pytest.fixture(scope="module")
def snn() -> Any:
    torch.manual_seed(0)
    x = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return convert(models.small_cnn().eval(), x, T=4, progress=False)


@pytest.fixture(scope="module")
def full(snn: Any) -> str:
    x = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return snn.report.to_html(
        title="A network", settings={"seed": 3}, accuracy={1: 0.5, 4: 0.875}, ann=0.9375,
        operations=metrics.synaptic_operations(snn, x),
    )  # fmt: skip


def test_it_says_what_the_report_says(snn: Any, full: str) -> None:
    page = Page(full)
    text = " ".join("".join(page.words).split())
    for row in snn.report.rows:
        assert row.name in text
        assert row.action in text
    assert "A network" in text
    assert "87.5 %accuracy at T = 4, ANN 93.8 %" in text
    for note in snn.report.notes:
        assert note[1:] in text
    assert "torch" in text
    assert torch.__version__ in text
    assert "seed3" in text.replace(" ", "")
    assert "0.9 pJ an addition and 4.6 pJ a multiply-add" in text
    errors = [v for t, n, v in page.attributes if t == "td" and n == "data-value"]
    assert all(float(v) >= 0 for v in errors)


def test_nothing_is_fetched(full: str) -> None:
    page = Page(full)
    for tag, name, value in page.attributes:
        if name in ("src", "href", "srcset", "action", "data"):
            assert value.startswith("data:"), (tag, name, value[:40])
    style = re.search(r"<style>(.*?)</style>", full, re.S)
    assert style is not None
    assert "url(" not in style[1]
    assert "@import" not in style[1]
    # Inside pictures as well: names of XML vocabularies are no addresses to fetch.
    for picture in re.findall(r"data:image/svg\+xml;base64,([\w+/=]+)", full):
        svg = base64.b64decode(picture).decode()
        assert not re.search(r'href="(?!#)', svg)
        assert "<script" not in svg


def test_pictures_are_those_of_the_report(full: str) -> None:
    optional("matplotlib")
    alts = [value for tag, name, value in Page(full).attributes if (tag, name) == ("img", "alt")]
    assert alts[:4] == [
        "Accuracy against the number of steps",
        "Where the error of each layer enters",
        "How well each layer's spikes follow the ANN",
        "Energy of each layer, beside the ANN's",
    ]
    assert len(alts) == 8
    assert all(alt.startswith("Answers against activations, ") for alt in alts[4:])


def test_every_string_is_escaped() -> None:
    row = NodeReport(NAUGHTY, NAUGHTY, threshold=torch.tensor(1.0), rate=0.5, error=float("inf"))
    report = Report(NAUGHTY, 4, [row], {NAUGHTY: [1]}, [NAUGHTY])
    text = html_report.to_html(report, title=NAUGHTY, settings={NAUGHTY: NAUGHTY})
    page = Page(text)
    assert page.tags.count("script") == 1  # ours
    assert "".join(page.words).count(NAUGHTY) >= 8
    assert "∞" in text


def test_names_of_nodes_keep_their_case() -> None:
    report = Report("opi", 4, [], {"relu_1": [3]}, ["a larger T helps"])
    words = "".join(Page(html_report.to_html(report)).words)
    assert "\nrelu_1: " in words
    assert "\nA larger T helps.\n" in words


def test_without_data_there_are_no_empty_columns() -> None:
    ann = nn.Sequential(nn.Linear(2, 2), nn.ReLU()).eval()
    text = convert(ann, T=4, threshold=1.0, progress=False).report.to_html()
    heads = re.findall(r"<button[^>]*>(.*?)</button>", text)
    assert heads == ["node", "what was done", "θ"]
    assert "<img" not in text


def test_the_file_is_whole_or_not_there(snn: Any, tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "report.html"
    text = snn.report.to_html(path)
    assert path.read_text(encoding="utf-8") == text
    assert snn.report.to_html() == text  # the same report is the same page
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        snn.report.to_html(path, title="other")
    assert path.read_text(encoding="utf-8") == text
    assert os.listdir(tmp_path) == ["report.html"]
    with pytest.raises(FileNotFoundError):
        snn.report.to_html(tmp_path / "no" / "report.html")
    with pytest.raises(TypeError, match="report must be a Report"):
        html_report.to_html("report")  # type: ignore[arg-type]


def test_without_matplotlib_it_says_so(snn: Any, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    text = snn.report.to_html()
    assert "pip install matplotlib" in text
    assert "<img" not in text


# --- in a browser ---------------------------------------------------------------------------


def browser() -> str:
    """A Chromium: that of SNNKERNELS_TEST_BROWSER, which must then be there, or one on the path."""
    asked = os.environ.get("SNNKERNELS_TEST_BROWSER", "")
    names = [asked] if asked not in ("", "0", "1") else []
    names += ["chromium", "chromium-browser", "google-chrome", "chrome"]
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None or asked == "0":
        if asked not in ("", "0"):
            pytest.fail(f"SNNKERNELS_TEST_BROWSER={asked}: no {' nor '.join(names)}")
        pytest.skip("no Chromium; SNNKERNELS_TEST_BROWSER=1 makes this a failure")
    return found


PROBE = """
<script>
"use strict";
{
  const heads = [...document.querySelectorAll("table.sortable thead th")];
  const error = heads.find((h) => h.textContent === "error");
  const column = [...error.parentNode.cells].indexOf(error);
  const body = error.closest("table").tBodies[0];
  const column_of = () => [...body.rows].map((r) => r.cells[column].dataset.value ?? "");
  error.querySelector("button").click();
  const down = column_of();
  error.querySelector("button").click();
  const up = column_of();
  heads[0].querySelector("button").click();
  const names = [...body.rows].map((r) => r.cells[0].textContent);
  addEventListener("load", () => {
    const images = [...document.images].map((i) => i.complete && i.naturalWidth > 0);
    const wide = document.documentElement.scrollWidth - innerWidth;
    console.log("PROBE " + JSON.stringify({
      down, up, names, images, wide, fetched: performance.getEntriesByType("resource")
        .map((e) => e.name).filter((n) => !n.startsWith("data:")),
    }));
  });
}
</script>
</body>"""


def open_page(page: Path, tmp_path: Path, width: int, *flags: str) -> tuple[str, Path]:
    """Open a page; returns what the console said and the screenshot."""
    shot = tmp_path / f"shot{width}{len(flags)}.png"
    command = [
        browser(), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--disable-dev-shm-usage", "--hide-scrollbars", "--enable-logging=stderr",
        # Whatever a page asked of the net would fail, and be said.
        "--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=2000",
        f"--user-data-dir={tmp_path / f'profile{width}{len(flags)}'}",
        f"--window-size={width},2000", f"--screenshot={shot}", *flags, page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr, shot


@pytest.mark.parametrize(
    ("width", "dark"), [(1100, False), (1100, True), (500, False)], ids=["wide", "dark", "narrow"]
)
def test_a_browser_shows_it_without_complaint(
    full: str, tmp_path: Path, width: int, dark: bool
) -> None:
    page = tmp_path / "report.html"
    # The page allows no scripts but those in it: the probe is put in, and is one.
    page.write_text(full.replace("</body>", PROBE), encoding="utf-8")
    flags = ["--blink-settings=preferredColorScheme=0"] if dark else []
    said, shot = open_page(page, tmp_path, width, *flags)
    console = [line for line in said.splitlines() if "CONSOLE" in line]
    assert len(console) == 1, console  # the probe's: no error, no warning
    found = json.loads(re.search(r"PROBE (\{.*\})\", source", console[0])[1])  # type: ignore[index]
    assert found["fetched"] == []
    assert all(found["images"])
    assert found["wide"] <= 0  # nothing but tables scrolls sideways
    numbers = [float(v) for v in found["down"] if v]
    assert numbers == sorted(numbers, reverse=True)
    assert len(numbers) > 4
    assert [v for v in found["up"] if v] == [v for v in found["down"] if v][::-1]
    assert found["up"][-1] == found["down"][-1] == ""  # rows without an error stay below
    assert found["names"] != []
    image = optional("PIL.Image").open(shot).convert("L")
    assert image.size == (width, 2000)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).float()
    assert float(pixels.std()) > 15
    assert (float(pixels.median()) < 60) is dark
    assert shot.stat().st_size > 20_000
