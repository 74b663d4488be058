"""Checkpoints to GGUF files for llama.cpp.

What brings torch is imported on first use: it must not count in the memory of a process that only runs a file (see
runtime_bench.worker).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from exporters.export_record import ParityLimits
from exporters.gguf.quants import MIXED, QUANTS, Quant, find_quant

if TYPE_CHECKING:
    from exporters.gguf.export import export_gguf
    from exporters.gguf.files import GGUFRounding, draft_gguf

__all__ = [
    "MIXED",
    "QUANTS",
    "GGUFRounding",
    "ParityLimits",
    "Quant",
    "draft_gguf",
    "export_gguf",
    "find_quant",
]

_HEAVY = {"export_gguf": "export", "draft_gguf": "files", "GGUFRounding": "files"}


def __getattr__(name: str) -> Any:
    if name not in _HEAVY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HEAVY[name]}"), name)
