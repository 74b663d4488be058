"""report.md: pruned against dense, what both answer, and how everything was measured."""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from cfsp.pruning.plan import PruningPlan
from exporters.record import ExportRecord
from phoneready.console import format_bytes, format_rows
from phoneready.release.results import ReleaseFigures
from phoneready.settings.schema import ReleaseConfig
from runtime_bench.presentation.comparison_table import speeds_text
from runtime_bench.presentation.markup import (
    Markdown,
    escape_cell,
    escape_markdown,
    finalize_markdown,
    visible,
)
from runtime_bench.presentation.record_table import speed_text
from runtime_bench.records.compare import Comparison, compare_records
from runtime_bench.records.groups import BenchGroup, bench_groups
from runtime_bench.records.notes import note_of
from runtime_bench.records.record import BenchRecord

WORKLOAD_TITLES = {
    "pp": "prompt processing",
    "tg": "generation",
    "ttft": "time to first token",
    "load": "loading",
}
_COLUMNS = ("", "dense", "pruned", "pruned / dense")
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
        "quality": Markdown(quality_table(figures)),
        "parity": Markdown(_parity_table(figures)),
        "notes": [f"{r.file}: {warning}" for pair in pairs for r in pair for warning in r.warnings],
        "answers": _answers(figures),
        "widths": Markdown(_widths_table(figures.plan)),
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
    size = [format_bytes(dense.file_bytes), format_bytes(pruned.file_bytes)]
    p, q = dense.parity, pruned.parity
    rows = [
        ["file size", *size, f"{pruned.file_bytes / dense.file_bytes:.3f}"],
        [
            f"perplexity of the file ({p.text}, {p.n_tokens} tokens)",
            f"{p.ppl_export:.2f}",
            f"{q.ppl_export:.2f}",
            f"{q.ppl_export / p.ppl_export:.3f}",
        ],
    ]
    others = []
    for group in bench_groups(figures.bench):
        found = _bench_rows(group, dense.file, pruned.file)
        if (group.kind, group.target) == _HERE:
            rows += found
        elif found:
            others.append(f"{escape_markdown(group.title)}:\n\n{format_rows(_COLUMNS, found)}")
    return "\n".join([format_rows(_COLUMNS, rows), *others])


def _bench_rows(group: BenchGroup, dense: str, pruned: str) -> list[list[str]]:
    rows = [_speed_row(*pair) for pair in group.pairs(dense, pruned)]
    before, now = group.peak_rss_bytes(dense), group.peak_rss_bytes(pruned)
    if before and now:
        rows.append(["peak memory (RSS)", format_bytes(before), format_bytes(now), f"{now / before:.3f}"])
    return rows


def quality_table(figures: ReleaseFigures) -> str:
    """The pruned checkpoint against the dense one, before quantization."""
    header = [
        "measured on",
        "tokens",
        "perplexity dense",
        "pruned",
        "ratio",
        "KL mean",
        "KL median",
        "KL p99.9",
    ]
    rows = []
    for text in figures.evaluation.texts:
        d = text.divergence
        if d is None:
            continue
        perplexities = [f"{d.reference_perplexity:.2f}", f"{d.perplexity:.2f}", f"{d.perplexity_ratio:.3f}"]
        kl = [f"{d.kl_mean:.4f}", f"{d.kl_median:.4f}", f"{d.kl_p99_9:.2f}"]
        place = text_name(text.source, figures.evaluation.seed)
        rows.append([f"{text.kind}: {place}", f"{d.n_tokens}", *perplexities, *kl, f"{d.same_top1:.1%}"])
    return format_rows([*header, "same top-1"], rows) if rows else "Nothing was evaluated.\n"


def _speed_row(dense: BenchRecord, pruned: BenchRecord) -> list[str]:
    title = f"{WORKLOAD_TITLES[dense.workload]}, {dense.test}" if dense.workload != "load" else "loading"
    title += f", {dense.n_threads} thread" + ("s" if dense.n_threads > 1 else "")
    if not (dense.ok and pruned.ok):
        return [title, *("measured" if r.ok else "failed" for r in (dense, pruned)), "-"]
    c = compare_records(dense, pruned)
    if c.ratio is None or dense.void or pruned.void:
        return [title, speed_text(dense), speed_text(pruned), f"{c.verdict} ({c.reason})"]
    return [title, *speeds_text(c), f"{ratio_text(c)}: {c.verdict}"]


def ratio_text(comparison: Comparison) -> str:
    """A ratio with its interval."""
    c = comparison
    basis = ", by processor time" if c.basis == "cpu" else ""
    return f"{c.ratio:.2f} times as fast ({c.low:.2f} to {c.high:.2f}){basis}"


def _parity_table(figures: ReleaseFigures) -> str:
    header = [
        "file",
        "stored types",
        "max logit diff",
        "KL mean",
        "KL p99.9",
        "same top-1",
        "perplexity ratio",
    ]
    rows = []
    for record in (*figures.dense, *figures.pruned):
        types = ", ".join(f"{count} {kind}" for kind, count in sorted(record.tensor_types.items()))
        p = record.parity
        figures_of = [f"{p.max_logit_diff:.2g}", f"{p.kl_mean:.4f}", f"{p.kl_p99_9:.3f}"]
        rows.append([record.file, types, *figures_of, f"{p.same_top1:.1%}", f"{p.ppl_ratio:.4f}"])
    return format_rows(header, rows)


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


def _widths_table(plan: PruningPlan) -> str:
    rows = [
        [str(i), str(dense), str(block.width), f"{block.width / dense:.3f}", f"{block.importance:.4f}"]
        for i, (dense, block) in enumerate(zip(plan.dense_shape.ffn_widths, plan.blocks, strict=True))
    ]
    return format_rows(["block", "dense", "kept", "share", "importance"], rows)


def text_name(reference: str, seed: int) -> str:
    """What a text reference is called in reports."""
    if reference == "self":
        return f"sampled from the dense model, seed {seed}"
    return Path(reference).name if Path(reference).exists() else reference
