"""A machine over SSH: a real OpenSSH server on this one."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import run_toolkit
from tests.sshd import Server, keygen, needs_sshd
from toolkit import devices
from toolkit.devices.ssh import SshDevice
from toolkit.devices.ssh_address import Address
from toolkit.devices.ssh_keys import _load
from toolkit.errors import StageError, UsageError

pytestmark = needs_sshd


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Server:
    return Server(tmp_path_factory.mktemp("ssh"))


@pytest.fixture
def server(keys: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    keys.configure()
    monkeypatch.setenv("TOOLKIT_SSH_CONFIG", str(keys.config))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    devices._connected.cache_clear()
    _load.cache_clear()
    known = keys.known.read_text()
    keys.start()
    yield keys
    keys.stop()
    keys.known.write_text(known)


@pytest.fixture
def connect(server: Server, tmp_path: Path) -> Callable[..., SshDevice]:
    return lambda host="orin", **options: SshDevice(host, str(tmp_path / "device"), sys.executable, **options)


def gone(pid: str) -> bool:
    """Wait for a process to end, 30 seconds at most."""
    for _ in range(300):
        if not Path(f"/proc/{pid}").exists():
            return True
        time.sleep(0.1)
    return False


def test_programs_and_files(connect: Callable[..., SshDevice], tmp_path: Path) -> None:
    device = connect()
    lines: list[str] = []
    finished = device.run(
        ["sh", "-c", 'cat; echo "$1" >&2; exit 3', "sh", "it's; $HOME"], stdin="a\nb", on_line=lines.append
    )
    assert (lines, finished.returncode, finished.stderr) == (["a", "b"], 3, "it's; $HOME\n")
    content = os.urandom(3 << 20)
    (tmp_path / "source").write_bytes(content)
    device.put(tmp_path / "source", f"{device.root}/some/where")
    assert device.exists(f"{device.root}/some/where")
    assert [path.name for path in Path(device.root, "some").iterdir()] == ["where"], "a temporary file was left"
    device.get(f"{device.root}/some/where", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == content
    device.remove(f"{device.root}/some")
    assert not device.exists(f"{device.root}/some/where")
    with pytest.raises(StageError, match="is not on 'orin'"):
        device.get(f"{device.root}/none", tmp_path / "none")
    assert device.facts()["arch"]


def test_a_copy_that_broke_off_is_gone_on_from(
    server: Server, connect: Callable[..., SshDevice], tmp_path: Path
) -> None:
    device = connect()
    content = os.urandom(20 << 20)
    source, there = tmp_path / "source", Path(device.root, "incoming", "content")
    source.write_bytes(content)
    blocks: list[int] = []

    def cut(count: int) -> None:
        blocks.append(count)
        if len(blocks) == 5:
            server.stop()

    with pytest.raises(StageError, match="broke off during the copying of"):
        device.upload(source, str(there), 0, cut)
    server.start()
    begun = there.stat().st_size
    assert 0 < begun < len(content)
    assert content.startswith(there.read_bytes())
    del blocks[:]
    device.upload(source, str(there), begun, blocks.append)
    assert sum(blocks) == len(content) - begun
    assert there.read_bytes() == content


def test_a_broken_copy_never_takes_its_name(
    server: Server, connect: Callable[..., SshDevice], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program there ends well when the connection is lost, and must not think that it has everything."""
    device = connect()
    monkeypatch.setattr("toolkit.devices.ssh.blocks", lambda file: iter([file.read(1000)]))
    with pytest.raises(StageError, match="could not be copied on 'orin'"):
        device.put(os.urandom(2000), f"{device.root}/whole")
    assert not device.exists(f"{device.root}/whole")


def test_a_full_disk(connect: Callable[..., SshDevice], tmp_path: Path) -> None:
    device = connect()
    with pytest.raises(StageError, match="there is no room left for /dev/full"):
        device.upload(b"x" * 5000, "/dev/full", 0, lambda count: None)


def test_the_home_is_the_devices(server: Server) -> None:
    assert SshDevice("orin", "~/.toolkit", "python3").root == f"{server.home('orin')}/.toolkit"


@pytest.mark.parametrize("name", ["id_ed25519", "id_rsa", "id_ecdsa"])
def test_every_kind_of_key(server: Server, connect: Callable[..., SshDevice], name: str) -> None:
    server.configure(IdentityFile=str(server.folder / name))
    assert connect().run(["true"]).returncode == 0


def test_the_agents_keys(
    server: Server, connect: Callable[..., SshDevice], monkeypatch: pytest.MonkeyPatch
) -> None:
    server.configure(IdentityFile="none", IdentitiesOnly="no")
    with pytest.raises(StageError, match="takes none of the keys") as error:
        connect()
    assert "ssh-copy-id orin" in str(error.value.hint)
    agent = server.folder / "agent"
    process = subprocess.Popen(["ssh-agent", "-D", "-a", str(agent)], stdout=subprocess.DEVNULL)
    try:
        while not agent.exists():
            time.sleep(0.02)
        monkeypatch.setenv("SSH_AUTH_SOCK", str(agent))
        subprocess.run(["ssh-add", "-q", str(server.folder / "id_rsa")], check=True)
        assert connect().run(["true"]).returncode == 0
    finally:
        process.kill()
        process.wait()
        agent.unlink()


def test_an_encrypted_key_without_a_terminal(
    server: Server, connect: Callable[..., SshDevice], caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copy(server.folder / "id_ed25519", server.folder / "locked")
    keygen("-p", "-P", "", "-N", "secret", "-f", str(server.folder / "locked"))
    server.configure(IdentityFile=str(server.folder / "locked"))
    with pytest.raises(StageError, match="takes none of the keys"):
        connect()
    assert "is encrypted and there is no terminal to ask on: ssh-add it" in caplog.text


def test_a_foreign_key_is_refused(server: Server, connect: Callable[..., SshDevice]) -> None:
    server.configure(IdentityFile=str(server.folder / "stranger"))
    with pytest.raises(StageError, match="takes none of the keys"):
        connect()


def test_an_unknown_host_key(server: Server, connect: Callable[..., SshDevice]) -> None:
    server.known.write_text("")
    fingerprint = subprocess.run(
        ["ssh-keygen", "-lf", str(server.folder / "host_key.pub")], capture_output=True, text=True, check=True
    ).stdout.split()[1]
    with pytest.raises(StageError, match="the host key of 'orin' is not known: ssh-ed25519") as error:
        connect()
    assert fingerprint in error.value.message
    assert f"ssh-keyscan -p {server.port} 127.0.0.1 >> {server.known}" in str(error.value.hint)
    assert server.known.read_text() == ""
    assert connect(accept_new_host_key=True).run(["true"]).returncode == 0
    assert connect().run(["true"]).returncode == 0, "it is known from then on"


def test_a_changed_host_key_is_refused_always(server: Server, connect: Callable[..., SshDevice]) -> None:
    other = " ".join((server.folder / "stranger.pub").read_text().split()[:2])
    server.known.write_text(f"[127.0.0.1]:{server.port} {other}\n")
    for accept in (False, True):
        with pytest.raises(StageError, match="has changed: SHA256:") as error:
            connect(accept_new_host_key=accept)
        assert "ssh-keygen -R" in str(error.value.hint)


def test_a_host_key_under_another_name(server: Server, connect: Callable[..., SshDevice]) -> None:
    server.known.write_text(server.known.read_text().replace(f"[127.0.0.1]:{server.port}", "the-orin"))
    server.configure(HostKeyAlias="the-orin")
    assert connect().run(["true"]).returncode == 0


@pytest.mark.parametrize("option", ["ProxyJump", "ProxyCommand"])
def test_behind_another_host(server: Server, connect: Callable[..., SshDevice], option: str) -> None:
    config = server.config
    value = "orin" if option == "ProxyJump" else f"ssh -F {config} -W %h:%p orin"
    inner = (server.folder / "hosts").read_text().replace("Host orin", "Host inner") + f"  {option} {value}\n"
    config.write_text(f"Include {server.folder}/hosts\n{inner}")
    assert connect("inner").run(["true"]).returncode == 0


def test_what_cannot_be_reached(server: Server, connect: Callable[..., SshDevice]) -> None:
    for wrong in ("", "-oProxyCommand=true", "two words"):
        with pytest.raises(UsageError, match="is no host"):
            Address.resolve(wrong)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        server.configure(Port=str(closed.getsockname()[1]))
        with pytest.raises(StageError, match="cannot be reached: Connection refused") as error:
            connect()
    assert "ssh orin true" in str(error.value.hint)
    server.configure(HostName="no-such-host.invalid")
    with pytest.raises(StageError, match="is not known"):
        connect()


def test_a_time_limit_ends_the_program_there(connect: Callable[..., SshDevice], tmp_path: Path) -> None:
    device = connect()
    with pytest.raises(StageError, match="did not end within 1 s"):
        device.run(["sh", "-c", f"echo $$ > {tmp_path}/pid; exec sleep 300"], timeout=1)
    assert gone((tmp_path / "pid").read_text().strip())


def test_an_interruption_ends_the_program_there(connect: Callable[..., SshDevice], tmp_path: Path) -> None:
    device = connect()

    def interrupt(line: str) -> None:
        (tmp_path / "pid").write_text(line)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        device.run(["sh", "-c", "echo $$; exec sleep 300"], on_line=interrupt)
    assert gone((tmp_path / "pid").read_text())


def test_a_lost_connection_is_made_again(server: Server, connect: Callable[..., SshDevice]) -> None:
    device = connect()
    stops = threading.Timer(1, server.stop)
    stops.start()
    with pytest.raises(StageError, match="the connection to 'orin' broke off during sleep"):
        device.run(["sleep", "30"])
    stops.join()
    server.start()
    assert device.run(["true"]).returncode == 0
    assert not device.exists(f"{device.root}/none")


def test_the_whole_job_over_ssh(server: Server, finished_copy: Path, tmp_path: Path) -> None:
    target = finished_copy / "targets" / "tiny.yaml"
    target.write_text(f"{target.read_text()}host: orin\nroot: {tmp_path}/there\npython: {sys.executable}\n")
    arguments = ("run", "tiny", "--precision", "int8", "--json")
    result = run_toolkit(finished_copy, *arguments)
    assert result.returncode == 0, result.stderr
    run: dict[str, Any] = json.loads(result.stdout)
    assert run["commit"]["committed"]
    current = tmp_path / "there" / "current"
    assert current.resolve().name == run["commit"]["release"]
    again = run_toolkit(finished_copy, *arguments)
    assert json.loads(again.stdout)["artifacts"] == run["artifacts"]
    listed = json.loads(run_toolkit(finished_copy, "releases", "tiny", "--json").stdout)
    assert [entry["id"] for entry in listed["releases"]] == [run["commit"]["release"]]
    (current / "model.optimized.onnx").write_bytes(b"damaged")
    mended = run_toolkit(finished_copy, *arguments)
    assert mended.returncode == 0, mended.stderr
    assert "the device's copy of model.optimized.onnx was damaged and has been replaced" in mended.stderr


def test_a_plan_over_ssh_and_without(server: Server, finished_copy: Path) -> None:
    result = run_toolkit(finished_copy, "plan", "jetson-orin", "--host", "orin", "--profile", "tiny")
    assert "and orin has no NVIDIA GPU" in result.stdout + result.stderr


def test_the_doctor_over_ssh(server: Server, finished_copy: Path, tmp_path: Path) -> None:
    target = finished_copy / "targets" / "tiny.yaml"
    target.write_text(f"{target.read_text()}root: {tmp_path}/there\npython: {sys.executable}\n")
    result = run_toolkit(finished_copy, "doctor", "tiny", "--host", "orin", "--json")
    assert result.returncode == 0, result.stdout
    device = json.loads(result.stdout)["device"]
    assert device["name"] == "orin"
    assert device["facts"]["numpy"]
    refused = run_toolkit(finished_copy, "run", "jetson-orin", "--host", "orin", "--profile", "tiny")
    assert refused.returncode == 1
    assert "warning: the run will end before 'build'" in refused.stderr
