"""What a stage's result depends on beside its settings: versions of packages, and the tool's own code.

A stage lists what no stage before it lists: that counts already, through the key of the stage before.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import cfsp
from exporters.families import FAMILIES

_ROOT = Path(cfsp.__file__).parents[1]


@dataclass(frozen=True)
class Dependencies:
    """Of one stage.

    Attributes:
        packages: Distributions; one that is not installed has no version.
        rooms: Folders and files of the tool that make the result; what only tells, shows or asks is left out.
        families: Whether the exported files are made or run, so that their families' packages and code count.
    """

    packages: tuple[str, ...] = ()
    rooms: tuple[str, ...] = ()
    families: bool = False


_EVALUATION = ("cfsp/evaluation", "phoneready/evaluation")
_LOSSES = tuple(f"cfsp/evaluation/{name}.py" for name in ("language_model", "perplexity", "torch_model"))
_EXPORTING = (
    *(
        f"exporters/{name}.py"
        for name in ("chats", "checkpoint_reader", "job", "options", "parity", "provenance", "slices")
    ),
    *(
        "exporters/rounding",
        "cfsp/child_process.py",
        "cfsp/recovery/losses.py",
        "cfsp/evaluation/divergence.py",
    ),
    *(f"cfsp/pruning/{name}.py" for name in ("gradients", "reconstruction", "statistics", "streaming")),
    *_LOSSES,
)
_BENCH = (
    *(
        "measuring",
        "conditions",
        "engines",
        "targets",
        "native",
        "browser",
        "worker.py",
        "process.py",
        "workload.py",
    ),
    *("cgroup.py", "memory.py", "environment.py", "files.py"),
)
WRITERS_FAMILIES = ("gguf",)
"""Of the files through which a model writes the text `self`."""
STAGES: Mapping[str, Dependencies] = MappingProxyType(
    {
        "dense": Dependencies(
            ("torch", "transformers", "tokenizers", "gguf"),
            (
                "cfsp/models",
                "cfsp/text",
                "cfsp/reading.py",
                "cfsp/precision.py",
                "cfsp/devices.py",
                *("cfsp/processes.py", "cfsp/pruning/moments.py", "cfsp/pruning/streaming.py"),
            ),
        ),
        "text": Dependencies(rooms=("phoneready/text.py", *_EXPORTING), families=True),
        "prune": Dependencies(
            rooms=("cfsp/pruning", "exporters/gguf/architecture.py", "phoneready/release/pruning_budget.py")
        ),
        "target": Dependencies(rooms=("phoneready/sizes.py",)),
        "recover": Dependencies(("accelerate", "peft"), ("cfsp/recovery", *_LOSSES)),
        "through": Dependencies(rooms=_EXPORTING, families=True),
        "evaluate": Dependencies(rooms=_EVALUATION),
        "tasks": Dependencies(("lm_eval",)),
        "export": Dependencies(rooms=_EXPORTING, families=True),
        "answers": Dependencies(rooms=("cfsp/evaluation",), families=True),
        "side-by-side": Dependencies(rooms=_EVALUATION, families=True),
        "evaluate-files": Dependencies(rooms=_EVALUATION, families=True),
        "decide": Dependencies(
            rooms=(
                *("phoneready/figures", "runtime_bench/records"),
                *("phoneready/release/collect.py", "phoneready/release/decide.py"),
            )
        ),
        "bench": Dependencies(
            rooms=("cfsp/child_process.py", *(f"runtime_bench/{name}" for name in _BENCH)), families=True
        ),
    }
)
"""By what a stage does; `through` is what `recover` needs more where it trains through a rounding, `tasks` is what
`evaluate` and `evaluate-files` need more where there are some, and `text` is what writes the text `self`."""


def made_with(*kinds: str, families: Iterable[str] = ()) -> dict[str, Any]:
    """The part of a stage's settings that says what it is made with.

    Args:
        kinds: Rows of STAGES.
        families: Families of the files that are exported.
    """
    rows = [STAGES[kind] for kind in kinds]
    packages = {package for row in rows for package in row.packages}
    rooms = {room for row in rows for room in row.rooms}
    for family in families if any(row.families for row in rows) else ():
        packages |= set(FAMILIES[family].packages)
        rooms.add(f"exporters/{family}")
    return {
        "packages": {package: installed_version(package) for package in sorted(packages)},
        "code": {room: code_sha256(room) for room in sorted(rooms)},
    }


def installed_version(distribution: str) -> str | None:
    """The version of a distribution; None where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def code_sha256(room: str) -> str:
    """The first digits of a hash of the files of a folder of this installation, or of one file, as they are now."""
    path, digest = _ROOT / room, hashlib.sha256()
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    for file in files:
        if file.is_file() and "__pycache__" not in file.parts:
            digest.update(f"{file.relative_to(_ROOT).as_posix()}\0".encode())
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]
