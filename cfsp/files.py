"""Writing files so that nobody ever sees half of one.

Everything is written beside its destination under a temporary name, synced, and renamed.
A temporary name is `.<name>.tmp-<random>`; `remove_stale_temporaries` clears what a killed run left.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cfsp.errors import InputError

_MARK = ".tmp-"


def refuse_existing(path: Path, *, force: bool = False, inputs: Iterable[Path] = ()) -> None:
    """Refuse a path that something new is to appear at, where that cannot be or would destroy something.

    Args:
        path: A file or folder to create.
        force: What is there may be replaced.
        inputs: What the new thing is made from; never replaced.

    Raises:
        InputError: It exists and is not an empty directory, unless `force`; it is or holds an input; it is a directory
            that cannot be renamed, which is how folders are replaced; or it lies below a file.
    """
    _refuse_below_a_file(path)
    if not path.exists():
        return
    whole = path.resolve()
    for kept in inputs:
        if kept.exists() and kept.resolve().is_relative_to(whole):
            raise InputError(f"{path} would replace {kept}, which is read; choose another path")
    if whole == Path.cwd() or os.path.ismount(whole):
        raise InputError(f"{path} cannot be replaced as a whole; choose a folder inside it")
    if force or (path.is_dir() and not any(path.iterdir())):
        return
    raise InputError(f"{path} exists already; choose another path or pass --force")


def refuse_no_file(path: Path) -> None:
    """Raise InputError where no file can be at `path`: it is a directory, or lies below something that is none."""
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a directory")
    _refuse_below_a_file(path)


def _refuse_below_a_file(path: Path) -> None:
    above = next((parent for parent in path.absolute().parents if parent.exists()), Path("/"))
    if not above.is_dir():
        raise InputError(f"cannot write {path}: {above} is not a directory")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is synced and renamed to `path`, else removed."""
    refuse_no_file(path)
    with no_space_as_input_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}{_MARK}", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            fsync_file(temporary)
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(path)
            fsync_directory(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a temporary directory beside `path`; on success its files are synced and it becomes `path`.

    Raises:
        InputError: `path` exists, is not an empty directory, and `force` is not set.
    """
    refuse_existing(path, force=force)
    with no_space_as_input_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}{_MARK}", dir=path.parent))
        try:
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    fsync_file(file)
            temporary.chmod(0o777 & ~_umask())
            _replace_directory(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, payload: Any) -> None:
    """Write `payload` as indented JSON with a final newline, atomically."""
    write_text(path, json.dumps(payload, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_text(path: Path) -> str:
    """Read a file of the user's as UTF-8; raises InputError that names it where that fails."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}") from error


def read_json(path: Path) -> Any:
    """Read JSON; raises InputError that names the file where it cannot be read or is malformed."""
    if not path.exists():
        raise InputError(f"{path} does not exist")
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def remove_stale_temporaries(directory: Path, name: str = "*") -> None:
    """Remove what interrupted writes left directly inside `directory`: of the destination `name`, or of all."""
    pattern = name if name == "*" else glob.escape(name)
    for entry in directory.glob(f".{pattern}{_MARK}*"):
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def fsync_directory(directory: Path) -> None:
    """Make renames inside `directory` durable, where the system lets a directory be synced."""
    if os.name == "nt":
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_file(path: Path) -> None:
    """Make a file's content durable."""
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())


def _replace_directory(temporary: Path, path: Path) -> None:
    if path.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{path.name}{_MARK}", dir=path.parent))
        path.rename(old / path.name)
        temporary.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    else:
        temporary.rename(path)
    fsync_directory(path.parent)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


_UNWRITABLE = (
    *(errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR),
    *(errno.EISDIR, errno.EEXIST, errno.EBUSY, errno.EXDEV),
)
# Libraries that write for us say so in words alone: safetensors' errors are no OSErrors, numpy's carry no errno,
# and torch says no more than that its archive could not be written.
_NO_SPACE = re.compile(
    r"No space left on device|Disk quota exceeded|\d+ requested and \d+ written|PytorchStreamWriter failed writing"
    r"|inline_container\.cc.*unexpected pos"
)


@contextmanager
def no_space_as_input_error(path: Path) -> Iterator[None]:
    """Turn a full disk, or one that may not be written to, into an InputError that names `path`."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        code = error.errno if isinstance(error, OSError) else None
        if code in (errno.ENOSPC, errno.EDQUOT) or _NO_SPACE.search(str(error)):
            raise InputError(f"no space left to write {path}") from error
        if code in _UNWRITABLE:
            raise InputError(f"cannot write {path}: {error}") from error
        raise
