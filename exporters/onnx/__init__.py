"""Checkpoints to ONNX folders for ONNX Runtime and what is built on it.

What is heavy is imported on first use: it brings torch, which must not count in the memory of a process that only runs
a file (see runtime_bench.worker), and the `onnx` extra, without which it raises MissingExtraError.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from cfsp.errors import MissingExtraError
from exporters.onnx.variants import VARIANTS, BlockFormat, Variant, find_variant

if TYPE_CHECKING:
    from exporters.onnx.export import export_onnx
    from exporters.onnx.quantize import OnnxRounding

__all__ = [
    "VARIANTS",
    "BlockFormat",
    "OnnxRounding",
    "Variant",
    "export_onnx",
    "find_variant",
]

_HEAVY = {"export_onnx": "export", "OnnxRounding": "quantize"}
_PACKAGES = {"onnx": "onnx", "onnx_ir": "onnx-ir"}


def __getattr__(name: str) -> Any:
    if name not in _HEAVY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"{__name__}.{_HEAVY[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name not in _PACKAGES:
            raise
        raise MissingExtraError(_PACKAGES[error.name], "onnx") from None
