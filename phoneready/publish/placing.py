"""How files of a stage come into the release folder without a second copy of every byte where that can be."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from cfsp.files import atomic_directory, atomic_file

_FICLONE = 0x40049409
"""Linux's request to let a file share the blocks of another (btrfs, xfs, bcachefs)."""


def place(source: Path, destination: Path) -> None:
    """Make a file, or all files of a folder, appear at `destination`; what is there already stays untouched.

    A file is given a second name. The files of a folder are copied: onnx and onnx-ir refuse weights beside a graph
    that have more than one name.
    """
    if source.is_file():
        _link(source, destination)
    else:
        _copy_folder(source, destination)


def _copy_folder(source: Path, destination: Path) -> None:
    files = {path.relative_to(source): path for path in sorted(source.rglob("*")) if path.is_file()}
    there = {path.relative_to(destination) for path in destination.rglob("*") if path.is_file()}
    if there == set(files) and all(_is_copy(file, destination / name) for name, file in files.items()):
        return
    with atomic_directory(destination, own=True) as folder:
        shutil.copytree(source, folder, copy_function=_copy, dirs_exist_ok=True)


def _is_copy(source: Path, copy: Path) -> bool:
    """Whether a file has another's size and time, as `_copy` leaves it, and is not that file by a second name."""
    of_source, of_copy = source.stat(), copy.stat()
    same = (of_source.st_size, of_source.st_mtime_ns) == (of_copy.st_size, of_copy.st_mtime_ns)
    return same and not os.path.samestat(of_source, of_copy)


def _copy(source: str, destination: str) -> None:
    """Copy a file with its time; its blocks are shared where the file system can."""
    if not _clone(Path(source), Path(destination)):
        shutil.copyfile(source, destination)
    shutil.copystat(source, destination)


def _clone(source: Path, destination: Path) -> bool:
    if sys.platform != "linux":
        return False
    import fcntl

    with source.open("rb") as read, destination.open("wb") as write:
        try:
            fcntl.ioctl(write.fileno(), _FICLONE, read.fileno())
        except OSError:
            return False
    return True


def _link(source: Path, destination: Path) -> None:
    if destination.exists() and destination.samefile(source):
        return
    with atomic_file(destination) as temporary:
        temporary.unlink()
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
