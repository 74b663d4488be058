"""Export a checkpoint to GGUF: write, quantize, reopen, prove; the folder appears only when all of it holds."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cfsp.errors import InputError
from exporters.checkpoint_reader import CheckpointTensors, read_config
from exporters.export_record import ExportRecord
from exporters.gguf import llama_library, runtime
from exporters.gguf.architecture import choose_layout
from exporters.gguf.imatrix import read_imatrix
from exporters.gguf.quantize import TypesReport, quantize_file, report_types
from exporters.gguf.quants import QUANTS, Quant, find_quant
from exporters.gguf.tokenizer_metadata import check_tokenizer, normalizes_to_nfc
from exporters.gguf.writer import WrittenFile, write_gguf
from exporters.job import (
    Job,
    check_input,
    load_checkpoint,
    open_job,
    write_manifest,
)
from exporters.options import DEFAULT_OPTIONS, ExportOptions
from exporters.parity import check_limits

_log = logging.getLogger(__name__)

Imatrix = Mapping[str, npt.NDArray[np.float32]]
"""Tensor name -> mean squared input per channel, (in_features,)."""
_LOGITS_CHUNK = 128


def export_gguf(
    checkpoint: Path,
    output: Path,
    quants: Sequence[str],
    settings: ExportOptions = DEFAULT_OPTIONS,
) -> tuple[ExportRecord, ...]:
    """Write output/<name>-<quant>.gguf for every quant, and output/export.json (an ExportManifest).

    The float32 file is always written and proven first, as everything is quantized from it; it is kept only where it
    is asked for.

    Args:
        checkpoint: Hugging Face folder, pruned or dense.
        output: Folder to create.
        quants: Names from QUANTS, in any case.
        settings: How.

    Returns:
        One record a quant, in the order asked.

    Raises:
        InputError: Unknown quant, unusable checkpoint, a model that llama.cpp cannot represent, existing output.
        LimitError: A file is too far from the checkpoint; the message has metric, value and limit. Nothing is left.
        MissingExtraError: llama-cpp-python is not installed.
    """
    rows = list(dict.fromkeys(find_quant(quant) for quant in quants))
    if not rows:
        raise InputError("no quantization asked for", field="quants", allowed=", ".join(QUANTS))
    check_input(checkpoint, output, force=settings.force)
    llama_library.runtime_version()
    _refuse_early(checkpoint)
    wanted = settings.use_imatrix and any(row.uses_imatrix for row in rows)
    imatrix = read_imatrix(checkpoint) if wanted else {}
    with open_job(checkpoint, output, load_checkpoint(checkpoint), settings) as job:
        records = _export_all(job, rows, imatrix)
        write_manifest(job, records)
    return records


def _export_all(job: Job, rows: Sequence[Quant], imatrix: Imatrix) -> tuple[ExportRecord, ...]:
    base = QUANTS["f32"]
    written = write_gguf(
        job.checkpoint, _path(job, base), job.tokenizer, job.provenance, progress=job.progress
    )
    strings = check_tokenizer(written.path, job.tokenizer)
    done = {base.name: _prove(job, base, written, strings, {})}
    for row in rows:
        if row.name in done:
            continue
        used = imatrix if row.uses_imatrix else {}
        if row.base_type == "F16":
            write_gguf(
                job.checkpoint,
                _path(job, row),
                job.tokenizer,
                job.provenance,
                quant=row.name,
                progress=job.progress,
            )
        else:
            job.progress(f"quantizing {row.name}", 0, 1)
            quantize_file(written.path, _path(job, row), row, imatrix=used, n_threads=job.n_threads)
            job.progress(f"quantizing {row.name}", 1, 1)
        done[row.name] = _prove(job, row, written, strings, used)
    if base not in rows:
        written.path.unlink()
    return tuple(done[row.name] for row in rows)


def _path(job: Job, quant: Quant) -> Path:
    return job.folder / f"{job.provenance.name}-{quant.name}.gguf"


def _prove(job: Job, quant: Quant, written: WrittenFile, strings: int, imatrix: Imatrix) -> ExportRecord:
    """Reopen a file, compare it with the checkpoint, and describe it.

    Raises:
        LimitError: It is too far from the checkpoint.
    """
    path = _path(job, quant)
    with runtime.open_model(
        path,
        n_ctx=job.reference.windows.shape[1],
        n_threads=job.n_threads,
        n_batch=_LOGITS_CHUNK,
        n_ubatch=_LOGITS_CHUNK,
        kv_f32=True,
    ) as model:
        parity = job.compare(quant, model.iter_logits)
    check_limits(parity, path.name)
    types = report_types(path, quant)
    warnings = _warnings(
        quant,
        written,
        types,
        composes=normalizes_to_nfc(job.tokenizer),
        missing_imatrix=quant.uses_imatrix and not imatrix,
    )
    for warning in warnings:
        _log.warning("%s: %s", path.name, warning)
    return job.record(
        path,
        quant,
        format="gguf",
        parity=parity,
        architecture=written.chosen.layout.architecture,
        n_params=types.n_params,
        tensor_types=types.counts,
        fallbacks=types.fallbacks,
        imatrix_tensors=len(imatrix),
        padded_width=written.chosen.padded_width,
        tokenizer_strings=strings,
        warnings=warnings,
        runtime=llama_library.runtime_version(),
    )


def _warnings(
    quant: Quant, written: WrittenFile, types: TypesReport, *, composes: bool, missing_imatrix: bool
) -> tuple[str, ...]:
    config, chosen, found = written.config, written.chosen, []
    if chosen.padded_width is not None:
        found.append(
            f"llama.cpp has no architecture for this {config.model_type} model with a width for each block: every "
            f"FFN is padded with zeros to {chosen.padded_width} channels, which is exact but saves nothing; "
            "prune to a uniform width"
        )
    if config.sliding_window and config.sliding_window < config.max_position_embeddings:
        found.append(
            "llama.cpp has no sliding window for this model: context_length is cut to the window, "
            f"{config.sliding_window}"
        )
    for fallback in types.fallbacks:
        found.append(
            f"{len(fallback.tensors)} tensors with rows of {fallback.row_length} are stored as {fallback.actual} "
            f"instead of {fallback.asked} (such as {fallback.tensors[0]})"
        )
    if composes:
        found.append("the tokenizer composes characters (NFC) and llama.cpp does not: give it composed text")
    if missing_imatrix:
        found.append(f"{quant.name} is quantized without an importance matrix")
    return tuple(found)


def _refuse_early(checkpoint: Path) -> None:
    """Raise InputError for what llama.cpp cannot represent, before the model is run."""
    config = read_config(checkpoint)
    with CheckpointTensors(checkpoint) as tensors:
        choose_layout(config, tensors.names())
