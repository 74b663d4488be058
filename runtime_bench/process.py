"""Run one worker process on this machine and turn every way it can end into a result."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import site
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from runtime_bench.engines import EngineFacts
from runtime_bench.worker import WorkerRequest, WorkerResult

__all__ = ["run_module", "run_worker"]

_TAIL_BYTES = 8192
_TELLING = ("GGML_ASSERT", "terminate called", "what():", "Error")
"""Marks of the line that says why, among what a dying engine writes."""


def run_worker(
    request: WorkerRequest, timeout_s: float, before: Callable[[], None] | None = None
) -> WorkerResult:
    """Measure in a fresh process.

    Args:
        request: What to measure.
        timeout_s: After this long the process is ended.
        before: Called in the new process before its program is loaded.

    Returns:
        Its result; after a crash, a kill or a timeout one without samples whose `error` says what happened.
    """
    return run_module("runtime_bench.worker", asdict(request), timeout_s, before)


def run_module(
    module: str,
    payload: dict[str, Any],
    timeout_s: float,
    before: Callable[[], None] | None = None,
    environment: Mapping[str, str] | None = None,
) -> WorkerResult:
    """Run a module that reads a payload as JSON and writes a result, in a fresh process; it and all that it started are
    gone afterwards.

    Args:
        module: Name of the module.
        payload: What it reads.
        timeout_s: After this long it is ended.
        before: Called in the new process before its program is loaded.
        environment: Variables that it gets besides ours.

    Returns:
        As `run_worker`.
    """
    command = [sys.executable, "-P", "-m", module]
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=_environment() | dict(environment or {}),
            preexec_fn=before,
        ) as process,
    ):
        try:
            output, _ = process.communicate(json.dumps(payload).encode(), timeout_s)
        except subprocess.TimeoutExpired:
            _kill_tree(process.pid)
            return WorkerResult(error=f"timeout: no result after {timeout_s:g} s")
        except BaseException:
            _kill_tree(process.pid)
            raise
        tail = _tail(errors)
    if process.returncode:
        return WorkerResult(error=_exit_reason(process.returncode, tail))
    return _result_from_json(output)


def _kill_tree(pid: int) -> None:
    """End a process and all below it."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for one in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()


def _environment() -> dict[str, str]:
    """The environment, with this package's folder importable whatever the working directory is.

    Folders that Python searches anyway are not repeated: in PYTHONPATH they would come before the standard
    library.
    """
    root = str(Path(__file__).resolve().parent.parent)
    environment = dict(os.environ)
    if root not in (*site.getsitepackages(), site.getusersitepackages()):
        known = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join([root, known] if known else [root])
    return environment


def _tail(stream: IO[bytes]) -> list[str]:
    size = stream.seek(0, os.SEEK_END)
    stream.seek(max(0, size - _TAIL_BYTES))
    lines = stream.read().decode("utf-8", "replace").splitlines()
    return [line.strip() for line in lines if line.strip()]


def _exit_reason(code: int, tail: list[str]) -> str:
    telling = [line for line in tail if any(mark in line for mark in _TELLING)] or tail
    last = f": {telling[-1]}" if telling else ""
    number = -code if code < 0 else code - 128
    try:
        name = signal.Signals(number).name
    except ValueError:
        return f"exit status {code}{last}"
    if name == "SIGKILL":
        return "killed by SIGKILL, as the system does when memory runs out"
    return f"crashed with {name}{last}"


def _result_from_json(output: bytes) -> WorkerResult:
    try:
        payload = json.loads(output)
        facts = payload.pop("facts")
        return WorkerResult(**payload, facts=EngineFacts(**facts) if facts else None)
    except (ValueError, TypeError, KeyError) as error:
        return WorkerResult(error=f"the measuring process gave no readable result: {error}")
