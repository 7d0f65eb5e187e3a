"""A machine that is reached over SSH, by whatever name `ssh NAME` takes."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import paramiko
from paramiko.auth_strategy import AuthFailure

from toolkit.devices.ssh_address import Address
from toolkit.devices.ssh_keys import HostKeys, Keys
from toolkit.errors import StageError
from toolkit.process import Finished

log = logging.getLogger(__name__)
logging.getLogger("paramiko").setLevel(logging.CRITICAL)  # its tracebacks reach the user as sentences, from here

_CONNECT_SECONDS, _KEEPALIVE_SECONDS = 10, 15
_PAUSES = (1.0, 2.0, 4.0)  # seconds between tries to connect again
_GRACE = 5.0  # seconds that a remote program has to end what it started itself


class SshDevice:
    """A machine over SSH.

    Args:
        host: A name of ``~/.ssh/config``, or ``user@host[:port]``.
        root: Folder for releases there; ``~`` is the user's home.
        python: Python there that the agent runs on.
        accept_new_host_key: Whether a host key that nobody knows is trusted on first use.
    """

    def __init__(self, host: str, root: str, python: str, accept_new_host_key: bool = False) -> None:
        self.name = host
        self.python = python
        self._address = Address.resolve(host)
        self._accept_new = accept_new_host_key
        self._client: paramiko.SSHClient | None = None
        self._sftp: paramiko.SFTPClient | None = None
        home = self._files().normalize(".")
        self.root = root.replace("~", home, 1) if root.startswith("~") else root

    # --- the connection --------------------------------------------------------------------------------------

    def _connected(self) -> paramiko.SSHClient:
        """Return the connection, made anew with growing pauses when it is lost."""
        transport = self._client.get_transport() if self._client else None
        if self._client is not None and transport is not None and transport.is_active():
            return self._client
        self._sftp = None
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
            proxy = paramiko.ProxyCommand(address.proxy) if address.proxy else None
            client.connect(
                alias or address.hostname,
                # a name for its key stands without a port, as in OpenSSH; with a socket nothing else is meant by it
                22 if alias else address.port,
                address.user,
                sock=proxy or socket.create_connection((address.hostname, address.port), timeout),
                timeout=timeout,
                banner_timeout=timeout,
                auth_timeout=timeout * 3,
                auth_strategy=Keys(address),
            )
        except paramiko.BadHostKeyException as error:
            raise StageError(
                f"the host key of {where} has changed: {error.key.fingerprint} instead of "
                f"{error.expected_key.fingerprint}; it may be another machine",
                f"find out why; only if it was set up anew: ssh-keygen -R '{error.hostname}'",
            ) from error
        except (AuthFailure, paramiko.AuthenticationException) as error:
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
        transport.set_keepalive(int(address.seconds("serveraliveinterval", _KEEPALIVE_SECONDS)))
        return client

    def _files(self) -> paramiko.SFTPClient:
        client = self._connected()
        if self._sftp is None:
            try:
                self._sftp = client.open_sftp()
            except paramiko.SSHException as error:
                raise StageError(
                    f"'{self.name}' has no SFTP: {error}", "set 'Subsystem sftp internal-sftp' in its sshd_config"
                ) from error
        return self._sftp

    # --- programs --------------------------------------------------------------------------------------------

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
        # the first line is the process to end when this side breaks off: closing a channel ends nothing
        command = shlex.join(["sh", "-c", 'echo $$; exec "$@"', "sh", *argv])
        expired = threading.Event()
        stderr: list[str] = []
        process = 0
        try:
            transport = self._connected().get_transport()
            assert transport is not None
            channel = transport.open_session()

            def expire() -> None:
                expired.set()
                channel.close()

            timer = threading.Timer(timeout, expire) if timeout else None
            try:
                if timer:
                    timer.start()
                channel.exec_command(command)
                drain = threading.Thread(
                    target=lambda: stderr.extend(_lines(channel.makefile_stderr("rb"))), daemon=True
                )
                drain.start()
                output = _lines(channel.makefile("rb"))
                process = int(next(output, "0"))
                _feed(channel, stdin)
                for line in output:
                    on_line(line.rstrip("\n"))
                drain.join()
                returncode = channel.recv_exit_status()
                if returncode == -1:
                    raise EOFError("the connection was lost")
                process = 0
            finally:
                if timer:
                    timer.cancel()
                channel.close()
                if process:
                    self._end(process)
        except (OSError, EOFError, paramiko.SSHException) as error:
            if not expired.is_set():
                raise StageError(
                    f"the connection to '{self.name}' broke off during {argv[0]}: {error}",
                    "the same command continues where it stopped",
                ) from error
        if expired.is_set():
            raise StageError(
                f"{argv[0]} on '{self.name}' did not end within {timeout:g} s", "look at the device's load"
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

    # --- files -----------------------------------------------------------------------------------------------

    def put(self, source: Path | bytes, destination: str) -> None:
        """Copy a file or bytes there; the destination is whole or absent."""
        folder, _, name = destination.rpartition("/")
        temporary = f"{folder}/.{name}.{os.getpid()}"
        with _explained(self.name, destination):
            files = self._files()
            _make_folders(files, folder)
            if isinstance(source, bytes):
                with files.open(temporary, "wb") as file:
                    file.write(source)
            else:
                files.put(str(source), temporary)
            files.posix_rename(temporary, destination)

    def get(self, source: str, destination: Path) -> None:
        """Copy a file from there."""
        with _explained(self.name, source):
            self._files().get(source, str(destination))

    def exists(self, path: str) -> bool:
        """Tell whether a file is there."""
        with _explained(self.name, path):
            try:
                self._files().stat(path)
            except FileNotFoundError:
                return False
            return True

    def remove(self, path: str) -> None:
        """Remove a folder and what is in it; what cannot be removed stays."""
        self.run(["rm", "-rf", "--", path])


def _lines(file: Any) -> Iterator[str]:
    for line in file:
        yield line.decode("utf-8", "replace")


def _feed(channel: paramiko.Channel, text: str) -> None:
    try:
        channel.sendall(text.encode())
        channel.shutdown_write()
    except OSError:
        log.info("the program ended before it had read its input")


@contextlib.contextmanager
def _explained(name: str, path: str) -> Iterator[None]:
    """Turn what goes wrong with a file on the device into a sentence."""
    try:
        yield
    except PermissionError as error:
        raise StageError(
            f"no permission for {path} on '{name}'", "choose another folder: root in the target file"
        ) from error
    except FileNotFoundError as error:
        raise StageError(f"{path} is not on '{name}'", "run the same command again") from error
    except (OSError, EOFError, paramiko.SSHException) as error:
        full = "free space there" if "Failure" in str(error) else "the same command continues where it stopped"
        raise StageError(
            f"copying {path} on '{name}' broke off: {error or 'the connection was lost'}", full
        ) from error


def _make_folders(files: paramiko.SFTPClient, folder: str) -> None:
    missing = []
    while folder:
        try:
            files.stat(folder)
            break
        except FileNotFoundError:
            missing.append(folder)
            folder = folder.rpartition("/")[0]
    for path in reversed(missing):
        with contextlib.suppress(OSError):  # another connection may have made it meanwhile
            files.mkdir(path)
