"""Disturbed deliveries: tiny releases that really run, a watcher on the device, kills and cuts at any moment."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.agent.releases import identity
from toolkit.delivery.release import Release

if TYPE_CHECKING:  # they import pytest, which no delivery needs
    from tests.network import Network, Wire
    from tests.sshd import Server

KINDS = ("host", "session", "agent", "check", "short cut", "long cut")
STAGES = ("connect", "inventory", "upload", "install", "activate", "prune")
UNHEALTHY = 3  # how a delivery ends whose release does not run
_PATIENCE = 60.0  # seconds after which a command that was disturbed counts as hung


# --- releases ----------------------------------------------------------------------------------------------------


def compose(folder: Path, seed: int, *, size: int, sick: bool = False) -> Release:
    """Make a release that averages an image's channels; ``size`` bytes are its own, and all share their images."""
    import numpy as np
    import onnx
    from onnx import helper

    from toolkit.agent import ort
    from toolkit.devices.agent import pack

    folder.mkdir(parents=True)
    (folder / "evaluation").mkdir()
    np.save(folder / "evaluation" / "images.npy", np.full((8, 3, 8, 8), 7, np.uint8))
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=onnx.TensorProto.FLOAT),
        helper.make_node("GlobalAveragePool", ["floats"], ["means"]),
        helper.make_node("Flatten", ["means"], ["logits"]),
    ]
    images = helper.make_tensor_value_info("images", onnx.TensorProto.UINT8, ["batch", 3, 8, 8])
    logits = helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["batch", 3])
    graph = helper.make_graph(nodes, f"release {seed}", [images], [logits])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "graph")
    request = {
        "onnx": str(folder / "graph"),
        "out": str(folder),
        "threads": 1,
        "precision": "fp32",
        "batches": None,
    }
    with contextlib.redirect_stdout(None):
        engine = ort.build(request | {"input": {"name": "images", "shape": [3, 8, 8]}})
    (folder / "graph").unlink()
    if sick:
        (folder / engine["file"]).write_bytes(b"no graph at all")
        engine["sha256"] = hashlib.sha256(b"no graph at all").hexdigest()
    (folder / "engine.json").write_text(json.dumps(engine))
    (folder / "agent.pyz").write_bytes(pack())
    (folder / "ballast").write_bytes(random.Random(seed).randbytes(size))
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        name = str(path.relative_to(folder))
        files[name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    manifest: dict[str, Any] = {"format": 1, "files": files, "engine": {"runtime": "onnxruntime"}, "seed": seed}
    (folder / "manifest").write_text(json.dumps(manifest | {"id": identity(manifest)}))
    return load(folder)


def load(folder: Path) -> Release:
    """Return a release that was composed in a folder."""
    manifest = json.loads((folder / "manifest").read_text())
    return Release(manifest, {name: folder / name for name in manifest["files"]}, {})


# --- the invariant -----------------------------------------------------------------------------------------------


def problem(release: Path) -> str | None:
    """Return why a release is not whole, or None; knows nothing of how it came there."""
    try:
        manifest = json.loads((release / "manifest.json").read_bytes())
        if identity(manifest) != release.name:
            return f"{release.name} has the manifest of {identity(manifest)}"
        for name, entry in manifest["files"].items():
            if hashlib.sha256((release / name).read_bytes()).hexdigest() != entry["sha256"]:
                return f"{release.name}/{name} is not what its manifest says"
    except (OSError, ValueError) as error:
        return f"{release.name}: {error}"
    return None


class Watcher:
    """Looks all the time, from the device's side, whether what is current is whole; ``with`` says how long.

    Attributes:
        looks: How often it has looked.
        broken: What it has seen.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.looks = 0
        self.broken: list[str] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        had = False
        while not self._ended.is_set():
            try:
                current = (self.root / "current").readlink()
                had = True
            except FileNotFoundError:
                if had:
                    self.broken.append("nothing is current any more")
            else:
                found = problem(self.root / current)
                if found:  # a release stays whole when it is no longer current, as long as it is previous
                    with contextlib.suppress(FileNotFoundError):
                        if current in [(self.root / name).readlink() for name in ("current", "previous")]:
                            self.broken.append(found)
            self.looks += 1
            self._ended.wait(0.01)

    def __enter__(self) -> Watcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


# --- the host's command, in a process that can be killed ---------------------------------------------------------


class _Stages(logging.Handler):
    """Prints a word a stage, by what the connection logs."""

    def emit(self, record: logging.LogRecord) -> None:
        words = record.getMessage().split()
        if words[0] == "run" and words[-1].isalpha():
            print(words[-1], flush=True)
        elif words[0] == "copy":
            print("upload" if "/incoming/" in words[-2] else "agent", flush=True)


def deliver(host: str, folder: Path, *, prune: bool) -> int:
    """Push a release and make it current; ``prune`` removes all that are neither current nor previous."""
    from toolkit.delivery import release as delivery
    from toolkit.delivery import upkeep
    from toolkit.devices.agent import Agent
    from toolkit.devices.ssh import SshDevice
    from toolkit.errors import StageError

    logger = logging.getLogger("toolkit.devices.ssh")
    logger.setLevel(logging.INFO)
    logger.addHandler(_Stages())
    print("connect", flush=True)
    try:
        release = load(folder)
        agent = Agent(SshDevice(host, "~/.toolkit", sys.executable))
        print("sent", delivery.push(release, agent).sent_bytes, flush=True)
        upkeep.activate(release.id, agent)
        if prune:
            upkeep.prune(agent, 0)
    except upkeep.UnhealthyError:
        return UNHEALTHY
    except StageError as error:
        print(f"{error.message}; hint: {error.hint}", file=sys.stderr)
        return 1
    return 0


class Delivery:
    """A delivery at work.

    Attributes:
        said: Its stages so far, and with ``sent`` how many bytes it sent.
    """

    def __init__(self, host: str, folder: Path, *options: str) -> None:
        command = [sys.executable, "-m", "tests.faults", host, str(folder), *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.said: list[str] = []
        self._errors: list[str] = []
        self._threads = [
            threading.Thread(target=work, daemon=True)
            for work in (
                lambda: self.said.extend(line.strip() for line in self.process.stdout or ()),
                lambda: self._errors.extend(self.process.stderr or ()),
            )
        ]
        for thread in self._threads:
            thread.start()

    def reach(self, stage: str) -> None:
        """Wait until it has come to a stage, or has ended."""
        while stage not in self.said and self.process.poll() is None:
            time.sleep(0.005)

    @property
    def sent(self) -> int:
        """How many bytes the push sent."""
        (word,) = [word for word in self.said if word.startswith("sent ")]
        return int(word.split()[1])

    def end(self) -> tuple[int, str]:
        """Wait for it; return its exit status and what it wrote to stderr."""
        try:
            self.process.wait(_PATIENCE)
        finally:
            self.process.kill()
            for thread in self._threads:
                thread.join(timeout=10)
            self.process.wait()
        return self.process.returncode, "".join(self._errors)


# --- faults ------------------------------------------------------------------------------------------------------


def agents(namespace: str) -> dict[int, str]:
    """Return the agent's processes on a device, with their verbs."""
    from tests.network import processes

    found = {}
    for pid in processes(namespace):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if any(word.endswith(b".pyz") for word in words[:2]) and b"python" in words[0]:
                found[pid] = words[2].decode()
    return found


@dataclass
class Tally:
    """What a campaign came to.

    Attributes:
        faults: How many of which kind hit at which stage.
        ended: How many commands ended how.
        wrong: What must not be: broken releases, hung or crashed commands.
        looks: How often the watcher looked.
    """

    faults: Counter[tuple[str, str]] = field(default_factory=Counter)
    ended: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    looks: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.faults + other.faults,
            self.ended + other.ended,
            self.wrong + other.wrong,
            self.looks + other.looks,
        )


class Campaign:
    """Deliveries of several releases to a device, with a fault in most of them.

    Args:
        server: The device's sshd; its first user is the device.
        wire: What it is reached over.
        folder: For the releases.
        seed: Decides what happens when; not how long it takes there.
    """

    def __init__(self, server: Server, wire: Wire, folder: Path, seed: int) -> None:
        self.server, self.wire, self.random = server, wire, random.Random(seed)
        self.host = server.users[0]
        self.root = server.home(self.host) / ".toolkit"
        self.folders = [folder / f"release-{number}" for number in range(5)]
        for number, place in enumerate(self.folders):
            compose(place, number, size=300_000, sick=place == self.sick)
        server.configure(ServerAliveInterval="1", ServerAliveCountMax="2", ConnectTimeout="3")
        wire.slow(4)

    @property
    def sick(self) -> Path:
        """The release that does not run."""
        return self.folders[-1]

    def _expected(self, folder: Path) -> int:
        return UNHEALTHY if folder == self.sick else 0

    def _hit(self, kind: str, delivery: Delivery) -> bool:
        """Do something to a delivery at a random moment; say whether there was anything to do it to.

        An agent that is killed is any but the one that makes the last check of a switch: to a check that is killed
        the release does not run.
        """
        delivery.reach("activate" if kind == "check" else self.random.choice(STAGES))
        with contextlib.suppress(subprocess.TimeoutExpired):
            delivery.process.wait(self.random.uniform(0, 0.6))
        while delivery.process.poll() is None:
            if kind == "host":
                delivery.process.kill()
                return True
            if kind.endswith("cut"):
                self.wire.cut()
                # the long one outlasts the host's patience of 2 s
                time.sleep(self.random.uniform(2.5, 3.5) if kind == "long cut" else self.random.uniform(0.1, 1.0))
                self.wire.mend()
                return True
            if kind == "session":
                victims = self.server.sessions()
            else:
                verbs = agents(self.wire.far)
                victims = [pid for pid, verb in verbs.items() if (verb == "health") == (kind == "check")]
            if victims:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.random.choice(victims), signal.SIGKILL)
                    return True
            time.sleep(0.005)
        return False

    def run(self, count: int) -> Tally:
        """Let ``count`` faults happen; a command that did not complete comes again, until it does."""
        tally = Tally()
        for place in self.folders[:2]:
            assert Delivery(self.host, place, "prune").end() == (0, "")
        with Watcher(self.root) as watcher:
            place = self.folders[0]
            while sum(tally.faults.values()) < count:
                delivery = Delivery(self.host, place, "prune")
                kind = self.random.choice(KINDS) if self.random.random() < 0.8 else None
                if kind and self._hit(kind, delivery):
                    stage = next((word for word in reversed(delivery.said) if "sent" not in word), "start")
                    tally.faults[kind, stage] += 1
                if self._settle(delivery, place, kind, tally):
                    place = self.random.choice(self.folders)
            for place in self.folders:
                status, errors = Delivery(self.host, place, "prune").end()
                if status != self._expected(place):
                    tally.wrong.append(f"undisturbed at the end: exit {status}: {errors}")
        current = (self.root / "current").resolve().name
        if current != load(self.folders[-2]).id:
            tally.wrong.append(f"{current} is current at the end")
        tally.wrong += watcher.broken
        tally.wrong += [found for found in map(problem, (self.root / "releases").iterdir()) if found]
        tally.looks = watcher.looks
        return tally

    def _settle(self, delivery: Delivery, place: Path, kind: str | None, tally: Tally) -> bool:
        """Note how a delivery ended; say whether it was complete."""
        try:
            status, errors = delivery.end()
        except subprocess.TimeoutExpired:
            tally.wrong.append(f"hung: {delivery.said}")
            return False
        if status == self._expected(place):
            tally.ended["completed"] += 1
        elif status == -signal.SIGKILL:
            tally.ended["killed"] += 1
        elif (status == 1 and "hint: " in errors) or (status == UNHEALTHY and kind == "check"):
            tally.ended["said why"] += 1
        else:
            tally.wrong.append(f"exit {status}: {errors}")
        return status == self._expected(place)


def disturb(network: Network, folder: Path, devices: int, count: int, seed: int) -> Tally:
    """Run a campaign on each of several devices at once, ``count`` faults in all; they wait more than they work."""
    from tests.sshd import Server

    wires = [network.host() for _ in range(devices)]
    servers = [
        Server(folder / f"server-{number}", [f"device-{number}"], address=wire.addresses[1], namespace=wire.far)
        for number, wire in enumerate(wires)
    ]
    config = folder / "config"
    config.write_text("".join(f"Include {server.folder}/hosts\n" for server in servers))
    os.environ["TOOLKIT_SSH_CONFIG"] = str(config)
    try:
        for server in servers:
            server.start()
        campaigns = [
            Campaign(server, wire, folder / f"releases-{number}", seed + number)
            for number, (server, wire) in enumerate(zip(servers, wires, strict=True))
        ]
        share = -(-count // devices)
        with ThreadPoolExecutor(devices) as pool:
            tallies = list(pool.map(lambda campaign: campaign.run(share), campaigns))
    finally:
        for server in servers:
            server.stop()
    return functools.reduce(Tally.__add__, tallies)


def table(tally: Tally) -> str:
    """Return the faults, a line a kind."""
    stages: Sequence[str] = list(dict.fromkeys(stage for _, stage in tally.faults))
    lines = []
    for kind in KINDS:
        counts = {stage: tally.faults[kind, stage] for stage in stages if tally.faults[kind, stage]}
        told = ", ".join(f"{stage} {count}" for stage, count in sorted(counts.items(), key=lambda entry: -entry[1]))
        lines.append(f"{kind:10} {sum(counts.values()):4}  {told}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(deliver(sys.argv[1], Path(sys.argv[2]), prune="prune" in sys.argv[3:]))
