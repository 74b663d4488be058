"""The quantizations that GGUF files are written in: one row each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import gguf

from cfsp.errors import InputError
from exporters.record import ParityLimits


@dataclass(frozen=True)
class Quant:
    """One way to store the weights.

    Attributes:
        name: llama-quantize's name; in lower case for the two unquantized ones.
        base_type: ggml type of most matrices.
        width_multiple: FFN widths that are multiples of it keep down_proj in the type asked for.
        uses_imatrix: Whether an importance matrix is used by default.
        limits: Bounds of the parity check.
    """

    name: str
    base_type: str
    width_multiple: int
    uses_imatrix: bool
    limits: ParityLimits

    @property
    def ftype(self) -> int:
        """llama.cpp's `llama_ftype`, also written as general.file_type."""
        names = (f"MOSTLY_{self.name}".upper(), f"ALL_{self.name}".upper())
        return next(int(row) for row in gguf.LlamaFileType if row.name in names)


_ROWS = (
    Quant("f32", "F32", 1, False, ParityLimits(max_logit_diff=1e-3)),
    Quant("f16", "F16", 1, False, ParityLimits(kl_mean=1e-3, same_top1=0.97, ppl_ratio=1.01)),
    Quant("Q8_0", "Q8_0", 32, False, ParityLimits(kl_mean=0.05, same_top1=0.85, ppl_ratio=1.1)),
    Quant("Q5_K_M", "Q5_K", 256, True, ParityLimits(kl_mean=0.2, same_top1=0.70, ppl_ratio=1.3)),
    Quant("Q4_K_M", "Q4_K", 256, True, ParityLimits(kl_mean=0.4, same_top1=0.60, ppl_ratio=1.5)),
    Quant("Q4_0", "Q4_0", 32, True, ParityLimits(kl_mean=0.6, same_top1=0.50, ppl_ratio=1.8)),
    Quant("IQ4_NL", "IQ4_NL", 32, True, ParityLimits(kl_mean=0.6, same_top1=0.50, ppl_ratio=1.8)),
)
QUANTS: Mapping[str, Quant] = MappingProxyType({row.name: row for row in _ROWS})


def find_quant(name: str) -> Quant:
    """Row of the table, in whatever case the name is written.

    Raises:
        InputError: Unknown; the message names the known ones.
    """
    for row in QUANTS.values():
        if row.name.lower() == name.lower():
            return row
    raise InputError("unknown quantization", field="quant", value=name, allowed=", ".join(QUANTS))


def required_multiple(quants: Sequence[str]) -> int:
    """Smallest width unit with which no FFN matrix of these quantizations falls back to a larger type."""
    return math.lcm(*(find_quant(name).width_multiple for name in quants))
