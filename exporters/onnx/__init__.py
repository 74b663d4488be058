"""Checkpoints to ONNX folders for ONNX Runtime and what is built on it.

`export_onnx` is imported on first use: it brings torch, which must not count in the memory of a process that only
runs a file (see runtime_bench.worker), and the `onnx` extra, without which it raises MissingExtraError.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cfsp.errors import MissingExtraError
from exporters.onnx.variants import VARIANTS, BlockFormat, Variant, find_variant

if TYPE_CHECKING:
    from exporters.onnx.export import export_onnx

__all__ = ["VARIANTS", "BlockFormat", "Variant", "export_onnx", "find_variant"]

_PACKAGES = {"onnx": "onnx", "onnx_ir": "onnx-ir"}


def __getattr__(name: str) -> Any:
    if name != "export_onnx":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from exporters.onnx.export import export_onnx
    except ModuleNotFoundError as error:
        if error.name not in _PACKAGES:
            raise
        raise MissingExtraError(_PACKAGES[error.name], "onnx") from None
    return export_onnx
