"""A bill of materials of a release, in CycloneDX 1.6: the model, what it was made from, its files, and with what.

https://cyclonedx.org/docs/1.6/json/. Nothing in it differs between two runs of the same configuration: the serial
number is made from the content, and there is no time stamp.
"""

from __future__ import annotations

import json
import uuid
from typing import Any

from phoneready.publish.manifest import ReleaseManifest
from phoneready.release.results import ReleaseFigures

BOM_FILE = "bom.cdx.json"
_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "https://cyclonedx.org/phoneready")
_SPDX = {
    name.lower(): name
    for name in (
        *("Apache-2.0", "MIT", "GPL-3.0-only", "LGPL-3.0-only", "AGPL-3.0-only", "BSD-2-Clause"),
        *("BSD-3-Clause", "CC0-1.0", "CC-BY-4.0", "CC-BY-SA-4.0", "CC-BY-NC-4.0", "MPL-2.0", "Unlicense"),
    )
}
"""Licences as models state them -> SPDX's identifiers; any other is given by its name."""


def make_bom(figures: ReleaseFigures, manifest: ReleaseManifest) -> dict[str, Any]:
    """The bill of materials, as JSON."""
    source, plan = figures.source, figures.plan

    def component(kind: str, ref: str, name: str, sha256: str | None, license_: str | None) -> dict[str, Any]:
        row: dict[str, Any] = {"type": kind, "bom-ref": ref, "name": name}
        if sha256:
            row["hashes"] = [{"alg": "SHA-256", "content": sha256}]
        if license_:
            spdx = _SPDX.get(license_.lower())
            row["licenses"] = [{"license": {"id": spdx} if spdx else {"name": license_}}]
        return row

    kind = "machine-learning-model"
    dense = component(kind, "dense", source.base_model or source.name, source.sha256, source.license)
    dense |= {"version": source.revision} if source.revision else {}
    dense["properties"] = [{"name": "phoneready:kind", "value": source.kind}]
    metrics = [
        {
            "type": name,
            "value": f"{getattr(text.divergence, name):.6g}",
            "slice": f"{text.kind}, {text.n_tokens} tokens, sha256 {text.windows_sha256[:16]}",
        }
        for text in figures.evaluation.texts
        if text.divergence
        for name in ("perplexity", "perplexity_ratio", "kl_mean", "same_top1")
    ]
    notes = f"{plan.removed}, seed {manifest.seed}"
    notes += "; then trained" if manifest.config.get("recover") else ""
    model = component(kind, "model", f"{source.name}-pruned", manifest.checkpoint_sha256, manifest.license)
    model |= {
        "pedigree": {"ancestors": [dense | {"bom-ref": "ancestor"}], "notes": notes},
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
            "quantitativeAnalysis": {"performanceMetrics": metrics},
        },
        "properties": [{"name": "phoneready:plan_sha256", "value": manifest.plan_sha256 or "unknown"}],
    }
    files = []
    for r in figures.pruned:
        parts = [
            component("file", f"file:{c.path}", c.path, c.sha256, None)
            for c in manifest.contents
            if c.path.startswith(f"{r.file}/")
        ]
        row = component("file", f"file:{r.file}", r.file, None if parts else r.sha256, manifest.license)
        row["description"] = f"{r.format} {r.quant}, {r.architecture}"
        files.append(row | ({"components": parts} if parts else {}))
    libraries = [
        {"type": "library", "bom-ref": f"library:{name}", "name": name, "version": version}
        for name, version in sorted(manifest.versions.items())
    ]
    document: dict[str, Any] = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": model, "licenses": [{"license": {"id": "CC0-1.0"}}]},
        "components": [dense, *files, *libraries],
        "dependencies": [
            {"ref": "model", "dependsOn": ["dense", *(one["bom-ref"] for one in libraries)]},
            *({"ref": file["bom-ref"], "dependsOn": ["model"]} for file in files),
        ],
    }
    content = json.dumps(document, sort_keys=True, ensure_ascii=True)
    return document | {"serialNumber": f"urn:uuid:{uuid.uuid5(_NAMESPACE, content)}"}
