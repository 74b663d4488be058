"""Where weights are that are not at hand: in a model's own files, in scratch files that go with the last user, or in
memory in 16 bits.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self
from weakref import finalize

import safetensors
import safetensors.torch
import torch

from cfsp.errors import InputError
from cfsp.files import large_temporary, no_space_as_input_error
from cfsp.processes import count
from cfsp.scratch import LargeScratch
from cfsp.units import format_bytes

_NARROW = (torch.bfloat16, torch.float16)


class _Owner:
    """Deletes a scratch file once nothing in it is anybody's home."""

    def __init__(self, file: Path, folder: LargeScratch) -> None:
        self.folder = folder  # deleted with the last file of it
        finalize(self, file.unlink, missing_ok=True)


class Home(Protocol):
    """Where a tensor is."""

    def put_away(self, reading: Reading) -> torch.Tensor:
        """What stands for it while it is not at hand: it, in few bytes of memory."""

    def at_hand(self, parameter: torch.Tensor) -> torch.Tensor:
        """What stood for it, as float32; it is changed in place by whoever has it."""


@dataclass(frozen=True)
class InMemory:
    """A tensor that is in memory, on any device.

    Attributes:
        tensor: In the fewest bytes that hold it exactly.
    """

    tensor: torch.Tensor

    def put_away(self, reading: Reading) -> torch.Tensor:
        """See `Home`."""
        return self.tensor

    def at_hand(self, parameter: torch.Tensor) -> torch.Tensor:
        """See `Home`; where float32 is the fewest bytes a copy, as copies of a model share what is here."""
        return parameter.to(torch.float32, copy=True)


@dataclass(frozen=True)
class InFile:
    """A tensor that is in a file.

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
    def of(cls, file: Path, names: Iterable[str], owner: _Owner | None = None) -> dict[str, InFile]:
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

    def put_away(self, reading: Reading) -> torch.Tensor:
        """See `Home`: it is mapped."""
        return reading.mapped(self)

    def at_hand(self, parameter: torch.Tensor) -> torch.Tensor:
        """See `Home`."""
        return parameter.float()


class Reading:
    """Files that are open while tensors in them are mapped; a context manager."""

    def __init__(self) -> None:
        self._stack, self._files = ExitStack(), dict[Path, Any]()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def mapped(self, home: InFile) -> torch.Tensor:
        """A tensor; raises InputError as `InFile.open`."""
        if home.file not in self._files:
            self._files[home.file] = self._stack.enter_context(home.open())
        tensor: torch.Tensor = self._files[home.file].get_tensor(home.name)
        return tensor


def _stamp(file: Path) -> tuple[int, ...]:
    try:
        found = file.stat()
    except FileNotFoundError:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns


class Store(Protocol):
    """Takes what was changed."""

    def write(self, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, Home]:
        """Store tensors, one that has two names once; name -> where it is now."""

    def require(self, n_weights: int) -> None:
        """Raise InputError where there is no room for so many."""


class Memory:
    """Memory for what was changed, in as few bytes as hold it exactly."""

    def write(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, InMemory]:
        """See `Store`."""
        kept = {id(tensor): InMemory(_narrowed(tensor.detach())) for tensor in tensors.values()}
        return {name: kept[id(tensor)] for name, tensor in tensors.items()}

    def require(self, n_weights: int) -> None:
        """See `Store`; it is asked for before a model is loaded."""


class Scratch:
    """Files for what was changed, each deleted with the last page that has it."""

    def __init__(self) -> None:
        self._folder = LargeScratch("weights")
        self._count = 0

    def write(self, tensors: Mapping[str, torch.Tensor], *, narrowed: bool = True) -> dict[str, InFile]:
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
        homes = InFile.of(file, stored, _Owner(file, self._folder))
        return {name: homes[first[id(tensor)]] for name, tensor in tensors.items()}

    def require(self, n_weights: int) -> None:
        """See `Store`."""
        require_scratch(scratch_bytes(n_weights))


def _narrowed(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in the fewest bytes that hold it exactly."""
    for dtype in _NARROW:
        narrow = tensor.to(dtype)
        if torch.equal(narrow.to(tensor.dtype), tensor):
            return narrow.contiguous()
    return tensor.contiguous()


def scratch_bytes(n_weights: int) -> int:
    """Of weights that may be changed in scratch files: four bytes each, whatever they were stored in."""
    return n_weights * torch.float32.itemsize


def may_keep_states(n_bytes: int, n_weights: int, beside: int = 0) -> bool:
    """Whether hidden states may be kept in scratch files that are of use but need not be there.

    Args:
        n_bytes: Of the states that a process keeps; as much again must be left.
        n_weights: Of the model, which each process may change in such files meanwhile.
        beside: Bytes of other scratch files of each.
    """
    needed = 2 * n_bytes + scratch_bytes(n_weights) + beside
    return count() * needed <= shutil.disk_usage(large_temporary()).free


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
