"""GGUF files for a search: written and quantized as an export writes them, but not proven."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cfsp.models.reference import load_tokenizer
from exporters.gguf.imatrix import read_imatrix
from exporters.gguf.quantize import quantize_file
from exporters.gguf.quants import find_quant
from exporters.gguf.writer import write_gguf
from exporters.provenance import read_provenance


def draft_gguf(
    checkpoint: Path,
    folder: Path,
    quants: Sequence[str],
    *,
    name: str | None = None,
    use_imatrix: bool = True,
    n_threads: int = 1,
) -> dict[str, Path]:
    """Write folder/<name>-<quant>.gguf for every quantization, the same bytes as `export_gguf` writes.

    Nothing is run against the checkpoint: a search looks at many such files, and what it chooses is exported properly.

    Args:
        checkpoint: Checkpoint folder.
        folder: Where to write; the caller's to make and to clear.
        quants: Names from QUANTS.
        name: As for `export_gguf`.
        use_imatrix: As for `export_gguf`.
        n_threads: Threads of the quantizer.

    Returns:
        Name of the quantization -> file.

    Raises:
        InputError: Unknown quant, unusable checkpoint, or llama.cpp cannot represent or quantize it.
        MissingExtraError: llama-cpp-python is not installed.
    """
    rows = list(dict.fromkeys(find_quant(quant) for quant in quants))
    provenance = read_provenance(checkpoint, name)
    tokenizer = load_tokenizer(checkpoint.resolve())  # a bare name could be a built-in alias
    imatrix = read_imatrix(checkpoint) if use_imatrix and any(row.uses_imatrix for row in rows) else {}
    paths = {row.name: folder / f"{provenance.name}-{row.name}.gguf" for row in rows}
    base = folder / f"{provenance.name}-f32.gguf"
    quantized = [row for row in rows if row.base_type not in ("F32", "F16")]
    if quantized or base in paths.values():
        write_gguf(checkpoint, base, tokenizer, provenance)
    for row in rows:
        if row.base_type == "F16":
            write_gguf(checkpoint, paths[row.name], tokenizer, provenance, quant=row.name)
    for row in quantized:
        used = imatrix if row.uses_imatrix else {}
        quantize_file(base, paths[row.name], row, imatrix=used, n_threads=n_threads)
    if base not in paths.values():
        base.unlink(missing_ok=True)
    return paths
