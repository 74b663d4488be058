"""Where a graph with an 8-bit cache lies that `exporters.onnx.int8_cache` made of another one."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from cfsp.errors import InputError
from cfsp.models.builtin import cache_directory

INT8_CACHE = "int8"
"""Keys and values in 8 bits."""
GRAPH = "model.onnx"
MAKING = 1
"""Of what `exporters.onnx.int8_cache` makes: counted up when it makes another graph of the same file."""


def ready_graph(path: Path) -> Path:
    """The graph of a file with an 8-bit cache, as `make_ready` left it.

    Raises:
        InputError: There is none.
    """
    graph = place_of(path) / GRAPH
    if not graph.is_file():
        raise InputError(f"no graph with an 8-bit cache was made of {path} on this machine")
    return graph


def place_of(path: Path) -> Path:
    """Its folder, known by names, sizes and times of the files that lie together: a hash would read all weights."""
    files = sorted(file for file in path.resolve().parent.iterdir() if file.is_file())
    facts = [
        MAKING,
        path.name,
        *((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files),
    ]
    return cache_directory() / "int8-cache" / hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
