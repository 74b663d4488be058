"""What stands behind references of models and text, so that a change of it is seen."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from cfsp.files import sha256_file
from cfsp.models.builtin import BUILTIN_MODELS
from cfsp.text.settings import SELF


def identities(references: Iterable[str]) -> list[list[str]]:
    """(reference, what stands behind it now) of each text; of text that a model writes, the name says it all."""
    return [[one, "" if one == SELF else identity(one)] for one in references]


def identity(reference: str) -> str:
    """What stands behind a reference now: a hash of its files, or "" where the reference itself says it all."""
    if reference in BUILTIN_MODELS:
        return BUILTIN_MODELS[reference].sha256
    path = Path(reference)
    if path.is_file():
        return sha256_file(path)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return " ".join(f"{file.relative_to(path).as_posix()}:{sha256_file(file)}" for file in files)
    return ""
