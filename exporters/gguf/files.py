"""A checkpoint in several quantizations: the float32 file, and what is made of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfsp.errors import InputError
from cfsp.models.reference import load_tokenizer
from exporters.gguf.imatrix import Imatrix, read_imatrix
from exporters.gguf.llama_library import quantize
from exporters.gguf.mixed import Mixture, TypeCosts, measure_types
from exporters.gguf.quants import QUANTS, Quant, find_quant
from exporters.gguf.rounding import round_for_text
from exporters.gguf.tuning import tune_file
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
        mixture: Where types were chosen for a size.
        gptq_tensors: Matrices whose numbers were chosen for a text.
        tuned_tensors: Tensors that training on it changed: matrices in their scales, and norms.
    """

    path: Path
    quant: Quant
    imatrix_tensors: int
    mixture: Mixture | None = None
    gptq_tensors: int = 0
    tuned_tensors: int = 0


def find_rows(quants: Sequence[str], settings: ExportOptions) -> list[Quant]:
    """Rows of what is asked for, each once.

    Raises:
        InputError: An unknown one; or types are to be chosen and there is no text to choose them by.
    """
    rows = list(dict.fromkeys(find_quant(quant) for quant in quants))
    for row in rows:
        if row.budget_bytes is not None and settings.calibration is None:
            raise InputError("wants text to choose types by", field="quant", value=row.name)
    return rows


def write_files(
    checkpoint: Path,
    folder: Path,
    quants: Sequence[Quant],
    tokenizer: Any,
    provenance: Provenance,
    *,
    imatrix: Imatrix,
    n_threads: int,
    settings: ExportOptions = DEFAULT_OPTIONS,
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
        settings: The text that types are chosen by and numbers for, whether the types must fit, and who is told about
            every step.

    Raises:
        InputError: The checkpoint is unusable, or llama.cpp cannot represent or quantize it; a size is too small; or
            what layers read of the text is not finite.
    """
    progress = settings.progress
    paths = {quant: folder / f"{provenance.name}-{quant.name}.gguf" for quant in (BASE, *quants)}
    costs: TypeCosts | None = None
    for quant, path in paths.items():
        used, mixture = imatrix if quant.uses_imatrix else {}, None
        if quant.budget_bytes is not None and settings.calibration is not None:
            if costs is None:
                guide = imatrix if settings.use_imatrix else None
                costs = measure_types(
                    checkpoint,
                    paths[BASE],
                    settings.calibration,
                    guide,
                    device=settings.device,
                    progress=progress,
                )
            used, mixture = costs.imatrix, costs.choose(quant.budget_bytes, must_fit=settings.must_fit)
        if quant.base_type in ("F32", "F16"):
            write_gguf(checkpoint, path, tokenizer, provenance, quant=quant.name, progress=progress)
        else:
            progress(f"quantizing {quant.name}", 0, 1)
            types = mixture.types if mixture else None
            quantize(paths[BASE], path, quant.ftype, n_threads=n_threads, imatrix=used, types=types)
            progress(f"quantizing {quant.name}", 1, 1)
        chosen, tuned = _fit_to_text(checkpoint, paths[BASE], path, quant, settings)
        yield WrittenFile(path, quant, len(used), mixture, chosen, tuned)
    if BASE not in quants:
        paths[BASE].unlink()


def _fit_to_text(
    checkpoint: Path, base: Path, path: Path, quant: Quant, settings: ExportOptions
) -> tuple[int, int]:
    """Choose a file's codes and train its scales, where that is asked for; how many tensors each was done for."""
    text, chosen, tuned = settings.calibration, 0, 0
    if text is not None and settings.gptq and "gptq" in quant.reads:
        chosen = round_for_text(
            checkpoint, base, path, text, device=settings.device, progress=settings.progress
        )
    if text is not None and settings.tune_scales and "tune_scales" in quant.reads:
        tuned = tune_file(checkpoint, path, text, device=settings.device, progress=settings.progress)
    return chosen, tuned


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
        Name of the quantization's row -> file.

    Raises:
        InputError: Unknown quant, one that wants text and gets none, unusable checkpoint, or llama.cpp cannot
            represent or quantize it.
        MissingExtraError: llama-cpp-python is not installed.
    """
    rows = find_rows(quants, settings)
    written = write_files(
        checkpoint,
        folder,
        rows,
        load_tokenizer(checkpoint.resolve()),  # a bare name could be a built-in alias
        read_provenance(checkpoint, settings.name),
        imatrix=read_imatrix(
            checkpoint, rows, settings.calibration, use=settings.use_imatrix, device=settings.device
        ),
        n_threads=settings.n_threads or 1,
        settings=settings,
    )
    return {file.quant.name: file.path for file in written if file.quant in rows}
