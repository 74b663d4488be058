"""ONNX folders as a family of exports."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from exporters.export_record import ExportRecord
from exporters.family import ExportedModel, ExportFamily
from exporters.onnx.folder import find_graph, is_onnx
from exporters.onnx.variants import VARIANTS, find_variant
from exporters.options import ExportOptions


def _export(
    checkpoint: Path, output: Path, formats: Sequence[str], settings: ExportOptions, /
) -> tuple[ExportRecord, ...]:
    from exporters.onnx.export import export_onnx

    return export_onnx(checkpoint, output, formats, settings)


def _locate(folder: Path, stem: str, variant: str) -> ExportedModel:
    root = folder / variant
    return ExportedModel(f"{stem}-{variant}", root, find_graph(str(root), last_logits=True))


def _open(reference: str, n_ctx: int, n_threads: int | None) -> Any:
    from exporters.onnx.language_model import OnnxLanguageModel

    return OnnxLanguageModel(reference, n_ctx=n_ctx, n_threads=n_threads)


ONNX = ExportFamily(
    name="onnx",
    setting="onnx",
    title=".onnx files and folders of ONNX variants",
    formats=VARIANTS,
    find=find_variant,
    export=_export,
    locate=_locate,
    runtime="onnxruntime",
    open_model=_open,
    claims=is_onnx,
    needs={"onnx": "onnx", "onnx_ir": "onnx-ir", "onnxruntime": "onnxruntime"},
    extra="onnx",
    packages=("onnx", "onnx-ir", "onnxruntime", "optimum-onnx"),
)
