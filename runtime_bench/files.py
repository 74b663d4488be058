"""The files that a model consists of: the one that is named, and weights that lie beside it."""

from __future__ import annotations

from pathlib import Path

_SUFFIXES = ("_data", ".data")
_LAST = "_last.onnx"


def files_of(path: Path) -> list[Path]:
    """A model file and, for ONNX, its external data: `model.onnx` with `model.onnx_data` or `model.onnx.data`.

    `model_last.onnx` shares the data of `model.onnx`.
    """
    if path.suffix != ".onnx":
        return [path]
    owner = path.name.removesuffix(_LAST) + ".onnx" if path.name.endswith(_LAST) else path.name
    beside = (path.with_name(owner + suffix) for suffix in _SUFFIXES)
    return [path, *(file for file in beside if file.is_file())]


def size_of(path: Path) -> int:
    """Bytes of all files of a model."""
    return sum(file.stat().st_size for file in files_of(path))
