"""The page, as a browser shows it."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

Finished = tuple[Path, dict[str, Any]]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.words: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.open.append(tag)

    def handle_data(self, data: str) -> None:
        if "style" not in self.open[-1:]:
            self.words.append(data.strip())


def page(finished: Finished) -> Path:
    folder, run = finished
    return folder / str(run["report"])


def test_it_says_what_the_document_says(finished: Finished) -> None:
    _, run = finished
    html = page(finished).read_text()
    reader = Text()
    reader.feed(html)
    words = " ".join(reader.words)
    assert "The contract is kept" in words
    assert f"{100 * run['model']['final']['accuracy']:.2f} %" in words
    assert f"{run['bench']['latency_ms']['p99']:.3f} ms" in words
    assert run["commit"]["release"] in words
    for line in run["verdict"]["lines"]:
        assert line["reason"] in words
    for stage in run["stages"]:
        assert stage["name"] in words
    assert html.count("<svg") == 5


def test_it_needs_nothing_from_outside(finished: Finished) -> None:
    html = page(finished).read_text()
    for address in re.findall(r"""(?:src|href)=["']([^"']+)""", html):
        assert address.startswith("#"), address
    assert "<script" not in html
    assert len(html) < 1_000_000


def test_the_markdown_has_the_verdict_and_the_networks(finished: Finished) -> None:
    text = page(finished).with_suffix(".md").read_text()
    assert "the contract is kept" in text
    assert text.count("\n|") >= 20


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine; .ci/run installs it")
@pytest.mark.parametrize(("width", "dark"), [(1200, False), (420, True)])
def test_a_browser_shows_it(finished: Finished, tmp_path: Path, width: int, dark: bool) -> None:
    from PIL import Image

    assert CHROMIUM
    shot = tmp_path / "page.png"
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},2400", f"--screenshot={shot}",
        "--enable-logging=stderr", *(["--blink-settings=preferredColorScheme=0"] if dark else []),
        page(finished).resolve().as_uri(),
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert shot.exists(), result.stderr
    assert "CONSOLE" not in result.stderr
    image = Image.open(shot).convert("L")
    corner = image.getpixel((2, 2))
    assert isinstance(corner, int)
    assert (corner < 60) is dark
    low, high = image.getextrema()
    assert high - low > 150, "text stands out from the page"
