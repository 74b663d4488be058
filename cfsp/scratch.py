"""Folders for large temporary files, which go with the process that made them, or, where it was killed, with the next.

Beside every folder lies a lock that its process holds: one that nobody holds is a dead process's. Locks of other hosts,
which a shared folder need not show, are let be; where it has no locks at all, folders of killed processes stay.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import platform
import secrets
import shutil
import weakref
from pathlib import Path
from types import TracebackType
from typing import Self

import filelock

from cfsp.errors import InputError
from cfsp.files import large_temporary, no_space_as_input_error

_HOST = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
_LOCK = f".phoneready-{_HOST}-{{}}.lock"
_TRIES = 100
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class LargeScratch:
    """A folder in `large_temporary`, for its user alone; deleted when it is let go, or left as a context.

    Raises:
        InputError: It cannot be made.
    """

    def __init__(self, kind: str) -> None:
        place = large_temporary()
        with no_space_as_input_error(place):
            remove_dead(place)
            self.path, lock = _made(place, kind)
        self._close = weakref.finalize(self, _remove, self.path, lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()


def remove_dead(place: Path) -> None:
    """Delete the folders in `place` whose processes were killed; another user's stay."""
    for file in place.glob(_LOCK.format("*")):
        lock = _lock(file)
        with contextlib.suppress(OSError, filelock.Timeout):
            lock.acquire()
            name = file.name.removeprefix(_LOCK.partition("{")[0]).removesuffix(".lock")
            _remove(place / f"phoneready-{name}", lock)


def _made(place: Path, kind: str) -> tuple[Path, filelock.BaseFileLock | None]:
    """A new folder, and its lock, which is held before the folder is there; None where the place has no locks."""
    for _ in range(_TRIES):
        name = f"{kind}-{secrets.token_hex(4)}"
        lock, folder = _lock(place / _LOCK.format(name)), place / f"phoneready-{name}"
        try:
            lock.acquire()
        except filelock.Timeout:  # another process takes it for a dead one's, and removes it
            continue
        except NotImplementedError:
            locked = False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            locked = False
        else:
            locked = True
        folder.mkdir(mode=0o700)
        return folder, lock if locked else None
    raise InputError(f"{place}: no folder can be locked there")


def _lock(file: Path) -> filelock.BaseFileLock:
    # A folder may be let go in another thread than the one that made it.
    return filelock.FileLock(file, timeout=0, thread_local=False)


def _remove(folder: Path, lock: filelock.BaseFileLock | None) -> None:
    """Delete a folder whose lock is held, and the lock."""
    shutil.rmtree(folder, ignore_errors=True)
    if lock is None:
        return
    with contextlib.suppress(OSError):  # where what is open cannot be deleted, the next process does
        Path(lock.lock_file).unlink(missing_ok=True)
    lock.release()
