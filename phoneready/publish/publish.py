"""What a finished release leaves for its user: the files, manifest.json, report.md and report.html."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import pydantic

from cfsp.errors import InputError
from cfsp.files import atomic_directory, atomic_file, write_json, write_text
from cfsp.models.checkpoint import NOTICE_PATTERNS, read_checkpoint_info
from cfsp.models.reference import load_tokenizer
from cfsp.records import read_record, write_record
from cfsp.validation import describe_problems
from phoneready.figures.figures import FIGURES_FILE, PRUNED, VERDICTS_FILE
from phoneready.figures.gate import JUNIT_FILE, SUMMARY_FILE
from phoneready.publish.manifest import (
    MANIFEST_FILE,
    SUMS_FILE,
    ReleaseManifest,
    describe_files,
    is_inside,
    make_manifest,
)
from phoneready.publish.model_card import BOM_FILE, make_bom, model_card_text, modelfile_text
from phoneready.release.results import ReleaseFigures, read_figures
from phoneready.release.stages import StageRecord, claim_folder
from phoneready.release.steps import Steps
from phoneready.report.report import ReportInput, read_verdicts, render_page, render_report
from phoneready.settings.schema import ReleaseConfig
from runtime_bench.devices import find_profile, load_profiles

REPORT_FILE = "report.md"
PAGE_FILE = "report.html"
CARD_FILE = "README.md"
MODELFILE = "Modelfile"
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
    models = describe_files(folder, names, {r.file: r.sha256 for r in (*figures.dense, *figures.pruned)})
    manifest = replace(manifest, contents=models)
    write_text(folder / CARD_FILE, model_card_text(figures, manifest))
    write_text(folder / MODELFILE, modelfile_text(figures.pruned, load_tokenizer(steps.checkpoint("dense"))))
    write_json(folder / BOM_FILE, make_bom(figures, manifest))
    write_reports(config, folder, figures, manifest)
    made = describe_files(folder, [*licenses, *_MADE], {})
    sealed = seal_release(folder, replace(manifest, contents=(*models, *made)))
    for name in before - {*licenses, *(file.file for file in manifest.files)}:
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
        else:
            (folder / name).unlink(missing_ok=True)
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
    """Write report.md and report.html from records."""
    steps, profiles = Steps(config, folder, None), load_profiles()
    projected = [steps.artifact(PRUNED, name) for name in config.export.projected]
    report = ReportInput(
        config=config,
        figures=figures,
        versions=manifest.versions,
        commands=manifest.commands,
        seconds=manifest.seconds,
        verdicts=read_verdicts(folder),
        projected={artifact.name: artifact.facts for artifact in projected},
        devices=tuple(find_profile(name, profiles).profile for name in config.bench.devices or profiles),
    )
    write_text(folder / REPORT_FILE, render_report(report))
    write_text(folder / PAGE_FILE, render_page(report))


def rewrite_reports(folder: Path) -> ReleaseManifest:
    """Write the reports of a finished release again; no model is loaded."""
    manifest = read_record(ReleaseManifest, folder / MANIFEST_FILE)
    if not (folder / "stages").is_dir():
        raise InputError(f"{folder} has no folder stages; reports are made from the records in it")
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
