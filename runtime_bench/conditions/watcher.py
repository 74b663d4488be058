"""The shell that looks at this machine while a process measures on it."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from types import TracebackType
from typing import IO

from runtime_bench.conditions.looks import NOT_LINUX, conditions_of
from runtime_bench.conditions.script import WATCH
from runtime_bench.records.conditions import Conditions, nothing_known

_COMMAND = ("sh", "-c", WATCH, "phoneready")
_ENDS_S = 5.0
"""How long the last look may take."""
_LOOK_S = 60.0


class Watcher:
    """Looks from `watch` on until the end of the `with` block.

    Attributes:
        text: What the looks saw, after the end.
        problem: Why there are none; empty where there are.
    """

    def __init__(self) -> None:
        self.text, self.problem = "", ""
        self._shell: subprocess.Popen[bytes] | None = None
        self._output: IO[bytes] | None = None

    def __enter__(self) -> Watcher:
        return self

    def watch(self, pid: int) -> None:
        """Begin to look at a process."""
        self._output = tempfile.TemporaryFile()  # noqa: SIM115  (closed at the end of the block)
        try:
            self._shell = subprocess.Popen(
                [*_COMMAND, str(pid)],
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=subprocess.DEVNULL,
            )
        except OSError:
            self.problem = NOT_LINUX

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shell is not None:
            self._shell.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._shell.wait(_ENDS_S)
            self._shell.kill()
            self._shell.wait()
        if self._output is not None:
            self._output.seek(0)
            self.text = self._output.read().decode("utf-8", "replace")
            self._output.close()


def look_here() -> Conditions:
    """One look at this machine."""
    try:
        output = subprocess.run([*_COMMAND, ""], capture_output=True, check=False, timeout=_LOOK_S).stdout
    except (OSError, subprocess.TimeoutExpired):
        return nothing_known(NOT_LINUX)
    return conditions_of(output.decode("utf-8", "replace"))
