"""The quantizations that GGUF files are written in: one row each."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from cfsp.errors import InputError
from cfsp.units import parse_bytes
from exporters.export_record import ExportFormat, ParityLimits


@dataclass(frozen=True)
class Quant(ExportFormat):
    """One way to store the weights; its name is llama-quantize's, in lower case for the unquantized ones.

    Attributes:
        base_type: ggml type of most matrices.
        uses_imatrix: Whether an importance matrix is used by default.
        needs_imatrix: Whether llama.cpp refuses to write it without one.
        budget_bytes: Most that the file may take, if types are chosen tensor by tensor for it.
    """

    base_type: str
    uses_imatrix: bool = True
    needs_imatrix: bool = False
    budget_bytes: int | None = None

    @property
    def ftype(self) -> int:
        """llama.cpp's `llama_ftype`, also written as general.file_type; a mixture has none, and says Q4_K_M."""
        import gguf  # not in the memory of a process that only runs a file

        prefix = "ALL" if self.base_type == "F32" else "MOSTLY"
        name = self.name if self.budget_bytes is None else "Q4_K_M"
        return int(gguf.LlamaFileType[f"{prefix}_{name.upper()}"])

    @property
    def is_plain(self) -> bool:
        """Whether it is not quantized: a file of it is written, and others are made from it."""
        return self.base_type in ("F32", "F16", "BF16")

    @property
    def bits(self) -> float:
        """See ExportFormat."""
        import gguf

        elements, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[self.base_type]]
        return 8 * float(size) / float(elements)

    @property
    def is_sized(self) -> bool:
        """See ExportFormat."""
        return self.budget_bytes is None

    @property
    def width_multiple(self) -> int:
        """See ExportFormat: of down_proj, whose rows they are."""
        import gguf

        return int(gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[self.base_type]][0])

    @property
    def needs_text(self) -> bool:
        """See ExportFormat."""
        return not self.is_sized

    @property
    def reads(self) -> frozenset[str]:
        """See ExportFormat."""
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
_MIXED = re.compile(r"mixed[:-](.+)", re.IGNORECASE)
_UNITS = (
    ("GB", 10**9),
    ("GiB", 2**30),
    ("MB", 10**6),
    ("MiB", 2**20),
    ("kB", 10**3),
    ("KiB", 2**10),
    ("B", 1),
)
QUANT_NAMES = ", ".join((*QUANTS, MIXED))
"""What can be asked for, in words."""


def find_quant(name: str) -> Quant:
    """Row of the table, in whatever case the name is written; of `mixed:80MB` one of its own, called mixed-80MB.

    Raises:
        InputError: Unknown; the message names the known ones. Or the size is none.
    """
    for row in QUANTS.values():
        if row.name.lower() == name.lower():
            return row
    match = _MIXED.fullmatch(name)
    if match and (size := parse_bytes(match[1], "mixed")):
        unit, factor = next((unit, factor) for unit, factor in _UNITS if size % factor == 0)
        return Quant(f"mixed-{size // factor}{unit}", ParityLimits(), "Q4_K", budget_bytes=size)
    raise InputError("unknown quantization", field="quant", value=name, allowed=QUANT_NAMES)


def limits_of_bits(bits: float) -> ParityLimits:
    """Limits of a mixture: those of the quantization that has as many bits a weight, or else fewer."""
    rows = sorted((row for row in QUANTS.values() if row.uses_imatrix), key=lambda row: row.bits)
    least = max((row.bits for row in rows if row.bits <= bits), default=rows[0].bits)
    return max((row.limits for row in rows if row.bits == least), key=lambda limits: limits.kl_mean or 0.0)
