"""Stages that are done once: skipped when their inputs have not changed, taken up again after a kill.

A stage writes into a temporary folder. Once everything in it, the stage's record last, is on the disk, one rename
makes it `<folder>/stages/<name>`. A stage is done when that record carries the key that its settings and the keys
of the stages before it give, and the files it names are there. Nothing else is remembered: a run that is killed at
any point and started again repeats no finished stage.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import filelock

from cfsp.errors import InputError
from cfsp.files import atomic_directory, remove_stale_temporaries, writable_place
from cfsp.progress import Progress
from cfsp.records import read_record, write_record
from phoneready.release.beside import Work, run_beside

LOCK_FILE = ".phoneready.lock"
RECORD_FILE = "stage.json"
RUNNING = "running"
"""State of a stage that begins."""
_TRIED_AGAIN = "some of it failed and is tried again"
_TRIES = 10
"""At a lock whose folder comes and goes."""


@dataclass(frozen=True)
class Stage:
    """A step of a pipeline.

    Attributes:
        name: Its folder's name.
        describe: Gives what its result depends on, beside the stages before it. It may read whole files for their
            hashes, and is asked once, by whoever needs `settings`.
        after: Names of the stages whose output it reads.
        run: Writes the output into the folder it is given.
        settled: Says of a finished output whether another run would give the same; one that would not is done again.
        beside: Whether others may run beside it, which need not be so where times are what it measures.
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
        """What `describe` gives, through JSON, so that it equals what a record's file has."""
        plain: dict[str, Any] = json.loads(json.dumps(dict(self.describe())))
        return plain


@dataclass(frozen=True)
class StageRecord:
    """What makes a stage's folder a finished one.

    Attributes:
        key: Hash of its settings and of the keys of the stages before it, which `inputs` has by name.
        files: Path inside the folder to size in bytes.
        threads: That it was given; None if nobody said how many.
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

    Raises:
        InputError: It holds something else, another run is using it, or it cannot be written.
    """
    status, lock = writable_place(folder), folder / mark
    there = _content(folder) if status and stat.S_ISDIR(status.st_mode) else set()
    if (status and not stat.S_ISDIR(status.st_mode)) or (there and mark not in there):
        raise InputError(f"{folder} exists and is not a {what} folder; choose another one with -o")
    places = (folder / "stages", lock, folder, *folder.absolute().parents)
    made = [place for place in places if not place.exists()]
    try:
        with _locked(lock):
            remove_stale_temporaries(folder)
            if (folder / "stages").is_dir():
                remove_stale_temporaries(folder / "stages")
            try:
                yield
            except BaseException:
                _remove_unused(made)
                raise
    except filelock.Timeout as error:
        raise InputError(
            f"another run is using {folder}; wait for it, or choose another one with -o"
        ) from error
    except (PermissionError, NotADirectoryError) as error:
        raise InputError(f"cannot write {error.filename or folder}: {error.strerror}") from error


def _content(folder: Path) -> set[str]:
    """Names of what is in a folder; of none if it has been taken away."""
    with suppress(FileNotFoundError):
        return {place.name for place in folder.iterdir()}
    return set()


def _locked(path: Path) -> AbstractContextManager[Any]:
    """A lock that is held, in a folder that is made when missing; raises filelock.Timeout if another run has it."""

    tries = 0
    while True:
        tries += 1
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return filelock.FileLock(path, timeout=0).acquire()
        except (FileNotFoundError, FileExistsError):  # another run has failed just now: its folder is gone
            if tries == _TRIES:
                raise


def _remove_unused(made: Sequence[Path]) -> None:
    """Remove what claiming a folder has made, innermost first, up to what holds something else.

    The lock is held, and filelock takes none whose file is gone: who waits for this one makes the folder anew.
    """
    with suppress(OSError):
        for place in made:
            if place.is_dir():
                place.rmdir()
            elif _content(place.parent) == {place.name}:
                place.unlink()


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
    """Run what is not done yet, in order.

    Returns:
        The record of every stage.
    """
    records: dict[str, StageRecord] = {}
    _ = [stage.settings for stage in stages]  # what cannot be described ends the run before any work

    def done(name: str, state: str) -> None:
        records[name] = read_record(StageRecord, stage_folder(folder, name) / RECORD_FILE)
        show(name, state or f"finished in {records[name].seconds:.0f} s")
        check(name)

    for group in _groups(stages):
        inputs = {stage.name: {name: records[name].key for name in stage.after} for stage in group}
        to_do = [stage for stage in group if _reason(stage, inputs[stage.name], folder)]
        for stage in group:
            if stage not in to_do:
                done(stage.name, "done before")
        work = beside() if to_do and group[0].beside else None
        if work is not None:
            for stage in to_do:
                show(stage.name, RUNNING)
            with progress() as report:
                asked = {stage.name: inputs[stage.name] for stage in to_do}
                run_beside(work, asked, report, lambda name: done(name, ""))
            continue
        for stage in to_do:
            show(stage.name, RUNNING)
            with progress() as report:
                run_stage(stage, inputs[stage.name], folder, report, threads=threads)
            done(stage.name, "")
    return {stage.name: records[stage.name] for stage in stages}


def _groups(stages: Sequence[Stage]) -> Iterator[list[Stage]]:
    """Neighbours that may run beside each other, as none needs another's output; all others alone."""
    group: list[Stage] = []
    for stage in stages:
        together = stage.beside and all(one.beside and one.name not in stage.after for one in group)
        if group and not together:
            yield group
            group = []
        group.append(stage)
    if group:
        yield group


def explain_stages(stages: Sequence[Stage], folder: Path) -> dict[str, str]:
    """For each stage why it would run now, in words; nothing for one that is done. Nothing is run or changed."""
    reasons: dict[str, str] = {}
    keys: dict[str, str] = {}
    for stage in stages:
        inputs = {name: keys[name] for name in stage.after}
        keys[stage.name] = _key(stage, inputs)
        reasons[stage.name] = _reason(stage, inputs, folder)
    return reasons


def _reason(stage: Stage, inputs: Mapping[str, str], folder: Path) -> str:
    """Why a stage has to run; empty if it is done."""
    output = stage_folder(folder, stage.name)
    if not (output / RECORD_FILE).is_file():
        return "it was not done yet"
    try:
        record = read_record(StageRecord, output / RECORD_FILE)
    except InputError:
        return "its record cannot be read by this version"
    changes = [_change(*difference) for difference in _differences(record.settings, stage.settings)]
    changes += [f"{name} has changed" for name in inputs if record.inputs.get(name) != inputs[name]]
    if changes:
        return "; ".join(changes)
    if record.key != _key(stage, inputs):
        return "it depends on other stages now"
    damaged = [name for name, size in record.files.items() if _size(output / name) != size]
    if damaged:
        return f"files are missing or have another size: {', '.join(damaged)}"
    return "" if stage.settled(output) else _TRIED_AGAIN


def _differences(
    before: Any, now: Any, place: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """(keys, then, now) of everything that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in dict.fromkeys((*before, *now)):
            yield from _differences(before.get(name), now.get(name), (*place, name))
    elif before != now:
        yield place, before, now


def _change(place: tuple[str, ...], before: Any, now: Any) -> str:
    shown = (json.dumps(value, ensure_ascii=False) for value in (before, now))
    return f"{'.'.join(place)} was {' and is '.join(text if len(text) <= 80 else text[:77] + '...' for text in shown)}"


def _key(stage: Stage, inputs: Mapping[str, str]) -> str:
    text = json.dumps(
        [stage.name, stage.settings, dict(inputs)], sort_keys=True, ensure_ascii=True, allow_nan=False
    )
    return hashlib.sha256(text.encode()).hexdigest()


def run_stage(
    stage: Stage, inputs: Mapping[str, str], folder: Path, progress: Progress, *, threads: int | None = None
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


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None
