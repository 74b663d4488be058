"""README.md, Modelfile and bill of materials of a release.

README.md is a model card with the header that the Hugging Face hub reads. With the Modelfile `ollama create NAME -f
Modelfile` takes a GGUF file; Ollama's templates are Go's, a model's are Jinja: ChatML, which most models of this size
speak, is written out, and others are left to Ollama, which knows the common ones in a GGUF file. The bill of materials
is CycloneDX 1.6 (https://cyclonedx.org/docs/1.6/json/). Nothing in them differs between two runs of the same
configuration: times are in the reports, and the serial number is made from the content.
"""

from __future__ import annotations

import json
import re
import shlex
import uuid
from collections.abc import Sequence
from typing import Any

from huggingface_hub import ModelCardData

from cfsp.text.tokens import render_chat
from cfsp.units import format_bytes
from exporters.export_record import ExportRecord
from phoneready.publish.manifest import ReleaseManifest
from phoneready.release.results import ReleaseFigures
from phoneready.report.plots import render_markdown
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


_OLLAMA_CONTEXT = 4096
"""Tokens of context that Ollama gives a model unless it is told otherwise."""
_CHATML = re.compile(
    r"(?:<\|im_start\|>system\n(?P<system>.*?)<\|im_end\|>\n)?<\|im_start\|>user\nA<\|im_end\|>\n"
    r"<\|im_start\|>assistant\nB<\|im_end\|>\n<\|im_start\|>user\nC<\|im_end\|>\n<\|im_start\|>assistant\n",
    re.DOTALL,
)
_GO_CHATML = """{{- range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
"""


def modelfile_text(exports: Sequence[ExportRecord], tokenizer: Any) -> str:
    """The Modelfile of the first GGUF file; the others are named in comments."""
    files = [record for record in exports if record.format == "gguf"]
    tag = re.sub(r"[^a-z0-9._-]+", "-", files[0].file.removesuffix(".gguf").lower())
    lines = [f"# ollama create {tag} -f Modelfile", f"FROM ./{files[0].file}"]
    lines += [f"# FROM ./{record.file}" for record in files[1:]]
    if files[0].context_length < _OLLAMA_CONTEXT:
        lines.append(f"PARAMETER num_ctx {files[0].context_length}")
    if tokenizer.eos_token:
        lines.append(f"PARAMETER stop {json.dumps(tokenizer.eos_token, ensure_ascii=False)}")
    return "\n".join([*lines, *_template(tokenizer)]) + "\n"


def _template(tokenizer: Any) -> list[str]:
    if not tokenizer.chat_template:
        return ["# The model has no chat template: it completes text.", 'TEMPLATE """{{ .Prompt }}"""']
    talk = [
        {"role": role, "content": text} for role, text in (("user", "A"), ("assistant", "B"), ("user", "C"))
    ]
    rendered = render_chat(tokenizer, talk, add_generation_prompt=True)
    match = _CHATML.fullmatch(rendered)
    if match is None or '"""' in (match["system"] or ""):
        return ["# No TEMPLATE: the chat template is in the GGUF file, where Ollama looks for it."]
    system = [f'SYSTEM """{match["system"]}"""'] if match["system"] else []
    return [f'TEMPLATE """{_GO_CHATML}"""', *system]


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
