"""Stages that are done once: skipped when their inputs have not changed, taken up again after a kill.

A stage writes into a temporary folder. Once everything in it, the stage's record last, is on the disk, one rename
makes it `<folder>/stages/<name>`. A stage is done when that record carries the key that its settings and the keys
of the stages before it give, and the files it names are there. Nothing else is remembered: a run that is killed at
any point and started again repeats no finished stage.

A stage that makes something of each file `resumes`: another file, or one fewer, is another key, but the same base. Then
it goes on from what it left, and so it does after a kill.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import filelock

from cfsp.errors import InputError
from cfsp.files import atomic_directory, remove_stale_temporaries, writable_place, write_text
from cfsp.progress import Progress
from cfsp.records import read_record, write_record

LOCK_FILE = ".phoneready.lock"
RECORD_FILE = "stage.json"
RUNNING = "running"
"""State of a stage that begins."""
_TRIED_AGAIN = "some of it failed or is not decided, and is tried again"
_PART, _BASE_FILE = ".part", ".base"
"""Ends the name of the folder in which a stage that resumes works, and of the file in it with its base."""
_TRIES = 10
"""At a lock whose folder comes and goes."""
Inputs = Mapping[str, str]
"""Names of the stages before one -> their keys."""


@dataclass(frozen=True)
class Stage:
    """A step of a pipeline; its name is its folder's.

    `describe` gives, once, what its result depends on beside the stages in `after`, whose output `run` reads. A stage
    whose output is not `settled` is done again. One that `resumes` is given what it left with the same base: without
    the settings in `rows`, which say of what there is something. It takes out what is no longer wanted.
    """

    name: str
    describe: Callable[[], Mapping[str, Any]]
    after: tuple[str, ...]
    run: Callable[[Path, Progress], None]
    settled: Callable[[Path], bool] = lambda output: True
    resumes: bool = False
    rows: tuple[str, ...] = ()

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        plain: dict[str, Any] = json.loads(json.dumps(dict(self.describe())))
        return plain


@dataclass(frozen=True)
class StageRecord:
    """What makes a stage's folder a finished one.

    `key` hashes its settings and the keys in `inputs`, `base` the same without rows; `files` has their sizes in bytes
    by their path; `threads` are those that it was given, None if nobody said how many.
    """

    KIND: ClassVar[str] = "stage"
    SCHEMA_VERSION: ClassVar[int] = 3

    name: str
    key: str
    base: str
    settings: dict[str, Any]
    inputs: dict[str, str]
    files: dict[str, int]
    seconds: float
    threads: int | None = None


def stage_folder(folder: Path, name: str) -> Path:
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
    threads: int | None = None,
) -> dict[str, StageRecord]:
    """Run what is not done yet, in order, and return the record of every stage."""
    records: dict[str, StageRecord] = {}
    bases: dict[str, str] = {}
    _ = [stage.settings for stage in stages]  # what cannot be described ends the run before any work

    for stage in stages:
        inputs = {name: records[name].key for name in stage.after}
        base = bases[stage.name] = _base(stage, bases)
        state, output = "done before", stage_folder(folder, stage.name)
        if _reason(stage, inputs, folder):
            state = ""
            show(stage.name, RUNNING)
            began = time.monotonic()
            key = _key(
                stage, inputs
            )  # before it runs: what is changed while it runs has changed the next time
            with ExitStack() as stack:
                report = stack.enter_context(progress())
                if stage.resumes:
                    part = _resumed(output, base, threads)
                    stage.run(part, report)
                temporary = stack.enter_context(atomic_directory(output, own=True))
                if stage.resumes:
                    (part / _BASE_FILE).unlink()
                    for path in list(part.iterdir()):
                        path.rename(temporary / path.name)
                    part.rmdir()
                else:
                    stage.run(temporary, report)
                files = sorted(path for path in temporary.rglob("*") if path.is_file())
                sizes = {path.relative_to(temporary).as_posix(): path.stat().st_size for path in files}
                seconds = round(time.monotonic() - began, 3)
                record = StageRecord(stage.name, key, base, stage.settings, inputs, sizes, seconds, threads)
                write_record(temporary / RECORD_FILE, record)
        records[stage.name] = read_record(StageRecord, output / RECORD_FILE)
        show(stage.name, state or f"finished in {records[stage.name].seconds:.0f} s")
        check(stage.name)
    return records


def explain_stages(stages: Sequence[Stage], folder: Path) -> dict[str, str]:
    """For each stage why it would run now, in words; nothing for one that is done. Nothing is run or changed."""
    reasons: dict[str, str] = {}
    keys: dict[str, str] = {}
    for stage in stages:
        inputs = {name: keys[name] for name in stage.after}
        keys[stage.name] = _key(stage, inputs)
        reasons[stage.name] = _reason(stage, inputs, folder)
    return reasons


def _resumed(output: Path, base: str, threads: int | None) -> Path:
    """The folder to go on in: of a killed run with that base, else with what a finished one of it has left."""
    part, wanted = output.with_name(f"{output.name}{_PART}"), f"{base} {threads}"
    with suppress(FileNotFoundError):
        if (part / _BASE_FILE).read_text("utf-8") == wanted:
            remove_stale_temporaries(part)
            return part
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    with suppress(InputError):
        record = read_record(StageRecord, output / RECORD_FILE)
        if (record.base, record.threads) == (base, threads) and not _damaged(record, output):
            for name in record.files:
                (part / name).parent.mkdir(parents=True, exist_ok=True)
                try:
                    os.link(output / name, part / name)
                except OSError:
                    shutil.copyfile(output / name, part / name)
    write_text(part / _BASE_FILE, wanted)
    return part


def _damaged(record: StageRecord, output: Path) -> list[str]:
    sizes = {name: place.stat().st_size for name in record.files if (place := output / name).is_file()}
    return [name for name, size in record.files.items() if sizes.get(name) != size]


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
    if damaged := _damaged(record, output):
        return f"files are missing or have another size: {', '.join(damaged)}"
    return "" if stage.settled(output) else _TRIED_AGAIN


def _changes(before: Any, now: Any, place: tuple[str, ...] = ()) -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for name in dict.fromkeys((*before, *now)):
            yield from _changes(before.get(name), now.get(name), (*place, name))
    elif before != now:
        texts = (json.dumps(value, ensure_ascii=False) for value in (before, now))
        was, is_ = (text if len(text) <= 80 else text[:77] + "..." for text in texts)
        yield f"{'.'.join(place)} was {was} and is {is_}"


def _key(stage: Stage, inputs: Inputs) -> str:
    return _hash([stage.name, stage.settings, dict(inputs)])


def _base(stage: Stage, bases: Mapping[str, str]) -> str:
    kept = {name: value for name, value in stage.settings.items() if name not in stage.rows}
    return _hash([stage.name, kept, {name: bases[name] for name in stage.after}])


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()
