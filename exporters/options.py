"""How an export runs, once what was asked for is read: one type for every family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cfsp.progress import Progress, no_progress
from exporters.export_record import ExportFormat, ParityLimits

if TYPE_CHECKING:
    import torch  # not in the memory of a process that runs a file alone

    from cfsp.models.offload import Keeping


@dataclass(frozen=True)
class ExportOptions:
    """How to export, whatever the family; a format's row says which of the fields it reads beside the common ones.

    Attributes:
        name: Short name of the model for titles and file names; the source model's by default.
        use_imatrix: Quantize with the checkpoint's input moments, where a format wants them and there are some.
        calibration: Token ids (nsamples, seqlen) that weights of few bits are rounded for, nearest numbers without; or
            that types are chosen by.
        gptq: Round the matrices of GGUF files for that text; else llama.cpp's quantizer alone rounds them.
        tune_scales: Train the scales and norms of GGUF files on it, too.
        mixed_bytes: Most that a mixture of bits may take; by default 1.1 times what weights take in GGUF's Q4_0.
        must_fit: Refuse a GGUF file for a size that is too small; where not, the smallest is made.
        opset: Of ONNX's own operators, for runtimes that do not know new ones; 21 by default.
        parity_windows: Token ids (n_windows, seqlen); by default windows of built-in English prose.
        limits: Bounds by format's name, in place of the table's.
        device: Where numbers of few bits are chosen, as torch writes it; files are proven on the CPU, where they run.
        dtype: That weights are kept in while numbers are chosen, a name in `cfsp.precision.DTYPES`.
        by_blocks: Whether the model's weights stay in their files; decided by each export, once, as the dtype is.
        n_threads: Threads of quantizers and of the parity run; torch's number by default.
        warnings: What was asked for and has no effect, for the record.
        force: Replace an existing output folder.
        progress: Told about every step.
    """

    name: str | None = None
    use_imatrix: bool = True
    calibration: torch.Tensor | None = None
    gptq: bool = True
    tune_scales: bool = False
    mixed_bytes: int | None = None
    must_fit: bool = True
    opset: int | None = None
    parity_windows: torch.Tensor | None = None
    limits: Mapping[str, ParityLimits] | None = None
    device: str = "cpu"
    dtype: str = "auto"
    by_blocks: bool = False
    n_threads: int | None = None
    warnings: tuple[str, ...] = ()
    force: bool = False
    progress: Progress = no_progress

    def limits_of(self, row: ExportFormat) -> ParityLimits:
        """Bounds of a format's files."""
        return (self.limits or {}).get(row.name, row.limits)

    @property
    def keeping(self) -> Keeping:
        """How weights are kept."""
        from cfsp.models.offload import NARROW, WHOLE, Keeping

        return Keeping(NARROW.get(self.dtype, WHOLE.dtype), self.by_blocks)


DEFAULT_OPTIONS = ExportOptions()
