"""The quantizations that GGUF files are written in: one row each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from cfsp.errors import InputError
from exporters.export_record import ExportFormat, ParityLimits


@dataclass(frozen=True)
class Quant(ExportFormat):
    """One way to store the weights; its name is llama-quantize's, in lower case for the two unquantized ones.

    Attributes:
        base_type: ggml type of most matrices.
        uses_imatrix: Whether an importance matrix is used by default.
    """

    base_type: str
    uses_imatrix: bool = False

    @property
    def ftype(self) -> int:
        """llama.cpp's `llama_ftype`, also written as general.file_type."""
        import gguf  # not in the memory of a process that runs a file alone

        prefix = "ALL" if self.base_type == "F32" else "MOSTLY"
        return int(gguf.LlamaFileType[f"{prefix}_{self.name.upper()}"])

    @property
    def width_multiple(self) -> int:
        """See ExportFormat: of down_proj, whose rows they are."""
        import gguf

        return int(gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[self.base_type]][0])

    @property
    def reads(self) -> frozenset[str]:
        """See ExportFormat."""
        return frozenset({"use_imatrix"} if self.uses_imatrix else ())


_ROWS = (
    Quant("f32", ParityLimits(max_logit_diff=1e-3), "F32"),
    Quant("f16", ParityLimits(kl_mean=1e-3, same_top1=0.97, ppl_ratio=1.01), "F16"),
    Quant("Q8_0", ParityLimits(kl_mean=0.05, same_top1=0.85, ppl_ratio=1.1), "Q8_0"),
    Quant("Q5_K_M", ParityLimits(kl_mean=0.2, same_top1=0.70, ppl_ratio=1.3), "Q5_K", uses_imatrix=True),
    Quant("Q4_K_M", ParityLimits(kl_mean=0.4, same_top1=0.60, ppl_ratio=1.5), "Q4_K", uses_imatrix=True),
    Quant("Q4_0", ParityLimits(kl_mean=0.6, same_top1=0.50, ppl_ratio=1.8), "Q4_0", uses_imatrix=True),
    Quant("IQ4_NL", ParityLimits(kl_mean=0.6, same_top1=0.50, ppl_ratio=1.8), "IQ4_NL", uses_imatrix=True),
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
