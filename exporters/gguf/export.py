"""Export a checkpoint to GGUF: write, quantize, reopen, prove; the folder appears only when all of it holds."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cfsp.checkpoint import load_pruned
from cfsp.errors import InputError
from cfsp.files import atomic_directory, refuse_existing, remove_stale_temporaries, sha256_file
from cfsp.model_reference import load_tokenizer
from cfsp.progress import Progress, no_progress
from cfsp.records import write_record
from exporters.checkpoint_reader import CheckpointTensors, read_config
from exporters.gguf import runtime
from exporters.gguf.architecture import choose_layout
from exporters.gguf.imatrix import read_imatrix
from exporters.gguf.quantize import TypesReport, quantize_file, report_types
from exporters.gguf.quants import QUANTS, ParityLimits, Quant, find_quant
from exporters.gguf.tokenizer_metadata import check_tokenizer, normalizes_to_nfc
from exporters.gguf.writer import WrittenFile, write_gguf
from exporters.parity import Reference, check_limits, choose_windows, compare, reference_of
from exporters.provenance import Provenance, read_provenance
from exporters.record import ExportManifest, ExportRecord, ParityReport

__all__ = ["MANIFEST_FILE", "export_gguf"]

_log = logging.getLogger(__name__)

MANIFEST_FILE = "export.json"
_LOGITS_CHUNK = 128


@dataclass(frozen=True)
class _Job:
    """What all files of one export share."""

    checkpoint: Path
    folder: Path
    provenance: Provenance
    tokenizer: Any
    reference: Reference
    imatrix: Mapping[str, npt.NDArray[np.float32]]
    limits: Mapping[str, ParityLimits]
    n_threads: int
    progress: Progress

    def path(self, quant: Quant) -> Path:
        return self.folder / f"{self.provenance.name}-{quant.name}.gguf"


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

    The float32 file is always written and proven first, as everything is quantized from it; it is kept only where it
    is asked for.

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
    rows = list(dict.fromkeys(find_quant(quant) for quant in quants))
    if not rows:
        raise InputError("no quantization asked for", field="quants", allowed=", ".join(QUANTS))
    refuse_existing(output, force=force)
    runtime.runtime_version()
    if not (checkpoint / "config.json").is_file():
        raise InputError(f"{checkpoint} is not a checkpoint folder (it has no config.json)")
    provenance = read_provenance(checkpoint, name)
    tokenizer = load_tokenizer(checkpoint.resolve())  # a bare name could be a built-in alias
    imatrix = read_imatrix(checkpoint) if use_imatrix and any(row.uses_imatrix for row in rows) else {}
    reference = _reference(checkpoint, tokenizer, parity_windows, progress)
    remove_stale_temporaries(output.parent, output.name)
    with atomic_directory(output, force=force) as folder:
        job = _Job(
            checkpoint=checkpoint,
            folder=folder,
            provenance=provenance,
            tokenizer=tokenizer,
            reference=reference,
            imatrix=imatrix,
            limits=limits or {},
            n_threads=n_threads or torch.get_num_threads(),
            progress=progress,
        )
        records = _export_all(job, rows)
        write_record(folder / MANIFEST_FILE, ExportManifest(records))
    return records


def _export_all(job: _Job, rows: Sequence[Quant]) -> tuple[ExportRecord, ...]:
    base = QUANTS["f32"]
    written = write_gguf(job.checkpoint, job.path(base), job.tokenizer, job.provenance, progress=job.progress)
    strings = check_tokenizer(written.path, job.tokenizer)
    done = {base.name: _prove(job, base, written, strings)}
    for row in rows:
        if row.name in done:
            continue
        if row.base_type == "F16":
            write_gguf(
                job.checkpoint,
                job.path(row),
                job.tokenizer,
                job.provenance,
                quant=row.name,
                progress=job.progress,
            )
        else:
            job.progress(f"quantizing {row.name}", 0, 1)
            imatrix = job.imatrix if row.uses_imatrix else {}
            quantize_file(written.path, job.path(row), row, imatrix=imatrix, n_threads=job.n_threads)
            job.progress(f"quantizing {row.name}", 1, 1)
        done[row.name] = _prove(job, row, written, strings)
    if base not in rows:
        written.path.unlink()
    return tuple(done[row.name] for row in rows)


def _prove(job: _Job, quant: Quant, written: WrittenFile, strings: int) -> ExportRecord:
    """Reopen a file, compare it with the checkpoint, and describe it.

    Raises:
        LimitError: It is too far from the checkpoint.
    """
    path = job.path(quant)
    limits = job.limits.get(quant.name, quant.limits).as_dict()
    parity = _run_parity(job, path, limits, f"parity {quant.name}")
    check_limits(parity, path.name)
    types = report_types(path, quant)
    used = len(job.imatrix) if quant.uses_imatrix else 0
    warnings = _warnings(
        quant,
        written,
        types,
        composes=normalizes_to_nfc(job.tokenizer),
        missing_imatrix=quant.uses_imatrix and not used,
    )
    for warning in warnings:
        _log.warning("%s: %s", path.name, warning)
    origin = job.provenance
    return ExportRecord(
        file=path.name,
        format="gguf",
        quant=quant.name,
        architecture=written.chosen.layout.architecture,
        file_bytes=path.stat().st_size,
        sha256=sha256_file(path),
        n_params=types.n_params,
        tensor_types=types.counts,
        fallbacks=types.fallbacks,
        imatrix_tensors=used,
        widths=written.config.widths,
        padded_width=written.chosen.padded_width,
        context_length=written.config.context_length,
        tokenizer_strings=strings,
        source_model=origin.source_model,
        source_sha256=origin.source_sha256,
        checkpoint_sha256=origin.checkpoint_sha256,
        plan_sha256=origin.plan_sha256,
        seed=origin.seed,
        parity=parity,
        warnings=warnings,
        runtime=runtime.runtime_version(),
    )


def _run_parity(job: _Job, path: Path, limits: Mapping[str, float], label: str) -> ParityReport:
    with runtime.open_model(
        path,
        n_ctx=job.reference.windows.shape[1],
        n_threads=job.n_threads,
        n_batch=_LOGITS_CHUNK,
        n_ubatch=_LOGITS_CHUNK,
        kv_f32=True,
    ) as model:
        return compare(
            job.reference,
            model.iter_logits,
            limits,
            progress=lambda _, done, total: job.progress(label, done, total),
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


def _reference(
    checkpoint: Path, tokenizer: Any, windows: torch.Tensor | None, progress: Progress
) -> Reference:
    config = read_config(checkpoint)
    with CheckpointTensors(checkpoint) as tensors:
        choose_layout(config, tensors.names())  # refuse early what cannot be exported
    windows, text = choose_windows(tokenizer, config.context_length, windows)
    return reference_of(load_pruned(checkpoint, dtype=torch.float32), windows, text=text, progress=progress)
