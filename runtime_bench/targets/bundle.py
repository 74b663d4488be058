"""What has to be on the other machine for a file to run there, named by its content."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cfsp.errors import InputError
from cfsp.files import atomic_file, sha256_file
from exporters.onnx.folder import folder_of
from runtime_bench.files import files_of

_COMPANIONS = (".json", ".jinja", ".model", ".txt")
"""Small files of a variant's folder: tokenizer, configurations."""
_PACKAGES = ("cfsp", "exporters", "runtime_bench")
_MACHINES = {3: "i686", 40: "arm", 62: "x86_64", 183: "aarch64", 243: "riscv64"}
"""e_machine of the ELF header, as `uname -m` calls it."""


@dataclass(frozen=True)
class BundledFile:
    """A file of a bundle: of those that lie together in one folder there."""

    path: Path  # The file here
    # Where it goes there, below the folder that all bundles are in: the bundle's folder and its name in that.
    # The folder's name has 64 hex digits: the file's SHA-256, or of several files the SHA-256 of names and
    # sums.
    place: str
    sha256: str  # Of the file
    size_bytes: int  # Of the file


Bundle = tuple[BundledFile, ...]
"""The first is the one that is named to the engine."""


def model_bundle(path: Path) -> Bundle:
    """A model file; for ONNX with its weights and its variant's tokenizer and configurations.

    Raises:
        InputError: A file is not there, or cannot be read.
    """
    if path.suffix.lower() != ".onnx":
        return _bundle([(path, f"model{path.suffix.lower()}")])
    folder = folder_of(path)
    companions = sorted(file for file in folder.iterdir() if file.suffix in _COMPANIONS and file.is_file())
    place = "" if folder == path.resolve().parent else f"{path.resolve().parent.name}/"
    graphs = [(file, place + file.name) for file in files_of(path)]
    return _bundle([*graphs, *((file, file.name) for file in companions)])


def plain_bundle(path: Path) -> Bundle:
    """A file that nothing belongs to.

    Raises:
        InputError: It is not there, or cannot be read.
    """
    return _bundle([(path, path.name)])


def program_bundle(path: Path) -> Bundle:
    """A program, or the packed worker.

    Raises:
        InputError: It is not there, or cannot be read.
    """
    return _bundle([(path, "worker.zip" if path.suffix == ".zip" else "runner")])


def program_machine(path: Path) -> str | None:
    """Processor that a program is for, as `uname -m` has it; None for scripts and what is not known.

    Raises:
        InputError: It cannot be read.
    """
    try:
        with path.open("rb") as stream:
            head = stream.read(20)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    if len(head) < 20 or head[:4] != b"\x7fELF":
        return None
    return _MACHINES.get(int.from_bytes(head[18:20], "little"))


def pack_worker(path: Path) -> None:
    """Write the packages that the measuring worker needs as a zip file that Python imports from.

    The same sources give the same bytes, so that it is pushed once.
    """
    root = Path(__file__).resolve().parents[2]
    with atomic_file(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for package in _PACKAGES:
            for file in sorted((root / package).rglob("*.py")):
                entry = zipfile.ZipInfo(file.relative_to(root).as_posix(), (1980, 1, 1, 0, 0, 0))
                archive.writestr(entry, file.read_bytes(), zipfile.ZIP_DEFLATED)


def _bundle(files: Sequence[tuple[Path, str]]) -> Bundle:
    try:
        sums = [sha256_file(path) for path, _ in files]
        sizes = [path.stat().st_size for path, _ in files]
    except OSError as error:
        raise InputError(f"cannot read {error.filename}: {error.strerror}") from error
    listing = "".join(f"{digest}  {name}\n" for digest, (_, name) in zip(sums, files, strict=True))
    folder = sums[0] if len(sums) == 1 else hashlib.sha256(listing.encode()).hexdigest()
    return tuple(
        BundledFile(path, f"{folder}/{name}", digest, size)
        for (path, name), digest, size in zip(files, sums, sizes, strict=True)
    )
