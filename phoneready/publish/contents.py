"""The files of a release with their hashes, and whether a folder still holds them and nothing else.

SHA256SUMS lists every file of the release, manifest.json too, so that `sha256sum -c SHA256SUMS` checks a release
where phoneready is not. It is no signature: who can change a file can change it as well; sign it where that matters.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from cfsp.errors import InputError
from cfsp.files import sha256_file, write_text

SUMS_FILE = "SHA256SUMS"
_KEPT_APART = ("stages", ".phoneready.lock", "history.jsonl", SUMS_FILE)
"""Kept beside a release: what the pipeline goes on from, figures of the releases before, and the list itself."""
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")


@dataclass(frozen=True)
class Content:
    """A file of a release: its path from the release folder with slashes, size, and hash."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Problem:
    """A difference between a folder and its release: the file, and what is wrong with it."""

    path: str
    reason: str


def describe_files(folder: Path, names: Iterable[str], known: Mapping[str, str]) -> tuple[Content, ...]:
    """Size and hash of files, and of all files in folders, in order of their paths."""
    paths: set[Path] = set()
    for name in names:
        path = folder / name
        paths |= {path} if path.is_file() else {file for file in path.rglob("*") if file.is_file()}
    contents = []
    for path in paths:
        name = path.relative_to(folder).as_posix()
        contents.append(Content(name, path.stat().st_size, known.get(name) or sha256_file(path)))
    return tuple(sorted(contents, key=lambda content: content.path))


def write_sums(folder: Path, contents: Iterable[Content]) -> None:
    """Write SHA256SUMS in the form of coreutils."""
    write_text(folder / SUMS_FILE, "".join(f"{content.sha256}  {content.path}\n" for content in contents))


def read_sums(folder: Path) -> dict[str, str]:
    """SHA256SUMS as path -> hash.

    Raises:
        InputError: It is missing, or a line is no hash and path inside the folder.
    """
    file = folder / SUMS_FILE
    try:
        # Bytes first: reading as text would take several characters for ends of lines.
        *lines, last = file.read_bytes().decode("utf-8").split("\n")
    except FileNotFoundError:
        raise InputError(f"{file} does not exist: {folder} is no finished release") from None
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 text") from error
    sums = {}
    for number, line in enumerate(lines, 1):
        match = _LINE.fullmatch(line)
        if match is None or not is_inside(match[2]):
            raise InputError(f"{file}, line {number} is no hash and file of the folder")
        sums[match[2]] = match[1]
    if last:
        raise InputError(f"{file} does not end with a whole line")
    return sums


def find_problems(folder: Path, contents: Iterable[Content]) -> list[Problem]:
    """Changed, missing and further files of a folder, in order of their paths; every byte is read."""
    expected = {content.path: content for content in contents}
    present = {
        path.relative_to(folder) for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()
    }
    further = {path.as_posix() for path in present if path.parts[0] not in _KEPT_APART} - set(expected)
    problems = [
        *(Problem(path, reason) for path, one in expected.items() for reason in _reasons(folder, one)),
        *(Problem(path, "is not of this release") for path in further),
    ]
    return sorted(problems, key=lambda problem: problem.path)


def _reasons(folder: Path, content: Content) -> Iterator[str]:
    path = folder / content.path
    if not is_inside(content.path):
        yield "is no path inside a release"
    elif path.is_symlink() or not path.is_file():
        yield "is not a regular file" if path.is_symlink() or path.exists() else "is missing"
    elif content.bytes >= 0 and (size := path.stat().st_size) != content.bytes:
        yield f"has {size} bytes instead of {content.bytes}"
    elif sha256_file(path) != content.sha256:
        yield "has changed: its SHA-256 is another"


def is_inside(path: str) -> bool:
    """Whether a path stays in the folder that it is read from."""
    parts = PurePosixPath(path)
    return bool(path) and "\\" not in path and not parts.is_absolute() and ".." not in parts.parts
