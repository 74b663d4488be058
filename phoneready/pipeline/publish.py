"""What a finished release leaves for its user: the files, manifest.json, report.md and report.html."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pydantic

from cfsp.checkpoint import read_checkpoint_info
from cfsp.errors import InputError
from cfsp.files import atomic_directory, atomic_file, write_text
from cfsp.records import read_record, write_record
from cfsp.validation import describe_problems
from phoneready.evaluation.sweep import Sweep
from phoneready.pipeline.artifact import Artifact
from phoneready.pipeline.config import ReleaseConfig
from phoneready.pipeline.figures import read_figures
from phoneready.pipeline.manifest import MANIFEST_FILE, ReleaseManifest, make_manifest
from phoneready.pipeline.report import ReleaseFigures, render_report
from phoneready.pipeline.stages import StageRecord, claim_folder
from phoneready.pipeline.steps import Steps
from phoneready.report import ReportInput, project_files, read_verdicts, render_page

__all__ = ["PAGE_FILE", "REPORT_FILE", "publish", "rewrite_reports", "write_reports"]

REPORT_FILE = "report.md"
PAGE_FILE = "report.html"


def publish(config: ReleaseConfig, folder: Path, stages: Sequence[StageRecord]) -> ReleaseManifest:
    """Link the files into the folder and write manifest.json, report.md and report.html from what the stages left."""
    figures = read_figures(config, folder)
    steps = Steps(config, folder, None)
    checkpoint = read_checkpoint_info(steps.checkpoint(steps.final))
    manifest = make_manifest(config, figures, checkpoint, stages)
    before = _published_before(folder)
    for artifact in steps.artifacts():
        _publish(artifact, folder / artifact.name)
    write_record(folder / MANIFEST_FILE, manifest)
    write_reports(config, folder, figures, manifest)
    for name in before - {file.file for file in manifest.files}:
        _remove(folder / name)
    return manifest


def write_reports(
    config: ReleaseConfig,
    folder: Path,
    figures: ReleaseFigures,
    manifest: ReleaseManifest,
    *,
    sweep: Sweep | None = None,
) -> None:
    """Write report.md and report.html from records.

    Args:
        config: What was asked for.
        folder: The release folder.
        figures: What the stages found.
        manifest: For versions and commands.
        sweep: Quality over ratios, for the plot.
    """
    names = {record.file for record in figures.pruned}
    artifacts = [a for a in Steps(config, folder, None).artifacts() if a.name in names and a.root.is_file()]
    page = ReportInput(
        config=config,
        figures=figures,
        versions=manifest.versions,
        commands=manifest.commands,
        seconds=manifest.seconds,
        verdicts=read_verdicts(folder),
        projections=project_files(
            {artifact.name: artifact.root for artifact in artifacts}, config.bench.devices, config.bench.n_ctx
        ),
        sweep=sweep,
    )
    write_text(folder / REPORT_FILE, render_report(config, figures, manifest.versions, manifest.commands))
    write_text(folder / PAGE_FILE, render_page(page))


def rewrite_reports(folder: Path, *, sweep: Sweep | None = None) -> ReleaseManifest:
    """Write the reports of a finished release again; no model is loaded.

    Raises:
        InputError: The folder has no finished release, or its records are not there any more.
    """
    manifest = read_record(ReleaseManifest, folder / MANIFEST_FILE)
    if not (folder / "stages").is_dir():
        raise InputError(f"{folder} has no folder stages; reports are made from the records in it")
    try:
        config = ReleaseConfig.model_validate(manifest.config)
    except pydantic.ValidationError as error:
        where = folder / MANIFEST_FILE
        raise InputError(f"{where}, config: {describe_problems(error)}") from error
    with claim_folder(folder):
        write_reports(config, folder, read_figures(config, folder), manifest, sweep=sweep)
    return manifest


def _published_before(folder: Path) -> set[str]:
    try:
        return {file.file for file in read_record(ReleaseManifest, folder / MANIFEST_FILE).files}
    except InputError:
        return set()


def _publish(artifact: Artifact, destination: Path) -> None:
    """Give a file, or all files of a folder, a second name."""
    if artifact.root.is_file():
        _link(artifact.root, destination)
        return
    files = sorted(path for path in artifact.root.rglob("*") if path.is_file())
    names = [file.relative_to(artifact.root) for file in files]
    there = {path.relative_to(destination) for path in destination.rglob("*") if path.is_file()}
    if there == set(names) and all(
        (destination / name).samefile(file) for name, file in zip(names, files, strict=True)
    ):
        return
    with atomic_directory(destination, force=True) as folder:
        for name, file in zip(names, files, strict=True):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            _link(file, folder / name)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _link(source: Path, destination: Path) -> None:
    """Give a file a second name; a copy where the file system has no links."""
    if destination.exists() and destination.samefile(source):
        return
    with atomic_file(destination) as temporary:
        temporary.unlink()
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
