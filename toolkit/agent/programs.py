"""Programs on the device, those that only root may run among them."""

from __future__ import annotations

import os
import pwd
import re
import shlex
import shutil
import subprocess

from .protocol import Refusal

_SYSTEM = ":/usr/sbin:/sbin"  # where a user's PATH does not lead on every distribution
_SECONDS = 60.0
# nvidia-smi goes on after some of them and ends with 0, as jetson_clocks always does
_ERROR = re.compile(
    r"^(?:NVPM ERROR|Error\b|(?:Setting|Changing) .* is not supported"
    r"|.* does not have permission|.* has been deprecated)",
    re.MULTILINE,
)


class Root:
    """Runs what root alone may run: as this user, or through ``sudo -n`` where the target file allows it.

    Args:
        folder: Where programs run; a name without a folder is one in it, so that a rule of sudoers can name it.
        sudo: Whether sudo may be used.
    """

    def __init__(self, folder: str, sudo: bool) -> None:
        self.folder = folder
        self.rights: list[str] = []  # what the knobs run, as sudoers spells it
        self._sudo = sudo

    def run(self, *argv: str, text: str = "") -> str:
        """Run a program and return what it says.

        Raises:
            Refusal: It fails, or says that it did.
        """
        code, said = self.ask(*argv, text=text)
        if code != 0 or _ERROR.search(said):
            raise Refusal(
                "{} does not work: {}".format(shlex.join(argv), reason(said)), "try it there by hand, as root"
            )
        return said

    def ask(self, *argv: str, text: str = "") -> tuple[int, str]:
        """Run a program and return its exit status and what it says.

        Raises:
            Refusal: This user may not run it.
        """
        if os.geteuid() == 0:
            return ask(*argv, text=text, folder=self.folder)
        rule = "{} ALL=(root) NOPASSWD: {}".format(pwd.getpwuid(os.getuid()).pw_name, ", ".join(self.rights))
        remedy = "put this line into /etc/sudoers.d/toolkit there, with sudo visudo -f: {}".format(rule)
        if not self._sudo:
            raise Refusal(
                "power mode and clocks are set by root, which this user is not",
                "set sudo: true in the target file, and {}".format(remedy),
            )
        # -k: a password that was typed before must not count, since it may be forgotten when all is set back
        code, said = ask("sudo", "-k", "-n", *argv, text=text, folder=self.folder)
        if code != 0 and reason(said).lower().startswith(("sudo:", "sorry, user")):
            raise Refusal("sudo does not run {}: {}".format(shlex.join(argv), reason(said)), remedy)
        return code, said


def find(name: str) -> str | None:
    """Return a program's path; None where it is not installed."""
    return shutil.which(name, path=os.environ.get("PATH", os.defpath) + _SYSTEM)


def program(name: str) -> str:
    """Return a program's path; refuses where it is not installed."""
    path = find(name)
    if path is None:
        raise Refusal("{} is not there".format(name), "install it again")
    return path


def ask(*argv: str, text: str = "", folder: str | None = None) -> tuple[int, str]:
    """Run a program and return its exit status and what it says."""
    try:
        done = subprocess.run(
            argv,
            input=text.encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_SECONDS,
            cwd=folder,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise Refusal(
            "{} did not end within {:g} s".format(shlex.join(argv), _SECONDS), "look at the device's load"
        ) from error
    except FileNotFoundError as error:
        raise Refusal("{} is not there".format(argv[0]), "install it, or log in as root") from error
    return done.returncode, done.stdout.decode("utf-8", "replace")


def reason(said: str) -> str:
    """Return the line of a program's that says why it does not work."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if _ERROR.match(line) or line.startswith("sudo:")]
    return (errors or lines or ["it says nothing"])[-1]
