"""GGUF files as a family of exports."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cfsp.errors import InputError
from exporters.export_record import ExportRecord
from exporters.family import ExportedModel, ExportFamily
from exporters.gguf.quants import QUANTS, find_quant
from exporters.options import ExportOptions


def _export(
    checkpoint: Path, output: Path, formats: Sequence[str], settings: ExportOptions, /
) -> tuple[ExportRecord, ...]:
    from exporters.gguf.export import export_gguf

    return export_gguf(checkpoint, output, formats, settings)


def _draft(checkpoint: Path, folder: Path, quant: str, name: str, settings: ExportOptions) -> Path:
    from exporters.gguf.draft import draft_gguf

    threads, use = settings.n_threads or 1, settings.use_imatrix
    return draft_gguf(checkpoint, folder, [quant], name=name, use_imatrix=use, n_threads=threads)[quant]


def _locate(folder: Path, stem: str, quant: str) -> ExportedModel:
    file = folder / f"{stem}-{quant}.gguf"
    if not file.is_file():
        raise InputError(f"{file} does not exist")
    return ExportedModel(file.name, file, file)


def _open(reference: str, n_ctx: int, n_threads: int | None) -> Any:
    from exporters.gguf.language_model import GGUFLanguageModel

    return GGUFLanguageModel(Path(reference), n_ctx=n_ctx, n_threads=n_threads)


def _claims(reference: str) -> bool:
    return Path(reference).suffix == ".gguf"


GGUF = ExportFamily(
    name="gguf",
    setting="quants",
    title=".gguf files",
    formats=QUANTS,
    find=find_quant,
    export=_export,
    locate=_locate,
    runtime="llama.cpp",
    open_model=_open,
    claims=_claims,
    needs={"llama_cpp": "llama-cpp-python"},
    extra="gguf",
    packages=("gguf", "llama-cpp-python"),
    draft=_draft,
)
