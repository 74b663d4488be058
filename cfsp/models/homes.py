"""Where weights are that are not in memory: in a model's own files, or in scratch files that go with the last user."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import finalize

import safetensors
import safetensors.torch
import torch

from cfsp.errors import InputError
from cfsp.files import large_temporary, no_space_as_input_error
from cfsp.scratch import LargeScratch
from cfsp.units import format_bytes

_NARROW = (torch.bfloat16, torch.float16)


class _Owner:
    """Deletes a scratch file once nothing in it is anybody's home."""

    def __init__(self, file: Path, folder: LargeScratch) -> None:
        self.folder = folder  # deleted with the last file of it
        finalize(self, file.unlink, missing_ok=True)


@dataclass(frozen=True)
class Home:
    """Where a tensor is.

    Attributes:
        file: A safetensors file.
        name: In it.
        stamp: The file's, which another one in its place does not have.
        owner: Of a scratch file.
    """

    file: Path
    name: str
    stamp: tuple[int, ...]
    owner: _Owner | None = None

    @classmethod
    def of(cls, file: Path, names: Iterable[str], owner: _Owner | None = None) -> dict[str, Home]:
        """Of names in a file."""
        stamp = _stamp(file)
        return {name: cls(file, name, stamp, owner) for name in names}

    def open(self) -> Any:
        """The file, to be used as a context manager.

        Raises:
            InputError: It is not the one that was there, or not there any more.
        """
        if _stamp(self.file) != self.stamp:
            raise InputError(f"{self.file} was changed while it was read")
        return safetensors.safe_open(self.file, "pt")


def _stamp(file: Path) -> tuple[int, ...]:
    try:
        found = file.stat()
    except FileNotFoundError:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns


class Scratch:
    """Files for what was changed, each deleted with the last page that has it."""

    def __init__(self) -> None:
        self._folder = LargeScratch("weights")
        self._count = 0

    def write(self, tensors: Mapping[str, torch.Tensor], *, narrowed: bool = True) -> dict[str, Home]:
        """Store tensors, one that has two names once; name -> where it is now.

        Args:
            tensors: By name.
            narrowed: Whether in the fewest bytes that hold them exactly.
        """
        if not tensors:
            return {}
        self._count += 1
        file = self._folder.path / f"{self._count}.safetensors"
        first = {id(tensor): name for name, tensor in tensors.items()}
        stored = {name: tensors[name].detach() for name in first.values()}
        if narrowed:
            stored = {name: _narrowed(tensor) for name, tensor in stored.items()}
        with no_space_as_input_error(file):
            safetensors.torch.save_file(stored, file)
        homes = Home.of(file, stored, _Owner(file, self._folder))
        return {name: homes[first[id(tensor)]] for name, tensor in tensors.items()}


def _narrowed(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in the fewest bytes that hold it exactly."""
    for dtype in _NARROW:
        narrow = tensor.to(dtype)
        if torch.equal(narrow.to(tensor.dtype), tensor):
            return narrow.contiguous()
    return tensor.contiguous()


def require_scratch(needed: int) -> None:
    """Refuse what does not fit the folder for large temporary files.

    Args:
        needed: Bytes.

    Raises:
        InputError: So much is not free there.
    """
    folder = large_temporary()
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"reading a model block by block takes up to {format_bytes(needed)} in {folder}, and "
            f"{format_bytes(free)} are free",
            allowed="another folder (TMPDIR)",
        )
