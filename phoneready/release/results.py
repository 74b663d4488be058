"""What the stages of a finished release found, read back."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from cfsp.errors import InputError
from cfsp.models.checkpoint import PLAN_FILE, read_checkpoint_info
from cfsp.models.source import ModelSource
from cfsp.pruning.plan import PruningPlan
from cfsp.records import read_record
from cfsp.recovery.recovery_record import RECOVERY_FILE, RecoveryRecord
from cfsp.units import format_bytes
from exporters.export_record import ExportManifest, ExportRecord
from phoneready.evaluation.evaluation_record import Evaluation
from phoneready.evaluation.measured_file import Standing, standing
from phoneready.figures.figures import DENSE, PRUNED
from phoneready.release.stages import RECORD_FILE, stage_folder
from phoneready.release.steps import (
    ANSWERS_FILE,
    BENCH_FILE,
    EVALUATION_FILE,
    RECOVERY_STAGE,
    SIDE_BY_SIDE_FILE,
    Answers,
    FileLosses,
    SideBySide,
    Steps,
    row_text,
)
from phoneready.settings.schema import ReleaseConfig
from runtime_bench.records.bench_record import BenchRecord
from runtime_bench.records.jsonl import read_jsonl


@dataclass(frozen=True)
class ReleaseFigures:
    """What the stages of a release found out; `losses` of all files on the same windows, if a text was named."""

    source: ModelSource
    plan: PruningPlan
    evaluation: Evaluation
    dense: tuple[ExportRecord, ...]
    pruned: tuple[ExportRecord, ...]
    answers: Answers
    bench: tuple[BenchRecord, ...]
    losses: tuple[FileLosses, ...] = ()

    def __post_init__(self) -> None:
        files = {record.file for record in (*self.dense, *self.pruned)}
        for what, lacking in (
            ("the record of the pruned model's exports has no", set() if self.pruned else {"exports"}),
            ("the dense model has no", {r.quant for r in self.pruned} - {r.quant for r in self.dense}),
            (f"{ANSWERS_FILE} has no answers of", files - self.answers.answers.keys()),
        ):
            if lacking:
                raise InputError(f"the release's records do not fit: {what} {', '.join(sorted(lacking))}")

    @functools.cached_property
    def standings(self) -> Mapping[str, Standing]:
        """How every file stands to those of its family that are no larger, by its name."""
        return {
            one.file: standing(one, [other for other in self.losses if other.family == one.family])
            for one in self.losses
        }

    def losses_of(self, file: str | None) -> FileLosses | None:
        """What a file loses, by its name."""
        return next((one for one in self.losses if one.file == file), None)

    @property
    def pairs(self) -> tuple[tuple[ExportRecord, ExportRecord], ...]:
        """(dense, pruned) of each quantization and variant that the pruned model has."""
        dense = {record.quant: record for record in self.dense}
        return tuple((dense[record.quant], record) for record in self.pruned)


def read_figures(config: ReleaseConfig, folder: Path) -> ReleaseFigures:
    """Everything that the stages of a finished release measured.

    Raises:
        InputError: A record is missing or malformed, or says nothing of a file that another one has.
    """
    steps = Steps(config, folder, None)
    exports: dict[str, tuple[ExportRecord, ...]] = {}
    for role in (DENSE, PRUNED):
        made = stage_folder(folder, f"export-{role}")
        manifests = [
            read_record(ExportManifest, made / kind / "export.json") for kind in config.export.formats
        ]
        records = [record for manifest in manifests for record in manifest.exports]
        # They call the files as the release does.
        exports[role] = tuple(replace(one, file=steps.artifact(role, one.quant).name) for one in records)
    side_by_side = stage_folder(folder, "side-by-side") / SIDE_BY_SIDE_FILE
    measured = (config.evaluate.text or config.evaluate.chats) and side_by_side.is_file()
    bench = [record for place in config.bench.targets for record in steps.bench_records(place)]
    return ReleaseFigures(
        source=read_checkpoint_info(stage_folder(folder, "dense") / "model").source,
        plan=read_record(PruningPlan, stage_folder(folder, "prune") / "model" / PLAN_FILE),
        evaluation=read_record(Evaluation, stage_folder(folder, "evaluate") / EVALUATION_FILE),
        dense=exports[DENSE],
        pruned=exports[PRUNED],
        answers=read_record(Answers, stage_folder(folder, "answers") / ANSWERS_FILE),
        bench=tuple(record for record in bench if not record.is_anchor),
        losses=read_record(SideBySide, side_by_side).files if measured else (),
    )


def stage_figures(folder: Path, name: str) -> str:
    """The figures that a finished stage has found, in a few words; nothing if it has none."""
    output, kind = stage_folder(folder, name), name.partition("-")[0]
    if name == "prune":
        return read_record(PruningPlan, output / "model" / PLAN_FILE).removed
    if name == RECOVERY_STAGE:
        record = read_record(RecoveryRecord, output / "model" / RECOVERY_FILE)
        return "; ".join(filter(None, (f"validation {record.change}", record.shortcoming)))
    if name == "side-by-side":
        files = read_record(SideBySide, output / SIDE_BY_SIDE_FILE).files
        return "bits per byte " + ", ".join(f"{one.label} {one.bits_per_byte:.4f}" for one in files)
    if kind == "export":
        manifests = [read_record(ExportManifest, path) for path in sorted(output.glob("*/export.json"))]
        return ", ".join(f"{r.quant} {format_bytes(r.file_bytes)}" for m in manifests for r in m.exports)
    if kind in ("bench", "decide"):
        rows = [row for row in read_jsonl(output / BENCH_FILE) if row.workload == "tg" or not row.ok]
        return "; ".join(f"{row.model_filename} {row_text(row)}" for row in rows)
    parts = []
    for path in sorted(output.glob("*.json")) if kind == "evaluate" else ():
        if path.name == RECORD_FILE:
            continue
        evaluation = read_record(Evaluation, path)
        for text in evaluation.texts:
            of = f"{evaluation.model.reference} on {text.kind}"
            if d := text.divergence:
                parts.append(f"{of}: perplexity {d.perplexity_ratio:.3f} x dense, KL {d.kl_mean:.3f}")
            elif text.bits_per_byte is not None and text.against_bits_per_byte is not None:
                ratio = text.bits_per_byte / text.against_bits_per_byte
                parts.append(f"{of}: bits per byte {ratio:.4f} x dense")
    return "; ".join(parts)
