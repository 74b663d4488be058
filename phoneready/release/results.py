"""What the stages of a finished release found, read back."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from cfsp.errors import InputError
from cfsp.models.checkpoint import PLAN_FILE, read_checkpoint_info
from cfsp.models.source import ModelSource
from cfsp.pruning.plan import PruningPlan
from cfsp.records import read_record
from cfsp.recovery.recovery_record import RECOVERY_FILE, RecoveryRecord
from cfsp.units import format_bytes
from exporters.export_record import ExportManifest, ExportRecord
from phoneready.evaluation.evaluation_record import Evaluation, TextResult
from phoneready.evaluation.measured_file import Standing, standing
from phoneready.figures.figure_set import DENSE, PRUNED
from phoneready.release.stages import RECORD_FILE, stage_folder
from phoneready.release.steps import (
    ANSWERS_FILE,
    EVALUATION_FILE,
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
    return ReleaseFigures(
        source=read_checkpoint_info(stage_folder(folder, "dense") / "model").source,
        plan=read_record(PruningPlan, stage_folder(folder, "prune") / "model" / PLAN_FILE),
        evaluation=read_record(Evaluation, stage_folder(folder, "evaluate") / EVALUATION_FILE),
        dense=_exports(steps, DENSE),
        pruned=_exports(steps, PRUNED),
        answers=read_record(Answers, stage_folder(folder, "answers") / ANSWERS_FILE),
        bench=tuple(
            record
            for place in config.bench.targets
            for record in steps.bench_records(place)
            if not record.is_anchor
        ),
        losses=_losses(folder) if config.evaluate.text or config.evaluate.chats else (),
    )


def _losses(folder: Path) -> tuple[FileLosses, ...]:
    file = stage_folder(folder, "side-by-side") / SIDE_BY_SIDE_FILE
    return read_record(SideBySide, file).files if file.is_file() else ()


def _exports(steps: Steps, role: str) -> tuple[ExportRecord, ...]:
    """The records of a model's exports, which call them as the release does."""
    folder = stage_folder(steps.folder, f"export-{role}")
    records = [
        record
        for kind in steps.config.export.formats
        for record in read_record(ExportManifest, folder / kind / "export.json").exports
    ]
    return tuple(replace(record, file=steps.artifact(role, record.quant).name) for record in records)


def stage_figures(folder: Path, name: str) -> str:
    """The figures that a finished stage has found, in a few words; nothing where it has none."""
    describers = (describe for beginning, describe in _FIGURES.items() if name.startswith(beginning))
    describe = next(describers, None)
    return describe(stage_folder(folder, name)) if describe else ""


def _pruned(output: Path) -> str:
    return read_record(PruningPlan, output / "model" / PLAN_FILE).removed


def _recovered(output: Path) -> str:
    record = read_record(RecoveryRecord, output / "model" / RECOVERY_FILE)
    return "; ".join(filter(None, (f"validation {record.change}", record.shortcoming)))


def _evaluated(output: Path) -> str:
    parts = []
    for path in sorted(output.glob("*.json")):
        if path.name == RECORD_FILE:
            continue
        evaluation = read_record(Evaluation, path)
        parts += [
            f"{evaluation.model.reference} on {text.kind}: {outcome}"
            for text in evaluation.texts
            if (outcome := _outcome(text))
        ]
    return "; ".join(parts)


def _outcome(text: TextResult) -> str:
    """Against the dense model; of another vocabulary's, by what can be compared."""
    if text.divergence:
        return f"perplexity {text.divergence.perplexity_ratio:.3f} x dense, KL {text.divergence.kl_mean:.3f}"
    if text.bits_per_byte is None or text.against_bits_per_byte is None:
        return ""
    return f"bits per byte {text.bits_per_byte / text.against_bits_per_byte:.4f} x dense"


def _side_by_side(output: Path) -> str:
    files = read_record(SideBySide, output / SIDE_BY_SIDE_FILE).files
    return "bits per byte " + ", ".join(f"{one.label} {one.bits_per_byte:.4f}" for one in files)


def _exported(output: Path) -> str:
    manifests = [read_record(ExportManifest, path) for path in sorted(output.glob("*/export.json"))]
    return ", ".join(f"{r.quant} {format_bytes(r.file_bytes)}" for m in manifests for r in m.exports)


def _measured(output: Path) -> str:
    rows = [
        record for record in read_jsonl(output / "bench.jsonl") if record.workload == "tg" or not record.ok
    ]
    return "; ".join(f"{record.model_filename} {row_text(record)}" for record in rows)


_FIGURES: Mapping[str, Callable[[Path], str]] = MappingProxyType(
    {
        "prune": _pruned,
        "recover": _recovered,
        "evaluate": _evaluated,
        "export-": _exported,
        "side-by-side": _side_by_side,
        "bench-": _measured,
        "decide-": _measured,
    }
)
"""Beginning of a stage's name -> what describes its output."""
