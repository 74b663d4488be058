"""README.md of a release: a model card with the header that the Hugging Face hub reads.

It holds nothing that differs between two runs of the same configuration: times are in the reports.
"""

from __future__ import annotations

import re
import shlex
from typing import Any

from huggingface_hub import ModelCardData

from cfsp.units import format_bytes
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
    source, files = figures.source, figures.pruned
    base = source.base_model or (source.reference if source.kind == "hub" else source.name)
    stated = manifest.license
    known = (stated or "").lower() in HUB_LICENSES
    data = ModelCardData(
        base_model=base,
        license=stated.lower() if stated and known else "other" if stated else None,
        license_name=None if known else stated,
        pipeline_tag="text-generation",
        tags=["pruned", "cfsp", "phoneready", *dict.fromkeys(record.format for record in files)],
    )
    on_hub = (source.kind == "hub" or source.base_model) and re.fullmatch(r"[\w.-]+/[\w.-]+", base)
    link = f"[{escape_markdown(base)}](https://huggingface.co/{base})" if on_hub else escape_markdown(base)
    header = ["file", "size", "perplexity", "same first choice as the pruned checkpoint", "SHA-256"]
    rows = [
        [
            r.file,
            format_bytes(r.file_bytes),
            f"{r.parity.ppl_export:.2f}",
            f"{r.parity.same_top1:.1%}",
            r.sha256[:16],
        ]
        for r in files
    ]
    context: dict[str, Any] = {
        "header": Markdown(data.to_yaml()),
        "name": source.name,
        "base": Markdown(link),
        "figures": figures,
        "files": Markdown(table_of_cells(header, rows).markdown()),
        "quality": Markdown(quality_text(figures)),
        "gguf": next((Markdown(shlex.quote(visible(r.file))) for r in files if r.format == "gguf"), None),
        "onnx": next((r.file for r in files if r.format == "onnx"), None),
        "license": manifest.license or "not stated by the source",
        "recovered": bool(manifest.config.get("recover")),
        "warnings": [f"{r.file}: {warning}" for r in files for warning in r.warnings],
        "version": manifest.versions.get("phoneready", ""),
    }
    return render_markdown("phoneready.publish", "model_card.md.j2", context)
