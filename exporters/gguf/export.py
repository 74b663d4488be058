"""Export a checkpoint to GGUF: write, quantize, reopen, prove; the folder appears only when all of it holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from cfsp.progress import Progress, no_progress
from exporters.gguf.quants import ParityLimits
from exporters.record import ExportRecord

__all__ = ["export_gguf"]


def export_gguf(
    checkpoint: Path,
    output: Path,
    quants: Sequence[str],
    *,
    name: str | None = None,
    use_imatrix: bool = True,
    parity_windows: torch.Tensor | None = None,
    limits: Mapping[str, ParityLimits] | None = None,
    n_threads: int | None = None,
    force: bool = False,
    progress: Progress = no_progress,
) -> tuple[ExportRecord, ...]:
    """Write output/<name>-<quant>.gguf for every quant, and output/export.json (an ExportManifest).

    Args:
        checkpoint: Hugging Face folder, pruned or dense.
        output: Folder to create.
        quants: Names from QUANTS, in any case.
        name: Stem of the file names and general.name; the source model's name by default.
        use_imatrix: Quantize the 4-bit and 5-bit types with the checkpoint's input moments, where it has them.
        parity_windows: Token ids (n_windows, seqlen); by default windows of built-in English prose.
        limits: Bounds by quant name, in place of the table's.
        n_threads: Threads of the quantizer and of the parity run; torch's number by default.
        force: Replace an existing output folder.
        progress: Told about every step.

    Returns:
        One record a quant, in the order asked.

    Raises:
        InputError: Unknown quant, unusable checkpoint, a model that llama.cpp cannot represent, existing output.
        LimitError: A file is too far from the checkpoint; the message has metric, value and limit. Nothing is left.
        MissingExtraError: llama-cpp-python is not installed.
    """
    raise NotImplementedError
