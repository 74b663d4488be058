"""A bill of materials of a release, in CycloneDX 1.6: the model, what it was made from, its files, and with what.

https://cyclonedx.org/docs/1.6/json/. Nothing in it differs between two runs of the same configuration: the serial
number is made from the content, and there is no time stamp.
"""

from __future__ import annotations

import json
import uuid
from types import MappingProxyType
from typing import Any

from exporters.export_record import ExportRecord
from phoneready.publish.manifest import ReleaseManifest
from phoneready.release.results import ReleaseFigures

BOM_FILE = "bom.cdx.json"
_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "https://cyclonedx.org/phoneready")
SPDX = MappingProxyType(
    {
        name.lower(): name
        for name in (
            *("Apache-2.0", "MIT", "GPL-3.0-only", "LGPL-3.0-only", "AGPL-3.0-only", "BSD-2-Clause"),
            *("BSD-3-Clause", "CC0-1.0", "CC-BY-4.0", "CC-BY-SA-4.0", "CC-BY-NC-4.0", "MPL-2.0", "Unlicense"),
        )
    }
)
"""Licences as models state them to SPDX's identifiers; any other is given by its name."""


def make_bom(figures: ReleaseFigures, manifest: ReleaseManifest) -> dict[str, Any]:
    """The bill of materials, as JSON."""
    dense, files = _dense(figures), [_file(r, manifest) for r in figures.pruned]
    libraries = [
        {"type": "library", "bom-ref": f"library:{name}", "name": name, "version": version}
        for name, version in sorted(manifest.versions.items())
    ]
    model = _model(figures, manifest, dense)
    document: dict[str, Any] = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": model, "licenses": [{"license": {"id": "CC0-1.0"}}]},
        "components": [dense, *files, *libraries],
        "dependencies": [
            {
                "ref": model["bom-ref"],
                "dependsOn": [dense["bom-ref"], *(one["bom-ref"] for one in libraries)],
            },
            *({"ref": file["bom-ref"], "dependsOn": [model["bom-ref"]]} for file in files),
        ],
    }
    content = json.dumps(document, sort_keys=True, ensure_ascii=True)
    return document | {"serialNumber": f"urn:uuid:{uuid.uuid5(_NAMESPACE, content)}"}


def _model(figures: ReleaseFigures, manifest: ReleaseManifest, dense: dict[str, Any]) -> dict[str, Any]:
    plan, ancestor = figures.plan, dense | {"bom-ref": "ancestor"}
    notes = (
        f"{plan.removed}: score {plan.settings.score}, allocation "
        f"{plan.settings.allocation}, reconstruction {plan.settings.reconstruct}, seed {manifest.seed}"
        + (f"; blocks removed: {', '.join(map(str, plan.depth.removed))}" if plan.depth else "")
        + (f"; attentions removed: {', '.join(map(str, plan.attention.removed))}" if plan.attention else "")
        + (f"; key-value groups kept: {plan.kv_groups}" if plan.kv_groups else "")
        + ("; then trained" if manifest.config.get("recover") else "")
    )
    return {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": f"{figures.source.name}-pruned",
        **_hashes(manifest.checkpoint_sha256),
        **_licenses(manifest.license),
        "pedigree": {"ancestors": [ancestor], "notes": notes},
        "modelCard": {
            "modelParameters": {
                "task": "text-generation",
                "architectureFamily": "transformer",
                "modelArchitecture": plan.model_type,
                "datasets": [
                    {"type": "dataset", "name": reference, "description": "calibration text"}
                    for reference in plan.calibration
                ],
            },
            "quantitativeAnalysis": {"performanceMetrics": _metrics(figures)},
            "considerations": {
                "technicalLimitations": ["A pruned model knows less than the dense one it was made from."]
            },
        },
        "properties": [
            {"name": "phoneready:widths", "value": ",".join(map(str, manifest.shape.ffn_widths))},
            {"name": "phoneready:plan_sha256", "value": manifest.plan_sha256 or "unknown"},
        ],
    }


def _metrics(figures: ReleaseFigures) -> list[dict[str, str]]:
    metrics = []
    for text in figures.evaluation.texts:
        if d := text.divergence:
            where = f"{text.kind}, {text.n_tokens} tokens, sha256 {text.windows_sha256[:16]}"
            for name in ("perplexity", "perplexity_ratio", "kl_mean", "same_top1"):
                metrics.append({"type": name, "value": f"{getattr(d, name):.6g}", "slice": where})
    return metrics


def _dense(figures: ReleaseFigures) -> dict[str, Any]:
    source = figures.source
    return {
        "type": "machine-learning-model",
        "bom-ref": "dense",
        "name": source.base_model or source.name,
        **({"version": source.revision} if source.revision else {}),
        **_hashes(source.sha256),
        **_licenses(source.license),
        "properties": [{"name": "phoneready:kind", "value": source.kind}],
    }


def _file(record: ExportRecord, manifest: ReleaseManifest) -> dict[str, Any]:
    parts = [
        {"type": "file", "bom-ref": f"file:{c.path}", "name": c.path, **_hashes(c.sha256)}
        for c in manifest.contents
        if c.path.startswith(f"{record.file}/")
    ]
    return {
        "type": "file",
        "bom-ref": f"file:{record.file}",
        "name": record.file,
        "description": f"{record.format} {record.quant}, {record.architecture}",
        **({"components": parts} if parts else _hashes(record.sha256)),
        **_licenses(manifest.license),
    }


def _hashes(sha256: str | None) -> dict[str, Any]:
    return {"hashes": [{"alg": "SHA-256", "content": sha256}]} if sha256 else {}


def _licenses(license_: str | None) -> dict[str, Any]:
    if not license_:
        return {}
    spdx = SPDX.get(license_.lower())
    return {"licenses": [{"license": {"id": spdx} if spdx else {"name": license_}}]}
