"""Run one measuring process on this machine and turn every way it can end into a result."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import IO, Any, TypeVar

from cfsp.child_process import measured_environment, python_module
from cfsp.errors import InputError
from cfsp.reading import parse_json
from runtime_bench.conditions.looks import conditions_of, energy_of
from runtime_bench.conditions.script import Watcher
from runtime_bench.counters import core_times, cores_since
from runtime_bench.records.reported import Contention
from runtime_bench.worker import WorkerRequest, WorkerResult

T = TypeVar("T")
_TAIL_BYTES = 8192
_TELLING = ("GGML_ASSERT", "terminate called", "what():", "Error")
"""Marks of the line that says why, among what a dying engine writes."""


class ProcessFailed(Exception):  # noqa: N818  (it says what the process did)
    """A process gave no result; the text is the reason, one line."""


def run_worker(
    request: WorkerRequest, timeout_s: float, before: Callable[[], None] | None = None
) -> WorkerResult:
    """Measure in a fresh Python; arguments and result as of `measure_in`."""
    command = python_module("runtime_bench.worker")
    return measure_in(command, asdict(request), timeout_s, before=before, metered=request.energy)


def measure_in(
    command: Sequence[str],
    payload: Mapping[str, Any],
    timeout_s: float,
    *,
    before: Callable[[], None] | None = None,
    environment: Mapping[str, str] | None = None,
    metered: bool = False,
) -> WorkerResult:
    """Measure in any program that answers a worker's requests; other arguments as of `exchange`.

    Returns:
        Its result; after a crash, a kill or a timeout one without samples whose `error` says what happened.
    """
    with Watcher(metered=metered) as watcher:
        start = core_times()
        try:
            output = exchange(
                command, payload, timeout_s, before=before, environment=environment, started=watcher.watch
            )
        except ProcessFailed as error:
            return WorkerResult(error=str(error))
    others = cores_since(start)
    result = result_of(output, watcher.text, watcher.problem, metered=metered)
    return replace(result, contention=Contention(*others) if others else None)


def result_of(output: bytes, looks: str, why: str, *, metered: bool) -> WorkerResult:
    """A worker's answer, with the conditions and energy that looks at its machine show; `why` there are no looks.

    An answer that cannot be read is a result with the reason.
    """
    try:
        result = read_answer(WorkerResult, output)
    except ProcessFailed as error:
        result = WorkerResult(error=str(error))
    if not result.samples_ns and result.error is None:
        result = WorkerResult(error="the measuring process gave neither samples nor a reason")
    conditions = conditions_of(looks, result.spans_ns, why)
    energy = energy_of(looks, result.spans_ns, conditions) if metered else None
    return replace(result, conditions=conditions, energy=energy)


def exchange(
    command: Sequence[str],
    payload: Mapping[str, Any],
    timeout_s: float,
    *,
    before: Callable[[], None] | None = None,
    environment: Mapping[str, str] | None = None,
    started: Callable[[int], None] = lambda pid: None,
) -> bytes:
    """Give a new process a JSON document and take what it writes to stdout.

    Args:
        command: Program and arguments.
        payload: The document.
        timeout_s: After this long the process, and all that it started, is ended.
        before: Called in the new process before its program is loaded.
        environment: Variables that it gets besides ours.
        started: Called here with its process id when its program is loaded.

    Raises:
        ProcessFailed: It cannot be started, crashed, was killed, or took too long.
    """
    with tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=measured_environment() | dict(environment or {}),
                preexec_fn=before,
            )
        except OSError as error:
            raise ProcessFailed(f"{command[0]} cannot be started: {error.strerror}") from error
        with process:
            try:
                started(process.pid)
                output, _ = process.communicate(json.dumps(payload).encode(), timeout_s)
            except subprocess.TimeoutExpired:
                kill_tree(process.pid)
                raise ProcessFailed(f"timeout: no result after {timeout_s:g} s") from None
            except BaseException:
                kill_tree(process.pid)
                raise
        tail = last_lines(errors)
    if process.returncode:
        raise ProcessFailed(exit_reason(process.returncode, tail))
    return output


def kill_tree(pid: int) -> None:
    """Kill a process and all that it has started."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for one in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()


def last_lines(stream: IO[bytes]) -> list[str]:
    """The last lines that a process wrote into a file, without those that are empty."""
    size = stream.seek(0, os.SEEK_END)
    stream.seek(max(0, size - _TAIL_BYTES))
    lines = stream.read().decode("utf-8", "replace").splitlines()
    return [" ".join(line.split()) for line in lines if line.strip()]


def exit_reason(code: int, tail: list[str]) -> str:
    """Why a process ended without a result."""
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


def read_answer(kind: type[T], output: bytes) -> T:
    """What another process wrote as JSON; fields that it leaves out have their defaults. Raises
    ProcessFailed: it is no such thing."""
    import pydantic

    from cfsp.validation import describe_problems

    try:
        return pydantic.TypeAdapter(kind).validate_python(parse_json(output, "its answer"))
    except (InputError, pydantic.ValidationError) as error:
        problem = describe_problems(error) if isinstance(error, pydantic.ValidationError) else str(error)
        raise ProcessFailed(f"the measuring process gave no readable result: {problem}") from error
