"""What both reports are made from, records alone and no model, and what both say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfsp.records import read_record
from cfsp.units import format_bytes
from phoneready.evaluation.dominance import DOMINATED
from phoneready.evaluation.sweep import Sweep
from phoneready.evaluation.tables import WHAT_STANDINGS_MEAN, measured_on, vocabulary_note
from phoneready.figures.verdict import VERDICTS_FILE, Verdicts
from phoneready.release.results import ReleaseFigures
from phoneready.report.tables import (
    MODELS,
    budget_said,
    budget_table,
    losses_table,
    proof_table,
    quality_table,
    text_name,
    vocabulary_table,
    width_table,
)
from phoneready.settings.schema import ReleaseConfig
from runtime_bench.devices.model_facts import ModelFacts
from runtime_bench.devices.profile import DeviceProfile
from runtime_bench.records.bench_record import BenchRecord
from runtime_bench.records.notes import note_of


@dataclass(frozen=True)
class ReportInput:
    """Everything that the reports show.

    Attributes:
        config: What was asked for.
        figures: What the stages found.
        versions: Packages and runtimes.
        commands: What makes the pruned files, command by command.
        seconds: Stage to its duration.
        projected: Name of a pruned file to what its projection onto devices needs.
        devices: Those devices.
        verdicts: Of the budgets; None where none are set.
        sweep: Quality over several ratios, where there is one.
    """

    config: ReleaseConfig
    figures: ReleaseFigures
    versions: Mapping[str, str]
    commands: tuple[str, ...]
    seconds: Mapping[str, float]
    projected: Mapping[str, ModelFacts]
    devices: tuple[DeviceProfile, ...]
    verdicts: Verdicts | None = None
    sweep: Sweep | None = None


def read_verdicts(folder: Path) -> Verdicts | None:
    """The verdicts that a release's gate left in its folder; None where it left none.

    Raises:
        InputError: The file cannot be used.
    """
    file = folder / VERDICTS_FILE
    return read_record(Verdicts, file) if file.is_file() else None


def contents(report: ReportInput) -> dict[str, Any]:
    """What the templates of both reports show."""
    figures = report.figures
    exports = (*figures.dense, *figures.pruned)
    return {
        "report": report,
        "figures": figures,
        "headline": headline(figures),
        "beaten": beaten(figures),
        "losses": losses_table(figures),
        "measured_on": measured_on(figures.losses) if figures.losses else "",
        "standings": WHAT_STANDINGS_MEAN,
        "quality": quality_table(figures.evaluation),
        "quality_note": vocabulary_note(figures.evaluation, MODELS),
        "widths": width_table(figures.plan),
        "vocabulary": vocabulary_table(figures.plan),
        "budget": budget_table(figures.plan),
        "budget_said": budget_said(figures.plan),
        "answers": _answers(figures),
        "proof": proof_table(exports),
        "warnings": [(r.file, warning) for r in exports for warning in r.warnings],
        "notes": bench_notes(figures.bench),
        "bytes": format_bytes,
        "text_name": text_name,
    }


def headline(figures: ReleaseFigures) -> str:
    """The outcome in one sentence."""
    dense, pruned = figures.pairs[0]
    size = pruned.file_bytes / dense.file_bytes
    parts = [
        figures.plan.removed,
        f"the {pruned.quant} file is {format_bytes(pruned.file_bytes)}, {size:.3f} times the dense one",
    ]
    for text in figures.evaluation.texts:
        if d := text.divergence:
            parts.append(
                f"on {text.kind} perplexity is {d.perplexity_ratio:.3f} times the dense model's "
                f"and the first choice is the same for {d.same_top1:.1%} of the tokens"
            )
        elif text.bits_per_byte and text.against_bits_per_byte:
            ratio = text.bits_per_byte / text.against_bits_per_byte
            parts.append(f"on {text.kind} bits per byte are {ratio:.4f} times the dense model's")
    return "; ".join(parts) + "."


def beaten(figures: ReleaseFigures) -> list[str]:
    """Of every pruned file that another one of the release dominates, which does: no larger, and surely no worse."""
    sentences = []
    for pruned in (one for one in figures.losses if not one.is_dense):
        where = figures.standings[pruned.file]
        best = figures.losses_of(where.by)
        if where.verdict == DOMINATED and best is not None:
            sizes = f"{format_bytes(best.file_bytes)} against {format_bytes(pruned.file_bytes)}"
            losses = f"{best.bits_per_byte:.4f} bits a byte against {pruned.bits_per_byte:.4f}"
            sentences.append(f"The {best.label} file dominates the {pruned.label} file: {sizes}, {losses}.")
    return sentences


def bench_notes(records: Sequence[BenchRecord]) -> list[str]:
    """What a reader must know about the samples, each remark once with the rows that it is about."""
    rows: dict[str, list[str]] = {}
    for record in records:
        if remark := record.failure or note_of(record):
            rows.setdefault(remark, []).append(f"{record.model_filename} {record.test}")
    return [f"{remark}: {', '.join(names)}" for remark, names in rows.items()]


def _answers(figures: ReleaseFigures) -> list[tuple[str, list[tuple[str | None, ...]]]]:
    """Question by question: (who, dense answer, pruned answer, why each is degenerate)."""
    said = figures.answers.answers
    questions = []
    for i, prompt in enumerate(figures.answers.prompts):
        sides: list[tuple[str | None, ...]] = []
        for how, of in figures.evaluation.answer_sets.items():
            if i < len(of.answers) and i < len(of.against_answers):
                why = of.degeneration
                reasons = (why.against_reasons[i], why.reasons[i]) if why else (None, None)
                sides.append((f"checkpoint, in torch{how}", of.against_answers[i], of.answers[i], *reasons))
        for dense, pruned in figures.pairs:
            sides.append((f"{dense.quant} file", said[dense.file][i], said[pruned.file][i], None, None))
        questions.append((prompt, sides))
    return questions
