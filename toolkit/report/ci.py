"""A run for those who check it without reading: JUnit's XML, and annotations on GitHub."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any
from xml.etree import ElementTree as Xml

from toolkit.bench.contract import show

_NO_XML = re.compile(
    r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]"
)  # https://www.w3.org/TR/xml/#charsets


def junit(document: Mapping[str, Any]) -> str:
    """Return a run as JUnit XML: a suite a device, a case a clause, and one for the error that ended it.

    A broken clause is a failure, an undecided one an error, as is what kept the contract from being judged.

    Args:
        document: What ``run.json`` holds.
    """
    suites = Xml.Element("testsuites", name="toolkit")
    for name, made in _devices(document):
        seconds = sum(stage["seconds"] for stage in made["stages"])
        suite = Xml.SubElement(suites, "testsuite", name=name, time=f"{seconds:.3f}")
        for line in (made["verdict"] or {"lines": []})["lines"]:
            case = Xml.SubElement(suite, "testcase", classname=name, name=line["what"])
            if not line["passed"]:
                kind = "failure" if line["status"] == "failed" else "error"
                problem = Xml.SubElement(case, kind, type=line["status"], message=_printable(line["reason"]))
                problem.text = f"limit {show(line['limit'], line['unit'])}, {_measured(line)}"
        if made["error"]:
            case = Xml.SubElement(suite, "testcase", classname=name, name="run")
            message = _printable(made["error"]["message"])
            Xml.SubElement(case, "error", type="stage", message=message).text = _printable(
                made["error"]["hint"] or ""
            )
        for count, tag in (("tests", "testcase"), ("failures", "testcase/failure"), ("errors", "testcase/error")):
            suite.set(count, str(len(suite.findall(tag))))
    Xml.indent(suites)
    return Xml.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"


def github(document: Mapping[str, Any]) -> str:
    """Return a run as GitHub's workflow commands, a line each; empty when there is nothing to say.

    An error a clause that was not kept, a warning a finding about stability, a notice for a contract that was kept
    (docs.github.com/actions, Workflow commands for GitHub Actions).

    Args:
        document: What ``run.json`` holds.
    """
    return "\n".join(line for name, made in _devices(document) for line in _annotations(name, made))


def _annotations(name: str, made: Mapping[str, Any]) -> Iterator[str]:
    verdict, error = made["verdict"], made["error"]
    for line in verdict["lines"] if verdict else ():
        if not line["passed"]:
            yield _command(
                "error", f"{name}: {line['what']} {line['status']}", f"{line['reason']}; {_measured(line)}"
            )
    if verdict and verdict["passed"]:
        yield _command("notice", f"{name}: contract passed", "; ".join(line["reason"] for line in verdict["lines"]))
    for finding in made["bench"]["stability"]["findings"] if made["bench"] else ():
        yield _command("warning", f"{name}: {finding['what']}", f"{finding['text']}; hint: {finding['hint']}")
    if error:
        hint = f"; hint: {error['hint']}" if error["hint"] else ""
        yield _command("error", f"{name}: the run ended early", error["message"] + hint)


def _devices(document: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield each device's name and what was made on it; of a fleet whose shared part failed, the whole run."""
    target = document["target"]
    hosts = document.get("hosts") or ()
    for host in hosts:
        yield f"{target} on {host['host']}", host
    if not hosts or document["error"]:
        yield target, document


def _measured(line: Mapping[str, Any]) -> str:
    if line["low"] is None or line["high"] is None:
        return show(line["measured"], line["unit"])
    low, high = show(line["low"], line["unit"]), show(line["high"], line["unit"])
    return f"{show(line['measured'], line['unit'])} ({low} to {high})"


def _command(kind: str, title: str, message: str) -> str:
    def escaped(text: str, more: str = "") -> str:
        return "".join(f"%{ord(char):02X}" if char in "%\r\n" + more else char for char in text)

    return f"::{kind} title={escaped(title, ':,')}::{escaped(message)}"


def _printable(text: str) -> str:
    return _NO_XML.sub("?", text)
