"""What a finished release leaves for its user: the files, README.md, Modelfile, bill of materials, manifest, reports.

README.md is a model card with the header that the Hugging Face hub reads. Ollama's templates are Go's, a model's are
Jinja: the Modelfile has ChatML, which most models of this size speak; Ollama knows other common ones in a GGUF file.
The bill of materials is CycloneDX 1.6 (https://cyclonedx.org/docs/1.6/json/). None of the three holds times.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pydantic
from huggingface_hub import ModelCardData

from cfsp.errors import InputError, require_extra
from cfsp.files import atomic_directory, atomic_file, write_json, write_text
from cfsp.models.checkpoint import NOTICE_PATTERNS, read_checkpoint_info
from cfsp.models.reference import load_tokenizer
from cfsp.records import read_record, write_record
from cfsp.text.tokens import render_chat
from cfsp.units import format_bytes
from cfsp.validation import describe_problems
from exporters.export_record import ExportRecord
from phoneready.figures.figures import FIGURES_FILE, SHIPPED, VERDICTS_FILE, Verdicts
from phoneready.figures.gate import JUNIT_FILE, SUMMARY_FILE
from phoneready.publish.manifest import (
    MANIFEST_FILE,
    SUMS_FILE,
    ReleaseManifest,
    describe_files,
    is_inside,
    make_manifest,
)
from phoneready.release.results import ReleaseFigures, read_figures
from phoneready.release.stages import StageRecord, claim_folder
from phoneready.release.steps import Steps, remove_place
from phoneready.report.plots import render_markdown
from phoneready.report.report import ReportInput, quality_means, quality_text, render_page, render_report
from phoneready.settings.schema import ReleaseConfig
from runtime_bench.devices import find_profile, load_profiles
from runtime_bench.presentation.table import Column, Markdown, Table, escape_markdown, visible

REPORT_FILE = "report.md"
PAGE_FILE = "report.html"
CARD_FILE = "README.md"
MODELFILE = "Modelfile"
BOM_FILE = "bom.cdx.json"
_MADE = (
    *(REPORT_FILE, PAGE_FILE, CARD_FILE, MODELFILE, BOM_FILE),
    *(VERDICTS_FILE, FIGURES_FILE, JUNIT_FILE, SUMMARY_FILE),
)
"""What is made anew in every run; all but the card, the Modelfile and the bill of materials hold times."""


def publish(
    config: ReleaseConfig, folder: Path, figures: ReleaseFigures, stages: Sequence[StageRecord]
) -> ReleaseManifest:
    """Place the files in the folder; write reports, card, Modelfile, bill of materials, hashes and manifest.

    Everything is made from what the stages left. The manifest and SHA256SUMS come last.
    """
    steps = Steps(config, folder, None)
    checkpoint = read_checkpoint_info(steps.checkpoint(steps.final))
    manifest = make_manifest(config, figures, checkpoint, stages)
    before: set[str] = set()  # models and licences that an earlier release left
    with contextlib.suppress(InputError):
        earlier = read_record(ReleaseManifest, folder / MANIFEST_FILE)
        before = {c.path for c in earlier.contents if any(fnmatch(c.path, p) for p in NOTICE_PATTERNS)}
        before = {name for name in before | {file.file for file in earlier.files} if is_inside(name)}
    names, final = [], steps.checkpoint(steps.final)
    for artifact in steps.artifacts():
        place(artifact.root, folder / artifact.name)
        names.append(artifact.name)
    notices = [file for pattern in NOTICE_PATTERNS for file in sorted(final.glob(pattern))]
    for file in notices:
        place(file, folder / file.name)
    licenses = [file.name for file in notices]
    # Hashes from when the models were made: what changes on the disk since then does not become right.
    models = describe_files(folder, names, {r.file: r.sha256 for r in (*figures.dense, *figures.shipped)})
    manifest = replace(manifest, contents=models)
    write_text(folder / CARD_FILE, model_card_text(figures, manifest))
    write_text(folder / MODELFILE, modelfile_text(figures.shipped, load_tokenizer(steps.checkpoint("dense"))))
    write_json(folder / BOM_FILE, make_bom(figures, manifest))
    write_reports(config, folder, figures, manifest)
    made = describe_files(folder, [*licenses, *_MADE], {})
    sealed = seal_release(folder, replace(manifest, contents=(*models, *made)))
    for name in before - {*licenses, *(file.file for file in manifest.files)}:
        remove_place(folder / name)
    return sealed


def seal_release(folder: Path, manifest: ReleaseManifest) -> ReleaseManifest:
    """Write the manifest, its contents in order of their paths, and, over it and all else, SHA256SUMS."""
    contents = sorted(manifest.contents, key=lambda content: content.path)
    manifest = replace(manifest, contents=tuple(contents))
    write_record(folder / MANIFEST_FILE, manifest)
    listed = [*contents, *describe_files(folder, [MANIFEST_FILE], {})]
    write_text(folder / SUMS_FILE, "".join(f"{one.sha256}  {one.path}\n" for one in listed))
    return manifest


def write_reports(
    config: ReleaseConfig,
    folder: Path,
    figures: ReleaseFigures,
    manifest: ReleaseManifest,
) -> None:
    steps, profiles = Steps(config, folder, None), load_profiles()
    verdicts = folder / VERDICTS_FILE
    projected = [steps.artifact(SHIPPED, name) for name in config.quantize.projected]
    report = ReportInput(
        config=config,
        figures=figures,
        versions=manifest.versions,
        commands=manifest.commands,
        seconds=manifest.seconds,
        verdicts=read_record(Verdicts, verdicts) if verdicts.is_file() else None,
        projected={artifact.name: artifact.facts for artifact in projected},
        devices=tuple(find_profile(name, profiles).profile for name in config.bench.devices or profiles),
    )
    write_text(folder / REPORT_FILE, render_report(report))
    write_text(folder / PAGE_FILE, render_page(report))


def rewrite_reports(folder: Path) -> ReleaseManifest:
    """Write the reports of a finished release again, plots among them; no model is loaded."""
    manifest = read_record(ReleaseManifest, folder / MANIFEST_FILE)
    if not (folder / "stages").is_dir():
        raise InputError(f"{folder} has no folder stages; reports are made from the records in it")
    require_extra("plotly", "report")  # or a page without plots would replace one that has them
    try:
        config = ReleaseConfig.model_validate(manifest.config)
    except pydantic.ValidationError as error:
        where = folder / MANIFEST_FILE
        raise InputError(f"{where}, config: {describe_problems(error)}") from error
    with claim_folder(folder):
        write_reports(config, folder, read_figures(config, folder), manifest)
        # The other files keep the hashes that they were released with.
        made = {content.path: content for content in describe_files(folder, [REPORT_FILE, PAGE_FILE], {})}
        kept = [content for content in manifest.contents if content.path not in made]
        return seal_release(folder, replace(manifest, contents=(*kept, *made.values())))


def place(source: Path, destination: Path) -> None:
    """Make a file, or all files of a folder, appear at `destination`; what is there already stays untouched.

    A file is given a second name. The files of a folder are copied: onnx and onnx-ir refuse weights beside a graph
    that have more than one name.
    """
    if source.is_file():
        if destination.exists() and destination.samefile(source):
            return
        with atomic_file(destination) as temporary:
            temporary.unlink()
            try:
                os.link(source, temporary)
            except OSError:
                shutil.copyfile(source, temporary)
        return
    files = {path.relative_to(source): path for path in source.rglob("*") if path.is_file()}
    there = {path.relative_to(destination) for path in destination.rglob("*") if path.is_file()}

    def same(one: os.stat_result, other: os.stat_result) -> bool:
        return (one.st_size, one.st_mtime_ns) == (other.st_size, other.st_mtime_ns)

    if there == set(files) and all(same(files[name].stat(), (destination / name).stat()) for name in files):
        return
    with atomic_directory(destination, own=True) as folder:
        shutil.copytree(source, folder, dirs_exist_ok=True)


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
    source, files = figures.source, figures.shipped
    base = source.base_model or (source.reference if source.kind == "hub" else source.name)
    stated = manifest.license
    known = (stated or "").lower() in _LICENSES
    data = ModelCardData(
        base_model=base,
        license=stated.lower() if stated and known else "other" if stated else None,
        license_name=None if known else stated,
        pipeline_tag="text-generation",
        tags=[
            *(["pruned", "cfsp"] if figures.plan else []),
            "phoneready",
            *dict.fromkeys(r.format for r in files),
        ],
    )
    on_hub = (source.kind == "hub" or source.base_model) and re.fullmatch(r"[\w.-]+/[\w.-]+", base)
    link = f"[{escape_markdown(base)}](https://huggingface.co/{base})" if on_hub else escape_markdown(base)
    columns: list[Column[ExportRecord]] = [
        Column("file", lambda r: r.file),
        Column("size", lambda r: format_bytes(r.file_bytes), right=True),
        Column("perplexity", lambda r: f"{r.parity.ppl_export:.2f}", right=True),
        Column("same first choice as the checkpoint", lambda r: f"{r.parity.same_top1:.1%}", right=True),
        Column("SHA-256", lambda r: r.sha256[:16]),
    ]
    context: dict[str, Any] = {
        "header": Markdown(data.to_yaml()),
        "name": source.name,
        "base": Markdown(link),
        "figures": figures,
        "files": Markdown(Table(columns, files).markdown()),
        "quality": Markdown(quality_text(figures)),
        "quality_means": quality_means(figures),
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
    name = "-".join(filter(None, (source.name, figures.word)))
    model = component(kind, "model", name, manifest.checkpoint_sha256)
    made = plan.removed if plan else "quantized"
    notes = f"{made}, seed {manifest.seed}{'; then trained' if manifest.config.get('recover') else ''}"
    model["pedigree"] = {"ancestors": [dense | {"bom-ref": "ancestor"}], "notes": notes}
    texts = [
        {"type": "dataset", "name": one, "description": "calibration text"}
        for one in manifest.config["prune"]["calibration"]
    ]
    model["modelCard"] = {"modelParameters": {"task": "text-generation", "datasets": texts}}
    files = []
    for r in figures.shipped:
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
