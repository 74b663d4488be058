"""How an engine computed a row: its own settings, as it says them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

FLOAT_CACHES = frozenset({"f32", "f16", "bf16"})
"""Types of a key-value cache that lose nothing to speak of, and are a graph's own or an engine's default."""

PROCESSOR = frozenset({"CPU", "wasm"})
"""What `backends` says of an engine that computes on the processor alone."""


def fell_back(asked: str | None, backends: str | None) -> str | None:
    """What was asked to compute and did not; None where it did, or where nothing was asked for."""
    return asked if asked not in (None, "cpu") and backends in PROCESSOR else None


_REARRANGED = frozenset({"CPU_REPACK", "CPU_KLEIDIAI", "AMX"})
"""llama.cpp's buffers of weights that were rearranged."""


@dataclass(frozen=True)
class EngineSettings:
    """An engine's own settings; what it does not say is None."""

    cache_type: str | None = None  # Type of keys and values, as llama.cpp names types
    flash_attention: bool | None = None  # Whether attention ran in a flash kernel
    # Bytes of the weights by the buffer that holds them, as llama.cpp names it; empty where nothing is said.
    # `CPU_Mapped` are the file's pages; `CPU_REPACK` and `AMX` are copies, rearranged for the processor.
    weight_buffers: Mapping[str, int] = field(default_factory=dict)
    cores: tuple[int, ...] = ()  # Cores that the process might use
    # Nodes of the graph by the execution provider of ONNX Runtime that runs them; empty where it is not said
    providers: Mapping[str, int] = field(default_factory=dict)
    asked_backend: str | None = None  # What was to compute, where something was asked for

    @property
    def rearranged_bytes(self) -> int:
        """Of the weights that llama.cpp copied into an order for the processor."""
        return sum(size for name, size in self.weight_buffers.items() if name in _REARRANGED)

    @property
    def quantized_cache(self) -> str | None:
        """The cache's type where it has few bits, which somebody asked for; None for floats."""
        return None if self.cache_type in FLOAT_CACHES else self.cache_type
