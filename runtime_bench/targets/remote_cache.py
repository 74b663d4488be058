"""The folder on another machine that files are pushed to: each once, under its content's name, whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from cfsp.progress import Progress, no_progress
from runtime_bench.targets.bundle import Bundle, BundledFile
from runtime_bench.targets.far_machine import ANSWER_S
from runtime_bench.targets.far_scripts import CHECK, CLEAN, FORGET, MISMATCH, PUSH
from runtime_bench.targets.transport import FarError, FarShell

_HASHED_PER_S = 4 * 2**20
"""Bytes that the slowest of boards reads from its card and hashes in a second, beside other work."""
_STALL_S = 60.0
"""A client that takes nothing more of a file for so long has lost its device."""
_NO_SPACE = ("No space left", "quota exceeded")


@dataclass
class RemoteCache:
    """A folder there."""

    shell: FarShell
    folder: str  # Absolute path
    progress: Progress = no_progress  # Told how far a push is
    _there: dict[Path, str] = field(default_factory=dict, init=False, repr=False)

    def have(self, path: Path, bundle_of: Callable[[Path], Bundle]) -> str:
        """Have a file and what belongs to it there, checked by its sum.

        Returns:
            The file's path there.

        Raises:
            FarError: No space, no such folder, no connection, or a file that does not arrive as it was sent.
            InputError: A file here cannot be read.
        """
        if path not in self._there:
            bundle = bundle_of(path)
            for file in self._lacking(bundle):
                self._push(file)
            self._there[path] = self._path(bundle[0])
        return self._there[path]

    def forget(self, path: Path, bundle_of: Callable[[Path], Bundle]) -> None:
        """Remove a file and what belongs to it there.

        Raises:
            FarError: No connection, or it cannot be removed.
            InputError: A file here cannot be read.
        """
        folders = sorted({file.place.partition("/")[0] for file in bundle_of(path)})
        reply = self.shell.run(FORGET, *(f"{self.folder}/{name}" for name in folders), timeout_s=ANSWER_S)
        self._there.pop(path, None)
        if reply.status:
            raise reply.reason(f"removing {path.name}")

    def clean(self) -> int:
        """Remove all that was ever pushed there, and return how many folders that was.

        Raises:
            FarError: No connection, or something cannot be removed.
        """
        reply = self.shell.run(CLEAN, self.folder, timeout_s=ANSWER_S)
        self._there.clear()
        if reply.status:
            raise reply.reason("removing files")
        return sum(line.startswith("removed ") for line in reply.text.splitlines())

    def _path(self, file: BundledFile) -> str:
        return f"{self.folder}/{file.place}"

    def _lacking(self, bundle: Bundle) -> list[BundledFile]:
        """Files that are not there, or not as they should be."""
        words = [word for file in bundle for word in (self._path(file), file.sha256)]
        hashing_s = sum(file.size_bytes for file in bundle) / _HASHED_PER_S
        reply = self.shell.run(CHECK, *words, timeout_s=ANSWER_S + hashing_s)
        if reply.status:
            raise FarError("there is no sha256sum, without which nothing can be verified")
        answers = [word for word in reply.text.split() if word in ("same", "other")][-len(bundle) :]
        if len(answers) != len(bundle):
            raise FarError("it does not say which files it has")
        return [file for file, answer in zip(bundle, answers, strict=True) if answer == "other"]

    def _push(self, file: BundledFile) -> None:
        size, name = file.size_bytes, file.path.name

        def report(done: int) -> None:
            # The step ends when all is over: what was taken last is still being checked there.
            self.progress("pushing", min(done, size - 1), size)

        report(0)
        try:
            reply = self.shell.run(
                PUSH,
                self._path(file),
                file.sha256,
                timeout_s=_STALL_S,
                file=file.path,
                after_s=size / _HASHED_PER_S,
                on_bytes=report,
            )
        except OSError as error:
            raise FarError(f"cannot read {file.path}: {error.strerror}") from error
        finally:
            self.progress("pushing", size, size)
        if reply.status == MISMATCH:
            raise FarError(f"{name} did not arrive as it was sent, or was changed meanwhile")
        if any(mark in line for mark in _NO_SPACE for line in reply.errors):
            raise FarError(f"no space left there for {name} ({size / 2**20:.1f} MiB) in {self.folder}")
        if reply.status:
            raise reply.reason(f"pushing {name}")
