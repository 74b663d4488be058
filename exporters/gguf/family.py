"""GGUF files as a family of exports; what is heavy is imported when it is first wanted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cfsp.errors import InputError
from exporters.family import ExportedModel, ExportFamily, FileOutline
from exporters.gguf.quants import DEFAULT_CACHE, MEASURED_CACHES, MIXED, QUANTS, find_quant


def _export(*request: Any) -> Any:
    from exporters.gguf.export import export_gguf

    return export_gguf(*request)


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


def _rounding() -> Any:
    from exporters.gguf.files import GGUFRounding

    return GGUFRounding()


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
    outline=_outline,
    claims=lambda reference: Path(reference).suffix == ".gguf",
    needs={"llama_cpp": "llama-cpp-python"},
    extra="gguf",
    for_size=MIXED,
    through=_rounding,
    cache_types=MEASURED_CACHES,
    own_cache=DEFAULT_CACHE,
)
