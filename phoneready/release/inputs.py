"""What the results of a release depend on beside its settings: models, text, code, packages; and what cannot be read.

Code and packages are part of the first stage's key, which every other stage comes after, so none can miss anything.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import cfsp
from cfsp.files import sha256_file
from cfsp.models.builtin import BUILTIN_MODELS
from cfsp.plugins import ENGINES, FAMILIES, METRICS, TARGETS, find_plugins
from cfsp.records import tool_version
from cfsp.recovery.settings import usable
from cfsp.text.settings import SELF
from exporters.families import ROUNDING
from phoneready.settings.schema import RecoverConfig

ROOT = Path(cfsp.__file__).parents[1]
_SHOWING = re.compile(r"(rich|typer)\b|.*extra == .(all|dev|report|track)\b")
"""Requirements that change no result: they show it, log it, or test the tool."""


def check_training(training: RecoverConfig) -> None:
    """Raise InputError or MissingExtraError for training that cannot be done; its text is not read."""
    usable(training.settings(0), training.texts, ROUNDING)


def identities(references: Iterable[str]) -> list[list[str]]:
    """(reference, what stands behind it now) of each text; of text that a model writes, the name says it all."""
    return [[one, "" if one == SELF else identity(one)] for one in references]


def identity(reference: str) -> str:
    """What stands behind a reference now: a hash of its files, or "" if the reference itself says it all."""
    if reference in BUILTIN_MODELS:
        return BUILTIN_MODELS[reference].sha256
    path = Path(reference)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return " ".join(f"{file.relative_to(path).as_posix()}:{sha256_file(file)}" for file in files)
    return sha256_file(path) if path.is_file() else ""


def made_with(root: Path = ROOT) -> dict[str, Any]:
    """The tool's version, a hash of its code in `root`, and versions of what it requires and of plugins."""
    digest = hashlib.sha256()
    for package in ("cfsp", "exporters", "runtime_bench", "phoneready"):
        for file in sorted((root / package).rglob("*")):
            if file.is_file() and "__pycache__" not in file.parts:
                digest.update(f"{file.relative_to(root).as_posix()}\0".encode())
                digest.update(hashlib.sha256(file.read_bytes()).digest())
    required = importlib.metadata.requires("phoneready") or []
    names = {re.split(r"[^\w.-]", one)[0] for one in required if not _SHOWING.match(one)} - {"phoneready"}
    packages = dict[str, str | None]()
    for name in sorted(names):
        packages[name] = None
        with suppress(importlib.metadata.PackageNotFoundError):
            packages[name] = importlib.metadata.version(name)
    groups = (ENGINES, TARGETS, METRICS, FAMILIES)
    plugins = [plugin.origin for group in groups for plugin in find_plugins(group)]
    return {
        "tool": tool_version(),
        "code": digest.hexdigest()[:16],
        "packages": packages,
        "plugins": sorted(set(plugins)),
    }
