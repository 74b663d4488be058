"""A folder that several runs may work in at the same time; a killed run's claims end with it."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import filelock

from cfsp.errors import InputError
from cfsp.files import no_space_as_input_error, remove_stale_temporaries, writable_place
from phoneready.release.stages import LOCK_FILE

RESULT_FILE, TABLE_FILE, PLOT_FILE, STUDY_FILE, STATE = (
    *("frontier.json", "frontier.md", "frontier.html", "study.jsonl", "measured"),
)
_OURS = {LOCK_FILE, RESULT_FILE, TABLE_FILE, PLOT_FILE, STUDY_FILE, STATE}


def check_folder(folder: Path) -> None:
    """Raise InputError where a folder holds what no frontier left: a release keeps files of the same names."""
    writable_place(folder)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"cannot write {folder}: it is a file")
    there: Sequence[Path] = list(folder.iterdir()) if folder.is_dir() else ()
    strange = {p.name for p in there if p.name not in _OURS and not p.name.startswith(f".{RESULT_FILE[:8]}")}
    files = {name for name in strange if name.endswith(".gguf") and (folder / STATE).is_dir()}
    if others := sorted(strange - files):
        raise InputError(f"{folder} holds {others[0]}, which is no frontier's; choose another folder with -o")


@contextmanager
def join(folder: Path, state: Path, *, alone: Callable[[], None]) -> Iterator[str]:
    """Work in `folder` beside other runs; yields the name of a folder in `state` that is this run's alone.

    Args:
        folder: Made when missing.
        state: What is kept of these settings.
        alone: Called where no other run is at work: clears what killed ones left.

    Raises:
        InputError: It cannot be written.
    """
    name = f"work-{os.getpid()}-{secrets.token_hex(4)}"
    with no_space_as_input_error(folder):
        state.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(state / f"{name}.lock")
        with filelock.FileLock(folder / LOCK_FILE):
            others = [path for path in folder.glob(f"{STATE}/*/work-*.lock") if not _cleared(path)]
            if not others:
                remove_stale_temporaries(folder)
                alone()
            lock.acquire()
    try:
        yield name
    finally:
        lock.release()
        _cleared(state / f"{name}.lock")


def is_alive(state: Path, name: str) -> bool:
    """Whether the run with that name is still at work."""
    path = state / f"{name}.lock"
    return path.exists() and not _cleared(path)


@contextmanager
def claim(state: Path, name: str, timeout: float = 0) -> Iterator[bool]:
    """Keep other runs from a piece of work; yields whether it is ours.

    Args:
        state: What is kept of these settings.
        name: Of the work.
        timeout: Seconds to wait for others; -1: until they are done.
    """
    folder = state / "claims"
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / f"{name}.lock", timeout=timeout)
    try:
        lock.acquire()
    except filelock.Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _cleared(path: Path) -> bool:
    """Remove a run's folder and its lock, unless that run is still at work."""
    try:
        with filelock.FileLock(path, timeout=0):
            shutil.rmtree(path.with_suffix(""), ignore_errors=True)
            path.unlink(missing_ok=True)
    except filelock.Timeout:
        return False
    return True
