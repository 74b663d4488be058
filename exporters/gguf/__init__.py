"""Checkpoints to GGUF files for llama.cpp."""

from __future__ import annotations

from exporters.gguf.export import export_gguf
from exporters.gguf.quants import QUANTS, ParityLimits, Quant, find_quant, required_multiple

__all__ = ["QUANTS", "ParityLimits", "Quant", "export_gguf", "find_quant", "required_multiple"]
