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
from exporters.export_record import ExportManifest, ExportRecord
from phoneready.evaluation.dominance import Standing, standing
from phoneready.evaluation.evaluation_record import Evaluation
from phoneready.figures.figure_set import DENSE, PRUNED
from phoneready.release.artifact import SIDE_BY_SIDE_FILE, Answers, FileLosses, SideBySide
from phoneready.release.stages import stage_folder
from phoneready.release.steps import ANSWERS_FILE, EVALUATION_FILE, Steps
from phoneready.settings.schema import ReleaseConfig
from runtime_bench.records.bench_record import BenchRecord


@dataclass(frozen=True)
class ReleaseFigures:
    """What the stages of a release found out.

    Attributes:
        source: The dense model.
        plan: The applied plan.
        evaluation: Of the pruned checkpoint against the dense one.
        dense: Exports of the dense model, one a quantization or variant.
        pruned: Exports of the pruned model.
        answers: What the files answer.
        bench: Benchmark records of all files.
        losses: What all files lose on the same windows; empty where no text was named.
    """

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
