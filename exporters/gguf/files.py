"""A checkpoint in several quantizations: the float32 file, and what is made of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfsp.models.reference import load_tokenizer
from cfsp.progress import Progress, no_progress
from exporters.gguf.imatrix import Imatrix, read_imatrix
from exporters.gguf.llama_library import quantize
from exporters.gguf.quants import QUANTS, Quant, find_quant
from exporters.gguf.writer import write_gguf
from exporters.options import DEFAULT_OPTIONS, ExportOptions
from exporters.provenance import Provenance, read_provenance

BASE = QUANTS["f32"]


@dataclass(frozen=True)
class WrittenFile:
    """A file that is not proven yet.

    Attributes:
        path: Where it is.
        quant: What it is.
        imatrix_tensors: Tensors that were quantized with the importance matrix.
    """

    path: Path
    quant: Quant
    imatrix_tensors: int


def write_files(
    checkpoint: Path,
    folder: Path,
    quants: Sequence[Quant],
    tokenizer: Any,
    provenance: Provenance,
    *,
    imatrix: Imatrix,
    n_threads: int,
    progress: Progress = no_progress,
) -> Iterator[WrittenFile]:
    """Write folder/<name>-<quant>.gguf: the float32 one, of which others are quantized, then each that is asked for.

    The float32 file is deleted at the end where it is not asked for.

    Args:
        checkpoint: Hugging Face folder.
        folder: Where to write.
        quants: What to write.
        tokenizer: The checkpoint's PreTrainedTokenizerFast.
        provenance: The checkpoint's.
        imatrix: By `read_imatrix`.
        n_threads: Threads of the quantizer.
        progress: Told about every step.

    Raises:
        InputError: The checkpoint is unusable, or llama.cpp cannot represent or quantize it.
    """
    paths = {quant: folder / f"{provenance.name}-{quant.name}.gguf" for quant in (BASE, *quants)}
    for quant, path in paths.items():
        used = imatrix if quant.uses_imatrix else {}
        if quant.base_type in ("F32", "F16"):
            write_gguf(checkpoint, path, tokenizer, provenance, quant=quant.name, progress=progress)
        else:
            progress(f"quantizing {quant.name}", 0, 1)
            quantize(paths[BASE], path, quant.ftype, n_threads=n_threads, imatrix=used)
            progress(f"quantizing {quant.name}", 1, 1)
        yield WrittenFile(path, quant, len(used))
    if BASE not in quants:
        paths[BASE].unlink()


def draft_gguf(
    checkpoint: Path, folder: Path, quants: Sequence[str], settings: ExportOptions = DEFAULT_OPTIONS
) -> dict[str, Path]:
    """Write files for a search: the bytes that `export_gguf` writes, but not proven.

    A search looks at many such files, and what it chooses is exported properly.

    Args:
        checkpoint: Checkpoint folder.
        folder: Where to write; the caller's to make and to clear.
        quants: Names from QUANTS.
        settings: As for `export_gguf`; one thread unless it says more.

    Returns:
        Name of the quantization -> file.

    Raises:
        InputError: Unknown quant, unusable checkpoint, or llama.cpp cannot represent or quantize it.
        MissingExtraError: llama-cpp-python is not installed.
    """
    rows = [find_quant(quant) for quant in quants]
    written = write_files(
        checkpoint,
        folder,
        rows,
        load_tokenizer(checkpoint.resolve()),  # a bare name could be a built-in alias
        read_provenance(checkpoint, settings.name),
        imatrix=read_imatrix(checkpoint, rows, use=settings.use_imatrix),
        n_threads=settings.n_threads or 1,
    )
    return {file.quant.name: file.path for file in written if file.quant in rows}
