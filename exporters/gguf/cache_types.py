"""Types of llama.cpp's key-value cache, and what a number takes in each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

FLASH_AUTO, FLASH_OFF, FLASH_ON = -1, 0, 1
"""llama.cpp's `llama_flash_attn_type`."""


@dataclass(frozen=True)
class CacheType:
    """A type of keys and values alike.

    Attributes:
        ggml_type: ggml's number of it.
        block_numbers: Numbers that are stored together, all of one token and one head.
        block_bytes: What they take.
        flash_attention: What is asked of llama.cpp: off for float32, as the flash kernel rounds to float16 inside
            whatever the cache's type (6e-3 in the logits of a tiny model); on where values are quantized, as llama.cpp
            reads them only in that kernel; its own choice for float16.
    """

    ggml_type: int
    block_numbers: int
    block_bytes: int
    flash_attention: int

    def size(self, n_numbers: int) -> int:
        """Bytes of so many numbers, whole blocks."""
        return -(-n_numbers // self.block_numbers) * self.block_bytes


PARITY_CACHE, DEFAULT_CACHE = "f32", "f16"
"""What proofs and judgements run with, so that the file is judged and not the cache; and what measurements do."""
CACHE_TYPES: Mapping[str, CacheType] = MappingProxyType(
    {
        PARITY_CACHE: CacheType(0, 1, 4, FLASH_OFF),
        DEFAULT_CACHE: CacheType(1, 1, 2, FLASH_AUTO),
        "q8_0": CacheType(8, 32, 34, FLASH_ON),
        "q4_0": CacheType(2, 32, 18, FLASH_ON),
    }
)
"""llama.cpp's name of a type -> the type."""
MEASURED_CACHES = tuple(name for name in CACHE_TYPES if name != PARITY_CACHE)
"""What phones are used with."""
