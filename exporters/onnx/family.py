"""ONNX folders as a family of exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from exporters import onnx
from exporters.family import ExportedModel, ExportFamily, FileOutline
from exporters.onnx.folder import find_graph, is_onnx


def _locate(folder: Path, stem: str, variant: str) -> ExportedModel:
    root = folder / variant
    return ExportedModel(f"{stem}-{variant}", root, find_graph(str(root), last_logits=True))


def _open(reference: str, n_ctx: int, n_threads: int | None, _: str | None) -> Any:
    from exporters.onnx.language_model import OnnxLanguageModel

    return OnnxLanguageModel(reference, n_ctx=n_ctx, n_threads=n_threads)


def _outline(reference: str, n_ctx: int) -> FileOutline:
    from exporters.onnx.language_model import outline_of

    return outline_of(find_graph(reference), n_ctx)


def _through() -> Any:
    from exporters.onnx.quantize import OnnxRounding

    return OnnxRounding()


ONNX = ExportFamily(
    name="onnx",
    setting="onnx",
    title=".onnx files and folders of ONNX variants",
    formats=onnx.VARIANTS,
    find=onnx.find_variant,
    export=lambda *request: onnx.export_onnx(*request),
    locate=_locate,
    runtime="onnxruntime",
    open_model=_open,
    outline=_outline,
    claims=is_onnx,
    needs={"onnx": "onnx", "onnx_ir": "onnx-ir", "onnxruntime": "onnxruntime"},
    extra="onnx",
    through=_through,
)
