"""Stages that are done once: skipped when their inputs have not changed, taken up again after a kill.

A stage writes into a temporary folder. Once everything in it, the stage's record last, is on the disk, one rename
makes it `<folder>/stages/<name>`. A stage is done when that record carries the key that its settings and the keys
of the stages before it give, and the files it names are there. Nothing else is remembered: a run that is killed at
any point and started again repeats no finished stage.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import stat
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, ClassVar

import filelock

from cfsp.errors import InputError, PhonereadyError
from cfsp.files import atomic_directory, remove_stale_temporaries, writable_place
from cfsp.progress import Progress
from cfsp.records import read_record, write_record
from phoneready.interrupts import interrupt, raise_again
from runtime_bench.process import exit_reason, kill_tree

LOCK_FILE = ".phoneready.lock"
RECORD_FILE = "stage.json"
RUNNING = "running"
"""State of a stage that begins."""
_TRIED_AGAIN = "some of it failed and is tried again"
_TRIES = 10
"""At a lock whose folder comes and goes."""
_STOP_S = 20.0
"""For removing what is half-written; then a process is killed."""
Inputs = Mapping[str, str]
"""Names of the stages before one -> their keys."""
Work = Callable[[str, Inputs, Progress], None]
"""Runs the stage of a name, in a process of its own: it is pickled."""


@dataclass(frozen=True)
class Stage:
    """A step of a pipeline; its name is its folder's.

    Attributes:
        describe: Gives what its result depends on, beside the stages before it. It may read whole files for their
            hashes, and is asked once.
        after: Names of the stages whose output it reads.
        run: Writes the output into the folder it is given.
        settled: Whether another run would give the same output; a stage whose would not is done again.
        beside: Whether neighbours that say so, too, may run at the same time, each in a process of its own.
        resumes: Whether `run` is given what an output that is not settled has, to go on with it.
    """

    name: str
    describe: Callable[[], Mapping[str, Any]]
    after: tuple[str, ...]
    run: Callable[[Path, Progress], None]
    settled: Callable[[Path], bool] = lambda output: True
    beside: bool = False
    resumes: bool = False

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        plain: dict[str, Any] = json.loads(json.dumps(dict(self.describe())))
        return plain


@dataclass(frozen=True)
class StageRecord:
    """What makes a stage's folder a finished one.

    `key` hashes its settings and the keys in `inputs`; `files` has their sizes in bytes by their path; `threads` are
    those that it was given, None if nobody said how many.
    """

    KIND: ClassVar[str] = "stage"
    SCHEMA_VERSION: ClassVar[int] = 2

    name: str
    key: str
    settings: dict[str, Any]
    inputs: dict[str, str]
    files: dict[str, int]
    seconds: float
    threads: int | None = None


def stage_folder(folder: Path, name: str) -> Path:
    """Where a stage's output lies."""
    return folder / "stages" / name


@contextmanager
def claim_folder(folder: Path, mark: str = LOCK_FILE, what: str = "release") -> Iterator[None]:
    """Make `folder` the output of this run alone, and clear away what a killed run left in it.

    If an error ends the block before anything is in the folder, it is as it was before: not there, or empty.
    `mark` is the name of its lock, which tells a folder of ours from others.
    """
    status, lock = writable_place(folder), folder / mark

    def content() -> set[str]:
        with suppress(FileNotFoundError):  # taken away just now
            return {place.name for place in folder.iterdir()}
        return set()

    there = content() if status and stat.S_ISDIR(status.st_mode) else set()
    if (status and not stat.S_ISDIR(status.st_mode)) or (there and mark not in there):
        raise InputError(f"{folder} exists and is not a {what} folder; choose another one with -o")
    places = (folder / "stages", lock, folder, *folder.absolute().parents)
    made = [place for place in places if not place.exists()]
    try:
        for last in range(_TRIES):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                held = filelock.FileLock(lock, timeout=0).acquire()
                break
            except (
                FileNotFoundError,
                FileExistsError,
            ):  # another run has failed just now: its folder is gone
                if last == _TRIES - 1:
                    raise
        with held:
            remove_stale_temporaries(folder)
            if (folder / "stages").is_dir():
                remove_stale_temporaries(folder / "stages")
            try:
                yield
            except BaseException:
                # Innermost first, up to what holds something else. The lock is held, and filelock takes none whose
                # file is gone: who waits for this one makes the folder anew.
                with suppress(OSError):
                    for place in made:
                        if place.is_dir():
                            place.rmdir()
                        elif content() == {place.name}:
                            place.unlink()
                raise
    except filelock.Timeout as error:
        raise InputError(
            f"another run is using {folder}; wait for it, or choose another one with -o"
        ) from error
    except (PermissionError, NotADirectoryError) as error:
        raise InputError(f"cannot write {error.filename or folder}: {error.strerror}") from error


def run_stages(
    stages: Sequence[Stage],
    folder: Path,
    *,
    show: Callable[[str, str], None],
    progress: Callable[[], AbstractContextManager[Progress]],
    check: Callable[[str], None] = lambda name: None,
    beside: Callable[[], Work | None] = lambda: None,
    threads: int | None = None,
) -> dict[str, StageRecord]:
    """Run what is not done yet, in order, and return the record of every stage."""
    records: dict[str, StageRecord] = {}
    _ = [stage.settings for stage in stages]  # what cannot be described ends the run before any work

    def done(name: str, state: str = "") -> None:
        records[name] = read_record(StageRecord, stage_folder(folder, name) / RECORD_FILE)
        show(name, state or f"finished in {records[name].seconds:.0f} s")
        check(name)

    neighbours = [
        [list(group)] if is_beside else [[stage] for stage in group]
        for is_beside, group in itertools.groupby(stages, lambda stage: stage.beside)
    ]
    for group in itertools.chain.from_iterable(neighbours):
        inputs = {stage.name: {name: records[name].key for name in stage.after} for stage in group}
        to_do = [stage for stage in group if _reason(stage, inputs[stage.name], folder)]
        for stage in group:
            if stage not in to_do:
                done(stage.name, "done before")
        work = beside() if to_do and group[0].beside else None
        for stage in to_do if work else ():
            show(stage.name, RUNNING)
        if work:
            with progress() as report:
                run_beside(work, {stage.name: inputs[stage.name] for stage in to_do}, report, done)
            continue
        for stage in to_do:
            show(stage.name, RUNNING)
            with progress() as report:
                run_stage(stage, inputs[stage.name], folder, report, threads=threads)
            done(stage.name)
    return {stage.name: records[stage.name] for stage in stages}


def run_stage(
    stage: Stage, inputs: Inputs, folder: Path, progress: Progress, *, threads: int | None = None
) -> None:
    """Run a stage and leave its output and its record."""
    began = time.monotonic()
    key = _key(stage, inputs)  # before it runs: what is changed while it runs has changed the next time
    output = stage_folder(folder, stage.name)
    with atomic_directory(output, own=True) as temporary:
        if stage.resumes and _reason(stage, inputs, folder) == _TRIED_AGAIN:
            shutil.copytree(output, temporary, ignore=shutil.ignore_patterns(RECORD_FILE), dirs_exist_ok=True)
        stage.run(temporary, progress)
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        sizes = {path.relative_to(temporary).as_posix(): path.stat().st_size for path in files}
        seconds = round(time.monotonic() - began, 3)
        record = StageRecord(stage.name, key, stage.settings, dict(inputs), sizes, seconds, threads)
        write_record(temporary / RECORD_FILE, record)


def explain_stages(stages: Sequence[Stage], folder: Path) -> dict[str, str]:
    """For each stage why it would run now, in words; nothing for one that is done. Nothing is run or changed."""
    reasons: dict[str, str] = {}
    keys: dict[str, str] = {}
    for stage in stages:
        inputs = {name: keys[name] for name in stage.after}
        keys[stage.name] = _key(stage, inputs)
        reasons[stage.name] = _reason(stage, inputs, folder)
    return reasons


def _reason(stage: Stage, inputs: Inputs, folder: Path) -> str:
    """Why a stage has to run; empty if it is done."""
    output = stage_folder(folder, stage.name)
    if not (output / RECORD_FILE).is_file():
        return "it was not done yet"
    try:
        record = read_record(StageRecord, output / RECORD_FILE)
    except InputError:
        return "its record cannot be read by this version"
    changes = list(_changes(record.settings, stage.settings))
    changes += [f"{name} has changed" for name in inputs if record.inputs.get(name) != inputs[name]]
    if changes:
        return "; ".join(changes)
    if record.key != _key(stage, inputs):
        return "it depends on other stages now"
    sizes = {name: place.stat().st_size for name in record.files if (place := output / name).is_file()}
    if damaged := [name for name, size in record.files.items() if sizes.get(name) != size]:
        return f"files are missing or have another size: {', '.join(damaged)}"
    return "" if stage.settled(output) else _TRIED_AGAIN


def _changes(before: Any, now: Any, place: tuple[str, ...] = ()) -> Iterator[str]:
    """Everything that differs, in words."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in dict.fromkeys((*before, *now)):
            yield from _changes(before.get(name), now.get(name), (*place, name))
    elif before != now:
        texts = (json.dumps(value, ensure_ascii=False) for value in (before, now))
        was, is_ = (text if len(text) <= 80 else text[:77] + "..." for text in texts)
        yield f"{'.'.join(place)} was {was} and is {is_}"


def _key(stage: Stage, inputs: Inputs) -> str:
    text = json.dumps([stage.name, stage.settings, dict(inputs)], sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def run_beside(
    work: Work, stages: Mapping[str, Inputs], progress: Progress, done: Callable[[str], None]
) -> None:
    """Run `work` of all stages at once, in processes that end with this one; an error of one ends the others.

    `done` is told each stage's name when it has ended.
    """
    context = multiprocessing.get_context("spawn")
    running: dict[Connection, SpawnProcess] = {}
    try:
        for name, inputs in stages.items():
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_in_process, args=(theirs, work, name, inputs), name=name)
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
                    process.join(_STOP_S)
                    raise told
                description, so_far, total = told
                progress(f"{process.name}, {description}", so_far, total)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.join(_STOP_S)
            if process.exitcode is None and process.pid is not None:
                kill_tree(process.pid)


def _in_process(pipe: Connection, work: Work, stage: str, inputs: Inputs) -> None:
    """What such a process does."""
    caller = multiprocessing.parent_process()
    assert caller is not None

    def end_with_caller() -> None:
        caller.join()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_STOP_S)  # inside a library no signal is handled
        os.kill(os.getpid(), signal.SIGKILL)

    os.setpgrp()  # Ctrl-C is for the caller, which then ends this process
    signal.signal(signal.SIGTERM, interrupt)
    sys.unraisablehook = raise_again
    os.dup2(2, 1)  # what a library prints is no result
    threading.Thread(target=end_with_caller, daemon=True).start()
    try:
        try:
            work(stage, inputs, lambda *told: pipe.send(told))
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends now
    except KeyboardInterrupt:
        sys.exit(1)
    except Exception as error:
        # What the caller can unpickle, with where it was raised as a note.
        told: Exception = RuntimeError(f"{type(error).__name__}: {error}")
        if isinstance(error, PhonereadyError):
            told = PhonereadyError(str(error))
            told.exit_code = error.exit_code
        elif isinstance(error, MemoryError):
            told = MemoryError(str(error))
        # A pipe that broke is none that the caller reads.
        elif (
            isinstance(error, OSError) and error.errno is not None and not isinstance(error, BrokenPipeError)
        ):
            told = OSError(error.errno, error.strerror, error.filename)
        told.add_note("".join(traceback.format_exception(error)))
        with suppress(BrokenPipeError):
            pipe.send(told)
        sys.exit(1)
