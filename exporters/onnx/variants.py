"""The variants of an ONNX export: which numbers, what file name, which limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from cfsp.errors import look_up
from exporters.export_record import ExportFormat, ParityLimits


class BlockFormat(NamedTuple):
    """How a matrix of few bits is stored."""

    bits: int  # 4 or 8
    block_size: int  # inputs that share a scale; a power of two, 16 or more

    @property
    def half(self) -> int:
        """The q that means zero."""
        return 1 << (self.bits - 1)


INT4, INT4_B128, INT8 = BlockFormat(4, 32), BlockFormat(4, 128), BlockFormat(8, 32)
HEAD = "lm_head"
"""Name of the output matrix, also where it is the embedding's."""


@dataclass(frozen=True)
class Variant(ExportFormat):
    """One way to store the weights; any FFN width is stored as asked, as rows are padded to whole blocks."""

    suffix: str  # of the file name; transformers.js finds the known ones by its `dtype`
    dtype: str = "float32"  # torch's name of what is computed: float32 or float16
    form: BlockFormat | None = None  # of most Linears, and of a tied embedding; None stores floats
    int8_rows: bool = False  # stored and multiplied as int8 with a scale for each row and each token
    portable: bool = False  # in standard operators only, as optimum exports it
    mixed: bool = False  # as many get eight bits as fit a size, not as few as cost little time

    @property
    def bits(self) -> float:
        """With a scale of 16 bits for each block."""
        if self.form is not None:
            return self.form.bits + 16 / self.form.block_size
        return 8.0 if self.int8_rows else float(self.dtype.removeprefix("float"))

    @property
    def is_sized(self) -> bool:
        return not (self.portable or self.mixed)

    @property
    def needs_text(self) -> bool:
        """Whether it is rounded by GPTQ."""
        return self.form is not None and self.form.bits < INT8.bits

    @property
    def reads(self) -> frozenset[str]:
        own = {"calibration": self.needs_text, "mixed_bytes": self.mixed}
        return frozenset({"opset", *(field for field, read in own.items() if read)})

    @property
    def stem(self) -> str:
        """File name without its extension."""
        return f"model{self.suffix}"


_ROWS = (
    Variant("fp32", ParityLimits(max_logit_diff=2e-3), ""),
    Variant("fp16", ParityLimits(kl_mean=2e-3, same_top1=0.97, ppl_ratio=1.01), "_fp16", "float16"),
    Variant("int8", ParityLimits(kl_mean=0.05, same_top1=0.85, ppl_ratio=1.05), "_quantized", form=INT8),
    Variant("int4", ParityLimits(kl_mean=0.4, same_top1=0.6, ppl_ratio=1.5), "_q4", form=INT4),
    Variant(
        "int4-mixed",
        ParityLimits(kl_mean=0.4, same_top1=0.6, ppl_ratio=1.5),
        "_q4_mixed",
        form=INT4,
        mixed=True,
    ),
    Variant("int4-b128", ParityLimits(kl_mean=0.5, same_top1=0.5, ppl_ratio=1.8), "_q4_b128", form=INT4_B128),
    Variant(
        "int8-dynamic", ParityLimits(kl_mean=0.15, same_top1=0.75, ppl_ratio=1.15), "_int8", int8_rows=True
    ),
    Variant("portable", ParityLimits(max_logit_diff=2e-3), "", portable=True),
)
VARIANTS: Mapping[str, Variant] = MappingProxyType({row.name: row for row in _ROWS})


def find_variant(name: str) -> Variant:
    """Row of the table, in whatever case the name is written; InputError for another one names them all."""
    return look_up(VARIANTS, name.lower(), "unknown ONNX variant", field="onnx")
