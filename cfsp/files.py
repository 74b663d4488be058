"""Writing files so that nobody ever sees half of one, and folders for large temporary files.

Everything is written beside its destination as `.<name>.tmp-<random>`, synced, and renamed; `remove_stale_temporaries`
clears what a killed run left.
"""

from __future__ import annotations

import ctypes
import errno
import glob
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import stat
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, Self

import filelock

from cfsp.errors import InputError

_MARK = ".tmp-"
_ASIDE = f"{_MARK}aside"  # suffix of a folder that is being replaced, if no system call swaps two folders


def short_name(name: str) -> str:
    """The beginning of a name that names of files go on after: systems take 255 bytes."""
    return name.encode(errors="ignore")[:120].decode(errors="ignore")


def refuse_existing(
    path: Path, *, force: bool = False, inputs: Iterable[Path] = (), like: re.Pattern[bytes] | None = None
) -> None:
    """Refuse a path for a new folder, or with `like` a file; the one place that says what may be replaced.

    Args:
        force: What phoneready wrote there may be replaced: a folder with a record, or a file that begins as `like`
            says; an empty one always.
        inputs: What the new thing is made from; never replaced.
        like: As `record_head` says for records.

    Raises:
        InputError: It exists and may not be replaced; it is or holds an input, the home or the working directory, or a
            mount; or as `writable_place`.
    """
    status = writable_place(path)
    if status is None:
        if not force and _aside(path).exists():
            what = "exists, set aside by a run that was stopped"
            raise InputError(f"{path} {what}; choose another path or pass --force")
        return
    if stat.S_ISDIR(status.st_mode) != (like is None):
        raise InputError(f"cannot write {path}: it is a {'directory' if like else 'file'}")
    whole = path.resolve()
    for kept in inputs:
        if os.path.exists(kept) and kept.resolve().is_relative_to(whole):  # noqa: PTH110  (a name may be too long)
            raise InputError(f"{path} would replace {kept}, which is read; choose another path")
    homes = (Path.cwd(), Path(os.path.expanduser("~")).resolve())  # noqa: PTH111  (that needs no passwd entry)
    if os.path.ismount(whole) or any(home.is_relative_to(whole) for home in homes):
        raise InputError(f"{path} cannot be replaced as a whole; choose a folder inside it")
    if status.st_size == 0 if like else not any(path.iterdir()):
        return
    if not force:
        raise InputError(f"{path} exists already; choose another path or pass --force")
    if not (_begins(path, like) if like else _is_ours(path)):
        what = "is nothing that phoneready wrote, and is not replaced"
        raise InputError(f"{path} {what}; choose another path, or remove it first")


def record_head(*kinds: str) -> re.Pattern[bytes]:
    """How records of these kinds (or of any) begin on the disk; for `refuse_existing`."""
    kind = "|".join(map(re.escape, kinds)) or r"[\w-]+"
    return re.compile(rb'\A\{\s*"kind": "(%s)",\s*"schema_version": \d' % kind.encode())


def refuse_no_file(path: Path) -> None:
    """Raise InputError if no file can be written at `path`."""
    status = writable_place(path)
    if status and stat.S_ISDIR(status.st_mode):
        raise InputError(f"cannot write {path}: it is a directory")


def writable_place(path: Path) -> os.stat_result | None:
    """What is at a path to write to, None for nothing; raises InputError for what no file or folder can replace."""
    above = next((parent for parent in path.absolute().parents if os.path.exists(parent)), Path("/"))  # noqa: PTH110
    if not above.is_dir():
        raise InputError(f"cannot write {path}: {above} is not a directory")
    place = Path(os.path.realpath(path.parent), path.name)
    try:
        str(path).encode()
        with suppress(FileNotFoundError, NotADirectoryError):
            (place.with_name(f".{path.name}{_MARK}12345678") if path.name else place).joinpath(
                "x" * 64
            ).lstat()
        status = path.stat()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "its name is not UTF-8"
        raise InputError(f"cannot write {str(path)!r}: {reason}") from error
    # /dev/stdout and the like lead to whatever is open, a file perhaps; a rename would replace the link itself.
    special = place.is_relative_to("/proc") or (place.is_relative_to("/dev") and place.is_symlink())
    if special or not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        raise InputError(f"cannot write {path}: it is a device, a pipe or a socket; name a file")
    return status


def _begins(file: Path, pattern: re.Pattern[bytes]) -> bool:
    with file.open("rb") as stream:
        return pattern.search(stream.read(1 << 16)) is not None


def _is_ours(folder: Path) -> bool:
    """Whether a folder carries a record, or consists of folders that do, as an export of two families does."""
    if any(file.is_file() and _begins(file, record_head()) for file in folder.glob("*.json")):
        return True
    parts = list(folder.iterdir())
    return bool(parts) and all(part.is_dir() and not part.is_symlink() and _is_ours(part) for part in parts)


@contextmanager
def claim_output(path: Path) -> Iterator[None]:
    """Keep other runs from writing `path` inside the context, and clear what killed ones left; raises InputError."""
    writable_place(path)
    missing = [parent for parent in path.absolute().parents if not parent.exists()]
    with no_space_as_input_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(path.parent / f".{path.name}.lock", timeout=0, is_singleton=True)
        try:
            lock.acquire()
        except filelock.Timeout as error:
            raise InputError(f"another run is writing {path}; wait for it, or choose another path") from error
    try:
        if lock.lock_counter == 1:  # else what is there may be this run's own
            remove_stale_temporaries(path.parent, path.name)
        yield
    finally:
        if lock.lock_counter == 1:
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()
        with suppress(OSError):
            for parent in missing:
                parent.rmdir()


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path that on success is synced and renamed to `path`, else removed."""
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
def atomic_directory(path: Path, *, force: bool = False, own: bool = False) -> Iterator[Path]:
    """Yield a temporary directory that on success is synced and becomes `path`; raises InputError.

    Args:
        force: What phoneready wrote there may be replaced.
        own: The folder is part of one that this run has claimed: whatever is there is replaced.
    """
    with nullcontext() if own else claim_output(path), no_space_as_input_error(path):
        refuse = partial(refuse_existing, path, force=force) if not own else partial(writable_place, path)
        refuse()
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}{_MARK}", dir=path.parent))
        temporary.chmod(0o700)  # whatever the umask
        try:
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    fsync_file(file)
                    # Some libraries make their files readable for their owner alone.
                    file.chmod((file.stat().st_mode & 0o777 | 0o666) & ~_umask())
            refuse()
            temporary.chmod(0o777 & ~_umask())
            if not os.path.lexists(path):
                temporary.rename(path)
            elif not _swap(temporary, path):
                _settle(path)
                path.rename(_aside(path))
                temporary.rename(path)
            fsync_directory(path.parent)
        finally:
            _settle(path)
            _remove(temporary)


@contextmanager
def scratch_directory(path: Path) -> Iterator[Path]:
    """Yield a directory beside a claimed `path`; the next claim clears a killed run's."""
    with no_space_as_input_error(path):
        scratch = tempfile.TemporaryDirectory(prefix=f".{path.name}{_MARK}", dir=path.parent)
    with scratch as name:
        yield Path(name)


def made_once(folder: Path, is_whole: Callable[[Path], bool], make: Callable[[Path], None]) -> Path:
    """A folder of the cache: there, or made now by one process and given its name by one rename."""
    if is_whole(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder.with_name(f".{folder.name}.lock")):
        remove_stale_temporaries(folder.parent, folder.name)
        if not is_whole(folder):  # else another process made it meanwhile
            with atomic_directory(folder, own=True) as place:
                make(place)
    return folder


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, payload: Any) -> None:
    """Write `payload` as indented JSON with a final newline, atomically."""
    write_text(path, json.dumps(payload, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def remove_stale_temporaries(directory: Path, name: str = "*") -> None:
    """Remove what interrupted writes left, of `name` or all; what was set aside for nothing gets its name back."""
    pattern = name if name == "*" else glob.escape(name)
    for entry in directory.glob(f".{pattern}{_MARK}*"):
        if entry.name.endswith(_ASIDE):
            _settle(directory / entry.name[1 : -len(_ASIDE)])
        else:
            _remove(entry)


def remove_directory(path: Path) -> None:
    """Remove a directory of this run's own, so that an interruption leaves no part of it there."""
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}{_MARK}", dir=path.parent))
    path.rename(old / path.name)
    shutil.rmtree(old, ignore_errors=True)


def fsync_directory(directory: Path) -> None:
    """Make renames inside `directory` durable, if the system lets a directory be synced."""
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


def _swap(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False if the system cannot."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (AttributeError, TypeError):  # another system than Linux
        return False
    here, exchange = -100, 2  # Linux's AT_FDCWD and RENAME_EXCHANGE
    return bool(rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}{_ASIDE}")


def _settle(path: Path) -> None:
    """Give a folder that was set aside its name back, or remove it if another one has that."""
    aside = _aside(path)
    if not os.path.lexists(path):
        with suppress(FileNotFoundError):
            aside.rename(path)
    elif os.path.lexists(aside):
        _remove(aside)


def _remove(entry: Path) -> None:
    """Remove a file, a link or a folder, whatever its rights."""
    if entry.is_dir() and not entry.is_symlink():
        with suppress(OSError):  # another user's
            entry.chmod(0o700)
        shutil.rmtree(entry, ignore_errors=True)
    else:
        entry.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


_UNWRITABLE = (
    *(errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR),
    *(errno.EISDIR, errno.EEXIST, errno.EBUSY, errno.EXDEV),
    *(errno.EFBIG, errno.ELOOP, errno.ENAMETOOLONG),
)
# safetensors' errors are no OSErrors, numpy's carry no errno, and torch only says that its archive was not written.
_RUST_ERRNO = re.compile(r"\(os error (\d+)\)")
_NO_SPACE = re.compile(
    r"No space left on device|Disk quota exceeded|File too large|\d+ requested and \d+ written"
    r"|PytorchStreamWriter failed writing|inline_container\.cc.*unexpected pos"
)


def large_temporary() -> Path:
    """The folder for files as large as a model: $TMPDIR, or /var/tmp, as /tmp may be memory."""
    for folder in filter(None, (os.environ.get("TMPDIR"), "/var/tmp")):
        if os.access(folder, os.W_OK | os.X_OK):
            return Path(folder)
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        raise InputError(f"{error.strerror}", allowed="a folder that can be written (TMPDIR)") from error


@contextmanager
def no_space_as_input_error(path: Path) -> Iterator[None]:
    """Turn a full or read-only disk into an InputError that names `path`."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        stated = _RUST_ERRNO.search(str(error))
        code = error.errno if isinstance(error, OSError) else int(stated[1]) if stated else None
        if code in (errno.ENOSPC, errno.EDQUOT) or _NO_SPACE.search(str(error)):
            raise InputError(f"no space left to write {path}") from error
        if code in _UNWRITABLE:
            raise InputError(f"cannot write {path}: {error}") from error
        raise


_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_HOST = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
_LOCK = f".phoneready-{_HOST}-{{}}.lock"  # of this host only: others' need not show on a shared folder


class LargeScratch:
    """A folder in `large_temporary`, for its user only; deleted when it is let go, or left as a context.

    Its process holds a lock beside it: the next process deletes a folder whose lock nobody holds. On file systems
    without locks folders of killed processes stay. Raises InputError if it cannot be made.
    """

    def __init__(self, kind: str) -> None:
        place = large_temporary()
        with no_space_as_input_error(place):
            for file in place.glob(_LOCK.format("*")):  # a killed process's; another user's stay
                dead = filelock.FileLock(file, timeout=0, thread_local=False)
                with suppress(OSError, filelock.Timeout):
                    dead.acquire()
                    name = file.name.removeprefix(_LOCK.partition("{")[0]).removesuffix(".lock")
                    _remove_locked(place / f"phoneready-{name}", dead)
            name, lock = f"{kind}-{secrets.token_hex(4)}", None
            try:
                # Not of a thread: a folder may be let go in another one than the one that made it. It is waited for if
                # another process takes it for a dead one's, and removes it.
                lock = filelock.FileLock(place / _LOCK.format(name), timeout=10, thread_local=False)
                lock.acquire()
            except filelock.Timeout as error:
                raise InputError(f"{place}: another process holds the lock of a new folder") from error
            except (NotImplementedError, OSError) as error:
                if getattr(error, "errno", errno.ENOSYS) not in _NO_LOCKS:
                    raise
                lock = None
            self.path = place / f"phoneready-{name}"
            self.path.mkdir(mode=0o700)
        self._close = weakref.finalize(self, _remove_locked, self.path, lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()


def _remove_locked(folder: Path, lock: filelock.BaseFileLock | None) -> None:
    """Delete a folder whose lock is held, and the lock."""
    shutil.rmtree(folder, ignore_errors=True)
    if lock is None:
        return
    with suppress(OSError):  # if what is open cannot be deleted, the next process does it
        Path(lock.lock_file).unlink(missing_ok=True)
    lock.release()
