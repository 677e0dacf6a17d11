"""The documentation: its code runs, its commands parse, its links lead somewhere, it builds."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
import warnings
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import support
import torch
from support import ROOT

PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md")))
}
# A fence with its language, after comments that say how it is to be read:
#   <!-- setup ... -->        code that runs before and is not shown
#   <!-- needs: module -->    runs where that package is installed
#   <!-- not run: reason -->  does not run
_BLOCK = re.compile(
    r"^<!-- setup\n(?P<setup>.*?)-->$"
    r"|(?:^<!-- (?P<how>needs|not run): (?P<what>[^>]*?) -->\n)?"
    r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^ *```$",
    re.M | re.S,
)


@dataclass(frozen=True)
class Block:
    """A block of code, and what the page says about running it."""

    page: str
    line: int
    language: str
    code: str
    needs: str = ""
    left_out: str = ""


def blocks(page: str) -> list[Block]:
    found = []
    for m in _BLOCK.finditer(PAGES[page]):
        line = PAGES[page].count("\n", 0, m.start("setup" if m["setup"] else "code"))
        if m["setup"] is not None:
            found.append(Block(page, line, "python", m["setup"]))
            continue
        code = re.sub(rf"^{m['indent']}", "", m["code"], flags=re.M)
        needs = m["what"] if m["how"] == "needs" else ""
        left_out = m["what"] if m["how"] == "not run" else ""
        found.append(Block(page, line, m["language"], code, needs, left_out))
    return found


BLOCKS = {page: blocks(page) for page in PAGES}
WITH_PYTHON = [p for p in PAGES if any(b.language == "python" for b in BLOCKS[p])]


@pytest.mark.parametrize("page", WITH_PYTHON)
def test_python_of_a_page_runs(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From top to bottom in one namespace, as a reader would paste it."""
    if support.PURE:
        pytest.skip("SNNKERNELS_TEST_PURE=1: networks are slow in the reference")
    support.optional("sklearn")
    support.optional("matplotlib").use("agg")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "page"}
    # A dataclass looks its module up.
    monkeypatch.setitem(sys.modules, "page", type(sys)("page"))
    with torch.random.fork_rng():
        for block in BLOCKS[page]:
            if block.language != "python" or block.left_out:
                continue
            # With SNNKERNELS_TEST_ALL=1, as in CI, a package that is not there is a failure.
            if block.needs and not support.ALL and importlib.util.find_spec(block.needs) is None:
                continue
            if block.needs:  # other libraries' warnings when they are imported are theirs
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    importlib.import_module(block.needs)
            # Lines are the page's, so that a traceback leads there.
            code = "\n" * block.line + block.code
            exec(compile(code, str(ROOT / page), "exec"), namespace)


def test_what_is_not_run_says_why() -> None:
    left_out = [b for page in BLOCKS.values() for b in page if b.left_out]
    assert all(len(b.left_out) > 10 for b in left_out)
    assert len(left_out) <= 2, [(b.page, b.line, b.left_out) for b in left_out]
    run = [b for page in BLOCKS.values() for b in page if b.language == "python" and not b.left_out]
    assert len(run) > 30
    fences = sum(len(re.findall(r"^ *```", text, re.M)) for text in PAGES.values())
    seen = sum(b.code in PAGES[p] and not b.code.startswith("<") for p in PAGES for b in BLOCKS[p])
    setups = sum(text.count("<!-- setup\n") for text in PAGES.values())
    assert fences == 2 * (seen - setups), "a fence was not understood"


def commands() -> list[tuple[str, str]]:
    """Command lines in blocks that are no Python, one a line."""
    found = []
    for page, here in BLOCKS.items():
        for block in here:
            if block.language in ("", "console", "bash", "sh"):
                code = re.sub(r"\\\n\s*", "", block.code)
                lines = (line.strip().removeprefix("$ ") for line in code.splitlines())
                for line in lines:
                    found += [(page, part.strip()) for part in line.partition("#")[0].split("&&")]
    return [c for c in found if re.match(r"(\w+=\S+ )*(snnkernels|pip|python|pytest) ", c[1] + " ")]


@pytest.mark.parametrize(("page", "line"), commands())
def test_a_command_is_one(page: str, line: str) -> None:
    """Programs exist, arguments parse, files and extras that are named are there."""
    words = [w for w in shlex.split(line) if not re.fullmatch(r"[A-Z_]+=\S*", w)]
    if words[0] == "snnkernels":
        from snnkernels.cli import _parser

        if "--help" in words:
            with pytest.raises(SystemExit, match=r"^0$"):
                _parser().parse_args(words[1:])
        else:
            _parser().parse_args(words[1:])
    elif words[0] == "python" and words[1] != "-m":
        assert (ROOT / words[1]).is_file(), line
    elif words[0] == "pip":
        project = (ROOT / "pyproject.toml").read_text()
        for extras in re.findall(r"\[([\w,]+)\]", line):
            for extra in extras.split(","):
                assert re.search(rf"^{extra} = \[", project, re.M), f"{line}: no extra {extra}"
        if "-c" in words:
            assert (ROOT / words[words.index("-c") + 1]).is_file()


# ---- links ---------------------------------------------------------------------------------------

_LINK = re.compile(r"(!?)\[(?:[^\]\[]|\[[^\]]*\])*\]\(([^()\s]+)\)")


def prose(text: str) -> str:
    """A page without its code."""
    return re.sub(r"`[^`\n]+`", "`code`", _BLOCK.sub("", text))


def anchors(text: str) -> set[str]:
    """What Markdown's table of contents calls the headings of a page."""
    found = set()
    for title in re.findall(r"^#+ +(.+)$", _BLOCK.sub("", text), re.M):
        plain = re.sub(r"[`*]|\]\([^)]*\)|\[", "", title)
        slug = re.sub(r"[^\w\s-]", "", plain.lower()).strip()
        found.add(re.sub(r"[-\s]+", "-", slug))
    return found | set(re.findall(r"^::: ([\w.]+)", text, re.M))


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    folder = (ROOT / page).parent
    for picture, target in _LINK.findall(prose(PAGES[page])):
        if target.startswith(("https://", "http://", "mailto:")):
            assert re.fullmatch(r"https://[\w.-]+\.[a-z]+(/\S*)?", target), target
            continue
        path, _, anchor = target.partition("#")
        file = (folder / path).resolve() if path else ROOT / page
        assert file.is_file(), f"{target}: there is no such file"
        if picture:
            assert file.stat().st_size < 100_000, f"{target} is large for a page"
        if anchor:
            there = anchors(file.read_text(encoding="utf-8"))
            named = any(anchor.startswith(a) and anchor[len(a)] == "." for a in there if "." in a
                        if len(anchor) > len(a))  # fmt: skip
            known = anchor in there or named or _documented(anchor, there)
            assert known, f"{target}: no such heading; there are {sorted(there)}"


def _documented(anchor: str, there: set[str]) -> bool:
    """A member of a module or class that the page documents."""
    return any(a.startswith("snnkernels") and anchor.startswith(a + ".") for a in there)


# ---- the site ------------------------------------------------------------------------------------


class _Fetches(HTMLParser):
    """What a browser would fetch for a page, links to follow left out."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "link" and given.get("rel") in ("stylesheet", "icon", "preconnect", "preload"):
            self.found.append(given.get("href") or "")
        elif tag in ("script", "img", "iframe", "source", "video") and given.get("src"):
            self.found.append(given["src"] or "")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    support.optional("mkdocs")
    support.optional("material")
    support.optional("mkdocstrings")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert not re.search(r"^(WARNING|ERROR)", said, re.M), said
    return folder


@pytest.mark.slow
def test_the_site_builds_and_needs_nothing_else(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for path in pages:
        parser = _Fetches()
        parser.feed(path.read_text(encoding="utf-8"))
        assert parser.found, path
        for target in parser.found:
            assert not re.match(r"(https?:)?//", target), f"{path.name} fetches {target}"
            if not target.startswith("data:"):
                file = (path.parent / target.partition("?")[0]).resolve()
                # The page for unknown addresses has absolute ones.
                assert file.is_file() or path.name == "404.html", f"{path.name}: {target}"
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//", sheet.read_text(encoding="utf-8")), sheet


@pytest.mark.slow
def test_anchors_of_the_site(site: Path) -> None:
    """Links between pages, headings included, as the browser sees them."""
    ids = {
        path: set(re.findall(r'\bid="([^"]+)"', path.read_text(encoding="utf-8")))
        for path in site.rglob("*.html")
    }
    for path in ids:
        if path.name == "404.html":
            continue
        for target in re.findall(r'<a[^>]*\bhref="([^"]+)"', path.read_text(encoding="utf-8")):
            if re.match(r"\w+:", target):
                continue
            name, _, anchor = target.partition("#")
            file = (path.parent / name).resolve() if name else path
            file = file / "index.html" if file.is_dir() else file
            assert file.is_file(), f"{path.name}: {target}"
            if anchor and file in ids:
                assert anchor in ids[file], f"{path.name}: {target}"


@pytest.mark.slow
def test_references_show_parameters_and_links(site: Path) -> None:
    page = (site / "reference" / "neurons.html").read_text(encoding="utf-8")
    assert "v_threshold" in page
    assert ":func:" not in page
    assert ":class:" not in page
    assert 'href="neurons.html#snnkernels.PackedSpikes"' in page or (
        'href="#snnkernels.PackedSpikes"' in page
    )


def test_every_public_name_is_in_the_reference() -> None:
    import snnkernels

    pages = "\n".join(text for name, text in PAGES.items() if name.startswith("docs/reference"))
    documented = set(re.findall(r"^::: ([\w.]+)", pages, re.M))
    modules = {"compat", "distributed", "functional", "interop", "metrics", "options", "plots"}
    modules |= {"surrogate"}
    for name in set(snnkernels.__all__) - modules:
        assert f"snnkernels.{name}" in documented, name


# ---- the gallery ---------------------------------------------------------------------------------


def test_pictures_are_the_scripts(tmp_path: Path) -> None:
    """The committed pictures are those that the script draws, and it still draws."""
    support.optional("sklearn")
    support.optional("matplotlib")
    image = support.optional("PIL.Image")
    spec = importlib.util.spec_from_file_location("gallery", ROOT / "examples" / "gallery.py")
    assert spec is not None
    assert spec.loader is not None
    gallery = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gallery)
    there = {path.stem: path for path in (ROOT / "docs" / "gallery").glob("*.png")}
    assert set(there) == set(gallery.PICTURES)
    for name in there:
        assert f"gallery/{name}.png" in PAGES["docs/gallery.md"]
    if support.PURE:
        pytest.skip("SNNKERNELS_TEST_PURE=1: networks are slow in the reference")
    with torch.random.fork_rng():
        gallery.main(["--only", "error_sources", "--out", str(tmp_path)])
    with (
        image.open(tmp_path / "error_sources.png") as drawn,
        image.open(there["error_sources"]) as kept,
    ):
        # Training is not the same on every machine, fonts neither.
        assert all(abs(a - b) <= 0.1 * b for a, b in zip(drawn.size, kept.size, strict=True))
