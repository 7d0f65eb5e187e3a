"""The page as a browser shows it, `toolkit report`, Markdown and the picture for the terminal."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import run_toolkit
from tests.pages import Measured
from toolkit.report import recorded, vega
from toolkit.report.comparison import pareto
from toolkit.report.sparkline import picture

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
browser_only = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine; .ci/run installs it")
SECTIONS = (
    "verdict", "asked", "flow", "networks", "latency", "stability", "staircase", "accuracy", "telemetry",
    "environment",
)  # fmt: skip
CHARTS = (
    "widths", "training", "histogram", "ecdf", "over-time", "throughput", "staircase", "confusion", "telemetry",
)  # fmt: skip


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """A store that keeps the library, so that it is bundled once."""
    return Measured(tmp_path_factory.mktemp("measured"))


@pytest.fixture(scope="module")
def document(measured: Measured) -> dict[str, Any]:
    return measured.run(samples=100_000)


@pytest.fixture(scope="module")
def page(measured: Measured, document: dict[str, Any]) -> Path:
    return recorded.write(measured.build, [document], None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@contextmanager
def opened(browser: Any, path: Path, width: int = 1100, **options: Any) -> Iterator[Any]:
    """A page in a tab; nothing may be asked of a network and nothing said on the console."""
    context = browser.new_context(viewport={"width": width, "height": 900}, **options)
    tab = context.new_page()
    told: list[str] = []
    tab.on("console", lambda message: told.append(message.text))
    tab.on("pageerror", lambda error: told.append(str(error)))
    tab.on("request", lambda request: request.url.startswith(("file:", "data:")) or told.append(request.url))
    tab.goto(path.resolve().as_uri())
    yield tab
    context.close()
    assert told == []


def drawn(tab: Any, name: str) -> Any:
    """Wait until a chart that answers stands in its figure's place."""
    figure = tab.locator(f'figure[data-chart="{name}"]')
    figure.scroll_into_view_if_needed()
    figure.locator(".live svg.marks").wait_for()
    return figure


@browser_only
def test_every_section_has_content_and_every_chart_comes_alive(browser: Any, page: Path) -> None:
    with opened(browser, page) as tab:
        for name in SECTIONS:
            assert len(tab.locator(f"section#{name}").inner_text()) > 20, name
        for name in CHARTS:
            figure = drawn(tab, name)
            assert figure.locator(".live [role='graphics-symbol']").count() > 2, name
            assert figure.locator("figcaption").inner_text()
            assert not figure.locator(".static").is_visible()
        links = tab.eval_on_selector_all("nav a", "links => links.map(link => link.getAttribute('href'))")
        assert links == [f"#{name}" for name in SECTIONS[1:]]
        ids = tab.eval_on_selector_all("[id]", "all => all.map(one => one.id)")
        assert len(ids) == len(set(ids))


@browser_only
def test_hovering_tells_the_figures(browser: Any, page: Path) -> None:
    from playwright.sync_api import expect

    with opened(browser, page) as tab:
        figure = drawn(tab, "widths")
        figure.locator(".live path[aria-roledescription='bar']").first.hover(position={"x": 5, "y": 3})
        tip = tab.locator("#vg-tooltip-element.visible")
        expect(tip).to_contain_text("channels before")
        plot = drawn(tab, "ecdf").locator(".live svg.marks").bounding_box()
        tab.mouse.move(plot["x"] + plot["width"] / 3, plot["y"] + plot["height"] / 2)
        expect(tip).to_contain_text("scenario")


@browser_only
def test_a_scenario_can_be_hidden_and_the_axis_made_logarithmic_by_keyboard(browser: Any, page: Path) -> None:
    from playwright.sync_api import expect

    with opened(browser, page) as tab:
        figure = drawn(tab, "ecdf")
        lines = figure.locator(".live path[aria-roledescription='line mark']")
        assert lines.count() == 2
        figure.get_by_role("checkbox", name="DutyCycle").focus()
        tab.keyboard.press("Space")
        expect(lines).to_have_count(1)
        button = figure.get_by_role("button", name="logarithmic")
        button.focus()
        tab.keyboard.press("Enter")
        assert button.get_attribute("aria-pressed") == "true"
        expect(figure.locator(".live [aria-label*='log scale']")).to_have_count(1)


@browser_only
def test_the_histogram_shows_the_scenario_that_is_chosen(browser: Any, page: Path) -> None:
    from playwright.sync_api import expect

    with opened(browser, page) as tab:
        figure = drawn(tab, "histogram")
        axis = figure.locator(".live [aria-label^='X-axis']")
        before = axis.get_attribute("aria-label")
        figure.get_by_role("radio", name="DutyCycle").check()
        expect(axis).not_to_have_attribute("aria-label", str(before))


@browser_only
def test_time_is_zoomed_for_latency_and_clocks_at_once(browser: Any, page: Path) -> None:
    from playwright.sync_api import expect

    with opened(browser, page) as tab:
        figure = drawn(tab, "over-time")
        axes = figure.locator(".live [aria-label^='X-axis']")
        whole = [axis.get_attribute("aria-label") for axis in axes.all()]
        assert len(whole) == 3
        plot = figure.locator(".live svg.marks").bounding_box()
        tab.mouse.move(plot["x"] + 200, plot["y"] + 100)
        tab.keyboard.down("Control")
        tab.mouse.wheel(0, -400)
        tab.keyboard.up("Control")
        for number, before in enumerate(whole):
            expect(axes.nth(number)).not_to_have_attribute("aria-label", str(before))


@browser_only
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_follows_light_and_dark(browser: Any, page: Path, scheme: str) -> None:
    def channel(color: str) -> int:
        return int(re.findall(r"\d+", color)[0])

    with opened(browser, page, color_scheme=scheme) as tab:
        paper = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        figure = drawn(tab, "ecdf")
        labels = figure.locator(".live .role-axis-label text").first.evaluate("t => getComputedStyle(t).fill")
        assert (channel(paper) < 60) is (scheme == "dark")
        assert abs(channel(paper) - channel(labels)) > 90, "labels stand out from the page"


@browser_only
def test_a_phone_scrolls_down_alone(browser: Any, page: Path) -> None:
    with opened(browser, page, width=420) as tab:
        for name in CHARTS:
            figure = drawn(tab, name)
            if name != "confusion":  # scrolls in its own frame
                assert figure.locator(".live svg.marks").bounding_box()["width"] <= 420
        assert tab.evaluate("document.documentElement.scrollWidth") <= 420


@browser_only
def test_print_has_the_pictures_and_no_buttons(browser: Any, page: Path) -> None:
    with opened(browser, page, color_scheme="dark") as tab:
        figure = drawn(tab, "ecdf")
        tab.emulate_media(media="print")
        assert figure.locator(".static svg").is_visible()
        assert not figure.locator(".live").is_visible()
        assert not figure.get_by_role("button").is_visible()
        assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert len(tab.pdf(print_background=False)) > 50_000


@browser_only
def test_without_script_pictures_and_tables_are_there(browser: Any, page: Path) -> None:
    with opened(browser, page, java_script_enabled=False) as tab:
        for name in CHARTS:
            assert tab.locator(f'figure[data-chart="{name}"] .static svg').is_visible(), name
        assert tab.locator("table").count() >= 8
        assert "The contract is kept" in tab.locator("#verdict").inner_text()


def test_it_says_what_the_document_says(page: Path, document: dict[str, Any]) -> None:
    text = page.read_text()
    for line in document["verdict"]["lines"]:
        assert line["reason"] in text
    assert f"{document['bench']['latency_ms']['p99']['low']:.3f} – " in text
    assert document["commit"]["release"] in text
    assert text.count("data:image/png;base64,") == 5
    assert len(text.encode()) < 5_000_000
    assert not re.search(r"""(?:src|href)=["'](?!data:|#)""", text.partition('id="library"')[0])


@pytest.mark.parametrize(
    ("options", "says", "lacks"),
    [
        ({"fast": True}, "Fast run: a short recipe", None),
        ({"status": "failed"}, "The contract is broken", None),
        ({"status": "undecided"}, "the interval lies across it", None),
        ({"until": "bench"}, "The run ended before its verdict: the disk is full", 'class="table clauses"'),
        ({"labels": False}, "without labels", 'data-chart="confusion"'),
        ({"networks": False}, "neither trained nor pruned here", 'data-chart="widths"'),
        ({"telemetry": False}, "said nothing of itself", 'data-chart="telemetry"'),
        ({"duty": False}, "SingleStream", "DutyCycle"),
        ({"samples": 100}, "needs 299 queries", None),
    ],
)
def test_what_is_not_there_is_left_out_or_explained(
    measured: Measured, options: dict[str, Any], says: str, lacks: str | None, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"samples": 2000, **options}
    run = measured.run(f"20261121T100000-{says[:12]}", **given)
    text = recorded.write(measured.build, [run], tmp_path / "page.html").read_text().partition('id="library"')[0]
    assert says in text
    assert lacks is None or lacks not in text


def test_a_class_name_cannot_break_out_of_the_page(measured: Measured, tmp_path: Path) -> None:
    name = "</script><script>alert(1)</script>"
    run = measured.run("20261121T101000-hostile", samples=500, classes=[name, *map(str, range(1, 10))])
    text = recorded.write(measured.build, [run], tmp_path / "page.html").read_text()
    assert "<script>alert(1)" not in text


@browser_only
def test_several_runs_are_set_side_by_side(browser: Any, measured: Measured, tmp_path: Path) -> None:
    names = ["20261121T110000-quick-1", "20261121T110000-good-2", "20261121T110000-worse-3"]
    figures = [(0.4, 0.97), (0.6, 0.99), (0.9, 0.98)]
    runs = [
        measured.run(name, samples=3000, median_ms=median, accuracy=accuracy)
        for name, (median, accuracy) in zip(names, figures, strict=True)
    ]
    out = recorded.write(measured.build, runs, tmp_path / "several.html")
    with opened(browser, out) as tab:
        drawn(tab, "pareto")
        drawn(tab, "ecdf")
        rows = tab.locator("tbody tr").all_inner_texts()
    assert ["◆" in row for row in rows] == [True, True, False]


def test_the_front_is_what_nothing_dominates() -> None:
    rows = [
        {"label": "a", "p50": {"value": 1.0, "low": 0.9, "high": 1.1}, "accuracy": 0.9, "low": 0.8, "high": 1.0,
         "front": True, "mark": "a", "recommended": False, "current": True},
    ]  # fmt: skip
    spec = pareto(rows)
    assert spec["data"]["values"][0]["ms_high"] == 1.1
    assert "<svg" in vega.svg(spec, "pareto")


def test_a_fleet_is_set_side_by_side_and_says_who_is_missing(measured: Measured, tmp_path: Path) -> None:
    run = measured.fleet()
    text = recorded.write(measured.build, [run], tmp_path / "fleet.html").read_text()
    assert "shelf-a" in text
    assert "shelf-c was not measured: it does not answer" in text
    assert recorded.markdown(run).count("# resnet20 on shelf-") == 2


def test_the_command_writes_the_newest_run_again(measured: Measured, page: Path) -> None:
    build = measured.build
    newest = measured.run("20261231T000000-host-cpu-ffff", samples=500)
    result = run_toolkit(build.parent, "report", "--build", str(build))
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(build / "runs" / newest["run"] / "report.html")
    again = run_toolkit(build.parent, "report", newest["run"], "--build", str(build), "-o", "here.html")
    assert again.returncode == 0, again.stderr
    assert (build.parent / "here.html").read_text() == Path(result.stdout.strip()).read_text()
    shutil.rmtree(build / "runs" / newest["run"])


def test_the_command_gives_markdown_and_json(measured: Measured, document: dict[str, Any]) -> None:
    def asked(*arguments: str) -> str:
        result = run_toolkit(measured.build.parent, "report", *arguments, "--build", str(measured.build))
        assert result.returncode == 0, result.stderr
        return result.stdout

    text = asked(document["run"], "--markdown")
    assert "the contract is kept" in text
    assert text.count("\n|") >= 12
    assert "](" not in text
    assert json.loads(asked(document["run"], "--json"))["run"] == document["run"]
    assert len(json.loads(asked(document["run"], document["run"], "--json"))) == 2


def damaged_document(measured: Measured, document: dict[str, Any]) -> list[str]:
    path = measured.build / "runs" / "20261121T090000-old-1" / "run.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document | {"format": 1, "run": path.parent.name}))
    return [path.parent.name]


def collected(measured: Measured, document: dict[str, Any]) -> list[str]:
    run = measured.run("20261121T090000-gone-1", samples=300)
    shutil.rmtree(measured.store.root / "bench" / run["artifacts"]["bench"])
    return [run["run"]]


@pytest.mark.parametrize(
    ("arrange", "code", "cause", "remedy"),
    [
        (lambda m, d: [d["run"][:-1] + "c"], 2, "no run is called", "did you mean"),
        (damaged_document, 2, "was recorded by another version", "toolkit run host-cpu"),
        (collected, 1, "has lost its artifact bench/", "toolkit bench host-cpu"),
        (
            lambda m, d: [m.run("20261121T090000-broken-1", until="train")["run"]],
            1, "ended before anything was measured: the disk is full", "toolkit bench host-cpu",
        ),
        (lambda m, d: [d["run"], "--build", "nowhere"], 2, "no run is recorded below", "toolkit run TARGET"),
    ],
)  # fmt: skip
def test_what_cannot_be_written_is_one_sentence(
    measured: Measured,
    document: dict[str, Any],
    arrange: Callable[[Measured, dict[str, Any]], list[str]],
    code: int,
    cause: str,
    remedy: str,
) -> None:
    arguments = arrange(measured, document)
    where = [] if "--build" in arguments else ["--build", str(measured.build)]
    result = run_toolkit(measured.build.parent, "report", *arguments, *where)
    assert result.returncode == code
    assert cause in result.stderr
    assert remedy in result.stderr
    assert "Traceback" not in result.stderr


def test_the_terminal_picture_has_its_bulk_where_the_latencies_are() -> None:
    random = np.random.default_rng(0)
    fast = picture(np.concatenate([random.normal(1, 0.01, 9000), random.normal(2, 0.01, 1000)]), width=40)
    bars, marks = fast.splitlines()
    bulk = bars.split(" ms ")[1]
    assert bulk.index("█") < 4
    assert marks.index("p50") < marks.index("p99")
    assert marks.index("p99") - marks.index("p50") > 30
    assert picture(np.full(10, 0.5)) == "0.500 ms every time"


def test_a_run_that_lost_too_much_accuracy_names_the_nearest_that_did_not(tmp_path: Path) -> None:
    document = Measured(tmp_path).run("20261121T120000-host-cpu-0a1b", samples=2000)
    assert recorded.nearest(tmp_path, document) is None
    (line,) = (line for line in document["verdict"]["lines"] if line["what"] == "accuracy drop")
    line |= {"status": "failed", "passed": False}
    assert "is 60% (run 20261121T120000-host-cpu-0a1b)" in str(recorded.nearest(tmp_path, document))
    assert "no budget" in str(recorded.nearest(tmp_path, document | {"workload": {"seed": 7}}))
    unjudged = [one for one in document["verdict"]["lines"] if one is not line]  # as a probe is
    probe = document | {"verdict": document["verdict"] | {"lines": unjudged}}
    for recorded_one in (document, probe):
        (tmp_path / "runs" / document["run"] / "run.json").write_text(json.dumps(recorded_one))
        assert "toolkit sweep host-cpu" in str(recorded.nearest(tmp_path, document))
