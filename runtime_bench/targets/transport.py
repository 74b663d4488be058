"""Commands on another machine: a client program here carries one script to the shell there.

All that goes there is `sh -c SCRIPT phoneready ARGUMENT...` with every word quoted, so that no name is ever read as
shell. The script's status comes back in a last line on stderr: a client's own exit status does not tell a command
that failed there from a connection that broke.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from cfsp.errors import PhonereadyError
from runtime_bench.process import kill_tree, last_lines

_STATUS = "phoneready-status:"
_MOST_BYTES = 2**26
"""Of an answer: four times what half a day of looks at a phone comes to, its meters among them."""
_POLL_S = 0.2


class FarError(PhonereadyError):
    """Something could not be done there; the text says what, and does not name the target."""


class UnreachableError(FarError):
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

    @property
    def name(self) -> str: ...

    @property
    def folder(self) -> str: ...

    @property
    def client(self) -> str: ...

    def command(self, line: str) -> list[str]:
        """Arguments of the process here that has the shell there run a line, with stdin, stdout, stderr of its own."""
        ...

    def failure(self, lines: Sequence[str], status: int) -> str:
        """Why a line was not run to its end, from what the client said last and how it ended."""
        ...


@dataclass(frozen=True)
class Reply:
    """How a script ended."""

    status: int  # Its exit status there
    output: bytes  # Its stdout
    errors: list[str]  # Last lines of its stderr

    @property
    def text(self) -> str:
        """stdout as text."""
        return self.output.decode("utf-8", "replace")

    def reason(self, what: str) -> FarError:
        """The error that a script ended with."""
        last = f": {self.errors[-1]}" if self.errors else ""
        return FarError(f"{what} failed there with status {self.status}{last}")


class FarShell:
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
            FarError: No end in time, or the file is not taken any further.
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
            process = self._start(self.transport.command(command), stdin, output, errors)
            try:
                if line is not None and process.stdin is not None:
                    # A client that has ended already will say why.
                    with contextlib.suppress(BrokenPipeError):
                        process.stdin.write(line.encode() + b"\n")
                        process.stdin.flush()
                _wait(process, timeout_s, after_s, (output, errors), sent, on_bytes)
            except subprocess.TimeoutExpired as error:
                raise FarError(f"timeout: no answer within {round(error.timeout, 1):g} s") from None
            finally:
                # Whatever runs there sees its stdin close, and ends.
                _end(process)
                if process.stdin is not None:
                    process.stdin.close()
                status = process.wait()
                self._process = None
            if self._stopped.is_set():
                raise StoppedError("stopped")
            lines, told = _split_status(last_lines(errors))
            if told is None:
                raise UnreachableError(self.transport.failure(lines, status))
            output.seek(0)
            return Reply(told, output.read(_MOST_BYTES), lines)

    def stop(self) -> None:
        """End what runs and start nothing any more; whoever waits gets StoppedError."""
        with self._lock:
            self._stopped.set()
            if self._process is not None:
                _end(self._process)

    def pause(self, seconds: float) -> None:
        """Wait; raises StoppedError after `stop`."""
        if self._stopped.wait(seconds):
            raise StoppedError("stopped")

    def _start(
        self, command: list[str], stdin: int | IO[bytes], output: IO[bytes], errors: IO[bytes]
    ) -> subprocess.Popen[bytes]:
        with self._lock:
            if self._stopped.is_set():
                raise StoppedError("stopped")
            try:
                # A session of its own: Ctrl-C is for us, and what we do about it is to end the client.
                self._process = subprocess.Popen(
                    command, stdin=stdin, stdout=output, stderr=errors, start_new_session=True
                )
            except OSError as error:
                client, name = self.transport.client, self.transport.name
                absent = isinstance(error, FileNotFoundError)
                why = "is not installed" if absent else f"cannot run: {error.strerror}"
                raise UnreachableError(f"{client} {why}; {name} is reached through it") from error
            return self._process


_TELL = f"printf '\\n%s%s\\n' {_STATUS} \"$?\" >&2"


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
                raise FarError(f"it answers with more than {_MOST_BYTES // 2**20} MiB") from None
            if sent is not None and sent.tell() != last:
                last, since = sent.tell(), time.monotonic()
                on_bytes(last)
            else:
                all_of_it = sent is not None and last == os.fstat(sent.fileno()).st_size
                allowed_s = timeout_s + after_s * all_of_it
                if time.monotonic() - since >= allowed_s:
                    raise subprocess.TimeoutExpired(process.args, allowed_s) from None


def meaning_of(lines: Sequence[str], failures: Sequence[tuple[str, str]]) -> str | None:
    """What a client's words mean: of the first mark in (mark, meaning) that is in one of its lines."""
    return next((meaning for mark, meaning in failures if any(mark in line for line in lines)), None)


def _split_status(lines: list[str]) -> tuple[list[str], int | None]:
    """What was said, without the script's status, and that; a client may say something after it."""
    told = [line.removeprefix(_STATUS) for line in lines if line.startswith(_STATUS)]
    said = [line for line in lines if not line.startswith(_STATUS)]
    return said, int(told[-1]) if told and told[-1].isdecimal() else None
