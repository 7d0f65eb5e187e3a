"""What a build server is told of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree as Xml

import pytest
from click.testing import CliRunner

from toolkit.report import ci


def line(what: str, status: str, **about: Any) -> dict[str, Any]:
    told = {"what": what, "limit": 2.0, "measured": 3.0, "low": 2.9, "high": 3.1, "unit": "ms", "status": status}
    return told | {"passed": status == "passed", "reason": "1.000 ms above the limit of 2.000 ms"} | about


LINES = [
    line("latency p50", "passed"),
    line("latency p99", "failed"),
    line("accuracy", "undecided", measured=None, low=None, high=None, unit="", reason="not measured: no labels"),
]
FINDING = {"what": "clocks", "text": "GPU clock went up & down, 50 % of the time", "hint": "lock <them>"}
DEVICE: dict[str, Any] = {
    "stages": [{"name": "train", "seconds": 1.5}, {"name": "bench", "seconds": 2.0}],
    "verdict": {"status": "failed", "passed": False, "lines": LINES},
    "bench": {"stability": {"stable": False, "findings": [FINDING]}},
    "error": None,
}
RUN = {"target": "host-cpu", "engine": None, **DEVICE}
PASSED = {"verdict": {"status": "passed", "passed": True, "lines": LINES[:1]}}
ENDED = {"verdict": None, "bench": None, "error": {"message": "no room:\n\x1b100 % full", "hint": None}}


def suite_of(document: dict[str, Any]) -> Xml.Element:
    (suite,) = Xml.fromstring(ci.junit(document))
    return suite


def test_a_clause_is_a_case() -> None:
    suite = suite_of(RUN)
    assert suite.attrib == {"name": "host-cpu", "time": "3.500", "tests": "3", "failures": "1", "errors": "1"}
    kept, broken, undecided = suite.findall("testcase")
    assert kept.attrib == {"classname": "host-cpu", "name": "latency p50"}
    assert len(kept) == 0
    (failure,) = broken.findall("failure")
    assert failure.attrib == {"type": "failed", "message": "1.000 ms above the limit of 2.000 ms"}
    assert failure.text == "limit 2.000 ms, 3.000 ms (2.900 ms to 3.100 ms)"
    (error,) = undecided.findall("error")
    assert error.attrib == {"type": "undecided", "message": "not measured: no labels"}


def test_a_run_that_ended_early_is_an_error_that_xml_can_hold() -> None:
    suite = suite_of(RUN | ENDED)
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("1", "0", "1")
    error = suite.find("testcase/error")
    assert error is not None
    assert error.get("message") == "no room:\n?100 % full"


def test_a_fleet_has_a_suite_a_host() -> None:
    hosts = [DEVICE | PASSED | {"host": "a"}, DEVICE | {"host": "b"}]
    suites = Xml.fromstring(ci.junit({"target": "orin", "hosts": hosts, **DEVICE, "verdict": None}))
    assert [suite.get("name") for suite in suites] == ["orin on a", "orin on b"]
    assert [suite.get("failures") for suite in suites] == ["0", "1"]


def test_annotations_are_workflow_commands() -> None:
    assert ci.github(RUN).splitlines() == [
        "::error title=host-cpu%3A latency p99 failed::"
        "1.000 ms above the limit of 2.000 ms; 3.000 ms (2.900 ms to 3.100 ms)",
        "::error title=host-cpu%3A accuracy undecided::not measured: no labels; not measured",
        "::warning title=host-cpu%3A clocks::GPU clock went up & down, 50 %25 of the time; hint: lock <them>",
    ]


def test_a_contract_that_was_kept_is_a_notice() -> None:
    (told,) = ci.github(RUN | PASSED | {"bench": None}).splitlines()
    assert told.startswith("::notice title=host-cpu%3A contract passed::")


def test_an_error_is_one_line() -> None:
    (told,) = ci.github(RUN | ENDED).splitlines()
    assert told == "::error title=host-cpu%3A the run ended early::no room:%0A\x1b100 %25 full"


def test_the_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from toolkit import runs
    from toolkit.cli import cli

    document = RUN | {"fast": False, "budget": None, "commit": None, "report": None}
    monkeypatch.setattr(runs, "execute", lambda *a, **k: runs.Outcome(document, None, 1))
    file = tmp_path / "new" / "junit.xml"
    done = CliRunner().invoke(cli, ["bench", "host-cpu", "--junit", str(file), "--github", "--json", "-q"])
    assert done.exit_code == 1
    assert Xml.parse(file).getroot().tag == "testsuites"
    assert done.stderr.startswith("::error")
    assert done.stdout.startswith("{")
    (tmp_path / "file").write_text("")
    done = CliRunner().invoke(cli, ["bench", "host-cpu", "--junit", str(tmp_path / "file" / "junit.xml")])
    assert done.exit_code == 1
    assert "contract  FAILED" in done.stdout, "what was measured is told all the same"
    assert "cannot be written: File exists" in done.stderr
    assert "--junit" in done.stderr
