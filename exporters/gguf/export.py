"""Export a checkpoint to GGUF: write, quantize, reopen, prove; the folder appears only when all of it holds."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cfsp.errors import InputError, LimitError
from cfsp.models.gguf_file import GGUFTensor, read_gguf
from cfsp.text.conversations import Conversation
from cfsp.text.tokens import tokens_sha256
from exporters.chats import ReadChats, read_chats
from exporters.export_record import BlockProof, ExportRecord, TensorFallback
from exporters.gguf import llama_library, runtime
from exporters.gguf.architecture import ChosenLayout, read_layout
from exporters.gguf.fallbacks import find_fallbacks
from exporters.gguf.files import WrittenFile, find_rows, imatrix_for, measured, write_files
from exporters.gguf.imatrix import stored_moments
from exporters.gguf.llama_library import rounded
from exporters.gguf.mixed import GUIDED_TYPES
from exporters.gguf.quants import QUANT_NAMES, Quant, limits_of_bits
from exporters.gguf.slices import prove_blocks
from exporters.gguf.tokenizer_metadata import check_tokenizer, normalizes_to_nfc
from exporters.job import (
    UNTRAINED,
    Job,
    check_input,
    load_checkpoint,
    open_job,
    settled,
    write_manifest,
)
from exporters.matrices import check_matrix
from exporters.options import DEFAULT_OPTIONS, ExportOptions
from exporters.parity import check_limits

_log = logging.getLogger(__name__)

_TRAINED = "its numbers are those that training through this rounding has left, whatever the calibration text"
"""A warning."""


def export_gguf(
    checkpoint: Path,
    output: Path,
    quants: Sequence[str],
    settings: ExportOptions = DEFAULT_OPTIONS,
) -> tuple[ExportRecord, ...]:
    """Write output/<name>-<quant>.gguf for every quant, and output/export.json (an ExportManifest).

    The float32 file is always written and proven first, as everything is quantized from it; it is kept only where it
    is asked for. Of a model that is read block by block it is one in the model's own 16 bits, and the proof is one of
    every block as float32 (`exporters.gguf.slices`).

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
    rows = find_rows(checkpoint, quants, settings)
    if not rows:
        raise InputError("no quantization asked for", field="quants", allowed=QUANT_NAMES)
    check_input(checkpoint, output, force=settings.force)
    settings = settled(checkpoint, settings)
    llama_library.runtime_version()
    chosen = read_layout(checkpoint)  # what llama.cpp cannot represent is refused before the model is run
    imatrix = imatrix_for(checkpoint, rows, settings)
    # What stays in its files takes no memory while others are written; a model in memory is let go.
    paged = load_checkpoint(checkpoint, by_blocks=True) if settings.by_blocks else None
    with open_job(
        checkpoint,
        output,
        load_checkpoint(checkpoint) if paged is None else paged,
        settings,
        chosen.context_length,
    ) as job:
        strings, records, chats, blocks, base = 0, {}, ReadChats(), None, None
        for file in write_files(
            checkpoint,
            job.folder,
            rows,
            job.tokenizer,
            job.provenance,
            imatrix=imatrix,
            judge=lambda quant, path: measured(quant, path, job.reference, job.n_threads, settings),
            n_threads=job.n_threads,
            settings=settings,
        ):
            if base is None:
                base = file.path
                strings = check_tokenizer(file.path, job.tokenizer)
                chats = _read_chats(job, file.path)
                blocks = None if paged is None else _prove_blocks(job, paged, chosen)
            else:
                check_numbers(base, file)
            if file.quant in rows or not settings.by_blocks:
                records[file.quant] = replace(_prove(job, file, chosen, strings, chats), blocks=blocks)
        return write_manifest(job, [records[row] for row in rows])


def _prove_blocks(job: Job, model: Any, chosen: ChosenLayout) -> BlockProof:
    return prove_blocks(
        job.checkpoint,
        model,
        chosen,
        job.reference.windows,
        job.folder,
        n_threads=job.n_threads,
        progress=job.progress,
    )


def _read_chats(job: Job, path: Path) -> ReadChats:
    """What llama.cpp makes of chats that are rendered by the template."""
    with runtime.open_model(path, vocab_only=True) as model:

        def read(_: Conversation, text: str) -> list[int]:
            return model.tokenize(text)

        return read_chats("llama.cpp", job.tokenizer, job.stops, read, model.is_end_of_generation)


def _prove(job: Job, file: WrittenFile, chosen: ChosenLayout, strings: int, chats: ReadChats) -> ExportRecord:
    """Reopen a file, compare it with the checkpoint, and describe it.

    Raises:
        LimitError: It is too far from the checkpoint.
    """
    path, quant = file.path, file.quant
    tensors = read_gguf(path).tensors
    row = _with_limits(file, chosen, tensors)
    if file.choice is None:
        parity = measured(row, path, job.reference, job.n_threads, job.settings)
    else:
        parity = file.choice.held_to(job.settings.limits_of(row))
    check_limits(parity, path.name)
    fallbacks = find_fallbacks(tensors, quant) if file.mixture is None else ()
    warnings = (*_warnings(job, file, chosen, fallbacks), *chats.warnings)
    for warning in warnings:
        _log.warning("%s: %s", path.name, warning)
    return job.record(
        path,
        quant,
        file.choice,
        format="gguf",
        parity=parity,
        file_bytes=path.stat().st_size,
        architecture=chosen.layout.architecture,
        n_params=sum(math.prod(tensor.shape) for tensor in tensors),
        tensor_types=dict(Counter(sorted(tensor.kind.name for tensor in tensors)).most_common()),
        fallbacks=fallbacks,
        imatrix_tensors=len(file.imatrix),
        trained_tensors=file.trained_tensors,
        padded_width=chosen.padded_width,
        tokenizer_strings=strings,
        chats=chats.equal,
        warnings=warnings,
        runtime=llama_library.runtime_version(),
        **_choice(job, file),
    )


def check_numbers(base: Path, file: WrittenFile) -> None:
    """Hold every tensor of a file against the one that it was quantized from.

    Raises:
        LimitError: One is missing, or is not the other's (`exporters.matrices`).
    """
    exact = {tensor.name: tensor for tensor in read_gguf(base).tensors}
    stored = {tensor.name: tensor for tensor in read_gguf(file.path).tensors}
    if exact.keys() != stored.keys():
        names = ", ".join(sorted(exact.keys() ^ stored.keys()))
        raise LimitError(f"{file.path.name} has not the tensors of {base.name}: {names}")
    for name, tensor in stored.items():
        kind, from_ = tensor.kind.name, exact[name]
        if kind == from_.kind.name:
            # Training of scales changes norms.
            if not (file.tuned_tensors and len(tensor.shape) == 1) and not np.array_equal(
                tensor.data, from_.data
            ):
                raise LimitError(f"{name} in {file.path.name} is not that of {base.name}")
            continue
        importance = file.imatrix.get(name)
        if importance is None and kind in GUIDED_TYPES:
            importance = np.ones(tensor.shape[-1], np.float32)
        check_matrix(
            f"{name} in {file.path.name}",
            tensor.shape[0],
            from_.rows,
            tensor.rows,
            partial(rounded, kind=kind, importance=importance),
            file.slopes.get(name),
        )
        tensor.let_go()
        from_.let_go()


def _with_limits(file: WrittenFile, chosen: ChosenLayout, tensors: Sequence[GGUFTensor]) -> Quant:
    """The file's row with the limits that it is held to: what computes it, or the bits of a mixture, may set them."""
    quant = file.quant
    if quant.base_type == "F32" and chosen.exact_limits is not None:
        return replace(quant, limits=chosen.exact_limits)
    if file.mixture is None:
        return quant
    matrices = [tensor for tensor in tensors if tensor.name in file.mixture.types]
    n_weights = sum(math.prod(tensor.shape) for tensor in matrices)
    return replace(quant, limits=limits_of_bits(8 * sum(int(t.data.nbytes) for t in matrices) / n_weights))


def _choice(job: Job, file: WrittenFile) -> dict[str, Any]:
    """What the record says of types that were chosen for a size, and of the text that a file was made for."""
    return _mixture(file) | _text(job, file)


def _mixture(file: WrittenFile) -> dict[str, Any]:
    if file.mixture is None:
        return {}
    return {
        "budget_bytes": file.quant.budget_bytes,
        "chosen_types": file.mixture.types,
        "predicted_loss": file.mixture.loss,
    }


def _text(job: Job, file: WrittenFile) -> dict[str, Any]:
    ids = job.settings.calibration
    by_text = file.gptq_tensors or file.tuned_tensors or (file.mixture and not file.trained_tensors)
    is_measured = file.imatrix and not stored_moments(job.checkpoint)
    if ids is None or not (by_text or is_measured):
        return {}
    return {
        "calibration_sha256": tokens_sha256(ids),
        "calibration_tokens": ids.numel(),
        "gptq_tensors": file.gptq_tensors,
        "tuned_tensors": file.tuned_tensors,
    }


def _warnings(
    job: Job, file: WrittenFile, chosen: ChosenLayout, fallbacks: Sequence[TensorFallback]
) -> Iterator[str]:
    config = chosen.config
    if chosen.padded_width is not None:
        yield (
            f"llama.cpp has no architecture for this {config.model_type} model with a width for each block: every "
            f"FFN is padded with zeros to {chosen.padded_width} channels, which is exact but saves nothing; "
            "prune to a uniform width"
        )
    if chosen.context_length < config.max_position_embeddings:
        yield (
            "llama.cpp has no sliding window for this model: context_length is cut to the window, "
            f"{chosen.context_length}"
        )
    yield from job.unproven_window()
    if file.untrained:
        yield UNTRAINED
    if file.trained_tensors and job.settings.calibration is not None:
        yield _TRAINED
    for fallback in fallbacks:
        yield (
            f"stored as {fallback.actual} instead of {fallback.asked}, for rows of {fallback.row_length}: "
            f"{fallback.tensors[0]}{f' and {more} more' if (more := len(fallback.tensors) - 1) else ''}"
        )
    if normalizes_to_nfc(job.tokenizer):
        yield "the tokenizer composes characters (NFC) and llama.cpp does not: give it composed text"
    if file.mixture and file.quant.budget_bytes and file.mixture.file_bytes > file.quant.budget_bytes:
        yield f"the smallest types take {file.mixture.file_bytes} bytes, not {file.quant.budget_bytes}"
    yield from file.choice.warnings() if file.choice else ()
    if file.quant.uses_imatrix and not file.imatrix:
        yield f"{file.quant.name} is quantized without an importance matrix"
