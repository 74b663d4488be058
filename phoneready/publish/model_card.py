"""README.md, Modelfile and bill of materials of a release; they are alike in two runs of the same configuration.

README.md is a model card with the header that the Hugging Face hub reads. Ollama's templates are Go's, a model's are
Jinja: the Modelfile has ChatML, which most models of this size speak; Ollama knows other common ones in a GGUF file.
The bill of materials is CycloneDX 1.6 (https://cyclonedx.org/docs/1.6/json/).
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
from runtime_bench.presentation.table import Column, Markdown, Table, escape_markdown, visible

_SPDX = ("Apache-2.0", "MIT", "BSD-2-Clause", "BSD-3-Clause", "MPL-2.0", "Unlicense", "CC0-1.0", "CC-BY-4.0")
_LICENSES: dict[str, str | None] = {
    **{name.lower(): name for name in (*_SPDX, "CC-BY-SA-4.0", "CC-BY-NC-4.0")},
    **{name: f"{name.upper()}-only" for name in ("gpl-3.0", "lgpl-3.0", "agpl-3.0")},
    **dict.fromkeys(
        ("openrail", "bigscience-openrail-m", "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3")
    ),
    "gemma": None,
}
"""Licences that the hub knows by these names -> SPDX's identifier; any other is given by its name."""


def model_card_text(figures: ReleaseFigures, manifest: ReleaseManifest) -> str:
    """The model card."""
    source, files = figures.source, figures.pruned
    base = source.base_model or (source.reference if source.kind == "hub" else source.name)
    stated = manifest.license
    known = (stated or "").lower() in _LICENSES
    data = ModelCardData(
        base_model=base,
        license=stated.lower() if stated and known else "other" if stated else None,
        license_name=None if known else stated,
        pipeline_tag="text-generation",
        tags=["pruned", "cfsp", "phoneready", *dict.fromkeys(record.format for record in files)],
    )
    on_hub = (source.kind == "hub" or source.base_model) and re.fullmatch(r"[\w.-]+/[\w.-]+", base)
    link = f"[{escape_markdown(base)}](https://huggingface.co/{base})" if on_hub else escape_markdown(base)
    columns: list[Column[ExportRecord]] = [
        Column("file", lambda r: r.file),
        Column("size", lambda r: format_bytes(r.file_bytes), right=True),
        Column("perplexity", lambda r: f"{r.parity.ppl_export:.2f}", right=True),
        Column(
            "same first choice as the pruned checkpoint", lambda r: f"{r.parity.same_top1:.1%}", right=True
        ),
        Column("SHA-256", lambda r: r.sha256[:16]),
    ]
    context: dict[str, Any] = {
        "header": Markdown(data.to_yaml()),
        "name": source.name,
        "base": Markdown(link),
        "figures": figures,
        "files": Markdown(Table(columns, files).markdown()),
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
    first, *others = [record for record in exports if record.format == "gguf"]
    tag = re.sub(r"[^a-z0-9._-]+", "-", first.file.removesuffix(".gguf").lower())
    lines = [f"# ollama create {tag} -f Modelfile", f"FROM ./{first.file}"]
    lines += [f"# FROM ./{record.file}" for record in others]
    if first.context_length < _OLLAMA_CONTEXT:
        lines.append(f"PARAMETER num_ctx {first.context_length}")
    if tokenizer.eos_token:
        lines.append(f"PARAMETER stop {json.dumps(tokenizer.eos_token, ensure_ascii=False)}")
    if not tokenizer.chat_template:
        lines += ["# The model has no chat template: it completes text.", 'TEMPLATE """{{ .Prompt }}"""']
        return "\n".join(lines) + "\n"
    talk = [
        {"role": role, "content": text}
        for role, text in zip(("user", "assistant", "user"), "ABC", strict=True)
    ]
    match = _CHATML.fullmatch(render_chat(tokenizer, talk, add_generation_prompt=True))
    if match is None or '"""' in (match["system"] or ""):
        lines.append("# No TEMPLATE: the chat template is in the GGUF file, where Ollama looks for it.")
    else:
        lines.append(f'TEMPLATE """{_GO_CHATML}"""')
        lines += [f'SYSTEM """{match["system"]}"""'] if match["system"] else []
    return "\n".join(lines) + "\n"


BOM_FILE = "bom.cdx.json"
_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "https://cyclonedx.org/phoneready")


def make_bom(figures: ReleaseFigures, manifest: ReleaseManifest) -> dict[str, Any]:
    """The bill of materials, as JSON: the model, the dense one it comes from, files, libraries."""
    source, plan = figures.source, figures.plan

    def component(kind: str, ref: str, name: str, sha256: str | None = None, **more: Any) -> dict[str, Any]:
        row: dict[str, Any] = {"type": kind, "bom-ref": ref, "name": name}
        if sha256:
            row["hashes"] = [{"alg": "SHA-256", "content": sha256}]
        if kind == "machine-learning-model" and source.license:
            spdx = _LICENSES.get(source.license.lower())
            row["licenses"] = [{"license": {"id": spdx} if spdx else {"name": source.license}}]
        return row | {key: value for key, value in more.items() if value}

    kind, version = "machine-learning-model", source.revision
    dense = component(kind, "dense", source.base_model or source.name, source.sha256, version=version)
    model = component(kind, "model", f"{source.name}-pruned", manifest.checkpoint_sha256)
    notes = (
        f"{plan.removed}, seed {manifest.seed}{'; then trained' if manifest.config.get('recover') else ''}"
    )
    model["pedigree"] = {"ancestors": [dense | {"bom-ref": "ancestor"}], "notes": notes}
    texts = [{"type": "dataset", "name": one, "description": "calibration text"} for one in plan.calibration]
    model["modelCard"] = {"modelParameters": {"task": "text-generation", "datasets": texts}}
    files = []
    for r in figures.pruned:
        parts = [
            component("file", f"file:{c.path}", c.path, c.sha256)
            for c in manifest.contents
            if c.path.startswith(f"{r.file}/")
        ]
        about = f"{r.format} {r.quant}, {r.architecture}"
        sha256 = None if parts else r.sha256
        files.append(component("file", f"file:{r.file}", r.file, sha256, description=about, components=parts))
    libraries = [
        component("library", f"library:{name}", name, version=version)
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
