"""What a GGUF file, and llama.cpp's key-value cache, can be stored in: one row each.

Neither torch nor gguf-py is imported here: they do not belong in the memory of a process that only runs a file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from cfsp.errors import InputError
from cfsp.units import parse_bytes
from exporters.export_record import ExportFormat, ParityLimits


def block_of(kind: str) -> tuple[int, int]:
    """Elements and bytes of a block of a ggml type."""
    import gguf

    elements, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return int(elements), int(size)


@dataclass(frozen=True)
class Quant(ExportFormat):
    """A quantization, called as llama-quantize calls it; the unquantized ones in lower case."""

    base_type: str  # ggml type of most matrices
    uses_imatrix: bool = True
    needs_imatrix: bool = False  # llama.cpp refuses to write it without one
    budget_bytes: int | None = None  # most that the file may take, if types are chosen for it

    @property
    def ftype(self) -> int:
        """llama.cpp's `llama_ftype`, also written as general.file_type; a mixture has none, and says Q4_K_M."""
        import gguf

        prefix = "ALL" if self.base_type == "F32" else "MOSTLY"
        name = self.name if self.is_sized else "Q4_K_M"
        return int(gguf.LlamaFileType[f"{prefix}_{name.upper()}"])

    @property
    def is_plain(self) -> bool:
        """Not quantized: others are made from it."""
        return self.base_type in ("F32", "F16", "BF16")

    @property
    def bits(self) -> float:
        elements, size = block_of(self.base_type)
        return 8 * size / elements

    @property
    def is_sized(self) -> bool:
        return self.budget_bytes is None

    @property
    def width_multiple(self) -> int:
        return block_of(self.base_type)[0]

    @property
    def needs_text(self) -> bool:
        return not self.is_sized

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({"use_imatrix", "calibration", "gptq", "tune_scales"} if self.uses_imatrix else ())


_ROWS = (
    Quant("f32", ParityLimits(max_logit_diff=1e-3), "F32", uses_imatrix=False),
    Quant("f16", ParityLimits(kl_mean=1e-3, same_top1=0.97, ppl_ratio=1.01), "F16", uses_imatrix=False),
    Quant("bf16", ParityLimits(kl_mean=1e-2, same_top1=0.9, ppl_ratio=1.02), "BF16", uses_imatrix=False),
    Quant("Q8_0", ParityLimits(kl_mean=0.05, same_top1=0.85, ppl_ratio=1.1), "Q8_0", uses_imatrix=False),
    Quant("Q6_K", ParityLimits(kl_mean=0.1, same_top1=0.80, ppl_ratio=1.15), "Q6_K"),
    Quant("Q5_K_M", ParityLimits(kl_mean=0.2, same_top1=0.70, ppl_ratio=1.3), "Q5_K"),
    Quant("Q5_K_S", ParityLimits(kl_mean=0.2, same_top1=0.70, ppl_ratio=1.3), "Q5_K"),
    Quant("Q4_K_M", ParityLimits(kl_mean=0.4, same_top1=0.60, ppl_ratio=1.5), "Q4_K"),
    Quant("Q4_K_S", ParityLimits(kl_mean=0.4, same_top1=0.60, ppl_ratio=1.5), "Q4_K"),
    Quant("Q4_0", ParityLimits(kl_mean=0.6, same_top1=0.50, ppl_ratio=1.8), "Q4_0"),
    Quant("IQ4_NL", ParityLimits(kl_mean=0.6, same_top1=0.50, ppl_ratio=1.8), "IQ4_NL"),
    Quant("IQ4_XS", ParityLimits(kl_mean=0.6, same_top1=0.50, ppl_ratio=1.8), "IQ4_XS"),
    Quant("Q3_K_M", ParityLimits(kl_mean=0.8, same_top1=0.45, ppl_ratio=2.0), "Q3_K"),
    Quant("Q3_K_S", ParityLimits(kl_mean=1.0, same_top1=0.40, ppl_ratio=2.5), "Q3_K"),
    Quant("IQ3_S", ParityLimits(kl_mean=1.0, same_top1=0.40, ppl_ratio=2.5), "IQ3_S"),
    Quant("IQ3_XXS", ParityLimits(kl_mean=1.4, same_top1=0.35, ppl_ratio=3.5), "IQ3_XXS", needs_imatrix=True),
    Quant("Q2_K", ParityLimits(kl_mean=1.4, same_top1=0.35, ppl_ratio=3.5), "Q2_K"),
    Quant("IQ2_M", ParityLimits(kl_mean=1.8, same_top1=0.30, ppl_ratio=4.5), "IQ2_S", needs_imatrix=True),
)
QUANTS: Mapping[str, Quant] = MappingProxyType({row.name: row for row in _ROWS})
MIXED = "mixed:SIZE"
QUANT_NAMES = ", ".join((*QUANTS, MIXED))
_UNITS = MappingProxyType(
    {"GB": 10**9, "GiB": 2**30, "MB": 10**6, "MiB": 2**20, "kB": 10**3, "KiB": 2**10, "B": 1}
)


def find_quant(name: str) -> Quant:
    """Row of a name in any case; `mixed:80MB` gets a row called mixed-80MB. InputError names the known ones."""
    for row in QUANTS.values():
        if row.name.lower() == name.lower():
            return row
    match = re.fullmatch(r"mixed[:-](.+)", name, re.IGNORECASE)
    if match and (size := parse_bytes(match[1], "mixed")):
        unit, factor = next((unit, factor) for unit, factor in _UNITS.items() if size % factor == 0)
        return Quant(f"mixed-{size // factor}{unit}", ParityLimits(), "Q4_K", budget_bytes=size)
    raise InputError("unknown quantization", field="quant", value=name, allowed=QUANT_NAMES)


def limits_of_bits(bits: float) -> ParityLimits:
    """Limits of a mixture: those of the quantization that has as many bits a weight, or else fewer."""
    rows = sorted((row for row in QUANTS.values() if row.uses_imatrix), key=lambda row: row.bits)
    least = max((row.bits for row in rows if row.bits <= bits), default=rows[0].bits)
    return max((row.limits for row in rows if row.bits == least), key=lambda limits: limits.kl_mean or 0.0)


FLASH_AUTO, FLASH_OFF, FLASH_ON = -1, 0, 1
"""llama.cpp's `llama_flash_attn_type`."""


class CacheType(NamedTuple):
    """A type of keys and values alike.

    Flash attention is off for float32, which its kernel rounds to float16, and on for quantized values, which need it.
    """

    ggml_type: int
    block_numbers: int  # stored together, all of one token and one head
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
MEASURED_CACHES = tuple(name for name in CACHE_TYPES if name != PARITY_CACHE)
"""What phones are used with."""
