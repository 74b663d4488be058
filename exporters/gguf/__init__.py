"""Checkpoints to GGUF files for llama.cpp.

`export_gguf` is imported on first use: it brings torch, which must not count in the memory of a process that only
runs a file (see runtime_bench.worker).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from exporters.export_record import ParityLimits
from exporters.gguf.quants import QUANTS, Quant, find_quant

if TYPE_CHECKING:
    from exporters.gguf.export import export_gguf

__all__ = ["QUANTS", "ParityLimits", "Quant", "export_gguf", "find_quant"]


def __getattr__(name: str) -> Any:
    if name == "export_gguf":
        from exporters.gguf.export import export_gguf

        return export_gguf
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
