"""README.md of a release: a model card with the header that the Hugging Face hub reads.

It holds nothing that differs between two runs of the same configuration: times are in the reports.
"""

from __future__ import annotations

import re
import shlex
from typing import Any

from huggingface_hub import ModelCardData

from cfsp.units import format_bytes
from exporters.export_record import ExportRecord
from phoneready.publish.manifest import ReleaseManifest
from phoneready.release.results import ReleaseFigures
from phoneready.report.assets import render_markdown
from phoneready.report.report import quality_text
from runtime_bench.presentation.markup import Markdown, escape_markdown, visible
from runtime_bench.presentation.table import table_of_cells

HUB_LICENSES = frozenset(
    (
        *("apache-2.0", "mit", "gpl-3.0", "lgpl-3.0", "agpl-3.0", "bsd-2-clause", "bsd-3-clause", "mpl-2.0"),
        *("unlicense", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "openrail"),
        *("bigscience-openrail-m", "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "gemma"),
    )
)
"""Licences that the hub knows by these names; any other is `other` with its name."""


def model_card_text(figures: ReleaseFigures, manifest: ReleaseManifest) -> str:
    """The model card."""
    files = list(figures.pruned)
    context: dict[str, Any] = {
        "header": Markdown(_header(figures, manifest)),
        "name": figures.source.name,
        "base": Markdown(_base_link(figures)),
        "figures": figures,
        "files": Markdown(_files_table(files)),
        "quality": Markdown(quality_text(figures)),
        "gguf": next((Markdown(shlex.quote(visible(r.file))) for r in files if r.format == "gguf"), None),
        "onnx": next((r.file for r in files if r.format == "onnx"), None),
        "license": manifest.license or "not stated by the source",
        "recovered": bool(manifest.config.get("recover")),
        "warnings": [f"{r.file}: {warning}" for r in files for warning in r.warnings],
        "version": manifest.versions.get("phoneready", ""),
    }
    return render_markdown("phoneready.publish", "model_card.md.j2", context)


def _header(figures: ReleaseFigures, manifest: ReleaseManifest) -> str:
    """The YAML between the rules; every value is quoted where YAML asks for it."""
    formats = dict.fromkeys(record.format for record in figures.pruned)
    license_ = (manifest.license or "").lower()
    known = license_ in HUB_LICENSES
    data = ModelCardData(
        base_model=_base(figures),
        license=license_ if known else "other" if manifest.license else None,
        license_name=manifest.license if manifest.license and not known else None,
        pipeline_tag="text-generation",
        tags=["pruned", "cfsp", "phoneready", *formats],
    )
    return str(data.to_yaml())


def _base(figures: ReleaseFigures) -> str:
    source = figures.source
    return source.base_model or (source.reference if source.kind == "hub" else source.name)


def _base_link(figures: ReleaseFigures) -> str:
    """The dense model, as a link where it is known to be on the hub."""
    name, source = escape_markdown(_base(figures)), figures.source
    on_hub = source.kind == "hub" or source.base_model
    if not on_hub or re.fullmatch(r"[\w.-]+/[\w.-]+", _base(figures)) is None:
        return name
    return f"[{name}](https://huggingface.co/{_base(figures)})"


def _files_table(files: list[ExportRecord]) -> str:
    header = ["file", "size", "perplexity", "same first choice as the pruned checkpoint", "SHA-256"]
    rows = []
    for r in files:
        close = [f"{r.parity.ppl_export:.2f}", f"{r.parity.same_top1:.1%}"]
        rows.append([r.file, format_bytes(r.file_bytes), *close, r.sha256[:16]])
    return table_of_cells(header, rows).markdown()
