"""Checkpoints to ONNX folders for ONNX Runtime and what is built on it.

`export_onnx` is imported on first use: it brings torch, which must not count in the memory of a process that only runs
a file, and the `onnx` extra.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cfsp.errors import require_extra
from exporters.onnx.variants import VARIANTS, BlockFormat, Variant, find_variant

if TYPE_CHECKING:
    from exporters.onnx.export import export_onnx

__all__ = ["VARIANTS", "BlockFormat", "Variant", "export_onnx", "find_variant"]


def __getattr__(name: str) -> Any:
    if name != "export_onnx":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for package, distribution in (("onnx", "onnx"), ("onnx_ir", "onnx-ir")):
        require_extra(package, "onnx", distribution)
    from exporters.onnx.export import export_onnx

    return export_onnx
