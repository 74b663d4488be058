"""What a finished release leaves for its user: the files, manifest.json and report.md."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from cfsp.checkpoint import PLAN_FILE, CheckpointInfo, read_checkpoint_info
from cfsp.errors import InputError
from cfsp.files import atomic_directory, atomic_file, write_text
from cfsp.model_source import ModelSource
from cfsp.plan import PruningPlan
from cfsp.records import read_record, tool_version, write_record
from exporters.onnx import find_variant
from exporters.record import ExportManifest, ExportRecord
from phoneready.evaluation.record import Evaluation
from phoneready.pipeline.answers import Answers
from phoneready.pipeline.artifact import Artifact
from phoneready.pipeline.config import ReleaseConfig
from phoneready.pipeline.report import ReleaseFigures, render_report
from phoneready.pipeline.stages import StageRecord, stage_folder
from phoneready.pipeline.steps import ANSWERS_FILE, EVALUATION_FILE, Steps

__all__ = ["MANIFEST_FILE", "REPORT_FILE", "ReleaseManifest", "ReleasedFile", "publish", "read_figures"]

MANIFEST_FILE = "manifest.json"
REPORT_FILE = "report.md"


@dataclass(frozen=True)
class ReleasedFile:
    """A GGUF file, or the folder of an ONNX variant.

    Attributes:
        file: Its name in the release folder.
        role: `pruned`, or `dense` for the one it is compared with.
        format: `gguf` or `onnx`.
        quant: Quantization or variant.
        architecture: The runtime's name for it, which may differ from the source's.
        bytes: Size; of a folder, of its graph and weights.
        sha256: Hash; of a folder, of its graph, whose metadata has the hash of the weights.
    """

    file: str
    role: str
    format: str
    quant: str
    architecture: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ReleaseManifest:
    """manifest.json: what was made, from what, how, and with what.

    Attributes:
        source: The dense model.
        license: Its licence, which the files inherit; None where the source states none.
        seed: Seed of the run.
        prune_ratio: Share of FFN channels that was asked to be removed.
        removed_ffn_share: Share that was removed.
        widths: intermediate_size of each block.
        plan_sha256: Hash of the pruning plan.
        checkpoint_sha256: Hash of the pruned checkpoint's weights.
        files: The files.
        kinds: How each group of figures came about.
        versions: Packages and runtime.
        config: The configuration.
        commands: Single commands that do the same; 4-bit ONNX variants are rounded for other windows of that text.
        stages: Name to key of each stage.
        seconds: Name to duration of each stage.
    """

    KIND: ClassVar[str] = "release-manifest"
    SCHEMA_VERSION: ClassVar[int] = 2

    source: ModelSource
    license: str | None
    seed: int
    prune_ratio: float
    removed_ffn_share: float
    widths: tuple[int, ...]
    plan_sha256: str | None
    checkpoint_sha256: str
    files: tuple[ReleasedFile, ...]
    kinds: dict[str, str]
    versions: dict[str, str]
    config: dict[str, Any]
    commands: tuple[str, ...]
    stages: dict[str, str]
    seconds: dict[str, float]


def publish(config: ReleaseConfig, folder: Path, stages: Sequence[StageRecord]) -> ReleaseManifest:
    """Link the files into the folder and write manifest.json and report.md from what the stages left."""
    figures = read_figures(config, folder)
    checkpoint = read_checkpoint_info(
        Steps(config, folder, None).checkpoint(Steps(config, folder, None).final)
    )
    manifest = _manifest(config, figures, checkpoint, stages)
    before = _published_before(folder)
    for artifact in Steps(config, folder, None).artifacts():
        _publish(artifact, folder / artifact.name)
    write_record(folder / MANIFEST_FILE, manifest)
    write_text(folder / REPORT_FILE, render_report(config, figures, manifest.versions, manifest.commands))
    for name in before - {file.file for file in manifest.files}:
        _remove(folder / name)
    return manifest


def read_figures(config: ReleaseConfig, folder: Path) -> ReleaseFigures:
    """Everything that the stages of a finished release measured."""
    steps = Steps(config, folder, None)
    names = [artifact.name for artifact in steps.artifacts()]
    # Dense and pruned take turns.
    exports = [
        _exports(config, folder, stage, names[first::2])
        for first, stage in enumerate(("export-dense", "export-pruned"))
    ]
    return ReleaseFigures(
        source=read_checkpoint_info(stage_folder(folder, "dense") / "model").source,
        plan=read_record(PruningPlan, stage_folder(folder, "prune") / "model" / PLAN_FILE),
        evaluation=read_record(Evaluation, stage_folder(folder, "evaluate") / EVALUATION_FILE),
        dense=exports[0],
        pruned=exports[1],
        answers=read_record(Answers, stage_folder(folder, "answers") / ANSWERS_FILE),
        bench=tuple(record for place in config.bench.targets for record in steps.bench_records(place)),
    )


def _exports(
    config: ReleaseConfig, folder: Path, stage: str, names: Sequence[str]
) -> tuple[ExportRecord, ...]:
    """The records of a stage, which call the exports as the release does."""
    kinds = ("gguf", "onnx") if config.export.onnx else ("gguf",)
    found = [
        record
        for kind in kinds
        for record in read_record(ExportManifest, stage_folder(folder, stage) / kind / "export.json").exports
    ]
    return tuple(replace(record, file=name) for record, name in zip(found, names, strict=True))


def _manifest(
    config: ReleaseConfig,
    figures: ReleaseFigures,
    checkpoint: CheckpointInfo,
    stages: Sequence[StageRecord],
) -> ReleaseManifest:
    roles = [("pruned", record) for record in figures.pruned] + [
        ("dense", record) for record in figures.dense
    ]
    runtimes = ", ".join(dict.fromkeys(record.runtime for record in figures.pruned))
    versions = checkpoint.versions | {"phoneready": tool_version(), "runtime": runtimes}
    return ReleaseManifest(
        source=figures.source,
        license=figures.source.license,
        seed=config.seed,
        prune_ratio=config.prune.prune_ratio,
        removed_ffn_share=1 - figures.plan.keep_ratio,
        widths=checkpoint.widths,
        plan_sha256=checkpoint.plan_sha256,
        checkpoint_sha256=checkpoint.weights_sha256,
        files=tuple(
            ReleasedFile(r.file, role, r.format, r.quant, r.architecture, r.file_bytes, r.sha256)
            for role, r in roles
        ),
        kinds={"evaluation": "measured", "parity": "measured", "bench": "measured"},
        versions=dict(sorted(versions.items())),
        config=config.model_dump(mode="json"),
        commands=_commands(config, figures),
        stages={stage.name: stage.key for stage in stages},
        seconds={stage.name: stage.seconds for stage in stages},
    )


def _commands(config: ReleaseConfig, figures: ReleaseFigures) -> tuple[str, ...]:
    """The release as single commands."""
    p, e, s = config.prune, config.evaluate, figures.plan.settings
    prune: list[object] = [
        "prune",
        config.model.reference,
        "-o",
        "checkpoint",
        "--prune-ratio",
        s.prune_ratio,
    ]
    for reference in p.calibration:
        prune += ["--calibration", reference]
    prune += ["--nsamples", p.nsamples, "--seqlen", p.seqlen, "--seed", config.seed, "--score", s.score]
    prune += ["--coarse", s.coarse_metric, "--allocation", s.allocation, "--coarse-strength", s.strength]
    prune += ["--align", s.align, "--reconstruct", s.reconstruct]
    prune += ["--ridge", s.ridge, "--correction", s.correction, "--dtype", s.dtype]
    prune += ["--uniform"] if s.uniform_width else []
    judge: list[object] = ["eval", "checkpoint", "--against", config.model.reference]
    for option, references in (("--text", e.text), ("--chats", e.chats)):
        for reference in references:
            judge += [option, reference]
    judge += ["--seqlen", e.seqlen, "--windows", e.max_windows, "--seed", config.seed + 1]
    variants: list[object] = ["--onnx", ",".join(config.export.onnx)] if config.export.onnx else []
    if any(find_variant(variant).calibrated for variant in config.export.onnx):
        variants += [word for reference in p.calibration for word in ("--calibration", reference)]
        variants += ["--seed", config.seed]
    export: list[object] = ["export", "checkpoint", "-o", "exports"]
    export += ["--gguf", ",".join(config.export.quants), *variants]
    export += [] if config.export.imatrix else ["--no-imatrix"]
    return tuple(shlex.join(map(str, ["phoneready", *words])) for words in (prune, judge, export))


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
