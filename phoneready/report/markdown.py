"""report.md: pruned against dense, what both answer, and how everything was measured."""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from exporters.export_record import ExportRecord
from phoneready.console import format_bytes
from phoneready.release.results import ReleaseFigures
from phoneready.report.tables import (
    COMPARED,
    bench_rows,
    comparison_table,
    proof_table,
    quality_table,
    width_table,
)
from phoneready.settings.schema import ReleaseConfig
from runtime_bench.presentation.markup import (
    Markdown,
    escape_cell,
    escape_markdown,
    finalize_markdown,
    visible,
)
from runtime_bench.presentation.table import table_of_cells
from runtime_bench.records.bench_record import BenchRecord
from runtime_bench.records.groups import bench_groups
from runtime_bench.records.notes import note_of

_HERE = ("measured", "local")


def render_report(
    config: ReleaseConfig, figures: ReleaseFigures, versions: Mapping[str, str], commands: Sequence[str]
) -> str:
    """The report as Markdown."""
    pairs = figures.pairs
    context: dict[str, Any] = {
        "config": config,
        "figures": figures,
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "commands": [Markdown(visible(command)) for command in commands],
        "headline": headline(figures),
        "verdicts": [
            (dense.quant, Markdown(verdict_table(figures, dense, pruned))) for dense, pruned in pairs
        ],
        "quality": Markdown(quality_text(figures)),
        "parity": Markdown(proof_table((*figures.dense, *figures.pruned)).markdown()),
        "notes": [f"{r.file}: {warning}" for pair in pairs for r in pair for warning in r.warnings],
        "answers": _answers(figures),
        "widths": Markdown(width_table(figures.plan).markdown()),
        "groups": bench_groups(figures.bench),
        "threads": ", ".join(str(n) for n in dict.fromkeys(r.n_threads for r in figures.bench)),
        "bench_notes": bench_notes(figures.bench),
        "bytes": format_bytes,
    }
    text = (
        importlib.resources.files("phoneready.report").joinpath("templates/report.md.j2").read_text("utf-8")
    )
    environment = jinja2.Environment(
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=finalize_markdown,
    )
    return environment.from_string(text).render(context) + "\n"


def headline(figures: ReleaseFigures) -> str:
    """The outcome in one sentence."""
    dense, pruned = figures.pairs[0]
    share, size = 1 - figures.plan.keep_ratio, pruned.file_bytes / dense.file_bytes
    parts = [
        f"{share:.1%} of the FFN channels removed",
        f"the {pruned.quant} file is {format_bytes(pruned.file_bytes)}, {size:.3f} times the dense one",
    ]
    for text in figures.evaluation.texts:
        if text.divergence:
            d = text.divergence
            parts.append(
                f"on {text.kind} perplexity is {d.perplexity_ratio:.3f} times the dense model's "
                f"and the first choice is the same for {d.same_top1:.1%} of the tokens"
            )
    return "; ".join(parts) + "."


def verdict_table(figures: ReleaseFigures, dense: ExportRecord, pruned: ExportRecord) -> str:
    """One quantization: size, perplexity, speed and memory of both files; a table for each place but this machine."""
    groups = bench_groups(figures.bench)
    here = next((group for group in groups if (group.kind, group.target) == _HERE), None)
    parts = [comparison_table(here, dense, pruned).markdown()]
    for group in groups:
        rows = [] if group is here else bench_rows(group, dense.file, pruned.file)
        if rows:
            parts.append(f"{escape_markdown(group.title)}:\n\n{table_of_cells(COMPARED, rows).markdown()}")
    return "\n".join(parts)


def quality_text(figures: ReleaseFigures) -> str:
    """The pruned checkpoint against the dense one, before quantization."""
    return quality_table(figures.evaluation).markdown() or "Nothing was evaluated.\n"


def _answers(figures: ReleaseFigures) -> list[dict[str, Any]]:
    """Question by question: the checkpoints' answers, then the files'."""
    sides = [("checkpoint", figures.evaluation.against_answers, figures.evaluation.answers)]
    for dense, pruned in figures.pairs:
        said = figures.answers.answers
        sides.append((dense.quant, said[dense.file], said[pruned.file]))
    return [
        {
            "prompt": prompt,
            "rows": [
                [Markdown(escape_cell(text)) for text in (name, dense[i], pruned[i])]
                for name, dense, pruned in sides
            ],
        }
        for i, prompt in enumerate(figures.evaluation.prompts)
    ]


def bench_notes(records: Sequence[BenchRecord]) -> list[str]:
    """What a reader must know about the samples, each remark once with the rows that it is about."""
    rows: dict[str, list[str]] = {}
    for record in records:
        if remark := record.failure or note_of(record):
            rows.setdefault(remark, []).append(f"{record.model_filename} {record.test}")
    return [f"{remark}: {', '.join(names)}" for remark, names in rows.items()]
