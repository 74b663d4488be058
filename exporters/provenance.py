"""Where an exported file comes from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cfsp.errors import InputError
from cfsp.files import short_name
from cfsp.models.checkpoint import is_pruned_checkpoint, read_checkpoint_info
from cfsp.models.weights import safetensors_files, sha256_files

SOME_HASH = "0" * 64
"""In place of one that is not known yet: as long as any."""


@dataclass(frozen=True)
class Provenance:
    """What a checkpoint says about its origin; None if it says nothing.

    Attributes:
        name: Short name for titles and file names.
        source_model: Name of the dense model.
        source_sha256: Hash of the dense model's weights.
        checkpoint_sha256: Hash of the checkpoint's weights.
        plan_sha256: Hash of the pruning plan.
        license: SPDX-like identifier.
        base_model: The model that the dense one is made from.
        seed: Seed of the run that made the checkpoint.
    """

    name: str
    source_model: str
    source_sha256: str | None = None
    checkpoint_sha256: str | None = None
    plan_sha256: str | None = None
    license: str | None = None
    base_model: str | None = None
    seed: int | None = None

    def metadata(self) -> dict[str, str]:
        """What an exported file says of it under keys of our own."""
        keys = ("source_model", "source_sha256", "checkpoint_sha256", "plan_sha256")
        return {f"phoneready.{key}": getattr(self, key) for key in keys if getattr(self, key)}


def read_provenance(checkpoint: Path, name: str | None = None) -> Provenance:
    """Provenance of a checkpoint, or of a plain Hugging Face folder, of which only the name is known."""
    if not is_pruned_checkpoint(checkpoint):
        folder = short_name(checkpoint.resolve().name)
        return Provenance(name=file_stem(name or folder), source_model=folder)
    info = read_checkpoint_info(checkpoint)
    return Provenance(
        name=file_stem(name or info.source.name),
        source_model=info.source.name,
        source_sha256=info.source.sha256,
        # Not what the info says: the weights may have been trained since it was written.
        checkpoint_sha256=sha256_files(safetensors_files(checkpoint)),
        plan_sha256=info.plan_sha256,
        license=info.source.license,
        base_model=info.source.base_model,
        seed=info.seed,
    )


_LONGEST = 200
"""Bytes of the beginning of a file's name; a format, a size and the mark of what is not finished follow."""


def file_stem(name: str) -> str:
    """The last part of a name, if files can be called that; raises InputError if they cannot."""
    stem = name.rsplit("/", 1)[-1]
    if not stem or stem.startswith(".") or any(c in '\\:*?"<>|' or ord(c) < 32 for c in stem):
        raise InputError("not usable as a file name", field="name", value=name)
    if len(stem.encode()) > _LONGEST:
        raise InputError("too long a file name", field="name", value=name, allowed=f"up to {_LONGEST} bytes")
    return stem
