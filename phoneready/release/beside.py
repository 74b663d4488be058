"""Stages beside each other, each in a process of its own that ends with this one."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

from cfsp.errors import PhonereadyError
from cfsp.progress import Progress
from phoneready.interrupts import interrupt, raise_again
from runtime_bench.process import exit_reason, kill_tree

Inputs = Mapping[str, str]
Work = Callable[[str, Inputs, Progress], None]
STOP_S = 20.0
"""For removing what is half-written; then a process is killed."""


def run_beside(
    work: Work, stages: Mapping[str, Inputs], progress: Progress, done: Callable[[str], None]
) -> None:
    """Run `work(stage, inputs, progress)` of all stages at once; an error of one ends the others.

    `work` is pickled for processes that are started anew; `done` is told each stage's name when it has ended.

    Raises:
        PhonereadyError: As a stage raised it, with its text and exit status; or its process was killed.
        Exception: Whatever else a stage raised.
    """
    context = multiprocessing.get_context("spawn")
    running: dict[Connection, SpawnProcess] = {}
    try:
        for name, inputs in stages.items():
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_run, args=(theirs, work, name, inputs), name=name)
            process.start()
            theirs.close()
            running[ours] = process
        while running:
            for pipe in wait(list(running)):
                assert isinstance(pipe, Connection)
                process = running[pipe]
                try:
                    told = pipe.recv()
                except EOFError:
                    process.join()
                    del running[pipe]
                    if code := process.exitcode:
                        hint = "; --threads 1 runs one stage at a time" if code == -signal.SIGKILL else ""
                        raise PhonereadyError(f"{process.name}: {exit_reason(code, [])}{hint}") from None
                    done(process.name)
                    continue
                if isinstance(told, Exception):
                    process.join(STOP_S)
                    raise told
                description, so_far, total = told
                progress(f"{process.name}, {description}", so_far, total)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.join(STOP_S)
            if process.exitcode is None and process.pid is not None:
                kill_tree(process.pid)


def _run(pipe: Connection, work: Work, stage: str, inputs: Inputs) -> None:
    """What such a process does."""
    os.setpgrp()  # Ctrl-C is for the caller, which then ends this process
    signal.signal(signal.SIGTERM, interrupt)
    sys.unraisablehook = raise_again
    os.dup2(2, 1)  # what a library prints is no result
    threading.Thread(target=_end_with_caller, daemon=True).start()
    try:
        try:
            work(stage, inputs, lambda *told: pipe.send(told))
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends now
    except KeyboardInterrupt:
        sys.exit(1)
    except Exception as error:
        with suppress(BrokenPipeError):
            pipe.send(_portable(error))
        sys.exit(1)


def _portable(error: Exception) -> Exception:
    """An error that the caller can unpickle, with where it was raised as a note."""
    portable: Exception = RuntimeError(f"{type(error).__name__}: {error}")
    if isinstance(error, PhonereadyError):
        portable = PhonereadyError(str(error))
        portable.exit_code = error.exit_code
    elif isinstance(error, MemoryError):
        portable = MemoryError(str(error))
    # A pipe that broke is none that the caller reads.
    elif isinstance(error, OSError) and error.errno is not None and not isinstance(error, BrokenPipeError):
        portable = OSError(error.errno, error.strerror, error.filename)
    portable.add_note("".join(traceback.format_exception(error)))
    return portable


def _end_with_caller() -> None:
    caller = multiprocessing.parent_process()
    assert caller is not None
    caller.join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(STOP_S)  # inside a library no signal is handled
    os.kill(os.getpid(), signal.SIGKILL)
