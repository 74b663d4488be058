"""How files of a stage come into the release folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from cfsp.files import atomic_directory, atomic_file


def place(source: Path, destination: Path) -> None:
    """Make a file, or all files of a folder, appear at `destination`; what is there already stays untouched.

    A file is given a second name. The files of a folder are copied: onnx and onnx-ir refuse weights beside a graph
    that have more than one name.
    """
    if source.is_file():
        if destination.exists() and destination.samefile(source):
            return
        with atomic_file(destination) as temporary:
            temporary.unlink()
            try:
                os.link(source, temporary)
            except OSError:
                shutil.copyfile(source, temporary)
        return
    files = {path.relative_to(source): path for path in source.rglob("*") if path.is_file()}
    there = {path.relative_to(destination) for path in destination.rglob("*") if path.is_file()}
    if there == set(files) and all(_is_copy(file, destination / name) for name, file in files.items()):
        return
    with atomic_directory(destination, own=True) as folder:
        shutil.copytree(source, folder, dirs_exist_ok=True)


def _is_copy(source: Path, copy: Path) -> bool:
    """Whether a file has another's size and time, as a copy has, and is not that file by a second name."""
    of_source, of_copy = source.stat(), copy.stat()
    same = (of_source.st_size, of_source.st_mtime_ns) == (of_copy.st_size, of_copy.st_mtime_ns)
    return same and not os.path.samestat(of_source, of_copy)
