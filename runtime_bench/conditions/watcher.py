"""The shell that looks at this machine while a process measures on it."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from types import TracebackType

from runtime_bench.conditions.looks import NOT_LINUX, conditions_of
from runtime_bench.conditions.script import WATCH
from runtime_bench.records.reported import Conditions, unknown_conditions

_COMMAND = ("sh", "-c", WATCH, "phoneready")
_METERED = "metered"
_ENDS_S = 5.0
"""How long the last look may take."""
_LOOK_S = 60.0


class Watcher:
    """Looks from `watch` on until the end of the `with` block.

    Args:
        metered: Whether meters of energy are read, too.

    Attributes:
        text: What the looks saw, after the end.
        problem: Why there are none; empty where there are.
    """

    def __init__(self, *, metered: bool = False) -> None:
        self.text, self.problem = "", ""
        self._metered = metered
        self._shell: subprocess.Popen[bytes] | None = None
        self._output = tempfile.TemporaryFile()  # noqa: SIM115  (closed at the end of the block)

    def __enter__(self) -> Watcher:
        return self

    def watch(self, pid: int) -> None:
        """Begin to look at a process."""
        self._shell = self._start(*_COMMAND, str(pid), *([_METERED] if self._metered else []))

    def _start(self, *command: str) -> subprocess.Popen[bytes] | None:
        try:
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=self._output, stderr=subprocess.DEVNULL
            )
        except OSError:
            self.problem = NOT_LINUX
            return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shell is not None:
            self._shell.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._shell.wait(_ENDS_S)
            self._shell.kill()
            self._shell.wait()
        self._output.seek(0)
        self.text = self._output.read().decode("utf-8", "replace")
        self._output.close()


def look_here() -> Conditions:
    """One look at this machine."""
    try:
        output = subprocess.run([*_COMMAND, ""], capture_output=True, check=False, timeout=_LOOK_S).stdout
    except (OSError, subprocess.TimeoutExpired):
        return unknown_conditions(NOT_LINUX)
    return conditions_of(output.decode("utf-8", "replace"))
