"""Linux hosts through the system's OpenSSH client, with the user's own configuration, keys and known hosts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cfsp.errors import InputError
from runtime_bench.targets.transport import meaning_of

_HOST = re.compile(
    r"(?:(?P<user>[A-Za-z0-9_][\w.+-]*)@)?(?P<host>[A-Za-z0-9_][\w.-]*|\[[0-9A-Fa-f:.]+(?:%[\w.-]+)?\])(?::(?P<port>\d{1,5}))?",
    re.ASCII,
)
_OPTIONS = (
    # No questions: what cannot be answered from files and agent fails. Host keys are checked as ssh is told to.
    "BatchMode=yes",
    "ConnectTimeout=10",
    "ServerAliveInterval=5",
    "ServerAliveCountMax=3",
    "ClearAllForwardings=yes",
    "ForwardAgent=no",
    "ForwardX11=no",
    "PermitLocalCommand=no",
    "RemoteCommand=none",
)
_FAILURES = (
    ("IDENTIFICATION HAS CHANGED", "its host key is not the one that is known; it may be another machine"),
    ("key is known for", "its host key is not known; connect once by hand and check it"),
    ("verification failed", "its host key could not be verified; connect once by hand and check it"),
    ("Permission denied (", "it refuses the login; a key that works without a question is needed"),
    ("Could not resolve", "no such host"),
    ("Connection refused", "nothing answers there: connection refused"),
    ("No route to host", "it cannot be reached: no route to host"),
    ("Network is unreachable", "it cannot be reached: network is unreachable"),
    ("Connection timed out", "it does not answer"),
    ("Operation timed out", "it does not answer"),
    ("not responding", "the device went away: it does not answer any more"),
    ("closed by", "the device went away: the connection was closed"),
    ("Connection reset", "the device went away: the connection was reset"),
    ("Broken pipe", "the device went away: the connection broke"),
)


@dataclass(frozen=True)
class Ssh:
    """A host; see `runtime_bench.targets.transport.Transport`.

    Raises:
        InputError: No name of a host.
    """

    host: str  # `[USER@]HOST[:PORT]`, where HOST may be a name of the ssh configuration; IPv6 in brackets
    config: Path | None = None  # Configuration file to use instead of the user's

    client = "ssh"
    folder = ""

    def __post_init__(self) -> None:
        if not _HOST.fullmatch(self.host):
            raise InputError(
                "no name of a host", field="--on", value=f"ssh:{self.host}", allowed="ssh:[USER@]HOST[:PORT]"
            )

    @property
    def name(self) -> str:
        """As records have it."""
        return f"ssh:{self.host}"

    def command(self, line: str) -> list[str]:
        """See `Transport`."""
        match = _HOST.fullmatch(self.host)
        assert match is not None  # checked when it was made
        options = ["-T", "-e", "none", *(word for option in _OPTIONS for word in ("-o", option))]
        options += ["-F", str(self.config)] if self.config else []
        options += ["-l", match["user"]] if match["user"] else []
        options += ["-p", match["port"]] if match["port"] else []
        return [self.client, *options, "--", match["host"].strip("[]"), line]

    def failure(self, lines: Sequence[str], status: int) -> str:
        """See `Transport`."""
        said = lines[-1] if lines else f"ssh ended with status {status}"
        return meaning_of(lines, _FAILURES) or f"the connection failed: {said}"
