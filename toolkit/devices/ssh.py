"""A machine that is reached over SSH, by whatever name `ssh NAME` takes."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import paramiko
from paramiko.auth_strategy import AuthFailure

from toolkit.devices.content import BLOCK, blocks, opened
from toolkit.devices.ssh_address import Address
from toolkit.devices.ssh_keys import HostKeys, Keys
from toolkit.devices.ssh_line import dial, keep_alive
from toolkit.errors import StageError
from toolkit.process import Finished

log = logging.getLogger(__name__)
logging.getLogger("paramiko").setLevel(logging.CRITICAL)  # its tracebacks reach the user as sentences, from here

_CONNECT_SECONDS = 10
_PAUSES = (1.0, 2.0, 4.0)  # seconds between tries to connect again
_GRACE = 5.0  # seconds that a remote program has to end what it started itself


class SshDevice:
    """A machine over SSH.

    Args:
        host: A name of ``~/.ssh/config``, or ``user@host[:port]``.
        root: Folder for releases there; ``~`` is the user's home.
        python: Python there that the agent runs on until the device is provisioned.
        accept_new_host_key: Whether a host key that nobody knows is trusted on first use.
    """

    def __init__(self, host: str, root: str, python: str, accept_new_host_key: bool = False) -> None:
        self.name = host
        self._python = python
        self.lease: str | None = None
        self._address = Address.resolve(host)
        self._accept_new = accept_new_host_key
        self._connecting = threading.Lock()  # a lease is renewed in a thread of its own
        self._client: paramiko.SSHClient | None = None
        self._channels: set[paramiko.Channel] = set()
        self._broken_off = False
        self._connected()
        self.root = root.replace("~", self._home(), 1) if root.startswith("~") else root

    # --- the connection --------------------------------------------------------------------------------------

    def _connected(self) -> paramiko.SSHClient:
        """Return the connection, made anew with growing pauses when it is lost."""
        with self._connecting:
            transport = self._client.get_transport() if self._client else None
            if self._client is not None and transport is not None and transport.is_active():
                return self._client
            for pause in _PAUSES if self._client is not None else ():
                with contextlib.suppress(StageError):
                    self._client = self._connect()
                    return self._client
                log.info("'%s' cannot be reached; again in %g s", self.name, pause)
                time.sleep(pause)
            self._client = self._connect()
            return self._client

    def _connect(self) -> paramiko.SSHClient:
        address = self._address
        client = paramiko.SSHClient()
        for file in [*address.paths("userknownhostsfile"), *address.paths("globalknownhostsfile")]:
            client.load_system_host_keys(str(file))
        client.set_missing_host_key_policy(HostKeys(address, self._accept_new))
        alias = address.get("hostkeyalias")
        timeout = address.seconds("connecttimeout", _CONNECT_SECONDS)
        where = f"'{address.name}' ({address.user}@{address.hostname}:{address.port})"
        log.info("ssh: connecting to %s", where)
        try:
            line = dial(address, timeout)
            client.connect(
                alias or address.hostname,
                # a name for its key stands without a port, as in OpenSSH; with a socket nothing else is meant by it
                22 if alias else address.port,
                address.user,
                sock=line,
                timeout=timeout,
                banner_timeout=timeout,
                auth_timeout=timeout * 3,
                auth_strategy=Keys(address),
                transport_factory=_transport,
            )
        except paramiko.BadHostKeyException as error:
            raise StageError(
                f"the host key of {where} has changed: {error.key.fingerprint} instead of "
                f"{error.expected_key.fingerprint}; it may be another machine",
                f"find out why; only if it was set up anew: ssh-keygen -R '{error.hostname}'",
            ) from error
        except (AuthFailure, paramiko.AuthenticationException) as error:
            if "saw EOF" in str(error) or "timeout" in str(error):  # paramiko has no other way to say it
                raise StageError(
                    f"{where} cannot be reached: the connection was lost while it looked at the keys",
                    f"check that 'ssh {address.name} true' works",
                ) from error
            raise StageError(
                f"{where} takes none of the keys that this user has",
                f"ssh-copy-id {address.name}, or ssh-add the key; passwords are not used",
            ) from error
        except socket.gaierror as error:
            raise StageError(
                f"the host {where} is not known: {error.strerror}", "check the name, or give it in ~/.ssh/config"
            ) from error
        except (OSError, EOFError, paramiko.SSHException) as error:
            reason = getattr(error, "strerror", None) or str(error) or "the connection was closed"
            raise StageError(
                f"{where} cannot be reached: {reason}", f"check that 'ssh {address.name} true' works"
            ) from error
        transport = client.get_transport()
        assert transport is not None
        keep_alive(transport, line, address)
        return client

    def _home(self) -> str:
        lines: list[str] = []
        self.run(["sh", "-c", "cd && pwd"], on_line=lines.append)
        return lines[-1]

    def break_off(self) -> None:
        """End what another thread is doing here; it hears of it by a StageError."""
        self._broken_off = True
        for channel in list(self._channels):
            channel.close()

    def _require_wanted(self) -> None:
        """Raise when the work was broken off; only once, since afterwards things are put in order."""
        if self._broken_off:
            self._broken_off = False
            raise StageError(f"the work on '{self.name}' was broken off")

    # --- programs --------------------------------------------------------------------------------------------

    @cached_property
    def python(self) -> str:
        """The Python that the agent runs on: the provisioned environment's, where there is one."""
        provisioned = f"{self.root}/environment/bin/python"
        return provisioned if self.exists(provisioned) else self._python

    def facts(self) -> dict[str, Any]:
        """Return what the agent there says of it; asked once."""
        return self._facts

    @cached_property
    def _facts(self) -> dict[str, Any]:
        from toolkit.devices.agent import Agent

        return Agent(self).ask("facts", {"root": self.root})

    def run(
        self,
        argv: Sequence[str],
        *,
        stdin: str = "",
        on_line: Callable[[str], None] = lambda line: None,
        timeout: float | None = None,
    ) -> Finished:
        """Run a program there; see :class:`toolkit.devices.Device`.

        Raises:
            StageError: The connection breaks, or the program runs past ``timeout``.
        """
        log.info("run on %s: %s", self.name, shlex.join(argv))

        def hear(output: Any) -> None:
            for line in _lines(output):
                on_line(line.rstrip("\n"))

        return self._execute(argv, [stdin.encode()], hear, timeout, argv[0])

    def _execute(
        self,
        argv: Sequence[str],
        stdin: Iterable[bytes],
        hear: Callable[[Any], object],
        timeout: float | None,
        what: str,
    ) -> Finished:
        """Run a program there: ``stdin`` goes in, ``hear`` reads what comes out, ``what`` is for messages."""
        # the first line is the process to end when this side breaks off: closing a channel ends nothing
        command = shlex.join(["sh", "-c", 'echo $$; exec "$@"', "sh", *argv])
        expired = threading.Event()
        stderr: list[str] = []
        process = 0
        self._require_wanted()
        try:
            transport = self._connected().get_transport()
            assert transport is not None
            channel = transport.open_session()

            def expire() -> None:
                expired.set()
                channel.close()

            timer = threading.Timer(timeout, expire) if timeout else None
            try:
                self._channels.add(channel)
                if timer:
                    timer.start()
                channel.exec_command(command)
                drain = threading.Thread(
                    target=lambda: stderr.extend(_lines(channel.makefile_stderr("rb"))), daemon=True
                )
                drain.start()
                output = channel.makefile("rb", BLOCK)
                process = _process(output)
                _feed(channel, stdin)
                hear(output)
                drain.join()
                returncode = channel.recv_exit_status()
                if returncode == -1 and not channel.eof_received:  # with it, the program was killed
                    raise EOFError("the connection was lost")
                process = 0
            finally:
                if timer:
                    timer.cancel()
                self._channels.discard(channel)
                channel.close()
                if process:
                    self._end(process)
        except (OSError, EOFError, paramiko.SSHException) as error:
            self._require_wanted()
            if not expired.is_set():
                raise StageError(
                    f"the connection to '{self.name}' broke off during {what}: "
                    f"{getattr(error, 'strerror', None) or error}",
                    "the same command continues where it stopped",
                ) from error
        if expired.is_set():
            raise StageError(
                f"{what} on '{self.name}' did not end within {timeout:g} s", "look at the device's load"
            )
        return Finished(returncode, "".join(stderr))

    def _end(self, process: int) -> None:
        """End a program there whose channel is closed; as far as the device can still be reached."""
        script = f"kill -TERM {process} && sleep {_GRACE:g} && kill -KILL {process}"
        try:
            transport = self._client.get_transport() if self._client else None
            if transport is not None and transport.is_active():
                transport.open_session().exec_command(f"({script}) > /dev/null 2>&1 &")
        except (OSError, EOFError, paramiko.SSHException):
            log.info("process %d on %s could not be ended", process, self.name)

    # --- files: through the shell, since a device may have no SFTP and a round trip is dear ---------------------

    def put(self, source: Path | bytes, destination: str) -> None:
        """Copy a file or bytes there; the destination is whole or absent."""
        folder, _, name = destination.rpartition("/")
        temporary = f"{folder}/.{name}.{os.getpid()}"
        # cat ends well when the connection is lost, too: only the length tells
        script = 'mkdir -p -- "$1" && cat > "$2" && [ "$(wc -c < "$2")" -eq "$4" ] && mv -f -- "$2" "$3"'
        with opened(source) as file:
            length = str(file.seek(0, os.SEEK_END))
            file.seek(0)
            self._copy(script, [folder, temporary, destination, length], blocks(file), destination)

    def upload(self, source: Path | bytes, destination: str, offset: int, progress: Callable[[int], None]) -> None:
        """Copy a file or bytes there from ``offset`` on, in place; see :class:`toolkit.devices.Device`."""
        # bytes go to their places, not to the end: dd moves there and copies nothing
        script = 'mkdir -p -- "$1" && { dd bs=1 seek="$3" count=0 < /dev/null 2> /dev/null && cat; } 1<> "$2"'
        with opened(source) as file:
            file.seek(offset)
            folder = destination.rpartition("/")[0]
            self._copy(script, [folder, destination, str(offset)], blocks(file, progress), destination)

    def get(self, source: str, destination: Path) -> None:
        """Copy a file from there."""
        with destination.open("wb") as file:
            self._copy('cat -- "$1"', [source], (), source, lambda output: shutil.copyfileobj(output, file, BLOCK))

    def exists(self, path: str) -> bool:
        """Tell whether a file is there."""
        return self.run(["test", "-e", path]).returncode == 0

    def remove(self, path: str) -> None:
        """Remove a file, or a folder and what is in it; what cannot be removed stays."""
        self.run(["rm", "-rf", "--", path])

    def _copy(
        self,
        script: str,
        arguments: Sequence[str],
        content: Iterable[bytes],
        path: str,
        hear: Callable[[Any], object] = lambda output: output.read(),
    ) -> None:
        """Run a script that copies ``path``; what goes wrong with it becomes a sentence."""
        log.info("copy on %s: %s %s", self.name, script, shlex.join(arguments))
        argv = ["sh", "-c", f"LC_ALL=C; export LC_ALL; {script}", "sh", *arguments]
        finished = self._execute(argv, content, hear, None, f"the copying of {path}")
        if finished.returncode == 0:
            return
        said = (finished.stderr.strip().splitlines() or [f"exit {finished.returncode}"])[-1]
        if "No space left" in said or "quota exceeded" in said:
            raise StageError(f"there is no room left for {path} on '{self.name}'", "free space there")
        if "No such file" in said:
            raise StageError(f"{path} is not on '{self.name}'", "run the same command again")
        if "Permission denied" in said or "Read-only" in said:
            raise StageError(
                f"no permission for {path} on '{self.name}'", "choose another folder: root in the target file"
            )
        raise StageError(f"{path} could not be copied on '{self.name}': {said}", "look at the device's disk")


def _transport(connection: Any, **options: Any) -> paramiko.Transport:
    """Prefer AES-GCM, which processors have instructions for: a third faster than AES-CTR with an HMAC."""
    transport = paramiko.Transport(connection, **options)
    security = transport.get_security_options()
    security.ciphers = sorted(security.ciphers, key=lambda name: "gcm" not in name)
    return transport


def _process(output: Any) -> int:
    """Return the number that the first line names; what a login shell greets with comes before it."""
    for line in _lines(output):
        if line.strip().isdigit():
            return int(line)
        log.info("%s", line.rstrip())
    return 0


def _lines(file: Any) -> Iterator[str]:
    for line in file:
        yield line.decode("utf-8", "replace")


def _feed(channel: paramiko.Channel, content: Iterable[bytes]) -> None:
    try:
        for block in content:
            channel.sendall(block)
        channel.shutdown_write()
    except OSError:
        log.info("the program ended before it had read its input")
