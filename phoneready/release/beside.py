"""Stages beside each other: each in a process of its own, which is told what to do in JSON and tells how far it is."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cfsp.child_process import child_environment, python_module
from cfsp.errors import PhonereadyError
from cfsp.progress import Progress
from cfsp.records import fields_from_json
from runtime_bench.process import exit_reason, kill_tree

STOP_S = 20.0
"""For clearing away what is half-written; then a process is killed."""


@dataclass(frozen=True)
class StageRequest:
    """What such a process is told, beside the stage's name, which its command line shows.

    Attributes:
        config: The configuration, as JSON has it.
        folder: The release folder, which the caller has claimed.
        inputs: Stages before it and their keys.
        threads: Threads of everything in it.
    """

    config: dict[str, Any]
    folder: str
    inputs: dict[str, str]
    threads: int


@dataclass(frozen=True)
class StageFailure:
    """What such a process says where its stage has failed.

    Attributes:
        kind: Name of the error's class.
        text: Of the error.
        exit_code: Of an error that was expected.
        errno: Of an OSError.
        filename: That it names.
        trace: Where it was raised.
    """

    kind: str
    text: str
    exit_code: int | None = None
    errno: int | None = None
    filename: str | None = None
    trace: str = ""

    def error(self) -> Exception:
        """It as an error of this process."""
        error = self._error()
        error.add_note(self.trace)
        return error

    def _error(self) -> Exception:
        if self.exit_code is not None:
            expected = PhonereadyError(self.text)
            expected.exit_code = self.exit_code
            return expected
        if self.errno is not None:
            return OSError(self.errno, self.text, self.filename)
        unexpected: Exception = type(self.kind, (RuntimeError,), {})(self.text)
        return unexpected


class StageProcesses:
    """Processes for the stages of one run.

    Args:
        at_once: How many.
        module: What such a process runs.
        config: See `StageRequest`.
        folder: Likewise.
        threads: Likewise.
    """

    def __init__(
        self, at_once: int, module: str, config: Mapping[str, Any], folder: Path, threads: int
    ) -> None:
        self.at_once = at_once
        self._command = python_module(module)
        self._config, self._folder, self._threads = config, folder, threads
        self._environment = child_environment() | {"OMP_NUM_THREADS": str(threads)}
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock, self._stopped = threading.Lock(), False

    def run(self, stage: str, inputs: Mapping[str, str], progress: Progress) -> None:
        """Run a stage and wait for it.

        Raises:
            PhonereadyError: It failed, with the text and the exit status of its error; or its process was killed.
            OSError: It could not read or write something.
            RuntimeError: It failed as nobody expected; the class carries the name of the error there.
        """
        request = StageRequest(dict(self._config), str(self._folder), dict(inputs), self._threads)
        with self._lock:
            if self._stopped:
                raise PhonereadyError(f"{stage}: stopped")
            # In a group of its own: Ctrl-C is for this process, which then ends that one.
            process = subprocess.Popen(
                [*self._command, stage],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=self._environment,
                process_group=0,
            )
            self._running.add(process)
        with process:
            assert process.stdin is not None
            assert process.stdout is not None
            # It stays open: where it ends, the process ends. Not through a buffer, which could be left with something.
            with contextlib.suppress(BrokenPipeError):
                told = json.dumps(asdict(request)).encode() + b"\n"
                while told:
                    told = told[os.write(process.stdin.fileno(), told) :]
            failure = None
            for line in process.stdout:
                message = json.loads(line)
                if isinstance(message, list):
                    progress(*message)
                else:
                    failure = fields_from_json(StageFailure, message, where=stage)
            process.wait()
        self._running.discard(process)
        if failure is not None:
            raise failure.error()
        if process.returncode:
            hint = "; --threads 1 runs one stage at a time" if process.returncode == -signal.SIGKILL else ""
            raise PhonereadyError(f"{stage}: {exit_reason(process.returncode, [])}{hint}")

    def stop(self) -> None:
        """End the processes that are left: they clear away what they have half-written."""
        with self._lock:
            self._stopped = True
        for process in list(self._running):
            process.terminate()
        for process in list(self._running):
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                kill_tree(process.pid)
