"""GGUF files as a family of exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cfsp.errors import InputError
from exporters import gguf
from exporters.family import ExportedModel, ExportFamily, FileOutline
from exporters.gguf.cache_types import DEFAULT_CACHE, MEASURED_CACHES


def _locate(folder: Path, stem: str, quant: str) -> ExportedModel:
    file = folder / f"{stem}-{quant}.gguf"
    if not file.is_file():
        raise InputError(f"{file} does not exist")
    return ExportedModel(file.name, file, file)


def _open(reference: str, n_ctx: int, n_threads: int | None, cache_type: str | None) -> Any:
    from exporters.gguf.language_model import GGUFLanguageModel

    return GGUFLanguageModel(Path(reference), n_ctx=n_ctx, n_threads=n_threads, cache_type=cache_type)


def _outline(reference: str, n_ctx: int) -> FileOutline:
    from exporters.gguf.language_model import outline_of

    return outline_of(Path(reference), n_ctx)


GGUF = ExportFamily(
    name="gguf",
    setting="quants",
    title=".gguf files",
    formats=gguf.QUANTS,
    find=gguf.find_quant,
    export=lambda *request: gguf.export_gguf(*request),
    locate=_locate,
    runtime="llama.cpp",
    open_model=_open,
    outline=_outline,
    claims=lambda reference: Path(reference).suffix == ".gguf",
    needs={"llama_cpp": "llama-cpp-python"},
    extra="gguf",
    for_size=gguf.MIXED,
    through=lambda: gguf.GGUFRounding(),
    cache_types=MEASURED_CACHES,
    own_cache=DEFAULT_CACHE,
)
