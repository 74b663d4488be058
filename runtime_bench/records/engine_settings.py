"""How an engine computed a row: its own settings, as it says them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

FLOAT_CACHES = frozenset({"f32", "f16", "bf16"})
"""Types of a key-value cache that lose nothing to speak of, and are a graph's own or an engine's default."""


@dataclass(frozen=True)
class EngineSettings:
    """An engine's own settings; what it does not say is None.

    Attributes:
        cache_type: Type of keys and values, as llama.cpp names types.
        flash_attention: Whether attention ran in a flash kernel.
        weight_buffers: Bytes of the weights by the buffer that holds them, as llama.cpp names it; empty where nothing
            is said. `CPU_Mapped` are the file's pages; `CPU_REPACK` and `AMX` are copies, rearranged for the processor.
        cores: Cores that the process might use.
    """

    cache_type: str | None = None
    flash_attention: bool | None = None
    weight_buffers: Mapping[str, int] = field(default_factory=dict)
    cores: tuple[int, ...] = ()

    @property
    def quantized_cache(self) -> str | None:
        """The cache's type where it has few bits, which somebody asked for; None for floats."""
        return None if self.cache_type in FLOAT_CACHES else self.cache_type
