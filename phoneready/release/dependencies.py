"""What every result depends on beside settings and inputs: the tool's own code, and the packages that it uses.

It is part of the first stage's key, and every other stage comes after that one. No list says which stage uses what, so
none can miss anything.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
from pathlib import Path
from typing import Any

import cfsp
from cfsp.plugins import ENGINES, FAMILIES, METRICS, TARGETS, find_plugins
from cfsp.records import tool_version

ROOT = Path(cfsp.__file__).parents[1]
_SHOWING = re.compile(r"(rich|typer)\b|.*extra == .(all|dev|report|track|search)\b")
"""Requirements that change no result: they show it, log it, search for settings, or test the tool."""


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
    plugins = [
        plugin.origin for group in (ENGINES, TARGETS, METRICS, FAMILIES) for plugin in find_plugins(group)
    ]
    return {
        "tool": tool_version(),
        "code": digest.hexdigest()[:16],
        "packages": {name: installed_version(name) for name in sorted(names)},
        "plugins": sorted(set(plugins)),
    }


def installed_version(distribution: str) -> str | None:
    """The version of a distribution; None where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
