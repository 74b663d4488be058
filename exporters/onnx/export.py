"""Export a checkpoint to ONNX folders: build, save, reopen, prove; the folder appears only when all of it holds."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from cfsp.checkpoint import load_pruned
from cfsp.errors import InputError, LimitError
from cfsp.files import atomic_directory, refuse_existing, remove_stale_temporaries, sha256_file
from cfsp.model_reference import load_tokenizer
from cfsp.progress import Progress, no_progress
from cfsp.records import write_record
from exporters.checkpoint_reader import ModelConfig, read_config
from exporters.onnx.checks import check_graph
from exporters.onnx.companions import write_companions
from exporters.onnx.decoder_graph import Decoder, build_decoder
from exporters.onnx.folder import GRAPHS
from exporters.onnx.int8_rows import int8_weights
from exporters.onnx.ort_format import write_ort
from exporters.onnx.portable import portable_graph, require_optimum
from exporters.onnx.quantize import quantize_linears, quantized_embedding, quantized_layers
from exporters.onnx.runtime import (
    CACHE_KEY,
    FIXED_CACHE,
    PREFILL_TOKENS,
    OnnxModel,
    open_model,
    runtime_version,
)
from exporters.onnx.variants import VARIANTS, Variant, find_variant
from exporters.onnx.weights import decoder_of, float_weights
from exporters.parity import Reference, check_limits, choose_windows, compare, reference_of
from exporters.provenance import Provenance, read_provenance
from exporters.record import ExportManifest, ExportRecord, ParityLimits

__all__ = ["MANIFEST_FILE", "export_onnx"]

MANIFEST_FILE = "export.json"
_EXTERNAL_BYTES = 1024
_SAME_LOGITS = 1e-2
"""Most that the two graphs of a variant may differ; their output matrix multiplies batches of other sizes."""


@dataclass(frozen=True)
class _Job:
    """What all variants of one export share."""

    checkpoint: Path
    folder: Path
    config: ModelConfig
    provenance: Provenance
    tokenizer: Any
    reference: Reference
    calibration: torch.Tensor | None
    limits: Mapping[str, ParityLimits]
    ort: bool
    n_threads: int
    progress: Progress


def export_onnx(
    checkpoint: Path,
    output: Path,
    variants: Sequence[str],
    *,
    calibration: torch.Tensor | None = None,
    name: str | None = None,
    parity_windows: torch.Tensor | None = None,
    limits: Mapping[str, ParityLimits] | None = None,
    ort: bool = False,
    n_threads: int | None = None,
    force: bool = False,
    progress: Progress = no_progress,
) -> tuple[ExportRecord, ...]:
    """Write output/<variant>/ for every variant, and output/export.json (an ExportManifest).

    The float32 variant is written and proven before all that are built like it, and kept only where it is asked for.

    Args:
        checkpoint: Hugging Face folder, pruned or dense.
        output: Folder to create.
        variants: Names from VARIANTS, in any case.
        calibration: Token ids (nsamples, seqlen) that 4-bit variants are rounded for; nearest numbers without them.
        name: Of the graphs; the source model's name by default.
        parity_windows: Token ids (n_windows, seqlen); by default windows of built-in English prose.
        limits: Bounds by variant name, in place of the table's.
        ort: Also write output/<variant>/ort/<stem>.ort, one file for minimal builds of ONNX Runtime.
        n_threads: Threads of the parity run; torch's number by default.
        force: Replace an existing output folder.
        progress: Told about every step.

    Returns:
        One record a variant, in the order asked.

    Raises:
        InputError: Unknown variant, unusable checkpoint, a model that the graph cannot compute, existing output.
        LimitError: A variant is too far from the checkpoint; the message has metric, value and limit. Nothing is left.
        MissingExtraError: ONNX Runtime is not installed, or optimum's exporter for a portable variant.
    """
    rows = list(dict.fromkeys(find_variant(variant) for variant in variants))
    if not rows:
        raise InputError("no variant asked for", field="onnx", allowed=", ".join(VARIANTS))
    refuse_existing(output, force=force)
    runtime_version()
    if any(row.portable for row in rows):
        require_optimum()
    if not (checkpoint / "config.json").is_file():
        raise InputError(f"{checkpoint} is not a checkpoint folder (it has no config.json)")
    config = read_config(checkpoint)
    tokenizer = load_tokenizer(checkpoint.resolve())  # a bare name could be a built-in alias
    windows, text = choose_windows(tokenizer, config.context_length, parity_windows)
    reference = reference_of(_load(checkpoint), windows, text=text, progress=progress)
    remove_stale_temporaries(output.parent, output.name)
    with atomic_directory(output, force=force) as folder:
        job = _Job(
            checkpoint=checkpoint,
            folder=folder,
            config=config,
            provenance=read_provenance(checkpoint, name),
            tokenizer=tokenizer,
            reference=reference,
            calibration=calibration,
            limits=limits or {},
            ort=ort,
            n_threads=n_threads or torch.get_num_threads(),
            progress=progress,
        )
        records = _export_all(job, rows)
        write_record(folder / MANIFEST_FILE, ExportManifest(records))
    return records


def _export_all(job: _Job, rows: Sequence[Variant]) -> tuple[ExportRecord, ...]:
    """The float32 graph comes first: that the graph computes the checkpoint shows on it alone."""
    base, done = VARIANTS["fp32"], {}
    if not all(row.portable for row in rows):
        done[base.name] = _export(job, base)
        if base not in rows:
            shutil.rmtree(job.folder / base.name)
    done |= {row.name: _export(job, row) for row in rows if row.name not in done}
    return tuple(done[row.name] for row in rows)


def _export(job: _Job, variant: Variant) -> ExportRecord:
    folder = job.folder / variant.name
    (folder / GRAPHS).mkdir(parents=True)
    model = _load(job.checkpoint)
    n_params = sum(parameter.numel() for parameter in model.parameters())
    path = (_save_portable if variant.portable else _save)(job, model, folder / GRAPHS, variant)
    context_length = job.config.context_length
    write_companions(job.checkpoint, folder, variant, model, job.tokenizer, context_length=context_length)
    job.progress(f"writing {variant.name}", 1, 1)
    del model
    last = _last(path) if _last(path).exists() else None
    ort = write_ort(last or path, folder / "ort") if job.ort else None
    record = _prove(job, variant, path, [other for other in (last, ort) if other], n_params)
    return record if ort is None else replace(record, ort_file=str(ort.relative_to(job.folder)))


def _decoder(job: _Job, model: Any, variant: Variant) -> Decoder:
    dtype: torch.dtype = getattr(torch, variant.dtype)
    if variant.int8_rows:
        layer, embedding = int8_weights()
    elif variant.format_of is None or variant.embedding is None:
        layer, embedding = float_weights(dtype)
    else:
        text = job.calibration if variant.calibrated else None
        rounded = quantize_linears(model, variant.format_of, text, progress=job.progress)
        layer = quantized_layers(rounded, variant.embedding)
        embedding = quantized_embedding(variant.embedding)
    return decoder_of(
        model, make_layer=layer, make_embedding=embedding, pack_qkv=variant.pack_qkv, dtype=dtype
    )


def _save(job: _Job, model: Any, folder: Path, variant: Variant) -> Path:
    """Two graphs over one file of weights; returns the one with all logits."""
    decoder = _decoder(job, model, variant)
    job.progress(f"writing {variant.name}", 0, 1)
    name = _graph_name(job, variant)
    every = build_decoder(decoder, name=name, metadata={CACHE_KEY: FIXED_CACHE})
    path = _write(job, every, folder, variant)
    stored = {k: v.const_value for k, v in every.graph.initializers.items() if v.const_value is not None}
    metadata = every.metadata_props
    last = build_decoder(decoder, name=name, metadata=metadata, last_logits=True, stored=stored)
    ir.save(last, _last(path))
    return path


def _save_portable(job: _Job, model: Any, folder: Path, variant: Variant) -> Path:
    """One graph: who takes standard operators alone wants what optimum's users expect."""
    job.progress(f"writing {variant.name}", 0, 1)
    return _write(job, portable_graph(model, name=_graph_name(job, variant)), folder, variant)


def _write(job: _Job, graph: ir.Model, folder: Path, variant: Variant) -> Path:
    """The graph, which is told its origin, and its weights beside it."""
    path = folder / f"{variant.stem}.onnx"
    data = path.with_name(f"{path.name}_data")
    ir.external_data.unload_from_model(graph, folder, data.name, size_threshold_bytes=_EXTERNAL_BYTES)
    graph.metadata_props.update(_origin(job) | {"phoneready.data_sha256": sha256_file(data)})
    ir.save(graph, path)
    return path


def _graph_name(job: _Job, variant: Variant) -> str:
    return f"{job.provenance.name}-{variant.name}"


def _last(path: Path) -> Path:
    """The graph beside it that gives the last position's logits."""
    return path.with_name(f"{path.stem}_last.onnx")


def _origin(job: _Job) -> dict[str, str]:
    """What a graph says about where it comes from."""
    origin = job.provenance
    known = {
        "phoneready.source_model": origin.source_model,
        "phoneready.source_sha256": origin.source_sha256,
        "phoneready.checkpoint_sha256": origin.checkpoint_sha256,
        "phoneready.plan_sha256": origin.plan_sha256,
        "phoneready.license": origin.license,
    }
    return {key: value for key, value in known.items() if value}


def _prove(job: _Job, variant: Variant, path: Path, others: Sequence[Path], n_params: int) -> ExportRecord:
    """Reopen the graph, compare it with the checkpoint, others of its weights with it, and describe it.

    Raises:
        LimitError: They are too far from the checkpoint, or not shaped as its plan says.
    """
    for graph in (path, *others):
        if graph.suffix == ".onnx":
            check_graph(graph, job.config)
    limits = job.limits.get(variant.name, variant.limits).as_dict()
    with _opened(job, path) as model:
        parity = compare(
            job.reference,
            model.iter_logits,
            limits,
            progress=lambda _, done, total: job.progress(f"parity {variant.name}", done, total),
        )
        window = job.reference.windows[0, :PREFILL_TOKENS].numpy()
        every = next(iter(model.iter_logits(window)))[-1].copy()
    for other in others:
        with _opened(job, other) as model:
            difference = float(np.abs(model.decode(window)[-1] - every).max())
        if not difference <= _SAME_LOGITS:
            raise LimitError(f"{other.name} differs from {path.name} by {difference:.4g} in a logit")
    check_limits(parity, f"{variant.name} ({path.name})")
    files = [path, path.with_name(f"{path.name}_data")]
    unguided = variant.calibrated and job.calibration is None
    origin = job.provenance
    return ExportRecord(
        file=str(path.relative_to(job.folder)),
        format="onnx",
        quant=variant.name,
        architecture=job.config.model_type,
        file_bytes=sum(file.stat().st_size for file in files),
        sha256=sha256_file(path),
        n_params=n_params,
        tensor_types=_tensor_types(path),
        fallbacks=(),
        imatrix_tensors=0,
        widths=job.config.widths,
        padded_width=None,
        context_length=job.config.context_length,
        tokenizer_strings=0,
        source_model=origin.source_model,
        source_sha256=origin.source_sha256,
        checkpoint_sha256=origin.checkpoint_sha256,
        plan_sha256=origin.plan_sha256,
        seed=origin.seed,
        parity=parity,
        warnings=(f"{variant.name} is rounded to the nearest numbers, without text",) if unguided else (),
        runtime=runtime_version(),
    )


@contextmanager
def _opened(job: _Job, path: Path) -> Iterator[OnnxModel]:
    n_ctx = job.reference.windows.shape[1]
    model = open_model(path, n_ctx=n_ctx, n_threads=job.n_threads, n_batch=PREFILL_TOKENS)
    try:
        yield model
    finally:
        model.close()


def _tensor_types(path: Path) -> dict[str, int]:
    """Stored type -> number of weights' tensors; scales, rotary tables, single numbers and sizes are left out."""
    counts: Counter[str] = Counter()
    for name, value in ir.load(path).graph.initializers.items():
        tensor = value.const_value
        if tensor is None or value.dtype == ir.DataType.INT64 or tensor.size == 1:
            continue
        if name.endswith((".scale", "_cache")):
            continue
        packed = tensor.dtype == ir.DataType.UINT8
        counts[f"int{name.rpartition('.q')[2]}" if packed else tensor.dtype.name.lower()] += 1
    return dict(counts)


def _load(checkpoint: Path) -> Any:
    return load_pruned(checkpoint, dtype=torch.float32)
