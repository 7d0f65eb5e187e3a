"""A machine that is reached over SSH, by whatever name `ssh NAME` takes."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import paramiko
from paramiko.auth_strategy import AuthFailure, AuthSource, AuthStrategy, InMemoryPrivateKey
from paramiko.pkey import PublicBlob, UnknownKeyType

from toolkit.errors import StageError, UsageError
from toolkit.process import Finished

log = logging.getLogger(__name__)
logging.getLogger("paramiko").setLevel(logging.CRITICAL)  # its tracebacks reach the user as sentences, from here

_CONNECT_SECONDS, _KEEPALIVE_SECONDS = 10, 15
_PAUSES = (1.0, 2.0, 4.0)  # seconds between tries to connect again
_GRACE = 5.0  # seconds that a remote program has to end what it started itself


@dataclass(frozen=True)
class Address:
    """What OpenSSH's own configuration says of a host, its includes and matches resolved.

    Attributes:
        name: What the user typed.
        options: Keyword in lower case to its values, as ``ssh -G`` prints them.
    """

    name: str
    options: dict[str, list[str]]

    @classmethod
    def resolve(cls, name: str) -> Address:
        """Ask ``ssh -G``; raises UsageError for what is no host name, StageError where there is no ssh."""
        host, _, port = name.rpartition(":") if name.rpartition(":")[2].isdigit() else (name, "", "")
        if not host or host.startswith("-") or any(c.isspace() for c in name):
            raise UsageError(f"'{name}' is no host", "write a name of ~/.ssh/config, or user@host[:port]")
        command = [*_ssh(), "-G", *(["-p", port] if port else []), "--", host]
        try:
            found = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        except OSError as error:
            raise StageError("there is no ssh on this machine", "sudo apt-get install openssh-client") from error
        if found.returncode != 0:
            reason = (found.stderr.strip().splitlines() or ["it gave no reason"])[-1]
            raise UsageError(f"ssh does not take '{name}': {reason}", "correct ~/.ssh/config, or the name")
        options: dict[str, list[str]] = {}
        for line in found.stdout.splitlines():
            key, _, value = line.partition(" ")
            options.setdefault(key.lower(), []).append(value)
        return cls(name, options)

    def get(self, key: str) -> str | None:
        """Return an option's value; None where it is not set."""
        value = self.options.get(key, ["none"])[0]
        return None if value == "none" else value

    @property
    def hostname(self) -> str:
        """Name or address to connect to."""
        return self.options["hostname"][0]

    @property
    def port(self) -> int:
        """Port to connect to."""
        return int(self.options["port"][0])

    @property
    def user(self) -> str:
        """User to log in as."""
        return self.options["user"][0]

    def seconds(self, key: str, default: float) -> float:
        """Return an option in seconds, or a default where it is not set or 0."""
        return float(self.get(key) or 0) or default

    def paths(self, key: str) -> list[Path]:
        """Return an option of files that exist."""
        named = [Path(word).expanduser() for value in self.options.get(key, []) for word in shlex.split(value)]
        return [path for path in named if path.is_file()]

    @property
    def proxy(self) -> str | None:
        """Command whose streams are the connection, where the host is behind another."""
        jumps = self.get("proxyjump")
        if jumps is None:
            return self.get("proxycommand")
        *before, last = jumps.split(",")
        through = ["-J", ",".join(before)] if before else []
        target = f"[{self.hostname}]:{self.port}"
        host, _, port = last.rpartition(":") if last.rpartition(":")[2].isdigit() else (last, "", "")
        return shlex.join([*_ssh(), *through, *(["-p", port] if port else []), "-W", target, "--", host])


def _ssh() -> list[str]:
    """Return OpenSSH's client, with the configuration file that TOOLKIT_SSH_CONFIG names."""
    config = os.environ.get("TOOLKIT_SSH_CONFIG")
    return ["ssh", *(["-F", config] if config else [])]


class _HostKeys(paramiko.MissingHostKeyPolicy):
    """Refuses a host whose key nobody knows yet, or writes it down on first use, if that was asked for."""

    def __init__(self, address: Address, accept_new: bool) -> None:
        self._address = address
        self._accept_new = accept_new

    def missing_host_key(self, client: paramiko.SSHClient, hostname: str, key: paramiko.PKey) -> None:
        file = Path(shlex.split(self._address.get("userknownhostsfile") or "~/.ssh/known_hosts")[0]).expanduser()
        if self._accept_new:
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with file.open("a", encoding="utf-8") as known:
                known.write(f"{hostname} {key.get_name()} {key.get_base64()}\n")
            log.warning(
                "the host key of '%s' is new and is trusted from now on: %s", self._address.name, key.fingerprint
            )
            return
        port = f"-p {self._address.port} " if self._address.port != 22 else ""
        raise StageError(
            f"the host key of '{self._address.name}' is not known: {key.get_name()} {key.fingerprint}",
            f"compare it with ssh-keygen -lf /etc/ssh/ssh_host_{_kind(key)}_key.pub on the device, then add it: "
            f"ssh-keyscan {port}{self._address.hostname} >> {file}, or --accept-new-host-key",
        )


def _kind(key: paramiko.PKey) -> str:
    return next(kind for kind in ("ed25519", "ecdsa", "rsa") if kind in key.get_name())


class _Keys(AuthStrategy):
    """Tries the agent's keys, then the files of the configuration; an encrypted file is asked for once."""

    def __init__(self, address: Address) -> None:
        super().__init__(ssh_config=paramiko.SSHConfig())
        self._address = address

    def get_sources(self) -> Iterator[AuthSource]:
        user, files = self._address.user, self._address.paths("identityfile")
        only = {_public(path) for path in files} if self._address.get("identitiesonly") == "yes" else None
        offered = set()
        for key in paramiko.Agent().get_keys():
            if only is None or key.asbytes() in only:
                offered.add(key.asbytes())
                yield InMemoryPrivateKey(user, key)
        for path in files:
            if _public(path) not in offered:
                found = _load(path)
                if found is not None:
                    yield InMemoryPrivateKey(user, found)


def _public(path: Path) -> bytes | None:
    """Return the public half that lies beside a private key; None where it does not."""
    try:
        words = path.with_name(f"{path.name}.pub").read_text(encoding="utf-8").split()
        return PublicBlob.from_string(" ".join(words[:2])).key_blob
    except (OSError, ValueError):
        return None


@functools.cache
def _load(path: Path) -> paramiko.PKey | None:
    """Return a private key; its passphrase is asked for on a terminal, and without one the key is left out."""
    try:
        return paramiko.PKey.from_path(path)
    except (paramiko.PasswordRequiredException, TypeError):
        if not sys.stdin.isatty():
            log.warning("the key %s is encrypted and there is no terminal to ask on: ssh-add it", path)
            return None
    except (paramiko.SSHException, UnknownKeyType, ValueError, OSError) as error:
        log.info("the key %s is left out: %s", path, error)
        return None
    import click

    phrase = click.prompt(f"Passphrase of {path}", hide_input=True, err=True)
    try:
        return paramiko.PKey.from_path(path, phrase)
    except (paramiko.SSHException, ValueError) as error:
        raise StageError(f"the passphrase does not open {path}", "try again, or ssh-add it") from error


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
        client.set_missing_host_key_policy(_HostKeys(address, self._accept_new))
        alias = address.get("hostkeyalias")
        timeout = address.seconds("connecttimeout", _CONNECT_SECONDS)
        where = f"'{address.name}' ({address.user}@{address.hostname}:{address.port})"
        log.info("ssh: connecting to %s", where)
        try:
            proxy = paramiko.ProxyCommand(_expand(address.proxy, address)) if address.proxy else None
            client.connect(
                alias or address.hostname,
                # a name for its key stands without a port, as in OpenSSH; with a socket nothing else is meant by it
                22 if alias else address.port,
                address.user,
                sock=proxy or socket.create_connection((address.hostname, address.port), timeout),
                timeout=timeout,
                banner_timeout=timeout,
                auth_timeout=timeout * 3,
                auth_strategy=_Keys(address),
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


def _expand(command: str, address: Address) -> str:
    """Fill in a ProxyCommand's tokens (ssh_config(5), TOKENS)."""
    for token, value in (
        ("%h", address.hostname),
        ("%p", str(address.port)),
        ("%r", address.user),
        ("%n", address.name),
    ):
        command = command.replace(token, value)
    return command.replace("%%", "%").removeprefix("exec ")


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
