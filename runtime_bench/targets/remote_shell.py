"""Commands on another machine: OpenSSH or adb here carries one script to the shell there.

All that goes there is `sh -c SCRIPT phoneready ARGUMENT...` with every word quoted, so that no name is ever read as
shell. The script's status comes back in a last line on stderr: a client's own exit status does not tell a command
that failed there from a connection that broke.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, NamedTuple, Protocol

from cfsp.errors import InputError, PhonereadyError
from runtime_bench.process import kill_tree, last_lines

_STATUS = "phoneready-status:"
_TELL = f"printf '\\n%s%s\\n' {_STATUS} \"$?\" >&2"
_MOST_BYTES = 2**26
"""Of an answer: four times what half a day of looks at a phone comes to, its meters among them."""
_POLL_S = 0.2
_HOST = re.compile(
    r"(?:(?P<user>[A-Za-z0-9_][\w.+-]*)@)?(?P<host>[A-Za-z0-9_][\w.-]*|\[[0-9A-Fa-f:.]+(?:%[\w.-]+)?\])(?::(?P<port>\d{1,5}))?",
    re.ASCII,
)
_SSH_OPTIONS = (
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
_SSH_FAILURES = {
    "IDENTIFICATION HAS CHANGED": "its host key is not the one that is known; it may be another machine",
    "key is known for": "its host key is not known; connect once by hand and check it",
    "verification failed": "its host key could not be verified; connect once by hand and check it",
    "Permission denied (": "it refuses the login; a key that works without a question is needed",
    "Could not resolve": "no such host",
    "Connection refused": "nothing answers there: connection refused",
    "No route to host": "it cannot be reached: no route to host",
    "Network is unreachable": "it cannot be reached: network is unreachable",
    "Connection timed out": "it does not answer",
    "Operation timed out": "it does not answer",
    "not responding": "the device went away: it does not answer any more",
    "closed by": "the device went away: the connection was closed",
    "Connection reset": "the device went away: the connection was reset",
    "Broken pipe": "the device went away: the connection broke",
}
_ADB_FAILURES = {
    "unauthorized": "the device has not authorized this computer; accept its key on the screen",
    "device still": "the device is not ready yet; try again, and look at its screen",
    "no permissions": "this user may not use the device; see Android's udev rules",
    "offline": "the device is offline; unplug it and plug it in again, or adb reconnect",
    "not found": "no such device; adb devices lists those that are there",
    "no devices": "no such device; adb devices lists those that are there",
    "cannot connect to daemon": "adb's server does not start",
    "closed": "the device went away: the connection was closed",
}
"""What is in a client's words -> what it means; the first that is found counts."""


class RemoteError(PhonereadyError):
    """Something could not be done there; the text says what, and does not name the target."""


class UnreachableError(RemoteError):
    """There is no way there, or there is none any more."""


class StoppedError(PhonereadyError):
    """It was stopped from another thread."""

    exit_code = 130


class Transport(Protocol):
    """A way to another machine's shell.

    Attributes:
        name: Of the target, as records have it.
        folder: Where files go unless the user says; empty for a folder under the home there.
        client: The program that has to be here.
    """

    name: str
    folder: str
    client: str

    def command(self, line: str) -> list[str]:
        """Arguments of the process here that has the shell there run a line, with stdin, stdout, stderr of its own."""
        ...

    def failure(self, lines: Sequence[str], status: int) -> str:
        """Why a line was not run to its end, from what the client said last and how it ended."""
        ...


class Ssh:
    """A Linux host through the system's OpenSSH client, with the user's configuration, keys and known hosts.

    Args:
        host: `[USER@]HOST[:PORT]`; HOST may be a name of the ssh configuration, IPv6 stands in brackets.
        config: Configuration file to use instead of the user's.

    Raises:
        InputError: No name of a host.
    """

    client, folder = "ssh", ""

    def __init__(self, host: str, config: Path | None = None) -> None:
        match = _HOST.fullmatch(host)
        if match is None:
            allowed = "ssh:[USER@]HOST[:PORT]"
            raise InputError("no name of a host", field="--on", value=f"ssh:{host}", allowed=allowed)
        self.name = f"ssh:{host}"
        options = ["-T", "-e", "none", *(word for option in _SSH_OPTIONS for word in ("-o", option))]
        options += ["-F", str(config)] if config else []
        options += ["-l", match["user"]] if match["user"] else []
        options += ["-p", match["port"]] if match["port"] else []
        self._command = [self.client, *options, "--", match["host"].strip("[]")]

    def command(self, line: str) -> list[str]:
        return [*self._command, line]

    def failure(self, lines: Sequence[str], status: int) -> str:
        said = lines[-1] if lines else f"ssh ended with status {status}"
        return _meaning(lines, _SSH_FAILURES) or f"the connection failed: {said}"


class Adb:
    """An Android device through adb; from Android 7 on it tells how a command ended.

    Args:
        serial: As `adb devices` has it.

    Raises:
        InputError: No serial number.
    """

    client, folder = "adb", "/data/local/tmp/phoneready"
    """The one place that the shell user may write to and run programs from."""

    def __init__(self, serial: str) -> None:
        self.name, self._serial = f"adb:{serial}", serial
        if not serial.strip() or serial.startswith("-") or not serial.isprintable():
            allowed = "adb:SERIAL, as adb devices has it"
            raise InputError("no serial number", field="--on", value=self.name, allowed=allowed)

    def command(self, line: str) -> list[str]:
        # -T: no terminal, so that bytes pass as they are
        return [self.client, "-s", self._serial, "shell", "-T", line]

    def failure(self, lines: Sequence[str], status: int) -> str:
        said = f": {lines[-1]}" if lines else ""
        ended = f"the device went away, or is older than Android 7: adb ended with status {status}{said}"
        return _meaning(lines, _ADB_FAILURES) or ended


def _meaning(lines: Sequence[str], failures: dict[str, str]) -> str | None:
    return next((meaning for mark, meaning in failures.items() if any(mark in line for line in lines)), None)


class Reply(NamedTuple):
    """How a script ended."""

    status: int  # Its exit status there
    output: bytes  # Its stdout
    errors: list[str]  # Last lines of its stderr

    @property
    def text(self) -> str:
        """stdout as text."""
        return self.output.decode("utf-8", "replace")

    def check(self, what: str) -> None:
        """Raise RemoteError for a script that failed."""
        if self.status:
            last = f": {self.errors[-1]}" if self.errors else ""
            raise RemoteError(f"{what} failed there with status {self.status}{last}")


class RemoteShell:
    """Runs scripts over a transport, one at a time; `stop` ends the one that runs, from any thread."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = threading.Event()

    def run(
        self,
        script: str,
        *arguments: str,
        timeout_s: float,
        line: str | None = None,
        file: Path | None = None,
        after_s: float = 0.0,
        on_bytes: Callable[[int], None] = lambda count: None,
    ) -> Reply:
        """Run a script.

        Args:
            script: What to run.
            arguments: Its arguments.
            timeout_s: How long it may take; of a script that reads a file, how long it may take nothing of it.
            line: What it reads. Its stdin stays open after that until it has ended, or nobody waits any more.
            file: A file of this machine that it reads instead.
            after_s: How much longer it may take once it has all of the file.
            on_bytes: Told how much of the file the client has taken.

        Raises:
            UnreachableError: No client, no connection, or a connection that broke.
            RemoteError: No end in time, or the file is not taken any further.
            StoppedError: After `stop`.
            OSError: The file cannot be read.
        """
        command = shlex.join(
            ["sh", "-c", f"LC_ALL=C; export LC_ALL; ({script}\n); {_TELL}", "phoneready", *arguments]
        )
        with contextlib.ExitStack() as streams:
            output, errors = (streams.enter_context(tempfile.TemporaryFile()) for _ in range(2))
            sent = streams.enter_context(file.open("rb", buffering=0)) if file else None
            stdin = sent or (subprocess.DEVNULL if line is None else subprocess.PIPE)
            with self._lock:
                self.check_stopped()
                try:
                    # A session of its own: Ctrl-C is for us, and what we do about it is to end the client.
                    process = self._process = subprocess.Popen(
                        self.transport.command(command),
                        stdin=stdin,
                        stdout=output,
                        stderr=errors,
                        start_new_session=True,
                    )
                except OSError as error:
                    client, name = self.transport.client, self.transport.name
                    absent = isinstance(error, FileNotFoundError)
                    why = "is not installed" if absent else f"cannot run: {error.strerror}"
                    raise UnreachableError(f"{client} {why}; {name} is reached through it") from error
            try:
                if line is not None and process.stdin is not None:
                    # A client that has ended already will say why.
                    with contextlib.suppress(BrokenPipeError):
                        process.stdin.write(line.encode() + b"\n")
                        process.stdin.flush()
                _wait(process, timeout_s, after_s, (output, errors), sent, on_bytes)
            finally:
                # Whatever runs there sees its stdin close, and ends.
                _end(process)
                if process.stdin is not None:
                    process.stdin.close()
                status = process.wait()
                self._process = None
            self.check_stopped()
            lines = last_lines(errors)
            # A client may say something after the script's status.
            told = [one.removeprefix(_STATUS) for one in lines if one.startswith(_STATUS)]
            lines = [one for one in lines if not one.startswith(_STATUS)]
            if not told or not told[-1].isdecimal():
                raise UnreachableError(self.transport.failure(lines, status))
            output.seek(0)
            return Reply(int(told[-1]), output.read(_MOST_BYTES), lines)

    def stop(self) -> None:
        """End what runs and start nothing any more; whoever waits gets StoppedError."""
        with self._lock:
            self._stopped.set()
            if self._process is not None:
                _end(self._process)

    def check_stopped(self, after_s: float = 0.0) -> None:
        """Raise StoppedError after `stop`, which may come within a time."""
        if self._stopped.wait(after_s):
            raise StoppedError("stopped")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a client and what it has started, which would go on writing until the disk is full."""
    if process.poll() is None:
        kill_tree(process.pid)


def _wait(
    process: subprocess.Popen[bytes],
    timeout_s: float,
    after_s: float,
    said: Sequence[IO[bytes]],
    sent: IO[bytes] | None,
    on_bytes: Callable[[int], None],
) -> None:
    """Wait for the end of a client, as long as it takes more of a file, and says less than fills this disk.

    The reader of a file shares our offset, which so says how far it is.
    """
    last, since = 0, time.monotonic()
    while True:
        try:
            process.wait(min(_POLL_S, timeout_s))
            return
        except subprocess.TimeoutExpired:
            if any(os.fstat(stream.fileno()).st_size > _MOST_BYTES for stream in said):
                raise RemoteError(f"it answers with more than {_MOST_BYTES // 2**20} MiB") from None
            if sent is not None and sent.tell() != last:
                last, since = sent.tell(), time.monotonic()
                on_bytes(last)
            else:
                all_of_it = sent is not None and last == os.fstat(sent.fileno()).st_size
                allowed_s = timeout_s + after_s * all_of_it
                if time.monotonic() - since >= allowed_s:
                    raise RemoteError(f"timeout: no answer within {round(allowed_s, 1):g} s") from None
