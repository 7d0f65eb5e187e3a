"""Signatures: made by the real ssh-keygen, checked by the agent that travels, around engines that are real."""

from __future__ import annotations

import io
import json
import logging
import os
import pty
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import PROFILE, Toolkit, run_toolkit, write_job
from tests.sshd import Server, keygen, needs_sshd
from tests.test_adopt import network
from tests.test_releases import another, links, small
from toolkit import devices
from toolkit.agent import PROTOCOL
from toolkit.agent.releases import canonical
from toolkit.config import Target
from toolkit.delivery import release as delivery
from toolkit.delivery import signing, upkeep
from toolkit.devices.agent import Agent
from toolkit.devices.local import LocalDevice
from toolkit.errors import StageError, UsageError

pytestmark = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="needs openssh-client")

NETWORK = ("--model", "onnx:net.onnx", "--data", "none", "--mean", "0.5", "--std", "0.25")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    for kind in ("ed25519", "ecdsa", "rsa"):
        keygen("-t", kind, "-N", "", "-C", f"{kind}@desk", "-f", str(folder / kind))
    keygen("-t", "ed25519", "-N", "", "-C", "stranger@elsewhere", "-f", str(folder / "stranger"))
    keygen("-t", "ed25519", "-N", "secret", "-C", "locked@desk", "-f", str(folder / "locked"))
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job whose release was made current before anybody signed."""
    folder = write_job(tmp_path_factory.mktemp("made"), PROFILE.replace("max_accuracy_drop: 100 %, ", ""))
    network(folder / "net.onnx")
    result = run_toolkit(folder, "run", "tiny", *NETWORK, env={"HOME": str(folder)})
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture
def job(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "job", symlinks=True))


@pytest.fixture
def toolkit(job: Path) -> Toolkit:
    return lambda *arguments: run_toolkit(job, *arguments, env={"HOME": str(job)})


@pytest.fixture
def root(job: Path) -> Path:
    return job / "build" / "devices" / "tiny"


@pytest.fixture
def agent(root: Path) -> Agent:
    return Agent(LocalDevice(root))


def target(key: Path, **changes: str) -> Target:
    return Target(name="tiny", profile="tiny", runtime="onnxruntime", signing_key=str(key), **changes)


def sign_with(job: Path, key: Path, *, required: bool = False) -> None:
    """Write the key into the job's target."""
    with (job / "targets" / "tiny.yaml").open("a") as file:
        file.write(f"signing_key: {key}\n" + ("signing: required\n" if required else ""))


def empty(tmp_path: Path, *trusted: Path) -> Agent:
    """Return the agent on a device without releases that takes those of some keys."""
    agent = Agent(LocalDevice(tmp_path / "device"))
    signing.trust(agent, trusted)
    return agent


@pytest.mark.parametrize("kind", ["ed25519", "ecdsa", "rsa"])
def test_every_kind_of_key_signs(keys: Path, tmp_path: Path, kind: str) -> None:
    agent = empty(tmp_path, keys / f"{kind}.pub")
    delivery.push(small(tmp_path, "a"), agent, target=target(keys / kind))
    (entry,) = upkeep.listed(agent)
    assert (entry.signed_by, entry.refused, entry.damaged) == (f"{kind}@desk", None, [])


@pytest.fixture
def ssh_agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    place = tmp_path / "agent"
    process = subprocess.Popen(["ssh-agent", "-D", "-a", str(place)], stdout=subprocess.DEVNULL)
    while not place.exists():
        assert process.poll() is None
    monkeypatch.setenv("SSH_AUTH_SOCK", str(place))
    yield
    process.kill()
    process.wait()


def test_a_key_that_only_the_agent_holds_signs(keys: Path, tmp_path: Path, ssh_agent: None) -> None:
    subprocess.run(["ssh-add", "-q", str(keys / "ed25519")], check=True)
    public = Path(shutil.copy(keys / "ed25519.pub", tmp_path))
    agent = empty(tmp_path, public)
    delivery.push(small(tmp_path, "a"), agent, target=target(public))
    assert upkeep.listed(agent)[0].signed_by == "ed25519@desk"


def test_a_locked_key_is_not_asked_for_in_vain(
    keys: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    anybody = Agent(LocalDevice(tmp_path / "anybody"))
    with caplog.at_level(logging.INFO, "toolkit"):
        delivery.push(small(tmp_path, "a"), anybody, target=target(keys / "locked"))
    assert f"the release is not signed: the key {keys}/locked cannot sign" in caplog.text
    assert upkeep.listed(anybody)[0].signed_by is None
    guarded = empty(tmp_path, keys / "locked.pub")
    with pytest.raises(StageError, match="this machine takes only signed releases: the key") as error:
        delivery.push(small(tmp_path, "a"), guarded, target=target(keys / "locked"))
    assert str(error.value.hint).startswith(f"ssh-add {keys}/locked")
    assert not upkeep.listed(guarded)


def test_a_locked_key_is_asked_for_once_on_a_terminal(keys: Path, tmp_path: Path) -> None:
    agent = empty(tmp_path, keys / "locked.pub")
    process, terminal = pty.fork()
    if process == 0:
        code = (
            "import sys; from pathlib import Path; from tests import test_signing as t\n"
            "agent = t.Agent(t.LocalDevice(Path(sys.argv[1])))\n"
            "t.delivery.push(t.small(Path(sys.argv[2]), 'a'), agent, target=t.target(Path(sys.argv[3])))\n"
        )
        arguments = [agent.device.root, str(tmp_path / "sources"), str(keys / "locked")]
        os.execv(sys.executable, [sys.executable, "-c", code, *arguments])
    said = b""
    while b"passphrase" not in said:
        said += os.read(terminal, 1000)
    os.write(terminal, b"secret\n")
    try:
        while more := os.read(terminal, 1000):
            said += more
    except OSError:  # a terminal's end, on Linux
        pass
    assert os.waitpid(process, 0)[1] == 0, said
    assert said.count(b"passphrase") == 1
    assert upkeep.listed(agent)[0].signed_by == "locked@desk"


def damage_file(folder: Path, keys: Path) -> None:
    (folder / "engine.json").write_text((folder / "engine.json").read_text() + " ")


def damage_manifest(folder: Path, keys: Path) -> None:
    """As if by somebody who knows how a release gets its name."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["profile"] = "another"
    (folder / "manifest.json").write_text(json.dumps(manifest))


def damage_signature(folder: Path, keys: Path) -> None:
    """Put the signature of other content there, by a key that is trusted."""
    (folder / "manifest.json.sig").write_text(signing.sign(b"other content", keys / "ed25519", ask=False))


def garble_signature(folder: Path, keys: Path) -> None:
    (folder / "manifest.json.sig").write_text("-----BEGIN SSH SIGNATURE-----\n")


def remove_signature(folder: Path, keys: Path) -> None:
    (folder / "manifest.json.sig").unlink()


def sign_as_a_stranger(folder: Path, keys: Path) -> None:
    content = canonical(json.loads((folder / "manifest.json").read_text()))
    (folder / "manifest.json.sig").write_text(signing.sign(content, keys / "stranger", ask=False))


DAMAGE = {
    damage_file: "is damaged: engine.json",
    damage_manifest: "is damaged: manifest.json",
    damage_signature: "is damaged: manifest.json.sig does not fit its manifest.json",
    garble_signature: "is damaged: manifest.json.sig does not fit its manifest.json",
    remove_signature: "is not signed, and only signed ones are taken",
    sign_as_a_stranger: "is signed with a key that is not trusted: ED25519 key SHA256:",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_what_was_tampered_with_is_refused_and_named_and_mended_by_a_push(
    agent: Agent, root: Path, keys: Path, tmp_path: Path, damage: Callable[[Path, Path], None]
) -> None:
    signing.trust(agent, [keys / "ed25519.pub"])
    one, two = another(root, 1), another(root, 2)
    for release in (one, two):
        delivery.push(release, agent, target=target(keys / "ed25519"))
    upkeep.activate(two.id, agent)
    sources = Path(shutil.copytree(root / "releases" / one.id, tmp_path / "sources"))
    one = delivery.Release(one.manifest, {name: sources / name for name in one.sources}, {})
    folder = root / "releases" / one.id
    damage(folder, keys)
    refusal = f"release {one.id} {DAMAGE[damage]}"
    settings = {"warmup_ms": 1, "duration_ms": 1, "queries": 1, "batches": [1]}
    for load in (
        lambda: upkeep.activate(one.id, agent),
        lambda: agent.ask("health", {"root": str(root), "id": one.id}),
        lambda: delivery.bench(one, agent, settings, tmp_path, lambda done, total, text: None),
    ):
        with pytest.raises(StageError) as error:
            load()
        assert refusal in error.value.message
    assert links(root)[0] == two.id
    pushed = delivery.push(one, agent, target=target(keys / "ed25519"))
    assert pushed.repaired == [{"damage_file": "engine.json", "damage_manifest": "manifest.json"}.get(
        damage.__name__, "manifest.json.sig")]  # fmt: skip
    upkeep.activate(one.id, agent)
    assert links(root) == (one.id, two.id)


def test_a_release_by_a_stranger_or_nobody_does_not_arrive(keys: Path, tmp_path: Path) -> None:
    agent = empty(tmp_path, keys / "ed25519.pub")
    release = small(tmp_path, "a")
    with pytest.raises(StageError, match="signed with a key that is not trusted: ED25519 key SHA256:") as error:
        delivery.push(release, agent, target=target(keys / "stranger"))
    assert "toolkit trust TARGET --key FILE.pub" in str(error.value.hint)
    with pytest.raises(StageError, match="is not signed"):
        delivery.push(release, agent)
    assert not list(Path(agent.device.root, "releases").iterdir())


def test_a_push_adds_the_signature_that_nobody_asked_for_before(keys: Path, tmp_path: Path) -> None:
    agent = Agent(LocalDevice(tmp_path / "device"))
    release = small(tmp_path, "a")
    delivery.push(release, agent)
    assert delivery.push(release, agent, target=target(keys / "ed25519")).sent_bytes == 0
    signature = Path(agent.device.root, "releases", release.id, "manifest.json.sig").read_text()
    (entry,) = upkeep.listed(agent)
    assert str(entry.signed_by).startswith("ED25519 key SHA256:"), "nobody is known here by name"
    delivery.push(release, agent, target=target(keys / "stranger"))
    assert Path(agent.device.root, "releases", release.id, "manifest.json.sig").read_text() == signature


@pytest.mark.parametrize("restriction", ['namespaces="git"', 'valid-before="20200101"'])
def test_what_the_administrator_says_of_a_key_counts(keys: Path, tmp_path: Path, restriction: str) -> None:
    agent = Agent(LocalDevice(tmp_path / "device"))
    public = " ".join((keys / "ed25519.pub").read_text().split()[:2])
    (tmp_path / "admin").write_text(f"boss@corp {restriction} {public}\n")
    Path(agent.device.root).mkdir()
    Path(agent.device.root, "allowed_signers").symlink_to(tmp_path / "admin")
    with pytest.raises(StageError, match=r"does not count|not trusted"):
        delivery.push(small(tmp_path, "a"), agent, target=target(keys / "ed25519"))
    (tmp_path / "admin").write_text(f"boss@corp {public}\n")
    delivery.push(small(tmp_path, "a"), agent, target=target(keys / "ed25519"))
    assert upkeep.listed(agent)[0].signed_by == "boss@corp"
    with pytest.raises(StageError, match=f"is a link to {tmp_path}/admin, which others keep"):
        signing.trust(agent, [keys / "rsa.pub"])
    (tmp_path / "admin").unlink()
    assert "nobody can say whose releases are taken" in str(upkeep.listed(agent)[0].refused)


def test_without_ssh_keygen_nothing_is_taken(
    keys: Path, tmp_path: Path, agent: Agent, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signing.trust(agent, [keys / "ed25519.pub"])
    release = another(root, 1)
    delivery.push(release, agent, target=target(keys / "ed25519"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StageError, match="there is no ssh-keygen") as error:
        upkeep.activate(release.id, agent)
    assert "install openssh-client" in str(error.value.hint)


def test_trust_says_whom_and_adds_a_key_once(toolkit: Toolkit, job: Path, root: Path, keys: Path) -> None:
    assert toolkit("trust", "tiny", "--list").stdout == "this machine takes releases of anybody\n"
    without = toolkit("trust", "tiny")
    assert (without.returncode, "there is no SSH key to sign with" in without.stderr) == (1, True)
    sign_with(job, keys / "ed25519")
    first = toolkit("trust", "tiny")
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("ed25519@desk  ssh-ed25519 SHA256:")
    assert "is not signed, and only signed ones are taken; it is current: push it again" in first.stderr
    file = (root / "allowed_signers").read_text()
    assert file.startswith('ed25519@desk namespaces="edge-toolkit" ssh-ed25519 AAAA')
    both = toolkit("trust", "tiny", "--key", str(keys / "rsa.pub"), "--key", str(keys / "ed25519.pub"))
    assert [line.split()[0] for line in both.stdout.splitlines()] == ["ed25519@desk", "rsa@desk"]
    assert (root / "allowed_signers").read_text().count("\n") == 2
    assert toolkit("trust", "tiny", "--list").stdout == both.stdout
    wrong = toolkit("trust", "tiny", "--key", str(keys / "rsa"))
    assert wrong.returncode == 2
    assert "is no public SSH key" in wrong.stderr


def test_required_and_its_remedy(toolkit: Toolkit, job: Path, root: Path, keys: Path) -> None:
    sign_with(job, keys / "ed25519", required=True)
    refused = toolkit("run", "tiny", *NETWORK)
    assert refused.returncode == 1
    assert "'tiny' says signing: required, and this machine takes releases of anybody" in refused.stderr
    assert "hint: toolkit trust tiny" in refused.stderr
    assert "signing: required" in toolkit("doctor", "tiny").stdout
    assert toolkit("trust", "tiny").returncode == 0
    result = toolkit("run", "tiny", *NETWORK)
    assert result.returncode == 0, result.stderr
    assert toolkit("releases", "tiny").stdout.strip().endswith("signed by ed25519@desk")
    assert "it takes only releases that are signed" in toolkit("doctor", "tiny").stdout


def test_rollback_to_an_unsigned_release_is_refused(
    toolkit: Toolkit, job: Path, root: Path, agent: Agent, keys: Path
) -> None:
    unsigned, _ = links(root)
    signed = another(root, 2)
    delivery.push(signed, agent, target=target(keys / "ed25519"))
    upkeep.activate(signed.id, agent)
    signing.trust(agent, [keys / "ed25519.pub"])
    result = toolkit("rollback", "tiny")
    assert result.returncode == 1
    assert f"release {unsigned} is not signed, and only signed ones are taken" in result.stderr
    assert links(root) == (signed.id, unsigned)
    told = {entry["id"]: entry for entry in json.loads(toolkit("releases", "tiny", "--json").stdout)["releases"]}
    assert told[signed.id]["signed_by"] == "ed25519@desk"
    assert (told[unsigned]["signed_by"], "is not signed" in told[unsigned]["refused"]) == (None, True)
    assert "REFUSED" in toolkit("releases", "tiny").stdout


def test_keys_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a file"):
        signing.key_of(target(tmp_path / "none"))
    (tmp_path / "key").touch()
    with pytest.raises(UsageError, match="the public half of"):
        signing.public_half(tmp_path / "key")


@needs_sshd
def test_over_ssh_the_key_that_opens_the_device_signs(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(tmp_path / "ssh")
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    monkeypatch.setenv("TOOLKIT_SSH_CONFIG", str(server.config))
    devices._connected.cache_clear()
    with (job / "targets" / "tiny.yaml").open("a") as file:
        file.write(f"host: orin\npython: {sys.executable}\nsigning: required\n")
    server.start()
    try:
        assert "signing: required" in run_toolkit(job, "run", "tiny", *NETWORK).stderr
        trusted = run_toolkit(job, "trust", "tiny")
        assert trusted.returncode == 0, trusted.stderr
        result = run_toolkit(job, "run", "tiny", *NETWORK)
        assert result.returncode == 0, result.stderr
        current = server.home("orin") / ".toolkit" / "current"
        signature = current / "manifest.json.sig"
        assert "BEGIN SSH SIGNATURE" in signature.read_text()
        signature.write_text("nothing")
        on_device = subprocess.run(
            [sys.executable, str(current / "agent.pyz"), "health"],
            input=json.dumps({"root": str(current.parent), "id": current.resolve().name, "protocol": PROTOCOL}),
            capture_output=True,
            text=True,
        )
        assert "manifest.json.sig does not fit" in on_device.stdout
        assert run_toolkit(job, "run", "tiny", *NETWORK).returncode == 0
        assert "BEGIN SSH SIGNATURE" in signature.read_text()
    finally:
        server.stop()
