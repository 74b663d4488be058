"""A checkpoint in all the formats that are asked for, in one folder that appears when all of them are proven."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from cfsp.errors import InputError
from cfsp.files import atomic_directory, refuse_existing
from cfsp.models.reference import load_model
from cfsp.progress import Progress, no_progress
from cfsp.pruning.prune import spread_windows
from cfsp.text.calibration import load_calibration
from cfsp.text.settings import SELF
from exporters.gguf import export_gguf, find_quant
from exporters.onnx import find_variant
from exporters.record import ExportRecord
from exporters.settings import ExportSettings

NO_TEXT = "none"


def export_checkpoint(
    checkpoint: Path,
    output: Path,
    request: ExportSettings,
    *,
    n_threads: int | None = None,
    force: bool = False,
    progress: Progress = no_progress,
) -> tuple[ExportRecord, ...]:
    """Export; of both kinds each has a folder of its own in `output`, and one kind is `output` itself.

    Raises:
        InputError: As `export_gguf` and `export_onnx`, or calibration text that cannot be read.
        LimitError: Something is too far from the checkpoint. Nothing is left.
    """

    refuse_existing(output, force=force, inputs=[checkpoint, *map(Path, request.calibration)])
    _check(request)
    text = _calibration(checkpoint, request, progress)

    def gguf(folder: Path, *, force: bool) -> tuple[ExportRecord, ...]:
        return export_gguf(
            checkpoint,
            folder,
            request.quants,
            name=request.name,
            use_imatrix=request.imatrix,
            n_threads=n_threads,
            force=force,
            progress=progress,
        )

    def onnx(folder: Path, *, force: bool) -> tuple[ExportRecord, ...]:
        from exporters.onnx import export_onnx

        return export_onnx(
            checkpoint,
            folder,
            request.onnx,
            calibration=text,
            mixed_bytes=request.mixed_bytes,
            name=request.name,
            ort=request.ort,
            opset=request.opset,
            n_threads=n_threads,
            force=force,
            progress=progress,
        )

    kinds: dict[str, Callable[..., tuple[ExportRecord, ...]]] = {}
    kinds |= {"gguf": gguf} if request.quants or not request.onnx else {}
    kinds |= {"onnx": onnx} if request.onnx else {}
    if len(kinds) == 1:
        return next(iter(kinds.values()))(output, force=force)
    with atomic_directory(output, force=force) as folder:
        return tuple(
            _within(kind, record)
            for kind, export in kinds.items()
            for record in export(folder / kind, force=False)
        )


def _within(folder: str, record: ExportRecord) -> ExportRecord:
    """The record as it is from the folder above."""
    ort_file = f"{folder}/{record.ort_file}" if record.ort_file else None
    return replace(record, file=f"{folder}/{record.file}", ort_file=ort_file)


def require_onnx_export() -> None:
    """Raise MissingExtraError where ONNX folders cannot be made."""
    import exporters.onnx
    from exporters.onnx.runtime import require_onnxruntime

    require_onnxruntime()
    _ = exporters.onnx.export_onnx


def _check(request: ExportSettings) -> None:
    """Refuse what cannot be made before anything is."""
    for quant in request.quants:
        find_quant(quant)
    variants = [find_variant(variant) for variant in request.onnx]
    if variants:
        require_onnx_export()
    if request.calibration and not any(variant.calibrated for variant in variants):
        raise InputError("calibration text is for 4-bit ONNX variants alone", field="calibration")
    if request.opset is not None and not variants:
        raise InputError("only ONNX variants have an opset", field="opset", allowed="--onnx VARIANT,...")
    if request.ort and not variants:
        raise InputError("only ONNX variants can be .ort files", field="ort", allowed="--onnx VARIANT,...")
    mixed = [variant.name for variant in variants if variant.mixed]
    if request.mixed_bytes is not None and not mixed:
        raise InputError(
            "a size is for mixtures of bits alone", field="mixed-size", allowed="--onnx int4-mixed"
        )
    if mixed and NO_TEXT in request.calibration:
        raise InputError(f"{mixed[0]} wants text to choose layers by", field="calibration", value=NO_TEXT)
    if NO_TEXT in request.calibration and len(request.calibration) > 1:
        raise InputError("`none` stands alone", field="calibration", value=request.calibration)


def _calibration(checkpoint: Path, request: ExportSettings, progress: Progress) -> torch.Tensor | None:
    """Windows to round 4-bit weights for, where a variant wants them."""
    wanted = any(find_variant(variant).calibrated for variant in request.onnx)
    if not wanted or NO_TEXT in request.calibration:
        return None
    # A bare name could be a built-in alias.
    loaded = load_model(request.dense or checkpoint.resolve(), progress=progress)
    ids = load_calibration(
        request.calibration or (SELF,),
        loaded,
        nsamples=request.nsamples,
        seqlen=request.seqlen,
        seed=request.seed,
        progress=progress,
    ).input_ids
    return ids if request.windows is None else spread_windows(ids, request.windows)
