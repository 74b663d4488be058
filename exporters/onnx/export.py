"""Export a checkpoint to ONNX folders: build, save, reopen, prove; the folder appears only when all of it holds."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cfsp.errors import InputError
from cfsp.memory import require_memory
from cfsp.models.shape import ModelShape
from exporters.checkpoint_reader import read_config
from exporters.export_record import ExportRecord
from exporters.job import check_input, load_checkpoint, open_job, settled, write_manifest
from exporters.onnx.companions import write_companions
from exporters.onnx.folder import GRAPHS
from exporters.onnx.job import OnnxJob
from exporters.onnx.operators import OPSETS
from exporters.onnx.portable import check_portable
from exporters.onnx.proof import prove
from exporters.onnx.runtime import runtime_version
from exporters.onnx.slices import prove_blocks
from exporters.onnx.variants import VARIANTS, Variant, find_variant
from exporters.onnx.weights import check_blocks
from exporters.onnx.writer import write_graphs
from exporters.options import DEFAULT_OPTIONS, ExportOptions

_BYTES_OF_A_WEIGHT = 1.5
"""That are in memory for all layers at once, where few bits are written: one each, and how it is stored."""


def export_onnx(
    checkpoint: Path,
    output: Path,
    variants: Sequence[str],
    settings: ExportOptions = DEFAULT_OPTIONS,
) -> tuple[ExportRecord, ...]:
    """Write output/<variant>/ for every variant, and output/export.json (an ExportManifest).

    The float32 variant is written and proven before all that are built like it, and kept only where it is asked for.
    Where all are of few bits, a model that would take much of the memory is read block by block, and the proof is one
    of every block as float32 (`exporters.onnx.slices`).

    Args:
        checkpoint: Hugging Face folder, pruned or dense.
        output: Folder to create.
        variants: Names from VARIANTS, in any case.
        settings: How.

    Returns:
        One record a variant, in the order asked.

    Raises:
        InputError: Unknown variant, unusable checkpoint, a model that the graph cannot compute, existing output,
            a mixture without text or with too few bytes, an operator that the opset lacks.
        LimitError: A variant is too far from the checkpoint; the message has metric, value and limit. Nothing is left.
        MissingExtraError: ONNX Runtime is not installed, or optimum's exporter for a portable variant.
    """
    rows = list(dict.fromkeys(find_variant(variant) for variant in variants))
    if not rows:
        raise InputError("no variant asked for", field="onnx", allowed=", ".join(VARIANTS))
    check_input(checkpoint, output, force=settings.force)
    config = read_config(checkpoint)
    check_blocks(config.spec)
    _check_tools(rows, settings.opset, config.shape)
    if all(row.form for row in rows):
        settings = settled(checkpoint, settings)
    model = load_checkpoint(checkpoint, by_blocks=settings.by_blocks)
    if settings.by_blocks:
        n_bytes = int(_BYTES_OF_A_WEIGHT * sum(parameter.numel() for parameter in model.parameters()))
        require_memory(n_bytes, "the numbers of all layers", "a GGUF file, or a machine with more memory")
    with open_job(checkpoint, output, model, settings, config.steady_context) as common:
        job = OnnxJob(common, model)
        # That the graph computes the checkpoint shows on the float32 one alone, or on its blocks.
        blocks = prove_blocks(job) if settings.by_blocks else None
        first = () if blocks or all(row.portable for row in rows) else (VARIANTS["fp32"],)
        records, due = {}, list(dict.fromkeys((*first, *rows)))
        for row in due:
            records[row] = replace(_export(job, row), blocks=blocks)
            if row not in rows:
                shutil.rmtree(common.folder / row.name)
        return write_manifest(common, [records[row] for row in rows])


def _check_tools(rows: Sequence[Variant], opset: int | None, shape: ModelShape) -> None:
    """Raise MissingExtraError or InputError where what is installed cannot write or run the variants of a model."""
    runtime_version()
    if opset is not None and opset not in OPSETS:
        known = f"{OPSETS.start} to {OPSETS.stop - 1}"
        raise InputError("out of range", field="opset", value=opset, allowed=known)
    if any(row.portable for row in rows):
        check_portable(shape)


def _export(job: OnnxJob, variant: Variant) -> ExportRecord:
    """Write and prove a variant."""
    common = job.common
    folder = common.folder / variant.name
    (folder / GRAPHS).mkdir(parents=True)
    written = write_graphs(job, variant, folder / GRAPHS)
    chats = write_companions(job, variant, folder)
    common.progress(f"writing {variant.name}", 1, 1)
    return prove(job, variant, written, chats)
