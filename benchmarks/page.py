"""How big the page of a run with 100,000 samples is, how long it takes to make, and when a browser first paints it.

    python benchmarks/page.py [--screenshots FOLDER]

The run is made up (tests/pages.py); the page, its charts and the browser, Debian's Chromium, are real.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image
from playwright.sync_api import sync_playwright

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.pages import Measured
from toolkit.report import page, recorded

_Made = TypeVar("_Made")
_PAINTED = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
_ALIVE = "document.querySelectorAll('figure.drawn').length === document.querySelectorAll('figure').length"


def timed(what: str, make: Callable[[], _Made]) -> _Made:
    begin = time.monotonic()
    made = make()
    print(f"{what}: {time.monotonic() - begin:.2f} s")
    return made


def opened(browser: Any, path: Path, **options: Any) -> Any:
    tab = browser.new_context(**options).new_page()
    tab.goto(path.as_uri())
    return tab


def paint(browser: Any, path: Path, runs: int = 15) -> None:
    taken = []
    for _ in range(runs):
        tab = opened(browser, path)
        tab.wait_for_function("performance.getEntriesByName('first-contentful-paint').length")
        taken.append(tab.evaluate(_PAINTED))
        tab.context.close()
    low, middle, high = min(taken), statistics.median(taken), max(taken)
    print(f"first contentful paint: min {low:.0f} ms, median {middle:.0f} ms, max {high:.0f} ms ({runs} times)")


def screenshot(browser: Any, path: Path, out: Path, section: str, **options: Any) -> None:
    tab = opened(browser, path, device_scale_factor=1, **options)
    for figure in tab.locator("figure[data-chart]").all():
        figure.scroll_into_view_if_needed()
    tab.wait_for_function(_ALIVE)
    tab.evaluate(f"document.getElementById('{section}').scrollIntoView({{behavior: 'instant'}})")
    tab.screenshot(path=out)
    Image.open(out).convert("RGB").save(out, optimize=True)
    print(f"{out}: {out.stat().st_size / 1000:.0f} kB")
    tab.context.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--screenshots", type=Path, help="write the pictures of docs/images here")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        measured = Measured(Path(folder) / "build")
        run = measured.run(samples=100_000)
        drawn = timed("charts drawn and library bundled", lambda: recorded.drawn(measured.store, run))
        text = timed("page put together", lambda: page.html(run, drawn))
        path = Path(folder) / "report.html"
        path.write_text(text, encoding="utf-8")
        print(f"size: {path.stat().st_size / 1e6:.2f} MB for {run['bench']['samples']:,} samples")
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        paint(browser, path)
        if given.screenshots:
            given.screenshots.mkdir(parents=True, exist_ok=True)
            wide = {"viewport": {"width": 1000, "height": 900}}
            screenshot(browser, path, given.screenshots / "page-verdict.png", "verdict", **wide)
            screenshot(
                browser, path, given.screenshots / "page-latency.png", "latency", **wide, color_scheme="dark"
            )
        browser.close()


if __name__ == "__main__":
    main()
